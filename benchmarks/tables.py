"""The tables of docs/results.csv for people: `python -m benchmarks.tables` rewrites README.md and docs/results.md.

README.md shows the rows of SHOWN, docs/results.md all of them, by benchmark. Every figure is a row of the CSV:
benchmarks append theirs (`--out docs/results.csv`), a figure that was seen in a run is added by hand:

    python -m benchmarks.tables --add demo "average mAP@0.3:0.1:0.7, seed 0" 85.2 "%"

Of rows that measure the same, the last one counts; beside a time in turns stands what earlier runs with the same
versions gave. `--check` writes nothing and exits 1 if a table is out of date.
"""

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.rows import COLUMNS, append_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results.csv"
BEGIN, END = "<!-- results: written by python -m benchmarks.tables -->", "<!-- end of results -->"

CONTESTANTS = (
    "OpenTAD plain",
    "OpenTAD reversible",
    "ours rewired (workspace 4194304, stored_blocks 2)",
    "ours rewired (workspace 4194304, stored_blocks 4)",
)
SHOWN = {
    "step memory": ("Memory of a training step", ("",)),
    "step memory by way": (
        "The same step of the ordinary network",
        tuple(
            f"{name}, ordinary, for h100"
            for name in (
                "video_swin_tiny, 768 frames at 224 x 224",
                "slowfast_r101, 768 frames at 224 x 224",
                "vit_base, 768 frames at 160 x 160",
            )
        ),
    ),
    "stage memory": ("Memory of the backward pass, one stage of Swin", ("for an H100",)),
    "against PyTorch": (
        "The same network on two CPU cores, forward and backward",
        tuple(f": {one}, {what}" for one in CONTESTANTS for what in ("fastest step", "median step", "peak RSS")),
    ),
    "gradients": ("Reversible gradients", ("",)),
    "reconstruction": ("States recomputed in the backward pass", ("",)),
    "demo": ("`make demo`", ("",)),
}
"""Benchmarks that README.md shows, what it calls them, and how the settings end that it shows, all in this order."""

MATRICES = ("against PyTorch",)
"""Benchmarks in turns. Settings are "WHERE: WHAT, MEASURE", and are shown with a column for each measure; all runs on
the same machine with the same versions count."""

Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV, of those that measure the same only the last, in the order of their first.

    `runs` of a row are the values, apart by spaces, of all that were measured as the last was.

    Raises:
        ValueError: other columns than `benchmarks.rows` writes, or a row with too few or too many.
    """
    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    if tuple(header) != COLUMNS or any(len(line) != len(COLUMNS) for line in lines):
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)} in every row.")
    rows: dict[tuple[str, str], Row] = {}
    for line in lines:
        row: Row = dict(zip(COLUMNS, line, strict=True))
        before = rows.get((row["benchmark"], row["setting"]))
        alike = before is not None and all(before[key] == row[key] for key in ("machine", "versions"))
        row["runs"] = f"{before['runs']} {row['value']}" if before and alike else row["value"]
        rows[row["benchmark"], row["setting"]] = row
    return list(rows.values())


def readme_table(rows: Iterable[Row]) -> str:
    """Return the chosen rows as Markdown, grouped by benchmark."""
    rows = list(rows)
    lines = ["| measured | setting | result |", "|---|---|---:|"]
    for benchmark, (title, endings) in SHOWN.items():
        own = [row for row in rows if row["benchmark"] == benchmark]
        own = [row for ending in endings for row in own if row["setting"].endswith(ending)]
        if benchmark in MATRICES:
            for (where, what), measures in _matrix(own).items():
                told = ", ".join(f"{spread(row)} {measure}" for measure, row in measures.items())
                lines.append(f"| {title + ': ' + where if title else ''} | {what} | {told} |")
                title = ""
        else:
            for row in own:
                lines.append(f"| {title} | {row['setting']} | {figure(row)} |")
                title = ""
    return "\n".join(lines)


def full_tables(rows: Iterable[Row]) -> str:
    """Return every row as Markdown: a section for each benchmark, and in it a table for each time and place."""
    rows = list(rows)
    lines = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        lines += [f"## {benchmark}", ""]
        places: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            if row["benchmark"] == benchmark:
                places.setdefault((row["date"], row["machine"], row["versions"]), []).append(row)
        for place, own in places.items():
            lines += [", ".join(place) + ":", ""]
            lines += _matrices(own) if benchmark in MATRICES else _list(own)
    return "\n".join(lines).rstrip()


def _list(rows: Iterable[Row]) -> list[str]:
    return ["| | |", "|---|---:|", *(f"| {row['setting']} | {figure(row)} |" for row in rows), ""]


def _matrices(rows: Iterable[Row]) -> list[str]:
    """Return a table of all that have the same measures in the same place."""
    tables: dict[tuple[str, tuple[str, ...]], dict[str, dict[str, Row]]] = {}
    for (where, what), measures in _matrix(rows).items():
        tables.setdefault((where, tuple(measures)), {})[what] = measures
    lines = []
    for (where, columns), table in tables.items():
        lines += [f"| {where} | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
        lines += [f"| {what} | {' | '.join(map(spread, row.values()))} |" for what, row in table.items()]
        lines.append("")
    return lines


def _matrix(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Return rows by (where, what), then by measure."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        where, _, rest = row["setting"].partition(": ")
        what, _, measure = rest.rpartition(", ")
        found.setdefault((where, what), {})[measure] = row
    return found


def figure(row: Row) -> str:
    """Return value and unit: thousands set apart, two digits of what is tiny."""
    return f"{_number(row['value'])} {row['unit']}".strip()


def spread(row: Row) -> str:
    """Return the same, after it the least and the most of several runs."""
    runs = sorted(row["runs"].split(), key=float)
    return figure(row) if len(runs) == 1 else f"{figure(row)} ({_number(runs[0])}…{_number(runs[-1])})"


def _number(text: str) -> str:
    value = float(text)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2g}" if 0 < abs(value) < 1e-3 else text


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
    tables = {ROOT / "README.md": readme_table(rows), ROOT / "docs" / "results.md": full_tables(rows)}
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
