"""Windows of tokens: how a (time, height, width) grid is clamped, shifted, cut and put back together (Video Swin)."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Shaped

Size = tuple[int, int, int]


def as_size(values: Sequence[int] | np.ndarray) -> Size:
    """Return three Python integers, which compare equal where a network's structure is compared."""
    time, height, width = map(int, values)
    return time, height, width


def clamp_window(size: Size, window: Size, shifted: bool) -> tuple[Size, Size]:
    """Return window and shift for an input of `size` (before padding): what fits in one window is not shifted."""
    clamped, shift = np.minimum(size, window), np.where(np.greater(size, window) & shifted, np.array(window) // 2, 0)
    return as_size(clamped), as_size(shift)


def shift_regions(positions: Sequence[Int[Array, " _"]], size: Size, window: Size, shift: Size) -> Float[Array, "n N"]:
    """Number the regions that a cyclic shift has joined, for the n windows of a part of a padded, shifted input.

    Along a shifted axis the last `shift` positions came from the other end; an axis that is not shifted splits nothing.
    `positions` are those of the part in the shifted input of `size`, along each axis.
    """
    wrapped = [along >= length - moved for along, length, moved in zip(positions, size, shift, strict=True)]
    bits = jnp.stack(jnp.meshgrid(*wrapped, indexing="ij"), axis=-1)[None].astype(jnp.float32)
    # A product is not fused into what uses it; a sum would be, and on a CPU computed anew for every pair of tokens.
    return to_windows(bits, window) @ jnp.array([1, 2, 4], jnp.float32)


def to_windows(x: Shaped[Array, "B T H W C"], window: Size) -> Shaped[Array, "n N C"]:
    """Cut into windows: n = B T H W / N of them, of N = prod(window) tokens."""
    wt, wh, ww = window
    return rearrange(x, "b (t wt) (h wh) (w ww) c -> (b t h w) (wt wh ww) c", wt=wt, wh=wh, ww=ww)


def from_windows(x: Shaped[Array, "n N C"], size: Size, window: Size) -> Shaped[Array, "B T H W C"]:
    """Put windows back together."""
    t, h, w = (s // n for s, n in zip(size, window, strict=True))
    wt, wh, ww = window
    pattern = "(b t h w) (wt wh ww) c -> b (t wt) (h wh) (w ww) c"
    return rearrange(x, pattern, t=t, h=h, w=w, wt=wt, wh=wh, ww=ww)


@functools.cache
def relative_position_index(window: Size) -> np.ndarray:
    """Return for each pair (query, key) of a window's tokens the row of the bias table, (N, N) int32."""
    positions = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1).reshape(-1, 3)
    offsets = positions[:, None] - positions[None, :] + np.array(window) - 1
    rows = np.ravel_multi_index(tuple(np.moveaxis(offsets, -1, 0)), [2 * w - 1 for w in window])
    return np.asarray(rows, np.int32)
