"""Your own data set: each form of annotation, names of videos, durations, splits, and one clear error for bad input."""

import json
import logging
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from re2tal_jax.config import build, read_config_file
from re2tal_jax.data import DATASETS, build_dataset
from re2tal_jax.data.custom import held_out_videos
from re2tal_jax.data.custom.tables import read_listing
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.video_folder import VideoFolder, video_id
from re2tal_jax.errors import ConfigError, DataError
from tests.video_files import numbered_frames, write_video

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> bytes:
    """A video of 20 frames, 2 seconds."""
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", numbered_frames(20)).read_bytes()


def write(path: Path, content: str | bytes | object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def folder(tmp_path: Path, clip: bytes, *names: str) -> Path:
    for name in names:
        write(tmp_path / "videos" / name, clip)
    return tmp_path / "videos"


def table(tmp_path: Path, *rows: str, header: str = "video,start_sec,end_sec,label") -> Path:
    return write(tmp_path / "anno.csv", "\n".join([header, *rows]) + "\n")


def opened(annotations: Path, videos: Path | None, **options: object) -> Dataset:
    options = {"subset": ("training", "validation"), **options}
    videos_option = None if videos is None else str(videos)
    return build_dataset("custom", annotations=str(annotations), videos=videos_option, **options)


def segments(dataset: Dataset) -> dict[str, list]:
    return {
        record.video_id: [
            (start, end, dataset.classes[label])
            for (start, end), label in zip(record.segments_sec.tolist(), record.labels.tolist(), strict=True)
        ]
        for record in dataset.records
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_and_a_folder_are_a_data_set(tmp_path, clip):
    videos = folder(tmp_path, clip, "a.mp4", "b.mp4", "unlisted.mp4")
    rows = table(tmp_path, "a.mp4,0.2,0.5,Run", "b,1,1.5,Jump", "a,0.7,5,Jump", "")
    dataset = opened(rows, videos)
    assert dataset.classes == ("Jump", "Run")
    assert segments(dataset) == {"a": [(0.2, 0.5, "Run"), (0.7, 2.0, "Jump")], "b": [(1.0, 1.5, "Jump")]}
    assert dataset.video_paths == {name: videos / f"{name}.mp4" for name in "ab"}
    assert [(r.duration_sec, r.num_frames, r.fps) for r in dataset.records] == [(2.0, 20, 10.0)] * 2
    assert dict(dataset.findings) == {"past_end": 1}
    assert sorted(record.subset for record in dataset.records) == ["training", "validation"]


def test_subsets_and_durations_of_a_table_need_no_videos(tmp_path):
    header = "Video , start_sec,end_sec,label,subset,duration_sec,annotator"
    rows = table(tmp_path, "a,1,2,Run,train,10,me", "b,,,,train,4.5,me", "c,1,2,Run,val,3,you", header=header)
    dataset = opened(rows, None, subset="train")
    assert segments(dataset) == {"a": [(1.0, 2.0, "Run")], "b": []}
    assert [record.duration_sec for record in dataset.records] == [10.0, 4.5]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "video;start_sec;end_sec;label\nx;0,5;1,25;A, b\n"),
        ("a.tsv", "video\tstart_sec\tend_sec\tlabel\nx\t0.5\t1.25\tA, b\n"),
        ("a.csv", '\ufeffvideo,start_sec,end_sec,label\r\nx,0:00.5,0:0:1.25,"A, b"\r\n'),
    ],
)
def test_what_spreadsheets_write_is_read(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert read_listing(path) == {"x": {"annotations": [{"segment": [0.5, 1.25], "label": "A, b"}]}}


def test_minutes_without_hours_may_be_many(tmp_path):
    (video,) = read_listing(table(tmp_path, "a,59:59,75:00.5,A")).values()
    assert video["annotations"] == [{"segment": [3599.0, 4500.5], "label": "A"}]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["a,1,2,A"], "name,start_sec,end_sec,label", r"no column 'video'; the first line has 'name', 'start_sec'"),
        (["a,1,2,A"], "video,start,end,label", r"no column 'start_sec'"),
        (["a,1,2,A,x"], "video,start_sec,end_sec,label,subst", r"column 'subst': did you mean 'subset'\?"),
        (["a,one,2,A"], None, r"line 2: video 'a': start_sec = 'one' is no time"),
        (["a,1,2,A", "a,1,,A"], None, r"line 3: video 'a': start_sec, end_sec and label belong together"),
        (["a,1,0:00:75,A"], None, r"line 2: video 'a': end_sec = '0:00:75': seconds end at 59"),
        (["a,1,2,A", "b,1,0:75:00,A"], None, r"line 3: video 'b': end_sec = '0:75:00': minutes end at 59"),
        (["a,1,2,"], None, r"line 2: video 'a': start_sec, end_sec and label belong together"),
        ([",1,2,A"], None, r"line 2: no video is named"),
        (
            ["a,1,2,A,t", "a,1,2,A,v"],
            "video,start_sec,end_sec,label,subset",
            r"video 'a' has the subset 't' and 'v'; give it one",
        ),
    ],
)
def test_a_bad_table_is_named_by_line(tmp_path, rows, header, message):
    path = table(tmp_path, *rows, header=header or "video,start_sec,end_sec,label")
    with pytest.raises(DataError, match=message) as raised:
        read_listing(path)
    assert str(path) in str(raised.value)


def test_bad_text_is_named(tmp_path):
    with pytest.raises(DataError, match=r"UTF-16 text; save it as UTF-8"):
        read_listing(write(tmp_path / "a.csv", "video,start_sec".encode("utf-16")))
    with pytest.raises(DataError, match=r"line 2: video 'a': the label 'caf\\xe9' is not UTF-8"):
        read_listing(write(tmp_path / "b.csv", "video,start_sec,end_sec,label\na,1,2,café\n".encode("latin-1")))
    with pytest.raises(DataError, match=r"line 2: video 'a': start_sec = '1,5' is no time"):
        read_listing(write(tmp_path / "c.csv", 'video,start_sec,end_sec,label\na,"1,5",2,A\n'))


# --- ELAN and VIA ----------------------------------------------------------------------------------------------------

EAF = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT AUTHOR="" DATE="2024-01-01T00:00:00+00:00" FORMAT="3.0" VERSION="3.0">
  <HEADER MEDIA_FILE="" TIME_UNITS="milliseconds">
    <MEDIA_DESCRIPTOR MEDIA_URL="file:///C:/study/sound.wav" MIME_TYPE="audio/x-wav"/>
    <MEDIA_DESCRIPTOR MEDIA_URL="file:///C:/study/day%201/clip.mp4" MIME_TYPE="video/mp4" {origin}/>
  </HEADER>
  <TIME_ORDER>
    <TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="200"/><TIME_SLOT TIME_SLOT_ID="ts2" TIME_VALUE="500"/>
    <TIME_SLOT TIME_SLOT_ID="ts3" TIME_VALUE="1500"/><TIME_SLOT TIME_SLOT_ID="ts4"/>
  </TIME_ORDER>
  <TIER LINGUISTIC_TYPE_REF="default-lt" TIER_ID="action">
    <ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts2">
      <ANNOTATION_VALUE> Run </ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
    <ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a2" TIME_SLOT_REF1="ts2" TIME_SLOT_REF2="ts3">
      <ANNOTATION_VALUE/></ALIGNABLE_ANNOTATION></ANNOTATION>
  </TIER>
  <TIER LINGUISTIC_TYPE_REF="default-lt" TIER_ID="unfinished">
    <ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a3" TIME_SLOT_REF1="ts3" TIME_SLOT_REF2="ts4">
      <ANNOTATION_VALUE>Jump</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
  </TIER>
  <TIER LINGUISTIC_TYPE_REF="note" PARENT_REF="action" TIER_ID="note">
    <ANNOTATION><REF_ANNOTATION ANNOTATION_ID="a4" ANNOTATION_REF="a1">
      <ANNOTATION_VALUE>fast</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION>
  </TIER>
</ANNOTATION_DOCUMENT>
"""


def test_elan_files_are_read_tier_by_tier(tmp_path, clip):
    eaf = write(tmp_path / "eaf" / "x.eaf", EAF.format(origin=""))
    assert segments(opened(eaf, folder(tmp_path, clip, "day 1/clip.mp4"), tiers="action", subset="training")) == {
        "day 1/clip": [(0.2, 0.5, "Run"), (0.5, 1.5, "action")]
    }
    with pytest.raises(DataError, match=r"x.eaf: tier 'unfinished': annotation 'a3' is not aligned in time"):
        read_listing(eaf)
    with pytest.raises(DataError, match=r"no tier or attribute 'actoin' \(option tiers\). Did you mean 'action'"):
        read_listing(eaf, tiers=["actoin"])


def test_elan_time_starts_where_its_video_says(tmp_path):
    (video,) = read_listing(
        write(tmp_path / "x.eaf", EAF.format(origin='TIME_ORIGIN="1000"')), tiers=["action"]
    ).values()
    assert [a["segment"] for a in video["annotations"]] == [[1.2, 1.5], [1.5, 2.5]]


def test_a_folder_of_elan_files_without_media_is_named_by_its_files(tmp_path):
    bare = re.sub(r"<MEDIA_DESCRIPTOR.*?/>", "", EAF)
    for name in ("a", "b"):
        write(tmp_path / "eaf" / f"{name}.eaf", bare)
    assert list(read_listing(tmp_path / "eaf", tiers=["action"])) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<ANNOTATION_DOCUMENT>", r"x.eaf: not valid XML: no element found: line 1"),
        ("<html/>", r"x.eaf: not an ELAN file \(its root is 'html'\)"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><ANNOTATION_DOCUMENT>&b;</ANNOTATION_DOCUMENT>', r"x.eaf: .* ELAN never does"),
        (EAF.format(origin='TIME_ORIGIN="x"'), r"x.eaf: TIME_ORIGIN = 'x'; whole milliseconds"),
        (EAF.replace('TIME_VALUE="500"', 'TIME_VALUE="0.5"').format(origin=""), r"tier 'action': annotation 'a1' has"),
    ],
)
def test_a_bad_elan_file_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_listing(write(tmp_path / "x.eaf", text))


def via(**changes: object) -> dict:
    attribute = {"aname": "action", "anchor_id": "FILE1_Z2_XY0", "type": 4, "options": {"1": "Run", "2": "Jump"}}
    frames = {"aname": "box", "anchor_id": "FILE1_Z1_XY1", "type": 1, "options": {}}
    several = {"aname": "mood", "anchor_id": "FILE1_Z2_XY0", "type": 2, "options": {"1": "glad", "2": "loud"}}
    file = {"fid": 1, "fname": "day 1/clip.mp4", "type": 4, "loc": 1, "src": ""}
    linked = {"fid": 2, "fname": "", "type": 4, "loc": 2, "src": "https://example.org/a%20b.mp4"}
    return {
        "project": {"vid_list": ["1", "2"]},
        "attribute": {"1": attribute, "2": frames, "3": several},
        "file": {"1": file, "2": linked, "3": file | {"type": 2}},
        "view": {"1": {"fid_list": [1]}, "2": {"fid_list": ["2"]}, "3": {"fid_list": [3]}},
        "metadata": {
            "a": {"vid": "1", "z": [0.2, 0.5], "xy": [], "av": {"1": "2", "3": "1,2"}},
            "b": {"vid": "2", "z": [1, 2], "xy": [], "av": {"1": "Walk"}},
            "c": {"vid": "1", "z": [1.0], "xy": [2, 1, 1, 5, 5], "av": {"2": "x"}},
            "d": {"vid": "3", "z": [], "xy": [], "av": {}},
        },
    } | changes


def test_via_projects_are_read_attribute_by_attribute(tmp_path, clip):
    path = write(tmp_path / "via.json", via())
    assert {name: [a["label"] for a in video["annotations"]] for name, video in read_listing(path).items()} == {
        "day 1/clip.mp4": ["Jump", "glad", "loud"],
        "https://example.org/a b.mp4": ["Walk"],
    }
    dataset = opened(path, folder(tmp_path, clip, "clip.mp4", "a b.mp4"), tiers=("action",))
    assert segments(dataset) == {"clip": [(0.2, 0.5, "Jump")], "a b": [(1.0, 2.0, "Walk")]}


def test_a_bad_via_project_is_named(tmp_path):
    with pytest.raises(DataError, match=r"via.json: not a whole VIA-3 project \(KeyError: '1'\)"):
        read_listing(write(tmp_path / "via.json", via(file={})))
    segment = {"a": {"vid": "1", "z": [0, 1], "xy": [], "av": {}}}
    with pytest.raises(DataError, match=r"video 'day 1/clip.mp4': segment 'a' has no label"):
        read_listing(write(tmp_path / "via.json", via(metadata=segment)))
    with pytest.raises(DataError, match=r"via.json: neither ActivityNet form .* nor a VIA-3 project"):
        read_listing(write(tmp_path / "via.json", {"videos": []}))


# --- ActivityNet form ------------------------------------------------------------------------------------------------


def test_activitynet_form_may_lack_subsets_and_durations(tmp_path, clip):
    act = {"segment": [0.5, 1], "label": "Run"}
    database = {"v_a.mp4": {"annotations": [act]}, "b": {"duration": 9.0, "url": "x", "annotations": [act]}}
    dataset = opened(write(tmp_path / "a.json", {"database": database}), folder(tmp_path, clip, "a.mp4", "v_b.mp4"))
    assert [(r.video_id, r.duration_sec, r.num_frames) for r in dataset.records] == [("a", 2.0, 20), ("v_b", 9.0, None)]
    assert set(dataset.ground_truth["database"]) == {"a", "v_b"}


def test_what_is_malformed_in_it_is_told_as_for_activitynet(tmp_path, clip):
    videos = folder(tmp_path, clip, "a.mp4")
    for video, message in (
        ({"annotations": [{"segment": [1, "2"], "label": "Run"}]}, r"a.json: video 'a': annotation 0: \"segment\""),
        ({"annotations": {}}, r"video 'a': \"annotations\" must be a list"),
        ({}, r"video 'a': no \"annotations\""),
        ({"annotations": [], "duration": -1}, r"video 'a': \"duration\" = -1 must be a positive number"),
    ):
        with pytest.raises(DataError, match=message):
            opened(write(tmp_path / "a.json", {"database": {"a": video}}), videos)


def test_files_that_are_no_annotation_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"anno.csv does not exist"):
        read_listing(tmp_path / "anno.csv")
    with pytest.raises(DataError, match=r"a.txt: annotations are read from .csv, .tsv, .eaf, .json"):
        read_listing(write(tmp_path / "a.txt", "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no annotation file"):
        read_listing(tmp_path / "empty")


# --- names of videos -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "clip",
        "clip.mp4",
        " clip.MP4 ",
        "v_clip",
        "day 1/clip.mp4",
        "./day 1/clip",
        "../videos/day 1/v_clip.mp4",
        "/home/me/videos/day 1/clip.mp4",
        "D:\\study\\day 1\\clip.mp4",
    ],
)
def test_a_video_may_be_named_in_many_ways(tmp_path, name):
    files = VideoFolder(folder(tmp_path, b"", "day 1/clip.mp4", "other.mp4"))
    found = files.find(name)
    assert found == "day 1/clip.mp4"
    assert video_id(found) == "day 1/clip"


def test_names_are_told_apart_by_their_folders(tmp_path):
    files = VideoFolder(
        folder(tmp_path, b"", "1/a.mp4", "2/a.mp4", "2/b.mov", "2/b.mp4", "c.v2.mp4", ".hid.mp4", "x.txt")
    )
    assert files.files == ("1/a.mp4", "2/a.mp4", "2/b.mov", "2/b.mp4", "c.v2.mp4")
    assert files.find("2/a") == "2/a.mp4"
    assert files.find("3/a") is None
    assert files.find("b") == "2/b.mp4"
    assert files.find("b.mov") == "2/b.mov"
    assert files.find("c.v2") == "c.v2.mp4"
    assert files.find("") is None
    with pytest.raises(DataError, match=r"'a' may mean 2 files \(1/a.mp4, 2/a.mp4\): write its folder"):
        files.find("a")


def test_accents_are_compared_whatever_the_system_wrote(tmp_path):
    assert VideoFolder(folder(tmp_path, b"", "cafe\u0301.mp4")).find("caf\u00e9") == "cafe\u0301.mp4"


def test_links_in_a_circle_end(tmp_path):
    videos = folder(tmp_path, b"", "in/a.mp4")
    (videos / "in" / "round").symlink_to(videos)
    assert VideoFolder(videos).files == ("in/a.mp4",)


def test_names_that_are_not_utf8_are_found_by_their_bytes_and_told_as_text(tmp_path, clip):
    videos = folder(tmp_path, clip, os.fsdecode(b"caf\xe9 1.mp4"), "b.mp4")
    rows = write(tmp_path / "a.csv", b"video,start_sec,end_sec,label\ncaf\xe9 1.mp4,0,1,Run\nb,0,1,Run\n")
    dataset = opened(rows, videos)
    assert set(dataset.video_paths) == {"caf\\xe9 1", "b"}
    assert all(path.is_file() for path in dataset.video_paths.values())
    json.dumps(dataset.ground_truth, ensure_ascii=False).encode()


def test_two_names_of_one_file_are_one_video_unless_their_folders_differ(tmp_path, clip):
    videos = folder(tmp_path, clip, "a.mp4", "b.mp4")
    assert len(segments(opened(table(tmp_path, "a,0,1,A", "x/a.mp4,1,2,A", "b,0,1,A"), videos))["a"]) == 2
    with pytest.raises(DataError, match=r"'x/a' and 'y/a.mp4' would both be the video 'a'"):
        opened(table(tmp_path, "x/a,0,1,A", "y/a.mp4,1,2,A"), videos)
    folder(tmp_path, clip, "a.mov")
    with pytest.raises(DataError, match=r"'a.mp4' and 'a.mov' would both be the video 'a'"):
        opened(table(tmp_path, "a.mp4,0,1,A", "a.mov,1,2,A"), videos)


# --- durations, splits, classes --------------------------------------------------------------------------------------


def test_videos_without_a_file_stop_or_are_left_out_and_damaged_ones_are_told(tmp_path, clip, caplog):
    videos = folder(tmp_path, clip, *(f"{name}.mp4" for name in "abcd"))
    write(videos / "bad.mp4", clip[: len(clip) // 3])
    rows = table(tmp_path, *(f"{name},0,1.5,Run" for name in ["a", "b", "c", "d", "bad", "gone"]))
    with pytest.raises(DataError, match=r"1 of 6 videos have no file in .*videos: gone"):
        opened(rows, videos)
    dataset = opened(rows, videos, missing_videos="skip")
    assert sorted(dataset.video_paths) == ["a", "b", "bad", "c", "d"]
    assert dict(dataset.findings) == {"video_unreadable": 1, "video_missing": 1}
    assert dataset.findings.examples == {"video_unreadable": ["bad"], "video_missing": ["gone"]}
    assert {"bad", "gone"} <= set(dataset.ground_truth["database"])  # they count as missed
    (bad,) = [record for record in dataset.records if record.video_id == "bad"]
    assert (bad.duration_sec, bad.num_frames) == (1.5, None)
    assert re.search(r"video 'bad' cannot be read: .*bad.mp4", caplog.text)


def test_durations_have_to_come_from_somewhere(tmp_path, clip):
    rows = table(tmp_path, "a,0,1,Run", "b,0,1,Run")
    with pytest.raises(DataError, match=r"no duration of video 'a' and 1 other, and.*\(option videos\)"):
        opened(rows, None)
    with pytest.raises(DataError, match=r"Video folder .*nowhere does not exist"):
        opened(rows, tmp_path / "nowhere")


def test_a_video_keeps_its_subset_when_others_are_added():
    names = [f"video {i}" for i in range(2000)]
    few, many = held_out_videos(names[:500], 0.2), held_out_videos(names, 0.2)
    assert few == many & set(names[:500])
    assert 0.17 < len(many) / len(names) < 0.23
    assert held_out_videos(names, 0.1) < many


def test_no_subset_is_empty_however_few_the_videos():
    for count in range(2, 8):
        names = [f"{count} {i}" for i in range(count)]
        assert all(0 < len(held_out_videos(names, share)) < count for share in (0.01, 0.2, 0.99))
    assert held_out_videos(["a"], 0.9) == set()


def test_one_video_is_for_training_and_an_evaluation_of_it_is_told_how(tmp_path):
    header = "video,start_sec,end_sec,label,duration_sec"
    rows = table(tmp_path, "a,0,1,Run,5", header=header)
    assert list(segments(opened(rows, None, subset="training"))) == ["a"]
    with pytest.raises(DataError, match=r"'a' is the only video and has no subset.*add the column subset"):
        opened(rows, None, subset="validation")


def test_a_split_that_is_made_is_told_with_the_classes_it_lacks(tmp_path, caplog):
    header = "video,start_sec,end_sec,label,duration_sec"
    rows = table(tmp_path, *(f"v{i},0,1,{'Rare' if i == 0 else 'Run'},5" for i in range(40)), header=header)
    with caplog.at_level(logging.INFO):
        dataset = opened(rows, None, training=True)
    counts = Counter(record.subset for record in dataset.records)
    assert f"{counts['training']} videos for training, {counts['validation']} for validation" in caplog.text
    lacking = "training" if "v0" in held_out_videos([f"v{i}" for i in range(40)], 0.2) else "validation"
    assert f"no segment for {'validation' if lacking == 'validation' else 'training'} of 1 class: Rare" in caplog.text


def test_subsets_are_for_all_or_for_none(tmp_path):
    header = "video,start_sec,end_sec,label,subset,duration_sec"
    with pytest.raises(DataError, match=r"1 of 2 videos have no subset, the first is 'b'"):
        opened(table(tmp_path, "a,0,1,A,training,5", "b,0,1,A,,5", header=header), None)
    with pytest.raises(ConfigError, match=r"validation_share = 1.5 must lie in \(0, 1\)"):
        opened(table(tmp_path, "a,0,1,A,,5", header=header), None, validation_share=1.5)


def test_a_class_list_may_be_given(tmp_path):
    header = "video,start_sec,end_sec,label,duration_sec"
    rows = table(tmp_path, "a,0,1,B,5", "b,0,1,A,5", header=header)
    assert opened(rows, None, classes=("B", "C", "A")).classes == ("B", "C", "A")
    with pytest.raises(DataError, match=r"video 'b': label 'A' is not in the given classes"):
        opened(rows, None, classes=("B",))


def test_the_config_file_opens_it(tmp_path, clip):
    config = read_config_file(ROOT / "configs" / "custom.py")
    rows = table(tmp_path, "a,0,1,A", "b,0,1,B")
    section = config["data"] | {"annotations": str(rows), "videos": str(folder(tmp_path, clip, "a.mp4", "b.mp4"))}
    assert section.pop("name") == "custom"
    dataset = build(DATASETS["custom"], section, path="config.data", subset="training", training=True)
    assert dataset.classes == ("A", "B")
    np.testing.assert_array_equal(dataset.records[0].segments_sec, [[0.0, 1.0]])
