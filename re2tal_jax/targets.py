"""Points of a feature pyramid and what each of them is to predict, given padded ground truth.

All in snippets of the finest level; pure, of static shapes, to be mapped over a batch with `jax.vmap`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SAME_LENGTH = 1e-3  # ground truth within this of the shortest counts as equally short


class PointTargets(NamedTuple):
    """`classes` multi-hot; `offsets` to (start, end) in units of the point's stride, meaningful at positives only."""

    classes: Float[Array, "P K"]
    offsets: Float[Array, "P 2"]


def pyramid_points(
    lengths: Sequence[int], strides: Sequence[int], regression_range: Sequence[tuple[float, float]]
) -> tuple[np.ndarray, ...]:
    """Return for each level (T_l, 4) float32: time, shortest and longest distance to regress, stride."""
    levels = zip(lengths, strides, regression_range, strict=True)
    return tuple(
        np.stack(np.broadcast_arrays(np.arange(length) * stride, *limits, stride), axis=-1).astype(np.float32)
        for length, stride, limits in levels
    )


def point_targets(
    points: Float[Array, "P 4"],
    gt_segments: Float[Array, "N 2"],
    gt_labels: Int[Array, " N"],
    gt_mask: Bool[Array, " N"],
    *,
    num_classes: int,
    center_sample_radius: float,
) -> PointTargets:
    """Assign ground truth to points; N may be 0, and rows whose `gt_mask` is False are as if absent.

    A point belongs to a segment if it lies strictly inside the segment and strictly within `center_sample_radius`
    strides of its centre, and if the farther of its two distances lies in its level's range, both ends included.
    The shortest such segment gives the offsets (the first one among equals) and, together with all others of its
    length within 1e-3, the classes. Background points have no class. Source: ActionFormer (arXiv 2202.07925), 3.3.

    Args:
        points: time, shortest distance, longest distance, stride (`pyramid_points`).
        gt_segments: start and end in snippets.
        gt_labels: in [0, num_classes); others give no class.
        gt_mask: which rows are real.
        num_classes: K.
        center_sample_radius: in strides; infinity takes the whole segment.
    """
    if gt_segments.shape[0] == 0:  # argmin needs one row
        gt_segments, gt_labels = jnp.zeros((1, 2), jnp.float32), jnp.zeros(1, jnp.int32)
        gt_mask = jnp.zeros(1, bool)
    gt_segments = jnp.where(gt_mask[:, None], gt_segments.astype(jnp.float32), 0.0)
    time, shortest, longest, stride = (points[:, i, None] for i in range(4))
    start, end = gt_segments[:, 0], gt_segments[:, 1]
    left, right = time - start, end - time  # P N
    center = 0.5 * (start + end)
    radius = stride * center_sample_radius
    inside = (time > jnp.maximum(center - radius, start)) & (time < jnp.minimum(center + radius, end))
    farther = jnp.maximum(left, right)
    eligible = inside & (farther >= shortest) & (farther <= longest) & gt_mask

    lengths = jnp.where(eligible, end - start, jnp.inf)
    least = lengths.min(axis=1, keepdims=True)
    chosen = eligible & (lengths <= least + SAME_LENGTH)
    one_hot = jax.nn.one_hot(gt_labels, num_classes, dtype=jnp.float32)
    classes = (chosen.astype(jnp.float32) @ one_hot > 0).astype(jnp.float32)

    first = jnp.argmin(lengths, axis=1)[:, None]
    offsets = jnp.concatenate([jnp.take_along_axis(side, first, axis=1) for side in (left, right)], axis=1) / stride
    return PointTargets(classes, jnp.where(gt_mask.any(), offsets, 0.0))


def snippet_classes(
    num_snippets: int,
    gt_segments: Float[Array, "B N 2"],
    gt_labels: Int[Array, "B N"],
    gt_mask: Bool[Array, "B N"],
    *,
    num_classes: int,
) -> Float[Array, "B T K"]:
    """Return, multi-hot, the classes whose segments hold the middle of each snippet; masked rows count as absent."""
    middle = jnp.arange(num_snippets, dtype=jnp.float32)[:, None] + 0.5
    inside = (gt_segments[:, None, :, 0] <= middle) & (middle < gt_segments[:, None, :, 1]) & gt_mask[:, None]
    one_hot = jax.nn.one_hot(gt_labels, num_classes, dtype=jnp.float32)
    return (jnp.einsum("btn,bnk->btk", inside.astype(jnp.float32), one_hot) > 0).astype(jnp.float32)
