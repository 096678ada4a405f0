"""Replay golden files: `python -m tests.parity PATH …`; exit 1 if any array is beyond its tolerance."""

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

import tests.parity as package
from tests.parity.replay import Row

FOLDERS = ("map", "data", "optim")


def replays() -> list[ModuleType]:
    """Every module of this package that says what it recognises."""
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("__main__", "replay"))
    return [importlib.import_module(f"tests.parity.{name}") for name in names]


def load(path: Path) -> object:
    """Return the arrays of an .npz (its `meta` parsed), the content of a .json, or None for a folder."""
    if path.is_dir():
        return None
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path, allow_pickle=False) as file:
        content = {key: file[key] for key in file.files}
    if "meta" in content:
        content["meta"] = json.loads(str(content["meta"]))
    return content


def expand(path: Path) -> Iterator[Path]:
    """A parity folder as a whole becomes its files and its three replayed folders."""
    if path.is_dir() and path.name not in FOLDERS:
        for child in sorted(path.iterdir()):
            if (child.is_dir() and child.name in FOLDERS) or child.suffix in (".npz", ".json"):
                yield child
    else:
        yield path


def replay(path: Path) -> list[Row]:
    """Return one row per compared array of a golden file or folder."""
    content = load(path)
    for module in replays():
        if module.recognises(path, content):
            return list(module.replay(path, content))
    raise SystemExit(f"{path}: no replay recognises this file (the schema is in parity/MANIFEST.md)")


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 if a row failed or nothing was compared."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--failures", action="store_true", help="print only rows beyond their tolerance")
    options = parser.parse_args(arguments)
    rows, failed = 0, 0
    for path in (p for given in options.paths for p in expand(given)):
        for row in replay(path):
            rows, failed = rows + 1, failed + (not row.passed)
            if not (options.failures and row.passed):
                verdict = "ok" if row.passed else "FAIL"
                print(f"{path.name:40s} {row.name:70s} {row.error:9.2e} {row.tolerance:9.2e} {verdict}")
    print(f"{rows} arrays compared, {failed} beyond their tolerance")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
