"""VSGN against golden data, its names in PyTorch, and what its parts promise each other."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert.dialects.vsgn import OPENTAD
from checkpoints_convert.rules import fill, flatten, plan, to_state_dict
from re2tal_jax.config import build
from re2tal_jax.errors import ConfigError
from re2tal_jax.localizers.vsgn import VSGN, VSGNOutputs, weigh_by_boundaries
from tests.parity.__main__ import replay
from tests.parity.replay import convert_state_dict

GOLDEN = Path(__file__).parent / "golden" / "vsgn_graph.npz"  # parity/vsgn_thumos_gcn without its full gradients
# compile time is the cost of these tests

CHANNELS, CLASSES = 6, 3
SMALL = {
    "channels": 8,
    "strides": (2, 4),
    "anchor_scales": (1.0, 2.0),
    "head_convs": 1,
    "num_groups": 4,
    "loss_normalizer": 10.0,
}


@functools.cache
def small(num_classes: int = CLASSES) -> VSGN:
    """A localizer with random weights, biases included; numpy draws them without compiling anything."""
    module = nnx.eval_shape(lambda: VSGN(CHANNELS, num_classes, **SMALL, rngs=nnx.Rngs(0)))
    return fill(module, random_parameters(module))


def random_parameters(module: nnx.Module) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.uniform(-0.5, 0.5, value.shape).astype(np.float32) for path, value in flatten(module).items()}


def outputs_of(num_classes: int = CLASSES, *, snippets: int = 8, **changes) -> VSGNOutputs:
    """What a network that knows nothing would say of one window: anchors as boxes, all scores one half."""
    module = small(num_classes)
    shapes = jax.eval_shape(module, jnp.zeros((1, snippets, CHANNELS)), jnp.ones((1, snippets), bool))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    anchors = [[p * s + s / 2 - (w - 1) / 2, p * s + s / 2 + (w - 1) / 2] for s in (2, 4) for p in range(snippets // s)
               for w in (s, 2 * s)]  # fmt: skip
    boxes = jnp.asarray([anchors], jnp.float32)
    known = {"anchors": boxes[0], "boxes": boxes, "moved": boxes, "mask": jnp.ones((1, snippets), bool)}
    return dataclasses.replace(zeros, **known | changes)


def loss_of(outputs: VSGNOutputs, segments, labels, num_classes: int = CLASSES, *, train: bool = True):
    gt = jnp.asarray([segments], jnp.float32).reshape(1, -1, 2), jnp.asarray([labels], jnp.int32).reshape(1, -1)
    return compiled_loss(num_classes, train)(outputs, *gt, jnp.ones(gt[1].shape, bool), small().initial_state())


@functools.cache
def compiled_loss(num_classes: int, train: bool):
    return jax.jit(functools.partial(small(num_classes).loss, train=train))


def test_golden_case_is_reproduced():
    """Outputs, losses, normalizers, and norm and signature of every gradient, at the manifest's tolerances."""
    rows = replay(GOLDEN)
    assert len(rows) > 200
    assert [row for row in rows if not row.passed] == []


def test_every_key_of_the_published_detector_has_its_place(parity_dir):
    file = parity_dir / "optim" / "vsgn__anet_tsp.state_dict_keys.json"
    shapes = {key: tuple(shape) for key, (shape, _) in json.loads(file.read_text()).items()}
    published = nnx.eval_shape(lambda: VSGN(512, 1, rngs=nnx.Rngs(0)))
    report = plan(shapes, OPENTAD.names, {path: value.shape for path, value in flatten(published).items()}).report
    assert report.complete, str(report)
    assert set(report.mapped) == set(shapes)


@pytest.mark.parametrize("num_neighbours", [0, 2])
def test_parameters_come_back_from_pytorchs_names_as_they_were(num_neighbours):
    build = functools.partial(VSGN, CHANNELS, CLASSES, **SMALL, num_neighbours=num_neighbours)
    ours = random_parameters(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    theirs = to_state_dict(ours, OPENTAD.names)
    back = convert_state_dict(theirs, OPENTAD.names, {path: value.shape for path, value in ours.items()})
    assert back.keys() == ours.keys()
    jax.tree.map(np.testing.assert_array_equal, dict(ours), back)


def test_padding_inside_equals_padding_outside():
    """Ten snippets are padded to twelve, a multiple of the coarsest stride."""
    rng = np.random.default_rng(0)
    features, mask = jnp.asarray(rng.normal(size=(1, 10, CHANNELS)), jnp.float32), jnp.ones((1, 10), bool)
    forward = jax.jit(small())
    inside = forward(features, mask)
    outside = forward(jnp.pad(features, ((0, 0), (0, 2), (0, 0))), jnp.pad(mask, ((0, 0), (0, 2))))
    assert inside.mask.tolist() == [[True] * 10 + [False] * 2]
    jax.tree.map(np.testing.assert_array_equal, inside, outside)


def test_losses_are_divided_by_moving_numbers_of_positives():
    """One box of twelve is a segment's: the numbers go from 10 to 0.9 * 10 + 0.1 * 1, in evaluation as in training."""
    outputs = outputs_of(moved=outputs_of().boxes + jnp.array([0.0, 0.5]))
    segment = [0.5, 4.0]  # overlap with the anchor (0.5, 3.5) of stride 4: 3 of 3 + 1 + 3.5 - 3, more than with others
    losses, state = loss_of(outputs, [segment], [1])
    assert jax.tree.map(float, state) == pytest.approx(dict.fromkeys(state, 9.1))
    assert float(losses["reg_loss"]) == pytest.approx((1 - 3 / 3.5) / 9.1, rel=1e-5)
    assert float(losses["corner_loss"]) == pytest.approx(0.0, abs=1e-6)
    # logits are all equal: the mean over the positive and the mean over the others are log 4 each
    assert float(losses["cls_loss"]) == pytest.approx(2 * np.log(4), rel=1e-5)
    assert float(losses["boundary_loss"]) == pytest.approx(3 * np.log(2), rel=1e-5)
    assert float(losses["total"]) == pytest.approx(sum(float(v) for k, v in losses.items() if k != "total"), rel=1e-6)
    again = loss_of(outputs, [segment], [1], train=False)
    jax.tree.map(np.testing.assert_array_equal, (losses, state), again)


def test_without_ground_truth_only_background_is_learnt():
    losses, state = loss_of(outputs_of(), [], [])
    assert float(losses["reg_loss"]) == float(losses["corner_loss"]) == 0.0
    assert float(losses["cls_loss"]) == pytest.approx(np.log(4), rel=1e-5)
    assert float(losses["boundary_loss"]) == pytest.approx(3 * np.log(2), rel=1e-5)
    assert jax.tree.map(float, state) == pytest.approx(dict.fromkeys(state, 9.1))  # at least one is counted


def test_one_class_has_a_focal_loss_and_no_background():
    outputs = outputs_of(1)
    assert outputs.logits.shape[-1] == 1
    losses, _ = loss_of(outputs, [[0.5, 4.0]], [0], 1)
    positive, negative = 0.35 * 0.25 * np.log(2), 0.65 * 0.25 * np.log(2)
    assert float(losses["cls_loss"]) == pytest.approx((positive + (outputs.logits.size - 1) * negative) / 9.1, rel=1e-5)
    assert small(1).class_scores(outputs)[0, 0] == 0.5
    np.testing.assert_allclose(small(3).class_scores(outputs_of(3))[0, 0], [0.25] * 3, rtol=1e-6)


def test_what_moving_corners_costs_also_trains_the_boxes():
    outputs, module = outputs_of(), small()
    gt = jnp.array([[[0.5, 4.0]]]), jnp.array([[1]]), jnp.array([[True]])

    def corner_loss(boxes):
        moved = module.corners(jnp.ones((1, 4, 8)), boxes, stride=2, num_snippets=8)
        said = dataclasses.replace(outputs, moved=moved)
        return module.loss(said, *gt, module.initial_state(), train=True)[0]["corner_loss"]

    gradient = jax.jit(jax.grad(corner_loss))(outputs.boxes)
    assert np.flatnonzero(np.abs(gradient).sum(-1)).tolist() == [8]  # the first anchor of the second level


def test_scores_are_weighed_by_a_start_and_an_end_where_the_box_has_them():
    """Probabilities: starts 0.2, 0.4, 0.6, ends 0.5, 0.7, 0.9. Between two snippets it is their mean, wherever."""
    start, end = np.array([0.2, 0.4, 0.6]), np.array([0.5, 0.7, 0.9])
    logits = jnp.asarray(np.stack([np.log(p / (1 - p)) for p in (start, end, end)], -1)[None], jnp.float32)
    boxes = jnp.asarray([[[0.0, 2.0], [0.1, 1.9], [-3.0, 9.0], [2.0, 0.0]]])
    clipped, weights = weigh_by_boundaries(boxes, logits)
    assert clipped.tolist() == [[[0, 2], [pytest.approx(0.1), pytest.approx(1.9)], [0, 2], [0, 2]]]
    np.testing.assert_allclose(weights, [[0.2 * 0.9, 0.3 * 0.8, 0.2 * 0.9, 0.2 * 0.9]], rtol=1e-5)


def test_boxes_that_reach_no_real_snippet_are_not_valid():
    mask = jnp.arange(8)[None] < 3
    boxes = jnp.asarray([[[0, 1], [2.9, 7], [3, 7], [2, 2], [-9, -5], [9, 12]]], jnp.float32)
    outputs = outputs_of(mask=mask, moved=boxes, logits=jnp.zeros((1, 6, 1 + CLASSES)))
    proposals, scores, valid = jax.jit(small().decode)(outputs)
    assert valid.tolist() == [[True, True, False, True, True, False]]  # (-9, -5) is clipped to snippet 0
    assert proposals[0, 4:].tolist() == [[0, 0], [7, 7]]
    np.testing.assert_allclose(scores, 0.25 * 0.25, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes = 0: expected at least 1"),
        ({"num_groups": 3}, "num_groups = 3 does not divide channels = 8: .* for example 1"),
        ({"strides": (2, 6)}, r"strides = \(2, 6\): expected an even number and its doubles.* \(2, 4\)"),
        ({"strides": (1, 2)}, r"strides = \(1, 2\)"),
        ({"strides": ()}, r"strides = \(\): expected"),
        ({"anchor_scales": ()}, r"anchor_scales = \(\): expected at least one"),
        ({"anchor_scales": (1.0, 0.0)}, "all of them positive"),
        ({"head_convs": -1}, "head_convs = -1: expected 0 or more"),
        ({"num_neighbours": -1}, "num_neighbours = -1: expected 0 or more"),
        ({"anchor_tiou": 1.5}, "anchor_tiou = 1.5: expected a number in"),
        ({"corner_divisor": 0.0}, "corner_divisor = 0.0: expected a positive number"),
        ({"loss_normalizer": -1.0}, "loss_normalizer = -1.0: expected a positive number"),
    ],
)
def test_settings_that_cannot_run_are_refused(settings, message):
    settings = {"in_channels": CHANNELS, "num_classes": CLASSES, **SMALL, **settings}
    with pytest.raises(ConfigError, match=message):
        VSGN(**settings, rngs=nnx.Rngs(0))


def test_features_of_another_width_are_refused():
    with pytest.raises(ConfigError, match=r"expected \(B, T, 6\) with \(B, T\)"):
        small()(jnp.zeros((1, 8, 5)), jnp.ones((1, 8), bool))


def test_a_config_section_builds_it():
    section = {"channels": 8, "strides": [2, 4], "anchor_scales": [1, 2.5], "num_groups": 4}
    given = {"in_channels": CHANNELS, "num_classes": CLASSES}
    module = nnx.eval_shape(lambda: build(VSGN, section, path="config.localizer", **given, rngs=nnx.Rngs(0)))
    assert (module.strides, module.anchor_scales) == ((2, 4), (1, 2.5))
