"""Non-maximum suppression of segments, hard and soft, and segment voting, numpy only.

Arithmetic is float32 as in the published implementation, whose results are reproduced index by index, including the
order among equal scores. Every variant emits segments best first, so classes are merged lazily: work is done for the
`max_seg_num` segments that are kept and for no other.
"""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from re2tal_jax.errors import ConfigError, DataError, did_you_mean

Method = Literal["hard", "zero", "linear", "gaussian", "bmn"]
Emitted = tuple[float, int]  # score after decay, index of the segment

_VOTES = 1 << 20  # pairs that are looked at at a time: long videos have many candidates

_LENGTH_OFFSET = np.float32(1e-6)  # the reference adds it to each length in suppression, not in voting


@dataclass(frozen=True, kw_only=True)
class NMSConfig:
    """How overlapping detections of a video are thinned out.

    Attributes:
        method: "hard" removes what overlaps a better segment by `tiou_threshold` or more; the others are soft-NMS and
            multiply its score instead: "zero" by 0 and "linear" by 1 - tiou from `tiou_threshold` on, "gaussian" by
            exp(-tiou^2 / sigma) always, "bmn" likewise where tiou >= t1 + t2 * length of the better segment.
        tiou_threshold: used by "hard", "zero" and "linear".
        sigma: divides tiou^2 directly (not 2 sigma); used by "gaussian" and "bmn".
        t1, t2: used by "bmn"; t2 is per unit of the segments (snippets or seconds).
        min_score: "hard" ignores candidates that do not exceed it, soft-NMS drops those that decay below it.
        max_seg_num: most detections of a video that are kept, over all classes.
        multiclass: suppress within each class, or regardless of classes.
        voting_threshold: replace each kept segment by the score-weighted mean of all candidates that overlap it by
            this tiou or more; None switches it off. Only without multiclass, as in the reference.
    """

    method: Method = "gaussian"
    tiou_threshold: float = 0.5
    sigma: float = 0.5
    t1: float = 0.0
    t2: float = 0.0
    min_score: float = 0.001
    max_seg_num: int = 100
    multiclass: bool = True
    voting_threshold: float | None = None

    def __post_init__(self):
        if self.method not in get_args(Method):
            raise ConfigError(f"NMSConfig.method = {self.method!r}. {did_you_mean(self.method, get_args(Method))}")
        voting = 1.0 if self.voting_threshold is None else self.voting_threshold
        for name, value, valid, allowed in (
            ("tiou_threshold", self.tiou_threshold, 0 <= self.tiou_threshold <= 1, "0 to 1"),
            ("sigma", self.sigma, self.sigma > 0, "positive numbers"),
            ("t1", self.t1, self.t1 >= 0, "0 or more"),
            ("t2", self.t2, self.t2 >= 0, "0 or more"),
            ("min_score", self.min_score, 0 <= self.min_score < 1, "0 up to, not including, 1"),
            ("max_seg_num", self.max_seg_num, self.max_seg_num >= 1, "1 or more"),
            ("voting_threshold", self.voting_threshold, 0 < voting <= 1, "above 0 up to 1, or None to switch it off"),
        ):
            if not valid:
                raise ConfigError(f"NMSConfig.{name} = {value!r} is out of range; allowed: {allowed}.")
        if self.multiclass and self.voting_threshold is not None:
            raise ConfigError(
                f"NMSConfig.voting_threshold = {self.voting_threshold!r} has no effect with multiclass=True: "
                "set it to None, or multiclass to False."
            )


def batched_nms(
    segments: Float[np.ndarray, "N 2"],
    scores: Float[np.ndarray, " N"],
    labels: Int[np.ndarray, " N"],
    config: NMSConfig,
) -> tuple[Float[np.ndarray, "M 2"], Float[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """Return the kept segments, their decayed scores and labels, best first; M <= max_seg_num.

    Segments may be in any unit. Ties between classes are resolved in the order of the labels.

    Raises:
        DataError: shapes that do not belong together, scores that are negative or not finite, segments that are not.
    """
    segments, scores, labels = _checked(segments, scores, labels)
    groups = [np.flatnonzero(labels == c) for c in np.unique(labels)] if config.multiclass else [np.arange(len(labels))]
    suppress = _hard if config.method == "hard" else _soft
    streams = [suppress(segments, scores, group, config) for group in groups]
    # Each stream descends, hence so does the merge, and the best max_seg_num overall need no more of any class.
    kept = list(itertools.islice(heapq.merge(*streams, key=lambda item: -item[0]), config.max_seg_num))
    kept_scores = np.array([score for score, _ in kept], np.float32)
    indices = np.array([index for _, index in kept], np.int64)
    kept_segments = segments[indices]
    if config.voting_threshold is not None:
        kept_segments = vote(kept_segments, segments, scores, config.voting_threshold)
    return kept_segments, kept_scores, labels[indices]


def hard_nms(
    segments: Float[np.ndarray, "N 2"], scores: Float[np.ndarray, " N"], tiou_threshold: float
) -> Int[np.ndarray, " M"]:
    """Return the indices of the segments kept, best first: none overlaps a better one by `tiou_threshold` or more."""
    segments, scores, _ = _checked(segments, scores, np.zeros(len(scores), np.int64))
    config = NMSConfig(method="hard", tiou_threshold=tiou_threshold, min_score=0.0)
    return np.array([index for _, index in _hard(segments, scores, np.arange(len(scores)), config)], np.int64)


def soft_nms(
    segments: Float[np.ndarray, "N 2"], scores: Float[np.ndarray, " N"], config: NMSConfig
) -> tuple[Int[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Return indices and decayed scores, best first, of what stays at or above `min_score`; the best always stays.

    `max_seg_num`, `multiclass` and voting do not apply here. Source: Bodla et al., Soft-NMS, arXiv 1704.04503.
    """
    if config.method == "hard":
        raise ConfigError("soft_nms needs a soft NMSConfig.method: zero, linear, gaussian or bmn; it is 'hard'.")
    segments, scores, _ = _checked(segments, scores, np.zeros(len(scores), np.int64))
    kept = list(_soft(segments, scores, np.arange(len(scores)), config))
    return np.array([index for _, index in kept], np.int64), np.array([score for score, _ in kept], np.float32)


def vote(
    kept: Float[np.ndarray, "M 2"],
    segments: Float[np.ndarray, "N 2"],
    scores: Float[np.ndarray, " N"],
    threshold: float,
) -> Float[np.ndarray, "M 2"]:
    """Return each kept segment moved to the score-weighted mean of all candidates with tiou >= `threshold`.

    `scores` are those before any decay. A segment without voters stays as it is; zero-length segments have none, and
    the reference returns NaN for them (0/0).
    """
    rows = max(1, _VOTES // max(len(segments), 1))
    parts = [_vote(kept[i : i + rows], segments, scores, threshold) for i in range(0, len(kept), rows)]
    return np.concatenate(parts) if parts else kept


def _vote(kept: np.ndarray, segments: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    shared_start = np.maximum(kept[:, None, 0], segments[:, 0])
    intersection = np.maximum(np.minimum(kept[:, None, 1], segments[:, 1]) - shared_start, 0)
    union = (kept[:, 1] - kept[:, 0])[:, None] + (segments[:, 1] - segments[:, 0])[None] - intersection
    overlap = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    weights = np.where(overlap >= np.float32(threshold), scores[None], 0).astype(np.float64)
    total = weights.sum(axis=1, keepdims=True)
    mean = np.divide(weights @ segments.astype(np.float64), total, out=kept.astype(np.float64), where=total > 0)
    return mean.astype(kept.dtype)


def _checked(
    segments: np.ndarray, scores: np.ndarray, labels: np.ndarray
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    segments, scores, labels = np.asarray(segments, np.float32), np.asarray(scores, np.float32), np.asarray(labels)
    if segments.shape != (len(scores), 2) or scores.ndim != 1 or labels.shape != scores.shape:
        raise DataError(
            f"NMS was given segments {segments.shape}, scores {scores.shape} and labels {labels.shape}; "
            "expected (N, 2), (N,) and (N,)."
        )
    bad = np.flatnonzero(~np.isfinite(segments).all(axis=1))
    if bad.size:
        raise DataError(f"NMS needs finite segments; {bad.size} are not, segment {bad[0]} is {segments[bad[0]]}.")
    if not (np.isfinite(scores) & (scores >= 0)).all():
        raise DataError(f"NMS needs finite scores of 0 or more; the smallest given is {scores.min():g}.")
    return segments, scores, labels


def _hard(segments: np.ndarray, scores: np.ndarray, group: np.ndarray, config: NMSConfig) -> Iterator[Emitted]:
    """Yield what is kept of the segments with the numbers `group`, best first."""
    order = group[np.argsort(-scores[group], kind="stable")]
    if config.min_score > 0:
        order = order[scores[order] > np.float32(config.min_score)]
    start, end = segments[order].T
    length = end - start + _LENGTH_OFFSET
    rest = np.arange(len(order))
    while rest.size:
        best, rest = rest[0], rest[1:]
        yield float(scores[order[best]]), int(order[best])
        overlap = _overlap(start[best], end[best], length[best], start[rest], end[rest], length[rest])
        rest = rest[overlap < np.float32(config.tiou_threshold)]


def _soft(segments: np.ndarray, scores: np.ndarray, group: np.ndarray, config: NMSConfig) -> Iterator[Emitted]:
    """Repeat, for the segments with the numbers `group`: emit the best, decay the others, drop those below min_score.

    The best is swapped with the first of the rest and dropped ones are overwritten from the end, because that order
    decides which of equal scores comes first in the reference.
    """
    table, index = np.empty((4, len(group)), np.float32), group.copy()
    table[:2], table[3] = segments[group].T, scores[group]
    table[2] = table[1] - table[0] + _LENGTH_OFFSET
    min_score = np.float32(config.min_score)
    while index.size:
        top = int(table[3].argmax())
        (best_start, best_end, best_length, best_score), best_index = table[:, top].copy(), int(index[top])
        table[:, top], index[top] = table[:, 0], index[0]
        table, index = table[:, 1:], index[1:]
        yield float(best_score), best_index
        overlap = _overlap(best_start, best_end, best_length, *table[:3])
        table[3] *= _decay(overlap, best_length, config)
        keep = table[3] >= min_score
        if not keep.all():
            table, index = _fill_holes(table, index, keep)


def _fill_holes(table: np.ndarray, index: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop columns that are not kept; the last kept ones move, in reverse order, into the holes of the front."""
    size = int(keep.sum())
    holes = np.flatnonzero(~keep[:size])
    movers = (size + np.flatnonzero(keep[size:]))[::-1]
    table[:, holes], index[holes] = table[:, movers], index[movers]
    return table[:, :size], index[:size]


def _overlap(
    best_start: np.float32,
    best_end: np.float32,
    best_length: np.float32,
    start: np.ndarray,
    end: np.ndarray,
    length: np.ndarray,
) -> np.ndarray:
    """Return the tiou of the best segment with each other one, lengths counted with their offset."""
    intersection = np.minimum(end, best_end)
    intersection -= np.maximum(start, best_start)
    np.maximum(intersection, 0, out=intersection)
    return intersection / (best_length + length - intersection)


def _decay(overlap: np.ndarray, best_length: np.float32, config: NMSConfig) -> np.ndarray:
    """Return the factor in [0, 1] by which each score falls."""
    if config.method in ("zero", "linear"):
        factor = 0 * overlap if config.method == "zero" else 1 - overlap
        return np.where(overlap >= np.float32(config.tiou_threshold), factor, np.float32(1))
    exponent = overlap * overlap / np.float32(-config.sigma)
    # Rounded from float64 this equals C's expf; numpy's own float32 exp is off by up to 3 ulp and can swap near ties.
    factor = np.exp(exponent.astype(np.float64)).astype(np.float32)
    if config.method == "bmn":
        near = overlap >= np.float32(config.t1) + np.float32(config.t2) * best_length
        return np.where(near, factor, np.float32(1))
    return factor
