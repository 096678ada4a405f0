"""Mean average precision of temporal action localization, as the ActivityNet challenge defines it.

Files are read here, detections are matched by `matching.py`. Ties are resolved in a fixed way: of equal scores the one
earlier in the file comes first (the official script leaves it to an unstable sort), of equally good ground truths the
later one.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from re2tal_jax.activitynet_format import Instances, columns, load, read_json
from re2tal_jax.errors import DataError
from re2tal_jax.matching import Grouped, Matching, match_groups

Source = str | os.PathLike[str] | Mapping[str, Any]

_DUPLICATE_SEC = 1e-3


@dataclass(frozen=True, kw_only=True)
class DetectionMap:
    """Average precision and recall of one prediction file.

    Attributes:
        tiou_thresholds: ascending.
        per_class: class name to its average precision at each threshold, (L,).
        recall: (threshold, k) to recall@k: the mean over classes of the share of ground-truth segments that one of the
            best k * n detections of the class in the video overlaps enough, where n is how many it has there.
        findings: what was left out or is suspicious, and how often.
        blocked: ids of the videos that were left out on both sides.
    """

    subset: str
    tiou_thresholds: tuple[float, ...]
    per_class: dict[str, Float[np.ndarray, " L"]]
    recall: dict[tuple[float, int], float]
    num_ground_truth: int
    num_predictions: int
    findings: dict[str, int]
    blocked: frozenset[str] = frozenset()

    @property
    def per_tiou(self) -> dict[float, float]:
        """Threshold to mean average precision over the classes."""
        means = np.mean(list(self.per_class.values()), axis=0).tolist()
        return dict(zip(self.tiou_thresholds, means, strict=True))

    @property
    def average(self) -> float:
        """Mean over thresholds: the average mAP that papers report."""
        return float(np.mean(list(self.per_tiou.values())))

    def metrics(self) -> dict[str, float]:
        """Return flat names for logs: average_mAP, mAP@0.5, recall@0.5@1, …"""
        maps = {f"mAP@{tiou:g}": value for tiou, value in self.per_tiou.items()}
        recalls = {f"recall@{tiou:g}@{k}": value for (tiou, k), value in self.recall.items()}
        return {"average_mAP": self.average} | maps | recalls

    def __str__(self) -> str:
        """Return the table that papers print, in percent, and the findings below it."""
        columns = [*(f"{tiou:.2f}" for tiou in self.tiou_thresholds), "average"]
        rows = {"mAP (%)": [*self.per_tiou.values(), self.average]}
        for k in sorted({k for _, k in self.recall}):
            values = [self.recall[tiou, k] for tiou in self.tiou_thresholds]
            rows[f"recall@{k} (%)"] = [*values, float(np.mean(values))]
        width = max(map(len, [*rows, "tIoU"]))
        lines = [
            f"{self.subset}: {self.num_ground_truth} ground-truth segments of {len(self.per_class)} classes, "
            f"{self.num_predictions} detections",
            f"{'tIoU':{width}s}" + "".join(f" {column:>7s}" for column in columns),
            *(f"{name:{width}s}" + "".join(f" {100 * v:7.2f}" for v in row) for name, row in rows.items()),
            *(f"{count} {what}" for what, count in self.findings.items()),
        ]
        return "\n".join(lines)


def detection_map(
    ground_truth: Source,
    predictions: Source,
    *,
    subset: str,
    tiou_thresholds: Iterable[float],
    blocked: Collection[str] | os.PathLike[str] | None = None,
    recall_at: Sequence[int] = (1, 5),
) -> DetectionMap:
    """Evaluate detections against ground truth, both paths or parsed content of the ActivityNet form.

    The classes are those with ground truth in the subset. A detection is right if it overlaps an unmatched segment of
    its class and video by the threshold or more: it takes the best such segment. Average precision interpolates at all
    points. Detections on videos without ground truth of their class are wrong ones. Zero-length and reversed
    ground truth, and duplicates within a millisecond, are left out (the official script counts a zero-length one as
    found, since 0/0).

    Args:
        ground_truth: {"database": {video id: {"subset": …, "annotations": [{"segment", "label"}, …]}}}.
        predictions: {"results": {video id: [{"segment", "label", "score"}, …]}}, in seconds.
        subset: exactly as the ground truth writes it.
        tiou_thresholds: each above 0 up to 1.
        blocked: ids of videos to leave out on both sides, or the path of a json list of them.
        recall_at: the k of recall@k.

    Raises:
        DataError: unreadable or malformed files (file, video and entry are named), unknown subset, no ground truth.
        ValueError: thresholds or k out of range.
    """
    if any(k < 1 for k in recall_at):
        raise ValueError(f"recall_at = {tuple(recall_at)!r}: every k must be 1 or more.")
    matching = match_detections(
        ground_truth, predictions, subset=subset, tiou_thresholds=tiou_thresholds, blocked=blocked
    )
    return DetectionMap(
        subset=subset,
        tiou_thresholds=matching.tiou_thresholds,
        per_class=matching.average_precision(np.ones(matching.correct.shape, bool)),
        recall=matching.recall(recall_at),
        num_ground_truth=len(matching.truth),
        num_predictions=matching.num_predictions,
        findings=matching.findings,
        blocked=_read_blocked(blocked),
    )


def match_detections(
    ground_truth: Source,
    predictions: Source,
    *,
    subset: str,
    tiou_thresholds: Iterable[float],
    blocked: Collection[str] | os.PathLike[str] | None = None,
) -> Matching:
    """Match detections with ground truth, as `detection_map` does, whose arguments and errors these are."""
    thresholds = _checked_thresholds(tiou_thresholds)
    left_out = _read_blocked(blocked)
    findings: Counter[str] = Counter()
    truth, known = _read_ground_truth(ground_truth, subset, left_out, findings)
    found, num_predictions = _read_predictions(predictions, truth, known, left_out, findings)
    pairs, finder = match_groups(found, truth, thresholds)
    return Matching(
        tiou_thresholds=thresholds,
        found=found,
        truth=truth,
        pairs=pairs,
        finder=finder,
        num_predictions=num_predictions,
        findings=dict(findings),
    )


def _checked_thresholds(tiou_thresholds: Iterable[float]) -> tuple[float, ...]:
    thresholds = tuple(sorted(round(float(t), 6) for t in tiou_thresholds))  # np.linspace(.3, .7, 5)[3] is not 0.6
    if not thresholds or not all(0 < t <= 1 for t in thresholds) or len(set(thresholds)) < len(thresholds):
        raise ValueError(f"tiou_thresholds = {thresholds!r}: expected different numbers above 0 up to 1.")
    return thresholds


def _read_blocked(blocked: Collection[str] | os.PathLike[str] | None) -> frozenset[str]:
    if blocked is None:
        return frozenset()
    is_path = isinstance(blocked, (str, os.PathLike))
    ids = read_json(blocked) if is_path else blocked
    if isinstance(ids, str) or not isinstance(ids, Collection) or not all(isinstance(i, str) for i in ids):
        raise DataError(f"{blocked if is_path else 'blocked'}: expected a list of video ids, not {ids!r:.80}.")
    return frozenset(ids)


def _read_ground_truth(
    source: Source, subset: str, blocked: frozenset[str], findings: Counter[str]
) -> tuple[Grouped, dict[str, str]]:
    """Return the subset's segments, ordered by (class, video), and the subset of every video of the file."""
    content, name = load(source, "database")
    for video_id, video in content["database"].items():
        if not isinstance(video, Mapping) or "subset" not in video or "annotations" not in video:
            raise DataError(f"{name}: {video_id}: expected 'subset' and 'annotations'; it holds {video!r:.200}.")
    known = {video_id: video["subset"] for video_id, video in content["database"].items()}
    if unknown := blocked - known.keys():
        findings["blocked videos that the ground truth does not have"] = len(unknown)
    if subset not in known.values():
        present = ", ".join(f"{s!r} ({n} videos)" for s, n in sorted(Counter(map(str, known.values())).items()))
        raise DataError(f"{name}: no video is of subset {subset!r}. Present: {present or 'no videos at all'}.")
    chosen = {
        video_id: video["annotations"]
        for video_id, video in content["database"].items()
        if video["subset"] == subset and video_id not in blocked
    }
    instances = columns(chosen, name, scored=False)
    kept = keep_distinct(instances, findings)
    if not kept.any():
        raise DataError(
            f"{name}: subset {subset!r} has no ground-truth segment to evaluate: {len(chosen)} videos, "
            f"{len(instances)} annotations, {len(blocked)} blocked videos, {dict(findings) or 'nothing left out'}."
        )
    classes = tuple(dict.fromkeys(label for label, keep in zip(instances.labels, kept, strict=True) if keep))
    index = {label: i for i, label in enumerate(classes)}
    label = np.array([index.get(label, -1) for label in instances.labels], np.int64)
    group = label * len(chosen) + instances.video
    order = np.flatnonzero(kept)
    order = order[np.argsort(group[order], kind="stable")]
    truth = Grouped(
        classes=classes,
        video_ids=instances.video_ids,
        label=label[order],
        video=instances.video[order],
        group=group[order],
        segments=instances.segments[order],
        scores=np.ones(len(order)),
    )
    return truth, known


def keep_distinct(instances: Instances, findings: Counter[str] | None = None) -> Bool[np.ndarray, " N"]:
    """Tell which ground-truth segments count; the first of duplicates is the one kept, as in ActionFormer.

    What is left out is counted in `findings`.
    """
    findings = Counter() if findings is None else findings
    start, end = instances.segments.T
    keep = end > start
    if not keep.all():
        findings["zero-length or reversed ground-truth segments left out"] = int((~keep).sum())
    seen: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for i in np.flatnonzero(keep).tolist():
        earlier = seen.setdefault((int(instances.video[i]), instances.labels[i]), [])
        if any(abs(start[i] - s) <= _DUPLICATE_SEC and abs(end[i] - e) <= _DUPLICATE_SEC for s, e in earlier):
            keep[i] = False
            findings["duplicate ground-truth segments left out"] += 1
        else:
            earlier.append((start[i], end[i]))
    return keep


def _read_predictions(
    source: Source, truth: Grouped, known: Mapping[str, str], blocked: frozenset[str], findings: Counter[str]
) -> tuple[Grouped, int]:
    """Return detections of known classes, ordered by class and then best first, and how many there were in all."""
    content, name = load(source, "results")
    unblocked = {video_id: entries for video_id, entries in content["results"].items() if video_id not in blocked}
    instances = columns(unblocked, name, scored=True)
    class_index = {label: i for i, label in enumerate(truth.classes)}
    label = np.array([class_index.get(label, -1) for label in instances.labels], np.int64)
    # Videos without ground truth get numbers of their own, so that their detections meet no segment.
    video_index = {video_id: i for i, video_id in enumerate(truth.video_ids)}
    video = np.array([video_index.get(video_id, -1) for video_id in instances.video_ids], np.int64)[instances.video]
    absent = np.array([video_id not in known for video_id in instances.video_ids], bool)[instances.video]
    for what, which in (
        ("detections of labels without ground truth in the subset, ignored", label < 0),
        ("detections on videos unknown to the ground truth, counted as wrong", absent & (label >= 0)),
        ("detections on videos of other subsets, counted as wrong", (video < 0) & ~absent & (label >= 0)),
        ("reversed detections, counted as wrong", instances.segments[:, 1] < instances.segments[:, 0]),
    ):
        if which.any():
            findings[what] = int(which.sum())
    assert instances.scores is not None
    chosen = np.flatnonzero(label >= 0)
    order = chosen[np.lexsort((-instances.scores[chosen], label[chosen]))]
    found = Grouped(
        classes=truth.classes,
        video_ids=truth.video_ids,
        label=label[order],
        video=video[order],
        group=np.where(video >= 0, label * len(truth.video_ids) + video, -1)[order],
        segments=instances.segments[order],
        scores=instances.scores[order],
    )
    return found, len(instances)
