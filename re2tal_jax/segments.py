"""Segments on the time line: overlap, unit conversion and checks, numpy only.

A segment is (start, end); arrays of segments have shape (N, 2). The unit is the caller's: snippets of a window
inside the network, seconds of the video outside. `SnippetGrid` is the only bridge between the two.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from re2tal_jax.errors import DataError
from re2tal_jax.types import SnippetGrid

Segments = Float[np.ndarray, "N 2"]

_SMALLEST_UNION = 1e-8  # the ActivityNet evaluation's floor: two zero-length segments overlap by 0, never 0/0


def tiou(a: Float[np.ndarray, "N 2"], b: Float[np.ndarray, "M 2"]) -> Float[np.ndarray, "N M"]:
    """Return the temporal intersection over union of every segment of `a` with every one of `b`, in [0, 1].

    A zero-length or reversed segment overlaps nothing (0, not NaN), itself included.
    """
    return paired_tiou(a[:, None], b[None])


def paired_tiou(a: Float[np.ndarray, "*#N 2"], b: Float[np.ndarray, "*#N 2"]) -> Float[np.ndarray, "..."]:
    """Return the tIoU of `a[i]` with `b[i]`; leading axes broadcast (ActivityNet's `segment_iou`)."""
    intersection = np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])
    intersection = np.maximum(intersection, 0)
    union = (b[..., 1] - b[..., 0]) + (a[..., 1] - a[..., 0]) - intersection
    return intersection / np.maximum(union, _SMALLEST_UNION)


def to_seconds(
    segments: Float[np.ndarray, "*N 2"], grid: SnippetGrid, *, clamp: bool = True
) -> Float[np.ndarray, "*N 2"]:
    """Return segments in seconds (float64), by default clamped to [0, duration] as detections are.

    Snippet t lies at `start_sec + t * seconds_per_snippet`; there is no half-snippet offset.
    """
    seconds = grid.start_sec + np.asarray(segments, np.float64) * grid.seconds_per_snippet
    return clip(seconds, 0.0, grid.duration_sec) if clamp else seconds


def to_snippets(segments_sec: Float[np.ndarray, "*N 2"], grid: SnippetGrid) -> Float[np.ndarray, "*N 2"]:
    """Return segments in snippets of the grid's window (float64); the inverse of `to_seconds` without clamping."""
    if not grid.seconds_per_snippet > 0:
        raise DataError(f"seconds_per_snippet = {grid.seconds_per_snippet!r} must be positive: check fps and duration.")
    return (np.asarray(segments_sec, np.float64) - grid.start_sec) / grid.seconds_per_snippet


def clip(segments: Float[np.ndarray, "*N 2"], low: float, high: float) -> Float[np.ndarray, "*N 2"]:
    """Return segments with both ends moved into [low, high]; one that lies outside becomes zero-length."""
    return np.clip(segments, low, high)


def proper(segments: Float[np.ndarray, "*N 2"]) -> Bool[np.ndarray, "*N"]:
    """Tell which segments are finite and end after they start."""
    return np.isfinite(segments).all(axis=-1) & (segments[..., 1] > segments[..., 0])


def check_segments(segments: Any, what: str) -> Segments:
    """Return `segments` as float64 (N, 2), or raise DataError that begins with `what` (name file and video there).

    Raises:
        DataError: not of shape (N, 2), or a start or end that is not finite (the first one is shown).
    """
    try:
        checked = np.asarray(segments, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: segments must be pairs of numbers (start, end); {error}") from error
    if checked.size == 0:
        return checked.reshape(0, 2)
    if checked.ndim != 2 or checked.shape[1] != 2:
        raise DataError(f"{what}: segments have shape {checked.shape}; expected (N, 2), start and end.")
    bad = np.flatnonzero(~np.isfinite(checked).all(axis=1))
    if bad.size:
        first = tuple(checked[bad[0]].tolist())
        raise DataError(f"{what}: {bad.size} of {len(checked)} segments are not finite; segment {bad[0]} is {first}.")
    return checked
