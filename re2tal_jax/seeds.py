"""Random keys for initial parameters."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray


class Seeded(nnx.Rngs):
    """The keys of `nnx.Rngs(seed)` for constructors, whatever stream they ask for, counted in Python.

    `part` gives other keys from the same seed: what is drawn for one part of a network does not depend on how many keys
    another part took.

    nnx counts in a variable. In a trace, where networks are built without arrays, its every change looks through all
    that was traced before: seconds for a network of a thousand parameters.
    """

    def __init__(self, seed: int, part: int | None = None):
        self._seed, self._part, self._count = seed, part, 0

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, name: str) -> "Seeded":
        return self

    def fork(self, *_: Any, **__: Any) -> NoReturn:
        """Raise TypeError: what keeps streams, as `nnx.Dropout` does, needs `nnx.Rngs`."""
        raise TypeError("Seeded keys are for constructors alone: give nnx.Rngs to a module that keeps its streams.")

    split = fork

    def __getattr__(self, name: str) -> Callable[[], PRNGKeyArray]:
        """Return the stream of this name: all are one."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self

    def __call__(self) -> PRNGKeyArray:
        """Return the next key."""
        key = jax.random.key(self._seed)
        if self._part is not None:
            key = jax.random.fold_in(key, self._part)
        key = jax.random.fold_in(key, self._count)
        self._count += 1
        return key
