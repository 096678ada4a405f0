"""ResNet-3D: the pathway that SlowFast has two of, and alone as its slow pathway ("SlowOnly", arXiv 1812.03982).

A stage is one block that changes the resolution, then a chain of alike bottlenecks. In the ordinary network a ReLU
follows each sum; rewired it is the last thing inside the branch (OpenTAD's `re2tal_slowfast.py`), so that the sum can
be undone. Kernels, strides and padding are those of mmaction2 1.2.0 (style "pytorch", inflation 3x1x1).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from re2tal_jax.backbones.convolutions import UNIT, ConvNorm, max_pool
from re2tal_jax.backbones.layers import at_least_float32, check_dtype
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.reversible import PLAIN, REWIRED, Wiring

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4  # channels of a block's output for each of its inner ones


class Bottleneck(nnx.Module):
    """A branch: 1x1 (3x1x1 if inflated), 3x3 and 1x1 convolution, each with its norm, and ReLUs.

    `downsample` projects the shortcut of a stage's first block and is None in the others.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        inflate: bool,
        stride: int = 1,
        project: bool = False,
        scale: float = 1.0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """Build the parameters; `scale` is where that of the last norm starts."""
        channels, spatial = EXPANSION * width, (1, stride, stride)
        self.conv1 = ConvNorm(in_channels, width, (3 if inflate else 1, 1, 1), dtype=dtype, rngs=rngs)
        self.conv2 = ConvNorm(width, width, (1, 3, 3), spatial, dtype=dtype, rngs=rngs)
        self.conv3 = ConvNorm(width, channels, UNIT, scale=scale, dtype=dtype, rngs=rngs)
        precise = at_least_float32(dtype)  # what the projection returns starts the states of a chain
        projection = functools.partial(ConvNorm, in_channels, channels, UNIT, spatial, dtype=dtype, out_dtype=precise)
        self.downsample = projection(rngs=rngs) if project else None

    def __call__(
        self, x: Float[Array, "B T H W C"], *, key: PRNGKeyArray | None = None, aux: Any = None
    ) -> Float[Array, "B T h w D"]:
        """Return the residual function of the rewired network, ReLU included, in the compute dtype."""
        return jax.nn.relu(self.residual(x))

    def ordinary(
        self, x: Float[Array, "B T H W C"], shortcut: Float[Array, "B T h w D"], *, key: Any = None, aux: Any = None
    ) -> Float[Array, "B T h w D"]:
        """Return the block of the ordinary network, its ReLU after the sum."""
        return jax.nn.relu(shortcut + self.residual(x).astype(shortcut.dtype))

    def residual(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T h w D"]:
        """Return what both forms share."""
        return self.conv3(jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x)))))


class Stage(nnx.Module):
    """Blocks of one resolution; H and W are divided by `stride` in the first."""

    def __init__(
        self, in_channels: int, width: int, depth: int, *, inflate: bool, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        # The last norms start at 1 / depth: states grow by a factor of e at most. The published 0 would leave a branch
        # with its ReLU inside dead for good where norms are frozen.
        block = functools.partial(Bottleneck, width=width, inflate=inflate, scale=1 / depth, dtype=dtype, rngs=rngs)
        first = block(in_channels, stride=stride, project=True)
        self.blocks = nnx.List([first, *(block(EXPANSION * width) for _ in range(depth - 1))])

    def __call__(self, x: Float[Array, "B T H W C"], wiring: Wiring) -> Float[Array, "B T h w D"]:
        """Return the stage's output in at least float32."""
        first, *others = self.blocks
        assert first.downsample is not None  # built so
        return wiring(others, wiring.join(first, x, first.downsample(x)))


class Stem(ConvNorm):
    """From pixels to the first stage: convolution over 7 x 7 pixels and some frames, norm, ReLU, pooling."""

    def __init__(self, in_channels: int, channels: int, frames: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(in_channels, channels, (frames, 7, 7), (1, 2, 2), dtype=dtype, rngs=rngs)

    def __call__(self, video: Float[Array, "B F H W C"]) -> Float[Array, "B F h w D"]:
        """Return features in the compute dtype, H and W divided by four, rounded up."""
        return max_pool(jax.nn.relu(super().__call__(video)))


class Pathway(nnx.Module):
    """A stem and stages that double the channels; time keeps its length."""

    def __init__(
        self,
        *,
        depths: Sequence[int],
        base_channels: int,
        stem_frames: int,
        inflate: Sequence[int],
        in_channels: int,
        joined: Sequence[int] = (),
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """Build the parameters.

        Args:
            depths: blocks of every stage.
            base_channels: channels of the stem; stage i gives 4 * base_channels * 2**i.
            stem_frames: frames that the stem's kernel sees.
            inflate: for every stage, 1 if its blocks see three frames, else 0.
            in_channels: of the video.
            joined: channels that another pathway adds to the input of each stage (none, if not given).
            dtype: what is computed in; states are kept in at least float32.
            rngs: random streams for the initial parameters.

        Raises:
            ConfigError: sizes that make no network.
        """
        check_dtype(dtype)
        _check(depths, base_channels, stem_frames, inflate, in_channels)
        self.stem = Stem(in_channels, base_channels, stem_frames, dtype=dtype, rngs=rngs)
        self.in_channels, self.out_channels, stages = in_channels, base_channels, []
        for i, (depth, inflated) in enumerate(zip(depths, inflate, strict=True)):
            width, added = base_channels * 2**i, joined[i] if joined else 0
            stages.append(
                Stage(
                    self.out_channels + added,
                    width,
                    depth,
                    inflate=bool(inflated),
                    stride=2 if i else 1,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            self.out_channels = EXPANSION * width
        self.stages = nnx.List(stages)


class ResNet3D(Pathway):
    """A single pathway as a backbone: every frame of the video is used, and features have its length."""

    def __init__(
        self,
        *,
        depths: tuple[int, ...],
        base_channels: int = 64,
        stem_frames: int = 1,
        inflate: tuple[int, ...] = (0, 0, 1, 1),
        in_channels: int = 3,
        rewired: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build the parameters (float32); see `Pathway`."""
        super().__init__(
            depths=depths,
            base_channels=base_channels,
            stem_frames=stem_frames,
            inflate=inflate,
            in_channels=in_channels,
            dtype=dtype,
            rngs=rngs,
        )
        self.temporal_stride = 1
        self.wiring: Wiring = REWIRED if rewired else PLAIN

    def __call__(
        self, video: Float[Array, "B F H W C"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B F h w D"]:
        """Return features in at least float32; nothing is random, `key` is not used."""
        return self.intermediates(video, key=key)[0]

    def intermediates(
        self, video: Float[Array, "B F H W C"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B F h w D"], dict[str, Float[Array, "B _ _ _ _"]]]:
        """Return the features and, by name, what `stem` and `layer<i>` gave."""
        check_video(video.shape, self.in_channels)
        x = self.stem(video)
        named = {"stem": x}
        for i, stage in enumerate(self.stages):
            x = named[f"layer{i}"] = stage(x, self.wiring)
        return x, named


def check_video(shape: tuple[int, ...], in_channels: int) -> None:
    """Raise DataError for what is no batch of videos."""
    if len(shape) != 5 or shape[-1] != in_channels:
        expected = f"(batch, frames, height, width, {in_channels})"
        raise DataError(f"Video of shape {shape} does not fit the backbone: expected {expected}.")


def _check(
    depths: Sequence[int], base_channels: int, stem_frames: int, inflate: Sequence[int], in_channels: int
) -> None:
    """Raise ConfigError for sizes that make no network."""
    if not depths or min(depths) < 1:
        raise ConfigError(f"depths = {tuple(depths)}: allowed is at least one stage of at least one block each.")
    if len(inflate) != len(depths) or not set(inflate) <= {0, 1}:
        raise ConfigError(
            f"inflate = {tuple(inflate)}: allowed is a 0 or 1 for each of the {len(depths)} stages of depths = "
            f"{tuple(depths)}."
        )
    if base_channels < 1:
        raise ConfigError(f"base_channels = {base_channels}: allowed is 1 or more.")
    if in_channels < 1:
        raise ConfigError(f"in_channels = {in_channels}: allowed is 1 or more, 3 for RGB.")
    if stem_frames < 1 or stem_frames % 2 == 0:
        raise ConfigError(f"A stem over {stem_frames} frames: allowed is an odd number, so that time keeps its length.")


VARIANTS: dict[str, Callable[..., ResNet3D]] = {
    f"slowonly_r{layers}": functools.partial(ResNet3D, depths=depths) for layers, depths in DEPTHS.items()
}
