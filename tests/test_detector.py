"""Pooling and the auxiliary loss; the whole detector is replayed by tests/parity/e2e.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from re2tal_jax.detector import Detector, interpolation_weights, pool_to_snippets
from re2tal_jax.frames import normalized
from re2tal_jax.types import Batch


@pytest.mark.parametrize(
    ("length", "new_length", "values", "expected"),
    [
        (4, 2, [0, 1, 2, 3], [0.5, 2.5]),
        (2, 4, [0, 1], [0, 0.25, 0.75, 1]),
        (3, 3, [5, 6, 7], [5, 6, 7]),
        (1, 3, [2], [2, 2, 2]),
    ],
)
def test_interpolation_keeps_sample_centres(length, new_length, values, expected):
    np.testing.assert_allclose(np.asarray(values) @ interpolation_weights(length, new_length), expected, atol=1e-6)


def test_pooling_averages_space_and_interpolates_time():
    features = jnp.arange(2 * 4 * 2 * 2 * 1, dtype=jnp.bfloat16).reshape(2, 4, 2, 2, 1)
    pooled = pool_to_snippets(features, 2)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled[0, :, 0], [(1.5 + 5.5) / 2, (9.5 + 13.5) / 2])


class Backbone(nnx.Module):
    """Two pathways of different length, as in SlowFast."""

    def __init__(self):
        self.out_channels = 5

    def __call__(self, video, *, key=None):
        grey = normalized(video).mean(-1, keepdims=True)
        return jnp.repeat(grey[:, ::4], 3, -1), jnp.repeat(grey, 2, -1)


class Localizer(nnx.Module):
    def initial_state(self):
        return {"seen": jnp.zeros(())}

    def __call__(self, features, mask, *, key=None):
        return features

    def loss(self, outputs, gt_segments, gt_labels, gt_mask, state, *, train):
        return {"total": outputs.mean()}, {"seen": state["seen"] + 1}

    def decode(self, outputs):
        raise AssertionError("not used here")


def make_batch() -> Batch:
    return Batch(
        video=jnp.zeros((1, 8, 2, 2, 3), jnp.uint8),
        frame_size=jnp.full((1, 2), 2.0),
        mask=jnp.asarray([[True, True, True, False]]),
        gt_segments=jnp.asarray([[[1.0, 2.5], [0.0, 4.0]]]),
        gt_labels=jnp.asarray([[1, 0]]),
        gt_mask=jnp.asarray([[True, False]]),
        window=jnp.zeros(1, jnp.int32),
    )


def make_detector(weight: float) -> Detector:
    return Detector(
        Backbone(), Localizer(), num_snippets=4, num_classes=2, snippet_loss_weight=weight, rngs=nnx.Rngs(0)
    )


def test_pathways_are_pooled_apart_and_joined():
    video = jax.random.uniform(jax.random.key(0), (1, 8, 2, 2, 3)) * 255
    assert make_detector(0.0).features(video).shape == (1, 4, 5)


def test_snippet_loss_is_the_mean_entropy_over_valid_snippets_and_classes():
    """Snippet centres .5, 1.5, 2.5, 3.5: the segment [1, 2.5) of class 1 covers the second; the fourth is padding."""
    detector, batch = make_detector(0.5), make_batch()
    detector.snippet_head.kernel[...] = jnp.zeros_like(detector.snippet_head.kernel[...])
    detector.snippet_head.bias[...] = jnp.asarray([0.0, 1.0])
    video = jnp.zeros((1, 8, 2, 2, 3))
    losses, state = detector.loss(video, batch, detector.initial_state(), key=jax.random.key(0))
    softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731
    mean = (3 * softplus(0) + 2 * softplus(1) + softplus(-1)) / 6
    np.testing.assert_allclose(losses["snippet"], 0.5 * mean, rtol=1e-6)
    assert state["seen"] == 1


def test_without_the_auxiliary_loss_there_is_no_head_for_it():
    detector = make_detector(0.0)
    assert not nnx.to_flat_state(nnx.state(detector))
    losses, _ = detector.loss(jnp.zeros((1, 8, 2, 2, 3)), make_batch(), detector.initial_state(), key=jax.random.key(0))
    assert set(losses) == {"total"}
