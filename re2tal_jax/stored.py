"""The end of a chain that is not undone in the backward pass: its states are stored, and what its branches keep.

The same function and gradients as those of `reversible.py`, for memory in the place of time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from re2tal_jax.branch import State, increment
from re2tal_jax.kept import call
from re2tal_jax.runs import scan_back, scan_run
from re2tal_jax.tiling import differentiable, over_tiles, prepare, prepare_back


def stored_forward(repeats: tuple[int, ...], runs: Any, states: Any, alpha: Array, beta: Array, aux: Any) -> Any:
    """Return (s_n, s_{n-1}), and what `stored_backward` needs; arguments are those of a chain of `reversible.py`."""

    def body(states, run):
        steps = []
        for link in run:
            current = states[0]
            states, kept = kept_step(states, link, alpha, beta, aux)
            steps.append((current, kept))
        return states, tuple(steps)

    begin, stored = states, []
    for count, run in zip(repeats, runs, strict=True):
        states, steps = scan_run(count, body, states, run)
        stored.append(steps)
    return states, (runs, stored, begin[1], states[1], alpha, beta, aux)


def stored_backward(repeats: tuple[int, ...], residuals: Any, dstates: Any) -> Any:
    """Return the cotangents of all arguments of `stored_forward` but the first.

    That of beta is the sum of <ds_{i+1}, s_{i-1}> over the links i. A link has its s_i at hand, which is the one before
    for the link i + 1, of whose ds_{i+2} the cotangent that comes with s_i is made: beta times it. For the last link it
    is made of something else, which is taken off at the start, and the state before the first link is added at the end.
    """
    runs, stored, before_first, before_last, alpha, beta, aux = residuals

    def body(carry, run, steps):
        dstates, (dalpha, dbeta, daux) = carry
        dlinks = []
        for link, (current, kept) in reversed(list(zip(run, steps, strict=True))):
            dbeta = dbeta + jnp.vdot(dstates[1], current) / beta
            dstates, (dbranch, *more) = kept_step_back(current, kept, dstates, link, alpha, beta, aux)
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
        added, kept = call(forward, branch, part.given(current), alpha, aux)
        return part.write(previous, added + beta * part.read(previous)), kept

    following, kept = over_tiles(branch, current.shape, body, previous)
    return (following, current), kept


def kept_step_back(current: State, kept: Any, dstates: Any, link: Any, alpha: Array, beta: Array, aux: Any) -> Any:
    """s_i, what was kept, cotangents of (s_{i+1}, s_i) -> those of (s_i, s_{i-1}), and of (branch, alpha, aux)."""
    dfollowing, dcurrent = dstates
    branch, unprepare = prepare_back(link[0])

    def body(carry, part, kept):
        dcurrent, gradients = carry
        dadded = part.read(dfollowing)
        dbranch, dx, dalpha, daux = kept.pull(branch, part.given(current), alpha, aux)(dadded)
        more = differentiable((dbranch, dalpha, daux))
        return (part.add(dcurrent, dx), jax.tree.map(jnp.add, gradients, more)), None

    zeros = jax.tree.map(jnp.zeros_like, differentiable((branch, alpha, aux)))
    (dcurrent, (dbranch, *more)), _ = over_tiles(branch, current.shape, body, (dcurrent, zeros), kept)
    return (dcurrent, beta * dfollowing), (unprepare(dbranch), *more)
