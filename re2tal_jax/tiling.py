"""How a step of a chain runs tile by tile, in place: what a branch has to offer for it, and the loop.

Backward, one pass over the tiles gives a branch's output and its derivative at once; no temporary is as large as a
state. The loop is outside the function that is differentiated: inside it, each tile's result would be kept.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from re2tal_jax.exact import State


class Tiles(Protocol):
    """How a branch's output splits into `count` parts of one shape that it computes independently of each other.

    A part may need more of the input than its own place (frames before and after it): then `read_input(state, tile)`
    returns what the branch is given, `add_input(state, value, tile)` the state with a value of that form added, and
    `middle(value)` the part's own place in it.
    """

    count: int

    def read(self, state: State, tile: Array) -> State:
        """Return the part numbered `tile`."""
        ...

    def write(self, state: State, value: State, tile: Array) -> State:
        """Return the state with that part replaced."""
        ...


@dataclass(frozen=True)
class Part:
    """A tile of a branch, or the whole state (tiles None): what is read of it and written to it."""

    tiles: Any = None
    number: Any = None

    def read(self, state: State) -> State:
        """Return the part of a state."""
        return state if self.tiles is None else self.tiles.read(state, self.number)

    def write(self, state: State, value: State) -> State:
        """Return the state with the part replaced."""
        return value if self.tiles is None else self.tiles.write(state, value, self.number)

    def given(self, state: State) -> State:
        """Return what the branch is called with."""
        return self.tiles.read_input(state, self.number) if hasattr(self.tiles, "read_input") else self.read(state)

    def add(self, state: State, value: State) -> State:
        """Return the state with a value of that form added in its place."""
        if hasattr(self.tiles, "add_input"):
            return self.tiles.add_input(state, value, self.number)
        return self.write(state, self.read(state) + value)

    def middle(self, given: State) -> State:
        """Return the output's own place in what the branch is given."""
        return self.tiles.middle(given) if hasattr(self.tiles, "middle") else given

    @property
    def named(self) -> dict[str, Array]:
        """What the branch is told of it."""
        return {} if self.tiles is None else {"tile": self.number}


def over_tiles(branch: Any, shape: tuple[int, ...], body: Any, carry: Any, given: Any = None) -> tuple[Any, Any]:
    """Scan: carry, result = body(carry, part, given) for every tile of the branch in turn, or once for the whole.

    Returns:
        The last carry, and the results of all tiles, stacked where there are several; `given` comes in the same form.
    """
    tiles = branch.tiles(shape) if hasattr(branch, "tiles") else None
    if tiles is None or tiles.count == 1:
        return body(carry, Part(), given)
    numbers = jnp.arange(tiles.count, dtype=jnp.int32)
    return lax.scan(lambda carry, item: body(carry, Part(tiles, item[0]), item[1]), carry, (numbers, given))


def prepare(branch: Any) -> Any:
    """Return the branch with what follows from its parameters alone."""
    return branch.prepare() if hasattr(branch, "prepare") else branch


def prepare_back(branch: Any) -> tuple[Any, Any]:
    """Return the prepared branch, and what makes cotangents of the branch from its."""
    if not hasattr(branch, "prepare"):
        return branch, lambda dbranch: dbranch
    prepared, pull = jax.vjp(prepare, branch)

    def unprepare(dprepared: Any) -> Any:
        full = jax.tree.map(lambda p, d: np.zeros(p.shape, jax.dtypes.float0) if d is None else d, prepared, dprepared)
        return differentiable(pull(full)[0])

    return prepared, unprepare


def differentiable(tree: Any) -> Any:
    """Return the tree with None for leaves that have no cotangent: integers, booleans, keys and float0."""
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else None, tree)
