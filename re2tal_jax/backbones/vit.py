"""The vision transformer of VideoMAE (arXiv 2203.12602, V2 2303.16727), ordinary and rewired from the same parameters.

All blocks work on one set of tokens, so the whole network is one chain of 2 * depth branches, attention and MLP in
turn; `self.wiring` runs it. A video is longer than what these networks were trained on: it is cut into clips of
`num_frames`, and tokens attend to those of their own clip (as in OpenTAD's AdaTAD recipes, arXiv 2311.17241).
Arithmetic is that of the published encoder, so that its weights give its outputs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from re2tal_jax.backbones.layers import DropPath, LayerNorm, PatchProjection, check_dtype
from re2tal_jax.backbones.positions import resize_positions, sinusoidal_positions
from re2tal_jax.backbones.vit_block import AttentionBranch, Block, MlpBranch
from re2tal_jax.chunks import count_chunks
from re2tal_jax.errors import ConfigError, DataError, did_you_mean
from re2tal_jax.exact import at_least_float32
from re2tal_jax.frames import Video, in_stretches
from re2tal_jax.reversible import PLAIN, REWIRED, Wiring
from re2tal_jax.stored import last_blocks

FinalNorm = Literal["none", "tokens", "pooled"]


class VisionTransformer(nnx.Module):
    """VideoMAE's encoder: patches to tokens, a fixed table of positions added, pre-norm transformer blocks.

    Features have `embed_dim` channels, T = F / `tubelet_size`, and H and W divided by the patch; rows and columns
    beyond the last whole patch are not seen, as in the reference. F is a multiple of `num_frames`. States of the chain
    are (B, clips, N, D): what is random for a sample, such as drop path, is so for a video, not for each of its clips.
    """

    def __init__(
        self,
        *,
        patch_size: int = 16,
        tubelet_size: int = 2,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_epsilon: float = 1e-6,
        num_frames: int = 16,
        image_size: int = 224,
        final_norm: FinalNorm = "none",
        drop_path_rate: float = 0.0,
        in_channels: int = 3,
        workspace: int = 2**24,
        stored_blocks: int = 0,
        rewired: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build the parameters (float32); `dtype` is what branches compute in.

        Args:
            patch_size: height and width of a patch, in pixels.
            tubelet_size: frames of a patch.
            embed_dim: channels of a token.
            depth: blocks.
            num_heads: heads of attention, which share the channels.
            mlp_ratio: hidden channels of the MLP for each channel of a token.
            qkv_bias: learn a bias of queries and values; keys have none, it would not change the attention.
            norm_epsilon: of every layer norm; Hugging Face's configs of VideoMAE have 1e-12.
            num_frames: frames of a clip; with `image_size` also what the table of positions is made for. Other heights
                and widths are reached by bicubic interpolation.
            image_size: height and width in pixels.
            final_norm: none (localization uses the last block's tokens as they are), of the tokens (encoders before
                fine-tuning) or of their mean, which `pooled` returns (classifiers).
            drop_path_rate: that of the last block; it grows from 0 linearly with depth.
            in_channels: 3 for RGB.
            workspace: bounds the elements that a branch works on at once, for each sample: a reversible chain runs on
                tiles of clips and tokens. Smaller tiles take less memory; where they are too small, an accelerator is
                not filled.
            stored_blocks: the last so many blocks of a reversible network are not recomputed: less time, more memory.
            rewired: the reversible network, or the ordinary one.
            dtype: what branches compute in.
            rngs: random streams for the initial parameters.

        Raises:
            ConfigError: sizes that make no network.
        """
        check_dtype(dtype)
        _check_sizes(patch_size, tubelet_size, num_frames, image_size, in_channels)
        _check_blocks(embed_dim, depth, num_heads, mlp_ratio, norm_epsilon, drop_path_rate, final_norm)
        self.depth, self.drop_path_rate, self.in_channels = depth, drop_path_rate, in_channels
        self.num_frames, self.final_norm, self.workspace = num_frames, final_norm, workspace
        self.stored_blocks = last_blocks(stored_blocks, (depth,))
        self.grid = (num_frames // tubelet_size, image_size // patch_size, image_size // patch_size)
        self.out_channels, self.temporal_stride = embed_dim, tubelet_size
        self.wiring: Wiring = REWIRED if rewired else PLAIN
        self.patch_embed = PatchEmbed(tubelet_size, patch_size, in_channels, embed_dim, dtype=dtype, rngs=rngs)
        # A constant is a parameter too (a checkpoint holds it), which recipes freeze and `positions` cuts off.
        self.pos_embed = nnx.Param(jnp.asarray(sinusoidal_positions(math.prod(self.grid), embed_dim)))
        self.blocks = nnx.List(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, norm_epsilon, dtype=dtype, rngs=rngs) for _ in range(depth)
        )
        if final_norm != "none":
            self.norm = LayerNorm(embed_dim, epsilon=norm_epsilon, dtype=at_least_float32(dtype), rngs=rngs)

    def __call__(self, video: Video, *, key: PRNGKeyArray | None = None) -> Float[Array, "B T h w D"]:
        """Return features in at least float32, the clips' in order of time.

        `key` switches drop path on.

        Raises:
            DataError: a video of another form, of no whole number of clips, or smaller than a patch.
        """
        return self.intermediates(video, key=key)[0]

    def intermediates(
        self, video: Video, *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B T h w D"], dict[str, Float[Array, "B T h w D"]]]:
        """Return the features and, by name, what the parts gave.

        `patch_embed` (tokens with their positions added) and `blocks` (the chain).
        """
        self._check_video(video)
        height, width = self.patch_embed.size(video.shape[2:4])
        tokens = self.patch_embed(video, self.positions(height, width), self.num_frames, self.workspace)
        x = self.wiring(self._branches(), tokens, key=key, aux=None, stored=2 * sum(self.stored_blocks))
        named = {
            name: rearrange(state, "b n (t h w) d -> b (n t) h w d", h=height, w=width)
            for name, state in (("patch_embed", tokens), ("blocks", x))
        }
        features = named["blocks"]
        return (self.norm(features) if self.final_norm == "tokens" else features), named

    def pooled(self, video: Video, *, key: PRNGKeyArray | None = None) -> Float[Array, "B D"]:
        """Return the normalised mean of a video's tokens, what the published classifiers map to classes.

        Raises:
            ConfigError: the network was built without the norm of this mean.
        """
        if self.final_norm != "pooled":
            raise ConfigError(
                f"final_norm = {self.final_norm!r} has no norm of the mean: build the backbone with 'pooled'."
            )
        return self.norm(self(video, key=key).mean((1, 2, 3)))

    def positions(self, height: int, width: int) -> Float[Array, "N D"]:
        """Return what is added to the tokens of a clip of `height` x `width` patches; it is never learned."""
        table = jax.lax.stop_gradient(self.pos_embed[...])
        if (height, width) == self.grid[1:]:
            return table
        return resize_positions(table.reshape(*self.grid, -1), (height, width)).reshape(-1, table.shape[-1])

    def drop_path_rates(self) -> list[float]:
        """Return the rate of every block; both of its branches have it, and each a mask of its own."""
        return [self.drop_path_rate * i / max(self.depth - 1, 1) for i in range(self.depth)]

    def _branches(self) -> list[DropPath]:
        return [
            DropPath(branch, jnp.float32(rate))
            for block, rate in zip(self.blocks, self.drop_path_rates(), strict=True)
            for branch in (AttentionBranch(block.attn, self.workspace), MlpBranch(block.mlp, self.workspace))
        ]

    def _check_video(self, video: Video) -> None:
        if video.ndim != 5 or video.shape[-1] != self.in_channels:
            expected = f"(batch, frames, height, width, {self.in_channels})"
            raise DataError(f"Video of shape {video.shape} does not fit the backbone: expected {expected}.")
        frames, height, width = video.shape[1:4]
        if not frames or frames % self.num_frames:
            below = frames // self.num_frames * self.num_frames
            allowed = [str(n) for n in (below, below + self.num_frames) if n]
            raise DataError(
                f"A video of {frames} frames is no whole number of clips: the backbone takes multiples of "
                f"num_frames = {self.num_frames}, the nearest are {' and '.join(allowed)}. Cut or pad the video, or "
                "build the backbone with another num_frames."
            )
        patch = self.patch_embed.proj.patch_size[1]
        if min(height, width) < patch:
            raise DataError(
                f"A video of {height} x {width} pixels is smaller than a patch: at least {patch} x {patch} are needed."
            )


class PatchEmbed(nnx.Module):
    """Cut clips into patches, map each to a token and add its position."""

    def __init__(
        self, tubelet_size: int, patch_size: int, in_channels: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.proj = PatchProjection((tubelet_size, patch_size, patch_size), in_channels, dim, dtype=dtype, rngs=rngs)

    def size(self, pixels: Sequence[int]) -> tuple[int, int]:
        """Return how many whole patches a height and a width have."""
        height, width = (n // p for n, p in zip(pixels, self.proj.patch_size[1:], strict=True))
        return height, width

    def __call__(
        self, video: Video, positions: Float[Array, "N D"], num_frames: int, workspace: int
    ) -> Float[Array, "B clips N D"]:
        """Return the tokens of clips of `num_frames`, in at least float32: they start the states of the chain."""
        clips = video.shape[1] // num_frames
        per_clip = 2 * (positions.size + num_frames * math.prod(video.shape[2:]))
        return in_stretches(_embed, count_chunks(clips, per_clip, workspace), (self, positions), video)


def _embed(
    params: tuple[PatchEmbed, Float[Array, "N D"]], video: Float[Array, "B F H W C"]
) -> Float[Array, "B clips N D"]:
    embed, positions = params
    (height, width), (_, rows, columns) = embed.size(video.shape[2:4]), embed.proj.patch_size
    tokens = embed.proj(video[:, :, : height * rows, : width * columns])
    precise = at_least_float32(tokens.dtype)
    times = positions.shape[0] // (height * width)
    tokens = rearrange(tokens, "b (n t) h w d -> b n (t h w) d", t=times).astype(precise)
    return tokens + positions.astype(precise)


def _check_sizes(patch_size: int, tubelet_size: int, num_frames: int, image_size: int, in_channels: int) -> None:
    """Raise ConfigError for sizes of a video and its patches that make no tokens."""
    for name, value in (("patch_size", patch_size), ("tubelet_size", tubelet_size), ("in_channels", in_channels)):
        if value < 1:
            raise ConfigError(f"{name} = {value}: allowed is 1 or more.")
    if num_frames < 1 or num_frames % tubelet_size:
        raise ConfigError(
            f"num_frames = {num_frames}: allowed are multiples of tubelet_size = {tubelet_size}, the frames of a patch."
        )
    if image_size < patch_size:
        raise ConfigError(f"image_size = {image_size}: allowed is at least one patch, patch_size = {patch_size}.")


def _check_blocks(
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    norm_epsilon: float,
    drop_path_rate: float,
    final_norm: str,
) -> None:
    """Raise ConfigError for blocks that cannot be built."""
    if depth < 1:
        raise ConfigError(f"depth = {depth}: allowed is at least one block.")
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise ConfigError(f"embed_dim = {embed_dim} and num_heads = {num_heads}: the heads must divide the channels.")
    if not 0 < mlp_ratio < math.inf or int(embed_dim * mlp_ratio) < 1:
        raise ConfigError(f"mlp_ratio = {mlp_ratio} makes no hidden channels of embed_dim = {embed_dim}.")
    if not 0 < norm_epsilon < math.inf:
        raise ConfigError(f"norm_epsilon = {norm_epsilon}: allowed is a positive number.")
    if not 0 <= drop_path_rate < 1:
        raise ConfigError(f"drop_path_rate = {drop_path_rate}: allowed is 0 <= rate < 1.")
    if final_norm not in get_args(FinalNorm):
        raise ConfigError(f"final_norm = {final_norm!r}. {did_you_mean(str(final_norm), get_args(FinalNorm))}")


VARIANTS: dict[str, Callable[..., VisionTransformer]] = {
    "vit_small": functools.partial(VisionTransformer, embed_dim=384, depth=12, num_heads=6),
    "vit_base": functools.partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12),
    "vit_large": functools.partial(VisionTransformer, embed_dim=1024, depth=24, num_heads=16),
    "vit_huge": functools.partial(VisionTransformer, embed_dim=1280, depth=32, num_heads=16),
    "vit_giant": functools.partial(
        VisionTransformer, patch_size=14, embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11
    ),
}
