import json

import numpy as np
import pytest

from re2tal_jax.activitynet_format import read_activitynet, read_json, to_activitynet, write_activitynet
from re2tal_jax.errors import DataError
from re2tal_jax.types import Detections

ENTRY = {"segment": [1.0, 2.5], "label": "dive", "score": 0.5}


def detections(*rows):
    return Detections(
        segments_sec=np.array([row[0] for row in rows], np.float64).reshape(-1, 2),
        labels=tuple(row[1] for row in rows),
        scores=np.array([row[2] for row in rows], np.float64),
    )


RESULTS = {"v_1": detections(([1.0, 2.5], "dive", 0.5), ([0.25, 9.0], "jump", 0.125)), "v_2": detections()}


def test_detections_survive_the_way_to_a_file_and_back(tmp_path):
    path = write_activitynet(tmp_path / "predictions.json", RESULTS, external_data={"details": "none"})
    back = read_activitynet(path, classes=("dive", "jump"))
    assert list(back) == ["v_1", "v_2"]
    for video_id, want in RESULTS.items():
        np.testing.assert_array_equal(back[video_id].segments_sec, want.segments_sec)
        np.testing.assert_array_equal(back[video_id].scores, want.scores)
        assert back[video_id].labels == want.labels
    assert json.loads(path.read_text())["external_data"] == {"details": "none"}


def test_reading_puts_the_best_first():
    content = {"results": {"v_1": [ENTRY, ENTRY | {"score": 0.75, "label": "jump"}, ENTRY | {"score": 0.75}]}}
    got = read_activitynet(content)["v_1"]
    assert got.scores.tolist() == [0.75, 0.75, 0.5]
    assert got.labels == ("jump", "dive", "dive")


def test_no_videos_are_no_detections():
    assert read_activitynet(to_activitynet({})) == {}


def test_numbers_may_be_written_as_text():
    content = {"results": {"v_1": [{"segment": ["18.6", "24.8"], "label": "dive", "score": "0.5"}]}}
    assert read_activitynet(content)["v_1"].segments_sec.tolist() == [[18.6, 24.8]]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = write_activitynet(tmp_path / "predictions.json", RESULTS)
    before = path.read_bytes()
    with pytest.raises(DataError, match="detections of v_3: 1 scores are not finite"):
        write_activitynet(path, {"v_3": detections(([0, 1], "dive", np.nan))})
    with pytest.raises(DataError, match="detections of v_3: 1 of 1 segments are not finite"):
        write_activitynet(path, {"v_3": detections(([0, np.inf], "dive", 0.5))})
    with pytest.raises(TypeError):
        write_activitynet(path, {"v_3": detections(([0, 1], object(), 0.5))})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.json"]


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"segment": [1, 2], "score": 0.5}, "lacks 'label'"),
        ({"segment": [1, 2], "label": "dive"}, "lacks 'score'"),
        ({"label": "dive", "score": 0.5}, "lacks 'segment'"),
        (ENTRY | {"label": 3}, "has label 3; expected text"),
        (ENTRY | {"segment": [1, 2, 3]}, r"has segment \[1, 2, 3\]; expected \[start, end\]"),
        (ENTRY | {"segment": 7}, "has segment 7"),
        (ENTRY | {"segment": "12"}, "has segment '12'"),
        (ENTRY | {"segment": [1, None]}, "has end None; expected a finite number"),
        (ENTRY | {"segment": [float("nan"), 2]}, "has start nan"),
        (ENTRY | {"score": float("inf")}, "has score inf"),
        (ENTRY | {"score": "high"}, "has score 'high'"),
        (ENTRY | {"score": [0.5, 0.5]}, r"has score \[0.5, 0.5\]"),
        (ENTRY | {"score": 10**400}, "has score 1000"),
        ("dive", "is no mapping"),
    ],
)
def test_a_malformed_entry_is_named_by_file_video_and_place(tmp_path, entry, complaint):
    path = tmp_path / "detections.json"
    path.write_text(json.dumps({"results": {"v_1": [ENTRY], "v_2": [ENTRY, entry]}}))
    with pytest.raises(DataError, match=rf"detections\.json: v_2: entry 1 {complaint}"):
        read_activitynet(path)


@pytest.mark.parametrize("entries", [None, 3, "dive", {"segment": [0, 1]}])
def test_entries_that_are_no_list_are_named(entries):
    with pytest.raises(DataError, match="v_2: expected a list of entries"):
        read_activitynet({"results": {"v_1": [ENTRY], "v_2": entries}})


def test_a_label_outside_the_classes_is_named_with_its_video():
    content = {"results": {"v_1": [ENTRY], "v_2": [ENTRY | {"label": "jmp"}]}}
    with pytest.raises(DataError, match=r"v_2: label 'jmp' is not a class\. Did you mean 'jump'"):
        read_activitynet(content, classes=("dive", "jump"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is no json"),
        ("[]", "expected ActivityNet form.*it is no mapping"),
        ('{"detections": {}}', r"expected ActivityNet form.*its keys are \['detections'\]"),
        ('{"results": []}', "expected ActivityNet form"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path, text, complaint):
    path = tmp_path / "detections.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"detections.json.*{complaint}"):
        read_activitynet(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read: No such file"):
        read_json(tmp_path / "nowhere.json")
