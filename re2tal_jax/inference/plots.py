"""What an evaluation says, as matplotlib figures; `draw_…` puts the same on axes of yours.

Names of classes and videos are shown as they are: "$" starts no formula.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from re2tal_jax.evaluation import DetectionMap
from re2tal_jax.inference.diagnosis import KINDS, MISSED, ErrorBreakdown
from re2tal_jax.matching import Matching

MAX_VIDEOS, MAX_CLASSES, MAX_SHOWN, MAX_LETTERS = 8, 20, 30, 28

KIND_COLORS = ("#009E73", "#56B4E9", "#E69F00", "#0072B2", "#CC79A7", "#7f7f7f", "#D55E00")
"""Of `KINDS` and of what is missed; colours of Okabe & Ito (2008), which colour-blind readers tell apart."""

Results = Mapping[str, Sequence[Mapping[str, Any]]]
P = ParamSpec("P")


def timelines(videos: Mapping[str, Any], results: Results) -> Figure:
    """Return the figure of `draw_timelines`."""
    return _figure((9, 6), draw_timelines, videos, results)


def map_by_tiou(scored: DetectionMap) -> Figure:
    """Return the figure of `draw_tiou`."""
    return _figure((5, 4), draw_tiou, scored)


def class_precision(scored: DetectionMap) -> Figure:
    """Return the figure of `draw_classes`."""
    return _figure((6, 5), draw_classes, scored)


def precision_recall(matching: Matching, tiou: float) -> Figure:
    """Return the figure of `draw_precision_recall`."""
    return _figure((5, 4), draw_precision_recall, matching, tiou)


def length_distribution(matching: Matching, tiou: float) -> Figure:
    """Return the figure of `draw_lengths`."""
    return _figure((6, 4), draw_lengths, matching, tiou)


def score_distribution(matching: Matching, tiou: float) -> Figure:
    """Return the figure of `draw_scores`."""
    return _figure((6, 4), draw_scores, matching, tiou)


def error_breakdown(errors: ErrorBreakdown) -> Figure:
    """Return two axes, `draw_error_profile` and `draw_error_gains`."""
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        profile, gains = figure.subplots(1, 2)
        draw_error_profile(profile, errors)
        draw_error_gains(gains, errors)
    return figure


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


def draw_timelines(axes: Axes, videos: Mapping[str, Any], results: Results) -> None:
    """Draw, for the first videos with actions, ground truth (upper bar) and detections (lower), colour by class.

    Args:
        axes: to draw on.
        videos: the "database" of ground truth in ActivityNet form.
        results: the "results" of predictions.
    """
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


def draw_precision_recall(axes: Axes, matching: Matching, tiou: float) -> None:
    """Draw the interpolated precision of each class over recall, and in black the mean over classes.

    Args:
        axes: to draw on.
        matching: of detections and ground truth.
        tiou: one of the thresholds of `matching`.
    """
    level = _level(matching, tiou)
    recalls = np.linspace(0, 1, 101)
    curves = [curve[level] for curve in matching.precision_recall().values()]
    for recall, precision in curves:
        axes.step([0, *100 * recall], 100 * np.array([*precision[:1], *precision, *[0] * (not len(recall))]), lw=0.8)
    mean = np.mean([_precision_at(recalls, *curve) for curve in curves], axis=0)
    axes.plot(100 * recalls, 100 * mean, color="black", lw=2, label="mean over classes")
    axes.set(xlabel=f"recall (%) at tIoU {tiou:g}", ylabel="precision (%)", xlim=(0, 100), ylim=(0, 102))
    axes.legend(loc="lower left", fontsize="small")
    axes.grid(alpha=0.3)


def draw_lengths(axes: Axes, matching: Matching, tiou: float) -> None:
    """Draw how many ground-truth segments of each length are found at a tIoU threshold, at any score, and missed."""
    found = matching.finder[_level(matching, tiou)] < len(matching.found)
    lengths = matching.truth.segments[:, 1] - matching.truth.segments[:, 0]
    edges = np.geomspace(lengths.min(), max(lengths.max(), lengths.min() * 1.01), 13)
    edges[-1] *= 1.000001  # rounding must not put the longest outside
    edges[0] /= 1.000001
    _stack(axes, edges, [(lengths[found], "found", 0), (lengths[~found], MISSED, 6)])
    axes.set(xscale="log", xlabel=f"length of ground-truth segments (s); found at tIoU {tiou:g}", ylabel="segments")


def draw_scores(axes: Axes, matching: Matching, tiou: float) -> None:
    """Draw how many detections of each score are right at a tIoU threshold, and false."""
    right = matching.correct[_level(matching, tiou)]
    scores = matching.found.scores
    low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 1.0)
    edges = np.linspace(min(low, 0.0), max(high, 1e-6), 31)
    _stack(axes, edges, [(scores[right], "right", 0), (scores[~right], "false", 5)])
    axes.set(yscale="symlog", xlabel=f"score; right at tIoU {tiou:g}", ylabel="detections")


def draw_error_profile(axes: Axes, errors: ErrorBreakdown) -> None:
    """Draw what the best detections are: of each class with n segments the best n, the next n, and so on."""
    bottom = np.zeros(len(errors.shares))
    for kind, share in enumerate(errors.shares.T):
        axes.bar(range(1, len(share) + 1), 100 * share, bottom=bottom, color=KIND_COLORS[kind], label=KINDS[kind])
        bottom += 100 * share
    axes.set(xlabel="rank of detections, in numbers of segments", ylabel="%, mean over tIoU", ylim=(0, 100))
    axes.set_xticks(range(1, len(errors.shares) + 1))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small")


def draw_error_gains(axes: Axes, errors: ErrorBreakdown) -> None:
    """Draw the average mAP won if a kind of error were gone."""
    names = [*KINDS[1:], MISSED]
    bars = axes.barh(names[::-1], [100 * errors.gains[name] for name in names[::-1]], color=KIND_COLORS[:0:-1])
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize="small")
    axes.margins(x=0.12)
    axes.set(xlabel=f"average mAP won (points) over {100 * errors.average_map:.1f} %")


def _figure(
    size: tuple[float, float], draw: Callable[Concatenate[Axes, P], None], *args: P.args, **kwargs: P.kwargs
) -> Figure:
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot(), *args, **kwargs)
    return figure


def _level(matching: Matching, tiou: float) -> int:
    if tiou not in matching.tiou_thresholds:
        raise ValueError(f"tiou = {tiou!r} was not matched. Allowed: {', '.join(map(str, matching.tiou_thresholds))}.")
    return matching.tiou_thresholds.index(tiou)


def _precision_at(
    recalls: Float[np.ndarray, " R"], recall: Float[np.ndarray, " n"], precision: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " R"]:
    """Return the interpolated precision at each recall; 0 beyond the last."""
    return np.append(precision, 0.0)[np.searchsorted(recall, recalls - 1e-9)]


def _stack(
    axes: Axes, edges: Float[np.ndarray, " E"], parts: Sequence[tuple[Float[np.ndarray, " n"], str, int]]
) -> None:
    values, names, kinds = zip(*parts, strict=True)
    axes.hist(list(values), bins=edges.tolist(), stacked=True, label=names, color=[KIND_COLORS[kind] for kind in kinds])
    axes.legend(fontsize="small")


def _short(name: str) -> str:
    """Return a name that leaves room for the picture."""
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…"


def _bar(
    axes: Axes, y: float, entry: Mapping[str, Any], colors: Mapping[str, Any], scale: float, opacity: float
) -> None:
    start, end = entry["segment"]
    axes.barh(y, (end - start) * scale, left=start * scale, height=0.3, color=colors[entry["label"]], alpha=opacity)
