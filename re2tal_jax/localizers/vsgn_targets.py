"""VSGN's anchors, the boxes made from them, and what anchors, boxes and snippets are to predict.

All in snippets; pure, of static shapes. What takes one sample is to be mapped over a batch with `jax.vmap`. A box
(first, last) covers the snippets from first to last: its length is last - first + 1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

CENTER_SCALE, LENGTH_SCALE = 10.0, 5.0  # a head's outputs are this many times what they mean
LONGEST = math.log(1000.0 / 16)  # a box is at most this (as a logarithm) longer than its anchor: exp stays finite
BOUNDARY_SNIPPETS = 3.0  # width of the stretch around a start or end that counts as one


class Matches(NamedTuple):
    """Per box the class that it is to have, 0 for background, else 1 + label, and the segment it belongs to."""

    classes: Int[Array, " P"]
    segments: Float[Array, "P 2"]


def pyramid_anchors(num_snippets: int, strides: Sequence[int], scales: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Return for each level its anchors, (T_l len(scales), 2) float32: position by position, and there scale by scale.

    A level has one position every `stride` snippets; its anchors are `stride` times each scale long and centred in the
    middle of those snippets.
    """
    levels = []
    for stride in strides:
        lengths = np.asarray(scales, np.float32) * stride
        centers = np.arange(math.ceil(num_snippets / stride))[:, None] * stride + stride / 2
        levels.append(np.stack([centers - (lengths - 1) / 2, centers + (lengths - 1) / 2], -1).reshape(-1, 2))
    return tuple(level.astype(np.float32) for level in levels)


def boxes_of(coordinates: Float[Array, "B P 2"], anchors: Float[Array, "P 2"]) -> Float[Array, "B P 2"]:
    """Return the boxes that coordinates describe: the move of the centre, in anchors, and the logarithm of growth."""
    length, center = anchors[:, 1] - anchors[:, 0] + 1, anchors.mean(-1)
    center = center + coordinates[..., 0] / CENTER_SCALE * length
    length = length * jnp.exp(jnp.minimum(coordinates[..., 1] / LENGTH_SCALE, LONGEST))
    return jnp.stack([center - (length - 1) / 2, center + (length - 1) / 2], axis=-1)


def match(
    boxes: Float[Array, "P 2"],
    gt_segments: Float[Array, "N 2"],
    gt_labels: Int[Array, " N"],
    gt_mask: Bool[Array, " N"],
    *,
    threshold: float,
) -> Matches:
    """Assign to each box the ground truth that it overlaps most, if by `threshold` or if none overlaps that one more.

    So every segment has a box, even one whose best box overlaps it little (all its best ones where several are equal,
    as published: for a segment that no box touches those are all boxes). The box then has the class of *its* best
    segment. Without ground truth, where the published code fails, everything is background; N may be 0, and rows whose
    `gt_mask` is False are as if absent. No gradient passes.
    """
    if gt_segments.shape[0] == 0:  # argmax needs one row
        gt_segments, gt_labels, gt_mask = jnp.zeros((1, 2)), jnp.zeros(1, jnp.int32), jnp.zeros(1, bool)
    gt_segments = jnp.where(gt_mask[:, None], gt_segments.astype(jnp.float32), 0.0)
    overlap = jnp.where(gt_mask, _overlap(jax.lax.stop_gradient(boxes), gt_segments), -1.0)  # P N
    # the maximum is found again by equality: the numbers compared must be those it was taken of, computed once
    overlap = jax.lax.optimization_barrier(overlap)
    best_of_segment = ((overlap == overlap.max(axis=0)) & gt_mask).any(axis=1)
    positive = (overlap.max(axis=1) >= threshold) | best_of_segment
    best = overlap.argmax(axis=1)
    return Matches(jnp.where(positive, gt_labels[best].astype(jnp.int32) + 1, 0), gt_segments[best])


def _overlap(boxes: Float[Array, "P 2"], segments: Float[Array, "N 2"]) -> Float[Array, "P N"]:
    """Return the tIoU of each box, one snippet longer than its ends are apart, with each segment, which is not."""
    start, end = boxes[:, :1], boxes[:, 1:]
    shared = jnp.minimum(end, segments[:, 1]) - jnp.maximum(start, segments[:, 0])
    shared = jnp.maximum(shared, 0.0)
    union = jnp.maximum(end - start + 1 + (segments[:, 1] - segments[:, 0]) - shared, 0.0)
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1.0), 0.0)


def boundary_targets(
    num_snippets: int, gt_segments: Float[Array, "N 2"], gt_mask: Bool[Array, " N"]
) -> Bool[Array, "T 3"]:
    """Return which snippets lie around a start, around an end, and in an action; none without ground truth.

    Snippet t reaches from t to t + 1 and has to lie inside with all of it: the published code asks for more than half,
    of a share that it has rounded down to 0 or 1.
    """
    gt_segments = gt_segments.astype(jnp.float32)
    start, end = gt_segments[:, 0], gt_segments[:, 1]
    half = BOUNDARY_SNIPPETS / 2
    stretches = jnp.array([[start - half, start + half], [end - half, end + half], [start, end]])  # 3 2 N
    snippet = jnp.arange(num_snippets, dtype=jnp.float32)[:, None, None]
    return ((stretches[:, 0] <= snippet) & (snippet + 1 <= stretches[:, 1]) & gt_mask).any(-1)
