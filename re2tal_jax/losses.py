"""Losses of localizers, elementwise and float32 whatever the network's compute dtype; callers mask and sum."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def smooth_labels(targets: Float[Array, "... K"], smoothing: float) -> Float[Array, "... K"]:
    """Pull K independent binary targets, positives and negatives alike, toward 1 / (K + 1)."""
    return targets * (1.0 - smoothing) + smoothing / (targets.shape[-1] + 1)


def sigmoid_focal_loss(
    logits: Float[Array, "..."], targets: Float[Array, "..."], *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Array, "..."]:
    """Return the binary focal loss of each logit against a soft target in [0, 1].

    Both the focus (1 - p_t)^gamma and the balance alpha_t interpolate with the (smoothed) target.
    Source: RetinaNet (arXiv 1708.02002) equation 5.
    """
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    # -log p = softplus(-x), -log(1 - p) = softplus(x): finite for every finite logit
    cross_entropy = targets * jax.nn.softplus(-logits) + (1.0 - targets) * jax.nn.softplus(logits)
    p = jax.nn.sigmoid(logits)
    p_wrong = p * (1.0 - targets) + (1.0 - p) * targets  # 1 - p_t
    alpha_t = alpha * targets + (1.0 - alpha) * (1.0 - targets)
    return alpha_t * p_wrong**gamma * cross_entropy


def diou_loss(
    predicted: Float[Array, "... 2"], target: Float[Array, "... 2"], *, eps: float = 1e-7
) -> Float[Array, "..."]:
    """Return 1 - tIoU + (centre distance / enclosing length)^2 of each pair of segments (start, end).

    Pair by pair, where the published code builds all N x N pairs and takes the diagonal. Union and squared enclosing
    length are at least `eps`, so that zero-length segments are finite. Source: DIoU (arXiv 1911.08287), on a line.
    """
    predicted, target = predicted.astype(jnp.float32), target.astype(jnp.float32)
    start, end = predicted[..., 0], predicted[..., 1]
    target_start, target_end = target[..., 0], target[..., 1]
    intersection = _at_least(jnp.minimum(end, target_end) - jnp.maximum(start, target_start), 0.0)
    union = (end - start) + (target_end - target_start) - intersection
    enclosing = jnp.maximum(end, target_end) - jnp.minimum(start, target_start)
    distance = (target_start + target_end) / 2.0 - (start + end) / 2.0
    tiou = intersection / _at_least(union, eps)
    return 1.0 - tiou + distance * distance / _at_least(enclosing * enclosing, eps)


def _at_least(x: Float[Array, "..."], least: float) -> Float[Array, "..."]:
    """Clamp from below with the whole gradient at equality, as torch.clamp has it (jnp.maximum halves it)."""
    return jnp.where(x >= least, x, jnp.full((), least, x.dtype))


def moving_normalizer(
    normalizer: Float[Array, ""], num_positive: Float[Array, ""], momentum: float
) -> Float[Array, ""]:
    """Return the moving average of the number of positives, the current batch (at least 1) included.

    Small batches have few and varying positives; dividing by the average keeps the loss's scale steady.
    """
    return momentum * normalizer + (1.0 - momentum) * jnp.maximum(num_positive, 1.0)
