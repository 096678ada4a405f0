"""A picture of an evaluation: what papers print, which classes are weak, and what was found on some videos."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from re2tal_jax.evaluation import DetectionMap
from re2tal_jax.inference.plots import draw_classes, draw_timelines, draw_tiou


def draw_report(
    path: Path, scored: DetectionMap, ground_truth: Mapping[str, Any], predictions: Mapping[str, Any], *, title: str
) -> None:
    """Write a png: mAP by tIoU, AP of the best and worst classes, and timelines of ground truth above detections.

    Args:
        path: of the png, written as a whole or not at all.
        scored: the evaluation.
        ground_truth: ActivityNet form.
        predictions: ActivityNet form; on a timeline opacity is the score.
        title: headline.
    """
    partial = path.with_name(f".{path.name}")
    # Names of classes and videos are shown as they are: "$" starts no formula, and a font may lack their letters.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure = Figure(figsize=(13, 8), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1, 2))
        draw_tiou(figure.add_subplot(grid[0, 0]), scored)
        draw_classes(figure.add_subplot(grid[1, 0]), scored)
        draw_timelines(figure.add_subplot(grid[:, 1]), ground_truth["database"], predictions["results"])
        figure.suptitle(f"{title}: average mAP {100 * scored.average:.1f} %")
        figure.savefig(partial, format="png", dpi=110)
    partial.replace(path)
