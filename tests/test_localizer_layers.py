"""Attention, convolutions and drop path against plain oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from re2tal_jax.localizers.layers import (
    AffineDropPath,
    Conv1d,
    TransformerBlock,
    dropout,
    global_attention,
    local_attention,
    max_pool,
    sinusoid,
)

# compile time is the cost of these tests
local = jax.jit(local_attention, static_argnums=4)
everywhere = jax.jit(global_attention)


def attention64(query, key, value, visible):
    """Dense float64 attention; `visible` (B, T, T) says which key each query sees."""
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    logits = np.where(visible[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)


def band(length, window):
    distance = np.abs(np.arange(length)[:, None] - np.arange(length)[None])
    return distance <= window // 2


def inputs(length, *, batch=2, heads=2, width=3, seed=0):
    rng = np.random.default_rng(seed)
    qkv = [rng.normal(size=(batch, length, heads, width)) for _ in range(3)]
    valid = np.arange(length) < np.array([length, length - length // 3])[:, None]
    return qkv, valid


@pytest.mark.parametrize(("length", "window"), [(12, 3), (13, 5), (4, 9), (20, 7)])
def test_local_attention_sees_valid_keys_within_half_a_window(length, window):
    qkv, valid = inputs(length)
    want = attention64(*qkv, band(length, window) & valid[:, None, :] | np.eye(length, dtype=bool))
    got = local(*(jnp.asarray(a, jnp.float32) for a in qkv), jnp.asarray(valid), window)
    np.testing.assert_allclose(np.asarray(got)[valid], want[valid], rtol=1e-4, atol=1e-6)


def test_the_band_of_a_window_of_three():
    """A constant query weighs all visible keys alike; one-hot values print the mask."""
    zeros, values = jnp.zeros((1, 5, 1, 5)), jnp.eye(5)[None, :, None, :]
    seen = local(zeros, zeros, values, jnp.array([[True, True, True, True, False]]), 3)[0, :, 0] > 0
    np.testing.assert_array_equal(
        seen[:4],
        [
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 0],
        ],
    )


def test_a_window_over_everything_is_global_attention():
    qkv, valid = inputs(10)
    q, k, v = (jnp.asarray(a, jnp.float32) for a in qkv)
    wide, all_keys = local(q, k, v, jnp.asarray(valid), 21), everywhere(q, k, v, jnp.asarray(valid))
    np.testing.assert_allclose(np.asarray(wide)[valid], np.asarray(all_keys)[valid], rtol=1e-4, atol=1e-6)


def test_attention_without_a_valid_key_is_finite_with_finite_gradient():
    qkv, _ = inputs(6)
    q, k, v = (jnp.asarray(a, jnp.float32) for a in qkv)
    nothing = jnp.zeros((2, 6), bool)
    for attend in (global_attention, lambda *a: local_attention(*a, 3)):
        loss = jax.grad(lambda q, k, v, f=attend: f(q, k, v, nothing).sum(), argnums=(0, 1, 2))
        gradients = jax.jit(loss)(q, k, v)
        assert all(np.isfinite(g).all() for g in gradients)


def test_local_attention_gradient_equals_float64_differences():
    qkv, valid = inputs(11)
    visible = band(11, 5) & valid[:, None, :] | np.eye(11, dtype=bool)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=qkv[0].shape) * valid[..., None, None]

    def loss(q, k, v):
        return (local_attention(q, k, v, jnp.asarray(valid), 5) * jnp.asarray(weights, jnp.float32)).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*(jnp.asarray(a, jnp.float32) for a in qkv))
    for argument, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        sides = []
        for sign in (1, -1):
            moved = [a + sign * 1e-5 * direction if i == argument else a for i, a in enumerate(qkv)]
            sides.append((attention64(*moved, visible) * weights).sum())
        assert np.vdot(gradient, direction) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4)


def test_local_attention_memory_is_linear_in_length():
    def temporary_bytes(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, length), jnp.bool_)
        compiled = jax.jit(lambda q, k, v, m: local_attention(q, k, v, m, 9)).lower(q, q, q, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(256), temporary_bytes(1024)
    assert long <= 4.2 * short


@pytest.mark.parametrize(("stride", "depthwise"), [(1, True), (2, True), (4, True), (1, False)])
def test_convolution_equals_its_sum(stride, depthwise):
    kernel_size = stride + 1 if stride > 1 else 3
    conv = Conv1d(4, 4, kernel_size, stride=stride, depthwise=depthwise, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)
    kernel, half = np.asarray(conv.kernel[...]), kernel_size // 2
    kernel = kernel * np.eye(4) if depthwise else kernel  # a depthwise kernel is a diagonal one
    padded = np.pad(x, ((0, 0), (half, half), (0, 0)))
    want = np.stack(
        [sum(padded[:, t + i] @ kernel[i] for i in range(kernel_size)) for t in range(0, 8, stride)], axis=1
    )
    np.testing.assert_allclose(conv(jnp.asarray(x)), want, rtol=1e-5, atol=1e-6)


def test_max_pool_is_centred_on_every_second_position():
    x = jnp.asarray([5.0, 1, 2, -3, -4, -5])[None, :, None]
    np.testing.assert_array_equal(max_pool(x, 2)[0, :, 0], [5, 2, -3])


def test_drop_path_drops_whole_samples_by_key_and_keeps_its_scale_in_evaluation():
    path = AffineDropPath(3, 0.5)
    x = jnp.ones((64, 2, 3))
    np.testing.assert_allclose(path(x, key=None), 1e-4, rtol=1e-6)
    masks = []
    for seed in range(2):
        dropped = np.asarray(path(x, key=jax.random.key(seed)))
        kept = dropped[:, 0, 0] > 0
        np.testing.assert_allclose(dropped, np.where(kept[:, None, None], 2e-4, np.zeros((64, 2, 3))), rtol=1e-6)
        assert 16 <= kept.sum() <= 48
        masks.append(kept)
    assert (masks[0] != masks[1]).any()


def test_dropout_keeps_the_mean_and_can_drop_channels():
    x = jnp.ones((8, 50, 50))
    np.testing.assert_allclose(dropout(x, 0.2, jax.random.key(0)).mean(), 1.0, atol=0.02)
    channels = np.asarray(dropout(x, 0.5, jax.random.key(0), (8, 1, 50)))
    assert (channels == channels[:, :1]).all()
    assert 0 < channels[:, 0].mean() < 2


def test_path_drop_rate_zero_has_no_scales():
    def names(rate):
        block = TransformerBlock(
            4, 1, window=-1, stride=1, path_drop_rate=rate, proj_drop=0.0, dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
        return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(block))}

    assert names(0.1) - names(0.0) == {"drop_path_attn.scale", "drop_path_mlp.scale"}


def test_position_codes_are_sine_and_cosine_over_root_channels():
    codes = sinusoid(3, 4, 3)
    np.testing.assert_allclose(codes[0], [0, 0.5, 0, 0.5])
    np.testing.assert_allclose(codes[2], np.array([np.sin(2), np.cos(2), np.sin(0.02), np.cos(0.02)]) / 2, rtol=1e-6)


def test_longer_sequences_interpolate_position_codes_between_sample_centres():
    # two codes over four snippets lie at 0, 1/4, 3/4 and 1 of the way from the first to the second
    first, second = sinusoid(2, 4, 2)
    want = [first, 0.75 * first + 0.25 * second, 0.25 * first + 0.75 * second, second]
    np.testing.assert_allclose(sinusoid(4, 4, 2), want, rtol=1e-6)
