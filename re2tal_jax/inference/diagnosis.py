"""Why detections are wrong, and what each kind of error costs.

The kinds and the rule are those of Alwassel, Caba Heilbron, Escorcia, Ghanem: Diagnosing Error in Temporal Action
Detectors, ECCV 2018 (DETAD), section 3. For a threshold t, a detection that found no segment is judged by the segment
of its video, of any class, that it overlaps most:

    overlap >= t      its class: double detection    another class: wrong label
    overlap >= 0.1    its class: localisation        another class: confusion
    less              background
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from re2tal_jax.matching import Grouped, Matching, overlapping_pairs

KINDS = ("true positive", "double detection", "wrong label", "localisation", "confusion", "background")
"""Number k of `error_kinds` is this kind."""

MISSED = "missed"

SMALLEST_TIOU = 0.1
"""Below it a detection is of the background: DETAD's choice."""

PROFILE_GROUPS = 10
"""The profile looks at this many times as many detections as there are segments, in as many groups: DETAD's choice."""


@dataclass(frozen=True, kw_only=True)
class ErrorBreakdown:
    """What is wrong with detections.

    Attributes:
        tiou_thresholds: ascending.
        profile: for each threshold, group and kind a number of detections. Group g holds, of each class with n
            segments, the detections of rank g * n up to (g + 1) * n: the first group would be all right.
        missed: for each threshold the segments that no detection of their class found, however low its score.
        num_ground_truth: of all segments.
        average_map: mean over classes and thresholds.
        gains: kind to the average mAP that is won without it: detections of an error kind taken away, missed segments
            taken out of the ground truth.
    """

    tiou_thresholds: tuple[float, ...]
    profile: Int[np.ndarray, "L G 6"]
    missed: Int[np.ndarray, " L"]
    num_ground_truth: int
    average_map: float
    gains: Mapping[str, float]

    @property
    def shares(self) -> Float[np.ndarray, "G 6"]:
        """Return the share of each kind in each group, mean over thresholds; 0 in a group without detections."""
        counts = self.profile.mean(axis=0)
        return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def break_down(matching: Matching) -> ErrorBreakdown:
    """Return how often each kind of error occurs, and what it costs.

    The average mAP is the ordinary one of `evaluation`; DETAD normalises it by the frequency of classes, and leaves out
    the detections beyond the profile before it repairs anything.
    """
    kinds = error_kinds(matching)
    base = _mean(matching.average_precision(np.ones(kinds.shape, bool)))
    gains = {
        name: _mean(matching.average_precision(kinds != number)) - base
        for number, name in enumerate(KINDS)
        if name != "true positive"
    }
    missed = matching.finder == len(matching.found)
    return ErrorBreakdown(
        tiou_thresholds=matching.tiou_thresholds,
        profile=_profile(matching, kinds),
        missed=missed.sum(axis=1),
        num_ground_truth=len(matching.truth),
        average_map=base,
        gains=gains | {MISSED: _map_of_found(matching, missed) - base},
    )


def error_kinds(matching: Matching) -> Int[np.ndarray, "L N"]:
    """Return for each threshold the kind of each detection, a number of `KINDS`.

    Where the most overlapped segments of two classes are equally good, the one of the detection's class decides.
    """
    overlap, own = _largest_overlaps(matching.found, matching.truth)
    of_class = own == overlap
    thresholds = np.array(matching.tiou_thresholds)[:, None]
    return np.select(
        [matching.correct, overlap >= thresholds, np.broadcast_to(overlap >= SMALLEST_TIOU, matching.correct.shape)],
        [0, np.where(of_class, 1, 2), np.where(of_class, 3, 4)],
        default=5,
    )


def _largest_overlaps(found: Grouped, truth: Grouped) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Return each detection's largest overlap with a segment of its video, of any class and of its own."""
    order = np.argsort(truth.video, kind="stable")
    by_video = replace(
        truth,
        label=truth.label[order],
        video=truth.video[order],
        group=truth.video[order],
        segments=truth.segments[order],
    )
    pairs = overlapping_pairs(replace(found, group=found.video), by_video, SMALLEST_TIOU)
    overlap, own = np.zeros(len(found)), np.zeros(len(found))
    np.maximum.at(overlap, pairs.found, pairs.tiou)
    same = found.label[pairs.found] == by_video.label[pairs.truth]
    np.maximum.at(own, pairs.found[same], pairs.tiou[same])
    return overlap, own


def _profile(matching: Matching, kinds: Int[np.ndarray, "L N"]) -> Int[np.ndarray, "L G 6"]:
    found, truth = matching.found, matching.truth
    positives = np.bincount(truth.label, minlength=len(truth.classes))
    rank = np.arange(len(found)) - np.searchsorted(found.label, found.label)
    group = rank // positives[found.label]
    near = group < PROFILE_GROUPS
    cell = group[near] * len(KINDS) + kinds[:, near]
    counts = [np.bincount(row, minlength=PROFILE_GROUPS * len(KINDS)) for row in cell]
    return np.stack(counts).reshape(-1, PROFILE_GROUPS, len(KINDS))


def _map_of_found(matching: Matching, missed: Bool[np.ndarray, "L M"]) -> float:
    """Return the average mAP if missed segments were not there; a class of which none is found stays at 0."""
    average_precision = matching.average_precision(np.ones(matching.correct.shape, bool))
    ratios = {}
    for number, name in enumerate(matching.truth.classes):
        of_class = missed[:, matching.truth.label == number]
        ratios[name] = average_precision[name] * of_class.shape[1] / np.maximum((~of_class).sum(axis=1), 1)
    return _mean(ratios)


def _mean(per_class: Mapping[str, Float[np.ndarray, " L"]]) -> float:
    return float(np.mean(list(per_class.values())))
