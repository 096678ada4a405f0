import json
import logging

import numpy as np
import pytest

from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.external_classifier import ExternalClassifier, ExternalClassifierConfig

CLASSES = ["dive", "jump", "run"]
SEGMENTS = np.array([[0.0, 1.0], [2.0, 3.0]])
SCORES = np.array([0.5, 0.25])


@pytest.fixture
def scores_file(tmp_path):
    def write(results, classes=CLASSES, field="class"):
        path = tmp_path / "scores.json"
        path.write_text(json.dumps({"results": results, field: classes}))
        return str(path)

    return write


def test_each_segment_is_repeated_for_the_best_classes(scores_file):
    classifier = ExternalClassifier(ExternalClassifierConfig(path=scores_file({"v_1": [0.2, 0.0, 0.8]}), top_k=2))
    segments, scores, names = classifier.fuse("v_1", SEGMENTS, SCORES)
    assert names == ("run", "run", "dive", "dive")
    assert segments.tolist() == [*SEGMENTS.tolist(), *SEGMENTS.tolist()]
    np.testing.assert_allclose(scores, [0.4, 0.2, 0.1, 0.05])


def test_the_square_root_form_and_logits(scores_file):
    path = scores_file({"v_1": np.log([0.64, 0.2, 0.16]).tolist()}, field="classes")
    config = ExternalClassifierConfig(path=path, top_k=1, fusion="sqrt", softmax=True)
    _, scores, names = ExternalClassifier(config).fuse("v_1", SEGMENTS, SCORES)
    assert names == ("dive", "dive")
    np.testing.assert_allclose(scores, 0.8 * np.sqrt(SCORES))


def test_equal_class_scores_keep_the_order_of_the_file(scores_file):
    classifier = ExternalClassifier(ExternalClassifierConfig(path=scores_file({"v_1": [0.2, 0.5, 0.5]}), top_k=2))
    assert classifier.fuse("v_1", SEGMENTS[:1], SCORES[:1])[2] == ("jump", "run")


def test_a_video_without_scores_is_an_error_that_names_file_video_and_prefix(scores_file):
    classifier = ExternalClassifier(ExternalClassifierConfig(path=scores_file({"1": [1, 0, 0]})))
    with pytest.raises(DataError, match=r"scores\.json: no scores for video v_1 among 1\. It has '1'.*prefix 'v_'"):
        classifier.fuse("v_1", SEGMENTS, SCORES)
    with pytest.raises(DataError, match=r"no scores for video v_2 among 1\. Complete the file, or set missing='skip'"):
        classifier.fuse("v_2", SEGMENTS, SCORES)


def test_a_video_without_scores_can_be_skipped_counted_and_logged_once(scores_file, caplog):
    config = ExternalClassifierConfig(path=scores_file({"v_1": [1, 0, 0]}), missing="skip")
    classifier = ExternalClassifier(config)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            segments, scores, names = classifier.fuse("v_2", SEGMENTS, SCORES)
    assert (len(segments), len(scores), names) == (0, 0, ())
    assert classifier.skipped == {"v_2"}
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("results", "classes", "complaint"),
    [
        ({"v_1": [0.5, 0.5]}, CLASSES, r"v_1: scores have shape \(2,\); expected one for each of 3"),
        ({"v_1": ["a", "b", "c"]}, CLASSES, "v_1: expected one score per class"),
        ({"v_1": [0.5, float("nan"), 0]}, CLASSES, "v_1: 1 scores are not finite"),
        ({"v_1": [-3.0, 1.0, 2.0]}, CLASSES, "v_1: score -3.0 is negative; .* softmax=True"),
        ({}, None, "expected 'class' or 'classes'"),
        ({}, ["dive", "dive", "run"], r"classes named twice: \['dive'\]"),
        ({}, ["dive", "jumq"], "1 of its 2 classes are unknown to the data set, first 'jumq'. Did you mean 'jump'"),
    ],
)
def test_a_faulty_scores_file_is_refused_when_it_is_read(scores_file, results, classes, complaint):
    config = ExternalClassifierConfig(path=scores_file(results, classes))
    with pytest.raises(DataError, match=rf"scores\.json.*{complaint}"):
        ExternalClassifier(config, known_classes=CLASSES)


def test_more_classes_than_there_are_cannot_be_asked_for(scores_file):
    with pytest.raises(ConfigError, match="top_k = 4 exceeds the 3 classes"):
        ExternalClassifier(ExternalClassifierConfig(path=scores_file({}), top_k=4))


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"fusion": "mean"}, "fusion = 'mean'. Allowed: product, sqrt"),
        ({"missing": "skp"}, "missing = 'skp'. Did you mean 'skip'"),
        ({"top_k": 0}, "top_k = 0"),
    ],
)
def test_settings_are_checked(setting, complaint):
    with pytest.raises(ConfigError, match=complaint):
        ExternalClassifierConfig(path="scores.json", **setting)
