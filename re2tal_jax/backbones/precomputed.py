"""The backbone left out: features that were computed before are passed on as they are."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from re2tal_jax.errors import ConfigError
from re2tal_jax.reversible import PLAIN

NAME = "features"


class Precomputed(nnx.Module):
    """Snippet features (B, T, C) in the place of a video, without parameters.

    Args:
        channels: C, of all feature folders together.
        dtype: not used: the localizer takes float32.
        rngs: not used: nothing is drawn.
    """

    wiring = PLAIN
    temporal_stride = 1

    def __init__(self, *, channels: int, dtype: Any = None, rngs: nnx.Rngs | None = None):
        del dtype, rngs
        if channels < 1:
            raise ConfigError(f"channels = {channels}: the features need at least one.")
        self.out_channels = channels

    def __call__(
        self, features: Float[Array, "B T C"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T 1 1 C"]:
        """Return the features as those of a picture of one place, which pooling leaves as they are.

        Raises:
            ConfigError: they have another number of channels.
        """
        del key
        if features.shape[-1] != self.out_channels:
            raise ConfigError(
                f"config.backbone.channels = {self.out_channels}, but the features have {features.shape[-1]}."
            )
        return features[:, :, None, None, :]

    def intermediates(self, features: Float[Array, "B T C"]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the same, and that there is nothing between."""
        return self(features), {}


VARIANTS = {NAME: Precomputed}
