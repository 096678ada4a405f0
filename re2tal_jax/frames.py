"""A video between its stored frames and a backbone: normalised where it is read, a stretch of time at a time.

Normalised, a video is a float copy of its frames, which a training step would have to keep until the backward pass has
come back to the first layer. Nothing but the stored frames is kept here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from re2tal_jax.chunks import in_overlapping_chunks
from re2tal_jax.errors import DataError
from re2tal_jax.exact import at_least_float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frames:
    """Frames as they are stored, of values 0..255, and what normalises them: (stored - mean) / std, by channel."""

    stored: Shaped[Array, "B F H W C"]
    mean: tuple[float, ...] = field(metadata={"static": True})
    std: tuple[float, ...] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, F, H, W, C)."""
        return self.stored.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.stored.ndim


Video = Frames | Float[Array, "B F H W C"]
"""What a backbone takes: frames that it normalises by `in_stretches` or `normalized`, or a normalised video."""


def normalized(video: Video) -> Float[Array, "B F H W C"]:
    """Return the whole video, of frames in at least float32."""
    return _normalize((video.mean, video.std), video.stored) if isinstance(video, Frames) else video


def in_stretches(
    function: Callable[..., Any], count: int, params: Any, video: Video, *, halo: int = 0, stride: int = 1, end: int = 0
) -> Any:
    """Return function(params, normalised), computed in `count` stretches of time; see `chunks.in_chunks`.

    Args:
        function: of (params, a stretch of the normalised video), to an array whose axis 1 is the stretch.
        count: divides the frames that are taken.
        params: a pytree of arrays.
        video: (B, F, H, W, C).
        halo: frames, of those that are taken, that the function is given beyond its stretch at both ends.
        stride: every so manieth frame is taken.
        end: frames that are added at the end of the video. As all frames that are not in the video they are zeros
            after it is normalised.

    Raises:
        DataError: integers that nothing normalises.
        ValueError: frames that do not divide so.
    """
    if not isinstance(video, Frames) and not jnp.issubdtype(video.dtype, jnp.inexact):
        raise DataError(
            f"A video of {video.dtype} is not normalised: give a backbone re2tal_jax.frames.Frames(video, mean, std), "
            "or the normalised video in float32."
        )
    if (video.shape[1] + end) % (count * stride):
        raise ValueError(f"{video.shape[1]} + {end} frames are not {count} stretches of one length, stride {stride}.")
    given, scale = (video.stored, (video.mean, video.std)) if isinstance(video, Frames) else (video, None)
    present = jnp.ones((1, given.shape[1]), bool)
    if end:
        given, present = (jnp.pad(x, [(0, 0), (0, end)] + [(0, 0)] * (x.ndim - 2)) for x in (given, present))
    if scale is not None and (halo or end):
        return in_overlapping_chunks(
            partial(_apply, function, scale, stride), count, (stride * halo,) * 2, params, given, present
        )
    return in_overlapping_chunks(partial(_apply, function, scale, stride), count, (stride * halo,), params, given)


def _apply(
    function: Callable[..., Any],
    scale: Any,
    stride: int,
    params: Any,
    given: Shaped[Array, "B f H W C"],
    present: Bool[Array, "1 f"] | None = None,
) -> Any:
    x = given[:, ::stride]
    x = x if scale is None else _normalize(scale, x)
    return function(params, x if present is None else jnp.where(present[:, ::stride, None, None, None], x, 0))


def _normalize(scale: Any, stored: Shaped[Array, "B f H W C"]) -> Float[Array, "B f H W C"]:
    """Normalise in at least float32: in bfloat16, differences of pixels near a mean would lose their last bits."""
    precise = at_least_float32(stored.dtype)
    mean, std = (jnp.asarray(values, precise) for values in scale)
    return (stored.astype(precise) - mean) / std
