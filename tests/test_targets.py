"""Targets by hand and against an oracle written as loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal_jax.targets import point_targets, pyramid_points

CLASSES, ROWS = 3, 4
POINTS = np.concatenate(pyramid_points((16, 8, 4), (1, 2, 4), ((0, 4), (4, 8), (8, 10000))))
assign = jax.jit(functools.partial(point_targets, num_classes=CLASSES), static_argnames=("center_sample_radius",))


def run(segments, labels, *, radius=1.5, points=POINTS, rows=None):
    """Targets of a list of segments, padded to `rows` with rows that would matter if they counted."""
    rows = max(len(segments), 1) if rows is None else rows
    padded = np.full((rows, 2), (0.1, 15.9), np.float32)
    padded[: len(segments)] = np.reshape(segments, (-1, 2))
    padded_labels = np.ones(rows, np.int32)
    padded_labels[: len(labels)] = labels
    mask = np.arange(rows) < len(segments)
    targets = assign(jnp.asarray(points), padded, padded_labels, mask, center_sample_radius=radius)
    return np.asarray(targets.classes), np.asarray(targets.offsets)


def oracle(segments, labels, radius):
    """The definition, one point and one segment at a time, in float32 as the implementation."""
    classes, offsets = np.zeros((len(POINTS), CLASSES), np.float32), np.zeros((len(POINTS), 2), np.float32)
    for p, (time, shortest, longest, stride) in enumerate(POINTS):
        best, eligible = None, []
        for n, (start, end) in enumerate(np.asarray(segments, np.float32).reshape(-1, 2)):
            center = np.float32(0.5) * (start + end)
            near = stride * np.float32(radius)
            inside = max(center - near, start) < time < min(center + near, end)
            if inside and shortest <= max(time - start, end - time) <= longest:
                eligible.append((n, end - start))
                if best is None or end - start < best[1]:
                    best = (n, end - start)
        if best is not None:
            start, end = np.float32(segments[best[0]])
            offsets[p] = (time - start) / stride, (end - time) / stride
            for n, length in eligible:
                if length <= best[1] + np.float32(1e-3):
                    classes[p, labels[n]] = 1
    return classes, offsets


quarters = st.integers(0, 64).map(lambda i: i / 4)
segment = st.tuples(quarters, quarters).filter(lambda s: s[0] < s[1])
ground_truth = st.lists(st.tuples(segment, st.integers(0, CLASSES - 1)), max_size=ROWS)


@settings(max_examples=200, deadline=None)
@given(ground_truth, st.sampled_from([0.75, 1.5, float("inf")]))
def test_targets_equal_the_definition(ground_truth, radius):
    segments, labels = [s for s, _ in ground_truth], [label for _, label in ground_truth]
    classes, offsets = run(segments, labels, radius=radius, rows=ROWS)
    want_classes, want_offsets = oracle(segments, labels, radius)
    np.testing.assert_array_equal(classes, want_classes)
    positive = want_classes.any(-1)
    np.testing.assert_array_equal(offsets[positive], want_offsets[positive])


def test_only_points_near_the_centre_are_positive():
    # length 6, centre 5, radius 1.5 strides: 4, 5, 6 at stride 1 (level 0 regresses up to 4)
    classes, offsets = run([(2, 8)], [1])
    level0 = classes[:16]
    np.testing.assert_array_equal(np.flatnonzero(level0.any(-1)), [4, 5, 6])
    np.testing.assert_array_equal(level0[5], [0, 1, 0])
    np.testing.assert_array_equal(offsets[4], [2, 4])


def test_borders_are_outside():
    """Strictly inside: no integer lies strictly between 5 and 6, one does between 4 and 6."""
    assert not run([(5, 6)], [0])[0].any()
    np.testing.assert_array_equal(np.flatnonzero(run([(4, 6)], [0])[0].any(-1)), [5])


def test_a_distance_of_exactly_four_is_regressed_on_two_levels():
    # centre 4: point 4 of level 0 and point 4 of level 1 (its third) both have distance 4
    classes, offsets = run([(0, 8)], [0])
    assert classes[4].any()
    assert classes[16 + 2].any()
    np.testing.assert_array_equal(offsets[4], [4, 4])
    np.testing.assert_array_equal(offsets[16 + 2], [2, 2])  # in strides


def test_the_shortest_of_nested_segments_wins():
    classes, offsets = run([(2, 8), (3, 7)], [0, 1])
    np.testing.assert_array_equal(classes[5], [0, 1, 0])
    np.testing.assert_array_equal(offsets[5], [2, 2])


def test_segments_of_one_length_give_all_classes_and_the_first_offsets():
    classes, offsets = run([(2, 8), (3, 7), (3.5, 7.5), (3.0004, 7)], [0, 1, 2, 1])
    np.testing.assert_array_equal(classes[5], [0, 1, 1])
    np.testing.assert_allclose(offsets[5], [1.9996, 2], rtol=1e-6)  # the shortest by 0.0004
    classes, offsets = run([(2, 8), (3, 7), (3.5, 7.5)], [0, 1, 2])
    np.testing.assert_array_equal(offsets[5], [2, 2])  # the first of equals


def test_equal_segments_of_one_class_count_once():
    assert run([(3, 7), (3, 7)], [1, 1])[0].max() == 1


def test_rows_that_are_not_real_do_not_matter():
    alone = run([(2, 8)], [0], rows=1)
    padded = run([(2, 8)], [0], rows=ROWS)
    np.testing.assert_array_equal(alone[0], padded[0])
    np.testing.assert_array_equal(alone[1], padded[1])


def test_rows_that_are_not_real_may_come_first_and_hold_nan():
    segments = jnp.asarray([(np.nan, np.inf), (2, 8)], jnp.float32)
    mask = jnp.asarray([False, True])
    classes, offsets = assign(
        jnp.asarray(POINTS), segments, jnp.asarray([-1, 0], jnp.int32), mask, center_sample_radius=1.5
    )
    want_classes, want_offsets = run([(2, 8)], [0])
    np.testing.assert_array_equal(classes, want_classes)
    positive = want_classes.any(-1)
    np.testing.assert_array_equal(np.asarray(offsets)[positive], want_offsets[positive])
    assert np.isfinite(offsets).all()


def test_no_ground_truth_gives_background_of_zero_offsets():
    empty = assign(
        jnp.asarray(POINTS),
        jnp.zeros((0, 2), jnp.float32),
        jnp.zeros(0, jnp.int32),
        jnp.zeros(0, bool),
        center_sample_radius=1.5,
    )
    for classes, offsets in (run([], []), empty):
        assert classes.shape == (28, CLASSES)
        assert not classes.any()
        assert not offsets.any()


def test_points_are_time_range_and_stride():
    level0, level1 = pyramid_points((3, 2), (1, 2), ((0, 4), (4, 10000)))
    np.testing.assert_array_equal(level0, [[0, 0, 4, 1], [1, 0, 4, 1], [2, 0, 4, 1]])
    np.testing.assert_array_equal(level1, [[0, 4, 10000, 2], [2, 4, 10000, 2]])
    assert level0.dtype == np.float32
