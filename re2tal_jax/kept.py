"""What a residual function keeps of its forward pass, where memory is there to keep it.

A branch names by `keep` the results that cost most to compute again: those of its matrix products. What is cheap
(norms, activation functions) or large (the weights of attention) is computed again in any case.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

T = TypeVar("T")
_NAME = "kept"


def keep(result: T) -> T:
    """Name a result as one that is kept; elsewhere it does nothing."""
    return checkpoint_name(result, _NAME)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """The results that a function kept, an array each, and how its derivative follows from them and its arguments."""

    results: list[Any]
    structure: Any = field(metadata={"static": True})
    arguments: tuple[int | None, ...] = field(metadata={"static": True})  # which argument stands in a place, by leaf

    def pull(self, *arguments: Any) -> Callable[[Any], tuple[Any, ...]]:
        """Return the derivative in reverse, at the arguments that the function was called with."""
        given, results = jax.tree.leaves(arguments), iter(self.results)
        leaves = [next(results) if place is None else given[place] for place in self.arguments]
        return jax.tree.unflatten(self.structure, leaves)


def call(function: Callable[..., T], *arguments: Any) -> tuple[T, Kept]:
    """Return function(*arguments) and what it kept of it: arguments are not kept, they are given again.

    Kept is also what is closed over. Arguments are told among the leaves of `jax.vjp`'s derivative by identity; one
    that is not told would be kept too, at the cost of memory alone.
    """
    policy = jax.checkpoint_policies.save_only_these_names(_NAME)
    value, pull = jax.vjp(jax.checkpoint(function, policy=policy), *arguments)
    leaves, structure = jax.tree.flatten(pull)
    places = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(arguments))}
    known = tuple(places.get(id(leaf)) for leaf in leaves)
    return value, Kept([leaf for leaf, place in zip(leaves, known, strict=True) if place is None], structure, known)
