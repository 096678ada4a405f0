"""Random keys for initial parameters."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray


class Seeded(nnx.Rngs):
    """The keys of `nnx.Rngs(seed)`, whatever stream is asked for, counted in Python.

    nnx counts in a variable. In a trace, where networks are built without arrays, its every change looks through all
    that was traced before: seconds for a network of a thousand parameters.
    """

    def __init__(self, seed: int):
        self._seed, self._count = seed, 0

    def __getattr__(self, name: str) -> Callable[[], PRNGKeyArray]:
        """Return the stream of this name: all are one."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self

    def __call__(self) -> PRNGKeyArray:
        """Return the next key."""
        key = jax.random.fold_in(jax.random.key(self._seed), self._count)
        self._count += 1
        return key
