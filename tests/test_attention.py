"""Softmax attention: values that can be checked by hand, and its own derivative against autodiff of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from jax.sharding import SingleDeviceSharding

from re2tal_jax.accelerators import absent_devices, compile_options, is_available
from re2tal_jax.backbones.attention import MASKED, attend, split_heads

WINDOWS, HEADS, TOKENS, CHANNELS = 3, 2, 5, 4


def formula(q, k, v, bias=None, regions=None):
    """The same, as papers write it."""
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias
    if regions is not None:
        same = regions[..., None, :, None] == regions[..., None, None, :]
        logits = jnp.where(same, logits, logits + MASKED)
    return jax.nn.softmax(logits, axis=-1) @ v


def inputs(dtype) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Queries, keys and values, a bias, and regions: one window whole, one in two parts, one in three."""
    draw = np.random.default_rng(0).normal
    shape = (WINDOWS, HEADS, TOKENS, CHANNELS)
    regions = jnp.array([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 2, 1]], jnp.int32)
    bias = jnp.asarray(draw(size=(HEADS, TOKENS, TOKENS)))
    return [jnp.asarray(draw(size=shape), dtype) for _ in range(3)], bias, regions


def test_a_query_takes_the_mean_of_the_values_by_the_softmax_of_its_logits():
    q = jnp.array([[np.log(3) * np.sqrt(2), 0], [0, 0]], jnp.float32)
    k = jnp.array([[1, 0], [0, 1]], jnp.float32)
    v = jnp.array([[4], [8]], jnp.float32)
    np.testing.assert_allclose(attend(q, k, v), [[5], [6]], rtol=1e-6)  # weights 3/4, 1/4 and 1/2, 1/2


def test_tokens_of_other_regions_count_for_nothing():
    q = k = jnp.zeros((1, 1, 3, 1))
    v = jnp.array([[[[3.0], [5.0], [11.0]]]])
    np.testing.assert_allclose(attend(q, k, v, None, jnp.array([[0, 1, 0]])), [[[[7], [5], [7]]]], rtol=1e-6)


def test_large_logits_do_not_overflow():
    q, k, v = jnp.full((1, 2, 1), 1e3), jnp.array([[[1e3], [0.0]]]), jnp.array([[[4.0], [8.0]]])
    np.testing.assert_array_equal(attend(q, k, v), [[[4], [4]]])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_regions", [False, True])
def test_derivative_equals_autodiff_of_the_formula(with_bias: bool, with_regions: bool):
    with jax.enable_x64(True):
        heads, bias, regions = inputs(jnp.float64)
        moving = (*heads, bias) if with_bias else tuple(heads)
        kept = regions if with_regions else None
        expected, pull = jax.vjp(lambda *a: formula(*a, **({} if kept is None else {"regions": kept})), *moving)
        given, own_pull = jax.vjp(lambda *a: attend(*a, *(() if with_bias else (None,)), kept), *moving)
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=given.shape))
        np.testing.assert_allclose(given, expected, rtol=1e-12, atol=1e-14)
        for own, auto in zip(own_pull(cotangent), pull(cotangent), strict=True):
            np.testing.assert_allclose(own, auto, rtol=1e-11, atol=1e-13)


def test_in_bfloat16_logits_and_the_gradient_of_the_bias_are_summed_in_float32():
    heads, bias, regions = inputs(jnp.bfloat16)
    bias = bias.astype(jnp.float32)
    many = [jnp.tile(x, (200, 1, 1, 1)) for x in heads]

    def loss(function, q, k, v, bias):
        return function(q, k, v, bias, jnp.tile(regions, (200, 1))).astype(jnp.float32).sum()

    own = jax.grad(lambda b: loss(attend, *many, b))(bias)
    exact = jax.grad(lambda b: loss(formula, *(x.astype(jnp.float32) for x in many), b))(bias)
    assert own.dtype == jnp.float32
    np.testing.assert_allclose(own, exact, atol=0.01 * float(jnp.abs(exact).max()))
    assert attend(*heads, bias, regions).dtype == jnp.bfloat16


@pytest.mark.parametrize("offset", [0.0, 3.0, 10.0])
def test_bfloat16_gradients_are_good_whatever_all_values_share(offset):
    """A bias of the values is such an offset; it changes no weight, and is large beside what the gradients are of."""
    draw = np.random.default_rng(0).normal
    heads = [jnp.asarray(draw(size=(4, 2, 98, 32)), jnp.bfloat16) for _ in range(3)]
    heads[2] = heads[2] + jnp.asarray(offset * draw(size=32), jnp.bfloat16)
    bias = jnp.asarray(draw(size=(2, 98, 98)), jnp.float32)
    cotangent = draw(size=heads[2].shape)

    def gradients(function, dtype):
        def loss(*moving):
            return jnp.sum(function(*moving).astype(jnp.float32) * cotangent.astype(jnp.float32))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*(x.astype(dtype) for x in heads), bias)

    exact = gradients(formula, jnp.float32)
    for own, true in zip(gradients(attend, jnp.bfloat16), exact, strict=True):
        error = np.asarray(own, np.float32) - np.asarray(true)
        assert np.linalg.norm(error) <= 0.008 * np.linalg.norm(np.asarray(true))  # 0.005 seen, by autodiff 0.016


@pytest.mark.parametrize("with_regions", [False, True])
def test_a_gpu_holds_logits_once_in_float32_and_weights_in_bfloat16(with_regions: bool):
    """Left alone, XLA writes the bias out for every window and keeps the weights in float32: 2.5 to 3 times logits."""
    if not is_available("h100"):
        pytest.skip("no compiler for h100: pip install '.[aot]'")
    device = absent_devices("h100")[0]
    windows, heads, tokens, channels = 36, 3, 392, 32

    def array(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def gradients(q, k, v, bias, regions, dresult):
        result, pull = jax.vjp(lambda *a: attend(*a, regions if with_regions else None), q, k, v, bias)
        return result, pull(dresult)

    head = array((windows, heads, tokens, channels), jnp.bfloat16)
    bias, regions = array((heads, tokens, tokens), jnp.float32), array((windows, tokens), jnp.float32)
    lowered = jax.jit(gradients).lower(head, head, head, bias, regions, head)
    assert "optimization_barrier" in lowered.as_text()
    stats = lowered.compile(compile_options(device)).memory_analysis()
    logits = 4 * windows * heads * tokens**2
    assert 1.5 * logits < stats.temp_size_in_bytes < 1.75 * logits  # and cuBLAS's own workspace


def test_nothing_is_kept_apart_on_a_cpu():
    q, k, v = inputs(jnp.bfloat16)[0]
    text = jax.jit(attend).lower(q, k, v).as_text()
    assert "optimization_barrier" not in text
    assert "stablehlo.case" not in text
    both = jax.vmap(attend)(q, k, v)
    np.testing.assert_array_equal(both, attend(q, k, v))


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [("n t (h d) -> n h t d", {"h": 2}), ("n t (g h d) -> g n h t d", {"g": 3, "h": 2})],
)
def test_split_heads_is_a_rearrangement_and_so_is_its_derivative(pattern, sizes):
    qkv = jax.random.normal(jax.random.key(0), (2, 5, 3 * 12))
    got, pull = jax.vjp(lambda x: split_heads(x, pattern, **sizes), qkv)
    expected, pull_expected = jax.vjp(
        lambda x: tuple(rearrange(part, pattern, **sizes) for part in jnp.split(x, 3, axis=-1)), qkv
    )
    cotangents = tuple(jax.random.normal(jax.random.key(i), part.shape) for i, part in enumerate(expected))
    for a, b in zip((*got, *pull(cotangents)), (*expected, *pull_expected(cotangents)), strict=True):
        np.testing.assert_array_equal(a, b)
