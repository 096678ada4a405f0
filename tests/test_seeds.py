import jax
import numpy as np
import pytest
from flax import nnx

from re2tal_jax.backbones import build_backbone
from re2tal_jax.seeds import Seeded


def test_parameters_are_those_that_nnx_draws():
    small = {"embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": (2, 2, 2)}
    drawn, expected = (
        nnx.to_pure_dict(nnx.state(build_backbone("video_swin_tiny", **small, rngs=rngs), nnx.Param))
        for rngs in (Seeded(3), nnx.Rngs(3))
    )
    jax.tree.map(np.testing.assert_array_equal, drawn, expected)


def test_a_trace_draws_the_same_keys():
    def keys(rngs):
        return [jax.random.key_data(key) for key in (rngs.params(), rngs(), rngs.noise())]

    inside = jax.jit(lambda: keys(Seeded(1)))()
    for got, want in zip(inside, keys(nnx.Rngs(1)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_parts_of_a_seed_differ():
    first, other, again = (jax.random.key_data(Seeded(3, part=part)()).tolist() for part in (1, 2, 1))
    assert first == again != other
    assert jax.random.key_data(Seeded(3)()).tolist() not in (first, other)


def test_it_is_true_and_no_stream_to_keep():
    assert Seeded(0)
    np.testing.assert_array_equal(*(jax.random.key_data(rngs["noise"]()) for rngs in (Seeded(2), nnx.Rngs(2))))
    with pytest.raises(TypeError, match=r"give nnx\.Rngs"):
        nnx.Dropout(0.5, rngs=Seeded(0))


def test_what_python_asks_of_an_object_is_no_stream():
    with pytest.raises(AttributeError, match="__array__"):
        Seeded(0).__array__  # noqa: B018
