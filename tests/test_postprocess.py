import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from re2tal_jax.config import build
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.external_classifier import ExternalClassifier, ExternalClassifierConfig
from re2tal_jax.nms import NMSConfig
from re2tal_jax.postprocess import Gathering, PostprocessConfig, postprocess
from re2tal_jax.types import Detections, SnippetGrid
from tests.parity import postproc as parity
from tests.parity.__main__ import load

RESIZED = SnippetGrid(start_sec=0.0, seconds_per_snippet=0.5, duration_sec=30.0)
HARD = NMSConfig(method="hard", tiou_threshold=0.5, min_score=0.0)
KEEP_ALL = PostprocessConfig(nms=None)
CLASSES = ("dive", "jump")


def run(proposals, scores, config=KEEP_ALL, classes=CLASSES, external=None, valid=None, grid=RESIZED):
    proposals = np.array(proposals, np.float32).reshape(-1, 2)
    scores = np.array(scores, np.float32)
    scores = scores.reshape(-1, scores.shape[1] if scores.ndim == 2 else 1)
    valid = np.ones(len(proposals), bool) if valid is None else np.array(valid)
    return postprocess(proposals, scores, valid, grid, config, classes, external, video_id="v_1")


def gather(windows, config):
    gathering = Gathering("v_1", config)
    for window in windows:
        gathering.add(window)
    assert len(gathering) == len(windows)
    return gathering.result()


def test_a_candidate_is_a_proposal_with_a_class():
    got = run([[0, 10], [20, 40]], [[0.9, 0.2], [0.0005, 0.6]])
    assert got.labels == ("dive", "jump", "jump")
    assert got.scores.tolist() == [0.9, 0.6, 0.2]
    assert got.segments_sec.tolist() == [[0, 5], [10, 20], [0, 5]]


def test_the_pre_suppression_threshold_is_exclusive_and_the_best_k_remain():
    config = PostprocessConfig(nms=None, pre_nms_threshold=0.25, pre_nms_top_k=2)
    assert run([[0, 10], [20, 40]], [[0.25, 0.5], [0.75, 0.3]], config).scores.tolist() == [0.75, 0.5]


def test_class_agnostic_proposals_are_all_candidates():
    got = run([[0, 10], [20, 40]], [[0.0001], [0.0]], classes=("action",))
    assert got.labels == ("action", "action")


def test_proposals_on_padding_never_become_detections():
    got = run([[0, 10], [20, 40]], [[0.5, 0.1], [np.nan, 0.9]], valid=[True, False])
    assert got.segments_sec.tolist() == [[0, 5], [0, 5]]


def test_one_window_is_suppressed_in_snippets_before_clamping():
    """Both segments clamp to the same [0, 30] s, but in snippets they overlap by 60 of 160 only."""
    got = run([[-50, 60], [0, 110]], [[0.9, 0], [0.8, 0]], PostprocessConfig(nms=HARD))
    assert got.segments_sec.tolist() == [[0, 30], [0, 30]]


def test_windows_of_a_video_are_suppressed_together_after_clamping():
    config = PostprocessConfig(nms=HARD, suppress_in="video")
    grids = [SnippetGrid(start_sec=s, seconds_per_snippet=0.5, duration_sec=30.0) for s in (0.0, 10.0)]
    windows = [
        run([[20, 40], [0, 4], [0, 5]], [[0.6, 0], [0.5, 0], [0.3, 0]], config, grid=grids[0]),
        run([[0, 20], [30, 90]], [[0.9, 0], [0.4, 0]], config, grid=grids[1]),
    ]
    assert [len(w) for w in windows] == [3, 2]
    got = gather(windows, config)
    assert got.segments_sec.tolist() == [[10, 20], [0, 2], [25, 30]]
    np.testing.assert_allclose(got.scores, [0.9, 0.5, 0.4], atol=1e-6)
    assert len(gather([], config)) == 0


def test_windows_suppressed_one_by_one_cannot_be_gathered():
    window = run([[0, 10]], [[0.5, 0]])
    assert gather([window], KEEP_ALL) is window
    with pytest.raises(ConfigError, match=r"v_1 has 2 windows but .*suppress_in = 'window'.* set it to 'video'"):
        gather([window, window], KEEP_ALL)


def test_a_candidate_that_waits_for_the_last_window_takes_16_bytes():
    config, count = PostprocessConfig(suppress_in="video"), 20_000
    labels = tuple(CLASSES[i % 2] for i in range(count))
    window = Detections(segments_sec=np.zeros((count, 2)), labels=labels, scores=np.zeros(count))
    gathering = Gathering("v_1", config)
    tracemalloc.start()
    for _ in range(5):
        gathering.add(window)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 17 * 5 * count


def test_without_suppression_windows_are_joined():
    config = PostprocessConfig(nms=None, suppress_in="video")
    windows = [run([[0, 10]], [[s, 0]], config) for s in (0.25, 0.75)]
    assert gather(windows, config).scores.tolist() == [0.75, 0.25]


def test_results_are_rounded_as_published_unless_told_otherwise():
    assert run([[1.2345, 2]], [[0.123456, 0]]).segments_sec.tolist() == [[0.62, 1]]
    assert run([[1.2345, 2]], [[0.123456, 0]]).scores.tolist() == [0.1235]
    exact = PostprocessConfig(nms=None, segment_decimals=None, score_decimals=None)
    np.testing.assert_allclose(run([[1.2345, 2]], [[0.123456, 0]], exact).segments_sec, [[0.61725, 1]], rtol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from(("hard", "gaussian")))
def test_detections_are_sorted_and_inside_the_video(seed, count, method):
    rng = np.random.default_rng(seed)
    proposals = np.sort(rng.uniform(-20, 90, (count, 2)), axis=1)
    got = run(proposals, rng.uniform(0, 1, (count, 2)), PostprocessConfig(nms=NMSConfig(method=method)))
    assert (np.diff(got.scores) <= 0).all()
    assert got.segments_sec.min(initial=0) >= 0
    assert got.segments_sec.max(initial=0) <= 30
    assert len(got.labels) == len(got.segments_sec) == len(got) <= 100


@pytest.fixture
def external(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text('{"results": {"v_1": [0.25, 0.5]}, "class": ["dive", "jump"]}')
    return ExternalClassifier(ExternalClassifierConfig(path=str(path), top_k=2))


def test_an_external_classifier_names_what_suppression_left(external):
    config = PostprocessConfig(nms=HARD)
    got = run([[0, 10], [0, 11], [20, 40]], [0.8, 0.7, 0.6], config, external=external)
    assert got.labels == ("jump", "jump", "dive", "dive")
    np.testing.assert_allclose(got.scores, [0.4, 0.3, 0.2, 0.15], atol=1e-4)
    assert got.segments_sec.tolist() == [[0, 5], [10, 20], [0, 5], [10, 20]]


def test_localizer_and_classifier_must_agree_on_who_names_classes(external):
    with pytest.raises(ConfigError, match="localizer scores 2 classes: build it with num_classes=1"):
        run([[0, 10]], [[0.5, 0.5]], external=external)
    with pytest.raises(ConfigError, match="scores 1 classes but 2 are named; a class-agnostic localizer needs an ext"):
        run([[0, 10]], [[0.5]])
    with pytest.raises(ConfigError, match=r"scores 3 classes but 2 are named\."):
        run([[0, 10]], [[0.5, 0.5, 0.5]])


def test_numbers_that_are_none_are_refused_with_the_video():
    with pytest.raises(DataError, match="v_1: 1 of 2 valid proposals have scores that are not finite: the model has"):
        run([[0, 10], [0, 10]], [[0.5, 0.5], [np.nan, 0.5]])
    with pytest.raises(DataError, match="v_1: 2 of 2 valid proposals have proposals that are not finite"):
        run([[0, np.inf], [np.nan, 10]], [[0.5, 0.5], [0.5, 0.5]])


def test_shapes_that_do_not_belong_together_are_refused_with_the_video():
    with pytest.raises(DataError, match=r"v_1: proposals \(1, 2\), scores \(1, 2\) and valid \(2,\)"):
        run([[0, 10]], [[0.5, 0.5]], valid=[True, True])


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"suppress_in": "vidoe"}, "suppress_in = 'vidoe'. Did you mean 'video'"),
        ({"pre_nms_threshold": -0.1}, "pre_nms_threshold = -0.1 is out of range"),
        ({"pre_nms_top_k": 0}, "pre_nms_top_k = 0"),
        ({"score_decimals": -1}, "score_decimals = "),
    ],
)
def test_settings_that_cannot_be_run_are_refused_by_name(setting, complaint):
    with pytest.raises(ConfigError, match=complaint):
        PostprocessConfig(**setting)


def test_settings_come_from_a_nested_config_section():
    section = {"suppress_in": "video", "nms": {"sigma": 0.7, "max_seg_num": 2000}}
    got = build(PostprocessConfig, section, path="config.postprocess")
    assert got == PostprocessConfig(suppress_in="video", nms=NMSConfig(sigma=0.7, max_seg_num=2000))
    assert build(PostprocessConfig, {"nms": None}, path="config.postprocess").nms is None


@pytest.mark.parametrize("name", ["postproc.json", "cuhk_like.json"])
def test_published_results_are_reproduced(parity_dir, name):
    path = parity_dir / name
    content = load(path)
    assert parity.recognises(path, content)
    rows = list(parity.replay(path, content))
    assert rows
    assert [row for row in rows if not row.passed] == []
