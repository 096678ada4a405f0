"""Video Swin Transformer (arXiv 2106.13230), ordinary and rewired from the same parameters.

A stage is a chain of branches: window attention and MLP in turn, windows shifted by half in every other block. How the
branches are wired is not known here: `self.wiring` runs the chain of a stage. Geometry, masks and padding are those of
the published implementation (mmaction2 1.2.0 and OpenTAD's `re2tal_swin.py`), so that its weights give its outputs.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from re2tal_jax.backbones.layers import (
    DropPath,
    LayerNorm,
    Linear,
    PatchProjection,
    check_dtype,
    pad_to_multiple,
)
from re2tal_jax.backbones.swin_block import AttentionBranch, Block, Grid, MlpBranch
from re2tal_jax.backbones.windows import Size, as_size, clamp_window
from re2tal_jax.chunks import count_chunks, in_chunks
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.exact import at_least_float32
from re2tal_jax.frames import Video, in_stretches
from re2tal_jax.reversible import PLAIN, REWIRED, Wiring
from re2tal_jax.stored import last_blocks

States = Float[Array, "B T H W C"]


class VideoSwin(nnx.Module):
    """Video Swin: patches to tokens, stages of windowed transformer blocks, H and W halved between stages.

    Features have `embed_dim * 2**(stages - 1)` channels, T' = ceil(F / patch_t) and H', W' divided by the patch and by
    two for every further stage, rounded up. A window is (time, height, width) in tokens.
    """

    def __init__(
        self,
        *,
        patch_size: Size = (2, 4, 4),
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window_size: Size = (8, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        in_channels: int = 3,
        workspace: int = 2**24,
        stored_blocks: int = 0,
        rewired: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build the parameters (float32); `dtype` is what branches compute in.

        `drop_path_rate` is that of the last block; it grows from 0 linearly with depth. `workspace` bounds the elements
        that a branch works on at once, for each sample: a reversible chain runs on tiles of the grid. Smaller tiles
        take less memory; where they are too small, an accelerator is not filled. The last `stored_blocks` blocks of a
        reversible network are not recomputed: less time for more memory, of which the last blocks take least.

        Raises:
            ConfigError: sizes that make no network.
        """
        check_dtype(dtype)
        if in_channels < 1:
            raise ConfigError(f"in_channels = {in_channels}: allowed is 1 or more, 3 for RGB.")
        _check(patch_size, embed_dim, depths, num_heads, window_size, mlp_ratio, drop_path_rate)
        self.depths, self.drop_path_rate, self.in_channels = tuple(depths), drop_path_rate, in_channels
        self.window_size, self.workspace = as_size(window_size), workspace
        self.stored_blocks = last_blocks(stored_blocks, depths)
        self.out_channels = embed_dim * 2 ** (len(depths) - 1)
        self.temporal_stride = patch_size[0]
        self.wiring: Wiring = REWIRED if rewired else PLAIN
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim, dtype=dtype, rngs=rngs)
        stages = []
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim * 2**i
            blocks = [
                Block(dim, heads, self.window_size, bool(j % 2), mlp_ratio, qkv_bias, dtype=dtype, rngs=rngs)
                for j in range(depth)
            ]
            last = i == len(depths) - 1
            stages.append(Stage(blocks, None if last else PatchMerging(dim, dtype=dtype, rngs=rngs)))
        self.stages = nnx.List(stages)
        self.norm = LayerNorm(self.out_channels, dtype=at_least_float32(dtype), rngs=rngs)

    def __call__(self, video: Video, *, key: PRNGKeyArray | None = None) -> Float[Array, "B T h w D"]:
        """Return features in at least float32; `key` switches drop path on."""
        return self.intermediates(video, key=key)[0]

    def intermediates(
        self, video: Video, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B T h w D"], dict[str, Float[Array, "B _ _ _ _"]]]:
        """Return the features and, by name, what the parts gave.

        `patch_embed`, `layer<i>` (the chain of stage i) and `downsample<i>` (its halved form, what stage i + 1 gets).
        """
        if video.ndim != 5 or video.shape[-1] != self.in_channels:
            expected = f"(batch, frames, height, width, {self.in_channels})"
            raise DataError(f"Video of shape {video.shape} does not fit the backbone: expected {expected}.")
        x = self.patch_embed(video, self.workspace)
        named = {"patch_embed": x}
        for i, (stage, rates) in enumerate(zip(self.stages, self.drop_path_rates(), strict=True)):
            stage_key = None if key is None else jax.random.fold_in(key, i)
            states, x = self._run(stage, rates, x, stage_key, self.stored_blocks[i])
            named[f"layer{i}"] = x
            if stage.downsample is not None:
                x = named[f"downsample{i}"] = stage.downsample.of_states(self.wiring, *states, self.workspace)
        return self.norm(x), named

    def _run(
        self, stage: "Stage", rates: np.ndarray, x: Float[Array, "B T H W C"], key: PRNGKeyArray | None, stored: int
    ) -> tuple[tuple[States, States], States]:
        """Return the last two states of a stage, and what it hands on.

        The states are padded to whole windows; what is padded stays 0 and is cut off at the end.
        """
        size = as_size(x.shape[1:4])
        window, _ = clamp_window(size, self.window_size, shifted=False)
        x = pad_to_multiple(x, window)
        grid = Grid(size, as_size(x.shape[1:4]), self.workspace)
        branches = [
            DropPath(branch, jnp.asarray(rate))
            for block, rate in zip(stage.blocks, rates, strict=True)
            for branch in (AttentionBranch(block.attn, grid), MlpBranch(block.mlp, grid))
        ]
        states = self.wiring.states(branches, x, key=key, aux=None, stored=2 * stored)
        last, before = (state[:, : size[0], : size[1], : size[2]] for state in states)
        return (last, before), self.wiring.mean(last, before)

    def drop_path_rates(self) -> list[np.ndarray]:
        """Return the rate of every block by stage, float32: linear from 0 to that of the last block.

        Both branches of a block have its rate, and each a mask of its own.
        """
        rates = np.linspace(0.0, self.drop_path_rate, sum(self.depths), dtype=np.float32)
        return np.split(rates, np.cumsum(self.depths)[:-1])


class Stage(nnx.Module):
    """Blocks of one resolution and the step to the next (None after the last)."""

    def __init__(self, blocks: Sequence["Block"], downsample: "PatchMerging | None"):
        self.blocks = nnx.List(blocks)
        self.downsample = downsample


class PatchEmbed(nnx.Module):
    """Cut a video into patches (zeros fill the last ones) and map each to a token, normalised."""

    def __init__(self, patch_size: Size, in_channels: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = PatchProjection(patch_size, in_channels, dim, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(dim, dtype=at_least_float32(dtype), rngs=rngs)

    def __call__(self, video: Video, workspace: int) -> Float[Array, "B T h w D"]:
        """Return tokens in at least float32: they start the states of the first stage."""
        patch, dim = self.proj.patch_size, self.norm.scale.shape[0]
        times, rows, columns = (-(-n // p) for n, p in zip(video.shape[1:4], patch, strict=True))
        per_time = 2 * rows * columns * (dim + math.prod(patch) * video.shape[-1])
        count, missing = count_chunks(times, per_time, workspace), times * patch[0] - video.shape[1]
        return in_stretches(_embed, count, self, video, end=missing)


def _embed(embed: PatchEmbed, video: Float[Array, "B F H W C"]) -> Float[Array, "B T h w D"]:
    return embed.norm(embed.proj(pad_to_multiple(video, embed.proj.patch_size)))


class PatchMerging(nnx.Module):
    """Halve H and W (zeros fill odd sizes): concatenate 2 x 2 neighbours, normalise, map 4C to 2C."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * dim, dtype=dtype, rngs=rngs)
        self.reduction = Linear(4 * dim, 2 * dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T h w D"]:
        """Return (B, T, ceil(H / 2), ceil(W / 2), 2C) in the dtype of x."""
        y = pad_to_multiple(x, (1, 2, 2))
        y = rearrange(y, "b t (h y) (w x) c -> b t h w (x y c)", y=2, x=2)  # (0,0) (1,0) (0,1) (1,1): row index first
        return self.reduction(self.norm(y)).astype(x.dtype)

    def of_states(self, wiring: Wiring, last: States, before: States, workspace: int) -> Float[Array, "B T h w D"]:
        """Return it of the `mean` of a chain's last two states, which is never there as a whole."""
        times, per_time = last.shape[1], 4 * math.prod(last.shape[2:])
        return in_chunks(_merge, count_chunks(times, per_time, workspace), (self, wiring), last, before)


def _merge(params: tuple[PatchMerging, Wiring], last: States, before: States) -> Float[Array, "B T h w D"]:
    merging, wiring = params
    return merging(wiring.mean(last, before))


def _check(
    patch_size: Size,
    embed_dim: int,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    window_size: Size,
    mlp_ratio: float,
    drop_path_rate: float,
) -> None:
    """Raise ConfigError for sizes that make no network."""
    if not depths or min(depths) < 1:
        raise ConfigError(f"depths = {tuple(depths)}: allowed is at least one stage of at least one block each.")
    if len(num_heads) != len(depths):
        raise ConfigError(
            f"num_heads = {tuple(num_heads)} has {len(num_heads)} stages, depths = {tuple(depths)} has {len(depths)}: "
            "give one number of heads per stage."
        )
    for name, size in (("patch_size", patch_size), ("window_size", window_size)):
        if len(size) != 3 or min(size) < 1:
            raise ConfigError(f"{name} = {tuple(size)}: allowed are three positive integers (time, height, width).")
    for stage, heads in enumerate(num_heads):
        dim = embed_dim * 2**stage
        if heads < 1 or dim < 1 or dim % heads:
            raise ConfigError(
                f"Stage {stage} has {dim} channels (embed_dim = {embed_dim}) and num_heads = {heads}: "
                "the heads must divide the channels."
            )
    if not 0 < mlp_ratio < math.inf or int(embed_dim * mlp_ratio) < 1:
        raise ConfigError(f"mlp_ratio = {mlp_ratio} makes no hidden channels of embed_dim = {embed_dim}.")
    if not 0 <= drop_path_rate < 1:
        raise ConfigError(f"drop_path_rate = {drop_path_rate}: allowed is 0 <= rate < 1.")


_swin = functools.partial(VideoSwin, depths=(2, 2, 18, 2))
VARIANTS: dict[str, Callable[..., VideoSwin]] = {
    "video_swin_tiny": functools.partial(VideoSwin, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "video_swin_small": functools.partial(_swin, embed_dim=96, num_heads=(3, 6, 12, 24)),
    "video_swin_base": functools.partial(_swin, embed_dim=128, num_heads=(4, 8, 16, 32)),
    "video_swin_large": functools.partial(_swin, embed_dim=192, num_heads=(6, 12, 24, 48)),
}
