"""What every registered localizer promises (re2tal_jax.localizers)."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from re2tal_jax.errors import ConfigError
from re2tal_jax.localizers import build_localizer, list_localizers

# One small setting per registered name: adding a localizer means adding its line.
SMALL: dict[str, dict[str, Any]] = {
    "actionformer": {
        "channels": 8,
        "arch": (1, 1, 1),
        "num_heads": 2,
        "max_seq_len": 16,
        "regression_range": ((0, 4), (4, 10000)),
        "path_drop_rate": 0.5,
    },
    "vsgn": {
        "channels": 8,
        "strides": (2, 4),
        "num_neighbours": 2,
        "anchor_scales": (1.0, 2.0),
        "head_convs": 1,
        "num_groups": 4,
    },
}
WITHOUT_DROPOUT = {"vsgn"}  # its key changes nothing
BATCH, LENGTH, CHANNELS, CLASSES, ROWS = 2, 12, 6, 3, 2
# compile time is the cost of these tests

SEGMENTS = np.array([[[2, 8], [1, 3]], [[4, 6], [0, 12]]], np.float32)
LABELS = np.array([[0, 2], [1, 1]], np.int32)
ALL, NONE = np.ones((BATCH, ROWS), bool), np.zeros((BATCH, ROWS), bool)
FULL = np.ones((BATCH, LENGTH), bool)


@functools.cache
def small(name: str, dtype: str = "float32") -> SimpleNamespace:
    """A small localizer with everything that tests need of it in one compiled program."""
    module = build_localizer(
        name, in_channels=CHANNELS, num_classes=CLASSES, **SMALL[name], dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)
    )
    graph, parameters = nnx.split(module)

    @jax.jit
    def run(parameters, features, mask, segments, labels, gt_mask, state, key):
        def loss(parameters, features):
            merged = nnx.merge(graph, parameters)
            outputs = merged(features, mask, key=key)
            losses, new_state = merged.loss(outputs, segments, labels, gt_mask, state, train=True)
            return losses["total"], (losses, new_state, merged.decode(outputs))

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, (losses, new_state, decoded)), gradients = gradient(parameters, features)
        return {"losses": losses, "state": new_state, "decoded": decoded, "gradients": gradients}

    def call(features=None, mask=FULL, segments=SEGMENTS, labels=LABELS, gt_mask=ALL, key=0):
        x = np.random.default_rng(0).normal(size=(BATCH, LENGTH, CHANNELS)) if features is None else features
        arguments = jax.tree.map(jnp.asarray, (np.float32(x), mask, segments, labels, gt_mask))
        return SimpleNamespace(**run(parameters, *arguments, module.initial_state(), jax.random.key(key)))

    return SimpleNamespace(module=module, call=call)


@pytest.fixture(params=list_localizers())
def localizer(request) -> SimpleNamespace:
    return small(request.param)


def test_every_localizer_has_a_small_setting_here():
    assert sorted(SMALL) == list_localizers()


def test_losses_are_float32_scalars_with_a_total(localizer):
    losses = localizer.call().losses
    assert "total" in losses
    assert all(v.shape == () and v.dtype == jnp.float32 and np.isfinite(v) for v in losses.values())


def test_decoding_gives_segments_probabilities_and_which_are_real(localizer):
    proposals, scores, valid = localizer.call().decoded
    number = proposals.shape[1]
    assert proposals.shape == (BATCH, number, 2)
    assert scores.shape == (BATCH, number, CLASSES)
    assert valid.shape == (BATCH, number)
    assert valid.dtype == bool
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (proposals[..., 0] <= proposals[..., 1]).all()


def test_state_keeps_its_structure_and_is_not_stored_in_the_module(localizer):
    before = localizer.module.initial_state()
    after = localizer.call().state
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), before) == jax.tree.map(lambda a: (a.shape, a.dtype), after)
    np.testing.assert_equal(jax.device_get(localizer.module.initial_state()), jax.device_get(before))
    variables = [leaf for _, leaf in nnx.to_flat_state(nnx.state(localizer.module))]
    assert all(isinstance(leaf, nnx.Param) for leaf in variables)


def test_a_batch_without_ground_truth_has_finite_losses_and_gradients(localizer):
    result = localizer.call(gt_mask=NONE)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((result.losses, result.gradients)))


def test_ground_truth_of_no_rows_equals_masked_rows(localizer):
    module, state = localizer.module, localizer.module.initial_state()
    outputs = jax.jit(module)(jnp.zeros((BATCH, LENGTH, CHANNELS)), jnp.asarray(FULL))
    loss = jax.jit(functools.partial(module.loss, train=True))
    masked = loss(outputs, *map(jnp.asarray, (SEGMENTS, LABELS, NONE)), state)
    segments, labels = jnp.zeros((BATCH, 0, 2)), jnp.zeros((BATCH, 0), jnp.int32)
    empty = loss(outputs, segments, labels, jnp.zeros((BATCH, 0), bool), state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), masked, empty)


def test_masked_rows_of_ground_truth_never_matter(localizer):
    only_first = np.array([[True, False]] * BATCH)
    clean = localizer.call(gt_mask=only_first)
    segments, labels = SEGMENTS.copy(), LABELS.copy()
    segments[:, 1], labels[:, 1] = np.nan, 10**6
    dirty = localizer.call(segments=segments, labels=labels, gt_mask=only_first)
    jax.tree.map(np.testing.assert_array_equal, clean.losses, dirty.losses)
    jax.tree.map(np.testing.assert_array_equal, clean.gradients, dirty.gradients)


def test_a_sample_without_a_real_snippet_is_finite_and_leaves_the_others_alone(localizer):
    half = FULL.copy()
    half[1] = False
    with_masked, without = localizer.call(mask=half), localizer.call(mask=FULL)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(vars(with_masked)))
    assert not with_masked.decoded[2][1].any()
    for masked, full in zip(with_masked.decoded, without.decoded, strict=True):
        np.testing.assert_array_equal(masked[0], full[0])
    nothing = localizer.call(mask=~FULL)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(vars(nothing)))


def test_every_parameter_and_the_features_get_a_gradient(localizer):
    moved: dict[str, bool] = {}
    for key in range(4):  # drop path may take a branch away from every sample of a small batch
        parameters, features = localizer.call(key=key).gradients
        assert np.abs(features).max() > 0
        for path, gradient in nnx.to_flat_state(parameters):
            name = ".".join(map(str, path))
            moved[name] = moved.get(name, False) or bool(np.abs(gradient[...]).max() > 0)
    assert [name for name, anything in moved.items() if not anything] == []


@pytest.mark.parametrize("name", list_localizers())
def test_one_key_repeats_and_another_differs(name):
    first, again, other = (float(small(name).call(key=key).losses["total"]) for key in (0, 0, 3))
    assert first == again
    assert (first == other) == (name in WITHOUT_DROPOUT)


@pytest.mark.parametrize("name", list_localizers())
def test_bfloat16_computes_float32_losses_and_scores(name):
    low, high = small(name, "bfloat16").call(), small(name).call()
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves((low.losses, low.state, low.decoded[:2])))
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(low.gradients))
    assert float(low.losses["total"]) == pytest.approx(float(high.losses["total"]), rel=0.02)


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="'actionformer'"):
        build_localizer("actionforner")
