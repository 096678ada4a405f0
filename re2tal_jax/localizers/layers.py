"""What 1-D localizers are made of: masked convolutions, windowed and global attention, transformer blocks.

Features are B T C, masks B T with True at real snippets. A module's `dtype` is its compute dtype; parameters, softmax
and normalisation statistics stay float32. Randomness comes from a key argument alone; None means evaluation.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from re2tal_jax.backbones.layers import LayerNorm, gelu

CONV_NORM_EPSILON = 1e-6  # after convolutions and in the FPN; inside transformer blocks LayerNorm's own 1e-5
_LOWEST = float(np.finfo(np.float32).min)  # finite: a row without any valid key becomes uniform, not NaN


def apply_mask(x: Float[Array, "B T C"], mask: Bool[Array, "B T"]) -> Float[Array, "B T C"]:
    """Set masked positions to zero."""
    return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))


def dropout(x: Array, rate: float, key: Key[Array, ""] | None, shape: tuple[int, ...] | None = None) -> Array:
    """Zero a `rate` of the elements and scale the rest by 1 / (1 - rate); no key or rate 0 changes nothing.

    `shape` broadcasts against x and says what is dropped together: (B, 1, 1) drops whole samples.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape if shape is None else shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def split_key(key: Key[Array, ""] | None, number: int) -> tuple[Key[Array, ""] | None, ...]:
    """Return `number` independent keys, or as many None."""
    return (None,) * number if key is None else tuple(jax.random.split(key, number))


class Conv1d(nnx.Module):
    """Convolve over time with an odd kernel, zero padding of half of it, and an optional stride.

    Kernel (k, in, out), or (k, 1, channels) where `depthwise`. Initialised as PyTorch does: uniform within
    1 / sqrt(fan in); the bias, if any, starts at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
        use_bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stride, self.depthwise, self.dtype = stride, depthwise, dtype
        fan_in = kernel_size * (1 if depthwise else in_channels)
        bound = 1.0 / math.sqrt(fan_in)
        shape = (kernel_size, 1 if depthwise else in_channels, out_channels)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32)) if use_bias else None

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B U D"]:
        """Return the convolution, U = ceil(T / stride)."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.depthwise:
            x = _depthwise(x, kernel, self.stride)
        elif kernel.shape[0] == 1 and self.stride == 1:
            x = x @ kernel[0]
        else:
            half = kernel.shape[0] // 2
            x = jax.lax.conv_general_dilated(
                x, kernel, (self.stride,), [(half, half)], dimension_numbers=("NWC", "WIO", "NWC")
            )
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


def _taps(x: Float[Array, "B T C"], size: int, stride: int, fill: float) -> list[Float[Array, "B U C"]]:
    """Return the `size` strided views of x that a window of that size sees, x padded by size // 2 with `fill`."""
    half = size // 2
    length = (x.shape[1] + 2 * half - size) // stride + 1
    padded = jnp.pad(x, ((0, 0), (half, half), (0, 0)), constant_values=fill)
    return [padded[:, i : i + stride * (length - 1) + 1 : stride] for i in range(size)]


def _depthwise(x: Float[Array, "B T C"], kernel: Float[Array, "k 1 C"], stride: int) -> Float[Array, "B U C"]:
    # Sums of shifted products: on CPU some 30 times faster than a grouped convolution with its gradients, and fused
    # into one pass elsewhere.
    taps = _taps(x, kernel.shape[0], stride, 0.0)
    products = [t.astype(jnp.float32) * k.astype(jnp.float32) for t, k in zip(taps, kernel, strict=True)]
    return functools.reduce(jnp.add, products).astype(x.dtype)


def max_pool(x: Float[Array, "B T C"], stride: int) -> Float[Array, "B U C"]:
    """Return the maximum over windows of stride + 1 positions centred at 0, stride, 2 stride …"""
    return functools.reduce(jnp.maximum, _taps(x, stride + 1, stride, -jnp.inf))


class MaskedConv(nnx.Module):
    """Convolution, layer norm and ReLU; masked before the norm and after it.

    The input is not masked: a masked position holding anything but zero reaches half a kernel into the valid ones.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv1d(in_channels, out_channels, kernel_size, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(out_channels, epsilon=CONV_NORM_EPSILON, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return features that are zero at masked positions."""
        x = self.norm(apply_mask(self.conv(x), mask))
        return apply_mask(jax.nn.relu(x), mask)


def global_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T H D"]:
    """Attend from every position to every valid one.

    A sample without any valid position gets the finite mean of its values (the published code gives NaN there).
    """
    logits = jnp.einsum("bqhd,bkhd->bhqk", _scaled(query), key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], logits, _LOWEST), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


def local_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    mask: Bool[Array, "B T"],
    window: int,
) -> Float[Array, "B T H D"]:
    """Attend from every position to the valid ones at most window // 2 away.

    Queries go in blocks of window // 2; the keys a block can see lie in itself and its two neighbours, so that memory
    is 3 (window // 2) T H, linear in T, and no more than 1.5 times the scores needed are computed. Any T will do.
    """
    length, reach = query.shape[1], window // 2
    tail = -length % reach
    blocks = (length + tail) // reach

    def neighbours(x: Array) -> Array:  # B T … -> B blocks 3*reach …
        rest = [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, [(0, 0), (reach, reach + tail), *rest]).reshape(x.shape[0], blocks + 2, reach, *x.shape[2:])
        return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)

    query = jnp.pad(_scaled(query), [(0, 0), (0, tail), (0, 0), (0, 0)])
    query = query.reshape(query.shape[0], blocks, reach, *query.shape[2:])
    logits = jnp.einsum("bnqhd,bnkhd->bnhqk", query, neighbours(key), preferred_element_type=jnp.float32)
    ahead = np.arange(3 * reach)[None, :] - np.arange(reach)[:, None]  # key minus query position, plus reach
    visible = neighbours(mask)[:, :, None, None, :] & ((ahead >= 0) & (ahead <= 2 * reach))
    weights = jax.nn.softmax(jnp.where(visible, logits, _LOWEST), axis=-1)
    out = jnp.einsum("bnhqk,bnkhd->bnqhd", weights.astype(value.dtype), neighbours(value))
    return out.reshape(out.shape[0], blocks * reach, *out.shape[3:])[:, :length]


def _scaled(query: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    return query * (1.0 / math.sqrt(query.shape[-1]))


class ConvAttention(nnx.Module):
    """Multi-head attention whose queries, keys and values pass a depthwise convolution first.

    Each of q, k, v: depthwise convolution (stride > 1 shortens the sequence), mask, layer norm, linear. Masked keys
    get no weight; the result is zero at masked positions. `window` -1 is global attention, an odd number local.
    Source: ActionFormer (arXiv 2202.07925) section 3.2.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window: int,
        stride: int,
        proj_drop: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.window, self.stride, self.proj_drop = num_heads, window, stride, proj_drop
        conv = functools.partial(Conv1d, channels, channels, dtype=dtype, rngs=rngs)
        size = stride + 1 if stride > 1 else 3
        self.query_conv = conv(size, stride=stride, depthwise=True, use_bias=False)
        self.key_conv = conv(size, stride=stride, depthwise=True, use_bias=False)
        self.value_conv = conv(size, stride=stride, depthwise=True, use_bias=False)
        self.query_norm = LayerNorm(channels, dtype=dtype, rngs=rngs)
        self.key_norm = LayerNorm(channels, dtype=dtype, rngs=rngs)
        self.value_norm = LayerNorm(channels, dtype=dtype, rngs=rngs)
        self.query = conv(1)
        self.key = conv(1)
        self.value = conv(1)
        self.proj = conv(1)

    def __call__(
        self, x: Float[Array, "B T C"], mask: Bool[Array, "B U"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "B U C"]:
        """Attend; `mask` is that of the result, shorter than x by the stride."""

        def heads(conv: Conv1d, norm: LayerNorm, linear: Conv1d) -> Float[Array, "B U H D"]:
            y = linear(norm(apply_mask(conv(x), mask)))
            return y.reshape(*y.shape[:2], self.num_heads, -1)

        q = heads(self.query_conv, self.query_norm, self.query)
        k = heads(self.key_conv, self.key_norm, self.key)
        v = heads(self.value_conv, self.value_norm, self.value)
        if self.window > 0:
            y = local_attention(q, k, v, mask, self.window)
        else:
            y = global_attention(q, k, v, mask)
        y = dropout(self.proj(y.reshape(*y.shape[:2], -1)), self.proj_drop, key)
        return apply_mask(y, mask)


class AffineDropPath(nnx.Module):
    """Scale each channel by a learnt factor (1e-4 at first, also in evaluation) and drop whole samples in training."""

    def __init__(self, channels: int, rate: float):
        self.rate = rate
        self.scale = nnx.Param(jnp.full(channels, 1e-4, jnp.float32))

    def __call__(self, x: Float[Array, "B T C"], *, key: Key[Array, ""] | None) -> Float[Array, "B T C"]:
        """Return x scaled, float32, and zero for the samples that `key` drops."""
        return dropout(x.astype(jnp.float32) * self.scale[...], self.rate, key, (x.shape[0], 1, 1))


class TransformerBlock(nnx.Module):
    """Pre-norm transformer block on masked sequences; a stride > 1 shortens the sequence by it.

    The skip path of a strided block is a max pooling. With `path_drop_rate` 0 the branches have no learnt scale.
    The stream between blocks is float32: beside it a branch scaled by 1e-4 would be rounded away in bfloat16.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window: int,
        stride: int,
        path_drop_rate: float,
        proj_drop: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stride, self.proj_drop = stride, proj_drop
        self.norm1 = LayerNorm(channels, dtype=dtype, rngs=rngs)
        self.attn = ConvAttention(
            channels, num_heads, window=window, stride=stride, proj_drop=proj_drop, dtype=dtype, rngs=rngs
        )
        self.norm2 = LayerNorm(channels, dtype=dtype, rngs=rngs)
        self.mlp_in = Conv1d(channels, 4 * channels, 1, dtype=dtype, rngs=rngs)
        self.mlp_out = Conv1d(4 * channels, channels, 1, dtype=dtype, rngs=rngs)
        self.drop_path_attn = AffineDropPath(channels, path_drop_rate) if path_drop_rate > 0 else None
        self.drop_path_mlp = AffineDropPath(channels, path_drop_rate) if path_drop_rate > 0 else None

    def __call__(
        self, x: Float[Array, "B T C"], mask: Bool[Array, "B T"], *, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B U C"], Bool[Array, "B U"]]:
        """Return the result, float32 and zero at masked positions, and its mask, every stride-th of the input's."""
        attn_key, attn_path_key, hidden_key, mlp_key, mlp_path_key = split_key(key, 5)
        mask = mask[:, :: self.stride]
        y = self.attn(self.norm1(x), mask, key=attn_key)
        skip = (x if self.stride == 1 else max_pool(x, self.stride)).astype(jnp.float32)
        x = apply_mask(skip, mask) + _drop_path(self.drop_path_attn, y, attn_path_key)
        y = dropout(gelu(self.mlp_in(self.norm2(x))), self.proj_drop, hidden_key)
        y = apply_mask(dropout(self.mlp_out(y), self.proj_drop, mlp_key), mask)
        return x + _drop_path(self.drop_path_mlp, y, mlp_path_key), mask


def _drop_path(path: AffineDropPath | None, x: Array, key: Key[Array, ""] | None) -> Array:
    return x.astype(jnp.float32) if path is None else path(x, key=key)


@functools.lru_cache(maxsize=8)
def sinusoid(length: int, channels: int, positions: int) -> np.ndarray:
    """Return sine / cosine position codes over sqrt(channels), (length, channels) float32, row 0 at position 0.

    Codes are made for `positions` snippets; where `length` is larger they are interpolated linearly as images are
    (sample centres, no corner alignment), as the published code does in evaluation.
    """
    angles = np.arange(positions)[:, None] / np.power(10000.0, 2 * (np.arange(channels)[None, :] // 2) / channels)
    table = np.where(np.arange(channels) % 2 == 0, np.sin(angles), np.cos(angles)) / math.sqrt(channels)
    if length > positions:
        centre = np.clip((np.arange(length) + 0.5) * positions / length - 0.5, 0, None)
        left = np.floor(centre).astype(int)
        right, weight = np.minimum(left + 1, positions - 1), (centre - left)[:, None]
        table = table[left] * (1 - weight) + table[right] * weight
    return table[:length].astype(np.float32)
