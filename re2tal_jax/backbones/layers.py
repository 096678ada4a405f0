"""Parts that backbones share: layer norm in float32, linear maps, patches, the MLP branch, drop path, padding.

A *branch* is a callable pytree `branch(x, *, key, aux)` that returns an array of x's shape (see `branch.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from re2tal_jax.errors import ConfigError
from re2tal_jax.exact import at_least_float32
from re2tal_jax.kept import keep


def check_dtype(dtype: DTypeLike) -> None:
    """Raise ConfigError if `dtype` is none to compute in."""
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:  # no dtype's name
        floating = False
    if not floating:
        raise ConfigError(f"dtype = {dtype!r}: allowed are float32, bfloat16, float16 and (with x64 enabled) float64.")


class LayerNorm(nnx.Module):
    """Layer norm over the last axis: computed in at least float32 from the input as it is, returned in `dtype`.

    `nnx.LayerNorm` rounds its input to `dtype` first: bfloat16 leaves 8 bits of a state that may be far from 0.
    The default epsilon is that of PyTorch.
    """

    def __init__(self, features: int, *, epsilon: float = 1e-5, dtype: DTypeLike, rngs: nnx.Rngs):
        self.epsilon, self.dtype = epsilon, jnp.dtype(dtype)
        self.scale = nnx.Param(jax.nn.initializers.ones(rngs.params(), (features,), jnp.float32))
        self.bias = nnx.Param(jax.nn.initializers.zeros(rngs.params(), (features,), jnp.float32))

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Normalise each position by mean and variance of its channels."""
        precise = at_least_float32(x.dtype)
        x = x.astype(precise)
        centred = x - x.mean(-1, keepdims=True)
        deviation = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        scale, bias = self.scale[...].astype(precise), self.bias[...].astype(precise)
        return (centred * deviation * scale + bias).astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Float[Array, "*B C"], kernel: Float[Array, "C D"], precision: Any) -> Float[Array, "*B D"]:
    """Return x @ kernel; in its derivative the product over tokens has the narrower of its factors first.

    It is the first one that XLA transposes on a CPU. There is a derivative in reverse alone.
    """
    return jnp.matmul(x, kernel, precision=precision)


def _product_forward(x: Array, kernel: Array, precision: Any) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, precision), (x, kernel)


def _product_backward(precision: Any, factors: tuple[Array, Array], dresult: Array) -> tuple[Array, Array]:
    x, kernel = factors
    dx = jnp.matmul(dresult, kernel.T, precision=precision)
    narrow, wide = (x, dresult) if x.shape[-1] <= dresult.shape[-1] else (dresult, x)
    tokens = tuple(range(x.ndim - 1))
    dkernel = jnp.tensordot(narrow, wide, axes=(tokens, tokens), precision=precision)
    return dx, dkernel if narrow is x else dkernel.T


_product.defvjp(_product_forward, _product_backward)


def _dot_general(
    x: Array, kernel: Array, dimensions: Any, precision: Any = None, out_sharding: Any = None
) -> Float[Array, "*B D"]:
    """Return `_product` as flax calls it: always with the last axis of x and the first of the kernel."""
    del dimensions
    if out_sharding is not None:
        raise ValueError(f"out_sharding = {out_sharding}: a linear map here takes none.")
    return _product(x, kernel, precision)


Linear = partial(nnx.Linear, dot_general=_dot_general)
"""A linear map of the last axis: that of flax, with a derivative that a CPU takes faster."""


def pad_to_multiple(x: Float[Array, "B *size C"], multiple: Sequence[int]) -> Float[Array, "B *padded C"]:
    """Append zeros at the end of the axes between batch and channels until each is a multiple of its number."""
    ends = [-size % m for size, m in zip(x.shape[1:-1], multiple, strict=True)]
    if not any(ends):
        return x
    return jnp.pad(x, [(0, 0), *((0, end) for end in ends), (0, 0)])


class PatchProjection(nnx.Module):
    """Map each patch of a video to a token: a convolution whose stride is its kernel, as the matrix product it is."""

    def __init__(self, patch_size: Sequence[int], in_channels: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        time, height, width = map(int, patch_size)
        self.patch_size, self.dtype = (time, height, width), jnp.dtype(dtype)
        shape = (time * height * width * in_channels, dim)
        kernel = jax.nn.initializers.lecun_normal()(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel.reshape(time, height, width, in_channels, dim))
        self.bias = nnx.Param(jax.nn.initializers.zeros(rngs.params(), (dim,), jnp.float32))

    def __call__(self, video: Float[Array, "B F H W C"]) -> Float[Array, "B T h w D"]:
        """Return one token a patch in the compute dtype; F, H and W are multiples of the patch."""
        p, q, r = self.patch_size
        x = rearrange(video.astype(self.dtype), "b (t p) (h q) (w r) c -> b t h w (p q r c)", p=p, q=q, r=r)
        kernel = rearrange(self.kernel[...].astype(self.dtype), "p q r c d -> (p q r c) d")
        return x @ kernel + self.bias[...].astype(self.dtype)


class Mlp(nnx.Module):
    """The second branch of a transformer block: layer norm, linear, GELU, linear, applied to each token alone."""

    def __init__(self, features: int, hidden: int, *, epsilon: float = 1e-5, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = LayerNorm(features, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.fc1 = Linear(features, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, features, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*B C"], *, key: PRNGKeyArray | None = None, aux: Any = None
    ) -> Float[Array, "*B C"]:
        """Map (…, C) to (…, C) in the compute dtype."""
        return self.fc2(gelu(keep(self.fc1(self.norm(x)))))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the exact GELU, computed in at least float32.

    By erf, as PyTorch does: erfc, which `jax.nn.gelu` takes, costs several times as much to compute and to derive.
    """
    precise = x.astype(at_least_float32(x.dtype))
    return (0.5 * precise * (1 + jax.lax.erf(precise * 0.5**0.5))).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DropPath:
    """Stochastic depth (arXiv 1603.09382) around a branch: drop its whole output for some samples of a batch.

    What is kept is scaled by 1 / (1 - rate), so the expectation is the branch itself. `rate` is an array: branches that
    differ only in their rate are alike to a chain. The mask is a function of the key alone, so a recomputation with
    the same key repeats it.

    B1 of the reference is not copied: there a seed fixed at construction drops the same samples at every step.
    """

    branch: Any
    rate: Any  # Float[Array, ""], but transformations put placeholders in its place

    def tiles(self, shape: tuple[int, ...]) -> Any:
        """Return the tiles of the branch (None: it has none)."""
        return self.branch.tiles(shape) if hasattr(self.branch, "tiles") else None

    def prepare(self) -> "DropPath":
        """Prepare the branch."""
        return replace(self, branch=self.branch.prepare()) if hasattr(self.branch, "prepare") else self

    def __call__(
        self, x: Float[Array, "B ..."], *, key: PRNGKeyArray | None, aux: Any, **tile: Any
    ) -> Float[Array, "B ..."]:
        """Run the branch; without a key (evaluation) nothing is dropped.

        Tiles hold all samples of a batch, so each of them drops the same ones.
        """
        if key is None:
            return self.branch(x, key=None, aux=aux, **tile)
        mask_key, branch_key = jax.random.split(key)
        y = self.branch(x, key=branch_key, aux=aux, **tile)
        share = 1 - jax.lax.stop_gradient(self.rate)
        mask = jax.random.bernoulli(mask_key, share, (x.shape[0],) + (1,) * (x.ndim - 1))
        precise = y.astype(at_least_float32(y.dtype))  # in bfloat16, 1 / share would be off by up to 0.4 %
        return jnp.where(mask, precise / share.astype(precise.dtype), 0).astype(y.dtype)
