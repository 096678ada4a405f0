"""Which detection found which ground-truth segment: all classes and videos together, by operations on whole arrays.

Every (class, video) pair is grouped once; all detections of all classes are then matched together, threshold by
threshold, in a few rounds. Of equally good ground truths a detection takes the later one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from re2tal_jax.segments import paired_tiou

_PAIRS_AT_ONCE = 1 << 21


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

    def recall(self, recall_at: Sequence[int]) -> dict[tuple[float, int], float]:
        """Return (threshold, k) to recall@k, for each k of `recall_at`; see `evaluation.DetectionMap`."""
        found, truth, pairs = self.found, self.truth, self.pairs
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
            for tiou in self.tiou_thresholds:
                hits = np.bincount(truth.label, weights=best >= tiou, minlength=len(truth.classes))
                result[tiou, k] = float(np.mean(hits / positives))
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


def match_groups(
    found: Grouped, truth: Grouped, tiou_thresholds: tuple[float, ...]
) -> tuple[Pairs, Int[np.ndarray, "L M"]]:
    """Return `pairs` and `finder` of a `Matching`; thresholds are ascending, `truth` is ordered by group."""
    pairs = overlapping_pairs(found, truth, tiou_thresholds[0])
    return pairs, np.stack([_find(pairs, tiou, len(found), len(truth)) for tiou in tiou_thresholds])


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


def _find(pairs: Pairs, threshold: float, num_found: int, num_truth: int) -> Int[np.ndarray, " M"]:
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
