"""VSGN's anchors, targets and losses by hand, and its layers against the plain form of what they compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from re2tal_jax.localizers.vsgn_heads import CornerHead, GroupNorm, Tower, stretch
from re2tal_jax.localizers.vsgn_losses import balanced_binary_cross_entropy, balanced_cross_entropy, giou_loss
from re2tal_jax.localizers.vsgn_pyramid import GraphBlock, NeighbourConv, UpConv, nearest
from re2tal_jax.localizers.vsgn_targets import boundary_targets, boxes_of, match, pyramid_anchors

F32 = {"dtype": jnp.float32}
# compile time is the cost of these tests


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


# ---- Anchors, boxes, targets


def test_anchors_are_centred_on_what_a_position_covers():
    fine, coarse = pyramid_anchors(8, (2, 4), (1, 2))
    assert fine[:4].tolist() == [[0.5, 1.5], [-0.5, 2.5], [2.5, 3.5], [1.5, 4.5]]
    assert coarse.tolist() == [[0.5, 3.5], [-1.5, 5.5], [4.5, 7.5], [2.5, 9.5]]


def test_coordinates_move_an_anchor_by_its_length_and_scale_it():
    anchor = jnp.array([[0.0, 9.0]])  # ten snippets long
    coordinates = jnp.array([[[0.0, 0.0]], [[10.0, 0.0]], [[0.0, 5 * np.log(2)]], [[0.0, 1e9]]])
    boxes = boxes_of(coordinates, anchor)[:, 0]
    np.testing.assert_allclose(boxes[:3], [[0, 9], [10, 19], [-5, 14]], rtol=1e-5)
    np.testing.assert_allclose(boxes[3, 1] - boxes[3, 0] + 1, 10 * 1000 / 16, rtol=1e-5)


def matches(boxes, segments, labels, *, threshold=0.5, mask=None):
    segments, labels = jnp.asarray(segments, jnp.float32).reshape(-1, 2), jnp.asarray(labels, jnp.int32)
    mask = jnp.ones(len(labels), bool) if mask is None else jnp.asarray(mask)
    run = jax.jit(functools.partial(match, threshold=threshold))
    found = run(jnp.asarray(boxes, jnp.float32), segments, labels, mask)
    return found.classes.tolist(), found.segments.tolist()


def test_a_box_belongs_to_the_segment_it_overlaps_most():
    """Box (0, 9) is 10 long: it shares 9 of 10 with (0, 9), 5 of 11 with (4, 10) and nothing with (20, 24)."""
    classes, segments = matches([[0, 9], [19, 24], [50, 60]], [[4, 10], [0, 9], [20, 24]], [0, 1, 2])
    assert classes == [2, 3, 0]
    assert segments[:2] == [[0, 9], [20, 24]]


def test_the_threshold_itself_is_enough():
    """Box (0, 3) is 4 long and shares 3 of 4 + 4 - 3 with the segment (0, 4): 0.6. A better box takes the segment."""
    assert matches([[0, 3], [0, 4]], [[0, 4]], [0], threshold=0.6)[0] == [1, 1]
    assert matches([[0, 3], [0, 4]], [[0, 4]], [0], threshold=0.61)[0] == [0, 1]


def test_every_segment_has_a_box_and_that_has_the_class_of_its_own_best_segment():
    """No box overlaps by 0.9. Both segments like box (10, 19) best, which itself likes the second."""
    boxes, segments = [[10, 19], [30, 39]], [[5, 14], [10, 17]]
    assert matches(boxes, segments, [0, 1], threshold=0.9) == ([2, 0], [[10, 17], [5, 14]])


def test_equally_good_boxes_are_all_taken():
    assert matches([[0, 3], [4, 7], [0, 3]], [[1, 2]], [0], threshold=0.9)[0] == [1, 0, 1]


@pytest.mark.parametrize("segments", [[], [[1, 2], [np.nan, 5]]])
def test_without_real_ground_truth_every_box_is_background(segments):
    mask = [False] * len(segments)
    assert matches([[0, 3], [4, 7]], segments, [10**6] * len(segments), mask=mask)[0] == [0, 0]


def test_snippets_are_boundaries_and_actions_that_lie_inside_with_all_of_them():
    """Of a segment (2, 6): the start's stretch is (0.5, 3.5), the end's (4.5, 7.5)."""
    targets = boundary_targets(9, jnp.array([[2.0, 6.0], [0.0, 9.0]]), jnp.array([True, False]))
    start, end, action = np.asarray(targets).T
    assert np.flatnonzero(start).tolist() == [1, 2]
    assert np.flatnonzero(end).tolist() == [5, 6]
    assert np.flatnonzero(action).tolist() == [2, 3, 4, 5]
    assert not boundary_targets(9, jnp.zeros((0, 2)), jnp.zeros(0, bool)).any()


# ---- Losses


def test_giou_loss_tells_how_far_apart_segments_are():
    target = jnp.array([0.0, 4.0])
    pairs = jnp.array([[0.0, 4.0], [4.0, 0.0], [2.0, 6.0], [6.0, 8.0], [5.0, 5.0]])
    losses = jax.jit(giou_loss)(pairs, jnp.broadcast_to(target, pairs.shape))
    np.testing.assert_allclose(losses, [0, 0, 1 - 2 / 6, 1 + 2 / 8, 1 + 1 / 5], atol=1e-6)
    gradients = jax.jit(jax.grad(lambda p: giou_loss(p, jnp.zeros(2)).sum()))(jnp.array([[0.0, 0.0], [3.0, 3.0]]))
    assert np.isfinite(gradients).all()


def test_balanced_cross_entropy_weighs_both_kinds_alike_and_does_without_one():
    logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9], [0.8, 0.2]]))
    mixed = balanced_cross_entropy(logits, jnp.array([1, 0, 0, 0]))
    assert float(mixed) == pytest.approx(-np.log(0.5) - np.log([0.25, 0.1, 0.8]).mean(), rel=1e-5)
    none = balanced_cross_entropy(logits, jnp.zeros(4, jnp.int32))
    assert float(none) == pytest.approx(-np.log([0.5, 0.25, 0.1, 0.8]).mean(), rel=1e-5)
    both = balanced_cross_entropy(jnp.zeros((0, 2)), jnp.zeros(0, jnp.int32))
    assert float(both) == 0.0


def test_balanced_binary_cross_entropy_is_half_positives_and_half_negatives():
    p = np.array([0.5, 0.2, 0.9])
    logits = jnp.asarray(np.log(p / (1 - p)), jnp.float32)
    mixed = balanced_binary_cross_entropy(logits, jnp.array([True, False, False]))
    assert float(mixed) == pytest.approx((-np.log(0.5) - np.log([0.8, 0.1]).mean()) / 2, rel=1e-5)
    assert float(balanced_binary_cross_entropy(logits, jnp.ones(3, bool))) == pytest.approx(-np.log(p).mean(), rel=1e-5)


# ---- Layers


def test_neighbours_are_the_nearest_in_feature_space_and_oneself_first():
    x = jnp.array([[[0.0], [10.0], [1.0], [10.5]]])
    assert nearest(x, 2).tolist() == [[[0, 2], [1, 3], [2, 0], [3, 1]]]


def test_graph_convolution_is_a_linear_map_of_pairs_and_the_maximum_over_them():
    x, module = random(2, 5, 4), NeighbourConv(4, 3, **F32, rngs=nnx.Rngs(0))
    neighbours = jax.vmap(lambda f, i: f[i])(x, nearest(x, 3))  # B T k C
    pairs = jnp.concatenate([neighbours, jnp.broadcast_to(x[:, :, None], neighbours.shape)], axis=-1)
    np.testing.assert_allclose(module(x), (pairs @ module.kernel[...]).max(2), rtol=1e-4, atol=1e-5)


def test_a_graph_block_is_real_where_its_pooling_saw_a_real_snippet():
    block = GraphBlock(4, stride=2, num_neighbours=8, **F32, rngs=nnx.Rngs(0))  # more neighbours than snippets
    y, mask = jax.jit(block)(random(1, 6, 4), jnp.array([[True, True, True, False, False, False]]))
    assert mask.tolist() == [[True, True, False]]
    assert np.abs(y[0]).max(-1).astype(bool).tolist() == [True, True, False]


def test_up_convolution_is_the_transpose_of_a_strided_one():
    x, module = random(2, 3, 4), UpConv(4, **F32, rngs=nnx.Rngs(0))
    module.kernel = nnx.Param(random(3, 5, 4))  # from 5 channels to 4, so back from 4 to 5
    module.bias = nnx.Param(jnp.zeros(5))
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        rhs=module.kernel[...],
        window_strides=(2,),
        padding=[(1, 1)],
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    (transposed,) = jax.linear_transpose(convolve, jax.ShapeDtypeStruct((2, 6, 5), jnp.float32))(x)
    np.testing.assert_allclose(module(x), jax.nn.relu(transposed), rtol=1e-5, atol=1e-5)


def test_a_tower_sees_each_level_alone():
    tower = Tower(4, 3, num_convs=2, num_groups=2, **F32, rngs=nnx.Rngs(0))
    levels = (random(1, 5, 4) + 1, random(1, 3, 4) - 1)
    apart = [jax.jit(tower)([level]) for level in levels]
    np.testing.assert_allclose(jax.jit(tower)(levels), np.concatenate(apart, axis=1), rtol=1e-5, atol=1e-6)


def test_group_norm_takes_time_and_the_channels_of_a_group_together():
    y = jax.jit(GroupNorm(4, 2, **F32))(random(1, 6, 4) * 3 + 5)
    groups = np.asarray(y).reshape(6, 2, 2).transpose(1, 0, 2).reshape(2, -1)
    np.testing.assert_allclose(groups.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(groups.var(1), 1, rtol=1e-4)


def test_stretching_keeps_both_ends():
    x = jnp.array([0.0, 2.0, 6.0])[None, :, None]
    assert stretch(x, 5)[0, :, 0].tolist() == [0, 1, 2, 4, 6]
    assert stretch(x, 3)[0, :, 0].tolist() == [0, 2, 6]
    assert stretch(x[:, :1], 2)[0, :, 0].tolist() == [0, 0]


def test_corners_are_an_eighth_of_the_box_beside_its_ends():
    """Box (16, 47) is 32 long: corners at 12, 16, 20 and 43, 47, 51 snippets, every two of which have a feature."""
    head = CornerHead(2, divisor=8.0, **F32, rngs=nnx.Rngs(0))
    box = jnp.array([[[16.0, 47.0]]])

    ones = jnp.ones((1, 32, 2))
    for branch in (head.start, head.end):  # weights that hide nothing behind a ReLU
        branch.conv.kernel = nnx.Param(jnp.ones((3, 2, 2)))
        branch.out.kernel = nnx.Param(jnp.ones((1, 2, 1)))

    @jax.jit
    def move(features):
        boxes, back = jax.vjp(lambda f: head(f, box, stride=2, num_snippets=64), features)
        return boxes, back(jnp.ones_like(boxes))[0]

    boxes, gradient = move(ones)
    assert np.flatnonzero(np.abs(gradient).sum((0, 2))).tolist() == [6, 8, 10, 21, 23, 25]
    assert boxes.tolist() == [[[16 + 12, 47 + 12]]]
