import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from re2tal_jax.errors import DataError
from re2tal_jax.segments import check_segments, clip, paired_tiou, proper, tiou, to_seconds, to_snippets
from re2tal_jax.types import SnippetGrid

WINDOW = SnippetGrid(start_sec=1024 / 25, seconds_per_snippet=4 / 25, duration_sec=120.0)


@st.composite
def segment_arrays(draw, smallest=0.01):
    count = draw(st.integers(1, 8))
    starts = draw(st.lists(st.floats(-100, 1000), min_size=count, max_size=count))
    lengths = draw(st.lists(st.floats(smallest, 500), min_size=count, max_size=count))
    starts = np.array(starts)
    return np.stack([starts, starts + np.array(lengths)], axis=1)


def test_tiou_of_hand_checked_segments():
    a = np.array([[0.0, 10.0], [20.0, 30.0]])
    b = np.array([[5.0, 15.0], [0.0, 10.0], [22.0, 27.0]])
    np.testing.assert_allclose(tiou(a, b), [[5 / 15, 1, 0], [0, 0, 5 / 10]])


@settings(deadline=None)
@given(segment_arrays(), segment_arrays())
def test_tiou_is_symmetric_and_between_zero_and_one(a, b):
    overlap = tiou(a, b)
    np.testing.assert_allclose(overlap, tiou(b, a).T, rtol=1e-12)
    assert overlap.min() >= 0
    assert overlap.max() <= 1 + 1e-12
    np.testing.assert_allclose(np.diag(tiou(a, a)), 1, rtol=1e-9)


@settings(deadline=None)
@given(segment_arrays(), st.floats(-50, 50), st.floats(0.1, 10))
def test_tiou_does_not_depend_on_the_unit(a, offset, scale):
    np.testing.assert_allclose(tiou(a, a[::-1]), tiou(a * scale + offset, a[::-1] * scale + offset), atol=1e-6)


def test_zero_length_and_reversed_segments_overlap_nothing():
    broken = np.array([[3.0, 3.0], [5.0, 2.0]])
    whole = np.array([[0.0, 10.0], [3.0, 3.0], [5.0, 2.0]])
    assert tiou(broken, whole).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert proper(whole).tolist() == [True, False, False]
    assert proper(np.array([[0.0, np.inf], [np.nan, 1.0]])).tolist() == [False, False]


def test_paired_tiou_is_the_diagonal():
    a = np.array([[0.0, 4.0], [1.0, 2.0]])
    b = np.array([[2.0, 6.0], [1.0, 5.0]])
    np.testing.assert_allclose(paired_tiou(a, b), np.diag(tiou(a, b)))


def test_seconds_of_a_resized_video():
    grid = SnippetGrid(start_sec=0.0, seconds_per_snippet=96.0 / 192, duration_sec=96.0)
    segments = np.array([[10.0, 20.0], [-4.0, 500.0]])
    assert to_seconds(segments, grid).tolist() == [[5.0, 10.0], [0.0, 96.0]]
    assert to_seconds(segments, grid, clamp=False).tolist() == [[5.0, 10.0], [-2.0, 250.0]]


def test_seconds_of_a_window_start_where_the_window_starts():
    np.testing.assert_allclose(to_seconds(np.array([[0.0, 50.0]]), WINDOW), [[40.96, 48.96]])


@settings(deadline=None)
@given(segment_arrays(), st.floats(0, 500), st.floats(0.01, 20))
def test_units_round_trip(segments, start, step):
    grid = SnippetGrid(start_sec=start, seconds_per_snippet=step, duration_sec=1e6)
    np.testing.assert_allclose(to_snippets(to_seconds(segments, grid, clamp=False), grid), segments, atol=1e-9)


def test_a_grid_without_extent_is_refused():
    with pytest.raises(DataError, match=r"seconds_per_snippet = 0\.0 must be positive"):
        to_snippets(np.zeros((1, 2)), SnippetGrid(start_sec=0.0, seconds_per_snippet=0.0, duration_sec=1.0))


def test_clip_makes_outside_segments_zero_length():
    assert clip(np.array([[-5.0, -1.0], [2.0, 12.0]]), 0.0, 10.0).tolist() == [[0.0, 0.0], [2.0, 10.0]]


@pytest.mark.parametrize(
    ("segments", "complaint"),
    [
        ([1.0, 2.0, 3.0], r"shape \(3,\)"),
        ([[1.0, 2.0, 3.0]], r"shape \(1, 3\)"),
        ([[0.0, 1.0], [2.0, np.nan]], "1 of 2 segments are not finite; segment 1"),
        ([[0.0, "late"]], "pairs of numbers"),
    ],
)
def test_malformed_segments_are_refused_by_name(segments, complaint):
    with pytest.raises(DataError, match=f"annotations.json: v_1: .*{complaint}"):
        check_segments(segments, "annotations.json: v_1")


def test_no_segments_are_an_empty_array_of_pairs():
    assert check_segments([], "anything").shape == (0, 2)
