"""Losses by hand, against float64 differences, and without pairs that nobody asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from re2tal_jax.losses import diou_loss, moving_normalizer, sigmoid_focal_loss, smooth_labels


def pairs(*rows: tuple[float, float]) -> jax.Array:
    return jnp.asarray(rows, jnp.float32)


@pytest.mark.parametrize(
    ("logit", "target", "by_hand"),
    [
        (0.0, 1.0, 0.25 * 0.25 * np.log(2)),  # alpha (1 - p)^2 (-log p), p = 1/2
        (0.0, 0.0, 0.75 * 0.25 * np.log(2)),
        (np.log(3), 1.0, 0.25 * (1 / 16) * np.log(4 / 3)),  # p = 3/4
        (np.log(3), 0.0, 0.75 * (9 / 16) * np.log(4)),
        (0.0, 0.9, 0.3 * 0.25 * np.log(2)),  # alpha_t = .25 * .9 + .75 * .1, p_t = 1/2 whatever the target
        (np.log(3), 0.5, 0.5 * 0.25 * (np.log(4 / 3) + np.log(4)) / 2),  # p_t = 1/2
    ],
)
def test_focal_loss_equals_its_formula(logit, target, by_hand):
    np.testing.assert_allclose(sigmoid_focal_loss(jnp.float32(logit), jnp.float32(target)), by_hand, rtol=1e-6)


def test_focal_loss_and_gradient_are_finite_for_extreme_logits():
    logits = jnp.asarray([-1e4, -100.0, 100.0, 1e4], jnp.float32)
    for target in (0.0, 0.05, 1.0):
        value, gradient = jax.value_and_grad(lambda x, t=target: sigmoid_focal_loss(x, jnp.full(4, t)).sum())(logits)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_smoothing_pulls_positives_and_negatives_toward_one_in_k_plus_one():
    # K = 4, smoothing 0.1: 1 -> 0.9 + 0.1 / 5, 0 -> 0.1 / 5
    smoothed = smooth_labels(jnp.asarray([1.0, 0.0, 0.0, 1.0]), 0.1)
    np.testing.assert_allclose(smoothed, [0.92, 0.02, 0.02, 0.92], rtol=1e-6)


@pytest.mark.parametrize(
    ("predicted", "target", "by_hand"),
    [
        ((2, 6), (2, 6), 0.0),
        ((0, 4), (2, 6), 1 - 2 / 6 + (2 / 6) ** 2),  # overlap 2 of union 6, centres 2 apart in 6
        ((0, 1), (3, 4), 1 + (3 / 4) ** 2),  # apart
        ((1, 2), (0, 4), 1 - 1 / 4 + (0.5 / 4) ** 2),  # inside
        ((3, 3), (0, 4), 1 + (1 / 4) ** 2),  # a point
        ((3, 3), (3, 3), 1.0),  # two equal points: union and enclosing length are clamped, not 0 / 0
    ],
)
def test_diou_loss_equals_its_formula(predicted, target, by_hand):
    np.testing.assert_allclose(diou_loss(pairs(predicted), pairs(target))[0], by_hand, rtol=1e-6, atol=1e-7)


def test_diou_gradient_is_finite_where_segments_touch_or_vanish():
    predicted = pairs((3, 3), (0, 2), (2, 4), (0, 4), (5, 1))
    target = pairs((3, 3), (2, 4), (2, 4), (1, 3), (1, 5))
    gradient = jax.grad(lambda x: diou_loss(x, target).sum())(predicted)
    assert np.isfinite(gradient).all()


def test_diou_makes_no_pairs():
    """The largest intermediate array has as many elements as the segments, not their square."""
    segments = jax.ShapeDtypeStruct((1000, 2), jnp.float32)
    program = jax.make_jaxpr(lambda a, b: jax.grad(lambda x: diou_loss(x, b).sum())(a))(segments, segments)
    sizes = [variable.aval.size for equation in program.eqns for variable in equation.outvars]
    assert max(sizes) <= 2000


def focal64(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    p = 1 / (1 + np.exp(-x))
    p_t = p * t + (1 - p) * (1 - t)
    return -(0.25 * t + 0.75 * (1 - t)) * (1 - p_t) ** 2 * (t * np.log(p) + (1 - t) * np.log(1 - p))


def diou64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    overlap = np.clip(np.minimum(a[:, 1], b[:, 1]) - np.maximum(a[:, 0], b[:, 0]), 0, None)
    union = a[:, 1] - a[:, 0] + b[:, 1] - b[:, 0] - overlap
    enclosing = np.maximum(a[:, 1], b[:, 1]) - np.minimum(a[:, 0], b[:, 0])
    return 1 - overlap / union + ((a.sum(1) - b.sum(1)) / 2 / enclosing) ** 2


@pytest.mark.parametrize("loss", ["focal", "diou"])
def test_gradient_equals_float64_differences(loss):
    rng = np.random.default_rng(0)
    if loss == "focal":
        ours, oracle = sigmoid_focal_loss, focal64
        x, target = rng.normal(size=50) * 3, rng.uniform(size=50)
    else:
        ours, oracle = diou_loss, diou64
        x, target = (np.cumsum(rng.uniform(0.5, 5, (50, 2)), axis=1) for _ in range(2))
    gradient = jax.grad(lambda x: ours(x, jnp.asarray(target, jnp.float32)).sum())(jnp.asarray(x, jnp.float32))
    for direction in np.random.default_rng(1).normal(size=(3, *x.shape)):
        step = 1e-5 * direction
        difference = (oracle(x + step, target) - oracle(x - step, target)).sum() / 2e-5
        assert np.vdot(gradient, direction) == pytest.approx(difference, rel=1e-5, abs=1e-5)


def test_losses_are_float32_for_lower_precision():
    low = jnp.ones((3, 2), jnp.bfloat16)
    assert sigmoid_focal_loss(low, low).dtype == jnp.float32
    assert diou_loss(low, low).dtype == jnp.float32


@pytest.mark.parametrize(("num_positive", "after"), [(50, 95.0), (0, 90.1), (200, 110.0)])
def test_normalizer_moves_a_tenth_of_the_way_and_counts_at_least_one(num_positive, after):
    moved = moving_normalizer(jnp.float32(100), jnp.float32(num_positive), 0.9)
    np.testing.assert_allclose(moved, after, rtol=1e-6)
