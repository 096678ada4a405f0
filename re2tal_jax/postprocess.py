"""From a window's proposals and scores to the detections of a video.

    select candidates -> suppress -> seconds, clamped -> labels (own classes or an external classifier) -> round

A video that is one window (resized or padded) is suppressed in snippets, before the conversion. A video of several
windows is suppressed once, over all its windows, in seconds and after rounding: `Gathering`. Both as published.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from re2tal_jax.errors import ConfigError, DataError, did_you_mean
from re2tal_jax.external_classifier import ExternalClassifier
from re2tal_jax.nms import NMSConfig, batched_nms
from re2tal_jax.segments import to_seconds
from re2tal_jax.types import Detections, SnippetGrid

SuppressIn = Literal["window", "video"]
Candidates = tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, " N"], Int[np.ndarray, " N"]]


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """How raw proposals become detections.

    Attributes:
        nms: how overlapping detections are thinned out; None keeps all.
        suppress_in: "window" for videos that are one window (resized, padded), "video" for sliding windows.
        pre_nms_threshold: multi-class localizers only: candidates must score more.
        pre_nms_top_k: multi-class localizers only: candidates of a window, over all classes, at most.
        segment_decimals, score_decimals: rounding of results, None for none. Published results are rounded to 2 and 4,
            and sliding windows even before suppression.
    """

    nms: NMSConfig | None = field(default_factory=NMSConfig)
    suppress_in: SuppressIn = "window"
    pre_nms_threshold: float = 0.001
    pre_nms_top_k: int = 2000
    segment_decimals: int | None = 2
    score_decimals: int | None = 4

    def __post_init__(self):
        if self.suppress_in not in get_args(SuppressIn):
            hint = did_you_mean(str(self.suppress_in), get_args(SuppressIn))
            raise ConfigError(f"PostprocessConfig.suppress_in = {self.suppress_in!r}. {hint}")
        decimals = (self.segment_decimals, self.score_decimals)
        for name, value, valid, allowed in (
            ("pre_nms_threshold", self.pre_nms_threshold, 0 <= self.pre_nms_threshold < 1, "0 up to, not including, 1"),
            ("pre_nms_top_k", self.pre_nms_top_k, self.pre_nms_top_k >= 1, "1 or more"),
            ("segment_decimals and score_decimals", decimals, all(d is None or d >= 0 for d in decimals), "0 or more"),
        ):
            if not valid:
                raise ConfigError(f"PostprocessConfig.{name} = {value!r} is out of range; allowed: {allowed}.")


def postprocess(
    proposals: Float[np.ndarray, "P 2"],
    scores: Float[np.ndarray, "P K"],
    valid: Bool[np.ndarray, " P"],
    grid: SnippetGrid,
    config: PostprocessConfig,
    classes: Sequence[str],
    external: ExternalClassifier | None = None,
    *,
    video_id: str,
) -> Detections:
    """Return the detections of one window, best first; with `suppress_in` "video", `Gathering` completes them.

    Args:
        proposals: start and end in snippets of the window.
        scores: one column per class, in [0, 1]; one column alone is class-agnostic.
        valid: which proposals lie on real snippets.
        grid: where the window's snippets lie in the video.
        classes: names of the columns; with an external classifier they are not used.
        external: names the classes of a class-agnostic localizer's segments.
        video_id: for errors and the external classifier.

    Raises:
        ConfigError: the number of columns fits neither `classes` nor the external classifier.
        DataError: shapes that do not belong together, non-finite proposals or scores, no external scores for the video.
    """
    proposals, scores = _checked(proposals, scores, valid, video_id)
    _check_classes(scores.shape[1], classes, external)
    segments, best, labels = _candidates(proposals, scores, config)
    if config.suppress_in == "window" and config.nms is not None:
        segments, best, labels = batched_nms(segments, best, labels, config.nms)
    segments = to_seconds(segments, grid)
    if external is not None:
        segments, best, names = external.fuse(video_id, segments, best)
    else:
        names = tuple(classes[int(i)] for i in labels)
    return _detections(segments, best, names, config)


class Gathering:
    """The detections of a video, window by window: `add` each, then take the `result`.

    Of a window that is suppressed with others no more is held than suppression takes, 16 bytes a candidate.
    """

    def __init__(self, video_id: str, config: PostprocessConfig):
        self._video_id, self._config = video_id, config
        self._parts: list[Detections] = []
        self._candidates: list[Candidates] = []
        self._numbers: dict[str, int] = {}  # of labels, in the order in which they come up

    def __len__(self) -> int:
        return len(self._parts) + len(self._candidates)

    def add(self, part: Detections) -> None:
        """Take in what `postprocess` found in the next window."""
        if self._config.suppress_in == "window" or self._config.nms is None:
            self._parts.append(part)
            return
        numbers = [self._numbers.setdefault(label, len(self._numbers)) for label in part.labels]
        segments, scores = part.segments_sec.astype(np.float32), part.scores.astype(np.float32)
        self._candidates.append((segments, scores, np.array(numbers, np.int32)))

    def result(self) -> Detections:
        """Return the detections of the video, best first.

        Raises:
            ConfigError: several windows were suppressed one by one: what they share would stay double.
        """
        if self._config.suppress_in == "window":
            if len(self._parts) != 1:
                raise ConfigError(
                    f"{self._video_id} has {len(self._parts)} windows but PostprocessConfig.suppress_in = 'window', "
                    "which is for one window per video: set it to 'video' for sliding windows."
                )
            return self._parts[0]
        if self._config.nms is None:
            segments = np.concatenate([np.zeros((0, 2)), *(part.segments_sec for part in self._parts)])
            scores = np.concatenate([np.zeros(0), *(part.scores for part in self._parts)])
            names = tuple(label for part in self._parts for label in part.labels)
        else:
            none = np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
            segments, scores, labels = map(np.concatenate, zip(none, *self._candidates, strict=True))
            segments, scores, labels = batched_nms(segments, scores, labels, self._config.nms)
            known = tuple(self._numbers)
            names = tuple(known[number] for number in labels.tolist())
        return _detections(segments, scores, names, self._config)


def _checked(
    proposals: np.ndarray, scores: np.ndarray, valid: np.ndarray, video_id: str
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, "N K"]]:
    proposals, scores, valid = np.asarray(proposals), np.asarray(scores), np.asarray(valid, bool)
    if scores.ndim != 2 or proposals.shape != (len(scores), 2) or valid.shape != (len(scores),):
        raise DataError(
            f"{video_id}: proposals {proposals.shape}, scores {scores.shape} and valid {valid.shape} do not belong "
            "together; expected (P, 2), (P, K) and (P,)."
        )
    proposals, scores = proposals[valid].astype(np.float32), scores[valid].astype(np.float32)
    for what, values in (("proposals", proposals), ("scores", scores)):
        bad = int((~np.isfinite(values)).any(axis=1).sum())
        if bad:
            raise DataError(
                f"{video_id}: {bad} of {len(values)} valid proposals have {what} that are not finite: "
                "the model has diverged or its checkpoint is damaged."
            )
    return proposals, scores


def _check_classes(columns: int, classes: Sequence[str], external: ExternalClassifier | None) -> None:
    if external is not None and columns != 1:
        raise ConfigError(
            f"An external classifier names the classes of class-agnostic segments, but the localizer scores {columns} "
            "classes: build it with num_classes=1 or leave the external classifier out."
        )
    if external is None and columns != len(classes):
        raise ConfigError(
            f"The localizer scores {columns} classes but {len(classes)} are named"
            + ("; a class-agnostic localizer needs an external classifier." if columns == 1 else ".")
        )


def _candidates(
    proposals: Float[np.ndarray, "P 2"], scores: Float[np.ndarray, "P K"], config: PostprocessConfig
) -> Candidates:
    """Select (proposal, class) pairs, best first; a class-agnostic localizer keeps every proposal, in its order."""
    num_classes = scores.shape[1]
    flat = scores.ravel()
    if num_classes == 1:
        return proposals, flat, np.zeros(len(flat), np.int64)
    above = np.flatnonzero(flat > np.float32(config.pre_nms_threshold))
    chosen = above[np.argsort(-flat[above], kind="stable")[: config.pre_nms_top_k]]
    return proposals[chosen // num_classes], flat[chosen], chosen % num_classes


def _detections(
    segments: Float[np.ndarray, "N 2"],
    scores: Float[np.ndarray, " N"],
    names: tuple[str, ...],
    config: PostprocessConfig,
) -> Detections:
    segments, scores = np.asarray(segments, np.float64), np.asarray(scores, np.float64)
    if config.segment_decimals is not None:
        segments = segments.round(config.segment_decimals)
    if config.score_decimals is not None:
        scores = scores.round(config.score_decimals)
    order = np.argsort(-scores, kind="stable")
    return Detections(
        segments_sec=segments[order], labels=tuple(names[i] for i in order.tolist()), scores=scores[order]
    )
