"""What a check found, as a text for people and as JSON: counts, a histogram of lengths, problems."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from re2tal_jax.data.check.annotations import Subset
from re2tal_jax.data.check.problems import Problem, as_json, as_text
from re2tal_jax.data.findings import counted
from re2tal_jax.data.video_folder import printable

_BAR = 40
_CLASSES_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a check found: the subsets that could be opened (none or two) and the problems."""

    subsets: tuple[Subset, ...]
    problems: tuple[Problem, ...]

    @property
    def failed(self) -> bool:
        """Whether there are errors."""
        return any(found.severity == "error" for found in self.problems)

    def __str__(self) -> str:
        tables = [_table(self.subsets), _class_table(self.subsets), histogram(self.subsets)] if self.subsets else []
        return "\n\n".join([*tables, as_text(self.problems)])

    def as_json(self) -> dict[str, Any]:
        """Return the report as what JSON can hold."""
        return {"subsets": [_counts(subset) for subset in self.subsets], "problems": as_json(self.problems)}


def _counts(subset: Subset) -> dict[str, Any]:
    lengths = [subset.length_sec(segment) for segment in subset.usable]
    return {
        "section": subset.section,
        "subset": subset.name,
        "videos": len(subset.videos),
        "files": len(subset.dataset.video_paths),
        "hours": round(_seconds(subset) / 3600, 3),
        "segments": len(subset.segments),
        "classes": dict(sorted(Counter(segment.label for segment in subset.usable).items())),
        "median_length_sec": round(float(np.median(lengths)), 3) if lengths else None,
        "longest_sec": round(max(lengths), 3) if lengths else None,
    }


def _seconds(subset: Subset) -> float:
    return sum(subset.duration_sec(name) for name in subset.videos)


def _table(subsets: Sequence[Subset]) -> str:
    rows: list[tuple[str, ...]] = [
        ("", "subset", "videos", "files", "length", "segments", "classes", "median", "longest")
    ]
    for subset in subsets:
        counts = _counts(subset)
        lengths = [counts["median_length_sec"], counts["longest_sec"]]
        rows.append(
            (
                counts["section"],
                printable(counts["subset"]),
                *(f"{counts[key]:,}" for key in ("videos", "files")),
                span(_seconds(subset)),
                f"{counts['segments']:,}",
                f"{len(counts['classes']):,}",
                *("" if length is None else f"{length:,.1f} s" for length in lengths),
            )
        )
    return _aligned(rows, left=2)


def span(seconds: float) -> str:
    """Return a time in the unit that suits it: "40 s", "12.5 min", "3.2 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def _class_table(subsets: Sequence[Subset]) -> str:
    """Return the classes with the fewest segments, how many they have in each subset."""
    counts = [Counter(segment.label for segment in subset.usable) for subset in subsets]
    classes = sorted(subsets[0].dataset.classes, key=lambda name: (counts[0][name], name))
    shown = classes[:_CLASSES_SHOWN]
    title = counted(len(classes), "class", "classes")
    title += f", the {len(shown)} with fewest segments" if shown != classes else ""
    rows: list[tuple[str, ...]] = [(title, *(subset.section for subset in subsets))]
    rows += [(printable(name), *(f"{count[name]:,}" for count in counts)) for name in shown]
    return _aligned(rows, left=1)


def _aligned(rows: Sequence[Sequence[str]], *, left: int) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def histogram(subsets: Sequence[Subset]) -> str:
    """Return the lengths of segments as a text, one line for each doubling, the subsets side by side."""
    lengths = [[subset.length_sec(segment) for segment in subset.usable] for subset in subsets]
    if not any(lengths):
        return "no segments"
    bins = [Counter(math.floor(math.log2(max(length, 2**-5))) for length in part) for part in lengths]
    low, high = min(min(part) for part in bins if part), max(max(part) for part in bins if part)
    most = max(max(part.values()) for part in bins if part)
    rows: list[tuple[str, ...]] = [("length of segments", *(subset.section for subset in subsets), "")]
    for exponent in range(low, high + 1):
        count = bins[0][exponent]
        bar = "#" * math.ceil(_BAR * count / most)
        edges = f"{2.0**exponent:g} to {2.0 ** (exponent + 1):g} s" if exponent > -5 else f"below {2.0**-4:g} s"
        rows.append((edges, *(f"{part[exponent]:,}" for part in bins), bar))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join(
            [row[0].rjust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)), row[-1]]
        ).rstrip()
        for row in rows
    )
