"""Videos and annotations that cannot be used, and settings that do not fit them: told in time, by one message."""

import json
import re
import shutil
from pathlib import Path

import pytest

from re2tal_jax.errors import DataError
from tests.system import changed, run_mode, write_config
from tests.video_files import write_audio

pytest_plugins = "tests.system_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once")


def damage(videos: Path, subset: str) -> dict[str, str]:
    """Spoil four videos of a subset; return their ids and what is wrong with them."""
    first, second, third, fourth = sorted(videos.glob(f"{subset}_*.mp4"))[:4]
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 3])
    third.write_bytes(b"no video at all" * 100)
    fourth.unlink()
    write_audio(fourth)
    reasons = ("the video file is empty", "truncated|damaged|not readable", "not readable as a video", "audio only")
    return dict(zip([path.stem for path in (first, second, third, fourth)], reasons, strict=True))


def with_videos(config, folder, **changes):
    data = {"data__videos": str(folder / "videos"), "data__annotations": str(folder / "annotations.json")}
    return changed(config, **data, **changes)


def test_videos_that_cannot_be_read_stop_the_run_or_are_named_and_counted(tmp_path, tiny_data, config, caplog):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    bad = damage(data / "videos", "training") | damage(data / "videos", "validation")
    config = with_videos(config, data, loop__stop__steps=3)
    with pytest.raises(DataError) as error:
        run_mode("train", config, tmp_path / "run")
    (video_id,) = set(re.findall(r"(?:training|validation)_\d+(?=')", str(error.value)))
    assert re.search(
        f"Video {video_id!r}: .*{video_id}.mp4.*({bad[video_id]}).* add --config.train.loader.on_error=skip",
        str(error.value),
    )

    config = changed(config, train__loader__on_error="skip", eval__loader__on_error="skip")
    result = run_mode("train", config, tmp_path / "run")
    assert (result.step, result.interrupted) == (3, False)
    for video_id, reason in bad.items():
        assert re.search(rf"skipping video '{video_id}' \(number \d\): .*({reason})", caplog.text), video_id
    assert json.loads((tmp_path / "run" / "predictions.json").read_text())["results"] == {}


def test_missing_videos_stop_the_run_and_are_named(tmp_path, tiny_data, config, run_main):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    for number in (3, 5):
        (data / "videos" / f"training_{number}.mp4").unlink()
    done = run_main("--config", write_config(tmp_path / "config.py", with_videos(config, data)), "--workdir", tmp_path)
    assert done.code == 1
    assert re.search("^\nDataError: 2 of 16 videos have no file in .*: training_3, training_5.* to 'skip'", done.err)


def test_what_is_left_out_or_set_right_is_counted_in_the_header(tmp_path, tiny_data, config, run_main):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    for name in ("training_14", "training_15", "validation_17"):
        (data / "videos" / f"{name}.mp4").unlink()
    content = json.loads((data / "annotations.json").read_text())
    annotations = [video["annotations"] for video in content["database"].values()]  # one each, in training_0, _1, …
    for number, left_out in enumerate([[1.5, 1.0], [0.7, 0.7], [5.0, 6.0], [-2.0, -1.0], [float("nan"), 1.0]]):
        annotations[number].append({"segment": left_out, "label": "left"})
    annotations[5][0]["segment"] = [-1.0, 0.5]
    annotations[6][0]["segment"] = [2.0, 9.0]
    annotations[7].append(annotations[7][0])
    (data / "annotations.json").write_text(json.dumps(content))
    config = with_videos(config, data, loop__stop__steps=1, data__missing_videos="skip")
    done = run_main("--config", write_config(tmp_path / "config.py", config), "--workdir", tmp_path / "run")
    assert (done.code, done.err) == (0, "")
    training, _, evaluation = done.out.partition("evaluation data: ")
    assert "training data: 14 videos, 14 segments" in training
    for finding in (
        "reversed: 1 (such as training_0)",
        "zero_length: 1 (such as training_1)",
        "outside: 2 (such as training_2, training_3)",
        "not_finite: 1 (such as training_4)",
        "negative_start: 1 (such as training_5)",
        "past_end: 1 (such as training_6)",
        "duplicate: 1 (such as training_7)",
        "video_missing: 2 (such as training_14, training_15)",
    ):
        assert finding in training
    assert "video_missing: 1 (such as validation_17)" in evaluation


ANNOTATION = "data__annotations"
AGNOSTIC = {"num_classes": 1, "data__class_agnostic": True, "train__mirror": None}
SLIDING = {"name": "sliding_window", "snippet_stride": 1, "overlap": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({ANNOTATION: "{tmp}/missing.json"}, "DataError: .*missing.json does not exist"),
        ({ANNOTATION: "{tmp}"}, "DataError: Annotation file .* is a folder"),
        ({ANNOTATION: "{tmp}/cut.json"}, "DataError: .* not valid JSON at line 1"),
        ({ANNOTATION: "{tmp}/list.json"}, "DataError: .* a JSON object is needed"),
        ({ANNOTATION: "{tmp}/bare.json"}, "DataError: .* video 'a': no \"duration\""),
        ({"data__classes": ("left",), "num_classes": 1}, "DataError: .*label 'right' is not in the given classes"),
        ({"data__fps": -25.0}, "ConfigError: fps = -25.0 must be a positive number"),
        ({"data__videos": "{tmp}/nowhere"}, "DataError: .*Video folder .*nowhere does not exist"),
        ({"train__subset": "trainin"}, "DataError: .*no video in subset 'trainin'. Did you mean 'training'"),
        ({"eval__subset": "validatio"}, "DataError: .*no video in subset 'validatio'. Did you mean 'validation'"),
        ({"eval__subset": "empty"}, "DataError: .*subset empty has videos but no ground truth"),
        ({"evaluation__blocked": "{tmp}/nowhere.json"}, "DataError: .*nowhere.json: cannot be read"),
        ({"evaluation__blocked": "{tmp}/all.json"}, "DataError: .*has no ground-truth segment to evaluate"),
        ({"external_classifier": {"path": "nowhere.json"}, **AGNOSTIC}, "DataError: nowhere.json: cannot be read"),
        ({"num_classes": 3}, "ConfigError: config.num_classes = 3, but the data set 'activitynet' has 2 classes"),
        (AGNOSTIC, "ConfigError: 2 of 2 classes .* can never be detected.* need config.external_classifier"),
        ({"train__mirror__flip_classes": {"left": "rigt"}}, "ConfigError: .*'rigt', .* no class. Did you mean 'right'"),
        ({"checkpoints__best_metric": "avg_mAP"}, "ConfigError: best_metric = 'avg_mAP' .* mean 'average_mAP'"),
        ({"train__batch_size": 24}, "ConfigError: batch_size = 24 is more than the 16 windows of an epoch"),
        ({"eval__policy": SLIDING}, "ConfigError: .*suppress_in = 'window', but video validation_16 has 5 windows"),
    ],
)
def test_data_that_cannot_be_used_are_told_before_anything_is_compiled(
    tmp_path, tiny_data, config, run_main, changes, message
):
    annotations = json.loads((tiny_data / "annotations.json").read_text())
    annotations["database"]["nothing"] = {"subset": "empty", "duration": 2.0, "annotations": []}
    validation = [name for name, video in annotations["database"].items() if video["subset"] == "validation"]
    for name, text in {
        "annotations": json.dumps(annotations),
        "cut": '{"database": {"a": ',
        "list": "[]",
        "bare": '{"database": {"a": {"subset": "training"}}}',
        "all": json.dumps(validation),
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    config = changed(config, data__annotations=str(tmp_path / "annotations.json"))
    config = changed(config, **{k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in changes.items()})
    done = run_main("--config", write_config(tmp_path / "config.py", config), "--workdir", tmp_path / "run")
    assert done.code == 1
    assert re.search(message, done.err.strip()), done.err
    assert "Traceback" not in done.err
    assert "compiled" not in done.out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
