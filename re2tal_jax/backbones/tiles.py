"""Tiles of a state (B, T, H, …): stretches of time and of rows that a branch maps independently (see `tiling.py`).

A tile holds all samples of a batch, so that a batch that is split over devices stays where it is, and all that comes
after the rows. Positions are circular: `shift` moves the tiles against the state, and nothing is rolled.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from re2tal_jax.chunks import add_stretch, count_chunks, read_stretch

Piece = tuple[Int[Array, ""] | int, int, int]  # where it begins in the state, where in the tile, and its length


@dataclass(frozen=True)
class GridTiles:
    """Tiles of `tile_size` positions along the axes 1 and 2 of a state that has `size` of them, moved by `shift`."""

    size: tuple[int, int]
    tile_size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    @property
    def count(self) -> int:
        """Number of tiles."""
        return math.prod(n // m for n, m in zip(self.size, self.tile_size, strict=True))

    def start(self, tile: Int[Array, ""] | int) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
        """Return where a tile begins, in positions that count from `shift`."""
        columns = self.size[1] // self.tile_size[1]
        return tile // columns * self.tile_size[0], tile % columns * self.tile_size[1]

    def read(self, state: Float[Array, "B T H *rest"], tile: Int[Array, ""] | int) -> Float[Array, "B t h *rest"]:
        """Return a tile."""
        state, rows = _row_major(state), []
        for top, _, height in self._pieces(tile, 0):
            row = []
            for left, _, width in self._pieces(tile, 1):
                sizes = (state.shape[0], height, width, *state.shape[3:])
                row.append(lax.dynamic_slice(state, _begin(state, top, left), sizes))
            rows.append(row[0] if len(row) == 1 else jnp.concatenate(row, axis=2))
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)

    def write(
        self, state: Float[Array, "B T H *rest"], value: Float[Array, "B t h *rest"], tile: Int[Array, ""] | int
    ) -> Float[Array, "B T H *rest"]:
        """Return the state with a tile replaced."""
        for top, row, height in self._pieces(tile, 0):
            for left, column, width in self._pieces(tile, 1):
                part = value[:, row : row + height, column : column + width]
                state = lax.dynamic_update_slice(state, part, _begin(state, top, left))
        return _row_major(state)

    def _pieces(self, tile: Int[Array, ""] | int, axis: int) -> Iterator[Piece]:
        """Yield the pieces of a tile along an axis: a shifted one may go over the end and on at the beginning.

        As tiles are longer than the shift, every tile can be cut at the same place.
        """
        begin, length, shift = self.start(tile)[axis], self.tile_size[axis], self.shift[axis]
        yield begin + shift, 0, length - shift
        if shift:
            yield (begin + length) % self.size[axis], length - shift, shift


def _row_major(state: Array) -> Array:
    """Hold a state in the order of its axes.

    A TPU's compiler else lets each branch have its states as it likes its tiles, and copies them whole between an
    attention and an MLP.
    """
    return with_layout_constraint(state, Layout(major_to_minor=tuple(range(state.ndim))))


def _begin(state: Array, top: Int[Array, ""] | int, left: Int[Array, ""] | int) -> list[Int[Array, ""]]:
    """Return where a slice begins, as integers of one type whatever jax takes for constants."""
    return [jnp.asarray(begin, jnp.int32) for begin in (0, top, left, *(0,) * (state.ndim - 3))]


def plan_tiles(
    size: tuple[int, int], unit: tuple[int, int], per_position: int, workspace: int, shift: tuple[int, int] = (0, 0)
) -> GridTiles:
    """Return the largest tiles whose workspace is within bounds, at least one unit.

    Args:
        size: positions of the state along its axes 1 and 2.
        unit: tiles are made of whole units (a window, say), which divide the size.
        per_position: elements that the branch needs for a position of a sample while it runs.
        workspace: elements that it may have for a sample.
        shift: see `GridTiles`.
    """
    allowed = max(workspace // per_position, 1)
    rows = _largest_divisor(size[0] // unit[0], allowed // (unit[0] * size[1]))
    if rows:
        return GridTiles(size, (unit[0] * rows, size[1]), shift)
    columns = _largest_divisor(size[1] // unit[1], allowed // (unit[0] * unit[1])) or 1
    return GridTiles(size, (unit[0], unit[1] * columns), shift)


@dataclass(frozen=True)
class FrameTiles:
    """Tiles of `length` frames of a state that has `frames`.

    A branch is given `halo` frames more at both ends, zeros outside the video, and returns the tile without them.
    """

    frames: int
    length: int
    halo: int = 0

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.frames // self.length

    def read(self, state: Float[Array, "B T *rest"], tile: Int[Array, ""] | int) -> Float[Array, "B t *rest"]:
        """Return a tile."""
        return read_stretch(state, tile * self.length, self.length)

    def write(
        self, state: Float[Array, "B T *rest"], value: Float[Array, "B t *rest"], tile: Int[Array, ""] | int
    ) -> Float[Array, "B T *rest"]:
        """Return the state with a tile replaced."""
        return lax.dynamic_update_slice_in_dim(state, value, tile * self.length, axis=1)

    def read_input(self, state: Float[Array, "B T *rest"], tile: Int[Array, ""] | int) -> Float[Array, "B s *rest"]:
        """Return a tile and the frames around it."""
        return read_stretch(state, tile * self.length, self.length, self.halo)

    def add_input(
        self, state: Float[Array, "B T *rest"], value: Float[Array, "B s *rest"], tile: Int[Array, ""] | int
    ) -> Float[Array, "B T *rest"]:
        """Return the state with a value for a tile and the frames around it added; what is outside is lost."""
        return add_stretch(state, value, tile * self.length, self.halo)

    def middle(self, given: Float[Array, "B s *rest"]) -> Float[Array, "B t *rest"]:
        """Return a tile without the frames around it."""
        return given[:, self.halo : self.halo + self.length]


def plan_frames(frames: int, per_frame: int, workspace: int, halo: int) -> FrameTiles:
    """Return the longest tiles whose workspace is within bounds, at least one frame; arguments as of `plan_tiles`."""
    return FrameTiles(frames, frames // count_chunks(frames, per_frame, workspace), halo)


def _largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most `most`, 0 if there is none."""
    return max((n for n in range(1, number + 1) if number % n == 0 and n <= most), default=0)
