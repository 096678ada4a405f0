"""Convolutions over (time, height, width) as matrix products and 2-D convolutions, and the batch norm behind them.

3-D convolutions compile to slow code: on a CPU the stem of SlowFast's fast pathway is 16 times faster in the form below
and its gradient 19 times. Kernels keep the plain layout (t, h, w, in, out).
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from re2tal_jax.backbones.windows import Size
from re2tal_jax.exact import at_least_float32, widen
from re2tal_jax.kept import keep

EPSILON = 1e-5  # PyTorch's, and that of every published checkpoint
UNIT: Size = (1, 1, 1)
_HE_NORMAL = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # keeps the scale through a ReLU


def convolve(
    x: Float[Array, "B T H W C"], kernel: Float[Array, "t h w C D"], stride: Size = UNIT, *, pad_time: bool = True
) -> Float[Array, "B T2 H2 W2 D"]:
    """Convolve, with zeros for half a kernel around the input (odd kernels keep the size at stride 1).

    Without `pad_time` x holds the frames that stand there in time, and the result is that many frames shorter.
    """
    batch, _, height, _, _ = x.shape
    (kt, kh, kw), (st, sh, sw) = kernel.shape[:3], stride
    if (kt, kh, kw) == UNIT:
        return x[:, ::st, ::sh, ::sw] @ kernel[0, 0, 0]
    if (kh, kw, sh, sw) == (1, 1, 1, 1):
        rows = rearrange(x, "b t h w c -> b t (h w) c")
        return rearrange(
            _convolve_2d(rows, kernel[:, :, 0], (st, 1), pad_rows=pad_time), "b t (h w) d -> b t h w d", h=height
        )
    x = _gather_taps(x, kt, st, pad_time)
    images = rearrange(x, "b t h w c -> (b t) h w c")
    y = _convolve_2d(images, rearrange(kernel, "t h w c d -> h w (t c) d"), (sh, sw))
    return rearrange(y, "(b t) h w d -> b t h w d", b=batch)


def _gather_taps(x: Float[Array, "B T H W C"], taps: int, stride: int, pad_time: bool) -> Float[Array, "B T2 H W K"]:
    """Put the frames that a kernel of `taps` frames sees side by side into the channels, K = taps * C."""
    if taps == 1:
        return x[:, ::stride]
    if pad_time:
        x = jnp.pad(x, [(0, 0), (taps // 2, taps // 2), (0, 0), (0, 0), (0, 0)])
    last = x.shape[1] - taps
    return jnp.concatenate([x[:, tap : tap + last + 1 : stride] for tap in range(taps)], axis=-1)


def _convolve_2d(
    x: Float[Array, "N H W C"], kernel: Float[Array, "h w C D"], stride: tuple[int, int], *, pad_rows: bool = True
) -> Float[Array, "N H2 W2 D"]:
    rows, columns = (k // 2 for k in kernel.shape[:2])
    padding = [(rows, rows) if pad_rows else (0, 0), (columns, columns)]
    return lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def max_pool(x: Float[Array, "B T H W C"]) -> Float[Array, "B T H2 W2 C"]:
    """Take the largest of 3 x 3 neighbours at every second position of H and W."""
    padding = ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 3, 1), (1, 1, 2, 2, 1), padding)


class Conv(nnx.Module):
    """A convolution without bias, as those before a batch norm are, computed in `dtype`."""

    def __init__(
        self, in_channels: int, channels: int, size: Size, stride: Size = UNIT, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.stride, self.dtype = stride, jnp.dtype(dtype)
        shape = (*size, in_channels, channels)
        self.kernel = nnx.Param(_HE_NORMAL(rngs.params(), shape, jnp.float32))

    @property
    def halo(self) -> int:
        """Frames that it sees before a frame, and as many after."""
        return self.kernel.shape[0] // 2

    def __call__(self, x: Float[Array, "B T H W C"], *, pad_time: bool = True) -> Float[Array, "B T2 H2 W2 D"]:
        """Return (B, T, H, W, channels) in the compute dtype, each size divided by its stride, rounded up.

        Without `pad_time` x has `halo` frames more at both ends.
        """
        kernel = self.kernel[...].astype(self.dtype)
        return keep(convolve(x.astype(self.dtype), kernel, self.stride, pad_time=pad_time))


class BatchNorm(nnx.Module):
    """Batch norm in evaluation mode, always: an affine map of each channel by its stored mean and variance.

    The recipes fine-tune with `norm_eval=True`: a batch of one or two videos has no statistics worth following, and a
    branch that is run twice, as every reversible one is, would move them twice. `mean` and `var` are parameters like
    all arrays, but get no gradient. Computed in at least float32 from the input as it is, returned in `dtype`.
    """

    def __init__(self, features: int, *, scale: float = 1.0, dtype: DTypeLike):
        self.dtype = jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.full(features, scale, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.mean = nnx.Param(jnp.zeros(features, jnp.float32))
        self.var = nnx.Param(jnp.ones(features, jnp.float32))

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Normalise each channel."""
        precise = at_least_float32(x.dtype)
        scale, bias = self.scale[...].astype(precise), self.bias[...].astype(precise)
        mean, var = lax.stop_gradient((self.mean[...].astype(precise), self.var[...].astype(precise)))
        return ((widen(x, precise) - mean) * (scale * lax.rsqrt(var + EPSILON)) + bias).astype(self.dtype)


class ConvNorm(nnx.Module):
    """A convolution and its batch norm; `out_dtype` is what the norm returns (None: `dtype`)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        size: Size,
        stride: Size = UNIT,
        *,
        scale: float = 1.0,
        dtype: DTypeLike,
        out_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(in_channels, channels, size, stride, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(channels, scale=scale, dtype=dtype if out_dtype is None else out_dtype)

    def __call__(self, x: Float[Array, "B T H W C"], *, pad_time: bool = True) -> Float[Array, "B T2 H2 W2 D"]:
        """Convolve, then normalise; `pad_time` as for a `Conv`."""
        return self.norm(self.conv(x, pad_time=pad_time))
