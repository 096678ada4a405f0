"""The contract that every backbone of the registry keeps; a new one adds its small form to SMALL."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert.rules import flatten
from re2tal_jax.backbones import BACKBONES, NETWORKS, build_backbone, list_backbones
from re2tal_jax.errors import ConfigError
from re2tal_jax.frames import Frames, normalized
from re2tal_jax.reversible import PLAIN, REWIRED, rewire
from tests.parameters import drawn

SMALL: dict[str, dict[str, Any]] = {  # by the beginning of the name: arguments of a network that runs in a moment
    "video_swin": {"embed_dim": 4, "depths": (2, 1), "num_heads": (1, 2), "window_size": (2, 3, 3)},
    "slowfast": {"depths": (2, 1), "base_channels": 8, "slow_inflate": (0, 1), "fast_inflate": (1, 1)},
    "slowonly": {"depths": (2, 1), "base_channels": 4, "inflate": (0, 1)},
    "vit": {"patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_frames": 4, "image_size": 16},
}
VIDEO = (2, 8, 24, 32, 3)


def family(name: str) -> str:
    return next((prefix for prefix in SMALL if name.startswith(prefix)), name)


FAMILIES = sorted({family(name) for name in list_backbones()})


def small(name: str, *, rewired: bool = True) -> Any:
    one = next(n for n in list_backbones() if family(n) == name)
    return drawn(lambda: build_backbone(one, rewired=rewired, **SMALL[name]))


@functools.partial(jax.jit, static_argnums=0)
def apply(graph: nnx.GraphDef, state: nnx.State, video: jax.Array) -> Any:
    return nnx.merge(graph, state).intermediates(video)


def run(model: nnx.Module, video: jax.Array) -> Any:
    """Features and intermediates; compiled once for each structure."""
    return apply(*nnx.split(model), video)


def pathways(features: Any) -> tuple[Any, ...]:
    """The features of every pathway; most backbones have one."""
    return features if isinstance(features, tuple) else (features,)


@pytest.fixture(scope="module", params=FAMILIES)
def name(request) -> str:
    """Each family of backbones in turn."""
    return request.param


@pytest.fixture(scope="module")
def plain(name: str) -> Any:
    """Its small ordinary network."""
    return small(name, rewired=False)


@pytest.fixture(scope="module")
def video() -> jax.Array:
    return jax.random.normal(jax.random.key(0), VIDEO)


@pytest.mark.parametrize("variant", list_backbones())
def test_published_form_is_built_with_parameters_alone(variant: str):
    model = nnx.eval_shape(lambda: build_backbone(variant))
    _, parameters, rest = nnx.split(model, nnx.Param, ...)
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype(jnp.float32)}
    assert not jax.tree.leaves(rest)
    assert model.wiring == REWIRED
    assert model.out_channels > 0


def test_stored_frames_give_what_the_normalized_video_gives(name):
    """Features and the gradient of every parameter; of Video Swin also where frames fill no last patch."""
    model = small(name)
    graph, state = nnx.split(model)
    shape = (2, 7, *VIDEO[2:]) if name == "video_swin" else VIDEO
    stored = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    frames = Frames(jnp.asarray(stored), (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))

    @jax.jit
    def gradients(state: nnx.State, video: Any) -> Any:
        def loss(state: nnx.State) -> tuple[jax.Array, Any]:
            features = nnx.merge(graph, state)(video)
            return sum(jnp.mean(jnp.sin(feature)) for feature in pathways(features)), features

        return jax.grad(loss, has_aux=True, allow_int=True)(state)

    got, expected = gradients(state, frames), gradients(state, normalized(frames))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, expected)


def test_features_have_the_announced_shape(plain, video):
    features, named = run(plain, video)
    assert isinstance(features, tuple) == isinstance(plain.temporal_stride, tuple)
    strides = plain.temporal_stride if isinstance(plain.temporal_stride, tuple) else (plain.temporal_stride,)
    for feature, stride in zip(pathways(features), strides, strict=True):
        assert feature.shape[:2] == (VIDEO[0], VIDEO[1] // stride)
        assert feature.ndim == 5
        assert feature.dtype == jnp.float32
    assert sum(feature.shape[-1] for feature in pathways(features)) == plain.out_channels
    assert named
    called = jax.eval_shape(plain, video)
    assert [f.shape for f in pathways(called)] == [f.shape for f in pathways(features)]


def test_plain_and_rewired_have_the_same_parameters(name, plain):
    rewired = small(name)
    assert (plain.wiring, rewired.wiring) == (PLAIN, REWIRED)
    ours, theirs = flatten(plain), flatten(rewired)
    assert set(ours) == set(theirs)
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path])


def test_rewiring_changes_the_function_and_the_way_back_restores_it(plain, video):
    features, _ = run(plain, video)
    rewired = rewire(plain)
    assert all(a is b for a, b in zip(flatten(plain).values(), flatten(rewired).values(), strict=True))
    restored, _ = run(rewire(rewired, PLAIN), video)
    for before, between, after in zip(
        pathways(features), pathways(run(rewired, video)[0]), pathways(restored), strict=True
    ):
        assert jnp.abs(between - before).max() > 1e-3
        np.testing.assert_array_equal(after, before)


def test_samples_of_a_batch_do_not_meet(plain, video):
    features, altered = run(plain, video)[0], run(plain, video.at[1].set(-video[1]))[0]
    for one, two in zip(pathways(features), pathways(altered), strict=True):
        np.testing.assert_array_equal(one[0], two[0])
        assert jnp.abs(one[1] - two[1]).max() > 1e-3


def test_names_are_those_of_the_registry():
    assert list_backbones() == sorted(NETWORKS)
    assert set(BACKBONES) - set(NETWORKS) == {"features"}
    assert {"video_swin_tiny", "video_swin_small", "video_swin_base", "video_swin_large"} <= set(BACKBONES)
    assert {f"{name}_r{layers}" for name in ("slowfast", "slowonly") for layers in (50, 101, 152)} <= set(BACKBONES)
    assert {"vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant"} <= set(BACKBONES)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="'video_swin_tiny'"):
        build_backbone("video_swin_tinny")
