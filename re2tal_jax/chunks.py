"""A function applied to stretches of time one after the other, and computed again in the backward pass.

What stands between chains (cutting patches, halving a grid) has outputs as large as a state and temporaries several
times larger. Stretch by stretch only one of them is there at once, and nothing but the inputs is kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

Function = Callable[..., Array]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_chunks(function: Function, count: int, params: Any, *arrays: Array) -> Array:
    """Return function(params, *arrays), computed in `count` stretches along axis 1.

    Args:
        function: of (params, *stretches), to an array whose axis 1 is the stretch; hashable, so a plain function: what
            it needs comes in `params`.
        count: divides axis 1 of every array.
        params: a pytree of arrays that every stretch gets whole.
        arrays: cut along axis 1.
    """
    shape = jax.eval_shape(partial(_apply, function, count), params, arrays, 0)

    def body(result: Array, number: Int[Array, ""]) -> tuple[Array, None]:
        return _write(result, _apply(function, count, params, arrays, number), number), None

    result = _to_be_filled((shape.shape[0], count * shape.shape[1], *shape.shape[2:]), shape.dtype, arrays[0])
    return lax.scan(body, result, jnp.arange(count))[0]


def count_chunks(length: int, per_position: int, workspace: int) -> int:
    """Return the smallest number of equal stretches of `length` whose workspace (elements) is within bounds."""
    return next(
        n for n in range(1, length + 1) if length % n == 0 and (length // n * per_position <= workspace or n == length)
    )


def _forward(function: Function, count: int, params: Any, *arrays: Array) -> tuple[Array, Any]:
    return in_chunks(function, count, params, *arrays), (params, arrays)


def _backward(function: Function, count: int, residuals: Any, dresult: Array) -> tuple[Any, ...]:
    params, arrays = residuals

    def body(carry: Any, number: Int[Array, ""]) -> tuple[Any, None]:
        dparams, darrays = carry
        stretches = [_read(array, count, number) for array in arrays]
        _, pull = jax.vjp(function, params, *stretches)
        more, *dstretches = pull(_read(dresult, count, number))
        written = [_write(d, dstretch, number) for d, dstretch in zip(darrays, dstretches, strict=True)]
        return (jax.tree.map(jnp.add, dparams, more), written), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    darrays = [_to_be_filled(array.shape, array.dtype, dresult) for array in arrays]
    dparams, darrays = lax.scan(body, (zeros, darrays), jnp.arange(count))[0]
    return (dparams, *darrays)


in_chunks.defvjp(_forward, _backward)


def _to_be_filled(shape: tuple[int, ...], dtype: Any, after: Array) -> Array:
    """Return an array whose every value will be replaced, made when `after` is there.

    Zeros depend on nothing, so a compiler may make those of all stretches, backward ones too, before all else, and keep
    them until they are wanted: as many states more at the peak.
    """
    return jnp.broadcast_to(after[(0,) * after.ndim].astype(dtype), shape)


def _apply(function: Function, count: int, params: Any, arrays: tuple[Array, ...], number: Any) -> Array:
    return function(params, *(_read(array, count, number) for array in arrays))


def _read(array: Array, count: int, number: Any) -> Array:
    length = array.shape[1] // count
    return lax.dynamic_slice_in_dim(array, number * length, length, axis=1)


def _write(array: Array, value: Array, number: Any) -> Array:
    return lax.dynamic_update_slice_in_dim(array, value, number * value.shape[1], axis=1)
