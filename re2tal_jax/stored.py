"""The end of a chain that is not undone in the backward pass: its states are stored, and what its branches keep.

The same function and gradients as those of `reversible.py`, for memory in the place of time.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from re2tal_jax import kept
from re2tal_jax.branch import increment
from re2tal_jax.errors import ConfigError
from re2tal_jax.exact import State
from re2tal_jax.runs import scan_back, scan_run
from re2tal_jax.tiling import differentiable, over_tiles, prepare, prepare_back


def stored_forward(repeats: tuple[int, ...], runs: Any, states: Any, alpha: Array, beta: Array, aux: Any) -> Any:
    """Return (s_n, s_{n-1}), and what `stored_backward` needs; arguments are those of a chain of `reversible.py`."""

    def body(states, run):
        steps = []
        for link in run:
            current = states[0]
            states, results = kept_step(states, link, alpha, beta, aux)
            steps.append((current, results))
        return states, tuple(steps)

    begin, stored = states, []
    for count, run in zip(repeats, runs, strict=True):
        states, steps = scan_run(count, body, states, run)
        stored.append(steps)
    return states, (runs, stored, begin[1], states[1], alpha, beta, aux)


def stored_backward(repeats: tuple[int, ...], residuals: Any, dstates: Any) -> Any:
    """Return the cotangents of all arguments of `stored_forward` but the first.

    That of beta is the sum of <ds_{i+1}, s_{i-1}> over the links i. Link i hands beta * ds_{i+1} on, as the cotangent
    that comes with s_{i-1}, to link i - 1, which has stored s_{i-1}: there their product is taken, over beta. So the
    last link takes one that belongs to no link, which is taken off before, and that of the first is added after.
    """
    runs, stored, before_first, before_last, alpha, beta, aux = residuals

    def body(carry, run, steps):
        dstates, (dalpha, dbeta, daux) = carry
        dlinks = []
        for link, (current, results) in reversed(list(zip(run, steps, strict=True))):
            dbeta = dbeta + jnp.vdot(dstates[1], current) / beta
            dstates, (dbranch, *more) = kept_step_back(current, results, dstates, link, alpha, beta, aux)
            dalpha, daux = jax.tree.map(jnp.add, (dalpha, daux), tuple(more))
            dlinks.append((dbranch, None))
        return (dstates, (dalpha, dbeta, daux)), tuple(reversed(dlinks))

    dalpha, daux = jax.tree.map(jnp.zeros_like, differentiable((alpha, aux)))
    carry = dstates, (dalpha, -jnp.vdot(dstates[1], before_last) / beta, daux)
    druns = []
    for count, run, steps in reversed(list(zip(repeats, runs, stored, strict=True))):
        carry, dlinks = scan_back(count, body, carry, run, steps)
        druns.append(dlinks)
    dstates, (dalpha, dbeta, daux) = carry
    dbeta = dbeta + jnp.vdot(dstates[1], before_first) / beta
    return tuple(reversed(druns)), dstates, dalpha, dbeta, daux


def kept_step(states: Any, link: Any, alpha: Array, beta: Array, aux: Any) -> Any:
    """(s_i, s_{i-1}) -> (s_{i+1}, s_i) as `reversible.step`, and what each tile kept."""
    current, previous = states
    branch, key = link
    branch = prepare(branch)

    def body(previous, part, _):
        forward = functools.partial(increment, part=part, key=key)
        added, results = kept.call(forward, branch, part.given(current), alpha, aux)
        return part.write(previous, added + beta * part.read(previous)), results

    following, results = over_tiles(branch, current.shape, body, previous)
    return (following, current), results


def kept_step_back(current: State, results: Any, dstates: Any, link: Any, alpha: Array, beta: Array, aux: Any) -> Any:
    """s_i, what was kept, cotangents of (s_{i+1}, s_i) -> those of (s_i, s_{i-1}), and of (branch, alpha, aux)."""
    dfollowing, dcurrent = dstates
    branch, unprepare = prepare_back(link[0])

    def body(carry, part, results):
        dcurrent, gradients = carry
        dadded = part.read(dfollowing)
        dbranch, dx, dalpha, daux = results.pull(branch, part.given(current), alpha, aux)(dadded)
        more = differentiable((dbranch, dalpha, daux))
        return (part.add(dcurrent, dx), jax.tree.map(jnp.add, gradients, more)), None

    zeros = jax.tree.map(jnp.zeros_like, differentiable((branch, alpha, aux)))
    (dcurrent, (dbranch, *more)), _ = over_tiles(branch, current.shape, body, (dcurrent, zeros), results)
    return (dcurrent, beta * dfollowing), (unprepare(dbranch), *more)


def last_blocks(stored_blocks: int, lengths: Sequence[int]) -> tuple[int, ...]:
    """Return how many of a network's last `stored_blocks` blocks lie in each of its chains, which have `lengths`.

    Raises:
        ConfigError: fewer than none; with more than there are, all of them do.
    """
    if stored_blocks < 0:
        raise ConfigError(f"stored_blocks = {stored_blocks}: allowed is 0 (every block is recomputed) or more.")
    ends = [sum(lengths[i + 1 :]) for i in range(len(lengths))]
    return tuple(min(max(stored_blocks - end, 0), length) for end, length in zip(ends, lengths, strict=True))
