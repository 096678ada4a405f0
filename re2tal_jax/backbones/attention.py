"""Softmax attention of many heads, with a derivative that goes over the logits as seldom as it can.

Autodiff keeps the weights of a softmax in float32 and takes its sums over whole logits. Here the weights are kept as
they were before they summed to 1, in the precision they are used in, and the derivative takes its row sums over the
result's channels instead of over the keys (FlashAttention, arXiv 2205.14135, appendix B.4).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float, Shaped

from re2tal_jax.exact import at_least_float32
from re2tal_jax.kept import keep

MASKED = -100.0  # the reference's logit offset between regions that a shift has made neighbours; not -inf


@jax.custom_vjp
def attend(
    q: Float[Array, "*B h Q d"],
    k: Float[Array, "*B h N d"],
    v: Float[Array, "*B h N d"],
    bias: Float[Array, "h Q N"] | None = None,
    regions: Shaped[Array, "*B N"] | None = None,
) -> Float[Array, "*B h Q d"]:
    """Return for each query the mean of the values, weighted by a softmax in at least float32 over the keys.

    Args:
        q: queries; they are divided by sqrt(d).
        k: keys.
        v: values.
        bias: added to the logits of a head; its gradient is summed in at least float32.
        regions: numbers; tokens of different regions are kept apart. Queries and keys are the same tokens.

    It has a derivative in reverse alone: `jax.jvp` and what builds on it raise.
    """
    return _forward(q, k, v, bias, regions)[0]


def split_heads(
    qkv: Float[Array, "*B t _"], pattern: str, **sizes: int
) -> tuple[Float[Array, "*C h t d"], Float[Array, "*C h t d"], Float[Array, "*C h t d"]]:
    """Return queries, keys and values by head, of their product with all channels of the three.

    Args:
        qkv: thirds of the last axis are those of q, k and v, a head's channels side by side.
        pattern: of einops, for each of them.
        sizes: names in the pattern with their sizes.

    Autodiff would add three cotangents of the size of all, and have the sum in as many layouts as products read it.
    There is a derivative in reverse alone.
    """
    return _split(qkv, pattern, tuple(sizes.items()))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _split(qkv: Array, pattern: str, sizes: tuple[tuple[str, int], ...]) -> Any:
    return tuple(rearrange(part, pattern, **dict(sizes)) for part in jnp.split(qkv, 3, axis=-1))


def _split_forward(qkv: Array, pattern: str, sizes: tuple[tuple[str, int], ...]) -> tuple[Any, None]:
    return _split(qkv, pattern, sizes), None


def _split_backward(pattern: str, sizes: tuple[tuple[str, int], ...], _: None, dparts: tuple[Array, ...]) -> Any:
    del sizes  # the parts have them
    back = " -> ".join(reversed(pattern.split(" -> ")))
    return (jnp.concatenate([rearrange(dpart, back) for dpart in dparts], axis=-1),)


_split.defvjp(_split_forward, _split_backward)


def _forward(q: Array, k: Array, v: Array, bias: Array | None, regions: Array | None) -> tuple[Array, Any]:
    precise = at_least_float32(q.dtype)
    logits = _apart(jnp.einsum("...qd,...kd->...qk", _scaled(q), k, preferred_element_type=precise))
    if bias is not None:
        logits = logits + bias.astype(precise)
    if regions is not None:  # an offset for all heads: a choice between logits is one for each head
        same = regions[..., None, :, None] == regions[..., None, None, :]
        logits = logits + jnp.where(same, 0, MASKED).astype(precise)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = _apart(weights.astype(v.dtype))
    result = jnp.einsum("...qk,...kd->...qd", weights, v, preferred_element_type=precise) / total
    total, result = keep((total, result))
    return result.astype(v.dtype), (q, k, v, bias, weights, total, result)


def _backward(residuals: Any, dresult: Array) -> tuple[Array | None, ...]:
    q, k, v, bias, weights, total, result = residuals
    precise = total.dtype
    dresult = (dresult.astype(precise) / total).astype(v.dtype)
    # Of the rounded dresult, as dweights are: what all values have in common then cancels in their difference.
    rows = (dresult.astype(precise) * result).sum(axis=-1, keepdims=True)
    dv = jnp.einsum("...qk,...qd->...kd", weights, dresult)
    dweights = jnp.einsum("...qd,...kd->...qk", dresult, v, preferred_element_type=precise)
    dlogits = weights.astype(precise) * (dweights - rows)
    dbias = None if bias is None else _sum_leading(dlogits, bias.ndim).astype(bias.dtype)
    dlogits = dlogits.astype(q.dtype)
    dq = _scaled(jnp.einsum("...qk,...kd->...qd", dlogits, k))
    dk = jnp.einsum("...qk,...qd->...kd", dlogits, _scaled(q))
    return dq, dk, dv, dbias, None


attend.defvjp(_forward, _backward)


def _apart(x: Float[Array, "*B Q N"]) -> Float[Array, "*B Q N"]:
    """Return logits or weights in a form that XLA's compiler for GPUs does not merge with what comes after.

    It else has a product add to the bias, written out for every window before, and keeps weights in float32 for the
    derivative, as they were before they were rounded: half as much memory again, and a third more traffic.
    """
    return _apart_p.bind(x)


# Not `lax.platform_dependent`: elsewhere that leaves a conditional of one branch, across which CPUs skip roundings in
# one pass and not in the other, and a state is not undone exactly.
_apart_p = Primitive("apart")
_apart_p.def_impl(lambda x: x)
_apart_p.def_abstract_eval(lambda x: x)
batching.defvectorized(_apart_p)
mlir.register_lowering(_apart_p, lambda _, x: [x])
mlir.register_lowering(_apart_p, mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False), platform="cuda")


def _scaled(q: Float[Array, "*B d"]) -> Float[Array, "*B d"]:
    return q * q.shape[-1] ** -0.5


def _sum_leading(x: Float[Array, "..."], kept: int) -> Float[Array, "..."]:
    """Sum over all axes but the last `kept`: as a product with ones, which XLA does faster on a CPU."""
    rows = x.reshape(-1, *x.shape[-kept:])
    if len(rows) == 1:
        return rows[0]
    return jnp.einsum("n,n...->...", jnp.ones(len(rows), x.dtype), rows, precision=jax.lax.Precision.HIGHEST)
