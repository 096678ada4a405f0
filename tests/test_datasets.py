"""Data sets: subsets, filters, files, and the real annotations."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from re2tal_jax.config import build
from re2tal_jax.data import DATASETS, build_dataset, list_datasets
from re2tal_jax.data.annotations import read_annotations
from re2tal_jax.data.dataset import Dataset, find_videos, open_dataset
from re2tal_jax.errors import ConfigError, DataError


def act(start: float, end: float, label: str = "Run") -> dict[str, object]:
    return {"label": label, "segment": [start, end]}


def entry(subset: str, *annotations: object, **more: object) -> dict[str, object]:
    return {"subset": subset, "duration": 10.0, "annotations": list(annotations)} | more


VIDEOS = {
    "a": entry("training", act(1, 2), act(3, 3.05), act(5, 6, "Swim")),
    "b": entry("training", act(1, 1.09)),
    "c": entry("training"),
    "d": entry("validation", act(1, 2), act(9, 12), act(4, 4)),
    "e": entry("testing"),
}


def write(tmp_path: Path, videos: dict[str, object] = VIDEOS) -> str:
    path = tmp_path / "anno.json"
    path.write_text(json.dumps({"database": videos}))
    return str(path)


def anet(tmp_path: Path, **options: object) -> Dataset:
    return build_dataset("activitynet", annotations=write(tmp_path), **({"subset": "training"} | options))


def ids(dataset: Dataset) -> list[str]:
    return [record.video_id for record in dataset.records]


def files(tmp_path: Path, *names: str) -> str:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return str(folder)


# --- subsets and filters ---------------------------------------------------------------------------------------------


def test_training_leaves_out_short_segments_and_videos_without_any(tmp_path):
    dataset = anet(tmp_path, training=True)
    assert ids(dataset) == ["a"]
    assert dataset.records[0].segments_sec.tolist() == [[1, 2], [5, 6]]
    assert dict(dataset.findings) == {"too_short": 2, "video_without_segments": 2}
    assert dataset.findings.examples["video_without_segments"] == ["b", "c"]


def test_the_evaluation_keeps_all(tmp_path):
    assert ids(anet(tmp_path)) == ["a", "b", "c"]
    validation = anet(tmp_path, subset="validation")
    assert validation.records[0].segments_sec.tolist() == [[1, 2], [9, 10]]
    assert validation.ground_truth == {"database": {"d": VIDEOS["d"]}}


def test_the_ground_truth_is_untouched_by_filters(tmp_path):
    dataset = anet(tmp_path, training=True, class_agnostic=True, blocked=("b",))
    assert dataset.ground_truth == {"database": {key: VIDEOS[key] for key in "ac"}}


def test_several_subsets_come_in_the_files_order(tmp_path):
    assert ids(anet(tmp_path, subset=("validation", "training"))) == ["a", "b", "c", "d"]


def test_class_agnostic_is_one_class_and_joins_what_then_repeats(tmp_path):
    videos = {"a": entry("training", act(1, 2), act(1, 2, "Swim"), act(3, 4, "Swim"))}
    dataset = build_dataset("activitynet", annotations=write(tmp_path, videos), subset="training", class_agnostic=True)
    assert dataset.classes == ("action",)
    assert dataset.records[0].segments_sec.tolist() == [[1, 2], [3, 4]]
    assert dataset.records[0].labels.tolist() == [0, 0]
    assert dict(dataset.findings) == {"duplicate": 1}


def test_a_subset_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(
        DataError,
        match=r"no video in subset 'valid'. Did you mean 'validation'\? There are: training \(3 videos, 4 segments\)",
    ):
        anet(tmp_path, subset="valid")


def test_a_subset_without_ground_truth_is_refused_unless_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"subset testing has videos but no ground truth.*testing \(1 video, 0 segm"):
        anet(tmp_path, subset="testing")
    assert ids(anet(tmp_path, subset="testing", unlabelled=True)) == ["e"]


def test_training_needs_a_video_that_is_left(tmp_path):
    with pytest.raises(DataError, match=r"is left of 3 videos\. Left out: .*too_short: .*lower min_length_ratio\.$"):
        anet(tmp_path, training=True, min_length_ratio=0.5)


def test_blocked_videos_come_from_a_file_or_a_tuple(tmp_path):
    listed = tmp_path / "blocked.txt"
    listed.write_text("a\nnot here\n")
    for blocked in (str(listed), ("a", "not here")):
        dataset = anet(tmp_path, blocked=blocked)
        assert ids(dataset) == ["b", "c"]
        assert dataset.findings["video_blocked"] == 1
        assert set(dataset.ground_truth["database"]) == {"b", "c"}
    with pytest.raises(DataError, match=r"no.txt does not exist"):
        anet(tmp_path, blocked=str(tmp_path / "no.txt"))


# --- THUMOS-14 -------------------------------------------------------------------------------------------------------


def test_thumos_segments_lie_on_whole_frames(tmp_path):
    videos = {
        "counted": entry("Test", act(0.19, 0.31), act(0.32, 0.33), frame=100),
        "rated": entry("Test", act(0.19, 0.31), fps=20),
        "neither": entry("Test", act(0.19, 0.31)),
    }
    dataset = build_dataset("thumos14", annotations=write(tmp_path, videos), subset="Test")
    counted, rated, neither = (record.segments_sec for record in dataset.records)
    np.testing.assert_allclose(counted, [[0.1, 0.3], [0.3, 0.3]])
    np.testing.assert_allclose(rated, [[0.15, 0.3]])
    np.testing.assert_allclose(neither, [[0.19, 0.31]])
    train = build_dataset("thumos14", annotations=write(tmp_path, videos), subset="Test", training=True)
    np.testing.assert_allclose(train.records[0].segments_sec, [[0.1, 0.3]])  # the other is shorter than a frame


def test_thumos_leaves_out_ambiguous_segments_whether_listed_or_not(tmp_path):
    path = write(tmp_path, {"a": entry("Test", act(1, 2), act(3, 4, "Ambiguous"))})
    listed = tmp_path / "classes.txt"
    listed.write_text("Ambiguous\nRun\n")
    inferred = build_dataset("thumos14", annotations=path, subset="Test")
    given = build_dataset("thumos14", annotations=path, subset="Test", classes=str(listed))
    assert inferred.classes == ("Run",)
    assert given.classes == ("Ambiguous", "Run")
    assert [dataset.records[0].labels.tolist() for dataset in (inferred, given)] == [[0], [1]]


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_are_found_with_and_without_prefix_and_by_any_suffix(tmp_path):
    folder = Path(files(tmp_path, "a.mp4", "v_b.MKV", "c.webm", "d.avi", "d.mov", "e.txt", "v_e.mp4.part"))
    found = find_videos(folder, ["v_a", "b", "c", "d", "e"])
    assert {key: path.name for key, path in found.items()} == {
        "v_a": "a.mp4",
        "b": "v_b.MKV",
        "c": "c.webm",
        "d": "d.avi",
    }


def test_the_id_itself_goes_before_a_prefix(tmp_path):
    assert find_videos(files(tmp_path, "v_a.mp4", "a.mov"), ["a"])["a"].name == "a.mov"


def test_missing_videos_are_reported_together_or_left_out(tmp_path):
    folder = files(tmp_path, "b.mp4")
    with pytest.raises(DataError, match=r"2 of 3 videos have no file in .*videos: a, c\. .*missing_videos to 'skip'"):
        anet(tmp_path, videos=folder)
    dataset = anet(tmp_path, videos=folder, missing_videos="skip")
    assert ids(dataset) == ["b"]
    assert dataset.video_paths == {"b": Path(folder) / "b.mp4"}
    assert dataset.findings["video_missing"] == 2
    assert set(dataset.ground_truth["database"]) == {"a", "b", "c"}


def test_a_folder_with_no_video_of_the_subset_is_an_error_either_way(tmp_path):
    with pytest.raises(
        DataError, match=r"left of 3 videos\. Left out: video_missing: 3 \(such as a, b, c\)\. To go on"
    ):
        anet(tmp_path, videos=files(tmp_path), missing_videos="skip")
    with pytest.raises(DataError, match=r"Video folder .*nowhere does not exist"):
        anet(tmp_path, videos=str(tmp_path / "nowhere"))


# --- registry and configuration --------------------------------------------------------------------------------------


def test_data_sets_are_listed_and_unknown_names_answered():
    assert {"activitynet", "thumos14", "synthetic"} <= set(list_datasets())
    with pytest.raises(ConfigError, match=r"Unknown dataset 'thumos'. Did you mean 'thumos14'"):
        build_dataset("thumos")


def test_a_config_section_opens_a_data_set(tmp_path):
    section = {"annotations": write(tmp_path), "subset": ["training", "validation"], "blocked": ["a"], "fps": 30}
    assert ids(build(DATASETS["activitynet"], section, path="config.data")) == ["b", "c", "d"]
    with pytest.raises(ConfigError, match=r"Unknown key config.data.subsets. Did you mean 'subset'"):
        build(DATASETS["activitynet"], section | {"subsets": "x"}, path="config.data")
    with pytest.raises(ConfigError, match=r"config.data.missing_videos = 'ignore' is not allowed"):
        build(DATASETS["activitynet"], section | {"missing_videos": "ignore"}, path="config.data")


def test_a_length_ratio_is_a_share(tmp_path):
    with pytest.raises(ConfigError, match=r"min_length_ratio = 1.5 must lie in \[0, 1\)"):
        open_dataset(read_annotations(write(tmp_path)), subset="training", min_length_ratio=1.5)


# --- real annotations ------------------------------------------------------------------------------------------------


def test_activitynet_has_the_published_counts(data_dir):
    folder = data_dir / "anet_annos"
    file = read_annotations(
        folder / "anet_anno_action.json",
        video_info=folder / "video_info_new.csv",
        classes=folder / "anet_classes_idx.json",
    )
    assert Counter(r.subset for r in file.records) == {"training": 9649, "validation": 4728, "testing": 4851}
    assert len(file.classes) == 200
    assert file.classes == tuple(sorted(file.classes))
    assert file.findings["training"]["zero_length"] + file.findings["validation"]["zero_length"] == 12
    train = open_dataset(file, subset="training", training=True, min_length_ratio=0.01, class_agnostic=True)
    assert len(train.records) + train.findings["video_without_segments"] == 9649
    assert all((r.segments_sec >= 0).all() and (r.segments_sec <= r.duration_sec).all() for r in file.records)
    validation = open_dataset(file, subset="validation")
    assert len(validation.records) == 4728


@pytest.mark.parametrize(("subset", "videos", "instances"), [("Validation", 200, 3007), ("Test", 212, 3358)])
def test_thumos_has_the_published_counts(data_dir, subset, videos, instances):
    folder = data_dir / "thumos_gt"
    dataset = build_dataset(
        "thumos14",
        annotations=str(folder / "actionformer_thumos14.json"),
        classes=str(folder / "thumos_classes_idx.json"),
        subset=subset,
    )
    assert len(dataset.records) == videos
    assert len(dataset.classes) == 20
    assert sum(len(v["annotations"]) for v in dataset.ground_truth["database"].values()) == instances
    seen = sum(len(r.labels) for r in dataset.records)
    assert seen + sum(dataset.findings[k] for k in ("outside", "duplicate", "zero_length")) == instances
    frames = np.concatenate([r.segments_sec * r.fps for r in dataset.records])
    np.testing.assert_allclose(frames, frames.round(), atol=1e-6)


def test_an_annotation_without_durations_is_refused(data_dir):
    """The public variant of 3,311 instances gives neither durations nor numbers."""
    path = data_dir / "thumos_gt" / "thumos_gt.json"
    with pytest.raises(DataError, match=r"thumos_gt.json: video 'video_test_\d+': no \"duration\""):
        build_dataset("thumos14", annotations=str(path), subset="test")
