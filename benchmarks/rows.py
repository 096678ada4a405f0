"""The CSV that every benchmark appends its figures to."""

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

COLUMNS = ("date", "machine", "versions", "benchmark", "setting", "value", "unit")
ROOT = Path(__file__).resolve().parents[1]
Row = tuple[str, str, float, str]
"""Benchmark, setting, value, unit."""


def append_rows(
    path: Path,
    rows: Iterable[Row],
    *,
    packages: tuple[str, ...],
    cores: int | None = None,
    others: Mapping[str, str] | None = None,
) -> None:
    """Append rows, with date, machine, the versions of `packages` and our commit, to a CSV that is made if absent.

    `others` are versions of what took part and is not installed here, by name.
    """
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = f"{platform.machine()}, {cores or os.cpu_count()} of {os.cpu_count()} cores"
    installed = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    own = {"re2tal_jax": commit(ROOT)}
    versions = ", ".join(f"{name} {number}" for name, number in {**installed, **(others or {}), **own}.items())
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS] if new else [])
        writer.writerows((date, machine, versions, b, s, f"{value:.4g}", unit) for b, s, value, unit in rows)


def commit(checkout: Path) -> str:
    """Return the short name of a checkout's commit, or words that say it is not known."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout: what was measured is kept all the same
        return "of unknown version"
