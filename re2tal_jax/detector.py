"""From frames to segments: backbone, pooling to one feature a snippet, localizer (Re2TAL section 3.1)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from re2tal_jax.frames import Frames
from re2tal_jax.targets import snippet_classes
from re2tal_jax.types import Batch


class Detector(nnx.Module):
    """An end-to-end detector: `loss` trains it, `predict` proposes segments.

    Args:
        backbone: maps a video, as `frames.Frames`, to features, or to a tuple of features of several pathways.
        localizer: maps snippet features to proposals; see `re2tal_jax.localizers`.
        num_snippets: T, the length to which pooled features are interpolated.
        num_classes: K.
        pixel_mean: subtracted from RGB values in 0..255; None takes what comes in as it is: features.
        pixel_std: divided by after that; None together with the mean.
        snippet_loss_weight: weight of an auxiliary per-snippet classification loss on the pooled features. It is
            ours, not the papers': it brings a backbone that starts from random weights off its plateau. 0: no head.
    """

    def __init__(
        self,
        backbone: Any,
        localizer: Any,
        *,
        num_snippets: int,
        num_classes: int,
        pixel_mean: tuple[float, float, float] | None = (123.675, 116.28, 103.53),
        pixel_std: tuple[float, float, float] | None = (58.395, 57.12, 57.375),
        snippet_loss_weight: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.backbone = backbone
        self.localizer = localizer
        self.num_snippets = num_snippets
        self.num_classes = num_classes
        self.pixel_mean = pixel_mean
        self.pixel_std = pixel_std
        self.snippet_loss_weight = snippet_loss_weight
        if snippet_loss_weight:
            self.snippet_head = nnx.Linear(backbone.out_channels, num_classes, rngs=rngs)

    def initial_state(self) -> Any:
        """Return what training carries beside the parameters, before the first step."""
        return self.localizer.initial_state()

    def features(
        self, video: Shaped[Array, "B F H W 3"] | Float[Array, "B T C"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T C"]:
        """Return one float32 feature a snippet of a video in 0..255; pathways are joined. Features pass unchanged."""
        pathways = self.backbone(self.given(video), key=key)
        pathways = pathways if isinstance(pathways, tuple) else (pathways,)
        return jnp.concatenate([pool_to_snippets(p, self.num_snippets) for p in pathways], axis=-1)

    def given(self, video: Shaped[Array, "B F H W 3"] | Float[Array, "B T C"]) -> Any:
        """Return what the backbone is given: frames with what normalises them, or features as they are."""
        if self.pixel_mean is None or self.pixel_std is None:
            return video
        return Frames(video, tuple(self.pixel_mean), tuple(self.pixel_std))

    def __call__(
        self, video: Shaped[Array, "B F H W 3"], mask: Bool[Array, "B T"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Any, Float[Array, "B T C"]]:
        """Return the localizer's outputs and the features behind them; `key` None is evaluation."""
        backbone_key, localizer_key = (None, None) if key is None else jax.random.split(key)
        features = self.features(video, key=backbone_key)
        return self.localizer(features, mask, key=localizer_key), features

    def loss(
        self, video: Shaped[Array, "B F H W 3"], batch: Batch, state: Any, *, key: PRNGKeyArray
    ) -> tuple[dict[str, Float[Array, ""]], Any]:
        """Return the named losses, among them "total", and the localizer's next state."""
        outputs, features = self(video, batch.mask, key=key)
        losses, state = self.localizer.loss(
            outputs, batch.gt_segments, batch.gt_labels, batch.gt_mask, state, train=True
        )
        if self.snippet_loss_weight:
            losses = dict(losses)
            losses["snippet"] = self.snippet_loss_weight * self._snippet_loss(features, batch)
            losses["total"] = losses["total"] + losses["snippet"]
        return losses, state

    def predict(
        self, video: Shaped[Array, "B F H W 3"], mask: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B P 2"], Float[Array, "B P K"], Bool[Array, "B P"]]:
        """Return proposals in snippets of the window, their class scores, and which of them are real."""
        outputs, _ = self(video, mask)
        return self.localizer.decode(outputs)

    def _snippet_loss(self, features: Float[Array, "B T C"], batch: Batch) -> Float[Array, ""]:
        """Binary cross-entropy of every class at every valid snippet, averaged."""
        logits = self.snippet_head(features)
        classes = snippet_classes(
            self.num_snippets, batch.gt_segments, batch.gt_labels, batch.gt_mask, num_classes=self.num_classes
        )
        entropy = jax.nn.softplus(logits) - classes * logits
        valid = batch.mask[..., None].astype(entropy.dtype)
        return jnp.sum(entropy * valid) / (jnp.maximum(jnp.sum(valid), 1.0) * self.num_classes)


def pool_to_snippets(features: Float[Array, "B Tb H W C"], num_snippets: int) -> Float[Array, "B T C"]:
    """Average over space and interpolate time linearly to `num_snippets` (torch's align_corners=False)."""
    pooled = jnp.mean(features.astype(jnp.float32), axis=(2, 3))
    if pooled.shape[1] == num_snippets:
        return pooled
    weights = interpolation_weights(pooled.shape[1], num_snippets)
    return jnp.einsum("btc,ts->bsc", pooled, weights, precision=jax.lax.Precision.HIGHEST)


def interpolation_weights(length: int, new_length: int) -> np.ndarray:
    """Return the (length, new_length) float32 matrix of linear interpolation between sample centres, ends repeated."""
    centres = np.maximum((np.arange(new_length) + 0.5) * (length / new_length) - 0.5, 0.0)
    left = np.minimum(np.floor(centres).astype(np.int64), length - 1)
    right = np.minimum(left + 1, length - 1)
    fraction = centres - left
    weights = np.zeros((length, new_length), np.float32)
    np.add.at(weights, (left, np.arange(new_length)), 1 - fraction)
    np.add.at(weights, (right, np.arange(new_length)), fraction)
    return weights
