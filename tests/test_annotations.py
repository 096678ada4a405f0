"""Reading annotations: the forms, what is counted, and one clear error for each kind of bad file."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from re2tal_jax.data.annotations import Annotations, activitynet_form, read_annotations
from re2tal_jax.data.classes import read_classes
from re2tal_jax.data.findings import Findings
from re2tal_jax.errors import DataError


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def entry(*annotations: object, **changes: object) -> dict[str, object]:
    """A video of 10 s in ActivityNet form; a change to None takes the field away."""
    video = {"subset": "training", "duration": 10.0, "annotations": list(annotations)} | changes
    return {key: value for key, value in video.items() if value is not None}


def act(start: object, end: object, label: object = "Run") -> dict[str, object]:
    return {"label": label, "segment": [start, end]}


def read(tmp_path: Path, *, options: dict | None = None, **videos: object) -> Annotations:
    return read_annotations(write(tmp_path / "anno.json", {"database": videos}), **(options or {}))


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_video_becomes_a_record(tmp_path):
    file = read(tmp_path, a=entry(act(1, 2.5, "Swim"), act(3, 4), frame=250), b=entry(act(0, 1), subset="validation"))
    a, b = file.records
    assert file.classes == ("Run", "Swim")
    assert (a.video_id, a.subset, a.duration_sec, a.num_frames, a.fps) == ("a", "training", 10.0, 250, 25.0)
    assert a.segments_sec.tolist() == [[1, 2.5], [3, 4]]
    assert a.labels.tolist() == [1, 0]
    assert a.segments_sec.dtype == np.float64
    assert a.labels.dtype == np.int64
    assert (b.subset, b.num_frames, b.fps) == ("validation", None, None)


def test_frames_over_duration_go_before_a_stated_rate(tmp_path):
    stated, counted = read(tmp_path, a=entry(act(1, 2), fps=30), b=entry(fps=30, frame=299)).records
    assert (stated.num_frames, stated.fps) == (None, 30.0)
    assert (counted.num_frames, counted.fps) == (299, 29.9)


def test_a_given_rate_replaces_the_files(tmp_path):
    (record,) = read(tmp_path, a=entry(act(1, 2), fps=30, frame=299), options={"fps": 15.0}).records
    assert (record.num_frames, record.fps) == (None, 15.0)


def test_a_video_without_segments_is_a_record(tmp_path):
    empty = read(tmp_path, a=entry(act(1, 2)), b=entry()).records[1]
    assert empty.segments_sec.shape == (0, 2)
    assert empty.labels.shape == (0,)


def test_names_are_utf8(tmp_path):
    file = read(tmp_path, видео=entry(act(1, 2, "Übung ①")))
    assert file.records[0].video_id == "видео"
    assert file.classes == ("Übung ①",)


def test_the_bmn_form_takes_subsets_from_its_table(tmp_path):
    path = write(
        tmp_path / "a.json", {"v_1": {"duration_second": 4.0, "duration_frame": 100, "annotations": [act(1, 2)]}}
    )
    table = write(tmp_path / "info.csv", "video,numFrame,subset\nv_1,100,validation\nv_2,7,testing\n")
    (record,) = read_annotations(path, video_info=table).records
    assert (record.video_id, record.subset, record.num_frames, record.fps) == ("v_1", "validation", 100, 25.0)


# --- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "finding", "left"),
    [
        (float("nan"), 2.0, "not_finite", None),
        (1.0, float("inf"), "not_finite", None),
        (3.0, 2.0, "reversed", None),
        (2.0, 2.0, "zero_length", None),
        (-3.0, -1.0, "outside", None),
        (-3.0, 0.0, "outside", None),
        (10.0, 12.0, "outside", None),
        (-1.0, 2.0, "negative_start", [0.0, 2.0]),
        (9.0, 12.0, "past_end", [9.0, 10.0]),
    ],
)
def test_a_segment_that_cannot_be_is_set_right_or_left_out_and_counted(tmp_path, start, end, finding, left):
    file = read(tmp_path, a=entry(act(start, end), act(4, 5)))
    assert dict(file.findings["training"]) == {finding: 1}
    assert file.findings["training"].examples == {finding: ["a"]}
    assert file.records[0].segments_sec.tolist() == ([left] if left else []) + [[4, 5]]


def test_both_ends_outside_count_twice(tmp_path):
    file = read(tmp_path, a=entry(act(-1, 11)))
    assert dict(file.findings["training"]) == {"negative_start": 1, "past_end": 1}
    assert file.records[0].segments_sec.tolist() == [[0, 10]]


def test_without_clipping_segments_stay(tmp_path):
    file = read(tmp_path, a=entry(act(-1, 11)), options={"clip": False})
    assert file.records[0].segments_sec.tolist() == [[-1, 11]]
    assert not file.findings["training"]


def test_a_segment_annotated_twice_counts_once(tmp_path):
    file = read(tmp_path, a=entry(act(1, 2), act(1, 2), act(1, 2, "Swim"), act(9, 11), act(9, 12)))
    assert len(file.records[0].labels) == 3
    assert file.findings["training"]["duplicate"] == 2


def test_ignored_labels_are_no_classes(tmp_path):
    file = read(tmp_path, a=entry(act(1, 2), act(3, 4, "Ambiguous")), options={"ignored_labels": ("Ambiguous",)})
    assert file.classes == ("Run",)
    assert dict(file.findings["training"]) == {"ignored_label": 1}
    assert [a["label"] for a in activitynet_form(file.entries)["database"]["a"]["annotations"]] == ["Run"]


def test_findings_are_kept_by_subset(tmp_path):
    file = read(tmp_path, a=entry(act(1, 1)), b=entry(act(2, 1), act(1, 2), subset="validation"))
    assert dict(file.findings["training"]) == {"zero_length": 1}
    assert dict(file.findings["validation"]) == {"reversed": 1}


def test_the_ground_truth_is_the_files_own(tmp_path):
    """Nothing is clipped or left out for the evaluation, which has its own rules, except what JSON cannot hold."""
    videos = {"a": entry(act(-1, 2), act(1, 1), act(1, 1), act(9, 12), act(20, 21))}
    file = read(tmp_path, a=entry(*videos["a"]["annotations"], act(float("nan"), 1)))
    assert activitynet_form(file.entries) == {"database": videos}


def test_findings_say_where_and_survive_a_worker():
    findings = Findings()
    for video_id in ("a", "a", "b", "c", "d"):
        findings.note("reversed", video_id)
    more = Findings()
    more.note("reversed", "e")
    findings.take(more)
    assert findings.lines() == ["reversed: 6 (such as a, b, c)"]
    back = pickle.loads(pickle.dumps(findings))
    assert back == findings
    assert back.lines() == findings.lines()


# --- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (entry(subset=None), r"video 'a': no \"subset\"; found 'duration', 'annotations'"),
        (entry(duration=None), r"video 'a': no \"duration\"; found .*thumos_gt.json.*config.data.name=custom"),
        (entry(act("1.5", "2.5")), r"two numbers .*found \['1.5', '2.5'\]. Take the quotes off"),
        (entry(annotations=None), r"video 'a': no \"annotations\""),
        (entry(subset=3), r"video 'a': \"subset\" must be text, found a number \(3\)"),
        (entry(duration="10"), r"video 'a': \"duration\" = '10' must be a positive number"),
        (entry(duration=0), r"\"duration\" = 0 must be a positive number"),
        (entry(duration=float("nan")), r"\"duration\" = nan must be a positive number"),
        (entry(frame=-5), r"\"frame\" = -5 must be a positive number"),
        (entry(fps=True), r"\"fps\" = True must be a positive number"),
        (entry(annotations={}), r"video 'a': \"annotations\" must be a list, found an object"),
        ([], r"video 'a' must be an object, found a list"),
        (entry("x"), r"video 'a': annotation 0 must be an object, found text \(x\)"),
        (entry(act(1, 2), {"segment": [1, 2]}), r"video 'a': annotation 1: no \"label\"; found 'segment'"),
        (entry({"label": "Run"}), r"video 'a': annotation 0: no \"segment\""),
        (entry(act(1, 2, 5)), r"annotation 0: \"label\" must be text, found a number"),
        (entry(act("1.0", 2)), r"annotation 0: \"segment\" must be two numbers .* found \['1.0', 2\]"),
        (entry(act(None, 2)), r"\"segment\" must be two numbers"),
        (entry({"label": "Run", "segment": [1, 2, 3]}), r"\"segment\" must be two numbers"),
    ],
)
def test_a_malformed_video_is_named(tmp_path, video, message):
    with pytest.raises(DataError, match=message) as raised:
        read(tmp_path, a=video)
    assert str(tmp_path / "anno.json") in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"database": {', r"not valid JSON at line 1, column 15"),
        ("", r"not valid JSON"),
        ("[]", r"a JSON object is needed, found a list"),
        ('{"database": []}', r"\"database\" must be an object of videos, found a list"),
        ('{"taxonomy": []}', r"no \"database\" at the top"),
        ('{"database": {"a": {}, "a": {}}}', r"'a' occurs twice in one object"),
        ('{"database": {}}', r"no segment with a label, so no classes"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, content, message):
    path = write(tmp_path / "anno.json", content)
    with pytest.raises(DataError, match=message) as raised:
        read_annotations(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing.json does not exist"):
        read_annotations(tmp_path / "nothing.json")
    with pytest.raises(DataError, match=r"is a folder"):
        read_annotations(tmp_path)


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "anno.json"
    path.write_bytes('{"database": {"ü": {}}}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 15\)"):
        read_annotations(path)


def test_the_bmn_form_needs_its_table(tmp_path):
    path = write(tmp_path / "a.json", {"v_1": {"duration_second": 4.0, "duration_frame": 100, "annotations": []}})
    with pytest.raises(DataError, match=r"needs the option video_info"):
        read_annotations(path)
    with pytest.raises(DataError, match=r"no.csv does not exist"):
        read_annotations(path, video_info=tmp_path / "no.csv")
    with pytest.raises(DataError, match=r"no column 'subset'; found video, split"):
        read_annotations(path, video_info=write(tmp_path / "info.csv", "video,split\nv_1,x\n"))
    with pytest.raises(DataError, match=r"video 'v_1' is missing in .*info.csv"):
        read_annotations(path, video_info=write(tmp_path / "info.csv", "video,subset\nv_2,x\n"))


def test_a_label_outside_the_class_list_is_named(tmp_path):
    classes = write(tmp_path / "classes.txt", "Run\nSwim\n")
    with pytest.raises(
        DataError, match=r"video 'b': label 'Swimm' is not in .*classes.txt \(2 such segments.* Did you mean 'Swim'"
    ):
        read(
            tmp_path,
            a=entry(act(1, 2)),
            b=entry(act(1, 2, "Swimm"), act(3, 4, "Swimm")),
            options={"classes": str(classes)},
        )
    with pytest.raises(DataError, match=r"label 'Run' is not in the given classes"):
        read(tmp_path, a=entry(act(1, 2)), options={"classes": ("Swim",)})


# --- class lists -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "classes"),
    [
        ("a.txt", "Run\nSwim far\n\n", ("Run", "Swim far")),
        ("a.txt", "7 Swim\n3 Run far\n", ("Run far", "Swim")),
        ("a.txt", "7 Swim\nRun\n", ("7 Swim", "Run")),
        ("a.json", '{"Swim": 2, "Background": 0, "Run": 1}', ("Run", "Swim")),
    ],
)
def test_a_class_list_gives_the_order(tmp_path, name, content, classes):
    assert read_classes(write(tmp_path / name, content)) == classes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n", r"a.txt: no class; one name a line"),
        ("a.txt", "Run\nSwim\nRun\n", r"class 'Run' is listed twice"),
        ("a.txt", "1 Run\n1 Swim\n", r"number 1 is given twice"),
        ("a.json", "{", r"a.json: not valid JSON"),
        ("a.json", '["Run"]', r"an object of names and whole numbers"),
        ("a.json", '{"Run": "1"}', r"an object of names and whole numbers"),
    ],
)
def test_a_malformed_class_list_is_named(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_classes(write(tmp_path / name, content))


def test_a_missing_class_list_is_named(tmp_path):
    with pytest.raises(DataError, match=r"Class list .*classes.txt does not exist"):
        read(tmp_path, a=entry(act(1, 2)), options={"classes": str(tmp_path / "classes.txt")})
