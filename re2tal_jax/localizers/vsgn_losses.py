"""VSGN's losses, float32: generalised tIoU, and cross-entropies in which positives weigh as much as the rest."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

EPSILON = 1e-7  # added to union and enclosing length


def giou_loss(predicted: Float[Array, "... 2"], target: Float[Array, "... 2"]) -> Float[Array, "..."]:
    """Return 1 - tIoU + the uncovered part of the enclosing segment, for each pair (GIoU, arXiv 1902.09630, on a line).

    A predicted pair may be in either order.
    """
    # not min(-1), max(-1): their gradients look for the extremum by equality and divide by how often it is found, which
    # is never (NaN) where a compiler computes the pair twice and rounds differently
    start = jnp.minimum(predicted[..., 0], predicted[..., 1])
    end = jnp.maximum(predicted[..., 0], predicted[..., 1])
    target_start, target_end = target[..., 0], target[..., 1]
    shared = jnp.maximum(jnp.minimum(end, target_end) - jnp.maximum(start, target_start), 0.0)
    union = (end - start) + (target_end - target_start) - shared + EPSILON
    enclosing = jnp.maximum(end, target_end) - jnp.minimum(start, target_start) + EPSILON
    return 1.0 - shared / union + (enclosing - union) / enclosing


def balanced_cross_entropy(logits: Float[Array, "... K"], classes: Int[Array, "..."]) -> Float[Array, ""]:
    """Return the mean cross-entropy of the positives plus that of class 0; of none of them it is 0 (published: NaN)."""
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), classes[..., None], axis=-1)[..., 0]
    return _mean_where(losses, classes > 0) + _mean_where(losses, classes == 0)


def _mean_where(values: Float[Array, "..."], chosen: Bool[Array, "..."]) -> Float[Array, ""]:
    return jnp.where(chosen, values, 0.0).sum() / jnp.maximum(chosen.sum(dtype=jnp.float32), 1.0)


def balanced_binary_cross_entropy(logits: Float[Array, "..."], targets: Bool[Array, "..."]) -> Float[Array, ""]:
    """Return the mean cross-entropy of positives and that of negatives, averaged; of one kind alone, its mean."""
    losses = jnp.where(targets, jax.nn.softplus(-logits), jax.nn.softplus(logits))
    both = targets.any() & ~targets.all()
    return (_mean_where(losses, targets) + _mean_where(losses, ~targets)) * jnp.where(both, 0.5, 1.0)
