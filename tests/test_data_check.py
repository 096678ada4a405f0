"""A check of a data set: each defect is found, alone; damaged files stop nothing; real annotations take seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from re2tal_jax.data.check import Report, check
from re2tal_jax.data.check.__main__ import main
from re2tal_jax.data.check.report import span
from re2tal_jax.data.check.videos import unsteadiness
from re2tal_jax.errors import ConfigError
from tests.system import write_config
from tests.video_files import numbered_frames, write_audio, write_video

CLASSES = ("Jump", "Run")
VIDEOS = {"training": ("t1", "t2"), "validation": ("v1", "v2")}
FRAMES, FPS = 100, 10


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> dict[str, bytes]:
    """Four videos of 10 seconds, 100 frames, with different bytes."""
    folder = tmp_path_factory.mktemp("clips")
    names = [name for names in VIDEOS.values() for name in names]
    return {
        name: write_video(folder / f"{name}.mp4", numbered_frames(FRAMES, step=1) + np.uint8(9 * i)).read_bytes()
        for i, name in enumerate(names)
    }


class DataSet:
    """A data set in which nothing is wrong, for a test to spoil."""

    def __init__(self, folder: Path, clips: dict[str, bytes]):
        self.folder, self.videos = folder, folder / "videos"
        self.videos.mkdir()
        for name, content in clips.items():
            (self.videos / f"{name}.mp4").write_bytes(content)
        # 20 segments of 2 seconds in each video, ten of each class, close together and without overlap
        self.database: dict[str, Any] = {
            name: {
                "subset": subset,
                "duration": FRAMES / FPS,
                "frame": FRAMES,
                "annotations": [self.act(0.4 * i, 0.4 * i + 0.4, CLASSES[i % 2]) for i in range(20)],
            }
            for subset, names in VIDEOS.items()
            for name in names
        }
        policy = {"name": "resize"}
        loader = {"on_error": "error"}
        self.config: dict[str, Any] = {
            "num_snippets": 50,
            "frames_per_snippet": 1,
            "num_classes": 2,
            "backbone": {"checkpoint": None},
            "data": {"name": "activitynet", "annotations": str(folder / "a.json"), "videos": str(self.videos)},
            "train": {"subset": "training", "policy": dict(policy), "loader": dict(loader)},
            "eval": {"subset": "validation", "policy": dict(policy), "loader": dict(loader)},
        }
        self.config["data"]["min_length_ratio"] = 0.0

    @staticmethod
    def act(start: float, end: float, label: str = "Run") -> dict[str, Any]:
        return {"label": label, "segment": [start, end]}

    def add(self, video: str, start: float, end: float, label: str = "Run") -> None:
        self.database[video]["annotations"].append(self.act(start, end, label))

    def strided(self, stride: int, name: str = "sliding_window", **options: Any) -> None:
        for section in ("train", "eval"):
            self.config[section]["policy"] = {"name": name, "snippet_stride": stride, **options}

    def check(self) -> Report:
        (self.folder / "a.json").write_text(json.dumps({"database": self.database}))
        return check(self.config, workers=2)


@pytest.fixture
def data(tmp_path, clips) -> DataSet:
    return DataSet(tmp_path, clips)


def found(report: Report) -> dict[str, tuple[str, int]]:
    return {item.code: (item.severity, item.count) for item in report.problems}


def test_nothing_is_found_where_nothing_is_wrong(data):
    report = data.check()
    assert report.problems == ()
    assert not report.failed
    assert str(report).endswith("0 errors, 0 warnings, 0 notes")


# --- segments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([(3, 2)], {"reversed": ("warning", 1)}),
        ([(3, 3)], {"zero_length": ("warning", 1)}),
        ([(float("nan"), 3), (1, float("inf"))], {"not_finite": ("warning", 2)}),
        ([(10, 12), (-3, -1)], {"outside": ("warning", 2)}),
        ([(-1, 1.5)], {"negative_start": ("warning", 1)}),
        ([(8.5, 12)], {"past_end": ("warning", 1)}),
        ([(8.5, 10.01)], {"past_end": ("note", 1)}),
        ([(8.5, 9.5), (8.5, 9.5)], {"duplicate": ("warning", 1)}),
        ([(8.5, 9.5), (8.5, 9.5), (8.5, 9.501)], {"duplicate": ("warning", 2)}),
        ([(8.5, 9.5), (8.5, 9.55)], {"overlapping_duplicate": ("warning", 1)}),
        ([(8.5, 9.5), (8.5, 9.6, "Jump"), (8.9, 9.8)], {}),
        ([(8.5, 8.6)], {"shorter_than_snippet": ("note", 1)}),
    ],
)
def test_bad_segments_are_found(data, segments, expected):
    for segment in segments:
        data.add("t2", *segment)
    assert found(data.check()) == expected


def test_examples_and_advice_are_told(data):
    data.add("t2", 8.5, 12)
    (item,) = data.check().problems
    assert item.message.startswith("training: 1 of 41 segments ends after its video, by 2 s at most")
    assert item.examples == ("t2 8.5-12 s (Run) of 10 s",)
    assert item.advice == "Correct them, or the durations, in the annotation."


def test_segments_that_differ_by_rounding_are_told_to_count_twice(data):
    for end in (9.5, 9.5, 9.501):
        data.add("t2", 8.5, end)
    (item,) = data.check().problems
    assert item.message == (
        "training: 2 segments are in the file twice, with one label, 1 of them with times that differ by rounding, "
        "which count twice."
    )
    assert item.examples == ("t2 8.5-9.5 s (Run)", "t2 8.5-9.5 s (Run) and 8.5-9.501 s")


def test_videos_without_segments_and_short_ones_are_told(data):
    data.database["t1"]["annotations"] = [
        data.act(0.2 * i, 0.2 * i + 0.2, CLASSES[i % 2]) for i in range(40)
    ]  # half as long: as many as before
    data.database["t2"]["annotations"] = []
    data.config["data"]["min_length_ratio"] = 0.021
    assert found(data.check()) == {"video_without_segments": ("note", 1), "too_short": ("note", 40)}


# --- classes and subsets ---------------------------------------------------------------------------------------------


def test_classes_that_are_rare_or_in_one_subset_only_are_found(data):
    data.add("t1", 8.5, 9.5, "Rare")
    data.add("v1", 8.5, 9.5, "Rare")
    data.add("v1", 8.5, 9.5, "Scored")
    data.add("t1", 8.5, 9.5, "run ")
    data.config["data"]["classes"] = ["Jump", "Run", "Rare", "Scored", "run ", "Never"]
    data.config["num_classes"] = 5
    report = data.check()
    assert found(report) == {
        "num_classes": ("error", 1),
        "class_without_segments": ("warning", 1),
        "class_only_in_evaluation": ("warning", 1),
        "class_not_in_evaluation": ("note", 1),
        "rare_class": ("warning", 2),
        "labels_alike": ("warning", 1),
    }
    examples = {item.code: item.examples for item in report.problems}
    assert examples["rare_class"] == ("Rare (1)", "run  (1)")
    assert examples["class_only_in_evaluation"] == ("Scored (1)",)
    assert examples["labels_alike"] == ("'Run' and 'run '",)
    assert next(i.advice for i in report.problems if i.code == "num_classes") == "Set config.num_classes=6."


def test_class_agnostic_is_one_class(data):
    data.config["data"]["class_agnostic"] = True
    assert found(data.check()) == {"num_classes": ("error", 1)}
    data.config["num_classes"] = 1
    report = data.check()
    assert report.problems == ()
    assert report.as_json()["subsets"][0]["classes"] == {"Jump": 20, "Run": 20}


def test_a_video_in_both_subsets_is_an_error(data):
    data.config["eval"]["subset"] = ["training", "validation"]
    assert found(data.check()) == {"in_both_subsets": ("error", 2)}


# --- weights and features ---------------------------------------------------------------------------------------------


def test_weights_that_are_not_there_are_an_error(data):
    folder = data.folder / "weights"
    data.config["backbone"]["checkpoint"] = str(folder)
    (item,) = data.check().problems
    assert (item.code, item.severity) == ("no_checkpoint", "error")
    assert item.message == f"config.backbone.checkpoint = {str(folder)!r} is no folder."
    folder.mkdir()
    assert "holds neither" in data.check().problems[0].message
    (folder / "checkpoints" / "100").mkdir(parents=True)
    assert data.check().problems == ()
    (folder / "checkpoints" / "100").rmdir()
    assert found(data.check()) == {"no_checkpoint": ("error", 1)}
    (folder / "params.safetensors").touch()
    assert data.check().problems == ()


def test_features_that_are_not_there_are_errors_and_the_annotation_is_checked_all_the_same(data):
    data.add("t2", 3, 3)
    data.config["data"] |= {"videos": None, "features": {"folder": str(data.folder / "features")}}
    report = data.check()
    expected = {"zero_length": ("warning", 1), "videos_not_checked": ("note", 1)}
    assert found(report) == {"no_feature_folder": ("error", 1), **expected}
    assert "--mode extract --out" in report.problems[0].message
    (data.folder / "features").mkdir()
    assert found(data.check()) == {"features_missing": ("error", 4), **expected}
    for name in ("t1", "v1", "v2"):
        np.save(data.folder / "features" / f"{name}.npy", np.zeros((4, 2), np.float32))
    report = data.check()
    assert found(report) == {"features_missing": ("error", 1), **expected}
    (item,) = [item for item in report.problems if item.code == "features_missing"]
    assert (item.message, item.examples) == ("1 video has no features.", ("t2",))


# --- lengths beside the windows --------------------------------------------------------------------------------------


def test_segments_shorter_than_a_snippet_are_counted_with_the_stride_that_would_do(data):
    data.strided(5, overlap=0.5)  # a snippet is 0.5 s, all segments are 0.4 s
    report = data.check()
    assert found(report)["shorter_than_snippet"] == ("warning", 40)
    advice = [i.advice for i in report.problems if i.code == "shorter_than_snippet"]
    assert "lower config.train.policy.snippet_stride from 5 to 4." in advice[0]
    assert "lower config.eval.policy.snippet_stride from 5 to 4." in advice[1]
    data.config |= {"num_snippets": 20}
    data.config["train"]["policy"] = data.config["eval"]["policy"] = {"name": "resize"}
    assert "raise config.num_snippets from 20 to 25," in data.check().problems[0].advice


def test_segments_and_videos_are_compared_with_a_window(data):
    data.strided(2, overlap=0.5)
    data.config["num_snippets"] = 4  # 0.8 s
    data.add("t1", 8.5, 9.5)
    report = data.check()
    assert found(report) == {"longer_than_window": ("warning", 1)}
    assert "The longest needs 5 snippets" in report.problems[0].advice
    data.config["num_snippets"] = 60  # 12 s
    assert found(data.check()) == {"shorter_than_window": ("note", 2)}
    data.strided(2, "padding")
    assert data.check().problems == ()
    data.config["num_snippets"] = 49
    assert found(data.check()) == {"longer_than_padding": ("error", 2)}


def test_a_segment_is_as_long_as_what_its_video_shows_of_it(data):
    data.strided(2, overlap=0.5)
    data.config["num_snippets"] = 20  # 4 s
    data.add("t1", 8.5, 400)
    report = data.check()
    assert found(report) == {"past_end": ("warning", 1)}
    assert report.as_json()["subsets"][0]["longest_sec"] == 1.5


def test_a_rate_that_nobody_tells_is_told(data):
    for video in data.database.values():
        del video["frame"]
    data.strided(2, overlap=0.5)
    assert data.check().problems == ()  # the files tell it
    data.config["data"]["videos"] = None
    assert found(data.check()) == {"rate_unknown": ("note", 2), "videos_not_checked": ("note", 1)}


# --- files -----------------------------------------------------------------------------------------------------------


def remove(data: DataSet) -> None:
    (data.videos / "t1.mp4").unlink()


def empty(data: DataSet) -> None:
    (data.videos / "t1.mp4").write_bytes(b"")


def cut(data: DataSet) -> None:
    write_video(data.videos / "t1.mp4", numbered_frames(FRAMES), options={"movflags": "faststart"})
    content = (data.videos / "t1.mp4").read_bytes()
    (data.videos / "t1.mp4").write_bytes(content[: len(content) // 2])


def silence(data: DataSet) -> None:
    (data.videos / "t1.mp4").unlink()
    write_audio(data.videos / "t1.mp4")


def long(data: DataSet) -> None:
    data.database["t1"] |= {"duration": 11, "frame": 110}


def fast(data: DataSet) -> None:
    data.strided(2, overlap=0.5)
    data.config["num_snippets"] = 6
    data.database["t1"]["frame"] = 250


def unsteady(data: DataSet) -> None:
    times = [50 * i if i < 50 else 2500 + 150 * (i - 50) for i in range(FRAMES)]
    write_video(data.videos / "t1.mp4", numbered_frames(FRAMES, step=1), times=times)


def spare(data: DataSet) -> None:
    (data.videos / "nobody.mp4").write_bytes(b"")


def doubled(data: DataSet) -> None:
    (data.videos / "t2.mp4").write_bytes((data.videos / "t1.mp4").read_bytes())


def leaked(data: DataSet) -> None:
    (data.videos / "v1.mp4").write_bytes((data.videos / "t1.mp4").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (remove, {"video_missing": ("error", 1)}),
        (empty, {"video_unreadable": ("error", 1)}),
        (cut, {"video_unreadable": ("error", 1)}),
        (silence, {"video_unreadable": ("error", 1)}),
        (long, {"duration_differs": ("warning", 1)}),
        (fast, {"rate_differs": ("error", 1)}),
        (unsteady, {"variable_frame_rate": ("warning", 1)}),
        (spare, {"file_not_annotated": ("note", 1)}),
        (doubled, {"equal_videos": ("warning", 1)}),
        (leaked, {"equal_across_subsets": ("error", 1)}),
    ],
)
def test_bad_files_are_found(data, spoil: Callable[[DataSet], None], expected):
    spoil(data)
    assert found(data.check()) == expected


def test_what_the_config_skips_is_a_warning(data):
    (data.videos / "t1.mp4").unlink()
    empty_file = data.videos / "v1.mp4"
    empty_file.write_bytes(b"")
    data.config["data"]["missing_videos"] = "skip"
    data.config["train"]["loader"]["on_error"] = "skip"
    assert found(data.check())["video_unreadable"] == ("error", 1)  # an evaluation would stop at it
    data.config["eval"]["loader"]["on_error"] = "skip"
    report = data.check()
    assert found(report) == {"video_missing": ("warning", 1), "video_unreadable": ("warning", 1)}
    assert not report.failed


def test_without_videos_the_annotation_is_checked_all_the_same(data):
    data.add("t2", 3, 3)
    data.config["data"]["videos"] = None
    assert found(data.check()) == {"zero_length": ("warning", 1), "videos_not_checked": ("note", 1)}
    data.config["data"]["videos"] = str(data.folder / "nowhere")
    expected = {"zero_length": ("warning", 1), "videos_not_checked": ("note", 1), "no_video_folder": ("error", 1)}
    assert found(data.check()) == expected
    for path in data.videos.iterdir():
        path.unlink()
    data.config["data"]["videos"] = str(data.videos)
    report = data.check()
    assert [(i.code, i.count) for i in report.problems if i.severity == "error"] == [("video_missing", 2)] * 2


def test_a_data_set_that_cannot_be_opened_is_one_error(data):
    data.database["t1"]["annotations"] = None
    report = data.check()
    assert found(report) == {"cannot_open": ("error", 1)}
    assert "video 't1': \"annotations\" must be a list" in report.problems[0].message
    assert str(report).startswith("errors")


def test_your_own_data_set_is_checked_too(data):
    rows = [
        f"{name},{a['segment'][0]},{a['segment'][1]},{a['label']},{video['subset']}"
        for name, video in data.database.items()
        for a in video["annotations"]
    ]
    table = data.folder / "a.csv"
    table.write_text(
        "\n".join(["video,start_sec,end_sec,label,subset", *rows, "bad,0,1,Run,training", "gone,0,1,Run,training"])
    )
    data.config["data"] = {"name": "custom", "annotations": str(table), "videos": str(data.videos)}
    (data.videos / "bad.mp4").write_bytes(b"no video")
    report = data.check()
    assert found(report) == {
        "video_missing": ("error", 1),
        "video_unreadable": ("error", 1),
    }
    assert [counts["segments"] for counts in report.as_json()["subsets"]] == [42, 40]


def test_steadiness_is_measured_in_seconds():
    assert unsteadiness(np.arange(100) / 25) < 1e-9
    assert unsteadiness(np.array([0.0])) == 0.0
    np.testing.assert_allclose(unsteadiness(np.array([0.0, 1.0, 4.0])), 1.0)


# --- command line ----------------------------------------------------------------------------------------------------


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    return (code, *capsys.readouterr())


def test_the_command_prints_a_report_and_writes_it(data, capsys, tmp_path):
    data.add("t2", 3, 3)
    data.check()
    config = write_config(tmp_path / "config.py", data.config)
    code, out, _ = run(capsys, "--config", config, "--json", tmp_path / "report.json", "--workers", 1)
    assert code == 0
    assert "train  training         2      2    20 s        41        2   0.4 s    0.4 s" in out
    assert "0.25 to 0.5 s     40    40  " + "#" * 40 in out
    assert (
        "warnings: it runs, and learns or scores less than it could\n  zero_length: training: 1 of 41 segments" in out
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(item["severity"], item["code"], item["count"]) for item in report["problems"]] == [
        ("warning", "zero_length", 1)
    ]
    code, out, _ = run(capsys, "--config", config, "--config.num_classes=7")
    assert code == 1
    assert "num_classes: config.num_classes = 7, but the data set has 2 classes." in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config"),
        (("--config", "nowhere.py"), "Config file nowhere.py does not exist"),
        (("--config", "{config}", "--jsn", "x"), "Unknown argument '--jsn'. Did you mean '--json'"),
        (("--config", "{config}", "--workers", "0"), "--workers 0 must be at least 1"),
        (("--config", "{config}", "--json", "nowhere/x.json"), "--json nowhere/x.json: there is no such folder"),
        (("--config", "{config}", "--config.data.name=custon"), "Unknown dataset 'custon'. Did you mean 'custom'"),
        (("--config", "{config}", "--config.data.vidoes=x"), "Unknown key config.data.vidoes. Did you mean 'videos'"),
        (("--config", "{config}", "--config.train.policy.name=resise"), "Unknown sampling policy 'resise'"),
    ],
)
def test_a_bad_command_is_told(data, capsys, tmp_path, arguments, message):
    data.check()
    config = write_config(tmp_path / "config.py", data.config)
    code, out, err = run(capsys, *(argument.format(config=config) for argument in arguments))
    assert (code, out) == (1, "")
    assert message in err


def test_times_are_told_in_a_unit_that_suits_them():
    assert [span(seconds) for seconds in (20, 750, 11520, 3.6e6)] == ["20 s", "12.5 min", "3.2 h", "1,000.0 h"]


def test_rendering_is_told(data, capsys, caplog, tmp_path):
    data.config["data"] = {"name": "synthetic", "root": str(tmp_path / "set"), "num_train": 1, "num_validation": 1}
    config = write_config(tmp_path / "config.py", data.config)
    _, out, _ = run(capsys, "--config", config)
    assert "rendering 2 videos to" in caplog.text
    assert "train  training" in out


def test_a_config_without_a_section_is_told(data):
    del data.config["train"]["policy"]
    with pytest.raises(ConfigError, match=r"config.train lacks policy"):
        data.check()


# --- real annotations ------------------------------------------------------------------------------------------------


def config_of(data: dict[str, Any], train: str, evaluation: str, snippets: int, classes: int, **policy: Any) -> dict:
    splits = {
        section: {"subset": subset, "policy": policy or {"name": "resize"}, "loader": {}}
        for section, subset in (("train", train), ("eval", evaluation))
    }
    numbers = {"num_snippets": snippets, "frames_per_snippet": 1, "num_classes": classes}
    return {**numbers, "backbone": {"checkpoint": None}, "data": data, **splits}


def test_what_is_odd_in_activitynet_is_found(data_dir):
    folder = data_dir / "anet_annos"
    section = {
        "name": "activitynet",
        "annotations": str(folder / "anet_anno_action.json"),
        "video_info": str(folder / "video_info_new.csv"),
        "classes": str(folder / "anet_classes_idx.json"),
        "class_agnostic": True,
        "min_length_ratio": 0.01,
    }
    report = check(config_of(section, "training", "validation", 192, 1), workers=1)
    counts = {(item.code, item.message.split(":")[0]): item.count for item in report.problems}
    assert counts["zero_length", "training"] == 9
    assert counts["zero_length", "validation"] == 3
    assert counts["duplicate", "training"] == 28 + 4  # equal, and by rounding
    assert counts["overlapping_duplicate", "training"] == 3
    assert counts["overlapping_duplicate", "validation"] == 1
    assert counts["shorter_than_snippet", "validation"] == 52
    assert not report.failed


def test_what_is_odd_in_thumos_is_found(data_dir):
    section = {
        "name": "thumos14",
        "annotations": str(data_dir / "thumos_gt" / "actionformer_thumos14.json"),
        "classes": str(data_dir / "thumos_gt" / "thumos_classes_idx.json"),
    }
    policy = {"name": "sliding_window", "snippet_stride": 4, "overlap": 0.5}
    report = check(config_of(section, "Validation", "Test", 512, 20, **policy), workers=1)
    counts = {(item.code, item.message.split(":")[0]): item.count for item in report.problems}
    assert counts == {
        ("outside", "Validation"): 4,
        ("outside", "Test"): 26,
        ("longer_than_window", "Validation"): 3,
        ("longer_than_window", "Test"): 1,
        ("shorter_than_window", "Validation"): 43,
        ("shorter_than_window", "Test"): 34,
        ("videos_not_checked", "No folder of videos"): 1,
    }
