"""Repeating patterns in a chain of branches, so that `lax.scan` compiles a pattern once however often it repeats."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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


def _kind(branch: Any) -> Any:
    leaves, structure = jax.tree.flatten(branch)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _count_repeats(kinds: list[Any], period: int) -> int:
    repeats = 1
    while len(kinds) >= (repeats + 1) * period and all(kinds[i] == kinds[repeats * period + i] for i in range(period)):
        repeats += 1
    return repeats
