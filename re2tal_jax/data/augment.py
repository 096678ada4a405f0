"""Augmentation on the accelerator: frames as stored to frames as the backbone takes them.

Every clip gets its own draw, and all of its frames the same one. Crop, resize and flip are two small matrix products a
frame; a rotation makes them one bilinear look-up. A block of frames is worked on at a time, so that beside the stored
frames and the result nothing of their size exists. All shapes are static and the batch axis is never mixed: one
compilation, and it shards.

The recipe is that of the published configurations: random resized crop, flip, one of the geometric and colour changes
of RandAugment, colour jitter. Theirs draws the order of the colour changes and the sign of the angle once a process; of
RandAugment's fifteen operations this has rotation, with the probability that theirs has it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8

from re2tal_jax.errors import ConfigError, did_you_mean
from re2tal_jax.types import Batch

_ATTEMPTS = 10
_NUM_DRAWS = 2 * _ATTEMPTS + 9
_GREY = np.array([0.2989, 0.587, 0.114], np.float32)
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32)
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is drawn for each clip. A strength of 0 turns a change off; all of them at 0 is a plain resize.

    height, width: size of the result in pixels.
    crop: largest share of the picture's area that a random crop leaves out; 0.92 is the published (0.08, 1).
    aspect: the crop's width over height is log-uniform in [1 / aspect, aspect], in the source's pixels.
    flip: probability of a mirrored clip.
    rotation_degrees, rotation_probability: angle uniform in +- rotation_degrees, for this share of the clips.
    brightness, contrast, saturation: factors uniform in 1 +- strength.
    hue: turn of the colour circle, uniform in +- hue; published 0.1 of 255 in a circle of 180, that is 0.14 here.
    center: where there is no random crop, cut out the largest centred part of the result's proportions; without it
        the whole picture is squeezed to (height, width).
    dtype: of the result, whose values are 0..255. A step keeps it; uint8 takes least memory, and rounds once, where
        published pipelines round after every change.
    block_frames: frames worked on at a time.
    """

    height: int
    width: int
    crop: float = 0.0
    aspect: float = 4 / 3
    flip: float = 0.0
    rotation_degrees: float = 0.0
    rotation_probability: float = 2 / 15
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    center: bool = False
    dtype: Literal["float32", "bfloat16", "uint8"] = "float32"
    block_frames: int = 16

    def __post_init__(self) -> None:
        for name in ("height", "width", "block_frames"):
            _check(name, getattr(self, name), 1, None)
        for name in ("crop", "flip", "rotation_probability", "brightness", "contrast", "saturation"):
            _check(name, getattr(self, name), 0, 1)
        _check("crop", self.crop, 0, 0.99)
        _check("aspect", self.aspect, 1, 100)
        _check("rotation_degrees", self.rotation_degrees, 0, 180)
        _check("hue", self.hue, 0, 0.5)

    @property
    def colored(self) -> bool:
        """Whether any colour change is on."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))


def _check(name: str, value: float, low: float, high: float | None) -> None:
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name} = {value} is not allowed; it must be {allowed}.")


class _Draw(NamedTuple):
    """One clip's transform: part of the picture (in shares of it), mirrored or not, angle, colour map."""

    top: Float[Array, ""]
    left: Float[Array, ""]
    height: Float[Array, ""]
    width: Float[Array, ""]
    flip: Bool[Array, ""]
    angle: Float[Array, ""]
    color: Float[Array, "3 3"]
    contrast: Float[Array, ""]


def augment(
    video: UInt8[Array, "B F H W 3"],
    frame_size: Float[Array, "B 2"],
    config: AugmentConfig,
    key: Key[Array, ""] | None,
) -> Shaped[Array, "B F h w 3"]:
    """Return the clips cropped, resized, mirrored, turned and coloured, each in its own way; values 0..255.

    Args:
        video: RGB frames as stored, of any size.
        frame_size: height and width in source pixels of what the frames show; crops are drawn in these proportions.
        config: what to draw.
        key: the batch's own key; None for evaluation: only resize, or centre crop, whatever the strengths.
    """
    if key is None:
        config = evaluation(config)
        uniform = jnp.zeros((video.shape[0], _NUM_DRAWS))  # decides nothing: every strength is 0
    else:
        uniform = jax.random.uniform(key, (video.shape[0], _NUM_DRAWS))
    draw = jax.vmap(lambda size, numbers: _draw(size, numbers, config))(frame_size, uniform)
    transform = _turned_sampler if config.rotation_degrees else _straight_sampler
    sample = jax.vmap(lambda d, frames: _colored(transform(d, frames, config), d, config))
    return _by_blocks(lambda frames: sample(draw, frames), video, config)


def evaluation(config: AugmentConfig) -> AugmentConfig:
    """Return the configuration with every random change off."""
    return replace(
        config, crop=0.0, flip=0.0, rotation_degrees=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0
    )


def _by_blocks(
    sample: Callable[[Array], Array], video: UInt8[Array, "B F H W 3"], config: AugmentConfig
) -> Shaped[Array, "B F h w 3"]:
    """Apply `sample` to blocks of frames, writing each into its place; the last block may overlap the one before."""
    batch, frames = video.shape[:2]
    size = min(config.block_frames, frames)
    dtype = jnp.dtype(config.dtype)

    def step(i: Array, out: Array) -> Array:
        first = jnp.minimum(i * size, frames - size)
        block = jax.lax.dynamic_slice_in_dim(video, first, size, axis=1)
        result = jnp.round(sample(block)) if dtype == jnp.uint8 else sample(block)
        return jax.lax.dynamic_update_slice_in_dim(out, result.astype(dtype), first, axis=1)

    empty = jnp.zeros((batch, frames, config.height, config.width, 3), dtype)
    return jax.lax.fori_loop(0, -(-frames // size), step, empty)


def _draw(frame_size: Float[Array, "2"], uniform: Float[Array, " n"], config: AugmentConfig) -> _Draw:
    """Turn one clip's numbers, uniform in [0, 1), into its transform."""
    shapes, place, chances, amounts = jnp.split(uniform, np.cumsum([2 * _ATTEMPTS, 2, 2]))
    box = _random_crop(frame_size, shapes, place, config) if config.crop else _whole(frame_size, config)
    angle, *colors = 2 * amounts - 1
    turned = chances[1] < config.rotation_probability
    matrix, contrast = _color_map(colors, config)
    return _Draw(
        *box,
        flip=chances[0] < config.flip,
        angle=jnp.where(turned, angle * np.float32(np.deg2rad(config.rotation_degrees)), 0.0),
        color=matrix,
        contrast=contrast,
    )


def _whole(frame_size: Float[Array, "2"], config: AugmentConfig) -> tuple[Array, Array, Array, Array]:
    """Return top, left, height, width, in shares of the picture, of all of it or of its centre."""
    height, width = jnp.float32(1), jnp.float32(1)
    if config.center:
        aspect = frame_size[1] / frame_size[0] * (config.height / config.width)
        height, width = jnp.minimum(height, aspect), jnp.minimum(width, 1 / aspect)
    return (1 - height) / 2, (1 - width) / 2, height, width


def _random_crop(
    frame_size: Float[Array, "2"], shapes: Float[Array, " n"], place: Float[Array, "2"], config: AugmentConfig
) -> tuple[Array, Array, Array, Array]:
    """Return the first of ten drawn crops that fits in the picture, else its largest centred square."""
    area = 1 - shapes[:_ATTEMPTS] * config.crop
    aspect = jnp.exp((2 * shapes[_ATTEMPTS:] - 1) * np.float32(np.log(config.aspect)))
    source = frame_size[1] / frame_size[0]
    # width * height = area, in shares of the picture; width * source / height = aspect
    widths, heights = jnp.sqrt(area * aspect / source), jnp.sqrt(area / aspect * source)
    fits = (widths <= 1) & (heights <= 1)
    square = jnp.min(frame_size) / frame_size
    first = jnp.argmax(fits)
    height = jnp.where(fits.any(), heights[first], square[0])
    width = jnp.where(fits.any(), widths[first], square[1])
    place = jnp.where(fits.any(), place, 0.5)
    return place[0] * (1 - height), place[1] * (1 - width), height, width


def _color_map(amounts: list[Array], config: AugmentConfig) -> tuple[Float[Array, "3 3"], Float[Array, ""]]:
    """Return the matrix of brightness, then saturation, then hue, and the factor of contrast; amounts in -1..1."""
    brightness, contrast, saturation, hue = amounts
    keep = 1 + saturation * config.saturation
    matrix = jnp.eye(3) * keep + (1 - keep) * np.tile(_GREY, (3, 1))
    turn = hue * np.float32(2 * np.pi * config.hue)
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    chroma = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
    rotation = jnp.eye(3).at[1:, 1:].set(chroma)
    product = jnp.linalg.multi_dot([_FROM_YIQ, rotation, _TO_YIQ, matrix], precision="highest")
    return product * (1 + brightness * config.brightness), 1 + contrast * config.contrast


def _colored(frames: Float[Array, "F h w 3"], draw: _Draw, config: AugmentConfig) -> Float[Array, "F h w 3"]:
    """Return the frames with the clip's colour map; contrast is about each frame's mean grey, as published."""
    if not config.colored:
        return frames
    frames = jnp.einsum("fhwc,dc->fhwd", frames, draw.color, precision="highest")
    grey = jnp.einsum("fhwc,c->f", frames, _GREY, precision="highest") / (config.height * config.width)
    frames = frames * draw.contrast + (1 - draw.contrast) * grey[:, None, None, None]
    return jnp.clip(frames, 0, 255)


def _centred(size: int) -> Float[Array, " size"]:
    """Return the middles of `size` pixels, in shares of their row, from -0.5 to 0.5."""
    return (jnp.arange(size, dtype=jnp.float32) + (0.5 - size / 2)) / size


def _straight_sampler(draw: _Draw, frames: UInt8[Array, "F H W 3"], config: AugmentConfig) -> Array:
    """Crop, resize and flip by one matrix for the rows and one for the columns."""
    rows, columns = _centred(config.height), _centred(config.width)
    columns = jnp.where(draw.flip, -columns, columns)
    rows, columns = draw.top + (rows + 0.5) * draw.height, draw.left + (columns + 0.5) * draw.width
    down, across = _bilinear(rows, frames.shape[1]), _bilinear(columns, frames.shape[2])
    # at default precision accelerators round the weights to bfloat16
    half = jnp.einsum("hy,fyxc->fhxc", down, frames.astype(jnp.float32), precision="highest")
    return jnp.einsum("wx,fhxc->fhwc", across, half, precision="highest")


def _bilinear(positions: Float[Array, " n"], size: int) -> Float[Array, "n size"]:
    """Return the weights by which pixels at n positions (shares of the picture) mix the `size` stored ones."""
    place = jnp.clip(positions * size - 0.5, 0, size - 1)
    return jnp.maximum(1 - jnp.abs(place[:, None] - jnp.arange(size, dtype=jnp.float32)), 0)


def _turned_sampler(draw: _Draw, frames: UInt8[Array, "F H W 3"], config: AugmentConfig) -> Array:
    """Crop, resize, flip and turn about the middle by a bilinear look-up; black where the picture ends."""
    size = frames.shape[1:3]
    y = _centred(config.height)[:, None] * config.height
    x = _centred(config.width)[None] * config.width
    cos, sin = jnp.cos(draw.angle), jnp.sin(draw.angle)
    rows = (y * cos - x * sin) / config.height
    columns = (x * cos + y * sin) / config.width
    columns = jnp.where(draw.flip, -columns, columns)
    rows, columns = draw.top + (rows + 0.5) * draw.height, draw.left + (columns + 0.5) * draw.width
    inside = (rows >= 0) & (rows <= 1) & (columns >= 0) & (columns <= 1)
    y, x = jnp.clip(rows * size[0] - 0.5, 0, size[0] - 1), jnp.clip(columns * size[1] - 0.5, 0, size[1] - 1)
    above, before = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
    below, after = jnp.minimum(above + 1, size[0] - 1), jnp.minimum(before + 1, size[1] - 1)
    dy, dx = (y - jnp.floor(y))[..., None], (x - jnp.floor(x))[..., None]
    pixels = frames.reshape(frames.shape[0], size[0] * size[1], 3)

    def at(row: Int[Array, "h w"], column: Int[Array, "h w"]) -> Float[Array, "F h w 3"]:
        return pixels[:, row * size[1] + column].astype(jnp.float32)

    upper = at(above, before) * (1 - dx) + at(above, after) * dx
    lower = at(below, before) * (1 - dx) + at(below, after) * dx
    return (upper * (1 - dy) + lower * dy) * inside[..., None].astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class LabelSwap:
    """Which class a class becomes when the picture is mirrored left to right, and when time runs backward."""

    flip: tuple[int, ...]
    reverse: tuple[int, ...]

    @classmethod
    def from_names(cls, classes: Sequence[str], flip: Mapping[str, str], reverse: Mapping[str, str]) -> "LabelSwap":
        """Build the tables from class names; a class that is not named stays what it is.

        Raises:
            ConfigError: a name that is no class.
        """
        for name in (*flip, *flip.values(), *reverse, *reverse.values()):
            if name not in classes:
                raise ConfigError(f"The label swap names {name!r}, which is no class. {did_you_mean(name, classes)}")
        index = {name: i for i, name in enumerate(classes)}
        return cls(
            flip=tuple(index[flip.get(name, name)] for name in classes),
            reverse=tuple(index[reverse.get(name, name)] for name in classes),
        )


def mirror(batch: Batch, swap: LabelSwap, key: Key[Array, ""], *, flip: float = 0.5, reverse: float = 0.5) -> Batch:
    """Mirror clips left to right and play clips backward, each with these probabilities, labels and segments with them.

    For classes that are motions with a direction: there `AugmentConfig.flip` would make the labels wrong. Of a clip
    with padding the valid part alone is played backward.
    """
    size, (frames, snippets) = batch.video.shape[0], (batch.video.shape[1], batch.mask.shape[1])
    uniform = jax.random.uniform(key, (2, size))
    flipped, reversed_ = uniform[0] < flip, uniform[1] < reverse
    video = jnp.where(flipped[:, None, None, None, None], batch.video[:, :, :, ::-1], batch.video)
    valid = batch.mask.sum(axis=1, dtype=jnp.int32)
    order = jax.vmap(_backward, in_axes=(0, 0, None))(reversed_, valid * (frames // snippets), frames)
    video = jnp.take_along_axis(video, order[:, :, None, None, None], axis=1)
    length = valid.astype(jnp.float32)[:, None]
    turned = jnp.stack([length - batch.gt_segments[..., 1], length - batch.gt_segments[..., 0]], axis=-1)
    turn = reversed_[:, None] & batch.gt_mask
    labels = jnp.where(flipped[:, None], jnp.asarray(swap.flip, jnp.int32)[batch.gt_labels], batch.gt_labels)
    labels = jnp.where(reversed_[:, None], jnp.asarray(swap.reverse, jnp.int32)[labels], labels)
    return replace(
        batch,
        video=video,
        gt_segments=jnp.where(turn[..., None], turned, batch.gt_segments),
        gt_labels=jnp.where(batch.gt_mask, labels, batch.gt_labels),
    )


def _backward(reversed_: Bool[Array, ""], valid: Int[Array, ""], frames: int) -> Int[Array, " F"]:
    """Return the order of a clip's frames: the first `valid` of them backward if `reversed_`."""
    index = jnp.arange(frames, dtype=jnp.int32)
    return jnp.where(reversed_ & (index < valid), valid - 1 - index, index)
