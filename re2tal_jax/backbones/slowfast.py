"""SlowFast (arXiv 1812.03982), ordinary and rewired from the same parameters.

A slow pathway sees every fourth frame; a fast one sees every frame with an eighth of the channels and passes its
features on to the slow one before each stage (*laterals*). Both are ResNet-3Ds whose stages are chains of their own.
What lies between the chains, stems, laterals and first blocks, runs in stretches of time, and is computed again in the
backward pass. The fast pathway needs nothing of the slow one and runs first.
Geometry is that of the published implementation (mmaction2 1.2.0 and OpenTAD's `re2tal_slowfast.py`), so that its
weights give its outputs.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from re2tal_jax.backbones.convolutions import BatchNorm, Conv
from re2tal_jax.backbones.resnet3d import (
    DEPTHS,
    EXPANSION,
    WORKSPACE,
    Bottleneck,
    Features,
    Pathway,
    Stage,
    check_video,
    merge,
)
from re2tal_jax.chunks import count_chunks, in_overlapping_chunks
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.frames import Video
from re2tal_jax.reversible import PLAIN, REWIRED, Wiring

Pathways = tuple[Float[Array, "B T h w C"], Float[Array, "B F h w D"]]


class SlowFast(nnx.Module):
    """Two pathways; features are the tuple (slow, fast), `temporal_stride` is a tuple too.

    `out_channels` counts the channels of both: 2048 + 256 in the published networks.
    """

    def __init__(
        self,
        *,
        depths: tuple[int, ...],
        base_channels: int = 64,
        channel_ratio: int = 8,
        resample_rate: int = 4,
        speed_ratio: int = 4,
        fusion_kernel: int = 7,
        lateral_norm: bool = False,
        slow_stem_frames: int = 1,
        fast_stem_frames: int = 5,
        slow_inflate: tuple[int, ...] = (0, 0, 1, 1),
        fast_inflate: tuple[int, ...] = (1, 1, 1, 1),
        in_channels: int = 3,
        workspace: int = WORKSPACE,
        stored_blocks: int = 0,
        rewired: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build the parameters (float32).

        Args:
            depths: blocks of every stage, of both pathways.
            base_channels: channels of the slow stem.
            channel_ratio: the fast pathway has so many times fewer (beta in the paper is its inverse).
            resample_rate: the slow pathway sees every such frame (tau in the paper).
            speed_ratio: the fast pathway has so many times more frames (alpha in the paper).
            fusion_kernel: fast frames that a lateral convolution sees.
            lateral_norm: normalise and rectify after a lateral convolution, as PySlowFast and pytorchvideo do.
            slow_stem_frames: frames that the slow stem sees.
            fast_stem_frames: frames that the fast stem sees.
            slow_inflate: for every stage of the slow pathway, 1 if its blocks see three frames, else 0.
            fast_inflate: the same for the fast pathway.
            in_channels: of the video.
            workspace: bounds the elements that a part works on at once, for each sample: it runs on stretches of
                frames. Smaller ones take less memory; where they are too small, an accelerator is not filled.
            stored_blocks: the last so many blocks of each pathway are not recomputed, see `Pathway`.
            rewired: the reversible network, or the ordinary one.
            dtype: what branches compute in.
            rngs: random streams for the initial parameters.

        Raises:
            ConfigError: sizes that make no network.
        """
        _check(base_channels, channel_ratio, resample_rate, speed_ratio, fusion_kernel)
        fast_channels = base_channels // channel_ratio
        stage_inputs = [fast_channels, *(EXPANSION * fast_channels * 2**i for i in range(len(depths) - 1))]
        self.resample_rate, self.in_channels, self.workspace = resample_rate, in_channels, workspace
        self.temporal_stride = (resample_rate, resample_rate // speed_ratio)
        self.wiring: Wiring = REWIRED if rewired else PLAIN
        pathway = functools.partial(
            Pathway,
            depths=depths,
            in_channels=in_channels,
            workspace=workspace,
            stored_blocks=stored_blocks,
            dtype=dtype,
            rngs=rngs,
        )
        self.slow = pathway(
            base_channels=base_channels,
            stem_frames=slow_stem_frames,
            inflate=slow_inflate,
            joined=[2 * channels for channels in stage_inputs],
        )
        self.fast = pathway(base_channels=fast_channels, stem_frames=fast_stem_frames, inflate=fast_inflate)
        self.laterals = nnx.List(
            Lateral(channels, fusion_kernel, speed_ratio, lateral_norm, dtype=dtype, rngs=rngs)
            for channels in stage_inputs
        )
        self.out_channels = self.slow.out_channels + self.fast.out_channels
        self.stored_blocks = max(self.slow.stored_blocks, self.fast.stored_blocks, key=sum)

    def __call__(self, video: Video, *, key: PRNGKeyArray | None = None) -> Pathways:
        """Return the features of both pathways in at least float32; nothing is random, `key` is not used."""
        return self.intermediates(video, key=key)[0]

    def intermediates(
        self, video: Video, *, key: PRNGKeyArray | None = None
    ) -> tuple[Pathways, dict[str, Float[Array, "B _ _ _ _"]]]:
        """Return the features and, by name, what the parts gave.

        `slow.stem`, `fast.stem`, `slow.layer<i>`, `fast.layer<i>` and `lateral<i>`, what stage i of the slow pathway
        gets beside its own features.
        """
        check_video(video.shape, self.in_channels)
        if video.shape[1] % self.resample_rate:
            raise DataError(
                f"A video of {video.shape[1]} frames does not fit SlowFast: allowed are multiples of resample_rate = "
                f"{self.resample_rate}, with others the two pathways differ in length. Cut or pad the video."
            )
        named, (slow_stride, fast_stride) = {}, self.temporal_stride
        slow = named["slow.stem"] = self.slow.stem.of_video(video, self.workspace, slow_stride)
        fast = named["fast.stem"] = self.fast.stem.of_video(video, self.workspace, fast_stride)
        features, passed = (fast,), []
        for i, (stage, lateral) in enumerate(zip(self.fast.stages, self.laterals, strict=True)):
            named[f"lateral{i}"], start = self._leave(lateral, stage, features)
            passed.append(named[f"lateral{i}"])
            features = stage.run(self.wiring, start, self.fast.stored_blocks[i])
            fast = named[f"fast.layer{i}"] = merge(self.wiring, features)
        for i, features in enumerate(self.slow.run(self.wiring, slow, passed)):
            slow = named[f"slow.layer{i}"] = merge(self.wiring, features)
        return (slow, fast), named

    def _leave(self, lateral: "Lateral", stage: Stage, features: Features) -> Pathways:
        """Return what features of the fast pathway pass on to the slow one, and what the fast chain starts from.

        Both in one go: what comes back from both is added up stretch by stretch.
        """
        block, (_, frames, *size, channels) = stage.blocks[0], features[0].shape
        per_step = lateral.stride * block.count_elements(features[0].shape) + 4 * math.prod(size) * channels
        count = count_chunks(frames // lateral.stride, per_step, self.workspace)
        halo = max(lateral.conv.halo, block.halo)
        function = functools.partial(_leave, ordinary=self.wiring.is_plain, halo=halo)
        params = lateral, block, self.wiring.twin
        return in_overlapping_chunks(function, count, (halo,) * len(features), params, *features)


def _leave(
    params: "tuple[Lateral, Bottleneck, Wiring]", *features: Float[Array, "B F H W C"], ordinary: bool, halo: int
) -> Pathways:
    lateral, block, wiring = params
    x = merge(wiring, features)
    for_lateral, for_block = (x[:, halo - ends : x.shape[1] - halo + ends] for ends in (lateral.conv.halo, block.halo))
    return lateral(for_lateral, pad_time=False), block.start(PLAIN if ordinary else REWIRED, for_block)


class Lateral(nnx.Module):
    """From the fast to the slow pathway: a convolution over time to twice the channels, at the slow pathway's rate."""

    def __init__(self, channels: int, kernel: int, stride: int, norm: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.stride = stride
        self.conv = Conv(channels, 2 * channels, (kernel, 1, 1), (stride, 1, 1), dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(2 * channels, dtype=dtype) if norm else None

    def __call__(self, fast: Float[Array, "B F h w C"], *, pad_time: bool = True) -> Float[Array, "B T h w D"]:
        """Return (B, F / stride, h, w, 2C) in the compute dtype; `pad_time` as for a `Conv`."""
        passed = self.conv(fast, pad_time=pad_time)
        return passed if self.norm is None else jax.nn.relu(self.norm(passed))


def _check(base_channels: int, channel_ratio: int, resample_rate: int, speed_ratio: int, fusion_kernel: int) -> None:
    """Raise ConfigError for ratios that make no network."""
    if channel_ratio < 1 or base_channels < channel_ratio or base_channels % channel_ratio:
        raise ConfigError(
            f"base_channels = {base_channels} and channel_ratio = {channel_ratio}: the ratio must divide the channels."
        )
    if resample_rate < 1 or speed_ratio < 1 or resample_rate % speed_ratio:
        raise ConfigError(
            f"resample_rate = {resample_rate} and speed_ratio = {speed_ratio}: the ratio must divide the rate, so that "
            "the fast pathway sees every (rate / ratio)-th frame."
        )
    if fusion_kernel < 1 or fusion_kernel % 2 == 0:
        raise ConfigError(f"fusion_kernel = {fusion_kernel}: allowed is an odd number, so that both pathways agree.")


VARIANTS: dict[str, Callable[..., SlowFast]] = {
    f"slowfast_r{layers}": functools.partial(SlowFast, depths=depths) for layers, depths in DEPTHS.items()
}
