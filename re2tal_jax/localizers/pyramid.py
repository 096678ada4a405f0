"""ActionFormer's two halves: the pyramid of masked transformer blocks, and the heads that all its levels share."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from re2tal_jax.localizers.layers import Conv1d, MaskedConv, TransformerBlock, apply_mask, split_key

HEAD_KERNEL = 3


class Pyramid(nnx.Module):
    """Embedding convolutions, transformer blocks at full length (stem), and one strided block per further level."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        arch: tuple[int, int, int],
        windows: Sequence[int],
        scale_factor: int,
        kernel_size: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        block: Callable[..., TransformerBlock],
    ):
        convs, stem, branch = arch
        conv = functools.partial(MaskedConv, kernel_size=kernel_size, dtype=dtype, rngs=rngs)
        self.embed = nnx.List([conv(channels if i else in_channels, channels) for i in range(convs)])
        self.stem = nnx.List([block(window=windows[0], stride=1) for _ in range(stem)])
        self.branch = nnx.List([block(window=windows[1 + i], stride=scale_factor) for i in range(branch)])

    def __call__(
        self,
        x: Float[Array, "B T C"],
        mask: Bool[Array, "B T"],
        position: Float[Array, "T D"] | None,
        *,
        key: Key[Array, ""] | None,
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Return float32 features and masks of all levels; `position` is added at valid snippets of the embedding."""
        for conv in self.embed:
            x = conv(x, mask)
        x = x.astype(jnp.float32)
        if position is not None:
            x = x + apply_mask(jnp.broadcast_to(position, x.shape), mask)
        keys = split_key(key, len(self.stem) + len(self.branch))
        for block, block_key in zip(self.stem, keys[: len(self.stem)], strict=True):
            x, mask = block(x, mask, key=block_key)
        features, masks = [x], [mask]
        for block, block_key in zip(self.branch, keys[len(self.stem) :], strict=True):
            x, mask = block(x, mask, key=block_key)
            features.append(x)
            masks.append(mask)
        return tuple(features), tuple(masks)


class Scale(nnx.Module):
    """A learnt factor, one for each level's offsets."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones((), jnp.float32))


class Head(nnx.Module):
    """Classification and regression convolutions shared by all levels; their last layers are float32."""

    def __init__(
        self,
        channels: int,
        width: int,
        num_classes: int,
        *,
        num_convs: int,
        num_levels: int,
        prior_prob: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(MaskedConv, kernel_size=HEAD_KERNEL, dtype=dtype, rngs=rngs)
        self.cls_convs = nnx.List([conv(width if i else channels, width) for i in range(num_convs)])
        self.reg_convs = nnx.List([conv(width if i else channels, width) for i in range(num_convs)])
        self.cls_head = Conv1d(width, num_classes, HEAD_KERNEL, dtype=jnp.float32, rngs=rngs)
        self.reg_head = Conv1d(width, 2, HEAD_KERNEL, dtype=jnp.float32, rngs=rngs)
        self.scales = nnx.List([Scale() for _ in range(num_levels)])
        if prior_prob > 0:  # every class starts at this probability, else background swamps the first steps
            prior = -math.log((1 - prior_prob) / prior_prob)
            self.cls_head.bias = nnx.Param(jnp.full(num_classes, prior, jnp.float32))

    def __call__(
        self, levels: tuple[Float[Array, "B T C"], ...], masks: tuple[Bool[Array, "B T"], ...]
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Return logits and offsets of each level.

        All levels go through each convolution at once, laid end to end with a masked zero between them: every
        level sees exactly the zero padding it would see alone, and the program has a sixth of the convolutions.
        """
        lengths = [x.shape[1] for x in levels]
        gap = HEAD_KERNEL // 2
        x = jnp.concatenate([jnp.pad(x, [(0, 0), (0, gap), (0, 0)]) for x in levels], axis=1)
        mask = jnp.concatenate([jnp.pad(m, [(0, 0), (0, gap)]) for m in masks], axis=1)
        cls = reg = x
        for cls_conv, reg_conv in zip(self.cls_convs, self.reg_convs, strict=True):
            cls, reg = cls_conv(cls, mask), reg_conv(reg, mask)
        logits, distances, start = [], [], 0
        cls, reg = self.cls_head(cls), self.reg_head(reg)
        for length, scale in zip(lengths, self.scales, strict=True):
            logits.append(cls[:, start : start + length])
            distances.append(jax.nn.relu(reg[:, start : start + length] * scale.scale[...]))
            start += length + gap
        return tuple(logits), tuple(distances)
