"""Reversible chains of residual functions: Re2TAL (arXiv 2211.14053) and Dr2Net (arXiv 2401.04105) in one recurrence.

A residual network is a chain of residual functions F_0 … F_{n-1}, here *branches*. With s_i the *state* before F_i,

    s_{i+1} = F_i(s_i) + alpha * s_i + beta * s_{i-1}                  s_0 = s_{-1} = x

(alpha, beta) = (1, 0) is the pretrained network, (0, 1) is Re2TAL, values between are Dr2Net. For beta > 0 each state
follows from the two after it, s_{i-1} = (s_{i+1} - F_i(s_i) - alpha * s_i) / beta, so the backward pass recomputes
states instead of storing them: memory does not grow with the number of branches. No parameter is added or renamed.
Where memory is left, the last branches of a chain may store after all, for time: the same function and gradients.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from re2tal_jax.branch import Branch, increment
from re2tal_jax.errors import ConfigError
from re2tal_jax.exact import State, is_narrower, to_grid, widen
from re2tal_jax.runs import Runs, find_runs, scan_back, scan_run, stack_run
from re2tal_jax.stored import stored_backward, stored_forward
from re2tal_jax.tiling import differentiable, over_tiles, prepare, prepare_back

M = TypeVar("M", bound=nnx.Module)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Wiring:
    """The coefficients of a chain; call it to run branches as that chain.

    `alpha` and `beta` may be traced scalars that change from step to step (Dr2Net). `reversible=False` is the twin that
    stores what autodiff stores: the same function and gradients with ordinary memory. Among those the numbers (1, 0),
    PLAIN, are the pretrained network itself: branches that know their ordinary form run it, all others the recurrence.
    """

    alpha: float | Float[Array, ""] = 0.0
    beta: float | Float[Array, ""] = 1.0
    reversible: bool = field(default=True, metadata={"static": True})

    def __call__(
        self, branches: Sequence[Branch], x: State, *, key: PRNGKeyArray | None = None, aux: Any = None, stored: int = 0
    ) -> State:
        """Run `branches` in order from x and return the `mean` of the last two states, a state like x.

        x is float32 where branches compute in lower precision. `key` gives each branch its own; None switches
        randomness off. The float leaves of the pytree `aux` are differentiated. `stored` as for `states`.

        Raises:
            ConfigError: a reversible chain whose beta is not positive.
        """
        return self.mean(*self.states(branches, x, key=key, aux=aux, stored=stored))

    def states(
        self, branches: Sequence[Branch], x: State, *, key: PRNGKeyArray | None = None, aux: Any = None, stored: int = 0
    ) -> tuple[State, State]:
        """Run `branches` and return the last two states, for what takes their `mean` piece by piece.

        The last `stored` branches of a reversible chain are not recomputed: their states are stored, and what they
        `keep` (see `kept.py`). The function is the same, its gradients are to rounding.

        Raises:
            ConfigError: a reversible chain whose beta is not positive, or a negative number of branches.
        """
        if self.reversible and isinstance(self.beta, int | float) and not self.beta > 0:
            raise ConfigError(
                f"beta = {self.beta} has no inverse here; allowed: beta > 0, or reversible=False (the wiring PLAIN)."
            )
        if stored < 0:
            raise ConfigError(f"stored = {stored} branches: allowed is 0 (all are recomputed) or more.")
        stored = stored if self.reversible else 0  # the others store all of them
        first, last, x = make_runs(branches, x, key, aux, stored)
        shared = jnp.asarray(self.alpha, x.dtype), jnp.asarray(self.beta, x.dtype), aux
        chain = _reversible_chain if self.reversible else _plain_chain if self.is_plain else _twin_chain
        states = chain(*first, (x, x), *shared)
        return _stored_chain(*last, states, *shared) if stored else states

    def mean(self, last: State, before: State) -> State:
        """Return what a chain hands on of its last two states: (s_n + beta * s_{n-1}) / (1 + beta)."""
        if self.is_plain:
            return last
        beta = jnp.asarray(self.beta, last.dtype)
        return (last + beta * before) / (1 + beta)

    def join(
        self, branch: Branch, x: Any, shortcut: State, *, key: PRNGKeyArray | None = None, aux: Any = None, **tile: Any
    ) -> State:
        """Return shortcut + F(x), a state like `shortcut`, for a block that changes the resolution.

        Such a block is in no chain: x and its projection `shortcut` differ in shape, so there is nothing to invert, and
        autodiff stores what it needs. `tile` is passed on to the branch.
        """
        ordinary = getattr(branch, "ordinary", None)
        if self.is_plain and ordinary is not None:
            return ordinary(x, shortcut, key=key, aux=aux, **tile)
        return shortcut + widen(branch(x, key=key, aux=aux, **tile), shortcut.dtype)

    @property
    def twin(self) -> "Wiring":
        """The same function and gradients, stored by autodiff."""
        return replace(self, reversible=False)

    @property
    def is_plain(self) -> bool:
        """Tell whether this is the pretrained network; a traced scalar is not known to be 1 or 0."""
        if not (isinstance(self.alpha, int | float) and isinstance(self.beta, int | float)):
            return False
        return not self.reversible and self.alpha == 1 and self.beta == 0


PLAIN = Wiring(alpha=1.0, beta=0.0, reversible=False)
REWIRED = Wiring(alpha=0.0, beta=1.0, reversible=True)


def rewire(module: M, wiring: Wiring = REWIRED) -> M:
    """Return a copy of a module that shares every parameter array and has `wiring` in all submodules that have one.

    `rewire(plain)` is the rewired network, `rewire(rewired, PLAIN)` the pretrained one again.
    """
    copy = nnx.merge(*nnx.split(module))
    wired = [m for _, m in nnx.iter_graph(copy) if isinstance(m, nnx.Module) and "wiring" in vars(m)]
    if not wired:
        raise ValueError(f"{type(module).__name__} has no attribute `wiring` to replace: it is no residual backbone.")
    traced = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(wiring))
    for submodule in wired:
        submodule.wiring = nnx.data(wiring) if traced else wiring  # pyright: ignore[reportAttributeAccessIssue]
    return copy


# ---- One step, forward and back, tile by tile. A link is a branch with its key.


def step(states: Any, link: Any, alpha: Array, beta: Array, aux: Any, *, tiled: bool = True) -> Any:
    """(s_i, s_{i-1}) -> (s_{i+1}, s_i), written over s_{i-1} tile by tile."""
    current, previous = states
    branch, key = link
    branch = prepare(branch)

    def body(previous, part, _):
        added = increment(branch, part.given(current), alpha, aux, part=part, key=key)
        return part.write(previous, added + beta * part.read(previous)), None

    return over_tiles(branch if tiled else None, current.shape, body, previous)[0], current


def plain_step(states: Any, link: Any, alpha: Array, beta: Array, aux: Any) -> Any:
    """(s_i, s_{i-1}) -> (s_{i+1}, s_i) at (1, 0), s_{i+1} in the block's own form if the branch has one."""
    current, (branch, key) = states[0], link
    if not hasattr(branch, "ordinary"):
        return step(states, link, alpha, beta, aux, tiled=False)
    return branch.ordinary(current, current, key=key, aux=aux), current


def step_back(states: Any, dstates: Any, link: Any, alpha: Array, beta: Array, aux: Any) -> Any:
    """(s_{i+1}, s_i) and cotangents -> (s_i, s_{i-1}) and cotangents, and those of (branch, alpha, beta, aux)."""
    following, current = states
    dfollowing, dcurrent = dstates
    branch, key = link
    branch, unprepare = prepare_back(branch)

    def body(carry, part, _):
        following, dcurrent, gradients = carry
        dadded = part.read(dfollowing)
        forward = functools.partial(increment, part=part, key=key)
        added, pull = jax.vjp(forward, branch, part.given(current), alpha, aux)
        previous = (part.read(following) - added) / beta
        dbranch, dx, dalpha, daux = pull(dadded)
        more = differentiable((dbranch, dalpha, jnp.vdot(dadded, previous), daux))
        carry = part.write(following, previous), part.add(dcurrent, dx), jax.tree.map(jnp.add, gradients, more)
        return carry, None

    zeros = jax.tree.map(jnp.zeros_like, differentiable((branch, alpha, beta, aux)))
    carry, _ = over_tiles(branch, current.shape, body, (following, dcurrent, zeros))
    previous, dcurrent, (dbranch, *more) = carry
    return (current, previous), (dcurrent, beta * dfollowing), (unprepare(dbranch), *more)


def _is_narrow(link: Any, x: State, aux: Any) -> bool:
    """Tell whether a branch computes in less than the precision of the state x."""

    def result(link, x, aux):
        branch, key = link
        return branch(x, key=key, aux=aux)

    return is_narrower(jax.eval_shape(result, link, x, aux), x)


# ---- The chain and its derivative.


def make_runs(
    branches: Sequence[Branch], x: State, key: PRNGKeyArray | None, aux: Any, stored: int = 0
) -> tuple[Runs, Runs, State]:
    """Return the runs of all but the last `stored` branches, those of the last, and the start.

    The start is on the grid if some branch has low precision.
    """
    keys = [None] * len(branches) if key is None else list(jax.random.split(key, len(branches)))
    links = list(zip(branches, keys, strict=True))
    cut, parts = max(len(links) - stored, 0), []
    for part in (links[:cut], links[cut:]):
        plan = find_runs([branch for branch, _ in part])
        if any(_is_narrow(part[i], x, aux) for run in plan for i in run.pattern):
            x = to_grid(x)
        parts.append((tuple(run.repeats for run in plan), tuple(stack_run(part, run) for run in plan)))
    return parts[0], parts[1], x


def _chain(repeats: tuple[int, ...], runs: Any, states: Any, alpha: Array, beta: Array, aux: Any) -> Any:
    """Return (s_n, s_{n-1})."""
    return _repeat(functools.partial(step, alpha=alpha, beta=beta, aux=aux), repeats, runs, states)


def _twin_chain(repeats: tuple[int, ...], runs: Any, states: Any, alpha: Array, beta: Array, aux: Any) -> Any:
    """Return (s_n, s_{n-1}) by whole tensors: autodiff would keep what every tile of every step began with."""
    return _repeat(functools.partial(step, alpha=alpha, beta=beta, aux=aux, tiled=False), repeats, runs, states)


def _plain_chain(repeats: tuple[int, ...], runs: Any, states: Any, alpha: Array, beta: Array, aux: Any) -> Any:
    """Return (s_n, s_{n-1}) of the pretrained network."""
    return _repeat(functools.partial(plain_step, alpha=alpha, beta=beta, aux=aux), repeats, runs, states)


def _repeat(one_step: Any, repeats: tuple[int, ...], runs: Any, states: Any) -> Any:
    def body(states, run):
        for link in run:
            states = one_step(states, link)
        return states, None

    for count, run in zip(repeats, runs, strict=True):
        states, _ = scan_run(count, body, states, run)
    return states


def _chain_forward(repeats: tuple[int, ...], runs: Any, states: Any, alpha: Array, beta: Array, aux: Any) -> Any:
    states = _chain(repeats, runs, states, alpha, beta, aux)
    return states, (runs, states, alpha, beta, aux)


def _chain_backward(repeats: tuple[int, ...], residuals: Any, dstates: Any) -> Any:
    runs, states, alpha, beta, aux = residuals

    def body(carry, run, _):
        states, dstates, dshared = carry
        dlinks = []
        for link in reversed(run):
            # Without a barrier on states *and* cotangents, schedulers invert the whole chain ahead of the gradients.
            states, dstates = lax.optimization_barrier((states, dstates))
            states, dstates, (dbranch, *more) = step_back(states, dstates, link, alpha, beta, aux)
            dshared = jax.tree.map(jnp.add, dshared, tuple(more))
            dlinks.append((dbranch, None))  # a key has no cotangent
        return (states, dstates, dshared), tuple(reversed(dlinks))

    carry = states, dstates, jax.tree.map(jnp.zeros_like, differentiable((alpha, beta, aux)))
    druns = []
    for count, run in reversed(list(zip(repeats, runs, strict=True))):
        carry, dlinks = scan_back(count, body, carry, run)
        druns.append(dlinks)
    _, dstates, dshared = carry
    return (tuple(reversed(druns)), dstates, *dshared)


_reversible_chain = jax.custom_vjp(_chain, nondiff_argnums=(0,))
_reversible_chain.defvjp(_chain_forward, _chain_backward)

# The same forward; where there is a derivative, `stored.py` keeps the states in the place of undoing the steps.
_stored_chain = jax.custom_vjp(_chain, nondiff_argnums=(0,))
_stored_chain.defvjp(stored_forward, stored_backward)
