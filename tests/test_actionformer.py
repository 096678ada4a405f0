"""ActionFormer against golden data, and what padding, length and settings may and may not change."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert.dialects.actionformer import OPENTAD
from re2tal_jax.config import build
from re2tal_jax.errors import ConfigError
from re2tal_jax.localizers.actionformer import ActionFormer
from re2tal_jax.localizers.layers import MaskedConv
from tests.parity.__main__ import replay
from tests.parity.replay import convert_state_dict

GOLDEN = Path(__file__).parent / "golden" / "actionformer_local.npz"  # case c0 of parity/actionformer_thumos_local19
# compile time is the cost of these tests

CHANNELS, CLASSES = 6, 3
SMALL = {
    "channels": 8,
    "arch": (1, 1, 1),
    "num_heads": 2,
    "window": (5, -1),
    "max_seq_len": 16,
    "regression_range": ((0, 4), (4, 10000)),
}


def generic(module: nnx.Module) -> nnx.Module:
    """The module with every parameter moved off its initial value: branch scales near one, biases not zero."""
    graph, state = nnx.split(module)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda p: jnp.asarray(p + rng.uniform(0.3, 0.7, p.shape), jnp.float32), state)
    return nnx.merge(graph, moved)


@functools.cache
def small(**changes) -> ActionFormer:
    return generic(ActionFormer(CHANNELS, CLASSES, **{**SMALL, **changes}, rngs=nnx.Rngs(0)))


@functools.cache
def forward(**changes):
    return jax.jit(small(**changes))


def inputs(valid: int, length: int, *, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Features of `valid` snippets, zero behind them, and their mask."""
    features = np.random.default_rng(seed).normal(size=(1, valid, CHANNELS)).astype(np.float32)
    tail = length - valid
    return jnp.asarray(np.pad(features, ((0, 0), (0, tail), (0, 0)))), jnp.asarray(np.arange(length) < valid)[None]


def same(a, b, end: int) -> None:
    np.testing.assert_allclose(np.asarray(a)[:, :end], np.asarray(b)[:, :end], rtol=1e-5, atol=1e-5)


def test_golden_case_is_reproduced():
    """Outputs, targets, losses, proposals, and norm and signature of every gradient, at the manifest's tolerances."""
    rows = replay(GOLDEN)
    assert len(rows) > 350
    assert [row for row in rows if not row.passed] == []


def test_more_masked_snippets_change_no_valid_output():
    """12 valid snippets padded to 16 and to 20: every level has masked positions behind its valid ones in both."""
    short, long = forward()(*inputs(12, 16)), forward()(*inputs(12, 20))
    assert [m.shape[1] for m in long.masks] == [20, 10]
    for level, valid in enumerate((12, 6)):
        same(short.features[level], long.features[level], valid)
        same(short.logits[level], long.logits[level], valid)
        same(short.offsets[level], long.offsets[level], valid)


def test_the_first_masked_snippet_changes_outputs_through_two_norm_biases_alone():
    """A block's first norm and the FPN norm are not masked, as published: behind the end the convolutions after them
    see the norm's bias, or zero where no snippet is left. Nothing else tells one from the other.
    """
    full, padded = inputs(16, 16), inputs(16, 20)
    for level, last in enumerate((15, 7)):
        difference = forward()(*full).logits[level][:, last] - forward()(*padded).logits[level][:, last]
        assert np.abs(difference).max() > 1e-3
    graph, state = nnx.split(small())
    unbiased = [
        (p, jax.tree.map(jnp.zeros_like, v) if p[-2:] == ("norm1", "bias") or p[0] == "fpn_norms" else v)
        for p, v in nnx.to_flat_state(state)
    ]
    unbiased = jax.jit(nnx.merge(graph, nnx.from_flat_state(unbiased)))
    full, padded = unbiased(*full), unbiased(*padded)
    for level, valid in enumerate((16, 8)):
        same(full.features[level], padded.features[level], valid)
        same(full.logits[level], padded.logits[level], valid)
        same(full.offsets[level], padded.offsets[level], valid)


def test_masked_features_reach_half_a_kernel_and_no_further():
    """The first convolution does not mask its input: what lies one snippet behind the end leaks, what lies two, not."""
    features, mask = inputs(12, 16)
    clean = forward()(features, mask)
    far = forward()(features.at[:, 13:].set(1e6), mask)
    near = forward()(features.at[:, 12].set(10.0), mask)
    for level, valid in enumerate((12, 6)):
        same(clean.logits[level], far.logits[level], valid)
    assert np.abs(clean.features[0][:, 11] - near.features[0][:, 11]).max() > 1e-3


def test_padding_inside_equals_padding_outside():
    features, mask = inputs(10, 10)
    outside = jnp.pad(features, ((0, 0), (0, 6), (0, 0))), jnp.pad(mask, ((0, 0), (0, 6)))
    jax.tree.map(np.testing.assert_array_equal, forward()(features, mask), forward()(*outside))


@pytest.mark.parametrize(
    ("settings", "length", "padded"),
    [
        ({}, 3, 16),  # shorter: to max_seq_len
        ({}, 16, 16),
        ({}, 17, 20),  # longer: to a multiple of lcm(1 * 2 * 2, 2)
        ({"window": (3, 9), "max_seq_len": 16}, 17, 32),  # lcm(2, 2 * 2 * 4)
        ({"window": (7, 5), "max_seq_len": 24}, 25, 48),  # lcm(6, 8): neither 6 nor 8 alone serves both levels
        ({"window": -1, "max_seq_len": 10}, 11, 12),
    ],
)
def test_lengths_are_padded_to_what_windows_and_strides_divide(settings, length, padded):
    if "window" not in settings:
        settings = {"window": (5, -1)}
    module = nnx.eval_shape(lambda: ActionFormer(CHANNELS, CLASSES, **{**SMALL, **settings}, rngs=nnx.Rngs(0)))
    assert module.padded_length(length) == padded


def test_heads_over_joined_levels_equal_heads_over_each():
    head = small().head
    rng = np.random.default_rng(1)
    levels = tuple(jnp.asarray(rng.normal(size=(2, t, 8)), jnp.float32) for t in (8, 4))
    masks = tuple(jnp.asarray(np.arange(t) < np.array([[t], [t - 1]])) for t in (8, 4))
    logits, offsets = jax.jit(head)(levels, masks)

    def alone(convs: list[MaskedConv], last, x, mask):
        for conv in convs:
            x = conv(x, mask)
        return last(x)

    for level, (x, mask) in enumerate(zip(levels, masks, strict=True)):
        cls, reg = alone(head.cls_convs, head.cls_head, x, mask), alone(head.reg_convs, head.reg_head, x, mask)
        np.testing.assert_allclose(logits[level], cls, rtol=1e-5, atol=1e-5)
        scaled = np.maximum(reg * head.scales[level].scale[...], 0)
        np.testing.assert_allclose(offsets[level], scaled, rtol=1e-5, atol=1e-5)


def test_loss_divides_by_moving_normalizer_in_training_and_by_positives_in_evaluation():
    module = small(label_smoothing=0.1, reg_loss_weight=2.0)
    outputs = forward(label_smoothing=0.1, reg_loss_weight=2.0)(*inputs(12, 16))
    loss = jax.jit(module.loss, static_argnames="train")
    # length 4, centre 5: points 4, 5, 6 of level 0; level 1 begins at distance 4, farther than any
    gt = jnp.asarray([[[3.0, 7.0]]]), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    train, state = loss(outputs, *gt, {"loss_normalizer": jnp.float32(100)}, train=True)
    evaluation, kept = loss(outputs, *gt, {"loss_normalizer": jnp.float32(100)}, train=False)
    np.testing.assert_allclose(state["loss_normalizer"], 0.9 * 100 + 0.1 * 3, rtol=1e-6)
    assert kept["loss_normalizer"] == 100
    for name in ("cls_loss", "reg_loss", "total"):
        np.testing.assert_allclose(train[name] * 90.3, evaluation[name] * 3, rtol=1e-5)
    np.testing.assert_allclose(train["total"], train["cls_loss"] + train["reg_loss"], rtol=1e-6)
    plain = jax.jit(small().loss, static_argnames="train")(
        outputs, *gt, {"loss_normalizer": jnp.float32(100)}, train=True
    )[0]
    np.testing.assert_allclose(train["reg_loss"], 2 * plain["reg_loss"], rtol=1e-6)
    assert train["cls_loss"] != plain["cls_loss"]


def test_decoding_moves_points_by_strides():
    """Level 0: points 0 … 15 by stride 1; level 1: 0, 2 … 14 by stride 2."""
    module = small()
    outputs = forward()(*inputs(12, 16))
    proposals, scores, valid = module.decode(outputs)
    start, end = np.asarray(outputs.offsets[1])[0, 3]
    np.testing.assert_allclose(proposals[0, 16 + 3], [6 - 2 * start, 6 + 2 * end], rtol=1e-6)
    np.testing.assert_allclose(scores[0, 2], 1 / (1 + np.exp(-np.asarray(outputs.logits[0])[0, 2])), rtol=1e-5)
    np.testing.assert_array_equal(valid[0], [*(np.arange(16) < 12), *(np.arange(8) < 6)])


def test_every_class_starts_at_the_prior_probability():
    module = ActionFormer(CHANNELS, CLASSES, **SMALL, prior_prob=0.02, rngs=nnx.Rngs(0))
    _, scores, _ = module.decode(jax.jit(module)(jnp.zeros((1, 16, CHANNELS)), jnp.ones((1, 16), bool)))
    np.testing.assert_allclose(scores, 0.02, rtol=1e-4)


def test_position_codes_are_refused_beyond_their_length_in_training_alone():
    module, (features, mask) = small(use_abs_pos=True), inputs(20, 20)
    with pytest.raises(ConfigError, match=r"20 snippets are more than max_seq_len = 16"):
        jax.eval_shape(lambda: module(features, mask, key=jax.random.key(0)))
    jax.eval_shape(lambda: module(features, mask))


def test_features_of_another_width_are_refused_with_both_shapes():
    with pytest.raises(ConfigError, match=r"\(1, 16, 5\) with mask \(1, 16\): expected \(B, T, 6\)"):
        small()(jnp.zeros((1, 16, 5)), jnp.ones((1, 16), bool))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "channels = 8 cannot be divided among num_heads = 3"),
        ({"window": 4}, "window = 4: expected -1 .* or an odd number >= 3, for example 5"),
        ({"window": 1}, "window = 1: expected"),
        ({"window": (5, 5, 5)}, "has 3 entries; arch = .* makes 2 levels"),
        ({"window": 7}, "max_seq_len = 16 is no multiple of 6, which level 0 .* multiple of 12, for example 24"),
        ({"window": -1, "max_seq_len": 15}, "max_seq_len = 15 is no multiple of 2, which level 1 .* for example 16"),
        ({"arch": (1, 1, 2)}, "regression_range has 2 entries .* 3 levels"),
        ({"arch": (0, 1, 1)}, "no embedding convolution to turn in_channels = 6 into channels = 8"),
        ({"regression_range": ((4, 0), (4, 8))}, r"entry \(4, 0\): expected \(shortest, longest\)"),
        ({"kernel_size": 2}, "kernel_size = 2: expected an odd number"),
        ({"scale_factor": 3}, "scale_factor = 3: expected an even number"),
        ({"head_convs": 0, "head_channels": 4}, "head_convs = 0 with head_channels = 4"),
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0"),
        ({"path_drop_rate": -0.1}, "path_drop_rate = -0.1"),
        ({"prior_prob": 1.0}, "prior_prob = 1.0"),
        ({"reg_loss_weight": 0.0}, "reg_loss_weight = 0.0: expected a positive number"),
        ({"center_sample_radius": 0.0}, "center_sample_radius = 0.0"),
        ({"max_seq_len": 0}, "max_seq_len = 0"),
    ],
)
def test_impossible_settings_are_refused_with_value_and_fix(changes, message):
    if changes.get("arch", (1, 1, 1))[2] != 1:
        changes = {"window": -1, **changes}
    with pytest.raises(ConfigError, match=message):
        ActionFormer(CHANNELS, CLASSES, **{**SMALL, **changes}, rngs=nnx.Rngs(0))


def test_configuration_builds_it_from_lists():
    section = {**SMALL, "window": [5, -1], "arch": [1, 1, 1], "regression_range": [[0, 4], [4, 10000]]}
    module = nnx.eval_shape(
        lambda: build(
            ActionFormer,
            section,
            path="config.localizer",
            in_channels=CHANNELS,
            num_classes=CLASSES,
            dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    assert module.strides == (1, 2)


def test_full_size_checkpoint_fits_name_by_name(parity_dir):
    """Every key of the published ActivityNet detector behind its backbone, without allocating it."""
    path = parity_dir / "optim" / "re2tal__e2e_anet_re2tal_actionformer_swin_tiny.state_dict_keys.json"
    keys = json.loads(path.read_text())
    state_dict = {
        key: np.broadcast_to(np.float32(0), shape)
        for key, (shape, _) in keys.items()
        if not key.startswith("backbone.")
    }
    module = nnx.eval_shape(
        lambda: ActionFormer(768, 1, channels=256, use_abs_pos=True, max_seq_len=192, rngs=nnx.Rngs(0))
    )
    targets = {".".join(map(str, p)): leaf.shape for p, leaf in nnx.to_flat_state(nnx.state(module))}
    values = convert_state_dict(state_dict, OPENTAD.names, targets)
    assert sum(v.size for v in values.values()) == sum(
        v.size for key, v in state_dict.items() if key != "rpn_head.loss_normalizer"
    )
