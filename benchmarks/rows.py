"""The CSV that every benchmark appends its figures to."""

import csv
import datetime
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

COLUMNS = ("date", "machine", "versions", "benchmark", "setting", "value", "unit")
Row = tuple[str, str, float, str]
"""Benchmark, setting, value, unit."""


def append_rows(path: Path, rows: Iterable[Row], *, packages: tuple[str, ...], cores: int | None = None) -> None:
    """Append rows, with date, machine and the versions of `packages`, to a CSV that is made if absent."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = f"{platform.machine()}, {cores or os.cpu_count()} of {os.cpu_count()} cores"
    versions = ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([COLUMNS] if new else [])
        writer.writerows((date, machine, versions, b, s, f"{value:.4g}", unit) for b, s, value, unit in rows)
