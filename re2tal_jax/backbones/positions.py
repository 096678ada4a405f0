"""Tables of positions of a vision transformer: the fixed sinusoidal one, and bicubic interpolation over space."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SHARPNESS = -0.75  # torch's parameter `a` of the cubic kernel; jax.image.resize has -0.5


def sinusoidal_positions(count: int, dim: int) -> np.ndarray:
    """Return the (count, dim) float32 table of "Attention Is All You Need" (section 3.5), as VideoMAE adds it.

    Channels 2i and 2i + 1 hold sine and cosine of position / 10000**(2i / dim).
    """
    channel = np.arange(dim)
    angles = np.arange(count)[:, None] / 10000.0 ** ((channel - channel % 2) / dim)
    return np.where(channel % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


def resize_positions(table: Float[Array, "T H W D"], size: tuple[int, int]) -> Float[Array, "T h w D"]:
    """Interpolate over height and width as torch's `interpolate(mode="bicubic", align_corners=False)`.

    Checkpoints were fine-tuned through this one, which smooths nothing when it shrinks.
    """
    rows, columns = (
        jnp.asarray(bicubic_weights(length, new_length), table.dtype)
        for length, new_length in zip(table.shape[1:3], size, strict=True)
    )
    return jnp.einsum("tijd,ih,jw->thwd", table, rows, columns, precision=jax.lax.Precision.HIGHEST)


def bicubic_weights(length: int, new_length: int) -> np.ndarray:
    """Return the (length, new_length) float64 matrix of cubic interpolation between sample centres, ends repeated.

    Each new sample is a sum of the four around it (Keys 1981, equation 4, with `SHARPNESS` for its -1/2).
    """
    centres = (np.arange(new_length) + 0.5) * (length / new_length) - 0.5
    left = np.floor(centres).astype(np.int64)
    weights = np.zeros((length, new_length))
    for sample in (left - 1, left, left + 1, left + 2):
        rows = np.clip(sample, 0, length - 1)
        np.add.at(weights, (rows, np.arange(new_length)), _cubic(np.abs(centres - sample)))
    return weights


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Return the kernel at distances 0..2."""
    a, d = SHARPNESS, distance
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, far)
