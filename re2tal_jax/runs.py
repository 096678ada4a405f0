"""Repeating patterns in a chain of branches, so that `lax.scan` compiles a pattern once however often it repeats.

A *link* is a branch with its key. A `Run` says where a pattern lies in a chain; the run itself is a tuple of its links,
leaves stacked if it repeats.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Runs = tuple[tuple[int, ...], Any]
"""How often each run repeats, and the runs."""


class Run(NamedTuple):
    """`repeats` copies of a pattern of `period` branches, the first at index `start` of the chain."""

    start: int
    period: int
    repeats: int

    @property
    def pattern(self) -> range:
        """The indices of the first copy."""
        return range(self.start, self.start + self.period)


def find_runs(branches: Sequence[Any]) -> list[Run]:
    """Cut a chain into runs, in order; each run is the repeating pattern that covers most from where it starts.

    Branches are alike if they have the same tree structure (static fields included) and leaves of the same shapes and
    dtypes. A branch that starts no repeating pattern is a run of its own.
    """
    kinds = [_kind(branch) for branch in branches]
    runs: list[Run] = []
    start = 0
    while start < len(kinds):
        best = Run(start, 1, 1)
        for period in range(1, (len(kinds) - start) // 2 + 1):
            repeats = _count_repeats(kinds[start:], period)
            if repeats > 1 and period * repeats > best.period * best.repeats:
                best = Run(start, period, repeats)
        runs.append(best)
        start += best.period * best.repeats
    return runs


def stack_run(items: Sequence[Any], run: Run) -> tuple[Any, ...]:
    """Return the first copy of the pattern in `items`, its leaves stacked over the copies if there are several."""
    copies = [tuple(items[i + n * run.period] for i in run.pattern) for n in range(run.repeats)]
    return copies[0] if run.repeats == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *copies)


def scan_run(count: int, body: Any, carry: Any, run: Any, reverse: bool = False) -> tuple[Any, Any]:
    """Apply body(carry, links) to every copy of a run's pattern."""
    if count == 1:
        return body(carry, run)
    return lax.scan(body, carry, run, reverse=reverse, unroll=_unroll(run))


def scan_back(count: int, body: Any, carry: Any, run: Any, given: Any = None) -> tuple[Any, Any]:
    """Apply body(carry, links, given) -> (carry, cotangents) to every copy of a run's pattern, the last one first.

    What is stacked of a copy is not needed after its turn: its cotangents are written in its place. So a run takes its
    parameters' memory once, not twice.
    """
    if count == 1:
        return body(carry, run, given)
    leaves, structure = jax.tree.flatten(run)
    moving = [place for place, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def one_copy(both: Any, item: Any) -> tuple[Any, None]:
        (carry, stacked), (number, given) = both, item
        taken = [lax.dynamic_index_in_dim(leaf, number, keepdims=False) for leaf in _replace(leaves, moving, stacked)]
        carry, dlinks = body(carry, jax.tree.unflatten(structure, taken), given)
        dleaves = jax.tree.leaves(dlinks)
        put = lax.dynamic_update_index_in_dim
        return (carry, [put(leaf, dleaf, number, 0) for leaf, dleaf in zip(stacked, dleaves, strict=True)]), None

    begin = carry, [leaves[place] for place in moving]
    numbers = jnp.arange(count, dtype=jnp.int32)
    (carry, dleaves), _ = lax.scan(one_copy, begin, (numbers, given), reverse=True, unroll=_unroll(run))
    return carry, jax.tree.unflatten(structure, _replace([None] * len(leaves), moving, dleaves))


def _kind(branch: Any) -> Any:
    leaves, structure = jax.tree.flatten(branch)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _count_repeats(kinds: list[Any], period: int) -> int:
    repeats = 1
    while len(kinds) >= (repeats + 1) * period and all(kinds[i] == kinds[repeats * period + i] for i in range(period)):
        repeats += 1
    return repeats


def _replace(leaves: list[Any], places: list[int], values: list[Any]) -> list[Any]:
    """Return the leaves with values in some places."""
    by_place = dict(zip(places, values, strict=True))
    return [by_place.get(place, leaf) for place, leaf in enumerate(leaves)]


def _unroll(run: Any) -> int:
    """Return how many copies of a pattern a loop's body holds.

    Each link writes over one of two states and swaps their places. A loop whose body is an even number of links gets
    them back as it had them; otherwise a compiler copies both whole, every time.
    """
    return 1 + len(run) % 2
