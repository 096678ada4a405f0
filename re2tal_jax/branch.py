"""What is asked of a residual function, here a *branch*, and what a chain adds to a state by it."""

from typing import Any, Protocol

from jaxtyping import Array, PRNGKeyArray

from re2tal_jax.exact import State, is_narrower, to_grid, widen
from re2tal_jax.tiling import Part


class Branch(Protocol):
    """A residual function: a callable pytree that holds all its arrays as leaves, so that alike branches are scanned.

    It returns an array of its input's shape; a result of lower precision than the state tells that it computes in that
    precision. `key` is this branch's own (None: evaluation), `aux` is shared by the chain. Called again with the same
    arguments it gives the same value.

    A reversible chain runs a branch that has a method `tiles(shape) -> Tiles` tile by tile, in place: it is called with
    a tile's part of the state, and the tile's number as a further keyword `tile`. What follows from its parameters
    alone is computed once for all tiles, if a method `prepare()` returns the branch with it.

    A block of the pretrained network may be more than F(x) + x: in a ResNet a ReLU follows the sum, and rewiring moves
    it into F. A branch whose block is so has a method `ordinary(x, shortcut, *, key, aux)` that returns the block's own
    form, relu(shortcut + …), in shortcut's shape and dtype. Only PLAIN runs it.

    What a branch names by `kept.keep` is stored where the end of a chain is (see `stored.py`), and only there.
    """

    def __call__(self, x: State, *, key: PRNGKeyArray | None, aux: Any) -> State:
        """Return F(x)."""
        ...


def increment(branch: Branch, x: State, alpha: Array, aux: Any, *, part: Part, key: Any) -> State:
    """Return F(x) + alpha * x, put on the grid if F computes in less than the state's precision."""
    result = branch(x, key=key, aux=aux, **part.named)
    added = widen(result, x.dtype) + alpha * part.middle(x)
    return to_grid(added) if is_narrower(result, x) else added
