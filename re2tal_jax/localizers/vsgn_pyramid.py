"""VSGN's features: a pyramid that halves the length level by level, and an FPN that joins its levels from the coarsest.

Features are B T C, masks B T with True at real snippets; a length is a multiple of what the levels divide it by.
Source: Zhao, Thabet, Ghanem, "Video Self-Stitching Graph Network" (arXiv 2011.14598).
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from re2tal_jax.localizers.layers import Conv1d, apply_mask, max_pool


def xavier(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Float[Array, "..."]:
    """Return a float32 kernel, uniform within sqrt(6 / (fan in + fan out)), as the published VSGN starts."""
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


def xavier_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    use_bias: bool = True,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Conv1d:
    """Return a convolution that starts as `xavier` says, its bias at zero."""
    conv = Conv1d(in_channels, out_channels, kernel_size, stride=stride, use_bias=use_bias, dtype=dtype, rngs=rngs)
    fans = kernel_size * in_channels, kernel_size * out_channels
    conv.kernel = nnx.Param(xavier(rngs, (kernel_size, in_channels, out_channels), *fans))
    return conv


class ConvBlock(nnx.Module):
    """Convolution over three snippets and ReLU, masked; a stride shortens the sequence by it."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = xavier_conv(in_channels, out_channels, 3, stride=stride, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T C"], mask: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B U D"], Bool[Array, "B U"]]:
        """Return features, zero at masked positions, and their mask, every stride-th of the input's."""
        mask = mask[:, :: self.conv.stride]
        return apply_mask(jax.nn.relu(self.conv(x)), mask), mask


class NeighbourConv(nnx.Module):
    """Convolve each snippet with those most like it, wherever they lie.

    A linear map of (neighbour, snippet), then the maximum over the neighbours. The kernel's halves are applied apart,
    so that a snippet is multiplied once and not once for each that it is a neighbour of.
    """

    def __init__(self, channels: int, num_neighbours: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.num_neighbours, self.dtype = num_neighbours, dtype
        self.kernel = nnx.Param(xavier(rngs, (2 * channels, channels), 2 * channels, channels))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Return one feature a snippet; a sequence shorter than `num_neighbours` has as many as it is long.

        Masked snippets are neighbours too, as published: they are alike among themselves.
        """
        x = x.astype(self.dtype)
        of_neighbour, of_snippet = jnp.split(self.kernel[...].astype(self.dtype), 2)
        index = nearest(x, min(self.num_neighbours, x.shape[1]))
        y = x @ of_neighbour
        neighbours = [jnp.take_along_axis(y, index[..., n, None], axis=1) for n in range(index.shape[-1])]
        return functools.reduce(jnp.maximum, neighbours) + x @ of_snippet + self.bias[...].astype(self.dtype)


def nearest(x: Float[Array, "B T C"], number: int) -> Int[Array, "B T k"]:
    """Return the snippets at the least squared distance in feature space from each, itself first; no gradient."""
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    # as a sum of squares: the shorter form with products of features would round away what tells neighbours apart
    distance = jnp.square(x[:, :, None] - x[:, None]).sum(-1)
    return jax.lax.top_k(-distance, number)[1]


class GraphBlock(nnx.Module):
    """The paper's xGN: a convolution over time beside one over the graph of similar snippets, ReLU, max pooling."""

    def __init__(self, channels: int, *, stride: int, num_neighbours: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.stride = stride
        self.temporal = xavier_conv(channels, channels, 3, dtype=dtype, rngs=rngs)
        self.graph = NeighbourConv(channels, num_neighbours, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T C"], mask: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B U C"], Bool[Array, "B U"]]:
        """Return features, zero at masked positions, and their mask: True where the pooling saw a real snippet."""
        x = max_pool(jax.nn.relu(self.temporal(x) + self.graph(x)), self.stride)
        mask = max_pool(mask[..., None].astype(jnp.float32), self.stride)[..., 0] > 0
        return apply_mask(x, mask), mask


class Pyramid(nnx.Module):
    """A stem and `num_levels` blocks that halve the length; `num_neighbours` 0 makes them plain convolutions."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stem_stride: int,
        num_levels: int,
        num_neighbours: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stem = ConvBlock(in_channels, channels, stride=stem_stride, dtype=dtype, rngs=rngs)
        if num_neighbours:
            block = functools.partial(GraphBlock, channels, num_neighbours=num_neighbours)
        else:
            block = functools.partial(ConvBlock, channels, channels)
        self.levels = nnx.List([block(stride=2, dtype=dtype, rngs=rngs) for _ in range(num_levels)])

    def __call__(
        self, x: Float[Array, "B T C"], mask: Bool[Array, "B T"]
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Return features and masks of all levels, finest first; the stem alone is no level."""
        x, mask = self.stem(x, mask)
        features, masks = [], []
        for level in self.levels:
            x, mask = level(x, mask)
            features.append(x)
            masks.append(mask)
        return tuple(features), tuple(masks)


class UpConv(nnx.Module):
    """Double the length: the transpose of a convolution with stride 2 over three snippets, and ReLU.

    The kernel (3, out, in) is that convolution's, from the finer level to the coarser. Position t of the coarse input
    goes to 2t - 1, 2t and 2t + 1 of the result: an even one is one product, an odd one the sum of two.
    """

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        bound = 1.0 / math.sqrt(3 * channels)
        kernel = jax.random.uniform(rngs.params(), (3, channels, channels), jnp.float32, -bound, bound)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (channels,), jnp.float32, -bound, bound))

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B U D"]:
        """Return features of twice the length."""
        before, at, after = self.kernel[...].astype(self.dtype)
        x = x.astype(self.dtype)
        following = jnp.pad(x[:, 1:], [(0, 0), (0, 1), (0, 0)])
        pairs = jnp.stack([x @ at.T, following @ before.T + x @ after.T], axis=2)  # B T 2 D
        y = pairs.reshape(x.shape[0], 2 * x.shape[1], -1)
        return jax.nn.relu(y + self.bias[...].astype(self.dtype))


class FeaturePyramid(nnx.Module):
    """Carry the coarse levels' features to the finer ones; `lateral`, `up` and `fuse` begin at the coarsest step."""

    def __init__(self, channels: int, *, num_levels: int, dtype: DTypeLike, rngs: nnx.Rngs):
        conv = functools.partial(xavier_conv, channels, channels, 3, dtype=dtype, rngs=rngs)
        self.transit = conv()
        self.lateral = nnx.List([conv() for _ in range(num_levels - 1)])
        self.up = nnx.List([UpConv(channels, dtype=dtype, rngs=rngs) for _ in range(num_levels - 1)])
        self.fuse = nnx.List([conv() for _ in range(num_levels - 1)])

    def __call__(
        self, levels: tuple[Float[Array, "B T C"], ...], masks: tuple[Bool[Array, "B T"], ...]
    ) -> tuple[Float[Array, "B T C"], ...]:
        """Return the joined levels, finest first, masked at the very end only, as published."""
        *finer, coarsest = levels
        x = jax.nn.relu(self.transit(coarsest))
        joined = [x]
        for level, lateral, up, fuse in zip(reversed(finer), self.lateral, self.up, self.fuse, strict=True):
            x = jax.nn.relu(fuse(jax.nn.relu(lateral(level)) + up(x)))
            joined.append(x)
        return tuple(apply_mask(x, mask) for x, mask in zip(reversed(joined), masks, strict=True))
