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
from jaxtyping import Array, Float, Int, Shaped

Function = Callable[..., Any]


def in_chunks(function: Function, count: int, params: Any, *arrays: Array) -> Any:
    """Return function(params, *arrays), computed in `count` stretches along axis 1.

    Args:
        function: of (params, *stretches), to an array (or a pytree of arrays) whose axis 1 is the stretch; hashable, so
            a plain function: what it needs comes in `params`.
        count: divides axis 1 of every array.
        params: a pytree of arrays that every stretch gets whole.
        arrays: cut along axis 1; those of floats are differentiated.
    """
    return in_overlapping_chunks(function, count, (0,) * len(arrays), params, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def in_overlapping_chunks(function: Function, count: int, halos: tuple[int, ...], params: Any, *arrays: Array) -> Any:
    """Return what `in_chunks` does of a function that sees beyond its stretch.

    It gets, of every array, as many positions more at both ends as `halos` has for it, zeros outside the array; its
    result is that of the stretch alone.
    """
    shapes = jax.eval_shape(partial(_apply, function, count, halos), params, arrays, 0)

    def body(results: Any, number: Int[Array, ""]) -> tuple[Any, None]:
        return jax.tree.map(
            partial(_write, number=number), results, _apply(function, count, halos, params, arrays, number)
        ), None

    results = jax.tree.map(
        lambda s: _to_be_filled((s.shape[0], count * s.shape[1], *s.shape[2:]), s.dtype, arrays[0]), shapes
    )
    return lax.scan(body, results, jnp.arange(count))[0]


def count_chunks(length: int, per_position: int, workspace: int) -> int:
    """Return the smallest number of equal stretches of `length` whose workspace (elements) is within bounds."""
    return next(
        n for n in range(1, length + 1) if length % n == 0 and (length // n * per_position <= workspace or n == length)
    )


def read_stretch(
    array: Shaped[Array, "B T *rest"], begin: Int[Array, ""] | int, length: int, halo: int = 0
) -> Shaped[Array, "B t *rest"]:
    """Return `length` positions of axis 1 and `halo` more at both ends, zeros outside the array."""
    if not halo:
        return lax.dynamic_slice_in_dim(array, begin, length, axis=1)
    first, kept = _overlap(array, begin, length, halo)
    inside = lax.dynamic_slice_in_dim(array, first, kept, axis=1)
    return lax.dynamic_slice_in_dim(_pad(inside, length + halo), length + begin - first, length + 2 * halo, axis=1)


def add_stretch(
    array: Float[Array, "B T *rest"], value: Float[Array, "B t *rest"], begin: Int[Array, ""] | int, halo: int
) -> Float[Array, "B T *rest"]:
    """Return the array with what `read_stretch` would give increased by `value`; what is outside is lost."""
    length = value.shape[1] - 2 * halo
    first, kept = _overlap(array, begin, length, halo)
    inside = lax.dynamic_slice_in_dim(array, first, kept, axis=1)
    more = lax.dynamic_slice_in_dim(_pad(value, length + halo), length + 2 * halo + first - begin, kept, axis=1)
    return lax.dynamic_update_slice_in_dim(array, inside + more, first, axis=1)


def _overlap(array: Array, begin: Int[Array, ""] | int, length: int, halo: int) -> tuple[Int[Array, ""], int]:
    """Return the begin and the length of a part of the array that holds all of a stretch that is inside it."""
    kept = min(length + 2 * halo, array.shape[1])
    return jnp.clip(begin - halo, 0, array.shape[1] - kept), kept


def _pad(x: Array, ends: int) -> Array:
    return jnp.pad(x, [(0, 0), (ends, ends), *((0, 0) for _ in x.shape[2:])])


def _forward(function: Function, count: int, halos: tuple[int, ...], params: Any, *arrays: Array) -> tuple[Any, Any]:
    return in_overlapping_chunks(function, count, halos, params, *arrays), (params, arrays)


def _backward(function: Function, count: int, halos: tuple[int, ...], residuals: Any, dresults: Any) -> tuple[Any, ...]:
    params, arrays = residuals

    def body(carry: Any, number: Int[Array, ""]) -> tuple[Any, None]:
        dparams, darrays = carry
        stretches = _cut(arrays, count, halos, number)
        _, pull = jax.vjp(function, params, *stretches)
        more, *dstretches = pull(jax.tree.map(lambda d: _read(d, count, 0, number), dresults))
        written = [
            d
            if d is None
            else add_stretch(d, dstretch, number * (d.shape[1] // count), halo)
            if halo
            else _write(d, dstretch, number)
            for d, dstretch, halo in zip(darrays, dstretches, halos, strict=True)
        ]
        return (jax.tree.map(jnp.add, dparams, more), written), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    after = jax.tree.leaves(dresults)[0]
    darrays = [
        (_zeros if halo else _to_be_filled)(array.shape, array.dtype, after)
        if jnp.issubdtype(array.dtype, jnp.inexact)
        else None
        for array, halo in zip(arrays, halos, strict=True)
    ]
    dparams, darrays = lax.scan(body, (zeros, darrays), jnp.arange(count))[0]
    return (dparams, *darrays)


in_overlapping_chunks.defvjp(_forward, _backward)


def _to_be_filled(shape: tuple[int, ...], dtype: Any, after: Array) -> Array:
    """Return an array whose every value will be replaced, made when `after` is there.

    Zeros depend on nothing, so a compiler may make those of all stretches, backward ones too, before all else, and keep
    them until they are wanted: as many states more at the peak.
    """
    return jnp.broadcast_to(after[(0,) * after.ndim].astype(dtype), shape)


def _zeros(shape: tuple[int, ...], dtype: Any, after: Array) -> Array:
    """Return zeros, made when `after` is there; NaN if it begins with NaN."""
    return jnp.broadcast_to(jnp.minimum(jnp.abs(after[(0,) * after.ndim]), 0).astype(dtype), shape)


def _apply(
    function: Function, count: int, halos: tuple[int, ...], params: Any, arrays: tuple[Array, ...], number: Any
) -> Any:
    return function(params, *_cut(arrays, count, halos, number))


def _cut(arrays: tuple[Array, ...], count: int, halos: tuple[int, ...], number: Any) -> list[Array]:
    return [_read(array, count, halo, number) for array, halo in zip(arrays, halos, strict=True)]


def _read(array: Array, count: int, halo: int, number: Any) -> Array:
    length = array.shape[1] // count
    return read_stretch(array, number * length, length, halo)


def _write(array: Array, value: Array, number: Any) -> Array:
    return lax.dynamic_update_slice_in_dim(array, value, number * value.shape[1], axis=1)
