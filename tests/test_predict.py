"""Prediction: the same as the evaluation by every way in, whatever befalls videos and runs; and what is refused."""

import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import re2tal_jax
from checkpoints_convert.__main__ import main as convert
from re2tal_jax.activitynet_format import read_activitynet
from re2tal_jax.data.tfds_builders.__main__ import prepare
from re2tal_jax.data.video_files import open_video_files
from re2tal_jax.errors import CheckpointError, ConfigError, DataError
from re2tal_jax.experiment import draw_blueprint, resolved_config
from re2tal_jax.inference.detect import detect
from re2tal_jax.inference.finished import NAME, FinishedVideos
from re2tal_jax.inference.localize import open_loader
from re2tal_jax.modes.predict import PAGE, PREDICTIONS, TABLE
from re2tal_jax.progress import WorkProgress
from re2tal_jax.settings import read_settings
from re2tal_jax.trained import CLASSES as CLASS_FILE
from re2tal_jax.trained import write_classes
from re2tal_jax.training.checkpoint import CheckpointConfig, Checkpoints
from re2tal_jax.training.loop import TrainResult
from re2tal_jax.training.sharding import make_mesh
from tests.system import CLASSES, NUM_TRAIN, NUM_VALIDATION, changed, once, run_mode, write_config
from tests.video_files import numbered_frames, write_video

pytest_plugins = "tests.system_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once")

IDS = [f"validation_{number}" for number in range(NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION)]
SLIDING = {"name": "sliding_window", "snippet_stride": 2, "overlap": 0.5}
predict_module = importlib.import_module("re2tal_jax.modes.predict")  # the package's attribute is the function


def save_run(folder: Path, config, scale: float = 1.0) -> Path:
    """Write what a training leaves, with parameters as they are drawn, times `scale`."""
    settings = read_settings(config)
    spec = draw_blueprint(settings, make_mesh(settings.mesh, jax.devices())).spec
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        state = spec.create()
        state = dataclasses.replace(state, ema_params=jax.tree.map(lambda x: x * scale, state.ema_params))
        checkpoints.save(state, data={}, config=resolved_config(settings))
    write_classes(folder, CLASSES)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config, compiled_once) -> Path:
    """Workdir of a run of 0 steps; not to be changed."""
    return once(tmp_path_factory, "untrained", lambda folder: save_run(folder, config))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, trained, config, compiled_once) -> dict:
    """The detections of `--mode eval`."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "run")
    run_mode("eval", config, folder)
    return results(folder)


@pytest.fixture(scope="module")
def model(trained):
    return re2tal_jax.load(trained)


@pytest.fixture
def videos(tiny_data, tmp_path) -> Path:
    """A folder with the validation videos."""
    (tmp_path / "videos").mkdir()
    for name in IDS:
        shutil.copy(tiny_data / "videos" / f"{name}.mp4", tmp_path / "videos")
    return tmp_path / "videos"


def run_predict(config, workdir, out, *names, **options):
    """Call the mode, on files if any are named."""
    predict = predict_module.predict
    videos = [str(name) for name in names] or None
    return predict(read_settings(config), config, workdir, videos=videos, out=str(out), **options)


def results(folder: Path) -> dict:
    return json.loads((folder / PREDICTIONS).read_text())["results"]


def skipping(config):
    return changed(config, eval__loader__on_error="skip")


def test_the_subset_gives_what_the_evaluation_gives_with_its_map(tmp_path, trained, config, evaluated, caplog):
    caplog.set_level("INFO")
    found = run_predict(config, trained, tmp_path)
    assert sum(map(len, evaluated.values())) > 0
    assert results(tmp_path) == evaluated
    assert list(found) == IDS
    assert "validation: 4 ground-truth segments of 2 classes" in caplog.text
    assert re.search(r"9\.6 s of video in .* video seconds per second \| peak host RSS \d+ MiB", caplog.text)


def test_files_and_the_library_give_the_same_to_the_last_bit(tmp_path, trained, config, evaluated, videos, model):
    run_predict(config, trained, tmp_path / "out", videos)
    assert results(tmp_path / "out") == evaluated
    for name in IDS:
        found = re2tal_jax.localize(model, videos / f"{name}.mp4")
        assert json.loads(found.to_json()) == evaluated[name]
    with (tmp_path / "out" / TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [(name, entry) for name in IDS for entry in evaluated[name]]
    assert len(rows) == len(wanted)
    for row, (name, entry) in zip(rows, wanted, strict=True):
        assert (row["video"], row["label"]) == (name, entry["label"])
        assert [float(row[key]) for key in ("start_sec", "end_sec", "score")] == [*entry["segment"], entry["score"]]
    assert all(name in (tmp_path / "out" / PAGE).read_text() for name in IDS)


def test_records_of_a_prepared_directory_give_what_their_files_give(tmp_path, trained, config, evaluated):
    assert prepare(config, tmp_path / "prepared").failures == {}
    data = {"name": "prepared", "root": str(tmp_path / "prepared")}
    run_predict({**config, "data": data}, trained, tmp_path / "out")
    assert results(tmp_path / "out") == evaluated
    assert all(name in (tmp_path / "out" / PAGE).read_text() for name in IDS)


def test_a_prediction_that_is_killed_goes_on_behind_its_finished_videos(
    tmp_path, trained, config, evaluated, videos, monkeypatch, caplog
):
    config, out = changed(config, eval__batch_size=8), tmp_path / "out"
    add = FinishedVideos.add

    def killed(self, video_id, file, found, record):
        add(self, video_id, file, found, record)
        if video_id == IDS[1]:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(FinishedVideos, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run_predict(config, trained, out, videos)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "stopped: 2 of 4 videos are finished and kept" in caplog.text
    assert not (out / PREDICTIONS).exists()
    with (out / NAME).open("a") as file:
        file.write('{"video": "validation_18", "size')  # what SIGKILL leaves of a line

    seen = []
    monkeypatch.setattr(FinishedVideos, "add", lambda self, *what: (seen.append(what[0]), add(self, *what)))
    run_predict(config, trained, out, videos)
    assert seen == IDS[2:]
    assert results(out) == evaluated
    assert len((out / NAME).read_text().splitlines()) == 5
    run_predict(config, trained, out, videos)
    assert seen == IDS[2:]
    shutil.copy(videos / f"{IDS[0]}.mp4", videos / f"{IDS[1]}.mp4")  # another video of that name
    run_predict(config, trained, out, videos)
    assert seen == [*IDS[2:], IDS[1]]
    assert results(out) == evaluated | {IDS[1]: evaluated[IDS[0]]}


def test_another_config_or_checkpoint_is_not_mixed_in(tmp_path, trained, config, videos, evaluated):
    run_predict(config, trained, tmp_path / "out", videos)
    other = changed(config, postprocess__nms__sigma=0.25)
    message = r"sigma: 0.5 there, 0.25 now\nChoose another folder with --out, or add --overwrite"
    with pytest.raises(CheckpointError, match=message):
        run_predict(other, trained, tmp_path / "out", videos)
    with pytest.raises(CheckpointError, match=r"parameters_sha256: '\w+' there, '\w+' now"):
        run_predict(config, save_run(tmp_path / "run", config, scale=1.5), tmp_path / "out", videos)
    assert results(tmp_path / "out") == evaluated
    run_predict(other, trained, tmp_path / "out", videos, overwrite=True)
    assert results(tmp_path / "out") != evaluated
    (tmp_path / "out" / NAME).write_text("something else\n")
    with pytest.raises(DataError, match=r"finished.jsonl: line 1 is damaged.*--overwrite"):
        run_predict(other, trained, tmp_path / "out", videos)


def test_a_workdir_without_anything_trained_says_what_to_do(tmp_path, config, videos):
    for folder in (tmp_path / "new", tmp_path / "begun"):
        (tmp_path / "begun" / "checkpoints").mkdir(parents=True, exist_ok=True)
        with pytest.raises(CheckpointError, match=rf"{folder} holds no trained detector. Train one .*--checkpoint DIR"):
            run_predict(config, folder, tmp_path / "out", videos)


def test_a_call_with_what_is_no_file_says_so(tmp_path, model, videos):
    for video, message in (
        (videos / f"{IDS[0]}.mpp", rf"there is no such video file. Did you mean '.*{IDS[0]}.mp4'\?"),
        (videos, "is a folder: name one video file in it"),
        (None, "takes the path of one video file; this is None, a NoneType"),
        ([videos], "this is .*, a list"),
    ):
        with pytest.raises(DataError, match=message):
            re2tal_jax.localize(model, video)


def test_videos_of_another_frame_rate_are_told(tmp_path, sliding, caplog):
    for name, fps in (("slower", 8), ("faster", 20)):
        write_video(tmp_path / f"{name}.mp4", numbered_frames(40), fps=fps)
    model = re2tal_jax.load(sliding[0])
    files = {path.stem: path for path in sorted(tmp_path.glob("*.mp4"))}
    data, _ = open_video_files(files, on_error="error", classes=CLASSES)
    open_loader(model, data)
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("re2tal_jax")]
    assert message.startswith("1 of 2 videos have another frame rate than those of the training (config.data.fps = 10)")
    assert "'faster' with 20 frames a second: a snippet of it lasts 0.1 s in the place of 0.2 s" in message
    open_loader(dataclasses.replace(model, trained_fps=None), data)
    assert len(caplog.messages) == 1


def test_damaged_videos_are_named_and_never_cost_the_others(tmp_path, trained, config, evaluated, videos, caplog):
    (videos / "broken.mp4").write_bytes(b"no video at all" * 100)
    with pytest.raises(
        DataError, match=r"Video 'broken': .*broken.mp4: not readable.* --config.eval.loader.on_error=skip"
    ):
        run_predict(config, trained, tmp_path / "out", videos)
    run_predict(skipping(config), trained, tmp_path / "out", videos)
    assert results(tmp_path / "out") == evaluated
    assert re.search(r"1 of 5 videos could not be read, or not wholly:\n  'broken': .*not readable", caplog.text)
    run_predict(skipping(config), trained, tmp_path / "out", videos)  # nothing is left to do but the damaged one
    assert results(tmp_path / "out") == evaluated
    with pytest.raises(DataError, match=r"None of 1 videos can be read; the first: .*broken.mp4: not readable"):
        run_predict(skipping(config), trained, tmp_path / "out", videos / "broken.mp4")
    with pytest.raises(DataError, match=r"broken.mp4: not readable as a video"):
        re2tal_jax.localize(re2tal_jax.load(trained), videos / "broken.mp4")


def test_a_video_that_vanishes_on_the_way_counts_as_damaged(
    tmp_path, trained, config, evaluated, videos, monkeypatch, caplog
):
    open_loader = predict_module.open_loader

    def vanish(*args):
        (videos / f"{IDS[2]}.mp4").unlink()
        return open_loader(*args)

    monkeypatch.setattr(predict_module, "open_loader", vanish)
    run_predict(skipping(config), trained, tmp_path / "out", videos)
    assert results(tmp_path / "out") == {name: found for name, found in evaluated.items() if name != IDS[2]}
    assert f"'{IDS[2]}': " in caplog.text
    assert "there is no such video file" in caplog.text


def test_names_that_are_no_text_and_names_that_two_videos_share(tmp_path, trained, config, videos, evaluated, capsys):
    os.rename(videos / f"{IDS[0]}.mp4", os.fsencode(videos) + b"/caf\xe9.mp4")
    (videos / "a").mkdir()
    shutil.copy(videos / f"{IDS[1]}.mp4", videos / "a" / f"{IDS[2]}.mp4")
    run_predict(config, trained, tmp_path / "out", videos)
    assert results(tmp_path / "out") == {
        "caf\\xe9": evaluated[IDS[0]],
        IDS[1]: evaluated[IDS[1]],
        f"a/{IDS[2]}.mp4": evaluated[IDS[1]],
        f"{IDS[2]}.mp4": evaluated[IDS[2]],
        IDS[3]: evaluated[IDS[3]],
    }
    assert "caf\\xe9," in (tmp_path / "out" / TABLE).read_text()


def test_files_are_named_one_by_one_by_folder_or_by_pattern(tmp_path):
    from re2tal_jax.data.video_files import find_video_files

    for name in ("b.mp4", "a.MKV", "notes.txt", "deep/c.webm", "deep/.hidden.mp4", "odd.bin", "[x].mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert list(find_video_files([tmp_path])) == ["[x]", "a", "b", "c"]
    assert list(find_video_files([tmp_path / "odd.bin", tmp_path / "*.mp4"])) == ["odd", "[x]", "b"]
    assert find_video_files([tmp_path / "[x].mp4"]) == {"[x]": tmp_path / "[x].mp4"}
    assert list(find_video_files([tmp_path / "b.mp4", tmp_path / "deep" / ".." / "b.mp4"])) == ["b"]
    assert list(find_video_files([tmp_path / "**" / "*.webm"])) == ["c"]
    for name, message in (
        ("b.mpp", r"no such file or folder. Did you mean '.*b.mp4'\?"),
        ("*.avi", r"'.*\*.avi': no file or folder matches this pattern.$"),
        ("*.txt", "no video is there. Looked for .mp4"),
        ("nowhere/x.mp4", "no such file or folder.$"),
    ):
        with pytest.raises(DataError, match=message):
            find_video_files([str(tmp_path / name)])


@pytest.fixture(scope="module")
def sliding(tmp_path_factory, config, compiled_once):
    """A run whose windows slide: 8 snippets of 2 frames, and its config."""
    config = changed(config, eval__policy=SLIDING, postprocess__suppress_in="video", data__fps=10.0)
    return save_run(tmp_path_factory.mktemp("sliding") / "run", config), config


def test_any_length_goes_through_sliding_windows(tmp_path, sliding, monkeypatch):
    """Windows of 1.6 s each 0.8 s: a short video is one of them, and several videos share a batch of eight."""
    run, config = sliding
    for name, frames in (("short", 5), ("long", 100), ("medium", 41)):
        write_video(tmp_path / f"{name}.mp4", numbered_frames(frames, step=2))
    model = re2tal_jax.load(run)
    found = run_predict(config, run, tmp_path / "out", tmp_path)
    rows = [json.loads(row) for row in (tmp_path / "out" / NAME).read_text().splitlines()[1:]]
    assert [row["video"] for row in rows] == ["long", "medium", "short"]
    for name, seconds in (("short", 0.5), ("long", 10.0), ("medium", 4.1)):
        assert found[name].segments_sec.max() <= seconds
        again = re2tal_jax.localize(model, tmp_path / f"{name}.mp4")
        assert again.to_json() == found[name].to_json()
    assert found["long"].segments_sec.max() > 8.0
    one_by_one = changed(config, postprocess__suppress_in="window")
    with pytest.raises(ConfigError, match=r"suppress_in = 'window', but video long has 12 windows.*set it to 'video'"):
        run_predict(one_by_one, run, tmp_path / "other", tmp_path)


class Windows:
    """A loader of eight windows in batches of four: three of a, one of b that cannot be read, four of c."""

    windows = tuple(SimpleNamespace(record=SimpleNamespace(video_id=name)) for name in "aaabcccc")

    def __init__(self):
        self.handed_out = 0

    def __iter__(self):
        for numbers in ([2, 0, 1, -1], [4, 5, -1, 7]):
            self.handed_out += 1
            rows = {name: np.zeros((4, 1)) for name in ("video", "frame_size", "mask", "gt_segments", "gt_labels")}
            yield {**rows, "gt_mask": np.zeros((4, 1)), "window": np.array(numbers)}

    def grid(self, number):
        return re2tal_jax.types.SnippetGrid(start_sec=float(number), seconds_per_snippet=1.0, duration_sec=10.0)


def test_a_video_is_handed_on_when_its_last_window_is_done():
    from re2tal_jax.postprocess import PostprocessConfig
    from re2tal_jax.training.sharding import MeshConfig

    loader, mesh = Windows(), make_mesh(MeshConfig(), jax.devices()[:1])
    config = PostprocessConfig(nms=None, suppress_in="video")
    outputs = np.array([[[0.0, 1.0]]] * 4), np.full((4, 1, 1), 0.5), np.ones((4, 1), bool)
    found, seen = [], []
    for result in detect(lambda batch: tuple(map(jax.numpy.asarray, outputs)), loader, mesh, config, ("action",)):
        found.append((result.video_id, result.windows, result.unreadable))
        seen.append(None if result.detections is None else sorted(result.detections.segments_sec[:, 0].tolist()))
    assert found == [("a", 3, 0), ("b", 1, 1), ("c", 4, 1)]
    assert seen == [[0.0, 1.0, 2.0], None, [4.0, 5.0, 7.0]]
    first = next(detect(lambda batch: tuple(map(jax.numpy.asarray, outputs)), Windows(), mesh, config, ("action",)))
    assert first.video_id == "a"


def test_no_detection_at_all_is_a_result(tmp_path, trained, config, videos):
    config = changed(config, postprocess__pre_nms_threshold=0.99)
    found = run_predict(config, trained, tmp_path / "out", videos)
    assert results(tmp_path / "out") == {name: [] for name in IDS}
    assert found[IDS[0]].to_json() == "[]"
    assert (tmp_path / "out" / TABLE).read_text() == "video,start_sec,end_sec,label,score\n"
    found[IDS[0]].plot()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"detector__pixel_std": (1.0, 2.0, 3.0)},
            r"pixel_std = \[1.0, 2.0, 3.0\], trained with \[63.75, .*add '--config.detector.pixel_std=\[63.75, ",
        ),
        (
            {"backbone__rewired": False},
            "config.backbone.rewired = False, trained with True.*add --config.backbone.rewired=True",
        ),
        ({"eval__policy": SLIDING}, "config.eval.policy.name = 'sliding_window', trained with 'resize'"),
        ({"localizer__num_heads": 4}, "config.localizer.num_heads = 4, trained with 2"),
        ({"frames_per_snippet": 2}, "config.frames_per_snippet = 2, trained with 1"),
        ({"backbone__embed_dim": 16, "num_snippets": 16}, "(?s)num_snippets = 16, trained with 8.*embed_dim = 16"),
    ],
)
def test_a_config_that_is_not_the_checkpoints_is_refused(tmp_path, trained, config, videos, changes, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        run_predict(changed(config, **changes), trained, tmp_path / "out", videos)
    assert not (tmp_path / "out").exists()


def test_what_changes_no_detection_may_differ(tmp_path, trained, config, videos, evaluated):
    config = changed(config, backbone__drop_path_rate=0.0, train__batch_size=16, seed=9, eval__loader__threads=1)
    run_predict(config, trained, tmp_path / "out", videos)
    assert results(tmp_path / "out") == evaluated


def test_classes_are_those_of_the_training_or_of_a_file(tmp_path, trained, config, videos, tiny_data, evaluated):
    bare = Path(shutil.copytree(trained, tmp_path / "bare"))
    (bare / CLASS_FILE).unlink()
    missing = r"does not say what its 2 classes are \(classes.json is missing.*"
    with pytest.raises(ConfigError, match=missing + "with --classes FILE."):
        run_predict(config, bare, tmp_path / "out", videos)
    with pytest.raises(ConfigError, match=missing + "with classes='FILE'."):
        re2tal_jax.load(bare)
    for name, text in (("right", "left\nright\n"), ("turned", "right\nleft\n"), ("few", "left\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(DataError, match=r"--classes .*rigth.txt: there is no such file. Did you mean '.*right.txt'\?"):
        run_predict(config, bare, tmp_path / "out", videos, classes=str(tmp_path / "rigth.txt"))
    run_predict(config, bare, tmp_path / "out", videos, classes=str(tmp_path / "right.txt"))
    assert results(tmp_path / "out") == evaluated
    with pytest.raises(
        ConfigError, match=r"few.txt lists 1 classes, but .* = 2: add .*num_classes=1, or name a list of 2.$"
    ):
        run_predict(config, bare, tmp_path / "out", videos, classes=str(tmp_path / "few.txt"))
    message = r"turned.txt: the class list is not the one of .*untrained.*: class 0 is 'right', there 'left'"
    with pytest.raises(ConfigError, match=message):
        run_predict(config, trained, tmp_path / "out", videos, classes=str(tmp_path / "turned.txt"))
    run_predict(config, bare, tmp_path / "subset")  # the annotation says what they are
    assert results(tmp_path / "subset") == evaluated

    content = json.loads((tiny_data / "annotations.json").read_text())
    for video in content["database"].values():
        video["annotations"] = [a for a in video["annotations"] if video["subset"] == "training"]
    (tmp_path / "unlabelled.json").write_text(json.dumps(content))
    unlabelled = changed(config, data__annotations=str(tmp_path / "unlabelled.json"))
    run_predict(unlabelled, trained, tmp_path / "unlabelled")
    assert results(tmp_path / "unlabelled") == evaluated
    other = (tmp_path / "unlabelled.json").read_text().replace('"left"', '"up"')
    (tmp_path / "unlabelled.json").write_text(other)
    with pytest.raises(DataError, match=r"label 'up' is not in the given classes.*The classes are those of .*classes"):
        run_predict(unlabelled, trained, tmp_path / "unlabelled")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_class_list_that_changed_is_refused(tmp_path, trained, config, mode):
    copied = Path(shutil.copytree(trained, tmp_path / "run"))
    turned = changed(config, data__classes=("right", "left"))
    with pytest.raises(ConfigError, match=r"config.data: the class list .*: class 0 is 'right', there 'left'"):
        run_mode(mode, turned, copied)


def test_training_writes_its_class_list(tmp_path, trained, config, monkeypatch):
    module = importlib.import_module("re2tal_jax.modes.train")
    ended = TrainResult(state=None, step=0, metrics=None, interrupted=True)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "Run", lambda **_: SimpleNamespace(run=lambda: ended))
    run_mode("train", config, tmp_path / "new")
    assert json.loads((tmp_path / "new" / CLASS_FILE).read_text()) == {"left": 1, "right": 2}
    run_mode("train", changed(config, data__classes=("right", "left")), tmp_path / "new")  # nothing was saved yet
    assert json.loads((tmp_path / "new" / CLASS_FILE).read_text()) == {"right": 1, "left": 2}
    old = Path(shutil.copytree(trained, tmp_path / "old"))
    (old / CLASS_FILE).unlink()
    run_mode("train", config, old)
    assert json.loads((old / CLASS_FILE).read_text()) == {"left": 1, "right": 2}


def test_converted_parameters_predict_like_the_run(tmp_path, trained, config, videos, evaluated):
    config_file = write_config(tmp_path / "config.py", config)
    run_file = str(tmp_path / "run.safetensors")
    assert convert([str(trained), "--to", "torch", "--dialect", "re2tal", "--out", run_file]) == 0
    assert convert([run_file, "--model", str(config_file), "--out", str(tmp_path / "converted")]) == 0
    (tmp_path / "classes.txt").write_text("left\nright\n")
    model = re2tal_jax.load(tmp_path / "converted", classes=tmp_path / "classes.txt")
    assert repr(model).startswith("TrainedDetector(actionformer on video_swin_tiny, 2 classes, step 0 of ")
    assert json.loads(re2tal_jax.localize(model, videos / f"{IDS[3]}.mp4").to_json()) == evaluated[IDS[3]]
    plain = write_config(tmp_path / "plain.py", changed(config, backbone__rewired=False))
    with pytest.raises(ConfigError, match=r"config\.backbone\.rewired = False, trained with True"):
        re2tal_jax.load(tmp_path / "converted", config=plain, classes=tmp_path / "classes.txt")


def test_a_classifier_that_lacks_the_videos_is_left_out(tmp_path, config, videos, caplog):
    scores = {"results": {IDS[0]: [0.9, 0.1]}, "class": list(CLASSES)}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    config = changed(config, num_classes=1, data__class_agnostic=True, train__mirror=None)
    config = changed(config, external_classifier={"path": str(tmp_path / "scores.json"), "top_k": 1})
    run = save_run(tmp_path / "run", config)
    (run / CLASS_FILE).unlink()
    run_predict(config, run, tmp_path / "out", videos)
    assert {entry["label"] for found in results(tmp_path / "out").values() for entry in found} == {"action"}
    assert f"is left out, and all detections are called 'action': {tmp_path}" in caplog.text
    run_predict(config, run, tmp_path / "known", videos / f"{IDS[0]}.mp4")
    assert {entry["label"] for entry in results(tmp_path / "known")[IDS[0]]} == {"left"}
    moved = changed(config, external_classifier__path=str((tmp_path / "scores.json").rename(tmp_path / "moved.json")))
    run_predict(moved, run, tmp_path / "known", videos / f"{IDS[0]}.mp4")
    (tmp_path / "moved.json").write_text(json.dumps({**scores, "results": {IDS[0]: [0.8, 0.1]}}))
    with pytest.raises(CheckpointError, match=r"external_classifier.sha256: '\w+' there, '\w+' now"):
        run_predict(moved, run, tmp_path / "known", videos / f"{IDS[0]}.mp4")


def test_the_command_line_predicts_and_tells_what_is_wrong(tmp_path, trained, config, videos, run_main, evaluated):
    file = write_config(tmp_path / "config.py", config)
    first = ("--config", file, "--workdir", tmp_path / "work", "--mode", "predict", "--checkpoint", trained)
    done = run_main(*first, "--videos", videos / f"{IDS[0]}.mp4", videos / f"{IDS[1]}.mp4", "--config.seed=5")
    assert (done.code, done.err) == (0, "")
    assert results(tmp_path / "work" / "predict") == {name: evaluated[name] for name in IDS[:2]}
    done = run_main(*first, "--videos", videos / "nothing.mp4")
    assert (done.code, done.out) == (1, "")
    assert "DataError: --videos" in done.err
    done = run_main("--config", file, "--videos", videos)
    assert "ConfigError: --videos belongs to --mode predict; the mode is 'train'." in done.err
    (tmp_path / "file").write_text("")
    done = run_main(*first, "--videos", videos, "--out", tmp_path / "file" / "out")
    assert "cannot be written (Not a directory): choose another folder with --out" in done.err


def test_progress_is_told_in_the_log_where_there_is_no_terminal(monkeypatch, caplog, capsys):
    caplog.set_level("INFO")
    monkeypatch.setattr("re2tal_jax.progress.LOG_EVERY_SEC", -1.0)
    with WorkProgress(4, "predict", "window") as progress:
        progress.advance(2)
        assert caplog.messages == []  # the first ones start the clock
        progress.advance()
    assert caplog.messages == ["predict | window 3 of 4 | 0 s left"]
    assert capsys.readouterr().err == ""


def test_detections_print_and_draw_themselves():
    found = re2tal_jax.types.Detections(
        segments_sec=np.array([[1.0, 3.0], [2.0, 2.5], [4.0, 8.0]]),
        labels=("$a$", "b", "$a$"),
        scores=np.array([0.9, 0.5, 0.1]),
    )
    assert json.loads(found.to_json()) == [
        {"segment": [1.0, 3.0], "label": "$a$", "score": 0.9},
        {"segment": [2.0, 2.5], "label": "b", "score": 0.5},
        {"segment": [4.0, 8.0], "label": "$a$", "score": 0.1},
    ]
    back = read_activitynet({"results": {"x": json.loads(found.to_json())}})["x"]
    assert back.labels == found.labels
    (axes,) = found.plot(duration_sec=10.0).axes
    bars = {(bar.get_x(), bar.get_width(), round(bar.get_y() + 0.4), bar.get_alpha()) for bar in axes.patches}
    assert bars == {(1.0, 2.0, 0, 0.9), (2.0, 0.5, 1, 0.5), (4.0, 4.0, 0, 0.1)}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["$a$", "b"]
    assert axes.get_xlim() == (0, 10)
    (axes,) = found.plot(min_score=0.5).axes
    assert [bar.get_alpha() for bar in axes.patches] == [0.5, 0.9]
    assert axes.get_xlim() == (0, 3)
    faint = dataclasses.replace(found, scores=np.array([0.9, 0.5, 0.08]))  # less than a tenth of the best
    assert len(faint.plot().axes[0].patches) == 2
