"""Class lists: the order in which a file lists names is the order of the network's outputs."""

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

from re2tal_jax.errors import DataError

BACKGROUND = "Background"
_NUMBERED = re.compile(r"(\d+)\s+(\S.*)")


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Read a class list.

    Three forms: one name a line; a number and a name on every line (THUMOS-14's class index); a JSON object of names
    and numbers. Numbers give the order, need not be consecutive, and a "Background" numbered 0 is left out.

    Raises:
        DataError: the file is missing, empty, not UTF-8 or malformed, or lists a name or number twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"Class list {path} does not exist; leave the option out to use the annotation's own labels.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if path.suffix == ".json":
        names = _in_order(path, _json_pairs(path, text))
    elif lines and all(numbered):
        names = _in_order(path, [(int(m[1]), m[2]) for m in numbered if m])
    else:
        names = lines
    if not names:
        raise DataError(f"{path}: no class; one name a line is expected.")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise DataError(f"{path}: class {twice!r} is listed twice.")
    return tuple(names)


def infer_classes(path: Path, labels: Iterable[str]) -> tuple[str, ...]:
    """Return the labels of an annotation file in alphabetical order."""
    names = tuple(sorted(labels))
    if not names:
        raise DataError(f"{path}: no segment with a label, so no classes; name a class list file (option classes).")
    return names


def _json_pairs(path: Path, text: str) -> list[tuple[int, str]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}.") from error
    if not isinstance(content, dict) or not all(type(number) is int for number in content.values()):
        raise DataError(f"{path}: a class list in JSON is an object of names and whole numbers.")
    return [(number, name) for name, number in content.items()]


def _in_order(path: Path, pairs: list[tuple[int, str]]) -> list[str]:
    pairs = sorted(pairs)
    twice = next((a for a, b in itertools.pairwise(pairs) if a[0] == b[0]), None)
    if twice is not None:
        raise DataError(f"{path}: number {twice[0]} is given twice, to {twice[1]!r} and another class.")
    return [name for number, name in pairs if not (number == 0 and name == BACKGROUND)]
