"""memory.svg, memory over frames and over depth, from results.csv: `python docs/figures/memory.py`.

The rows are those of `benchmarks.step_memory` and of `benchmarks.memory`, compiled for an H100. The file says
in its metadata which figures it shows; a test compares them with the rows.
"""

import csv
import itertools
import re
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

RESULTS = Path(__file__).parents[1] / "results.csv"
OUT = Path(__file__).with_suffix(".svg")
PANELS = {
    "step memory by": re.compile(r"h100: video_swin_tiny, (?P<x>[\d,]+) frames( at 224 x 224)?, (?P<way>.+)"),
    "stage memory": re.compile(r"H100: (?P<x>\d+) blocks, (?P<way>.+)"),
}
"""How the benchmarks of a panel begin, and the form of the settings that it shows."""

MARKERS = (("o", 6), ("s", 6), ("D", 10), ("^", 6))
"""Of the ways in turn, with their sizes; hollow, as some lie upon others."""

Lines = dict[str, dict[int, float]]


def read_lines(benchmark: str) -> Lines:
    """Return MiB by frames or blocks, in order, of every way of running the network; a later row replaces another."""
    found: Lines = {}
    with RESULTS.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["benchmark"].startswith(benchmark) and (match := PANELS[benchmark].fullmatch(row["setting"])):
                found.setdefault(match["way"], {})[int(match["x"].replace(",", ""))] = float(row["value"])
    return {way: dict(sorted(points.items())) for way, points in found.items()}


def describe() -> str:
    """Return the figures that are shown, as text."""
    lines = [(name, way, points) for name in PANELS for way, points in read_lines(name).items()]
    return "; ".join(
        f"{name}, {way}: {', '.join(f'{x}: {mebibytes:g} MiB' for x, mebibytes in points.items())}"
        for name, way, points in lines
    )


def draw() -> Figure:
    """Return both panels, in GiB; all axes are logarithmic."""
    figure = Figure((10, 4.6), layout="constrained")
    figure.suptitle("224 x 224 pixels")
    frames, depth = figure.subplots(1, 2)
    _draw(frames, read_lines("step memory by"))
    frames.set(title="Training step, Swin-T and ActionFormer", xlabel="frames")
    _draw(depth, read_lines("stage memory"))
    depth.set(title="Gradient of Swin's first stage, 32 frames", xlabel="blocks")
    return figure


def _draw(axes: Axes, lines: Lines) -> None:
    for (way, points), (marker, size) in zip(lines.items(), itertools.cycle(MARKERS), strict=False):
        gib = [mebibytes / 1024 for mebibytes in points.values()]
        axes.plot(list(points), gib, marker=marker, markersize=size, fillstyle="none", label=way)
    ticks = sorted({x for points in lines.values() for x in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("temporaries for an H100, GiB")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)


if __name__ == "__main__":
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "memory"}):
        draw().savefig(OUT, metadata={"Description": describe(), "Date": None})
