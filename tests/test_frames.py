"""Frames on their way into a backbone: normalised stretch by stretch, as if the whole video had been."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from re2tal_jax.errors import DataError
from re2tal_jax.frames import Frames, in_stretches, normalized

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def video(frames: int = 12, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, frames, 4, 5, 3)).astype(dtype)


def expected_of(stored: np.ndarray) -> np.ndarray:
    return (stored.astype(np.float64) - MEAN) / STD


def times(weight, x):
    return weight * x


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_stretches_are_those_of_the_normalized_video(count, dtype):
    stored = video(dtype=dtype)
    got = in_stretches(times, count, jnp.float32(2), Frames(jnp.asarray(stored), MEAN, STD))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 2 * expected_of(stored), rtol=1e-5, atol=1e-5)


def test_a_video_that_is_normalized_passes_unchanged():
    stored = jnp.asarray(expected_of(video()), jnp.float32)
    np.testing.assert_array_equal(in_stretches(times, 3, jnp.float32(1), stored), stored)


def moving_sum(weight, x):
    return weight * (x[:, :-2] + x[:, 1:-1] + x[:, 2:])


@pytest.mark.parametrize(("stride", "count"), [(1, 1), (1, 4), (2, 3), (3, 2)])
def test_what_is_beyond_the_video_is_zero_after_it_is_normalized(stride, count):
    stored = video()
    got = in_stretches(moving_sum, count, jnp.float32(1), Frames(jnp.asarray(stored), MEAN, STD), halo=1, stride=stride)
    x = np.pad(expected_of(stored)[:, ::stride], [(0, 0), (1, 1)] + [(0, 0)] * 3)
    np.testing.assert_allclose(got, x[:, :-2] + x[:, 1:-1] + x[:, 2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda stored: Frames(jnp.asarray(stored), MEAN, STD), expected_of])
def test_frames_added_at_the_end_are_zeros(wrap):
    got = in_stretches(times, 2, jnp.float32(1), wrap(video(frames=11)), end=1)
    np.testing.assert_allclose(got[:, :11], expected_of(video(frames=11)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[:, 11], 0)


def test_the_gradient_of_parameters_and_of_float_frames_is_that_of_the_whole():
    stored = jnp.asarray(video(dtype=np.float32))

    def by_stretches(weight, stored):
        x = in_stretches(moving_sum, 4, weight, Frames(stored, MEAN, STD), halo=1)
        return jnp.sum(jnp.sin(x))

    def whole(weight, stored):
        x = jnp.pad(normalized(Frames(stored, MEAN, STD)), [(0, 0), (1, 1)] + [(0, 0)] * 3)
        return jnp.sum(jnp.sin(moving_sum(weight, x)))

    got, expected = (jax.grad(f, (0, 1))(jnp.float32(0.7), stored) for f in (by_stretches, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("end", [0, 1])
def test_uint8_frames_have_the_same_gradient_of_parameters(end):
    def gradient(dtype):
        frames = Frames(jnp.asarray(video(frames=12 - end, dtype=dtype)), MEAN, STD)
        run = lambda weight: jnp.sum(jnp.sin(in_stretches(moving_sum, 4, weight, frames, halo=1, end=end)))  # noqa: E731
        return jax.jit(jax.grad(run))(jnp.float32(0.7))

    np.testing.assert_allclose(gradient(np.uint8), gradient(np.float32), rtol=1e-5)


def test_integers_that_nothing_normalizes_are_refused():
    with pytest.raises(DataError, match=r"video of uint8 is not normalised: .*Frames\(video, mean, std\)"):
        in_stretches(times, 1, jnp.float32(1), jnp.asarray(video()))


@pytest.mark.parametrize(("count", "stride", "end"), [(5, 1, 0), (3, 3, 0), (6, 1, 1)])
def test_stretches_that_do_not_divide_are_refused(count, stride, end):
    with pytest.raises(ValueError, match=rf"12 \+ {end} frames are not {count} stretches"):
        in_stretches(times, count, 1.0, Frames(jnp.asarray(video()), MEAN, STD), stride=stride, end=end)
