"""VSGN's heads: scores and boxes of anchors, boundary scores of snippets, and the adjustment of boxes at their corners.

All return float32, whatever the compute dtype. Source: VSGN (arXiv 2011.14598).
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from re2tal_jax.localizers.vsgn_pyramid import xavier_conv


class GroupNorm(nnx.Module):
    """Normalise groups of channels over time, in float32, epsilon as PyTorch's."""

    def __init__(self, channels: int, num_groups: int, *, dtype: DTypeLike):
        self.num_groups, self.dtype = num_groups, dtype
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Return x normalised; masked positions count, as published."""
        groups = x.astype(jnp.float32).reshape(*x.shape[:2], self.num_groups, -1)
        centred = groups - groups.mean((1, 3), keepdims=True)
        deviation = jax.lax.rsqrt(jnp.square(centred).mean((1, 3), keepdims=True) + 1e-5)
        y = (centred * deviation).reshape(x.shape)
        return (y * self.scale[...] + self.bias[...]).astype(self.dtype)


class Tower(nnx.Module):
    """Convolutions with group norm and ReLU, and a last one, shared by all levels."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        num_convs: int,
        num_groups: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(xavier_conv, channels, channels, 3, use_bias=False, dtype=dtype, rngs=rngs)
        self.convs = nnx.List([conv() for _ in range(num_convs)])
        self.norms = nnx.List([GroupNorm(channels, num_groups, dtype=dtype) for _ in range(num_convs)])
        self.out = xavier_conv(channels, out_channels, 3, dtype=jnp.float32, rngs=rngs)

    def __call__(self, levels: Sequence[Float[Array, "B T C"]]) -> Float[Array, "B U D"]:
        """Return one result a position of every level, finest level first.

        The levels go through each convolution at once, laid end to end with a zero between them, which is the padding
        that each would see alone; the norm is over each level by itself.
        """
        lengths = [level.shape[1] for level in levels]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            levels = [jax.nn.relu(norm(y)) for y in _split(conv(_join(levels)), lengths)]
        return jnp.concatenate(_split(self.out(_join(levels)), lengths), axis=1)


def _join(levels: Sequence[Float[Array, "B T C"]]) -> Float[Array, "B U C"]:
    return jnp.concatenate([jnp.pad(level, [(0, 0), (0, 1), (0, 0)]) for level in levels], axis=1)


def _split(x: Float[Array, "B U C"], lengths: Sequence[int]) -> list[Float[Array, "B T C"]]:
    ends = itertools.accumulate(length + 1 for length in lengths)
    return [x[:, end - length - 1 : end - 1] for length, end in zip(lengths, ends, strict=True)]


class AnchorHead(nnx.Module):
    """Class logits and two box coordinates of every anchor."""

    def __init__(
        self,
        channels: int,
        num_logits: int,
        num_anchors: int,
        *,
        num_convs: int,
        num_groups: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        tower = functools.partial(Tower, num_convs=num_convs, num_groups=num_groups, dtype=dtype, rngs=rngs)
        self.num_logits = num_logits
        self.cls = tower(channels, num_anchors * num_logits)
        self.reg = tower(channels, num_anchors * 2)

    def __call__(self, levels: Sequence[Float[Array, "B T C"]]) -> tuple[Float[Array, "B P K"], Float[Array, "B P 2"]]:
        """Return logits and coordinates, in the order of `vsgn_targets.pyramid_anchors`."""
        logits, coordinates = self.cls(levels), self.reg(levels)
        batch = logits.shape[0]
        return logits.reshape(batch, -1, self.num_logits), coordinates.reshape(batch, -1, 2)


class BoundaryBranch(nnx.Module):
    """A convolution, ReLU, and one logit a snippet."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = xavier_conv(channels, channels, 3, dtype=dtype, rngs=rngs)
        self.out = xavier_conv(channels, 1, 1, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T 1"]:
        """Return the logits."""
        return self.out(jax.nn.relu(self.conv(x)))


class BoundaryHead(nnx.Module):
    """How much each snippet is a start, an end, and inside an action: three branches with nothing in common."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.branches = nnx.List([BoundaryBranch(channels, dtype=dtype, rngs=rngs) for _ in range(3)])

    def __call__(self, finest: Float[Array, "B T C"], num_snippets: int) -> Float[Array, "B U 3"]:
        """Return logits of `num_snippets` snippets from the features of the finest level."""
        x = stretch(finest, num_snippets)
        return jnp.concatenate([branch(x) for branch in self.branches], axis=-1)


def stretch(x: Float[Array, "B T C"], length: int) -> Float[Array, "B U C"]:
    """Interpolate linearly over time so that first and last positions stay first and last (torch's align_corners)."""
    weights = jnp.asarray(_stretching(x.shape[1], length), x.dtype)
    return jnp.einsum("ut,btc->buc", weights, x, precision=jax.lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=8)
def _stretching(length: int, new_length: int) -> np.ndarray:
    """Return the (new_length, length) matrix of `stretch`: each row is a hat around where its position lies."""
    place = np.linspace(0.0, length - 1, new_length)
    return np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(length))).astype(np.float32)


class CornerBranch(nnx.Module):
    """The features beside, at and beyond one end of a box to how far that end is to move, in snippets."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = xavier_conv(channels, channels, 3, dtype=dtype, rngs=rngs)
        self.out = xavier_conv(channels, 1, 1, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, features: Float[Array, "B T C"], end: Float[Array, "B P"], reach: Float[Array, "B P"], stride: int
    ) -> Float[Array, "B P"]:
        """Return the movement; the three places are `end` and `reach` to either side, in snippets.

        The convolution is one product for each place. Features are multiplied before they are picked: there are fewer
        positions than boxes.
        """
        kernel = self.conv.kernel[...].astype(self.conv.dtype)
        assert self.conv.bias is not None
        y = self.conv.bias[...].astype(self.conv.dtype)
        for tap, place in zip(kernel, (end - reach, end, end + reach), strict=True):
            # whole positions: no gradient reaches the box through where its features are taken
            index = jnp.clip((place / stride).astype(jnp.int32), 0, features.shape[1] - 1)
            y = y + jnp.take_along_axis(features.astype(kernel.dtype) @ tap, index[..., None], axis=1)
        return self.out(jax.nn.relu(y))[..., 0]


class CornerHead(nnx.Module):
    """Move each box's start and end by what the features at and beside them say.

    `divisor` says how far beside them: that part of the box's length.
    """

    def __init__(self, channels: int, *, divisor: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.divisor = divisor
        self.start = CornerBranch(channels, dtype=dtype, rngs=rngs)
        self.end = CornerBranch(channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, finest: Float[Array, "B T C"], boxes: Float[Array, "B P 2"], *, stride: int, num_snippets: int
    ) -> Float[Array, "B P 2"]:
        """Return the moved boxes. `finest` has one feature every `stride` of the `num_snippets` snippets.

        The boxes are not detached: what their adjustment costs also trains the head that proposed them.
        """
        start, end = jnp.moveaxis(jnp.clip(boxes, 0.0, num_snippets - 1), -1, 0)
        reach = (end - start + 1) / self.divisor
        moves = self.start(finest, start, reach, stride), self.end(finest, end, reach, stride)
        return boxes + jnp.stack(moves, axis=-1)
