"""The tables of docs/results.csv for people: `python -m benchmarks.tables` rewrites README.md and docs/results.md.

docs/results.md shows every benchmark, README.md what SHOWN says. Every figure is a row of the CSV: benchmarks append
theirs (`--out docs/results.csv`), a figure that was seen in a run is added by hand:

    python -m benchmarks.tables --add demo "average mAP@0.3:0.1:0.7, seed 0" 85.2 "%"

Of rows that measure the same, the last one counts; of a benchmark in turns, whose figures belong together, the last
run. `--check` writes nothing and exits 1 if a table is out of date.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import COLUMNS, append_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results.csv"
BEGIN, END = "<!-- results: written by python -m benchmarks.tables -->", "<!-- end of results -->"

MATRICES = ("stage memory", "step memory by way", "step memory by frames", "against PyTorch")
"""Benchmarks whose settings are "WHERE: WHAT, MEASURE"; they are shown with a row for WHAT, a column for MEASURE."""
IN_TURNS = ("against PyTorch",)


@dataclass(frozen=True)
class Table:
    """A table of README.md.

    Args:
        title: heads its first column.
        benchmarks: whose rows it shows, in this order.
        columns: measures of a matrix; none for a list.
        only: a pattern that a setting has to contain, of a matrix the part before the measure.
    """

    title: str
    benchmarks: tuple[str, ...]
    columns: tuple[str, ...] = ()
    only: str = ""


SHOWN = (
    Table(
        "Temporaries of a training step",
        ("step memory by way",),
        ("ordinary", "checkpointed", "reversible by whole tensors", "reversible by tiles"),
    ),
    Table(
        "Forward and backward on the CPU", ("against PyTorch",), ("fastest step", "median step", "peak RSS"), "^[^/]*$"
    ),
    Table(
        "The same in quotients",
        ("against PyTorch",),
        ("fastest step", "median of rounds", "peak memory"),
        "/ OpenTAD (plain|reversible)$",
    ),
    Table("Other temporaries of a training step", ("step memory",), only="1,536|Re2Swin-B|TPU|batch 8"),
    Table("Besides", ("gradients", "reconstruction", "demo")),
)

Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV, with their `line`; of those that measure the same only the last.

    Raises:
        ValueError: other columns than `benchmarks.rows` writes, or a row with too few or too many.
    """
    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    if tuple(header) != COLUMNS or any(len(line) != len(COLUMNS) for line in lines):
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)} in every row.")
    rows: dict[tuple[str, str], Row] = {}
    for number, line in enumerate(lines):
        row: Row = dict(zip(COLUMNS, line, strict=True)) | {"line": str(number)}
        key = row["benchmark"], row["setting"]
        rows.pop(key, None)
        rows[key] = row
    return list(rows.values())


def readme_tables(rows: Iterable[Row], shown: Sequence[Table] = SHOWN) -> str:
    """Return the chosen rows as Markdown.

    Raises:
        ValueError: a table that nothing is found for.
    """
    rows = list(rows)
    lines = []
    for table in shown:
        own = [row for name in table.benchmarks for row in _counted(rows, name)]
        own = [row for row in own if re.search(table.only, _part(row, 0) if table.columns else row["setting"])]
        part = (
            _matrices(own, table.columns, table.title)
            if table.columns
            else _list(own, table.title, named=len(table.benchmarks) > 1)
        )
        if not own or not part:
            raise ValueError(f"README.md's table {table.title!r}: {RESULTS} has no row of it.")
        lines += part
    return "\n".join(lines).rstrip()


def full_tables(rows: Iterable[Row]) -> str:
    """Return every row as Markdown: a section for each benchmark, and in it a table for each time and place."""
    rows = list(rows)
    lines = []
    first = [name for table in SHOWN for name in table.benchmarks]
    for benchmark in dict.fromkeys([*first, *(row["benchmark"] for row in rows)]):
        places: dict[tuple[str, ...], list[Row]] = {}
        for row in _counted(rows, benchmark):
            places.setdefault((row["date"], row["machine"], row["versions"]), []).append(row)
        lines += [f"## {benchmark}", ""] if places else []
        for place, own in places.items():
            lines += [", ".join(place) + ":", ""]
            lines += _matrices(own) if benchmark in MATRICES else _list(own, "setting")
    return "\n".join(lines).rstrip()


def _counted(rows: Iterable[Row], benchmark: str) -> list[Row]:
    """Return the rows of a benchmark that count."""
    own = [row for row in rows if row["benchmark"] == benchmark]
    last = max(own, key=lambda row: int(row["line"]), default=None)
    if last is None or benchmark not in IN_TURNS:
        return own
    return [row for row in own if all(row[key] == last[key] for key in ("date", "machine", "versions"))]


def _part(row: Row, part: int) -> str:
    """Return of a matrix's setting what is before the measure (0), or the measure (2)."""
    return row["setting"].rpartition(", ")[part]


def _list(rows: Iterable[Row], title: str, *, named: bool = False) -> list[str]:
    """Return a table with a line for each row, which names its benchmark if `named`."""
    lines = [f"| {title} | result |", "|---|---:|"]
    for row in rows:
        lines.append(f"| {row['benchmark'] + ': ' if named else ''}{row['setting']} | {figure(row)} |")
    return [*lines, ""]


def _matrices(rows: Iterable[Row], columns: Sequence[str] = (), title: str = "") -> list[str]:
    """Return a table for each place, quotients apart; of the measures `columns` alone, if some are named."""
    tables: dict[tuple[str, bool], dict[str, dict[str, Row]]] = {}
    for row in rows:
        where, _, what = _part(row, 0).partition(": ")
        if not columns or _part(row, 2) in columns:
            tables.setdefault((where, " / " in what), {}).setdefault(what, {})[_part(row, 2)] = row
    lines = []
    for (where, _), table in tables.items():
        measures = columns or list(dict.fromkeys(measure for found in table.values() for measure in found))
        head = f"{title}, {where}" if title else where
        lines += [f"| {head} | {' | '.join(measures)} |", "|---" + "|---:" * len(measures) + "|"]
        for what, found in table.items():
            cells = (figure(found[measure]) if measure in found else "" for measure in measures)
            lines.append(f"| {what} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def figure(row: Row) -> str:
    """Return value and unit: thousands set apart, two digits of what is tiny."""
    value = float(row["value"])
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.2g}" if 0 < abs(value) < 1e-3 else row["value"]
    return f"{text} {row['unit']}".strip()


def between_markers(text: str, table: str) -> str:
    """Return the text with the table between the two markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"expected one {BEGIN} and after it one {END}.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def pages() -> dict[Path, str]:
    """Return the pages with tables, as they should be."""
    rows = read_rows(RESULTS)
    tables = {ROOT / "README.md": readme_tables(rows), ROOT / "docs" / "results.md": full_tables(rows)}
    return {path: between_markers(path.read_text(encoding="utf-8"), table) for path, table in tables.items()}


def main() -> int:
    """Rewrite the tables, or tell whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is out of date")
    parser.add_argument("--add", nargs=4, metavar=("BENCHMARK", "SETTING", "VALUE", "UNIT"), help="append a row first")
    options = parser.parse_args()
    if options.add:
        benchmark, setting, value, unit = options.add
        append_rows(RESULTS, [(benchmark, setting, float(value), unit)], packages=("jax", "flax", "numpy"))
    stale = {path: text for path, text in pages().items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'out of date' if options.check else 'rewritten'}")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
