"""Prepared directories: written, read back, trained from, and what is said of bad ones."""

import dataclasses
import gc
import importlib.util
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from re2tal_jax.config import build
from re2tal_jax.data import DATASETS, build_dataset
from re2tal_jax.data.container import probe
from re2tal_jax.data.elements import LoaderConfig
from re2tal_jax.data.pipeline import Loader
from re2tal_jax.data.sampling import RandomTrunc, Resize, SlidingWindow
from re2tal_jax.data.tfds_builders import __main__ as command
from re2tal_jax.data.tfds_builders import builder
from re2tal_jax.data.tfds_builders.__main__ import main, prepare
from re2tal_jax.data.tfds_builders.contents import NAME, VERSION, split_names
from re2tal_jax.data.video import read_frames
from re2tal_jax.data.video_source import VideoInfo, VideoSource
from re2tal_jax.errors import ConfigError, DataError
from tests.video_files import READERS, numbered_frames, write_audio, write_video

SMALL = LoaderConfig(height=32, width=32, threads=2)
WHOLE = Resize(num_snippets=4, frames_per_snippet=2)
RANDOM = RandomTrunc(num_snippets=8, frames_per_snippet=2, snippet_stride=4)
WINDOWS = SlidingWindow(num_snippets=8, frames_per_snippet=2, snippet_stride=4, overlap=0.5)
TINY = 1  # bytes: every video has a file of records of its own


def config(data, train="training", evaluation="validation"):
    return {"data": data, "train": {"subset": train}, "eval": {"subset": evaluation}}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A synthetic data set: its options."""
    root = tmp_path_factory.mktemp("rendered")
    return {"root": str(root), "num_train": 3, "num_validation": 2, "seed": 3, "processes": 1}


@pytest.fixture(scope="module")
def directory(rendered, tmp_path_factory):
    """The same, prepared, two or three videos in a file of records."""
    out = tmp_path_factory.mktemp("prepared")
    largest = max(path.stat().st_size for path in _rendered_files(rendered))
    result = prepare(config({"name": "synthetic", **rendered}), out, shard_bytes=2 * largest)
    assert result.written
    assert (result.videos, result.failures) == (5, {})
    assert len(list((out / NAME / VERSION).glob("*training*"))) == 2
    return out


def _rendered_files(rendered):
    build_dataset("synthetic", subset="training", **rendered)
    return list((Path(rendered["root"]) / "videos").iterdir())


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos a, b, c, d of 24, 28, 32, 36 frames at 10 fps."""
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate("abcd"):
        write_video(folder / f"{name}.mp4", numbered_frames(24 + 4 * i, 32, 48), fps=10)
    return folder


@pytest.fixture
def own(videos, tmp_path):
    """A data set in ActivityNet form: its options. a, b train, c, d validate; c is unreadable in no way."""
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    segments = [([0.3, 1.27], "run"), ([0.4, 0.41], "jump"), ([0.3, 1.27], "jump"), ([1.5, 9.0], "run")]
    database = {
        name: {
            "subset": "training" if name in "ab" else "validation",
            "duration": (24 + 4 * i) / 10,
            "frame": 24 + 4 * i,
            "annotations": [{"segment": segment, "label": label} for segment, label in segments],
        }
        for i, name in enumerate("abcd")
    }
    (tmp_path / "annotation.json").write_text(json.dumps({"database": database}))
    return {"annotations": str(tmp_path / "annotation.json"), "videos": str(folder)}


def assert_same(some, others):
    assert some.classes == others.classes
    assert some.findings == others.findings
    assert some.findings.examples == others.findings.examples
    assert some.ground_truth == others.ground_truth
    assert len(some.records) == len(others.records)
    for one, other in zip(some.records, others.records, strict=True):
        for field in dataclasses.fields(one):
            mine, its = getattr(one, field.name), getattr(other, field.name)
            np.testing.assert_array_equal(mine, its)
            assert getattr(mine, "dtype", type(mine)) == getattr(its, "dtype", type(its))


def take(data, policy, count, *, train=True, **options):
    loader = Loader(data, policy, dataclasses.replace(SMALL, **options), seed=5, train=train, batch_size=2)
    batches = iter(loader)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


@pytest.mark.parametrize(
    ("subset", "policy", "options"),
    [
        ("training", RANDOM, {"train": True}),
        ("training", WHOLE, {"train": True, "workers": 1}),
        ("validation", WINDOWS, {"train": False}),
        (("training", "validation"), WHOLE, {"train": False, "crop": "center", "height": 24}),
    ],
)
def test_batches_of_a_prepared_directory_are_those_of_the_files(rendered, directory, subset, policy, options):
    training = options["train"]
    files = build_dataset("synthetic", subset=subset, training=training, **rendered)
    records = build_dataset("prepared", subset=subset, training=training, root=str(directory))
    assert_same(files, records)
    assert not records.video_paths
    mine, its = (take(data, policy, 2, **options) for data in (files, records))
    for one, other in zip(mine, its, strict=True):
        assert one.keys() == other.keys()
        assert one["video"].std() > 0
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_tensorflow_is_not_imported(directory):
    source = next(iter(build_dataset("prepared", subset="validation", root=str(directory)).video_sources.values()))
    assert source.read()
    assert "tensorflow_datasets" in sys.modules
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", ["activitynet", "thumos14", "custom"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("view", [{}, {"class_agnostic": True, "min_length_ratio": 0.1}])
def test_every_data_set_is_read_back_as_it_was(own, tmp_path, name, training, view):
    section = {"name": name, "min_length_ratio": 0.0, **own, **view}
    result = prepare(config(section), tmp_path / "out")
    assert result.view == {"class_agnostic": False, "min_length_ratio": 0.0, **view}
    options = {key: value for key, value in section.items() if key != "name"}
    for subset in ("training", "validation"):
        assert_same(
            build(DATASETS[name], options, path="", subset=subset, training=training),
            build_dataset("prepared", root=str(tmp_path / "out"), subset=subset, training=training, **result.view),
        )


def test_an_example_is_complete(own, tmp_path):
    import tensorflow_datasets as tfds

    prepare(config({"name": "activitynet", **own}), tmp_path / "out")
    example = tfds.builder_from_directory(tmp_path / "out" / NAME / VERSION).as_data_source("validation")[1]
    segments = example.pop("segments_sec")
    assert segments.dtype == np.float64
    assert segments.tolist() == [[0.3, 1.27], [0.4, 0.41], [0.3, 1.27], [1.5, 3.6]]
    assert example == {
        "video_id": b"d",
        "subset": b"validation",
        "video": (Path(own["videos"]) / "d.mp4").read_bytes(),
        "suffix": b".mp4",
        "duration_sec": 3.6,
        "fps": 10.0,
        "num_frames": 36,
        "labels": [b"run", b"jump", b"jump", b"run"],
    }


def test_a_source_travels_without_what_it_has_opened(directory):
    source = next(iter(build_dataset("prepared", subset="training", root=str(directory)).video_sources.values()))
    before = pickle.dumps(source)
    content = source.read()
    assert pickle.dumps(source) == before
    assert len(before) < 1000
    assert pickle.loads(before).read() == content


class Held(VideoSource):
    def __init__(self, content: bytes, info: VideoInfo | None = None):
        self.content, self.known, self.reads = content, info, 0

    def __str__(self):
        return "a held video"

    def info(self):
        return self.known

    @property
    def kept_in(self):
        return Path("archive")

    def read(self):
        self.reads += 1
        return self.content


@pytest.mark.parametrize("reader", READERS)
def test_frames_of_bytes_are_those_of_the_file(videos, reader):
    path = videos / "c.mp4"
    source = Held(path.read_bytes(), probe(path))
    assert probe(Held(path.read_bytes())) == probe(path)
    frames = read_frames(source, [3, 30, 7], 40, 40, crop="center", reader=reader)
    np.testing.assert_array_equal(frames, read_frames(path, [3, 30, 7], 40, 40, crop="center", reader=reader))
    assert source.reads == 1


@pytest.mark.parametrize("reader", READERS)
def test_bytes_are_freed_when_their_frames_are_read(videos, reader):
    content = (videos / "c.mp4").read_bytes() + bytes(8 * 2**20)  # the decoders stop at the end of the video

    def read():
        for _ in range(20):
            read_frames(Held(content), [0], 32, 32, reader=reader)

    read()
    gc.disable()
    try:
        process = psutil.Process()
        before = process.memory_info().rss
        read()
        assert process.memory_info().rss - before < 5 * len(content)
    finally:
        gc.enable()


@pytest.mark.parametrize(("content", "reason"), [(b"", "is empty"), (b"no video" * 99, "not readable as a video")])
def test_bytes_that_are_no_video_are_named(content, reason):
    with pytest.raises(DataError, match=f"a held video: .*{reason}"):
        probe(Held(content))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_with_the_next_file(own, tmp_path, monkeypatch):
    wanted = config({"name": "activitynet", **own})
    read, example = [], builder._example

    def interrupted(job):
        if job.record.video_id == "c":
            raise KeyboardInterrupt
        return counted(job)

    def counted(job):
        read.append(job.record.video_id)
        return example(job)

    monkeypatch.setattr(builder, "_example", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(wanted, tmp_path / "out", shard_bytes=TINY)
    assert read == ["a", "b"]
    with pytest.raises(DataError, match="not finished"):
        build_dataset("prepared", root=str(tmp_path / "out"), subset="training")
    monkeypatch.setattr(builder, "_example", counted)
    assert prepare(wanted, tmp_path / "out", shard_bytes=TINY).written
    assert read == ["a", "b", "c", "d"]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == sorted(
        [
            *(NAME, VERSION, "dataset_info.json", "features.json", "metadata.json"),
            *(f"{NAME}-{s}.array_record-0000{i}-of-00002" for s in ("training", "validation") for i in range(2)),
        ]
    )
    data = build_dataset("prepared", root=str(tmp_path / "out"), subset=("training", "validation"))
    for name, source in data.video_sources.items():
        assert source.read() == (Path(own["videos"]) / f"{name}.mp4").read_bytes()


def test_what_an_interrupted_run_wrote_of_a_file_that_changed_is_written_anew(own, tmp_path, monkeypatch):
    wanted = config({"name": "activitynet", **own})
    (Path(own["videos"]) / "d.mp4").rename(tmp_path / "away.mp4")
    (Path(own["videos"]) / "d.mp4").symlink_to(tmp_path / "away.mp4")
    monkeypatch.setattr(command, "plan_jobs", _then(command.plan_jobs, (tmp_path / "away.mp4").unlink))
    with pytest.raises(DataError, match=r"'d'.*cannot be read"):
        prepare(wanted, tmp_path / "out", shard_bytes=TINY)
    monkeypatch.undo()
    shutil.copy(Path(own["videos"]) / "a.mp4", tmp_path / "away.mp4")
    shutil.copy(Path(own["videos"]) / "b.mp4", Path(own["videos"]) / "a.mp4")
    prepare(wanted, tmp_path / "out", shard_bytes=TINY)
    data = build_dataset("prepared", root=str(tmp_path / "out"), subset="training")
    assert data.video_sources["a"].read() == (Path(own["videos"]) / "b.mp4").read_bytes()


def _then(function, action):
    calls = []

    def replaced(*arguments):
        result = function(*arguments)
        calls.append(1)
        if len(calls) == 2:  # both subsets are planned
            action()
        return result

    return replaced


def test_what_is_finished_is_left_alone_and_another_data_set_refused(own, tmp_path, monkeypatch):
    wanted = config({"name": "activitynet", **own})
    assert prepare(wanted, tmp_path / "out").written
    monkeypatch.setattr(builder, "_example", None)
    assert not prepare(wanted, tmp_path / "out").written
    with pytest.raises(ConfigError, match="its subsets are training, validation, not training"):
        prepare(config({"name": "activitynet", **own}, evaluation="training"), tmp_path / "out")
    shutil.copy(Path(own["videos"]) / "a.mp4", Path(own["videos"]) / "d.mp4")
    with pytest.raises(ConfigError, match="video 'd' of validation differs"):
        prepare(wanted, tmp_path / "out")


def test_two_runs_at_a_time_are_refused(own, tmp_path, monkeypatch):
    wanted = config({"name": "activitynet", **own})
    example = builder._example

    def meanwhile(job):
        with pytest.raises(DataError, match="another preparation is at work"):
            prepare(wanted, tmp_path / "out")
        return example(job)

    monkeypatch.setattr(builder, "_example", meanwhile)
    assert prepare(wanted, tmp_path / "out").written


def test_an_unreadable_video_is_written_named_and_met_again_by_the_loader(own, tmp_path, capsys, caplog):
    (Path(own["videos"]) / "c.mp4").write_bytes(b"")
    write_audio(Path(own["videos"]) / "d.mp4")
    section = config({"name": "activitynet", **own})
    text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({section})\n"
    (tmp_path / "config.py").write_text(text)
    assert main(["--config", str(tmp_path / "config.py"), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out
    assert "4 videos" in told
    assert "2 cannot be read" in told
    assert "'c'" in told
    assert "holds no video stream" in told
    assert f"data=dict(name='prepared', root={str(tmp_path / 'out')!r}, class_agnostic=False" in told
    data = build_dataset("prepared", root=str(tmp_path / "out"), subset="validation")
    with pytest.raises(DataError, match=r"Video 'c': .*out.*record 0 of split validation: the video file is empty"):
        take(data, WHOLE, 1, train=False)
    batch = take(data, WHOLE, 1, train=False, on_error="skip")[0]
    assert batch["window"].tolist() == [-1, -1]
    assert main(["--config", str(tmp_path / "config.py"), "--out", str(tmp_path / "out")]) == 1
    assert "(written before)" in capsys.readouterr().out


def test_the_command_line_names_what_is_wrong(own, tmp_path, capsys):
    assert main(["--config", str(tmp_path / "none.py"), "--out", str(tmp_path)]) == 1
    assert "none.py" in capsys.readouterr().err
    assert main(["--config", "x.py", "--out", str(tmp_path), "--worker=3"]) == 1
    assert "'--workers'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"videos": None}, r"config.data.videos is None"),
        ({"features": {"folder": "x"}}, "set it to None"),
        ({"name": "activitynett"}, "Did you mean 'activitynet'"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_config_that_cannot_be_prepared_is_refused(own, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        prepare(config({"name": "activitynet", **own, **change}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prepared_directory_is_not_prepared_again(directory, tmp_path):
    with pytest.raises(ConfigError, match="prepared already"):
        prepare(config({"name": "prepared", "root": str(directory)}), tmp_path / "out")


def test_beam_that_is_missing_is_named(own, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"DirectRunner needs Apache Beam: pip install -e '.\[beam\]'"):
        prepare(config({"name": "activitynet", **own}), tmp_path / "out", beam_runner="DirectRunner")


@pytest.mark.filterwarnings("default")
def test_beam_writes_the_same(own, tmp_path):
    pytest.importorskip("apache_beam", reason="pip install -e '.[beam]'")
    wanted = config({"name": "activitynet", **own})
    prepare(wanted, tmp_path / "here", shard_bytes=TINY)
    prepare(wanted, tmp_path / "beam", shard_bytes=TINY, beam_runner="DirectRunner")
    here, beam = (
        {path.name: path.read_bytes() for path in (tmp_path / name / NAME / VERSION).iterdir()}
        for name in ("here", "beam")
    )
    assert here == beam


@pytest.mark.parametrize(
    ("subsets", "splits"),
    [
        (["Validation", "Test"], ["Validation", "Test"]),
        (["a b", "c"], ["subset_0", "subset_1"]),
        (["all", "c"], ["subset_0", "subset_1"]),
        (["test", "Test"], ["subset_0", "subset_1"]),
    ],
)
def test_a_split_is_called_as_its_subset_where_a_file_can_be(subsets, splits):
    assert split_names(subsets) == dict(zip(subsets, splits, strict=True))


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [([3, 3, 3], [2, 1]), ([9, 1, 1, 9, 9], [1, 2, 1, 1]), ([6], [1]), ([0, 0], [2]), ([6, 1], [1, 1])],
)
def test_videos_are_divided_in_order(sizes, parts):
    divided = builder.divide(sizes, 6)
    assert [len(part) for part in divided] == parts
    assert [number for part in divided for number in part] == list(range(len(sizes)))


# --- bad directories -------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(directory, tmp_path):
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def opened(root, subset="validation"):
    return build_dataset("prepared", root=str(root), subset=subset)


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        opened(tmp_path / "none")
    with pytest.raises(DataError, match=f"no folder {NAME}"):
        opened(tmp_path)


def test_another_version_is_named(copy):
    (copy / NAME / VERSION).rename(copy / NAME / "0.9.0")
    with pytest.raises(DataError, match=rf"by version 0.9.0, this one reads {VERSION}"):
        opened(copy)


def test_a_subset_that_is_not_there_is_answered_with_those_that_are(directory):
    with pytest.raises(
        DataError, match=r"no video in subset 'valid'. Did you mean 'validation'\?.*training \(3 videos"
    ):
        opened(directory, "valid")


def test_an_incomplete_copy_is_named(copy):
    next((copy / NAME / VERSION).glob("*-validation*")).unlink()
    assert opened(copy, "training").records
    with pytest.raises(DataError, match="1 of 1 files of split validation are missing"):
        opened(copy)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metadata.json", "{", "not valid JSON"),
        ("metadata.json", "[]", "a JSON object is needed"),
        ("metadata.json", '{"format": 2}', "prepared in form 2, this version reads form 1"),
        ("metadata.json", '{"format": 1, "subsets": {"a": {}}}', "metadata.json is damaged"),
        ("dataset_info.json", "{", "its descriptions cannot be read"),
    ],
)
def test_damaged_descriptions_are_named(copy, file, content, message):
    (copy / NAME / VERSION / file).write_text(content)
    with pytest.raises(DataError, match=message):
        opened(copy)


def test_damaged_records_are_named_with_their_video(copy):
    path = next((copy / NAME / VERSION).glob("*-validation*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 4 + 64] = bytes(64)
    path.write_bytes(content)
    data = opened(copy)
    with pytest.raises(
        DataError, match=r"Video 'synthetic_validation_00000': .*record 0 of split validation: cannot be"
    ):
        take(data, WHOLE, 1, train=False)
    batch = take(data, WHOLE, 1, train=False, on_error="skip")[0]
    assert batch["window"].tolist() == [-1, 1]


def test_records_of_another_directory_are_named(own, copy, tmp_path):
    prepare(config({"name": "activitynet", **own}), tmp_path / "other")
    mine, its = (next((root / NAME / VERSION).glob("*-validation*")) for root in (copy, tmp_path / "other"))
    shutil.copy(its, mine)
    source = opened(copy).video_sources["synthetic_validation_00000"]
    with pytest.raises(DataError, match="record 0 of split validation: holds the video 'c'"):
        source.read()
