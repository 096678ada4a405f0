"""Kinds of error on segments checked by hand, and what each costs."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from re2tal_jax.evaluation import detection_map, match_detections
from re2tal_jax.inference.diagnosis import KINDS, PROFILE_GROUPS, break_down, error_kinds


def matched(truth, found, thresholds=(0.5,)):
    database = {
        video_id: {"subset": "test", "annotations": [{"segment": list(s), "label": label} for s, label in rows]}
        for video_id, rows in truth.items()
    }
    results = {
        video_id: [{"segment": list(s), "label": label, "score": score} for s, label, score in rows]
        for video_id, rows in found.items()
    }
    sources = {"database": database}, {"results": results}
    options = {"subset": "test", "tiou_thresholds": thresholds}
    return match_detections(*sources, **options), detection_map(*sources, **options)


def kinds_of(truth, found, threshold=0.5):
    """The kind of each detection, in order of class, then score."""
    matching, _ = matched(truth, found, (threshold,))
    return [KINDS[number] for number in error_kinds(matching)[0]]


TRUTH = {"v": [((0, 10), "a"), ((20, 30), "b")], "empty": []}


@pytest.mark.parametrize(
    ("segment", "label", "kind"),
    [
        ((0, 9), "a", "double detection"),
        ((0, 5), "a", "double detection"),  # exactly the threshold
        ((1, 10), "b", "wrong label"),
        ((5, 15), "a", "localisation"),  # 5 / 15
        ((8, 12), "b", "confusion"),  # 2 / 12
        ((15, 25), "a", "confusion"),
        ((9.5, 19), "a", "background"),  # 0.5 / 19
        ((40, 50), "a", "background"),
        ((7, 7), "a", "background"),  # no length
    ],
)
def test_a_false_detection_is_judged_by_the_segment_it_overlaps_most(segment, label, kind):
    best = ((0, 10), "a", 0.9)
    kinds = kinds_of(TRUTH, {"v": [best, (segment, label, 0.5)]})
    assert sorted(kinds) == sorted(["true positive", kind])


def test_detections_of_videos_without_segments_are_of_the_background():
    assert kinds_of(TRUTH, {"empty": [((0, 10), "a", 0.9)], "unknown": [((0, 10), "a", 0.8)]}) == ["background"] * 2


def test_of_equally_good_segments_the_one_of_its_class_decides():
    truth = {"v": [((0, 10), "b"), ((0, 10), "a"), ((0, 10), "c")]}
    kinds = kinds_of(truth, {"v": [((0, 10), "a", 0.9), ((0, 9), "a", 0.8)]})
    assert kinds == ["true positive", "double detection"]


def test_another_class_decides_where_it_overlaps_more():
    truth = {"v": [((0, 10), "b"), ((0, 6), "a")]}
    assert kinds_of(truth, {"v": [((0, 9), "a", 0.8)]}, threshold=0.8) == ["wrong label"]


def test_gains_are_what_is_won_without_a_kind():
    # a: background first, then right: AP 1/2, and 1 without the background. b: one of two found: 1/2, and 1 without the
    # missed one.
    truth = {"v": [((0, 10), "a"), ((20, 30), "b"), ((60, 70), "b")]}
    found = {"v": [((40, 50), "a", 0.9), ((0, 10), "a", 0.8), ((20, 30), "b", 0.7)]}
    errors = break_down(matched(truth, found)[0])
    assert errors.average_map == pytest.approx(0.5)
    assert errors.gains == pytest.approx(
        {"double detection": 0, "wrong label": 0, "localisation": 0, "confusion": 0, "background": 0.25, "missed": 0.25}
    )
    assert (errors.missed.tolist(), errors.num_ground_truth) == ([1], 3)


def test_the_profile_goes_through_as_many_detections_as_there_are_segments():
    truth = {"v": [((0, 10), "a"), ((20, 30), "a")]}
    found = {"v": [((0, 10), "a", 0.9), ((40, 50), "a", 0.8), ((60, 70), "a", 0.7)]}
    errors = break_down(matched(truth, found)[0])
    assert errors.profile.shape == (1, PROFILE_GROUPS, len(KINDS))
    assert errors.profile[0, :3].tolist() == [[1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1], [0] * 6]
    np.testing.assert_allclose(errors.shares[:3].sum(axis=1), [1, 1, 0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_right_detections_average_and_signs_agree_with_the_evaluation(seed):
    rng = np.random.default_rng(seed)
    truth = {f"v{v}": [((s, s + 5), f"c{rng.integers(2)}") for s in rng.uniform(0, 40, 4)] for v in range(3)}
    found = {v: [((s, s + 5), f"c{rng.integers(2)}", rng.uniform()) for s in rng.uniform(0, 40, 12)] for v in truth}
    matching, scored = matched(truth, found, (0.3, 0.6))
    errors = break_down(matching)
    assert errors.average_map == pytest.approx(scored.average)
    assert min(errors.gains.values()) > -1e-12  # taking false ones away never costs
    np.testing.assert_array_equal(error_kinds(matching) == 0, matching.correct)


def test_no_detection_at_all_misses_everything():
    errors = break_down(matched(TRUTH, {})[0])
    assert (errors.average_map, errors.missed.tolist(), errors.profile.sum()) == (0.0, [2], 0)
    assert set(errors.gains.values()) == {0.0}
