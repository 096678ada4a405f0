"""The two branches of a Video Swin block, run on tiles of the grid of tokens: window attention and MLP.

Modules hold parameters; a branch of a chain is a module with the grid it runs on (`AttentionBranch`, `MlpBranch`). Its
state is padded to whole windows, and the padding stays 0: a branch returns 0 there.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from re2tal_jax.backbones.attention import attend, split_heads
from re2tal_jax.backbones.layers import LayerNorm, Linear, Mlp
from re2tal_jax.backbones.tiles import GridTiles, plan_tiles
from re2tal_jax.backbones.windows import (
    Size,
    as_size,
    clamp_window,
    from_windows,
    relative_position_index,
    shift_regions,
    to_windows,
)
from re2tal_jax.kept import keep


class Block(nnx.Module):
    """The two branches of a transformer block; they are residual functions, without the sums around them."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Size,
        shifted: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.attn = WindowAttention(dim, num_heads, window_size, shifted, qkv_bias, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dtype=dtype, rngs=rngs)


class WindowAttention(nnx.Module):
    """Layer norm, then self-attention inside windows, with a learnt bias for each relative position.

    `shifted` moves the windows by half their size, so that neighbours meet in every other block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Size,
        shifted: bool,
        qkv_bias: bool,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.window_size, self.shifted = num_heads, window_size, shifted
        self.norm = LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.qkv = Linear(dim, 3 * dim, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)
        positions = int(np.prod([2 * w - 1 for w in window_size]))
        table = jax.nn.initializers.truncated_normal(0.02)(rngs.params(), (positions, num_heads), jnp.float32)
        self.relative_position_bias = nnx.Param(table)

    def bias(self, tokens: int) -> Float[Array, "h N N"]:
        """Return the bias of every head between the first `tokens` positions of a full window.

        For a window clamped in H or W these are not the geometric neighbours; the pretrained weights were trained and
        are evaluated so.
        """
        index = relative_position_index(self.window_size)[:tokens, :tokens]
        return rearrange(self.relative_position_bias[...][index], "q k h -> h q k")

    def attend(
        self, x: Float[Array, "n N C"], regions: Float[Array, "n N"] | None, bias: Float[Array, "h N N"]
    ) -> Float[Array, "n N C"]:
        """Attend inside each of n windows of N tokens; tokens of different `regions` are kept apart."""
        q, k, v = keep(split_heads(self.qkv(x), "n t (h d) -> n h t d", h=self.num_heads))
        return self.proj(rearrange(attend(q, k, v, bias, regions), "n h t d -> n t (h d)"))


@dataclass(frozen=True)
class Grid:
    """A grid of `size` tokens, (time, height, width), in a state of `padded`; `workspace` bounds what a tile takes."""

    size: Size
    padded: Size
    workspace: int

    def tiles(self, unit: tuple[int, int], per_token: int, shift: Size) -> GridTiles:
        """Return tiles of whole units (time, height), given the elements that a branch needs for a token."""
        return plan_tiles(self.padded[:2], unit, self.padded[2] * per_token, self.workspace, shift[:2])

    def zero_outside(self, x: Float[Array, "B t h W C"], top: Any, left: Any) -> Float[Array, "B t h W C"]:
        """Return a tile that begins at (top, left), counted circularly, with zeros where the state is padded."""
        if self.size == self.padded:
            return x
        begins = (top, left, 0)
        inside = [
            (begin + jnp.arange(length, dtype=jnp.int32)) % padded < size
            for begin, length, padded, size in zip(begins, x.shape[1:4], self.padded, self.size, strict=True)
        ]
        mask = inside[0][:, None, None] & inside[1][:, None] & inside[2]
        return jnp.where(mask[..., None], x, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionBranch:
    """Window attention on a grid.

    Tiles are rows of windows. In time and height a shift is circular indexing of tiles, in width the tile is rolled.
    """

    attention: WindowAttention
    grid: Grid = field(metadata={"static": True})
    bias: Float[Array, "h N N"] | None = None

    def prepare(self) -> "AttentionBranch":
        """Look the bias up once for all tiles."""
        return replace(self, bias=self.attention.bias(int(np.prod(self._windows()[0]))))

    def tiles(self, shape: tuple[int, ...]) -> GridTiles:
        """Return the tiles of a padded state (B, T, H, W, C)."""
        window, shift = self._windows()
        logits = self.attention.num_heads * int(np.prod(window))
        return self.grid.tiles(window[:2], logits + 4 * shape[-1], shift)  # and q, k, v and what comes of them

    def __call__(
        self,
        x: Float[Array, "B T H W C"],
        *,
        key: PRNGKeyArray | None = None,
        aux: Any = None,
        tile: Int[Array, ""] | None = None,
    ) -> Float[Array, "B T H W C"]:
        """Map a tile to its shape in the compute dtype, or without `tile` a whole padded state."""
        tiles = self.tiles(x.shape)
        if tile is not None:
            return self._on_tile(x, *tiles.start(tile))
        whole = replace(tiles, tile_size=tiles.size)
        y = self._on_tile(whole.read(x, 0), 0, 0)
        return whole.write(y, y, 0)

    def _windows(self) -> tuple[Size, Size]:
        """Return the window, clamped to the grid, and how far it is moved."""
        return clamp_window(self.grid.size, self.attention.window_size, self.attention.shifted)

    def _on_tile(self, x: Float[Array, "B t h W C"], top: Any, left: Any) -> Float[Array, "B t h W C"]:
        """Attend in a tile that begins at (top, left) of the shifted grid; its width is not shifted yet."""
        window, shift = self._windows()
        begin = top + shift[0], left + shift[1]
        y = self.grid.zero_outside(self.attention.norm(x), *begin)  # these zeros take part in attention, unmasked
        regions = None
        if any(shift):
            positions = [
                begin + jnp.arange(n, dtype=jnp.int32) for begin, n in zip((top, left, 0), x.shape[1:4], strict=True)
            ]
            regions = jnp.tile(shift_regions(positions, self.grid.padded, window, shift), (x.shape[0], 1))
        if shift[2]:
            y = jnp.roll(y, -shift[2], axis=3)
        bias = self.attention.bias(int(np.prod(window))) if self.bias is None else self.bias
        y = self.attention.attend(to_windows(y, window), regions, bias)
        y = from_windows(y, as_size(x.shape[1:4]), window)
        if shift[2]:
            y = jnp.roll(y, shift[2], axis=3)
        return self.grid.zero_outside(y, *begin)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MlpBranch:
    """An MLP on a grid; tiles are rows of tokens."""

    mlp: Mlp
    grid: Grid = field(metadata={"static": True})

    def tiles(self, shape: tuple[int, ...]) -> GridTiles:
        """Return the tiles of a padded state (B, T, H, W, C)."""
        return self.grid.tiles((1, 1), 2 * (self.mlp.fc1.out_features + shape[-1]), (0, 0, 0))

    def __call__(
        self,
        x: Float[Array, "B T H W C"],
        *,
        key: PRNGKeyArray | None = None,
        aux: Any = None,
        tile: Int[Array, ""] | None = None,
    ) -> Float[Array, "B T H W C"]:
        """Map a tile, or without `tile` a whole padded state, to its shape in the compute dtype."""
        begin = (0, 0) if tile is None else self.tiles(x.shape).start(tile)
        return self.grid.zero_outside(self.mlp(x), *begin)
