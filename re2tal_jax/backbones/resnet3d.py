"""ResNet-3D: the pathway that SlowFast has two of, and alone as its slow pathway ("SlowOnly", arXiv 1812.03982).

A stage is one block that changes the resolution, then a chain of alike bottlenecks. In the ordinary network a ReLU
follows each sum; rewired it is the last thing inside the branch (OpenTAD's `re2tal_slowfast.py`), so that the sum can
be undone. Kernels, strides and padding are those of mmaction2 1.2.0 (style "pytorch", inflation 3x1x1). All of it runs
on stretches of time: a chain tile by tile, stems and first blocks chunk by chunk, which are computed again in the
backward pass, so that nothing but two states of every stage is kept; and of stages that see single frames, none.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from re2tal_jax.backbones.convolutions import UNIT, ConvNorm, max_pool
from re2tal_jax.backbones.layers import check_dtype
from re2tal_jax.backbones.tiles import FrameTiles, plan_frames
from re2tal_jax.chunks import count_chunks, in_chunks, in_overlapping_chunks
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.exact import at_least_float32
from re2tal_jax.frames import Video, in_stretches
from re2tal_jax.reversible import PLAIN, REWIRED, Wiring
from re2tal_jax.stored import last_blocks

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4  # channels of a block's output for each of its inner ones
WORKSPACE = 2**24  # elements
# Workspaces that the blocks of stages that see single frames may take together. Autodiff keeps about half of what is
# counted, in the compute dtype; with one workspace a stretch of SlowFast-101 would be one frame.
TOGETHER = 8

# What a stage hands on: the last two states of its chain, of which the mean is meant, or a single array.
Features = tuple[Float[Array, "B T H W C"], ...]


def merge(wiring: Wiring, features: Features) -> Float[Array, "B T H W C"]:
    """Return features as one array."""
    return features[0] if len(features) == 1 else wiring.mean(*features)


class Bottleneck(nnx.Module):
    """A branch: 1x1 (3x1x1 if inflated), 3x3 and 1x1 convolution, each with its norm, and ReLUs.

    `downsample` projects the shortcut of a stage's first block and is None in the others. Tiles are stretches of
    frames; an inflated block is given the frame before and the one after.
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
        workspace: int = WORKSPACE,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """Build the parameters; `scale` is where that of the last norm starts, `workspace` bounds its tiles."""
        self.width, self.stride, self.workspace, self.halo = width, stride, workspace, int(inflate)
        channels, spatial = EXPANSION * width, (1, stride, stride)
        self.conv1 = ConvNorm(in_channels, width, (3 if inflate else 1, 1, 1), dtype=dtype, rngs=rngs)
        self.conv2 = ConvNorm(width, width, (1, 3, 3), spatial, dtype=dtype, rngs=rngs)
        self.conv3 = ConvNorm(width, channels, UNIT, scale=scale, dtype=dtype, rngs=rngs)
        precise = at_least_float32(dtype)  # what the projection returns starts the states of a chain
        projection = functools.partial(ConvNorm, in_channels, channels, UNIT, spatial, dtype=dtype, out_dtype=precise)
        self.downsample = projection(rngs=rngs) if project else None

    def tiles(self, shape: tuple[int, ...]) -> FrameTiles:
        """Return the tiles of a state (B, T, H, W, C)."""
        return plan_frames(shape[1], self.count_elements(shape), self.workspace, self.halo)

    def count_elements(self, shape: Sequence[int]) -> int:
        """Return how many elements the block works on for each frame of an input (B, T, H, W, C)."""
        _, _, height, width, channels = shape
        shrunk = -(-height // self.stride) * -(-width // self.stride)
        return 2 * (height * width * (channels + self.width) + shrunk * (1 + EXPANSION) * self.width)

    def __call__(
        self,
        x: Float[Array, "B T2 H W C"],
        *,
        key: PRNGKeyArray | None = None,
        aux: Any = None,
        tile: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "B T h w D"]:
        """Return the residual function of the rewired network, ReLU included, in the compute dtype.

        With `tile`, x has the frames around the result that the block sees.
        """
        return jax.nn.relu(self.residual(x, pad_time=tile is None))

    def ordinary(
        self,
        x: Float[Array, "B T2 H W C"],
        shortcut: Float[Array, "B T h w D"],
        *,
        key: Any = None,
        aux: Any = None,
        tile: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "B T h w D"]:
        """Return the block of the ordinary network, its ReLU after the sum."""
        return jax.nn.relu(shortcut + self.residual(x, pad_time=tile is None).astype(shortcut.dtype))

    def residual(self, x: Float[Array, "B T2 H W C"], *, pad_time: bool = True) -> Float[Array, "B T h w D"]:
        """Return what both forms share."""
        return self.conv3(jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x, pad_time=pad_time)))))

    def start(self, wiring: Wiring, x: Float[Array, "B T2 H W C"]) -> Float[Array, "B T h w D"]:
        """Return what the chain of a stage starts from, in at least float32, of its first block.

        x has the frames around the result that the block sees.
        """
        assert self.downsample is not None  # built so
        middle = x[:, self.halo : x.shape[1] - self.halo]
        return wiring.join(self, x, self.downsample(middle), tile=0)


class Stage(nnx.Module):
    """Blocks of one resolution; H and W are divided by `stride` in the first."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        depth: int,
        *,
        inflate: bool,
        stride: int,
        workspace: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        # The last norms start at 1 / depth: states grow by a factor of e at most. The published 0 would leave a branch
        # with its ReLU inside dead for good where norms are frozen.
        block = functools.partial(
            Bottleneck, width=width, inflate=inflate, scale=1 / depth, workspace=workspace, dtype=dtype, rngs=rngs
        )
        first = block(in_channels, stride=stride, project=True)
        self.blocks = nnx.List([first, *(block(EXPANSION * width) for _ in range(depth - 1))])

    def start(
        self, wiring: Wiring, features: Features, joined: Float[Array, "B T H W D"] | None = None
    ) -> Float[Array, "B T h w E"]:
        """Return what the chain starts from; `joined` are further channels of the input."""
        first, shape = self.blocks[0], list(features[0].shape)
        arrays = features if joined is None else (*features, joined)
        shape[-1] += 0 if joined is None else joined.shape[-1]
        return in_overlapping_chunks(
            functools.partial(_start, ordinary=wiring.is_plain, joined=joined is not None),
            count_chunks(shape[1], first.count_elements(shape), first.workspace),
            (first.halo,) * len(arrays),
            (first, wiring.twin),
            *arrays,
        )

    def run(self, wiring: Wiring, x: Float[Array, "B T H W C"], stored: int) -> Features:
        """Return what the chain that starts from x hands on, in at least float32; the last `stored` blocks store."""
        states = wiring.states(list(self.blocks)[1:], x, stored=stored)
        return states[:1] if wiring.is_plain else states

    def of_frames(self, twin: Wiring, x: Float[Array, "B T H W C"]) -> Float[Array, "B T h w D"]:
        """Return the output of a rewired stage whose blocks see single frames."""
        return twin(list(self.blocks)[1:], self.blocks[0].start(REWIRED, x))

    def count_elements(self, height: int, width: int, channels: int) -> int:
        """Return how many elements all blocks work on for a frame of the input."""
        first, *others = self.blocks
        size = -(-height // first.stride), -(-width // first.stride)
        total = first.count_elements((1, 1, height, width, channels))
        return total + sum(block.count_elements((1, 1, *size, EXPANSION * block.width)) for block in others)


def _start(
    params: tuple[Bottleneck, Wiring], *arrays: Float[Array, "B T H W _"], ordinary: bool, joined: bool
) -> Float[Array, "B T2 h w D"]:
    block, wiring = params
    features, more = (arrays[:-1], arrays[-1:]) if joined else (arrays, ())
    x = concatenate(merge(wiring, features), *more)
    return block.start(PLAIN if ordinary else REWIRED, x)  # coefficients are traced: PLAIN is not known of `wiring`


def concatenate(x: Float[Array, "B T H W C"], *joined: Float[Array, "B T H W D"]) -> Float[Array, "B T H W E"]:
    """Return x with the channels of others, in their dtype."""
    return jnp.concatenate([x.astype(joined[0].dtype), *joined], axis=-1) if joined else x


class Stem(ConvNorm):
    """From pixels to the first stage: convolution over 7 x 7 pixels and some frames, norm, ReLU, pooling."""

    def __init__(self, in_channels: int, channels: int, frames: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(in_channels, channels, (frames, 7, 7), (1, 2, 2), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B F H W C"], *, pad_time: bool = True) -> Float[Array, "B T h w D"]:
        """Return features in the compute dtype, H and W divided by four, rounded up."""
        return max_pool(jax.nn.relu(super().__call__(x, pad_time=pad_time)))

    def of_video(self, video: Video, workspace: int, stride: int = 1) -> Float[Array, "B T h w D"]:
        """Return the features of every `stride`-th frame, which divides their number."""
        frames, pixels = video.shape[1] // stride, math.prod(video.shape[2:4])
        taps, *_, in_channels, channels = self.conv.kernel.shape
        per_frame = 2 * pixels * ((stride + taps) * in_channels + channels // 2)  # a quarter, and pooled
        count = count_chunks(frames, per_frame, workspace)
        return in_stretches(_embed, count, self, video, halo=self.conv.halo, stride=stride)


def _embed(stem: Stem, video: Float[Array, "B F H W C"]) -> Float[Array, "B T h w D"]:
    return stem(video, pad_time=False)


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
        workspace: int = WORKSPACE,
        stored_blocks: int = 0,
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
            workspace: bounds the elements that a part works on at once, for each sample: it runs on stretches of
                frames. Smaller ones take less memory; where they are too small, an accelerator is not filled.
            stored_blocks: the last so many blocks of a reversible network are not recomputed: less time, more memory.
                Those that are in no chain do not count, the first of each stage and stages that see single frames.
            dtype: what is computed in; states are kept in at least float32.
            rngs: random streams for the initial parameters.

        Raises:
            ConfigError: sizes that make no network.
        """
        check_dtype(dtype)
        _check(depths, base_channels, stem_frames, inflate, in_channels)
        self.stem = Stem(in_channels, base_channels, stem_frames, dtype=dtype, rngs=rngs)
        self.in_channels, self.out_channels, self.workspace, stages = in_channels, base_channels, workspace, []
        self.single_frame_stages = next((i for i, inflated in enumerate(inflate) if inflated), len(inflate))
        chains = [depth - 1 if i >= self.single_frame_stages else 0 for i, depth in enumerate(depths)]
        self.stored_blocks = last_blocks(stored_blocks, chains)
        for i, (depth, inflated) in enumerate(zip(depths, inflate, strict=True)):
            width, added = base_channels * 2**i, joined[i] if joined else 0
            stages.append(
                Stage(
                    self.out_channels + added,
                    width,
                    depth,
                    inflate=bool(inflated),
                    stride=2 if i else 1,
                    workspace=workspace,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            self.out_channels = EXPANSION * width
        self.stages = nnx.List(stages)

    def run(
        self, wiring: Wiring, x: Float[Array, "B T H W C"], joined: Sequence[Float[Array, "B T _ _ _"]] = ()
    ) -> list[Features]:
        """Return what every stage hands on, of the stem's features and what is `joined` to the input of each stage.

        A stretch of time goes through the first stages that see single frames by itself, so a rewired network has no
        states to undo there: it runs them all on a stretch, and in the backward pass again, with what autodiff keeps of
        that stretch. Every block is computed twice, as when it is undone, and the largest states are never there.
        """
        alone = self.single_frame_stages if wiring.reversible else 0
        results = [(self._run_frames(wiring, x, joined, stages),) for stages in range(1, alone + 1)]  # the last is used
        for i in range(alone, len(self.stages)):
            more = joined[i] if joined else None
            stage, features = self.stages[i], results[-1] if results else (x,)
            results.append(stage.run(wiring, stage.start(wiring, features, more), self.stored_blocks[i]))
        return results

    def _run_frames(
        self, wiring: Wiring, x: Float[Array, "B T H W C"], joined: Sequence[Float[Array, "B T _ _ _"]], stages: int
    ) -> Float[Array, "B T h w D"]:
        """Return the output of the last of the first `stages` stages, which see single frames."""
        (_, frames, height, width, channels), total = x.shape, 0
        run, added = list(self.stages)[:stages], [more.shape[-1] for more in joined] or [0] * stages
        for stage, more in zip(run, added[:stages], strict=True):
            total += stage.count_elements(height, width, channels + more)
            height, width = (-(-n // stage.blocks[0].stride) for n in (height, width))
            channels = EXPANSION * stage.blocks[0].width
        count = count_chunks(frames, total, TOGETHER * self.workspace)
        return in_chunks(_of_frames, count, (run, wiring.twin), x, *joined[:stages])


def _of_frames(
    params: tuple[list[Stage], Wiring], x: Float[Array, "B T H W C"], *joined: Float[Array, "B T _ _ _"]
) -> Float[Array, "B T h w D"]:
    stages, twin = params
    for i, stage in enumerate(stages):
        x = stage.of_frames(twin, concatenate(x, *joined[i : i + 1]))
    return x


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
        workspace: int = WORKSPACE,
        stored_blocks: int = 0,
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
            workspace=workspace,
            stored_blocks=stored_blocks,
            dtype=dtype,
            rngs=rngs,
        )
        self.temporal_stride = 1
        self.wiring: Wiring = REWIRED if rewired else PLAIN

    def __call__(self, video: Video, *, key: PRNGKeyArray | None = None) -> Float[Array, "B F h w D"]:
        """Return features in at least float32; nothing is random, `key` is not used."""
        return self.intermediates(video, key=key)[0]

    def intermediates(
        self, video: Video, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B F h w D"], dict[str, Float[Array, "B _ _ _ _"]]]:
        """Return the features and, by name, what `stem` and `layer<i>` gave."""
        check_video(video.shape, self.in_channels)
        x = self.stem.of_video(video, self.workspace)
        named = {"stem": x}
        for i, features in enumerate(self.run(self.wiring, x)):
            x = named[f"layer{i}"] = merge(self.wiring, features)
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
