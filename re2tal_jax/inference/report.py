"""A picture of an evaluation: what papers print, which classes are weak, and what was found on some videos."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from re2tal_jax.evaluation import DetectionMap

MAX_VIDEOS, MAX_CLASSES, MAX_SHOWN, MAX_LETTERS = 8, 20, 30, 28


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


def draw_tiou(axes: Axes, scored: DetectionMap) -> None:
    """Draw mAP over the tIoU threshold."""
    axes.plot(list(scored.per_tiou), [100 * v for v in scored.per_tiou.values()], marker="o")
    axes.set(xlabel="tIoU threshold", ylabel="mAP (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)


def draw_classes(axes: Axes, scored: DetectionMap) -> None:
    """Draw the average precision of each class, the best and worst ones if there are many."""
    means = sorted((float(np.mean(ap)), name) for name, ap in scored.per_class.items())
    if len(means) > MAX_CLASSES:
        means = means[: MAX_CLASSES // 2] + means[-MAX_CLASSES // 2 :]
    axes.barh(range(len(means)), [100 * value for value, _ in means])
    axes.set_yticks(range(len(means)), [_short(name) for _, name in means])
    axes.set(xlabel="average precision, mean over tIoU (%)", xlim=(0, 100))


def draw_timelines(axes: Axes, videos: Mapping[str, Any], results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw, for the first videos with actions, ground truth (upper bar) and detections (lower), colour by class."""
    shown = [video_id for video_id in sorted(videos) if videos[video_id]["annotations"]][:MAX_VIDEOS]
    labels = sorted({a["label"] for v in shown for a in [*videos[v]["annotations"], *results.get(v, ())]})
    colors = dict(zip(labels, matplotlib.colormaps["tab20"](np.linspace(0, 1, max(len(labels), 1))), strict=False))
    for row, video_id in enumerate(shown):
        scale = 100 / float(videos[video_id]["duration"])
        for annotation in videos[video_id]["annotations"]:
            _bar(axes, row + 0.18, annotation, colors, scale, 1.0)
        best = sorted(results.get(video_id, ()), key=lambda entry: entry["score"])[-MAX_SHOWN:]
        for detection in best:
            _bar(axes, row - 0.18, detection, colors, scale, min(max(float(detection["score"]), 0.02), 1.0))
    for label in labels[:MAX_CLASSES]:
        axes.barh(0, 0, color=colors[label], label=_short(label))
    if labels:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, fontsize="small")
    axes.set(xlim=(0, 100), xlabel="% of the video; ground truth above, detections below (opacity: score)")
    axes.set_yticks(range(len(shown)), map(_short, shown), fontsize="small")


def _short(name: str) -> str:
    """Return a name that leaves room for the picture."""
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…"


def _bar(
    axes: Axes, y: float, entry: Mapping[str, Any], colors: Mapping[str, Any], scale: float, opacity: float
) -> None:
    start, end = entry["segment"]
    axes.barh(y, (end - start) * scale, left=start * scale, height=0.3, color=colors[entry["label"]], alpha=opacity)
