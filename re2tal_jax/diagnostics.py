"""What a reversible chain loses and how large it grows: reconstruction error and largest |state| of every chain."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from re2tal_jax.branch import Branch
from re2tal_jax.exact import State
from re2tal_jax.reversible import Wiring, make_runs, rewire, step, step_back
from re2tal_jax.runs import scan_run


class ChainDiagnostics(NamedTuple):
    """Of one chain: max |x - inverse(forward(x))| over both states, and max |s_i|.

    With low-precision branches the error is 0 as long as the largest |state| is below 1024 (exact.GRID).
    """

    reconstruction_error: Float[Array, ""]
    largest_state: Float[Array, ""]


def diagnose_chain(
    wiring: Wiring, branches: Sequence[Branch], x: State, *, key: PRNGKeyArray | None = None, aux: Any = None
) -> ChainDiagnostics:
    """Run a chain forward and back as training does, and compare what comes back with what went in.

    All branches are undone, also those that training would store.
    """
    (repeats, runs), _, x = make_runs(branches, x, key, aux)
    alpha, beta = jnp.asarray(wiring.alpha, x.dtype), jnp.asarray(wiring.beta, x.dtype)

    def forward(carry, run):
        states, largest = carry
        for link in run:
            states = step(states, link, alpha, beta, aux)
            largest = jnp.maximum(largest, jnp.max(jnp.abs(states[0])))
        return (states, largest), None

    def back(states, run):
        for link in reversed(run):
            states, _, _ = step_back(states, (jnp.zeros_like(x), jnp.zeros_like(x)), link, alpha, beta, aux)
        return states, None

    carry = (x, x), jnp.max(jnp.abs(x))
    for count, run in zip(repeats, runs, strict=True):
        carry, _ = scan_run(count, forward, carry, run)
    states, largest = carry
    states = jax.lax.optimization_barrier(states)  # a compiler may not see that the way back undoes the way forward
    for count, run in reversed(list(zip(repeats, runs, strict=True))):
        states, _ = scan_run(count, back, states, run, reverse=True)
    error = jnp.max(jnp.stack([jnp.max(jnp.abs(state - x)) for state in states]))
    return ChainDiagnostics(error, largest)


def diagnose(module: nnx.Module, *inputs: Any, wiring: Wiring, **named_inputs: Any) -> list[ChainDiagnostics]:
    """Call a module that holds chains with the given wiring and return one entry per chain, in order of execution."""
    recorder = _Recorder(wiring)
    rewire(module, cast(Wiring, recorder))(*inputs, **named_inputs)
    return list(recorder.records)


class _Records(list[ChainDiagnostics]):
    """A list that equals itself alone: part of a tree's structure, which is compared and hashed."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]
    __eq__ = object.__eq__


@jax.tree_util.register_pytree_node_class
class _Recorder:
    """A wiring that runs its chains as usual and notes what they lose."""

    def __init__(self, wiring: Wiring, records: _Records | None = None):
        self.wiring = wiring
        self.records = _Records() if records is None else records

    def tree_flatten(self) -> tuple[tuple[Wiring], _Records]:
        return (self.wiring,), self.records

    @classmethod
    def tree_unflatten(cls, records: _Records, children: tuple[Wiring]) -> "_Recorder":
        return cls(*children, records)

    def __call__(self, branches: Sequence[Branch], x: State, **named: Any) -> State:
        return self.mean(*self.states(branches, x, **named))

    def states(self, branches: Sequence[Branch], x: State, *, stored: int = 0, **named: Any) -> tuple[State, State]:
        self.records.append(diagnose_chain(self.wiring, branches, x, **named))
        return self.wiring.states(branches, x, stored=stored, **named)

    def mean(self, last: State, before: State) -> State:
        return self.wiring.mean(last, before)

    def join(self, branch: Branch, x: Any, shortcut: State, **named: Any) -> State:
        return self.wiring.join(branch, x, shortcut, **named)

    @property
    def twin(self) -> Wiring:
        return self.wiring.twin

    @property
    def reversible(self) -> bool:
        return self.wiring.reversible

    @property
    def is_plain(self) -> bool:
        return self.wiring.is_plain
