import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from re2tal_jax import nms
from re2tal_jax.config import build
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.nms import NMSConfig, batched_nms, hard_nms, soft_nms, vote
from re2tal_jax.segments import tiou
from tests.parity import nms as parity
from tests.parity.__main__ import load

SEGMENTS = np.array([[0, 10], [1, 10], [20, 30], [8, 18], [25, 35]], np.float32)
SCORES = np.array([0.9, 0.8, 0.7, 0.6, 0.5], np.float32)
LABELS = np.zeros(5, np.int64)
METHODS = ("hard", "zero", "linear", "gaussian", "bmn")


def candidates(seed, count, classes=1):
    rng = np.random.default_rng(seed)
    centre, half = rng.uniform(0, 100, (count, 1)), rng.exponential(10, (count, 1)) + 0.1
    scores = rng.permutation(count) / count + 0.5 / count
    return np.concatenate([centre - half, centre + half], 1), scores, rng.integers(0, classes, count)


seeds = st.integers(0, 10**6)


def test_hard_suppression_of_hand_checked_segments():
    # tiou of 0 with 1 is 0.9, of 2 with 4 is 1/3; 3 touches 0 by 2/18 and 1 by 2/17
    assert hard_nms(SEGMENTS, SCORES, 0.5).tolist() == [0, 2, 3, 4]
    assert hard_nms(SEGMENTS, SCORES, 0.3).tolist() == [0, 2, 3]
    assert hard_nms(SEGMENTS, SCORES, 0.1).tolist() == [0, 2]


def test_soft_suppression_of_hand_checked_segments():
    segments = np.array([[0, 10], [0, 5]], np.float32)
    scores = np.array([0.5, 0.8], np.float32)
    for method, factor in (("gaussian", np.exp(-0.25 / 0.7)), ("linear", 0.5), ("zero", 0.0)):
        config = NMSConfig(method=method, sigma=0.7, tiou_threshold=0.5 - 1e-6, min_score=0.0)
        indices, decayed = soft_nms(segments, scores, config)
        assert indices.tolist() == [1, 0]
        np.testing.assert_allclose(decayed, [0.8, 0.5 * factor], rtol=1e-5)


def test_bmn_suppression_needs_more_overlap_with_longer_segments():
    segments = np.array([[0, 10], [0, 5]], np.float32)
    for t2, expected in ((0.0, 0.8 * np.exp(-0.25 / 0.5)), (0.02, 0.8)):  # threshold 0.4 or 0.4 + 0.02 * 10 > 0.5
        _, decayed = soft_nms(segments, np.array([0.9, 0.8]), NMSConfig(method="bmn", sigma=0.5, t1=0.4, t2=t2))
        np.testing.assert_allclose(decayed, [0.9, expected], rtol=1e-5)


@settings(deadline=None)
@given(seeds, st.integers(1, 60), st.floats(0.05, 0.95))
def test_hard_suppression_keeps_the_best_and_never_two_that_overlap(seed, count, threshold):
    segments, scores, _ = candidates(seed, count)
    kept = hard_nms(segments, scores, threshold)
    assert kept[0] == scores.argmax()
    assert (np.diff(scores[kept]) < 0).all()
    overlap = tiou(segments[kept], segments[kept])
    assert overlap[~np.eye(len(kept), dtype=bool)].max(initial=0) < threshold + 1e-5
    covered = tiou(segments, segments[kept]).max(axis=1)
    assert covered.min() >= threshold - 1e-5  # whatever was removed overlaps one that was kept


@settings(deadline=None)
@given(seeds, st.integers(1, 60))
def test_soft_suppression_without_decay_only_sorts(seed, count):
    segments, scores, _ = candidates(seed, count)
    indices, decayed = soft_nms(segments, scores, NMSConfig(sigma=1e12, min_score=0.0))
    assert indices.tolist() == np.argsort(-scores).tolist()
    np.testing.assert_allclose(decayed, np.sort(scores)[::-1], rtol=1e-6)


@settings(deadline=None)
@given(seeds, st.integers(1, 60), st.sampled_from(METHODS[1:]), st.floats(0.0, 0.5))
def test_soft_suppression_only_lowers_scores(seed, count, method, min_score):
    segments, scores, _ = candidates(seed, count)
    config = NMSConfig(method=method, min_score=min_score)
    indices, decayed = soft_nms(segments, scores, config)
    assert indices[0] == scores.argmax()
    assert len(set(indices.tolist())) == len(indices)
    assert (np.diff(decayed) <= 0).all()
    assert (decayed <= scores[indices] + 1e-6).all()
    assert (decayed[1:] >= np.float32(min_score)).all()


@settings(deadline=None)
@given(seeds, st.integers(1, 80), st.integers(1, 6), st.sampled_from(METHODS))
def test_a_cap_keeps_the_first_of_the_uncapped_result(seed, count, cap, method):
    data = candidates(seed, count, classes=4)
    whole = batched_nms(*data, NMSConfig(method=method, max_seg_num=10_000))
    capped = batched_nms(*data, NMSConfig(method=method, max_seg_num=cap))
    for a, b in zip(whole, capped, strict=True):
        np.testing.assert_array_equal(a[:cap], b)


@settings(deadline=None)
@given(seeds, st.integers(1, 80), st.sampled_from(METHODS[1:]))
def test_multiclass_is_each_class_alone_then_sorted(seed, count, method):
    segments, scores, labels = candidates(seed, count, classes=4)
    config = NMSConfig(method=method, max_seg_num=10_000)
    expected = []
    for c in range(4):
        own = np.flatnonzero(labels == c)
        indices, decayed = soft_nms(segments[own], scores[own], config)
        expected += [(-s, c, *segments[own[i]].astype(np.float32)) for i, s in zip(indices, decayed, strict=True)]
    got_segments, got_scores, got_labels = batched_nms(segments, scores, labels, config)
    got = [(-s, c, *x) for x, s, c in zip(got_segments, got_scores, got_labels, strict=True)]
    assert got == sorted(expected, key=lambda row: row[0])


@settings(deadline=None)
@given(seeds, st.sampled_from(METHODS))
def test_order_of_candidates_is_irrelevant_for_distinct_scores(seed, method):
    segments, scores, labels = candidates(seed, 40, classes=3)
    order = np.random.default_rng(seed).permutation(40)
    config = NMSConfig(method=method, max_seg_num=20)
    for a, b in zip(
        batched_nms(segments, scores, labels, config),
        batched_nms(segments[order], scores[order], labels[order], config),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_classes_suppress_each_other_only_without_multiclass():
    labels = np.array([0, 1, 0, 0, 1])
    config = {"method": "hard", "tiou_threshold": 0.5}
    assert len(batched_nms(SEGMENTS, SCORES, labels, NMSConfig(**config))[1]) == 5
    assert len(batched_nms(SEGMENTS, SCORES, labels, NMSConfig(**config, multiclass=False))[1]) == 4


def test_equal_scores_keep_their_order():
    segments = np.array([[0, 1], [2, 3], [4, 5], [6, 7]], np.float32)
    for method in METHODS:
        got, _, labels = batched_nms(segments, np.full(4, 0.5), np.array([1, 0, 0, 1]), NMSConfig(method=method))
        assert labels.tolist() == [0, 0, 1, 1]
        assert got[:, 0].tolist() == [2, 4, 0, 6]


def test_soft_suppression_orders_equal_scores_as_the_reference_does():
    """The best swaps places with the first; who is dropped is replaced from the end."""
    apart, scores = np.array([[0, 1], [2, 3], [4, 5]], np.float32), np.array([0.5, 0.5, 0.9])
    assert soft_nms(apart, scores, NMSConfig())[0].tolist() == [2, 1, 0]
    assert hard_nms(apart, scores, 0.5).tolist() == [2, 0, 1]
    two_dropped = np.array([[0, 1], [0, 1], [0, 1], [2, 3], [4, 5]], np.float32)
    config = NMSConfig(method="zero", tiou_threshold=0.5, min_score=0.1)
    assert soft_nms(two_dropped, np.array([0.9, 0.5, 0.5, 0.5, 0.5]), config)[0].tolist() == [0, 4, 3]


def test_min_score_is_exclusive_before_hard_and_inclusive_after_soft_suppression():
    apart = np.array([[0, 1], [2, 3]], np.float32)
    scores = np.array([0.5, 0.25], np.float32)
    assert len(batched_nms(apart, scores, LABELS[:2], NMSConfig(method="hard", min_score=0.25))[1]) == 1
    assert len(batched_nms(apart, scores, LABELS[:2], NMSConfig(min_score=0.25))[1]) == 2
    assert len(batched_nms(apart, scores, LABELS[:2], NMSConfig(min_score=0.9))[1]) == 1  # the best always stays


def test_voting_moves_segments_to_the_weighted_mean_of_their_neighbours():
    segments = np.array([[0, 10], [2, 10], [50, 60]], np.float32)
    scores = np.array([0.75, 0.25, 0.5], np.float32)
    np.testing.assert_allclose(vote(segments[:1], segments, scores, 0.7), [[0.5, 10]])
    np.testing.assert_allclose(vote(segments[:1], segments, scores, 0.9), [[0, 10]])


def test_voting_leaves_zero_length_segments_in_place():
    segments = np.array([[5, 5], [0, 10]], np.float32)
    got, scores, _ = batched_nms(
        segments, np.array([0.9, 0.8]), LABELS[:2], NMSConfig(multiclass=False, voting_threshold=0.5, min_score=0.0)
    )
    np.testing.assert_allclose(got, segments)
    np.testing.assert_allclose(scores, [0.9, 0.8], rtol=1e-6)


def test_voting_in_parts_is_voting_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    start, scores = rng.uniform(0, 50, 40), rng.uniform(0, 1, 40).astype(np.float32)
    segments = np.stack([start, start + rng.uniform(5, 15, 40)], axis=1).astype(np.float32)
    whole = vote(segments[:10], segments, scores, 0.3)
    monkeypatch.setattr(nms, "_VOTES", 3 * len(segments))
    np.testing.assert_allclose(vote(segments[:10], segments, scores, 0.3), whole, rtol=1e-6)
    assert not np.allclose(whole, segments[:10])


def test_voting_uses_scores_before_decay():
    segments = np.array([[0, 10], [0, 8]], np.float32)
    config = NMSConfig(method="zero", tiou_threshold=0.5, multiclass=False, voting_threshold=0.5)
    got, _, _ = batched_nms(segments, np.array([0.75, 0.25]), LABELS[:2], config)
    np.testing.assert_allclose(got, [[0, 9.5]])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_in_nothing_out(method):
    got = batched_nms(np.zeros((0, 2)), np.zeros(0), np.zeros(0, np.int64), NMSConfig(method=method))
    assert [x.shape for x in got] == [(0, 2), (0,), (0,)]


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"method": "gausian"}, "method = 'gausian'. Did you mean 'gaussian'"),
        ({"tiou_threshold": 1.5}, "tiou_threshold = 1.5 is out of range; allowed: 0 to 1"),
        ({"sigma": 0.0}, "sigma = 0.0"),
        ({"sigma": float("nan")}, "sigma = nan"),
        ({"t1": -0.1}, "t1 = -0.1"),
        ({"t2": -0.1}, "t2 = -0.1"),
        ({"min_score": 1.0}, "min_score = 1.0"),
        ({"max_seg_num": 0}, "max_seg_num = 0"),
        ({"voting_threshold": 0.0, "multiclass": False}, "voting_threshold = 0.0 .* None to switch it off"),
        ({"voting_threshold": 0.7, "multiclass": True}, "no effect with multiclass=True"),
    ],
)
def test_settings_that_cannot_be_run_are_refused_by_name(setting, complaint):
    with pytest.raises(ConfigError, match=complaint):
        NMSConfig(**setting)


def test_settings_come_from_a_config_section():
    assert build(NMSConfig, {"sigma": 0.7, "voting_threshold": None}, path="config.nms") == NMSConfig(sigma=0.7)
    with pytest.raises(ConfigError, match=r"config\.nms\.sigm.*'sigma'"):
        build(NMSConfig, {"sigm": 0.7}, path="config.nms")


@pytest.mark.parametrize(
    ("segments", "scores", "complaint"),
    [
        (SEGMENTS[:3], SCORES[:2], r"segments \(3, 2\), scores \(2,\)"),
        (SEGMENTS[:1] * np.nan, SCORES[:1], "1 are not, segment 0"),
        (SEGMENTS[:1], SCORES[:1] * np.nan, "smallest given is nan"),
        (SEGMENTS[:1], -SCORES[:1], "smallest given is -0.9"),
    ],
)
def test_input_that_would_be_ranked_wrongly_is_refused(segments, scores, complaint):
    with pytest.raises(DataError, match=complaint):
        batched_nms(segments, scores, np.zeros(len(scores), np.int64), NMSConfig())


def test_hard_settings_do_not_fit_soft_suppression():
    with pytest.raises(ConfigError, match="zero, linear, gaussian or bmn"):
        soft_nms(SEGMENTS, SCORES, NMSConfig(method="hard"))


def test_work_is_done_for_kept_segments_only():
    """40,000 candidates take 0.1 s; one by one they would take minutes."""
    start = time.perf_counter()
    kept, *_ = batched_nms(*candidates(0, 40_000, classes=20), NMSConfig(sigma=0.7, max_seg_num=2000))
    assert len(kept) == 2000
    assert time.perf_counter() - start < 5


def test_published_results_are_reproduced(parity_dir):
    path = parity_dir / "nms.npz"
    content = load(path)
    assert parity.recognises(path, content)
    rows = list(parity.replay(path, content))
    assert len(rows) > 400
    assert [row for row in rows if not row.passed] == []
