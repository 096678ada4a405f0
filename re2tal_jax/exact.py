"""Sums without any error: float32 states around branches that compute in bfloat16.

Rounded to multiples of 1 / GRID, float32 numbers add and subtract exactly while they stay below 2**24 / GRID = 1024. A
chain of such states is undone bit for bit, provided that a branch gives the same value twice.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

GRID = 2.0**14  # steps per unit

State = Float[Array, "..."]


@jax.custom_jvp
def to_grid(x: State) -> State:
    """Round to multiples of 1/GRID, with a straight-through gradient."""
    return jnp.round(x * GRID) / GRID


to_grid.defjvp(lambda primals, tangents: (to_grid(*primals), tangents[0]))


def widen(x: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """Cast to a dtype of at least as many bits, from values that are rounded as x's own dtype says.

    Compilers skip a rounding that such a cast follows, in some copies of a computation and not in others (XLA's
    `xla_allow_excess_precision`); what a branch gives without it in one pass alone is not undone exactly.
    """
    own, wide = jnp.finfo(x.dtype), x.astype(dtype)
    return lax.reduce_precision(wide, own.nexp, own.nmant) if own.bits < jnp.finfo(dtype).bits else wide


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """Return float64 for float64, else float32: the dtype of sums, statistics and states, also of those of integers."""
    wider = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits > 32
    return jnp.dtype(dtype if wider else jnp.float32)


def is_narrower(result: Any, state: Any) -> bool:
    """Tell whether an array has less than the precision of another."""
    return jnp.finfo(result.dtype).bits < jnp.finfo(state.dtype).bits
