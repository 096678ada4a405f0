"""Mean average precision of temporal action localization, as the ActivityNet challenge defines it.

Every (class, video) pair is grouped once; all detections of all classes are then matched together, threshold by
threshold, in a few rounds of array operations. Ties are resolved in a fixed way: of equal scores the one earlier in the
file comes first (the official script leaves it to an unstable sort), of equally good ground truths the later one.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from re2tal_jax.activitynet_format import Instances, columns, load, read_json
from re2tal_jax.errors import DataError
from re2tal_jax.segments import paired_tiou

Source = str | os.PathLike[str] | Mapping[str, Any]

_DUPLICATE_SEC = 1e-3
_PAIRS_AT_ONCE = 1 << 21


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
    found, truth, thresholds = matching.found, matching.truth, matching.tiou_thresholds
    return DetectionMap(
        subset=subset,
        tiou_thresholds=thresholds,
        per_class=matching.average_precision(np.ones(matching.correct.shape, bool)),
        recall=_recall(matching.pairs, found, truth, thresholds, recall_at),
        num_ground_truth=len(truth),
        num_predictions=matching.num_predictions,
        findings=matching.findings,
        blocked=_read_blocked(blocked),
    )


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """Instances of known classes, ordered by class; `group` is unique per (class, video), and -1 meets no segment.

    Detections are ordered by class, then best first; ground truth has score 1. `video` numbers `video_ids`, the videos
    of the ground truth; -1 is a video without any.
    """

    classes: tuple[str, ...]
    video_ids: tuple[str, ...]
    label: Int[np.ndarray, " N"]
    video: Int[np.ndarray, " N"]
    group: Int[np.ndarray, " N"]
    segments: Float[np.ndarray, "N 2"]
    scores: Float[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.label)

    def of_class(self, index: int) -> slice:
        """Return where the instances of a class lie."""
        low, high = np.searchsorted(self.label, (index, index + 1)).tolist()
        return slice(low, high)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """(detection, ground truth) pairs of one group that overlap; by detection, then best overlap first."""

    found: Int[np.ndarray, " P"]
    truth: Int[np.ndarray, " P"]
    tiou: Float[np.ndarray, " P"]


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Which detection found which ground-truth segment, at each threshold.

    Attributes:
        tiou_thresholds: ascending.
        found: the N detections of classes with ground truth.
        truth: the M ground-truth segments.
        pairs: those of one class and video that overlap by the lowest threshold or more.
        finder: for each threshold and segment the detection that found it, N where none did.
        num_predictions: detections in the file, of any class.
        findings: as in `DetectionMap`.
    """

    tiou_thresholds: tuple[float, ...]
    found: Grouped
    truth: Grouped
    pairs: Pairs
    finder: Int[np.ndarray, "L M"]
    num_predictions: int
    findings: dict[str, int]

    @property
    def correct(self) -> Bool[np.ndarray, "L N"]:
        """Tell for each threshold which detections are right."""
        right = np.zeros((len(self.finder), len(self.found) + 1), bool)
        np.put_along_axis(right, self.finder, True, axis=1)
        return right[:, :-1]

    def average_precision(self, kept: Bool[np.ndarray, "L N"]) -> dict[str, Float[np.ndarray, " L"]]:
        """Return the area under the interpolated precision-recall curve of each class, of the detections `kept`."""
        correct = self.correct & kept
        result = {}
        for i, name in enumerate(self.truth.classes):
            rows = self.found.of_class(i)
            right, counted = correct[:, rows], kept[:, rows]
            positives = int((self.truth.label == i).sum())
            result[name] = (_precision(right, counted) * right).sum(axis=1) / positives
        return result

    def precision_recall(self) -> dict[str, list[tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]]]:
        """Return, for each class and threshold, recall after each right detection and the interpolated precision there.

        The area under these steps, each of which ends at its recall, is the average precision.
        """
        correct = self.correct
        result = {}
        for i, name in enumerate(self.truth.classes):
            right = correct[:, self.found.of_class(i)]
            precision = _precision(right, np.ones(right.shape, bool))
            positives = int((self.truth.label == i).sum())
            result[name] = [
                (np.arange(1, row.sum() + 1) / positives, values[row])
                for row, values in zip(right, precision, strict=True)
            ]
        return result


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
    pairs = overlapping_pairs(found, truth, thresholds[0])
    return Matching(
        tiou_thresholds=thresholds,
        found=found,
        truth=truth,
        pairs=pairs,
        finder=np.stack([_match(pairs, tiou, len(found), len(truth)) for tiou in thresholds]),
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


def overlapping_pairs(found: Grouped, truth: Grouped, smallest: float) -> Pairs:
    """Return the pairs of one group that overlap by `smallest` or more; `truth` is ordered by group."""
    first = np.searchsorted(truth.group, found.group, side="left")
    count = np.searchsorted(truth.group, found.group, side="right") - first
    total = np.concatenate([[0], np.cumsum(count)])
    parts = []
    low = 0
    while low < len(found):  # in pieces: a video may have thousands of detections times hundreds of segments
        high = max(low + 1, int(np.searchsorted(total, total[low] + _PAIRS_AT_ONCE, side="right")) - 1)
        i = np.repeat(np.arange(low, high), count[low:high])
        j = np.arange(total[low], total[high]) - total[i] + first[i]
        overlap = paired_tiou(found.segments[i], truth.segments[j])
        near = overlap >= smallest
        parts.append((i[near], j[near], overlap[near]))
        low = high
    empty = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    i, j, overlap = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
    order = np.lexsort((-j, -overlap, i))
    return Pairs(found=i[order], truth=j[order], tiou=overlap[order])


def _match(pairs: Pairs, threshold: float, num_found: int, num_truth: int) -> Int[np.ndarray, " M"]:
    """Return for each ground-truth segment the detection that found it, `num_found` if none did.

    Detections choose in order of score, each the best segment left. This is found by proposals (Gale & Shapley 1962):
    all detections propose to their best segment at once, a segment holds on to the best-scored proposer, and who is
    refused or displaced proposes to the next. The result is that of the one-by-one procedure, in a few rounds.
    """
    good = pairs.tiou >= threshold
    segment = pairs.truth[good]
    end = np.cumsum(np.bincount(pairs.found[good], minlength=num_found))
    choice = np.concatenate([[0], end[:-1]])
    holder = np.full(num_truth, num_found)
    active = np.flatnonzero(choice < end)
    while active.size:
        wanted = segment[choice[active]]
        before = holder[wanted]
        np.minimum.at(holder, wanted, active)
        displaced = np.unique(before[(before < num_found) & (before != holder[wanted])])
        refused = np.concatenate([active[holder[wanted] != active], displaced])
        choice[refused] += 1
        active = np.sort(refused[choice[refused] < end[refused]])
    return holder


def _precision(right: Bool[np.ndarray, "L n"], counted: Bool[np.ndarray, "L n"]) -> Float[np.ndarray, "L n"]:
    """Return the interpolated precision of a class: the best at this recall or more, of the detections counted."""
    precision = np.cumsum(right, axis=1) / np.maximum(np.cumsum(counted, axis=1), 1)
    return np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def _recall(
    pairs: Pairs, found: Grouped, truth: Grouped, thresholds: Sequence[float], recall_at: Sequence[int]
) -> dict[tuple[float, int], float]:
    by_group = np.argsort(found.group, kind="stable")
    place = np.empty(len(found), np.int64)  # the rank of a detection within its class and video
    place[by_group] = np.arange(len(found)) - np.searchsorted(found.group[by_group], found.group[by_group])
    sizes = np.searchsorted(truth.group, truth.group, side="right") - np.searchsorted(truth.group, truth.group)
    positives = np.bincount(truth.label, minlength=len(truth.classes))
    result = {}
    for k in recall_at:
        allowed = place[pairs.found] < k * sizes[pairs.truth]
        best = np.zeros(len(truth))
        np.maximum.at(best, pairs.truth[allowed], pairs.tiou[allowed])
        for tiou in thresholds:
            hits = np.bincount(truth.label, weights=best >= tiou, minlength=len(truth.classes))
            result[tiou, k] = float(np.mean(hits / positives))
    return result
