import gc
import json
import logging
import shutil
import threading
from dataclasses import replace

import jax
import numpy as np
import psutil
import pytest
from grain.multiprocessing import SharedMemoryArray

from re2tal_jax.data import decoding
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.elements import LoaderConfig
from re2tal_jax.data.findings import Findings
from re2tal_jax.data.pipeline import Loader, Prefetch
from re2tal_jax.data.sampling import RandomTrunc, Resize, SlidingWindow
from re2tal_jax.data.video import read_frames
from re2tal_jax.errors import CheckpointError, ConfigError, DataError
from re2tal_jax.training.sharding import MeshConfig, make_mesh, put_batch
from re2tal_jax.types import Batch, VideoRecord
from tests.video_files import frame_numbers, numbered_frames, write_video

COUNT, FPS = 7, 10
SMALL = LoaderConfig(height=32, width=32, threads=1)
WHOLE = Resize(num_snippets=4, frames_per_snippet=2)
RANDOM = RandomTrunc(num_snippets=4, frames_per_snippet=2, snippet_stride=4)
WINDOWS = SlidingWindow(num_snippets=4, frames_per_snippet=2, snippet_stride=4, overlap=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos 0..6 of 24 + 4 i frames at 10 fps, frame n of grey level 16 + 4 n."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(COUNT):
        write_video(folder / f"{i}.mp4", numbered_frames(24 + 4 * i, 32, 48), fps=FPS)
    return folder


def dataset(folder, *, annotated=True):
    """Video i has i % 3 + 1 segments of half a second, at seconds 0, 0.7 and 1.4, of classes 0, 1, 2."""
    records = []
    for i in range(COUNT):
        starts = 0.7 * np.arange(i % 3 + 1)
        records.append(
            VideoRecord(
                video_id=f"video {i}",
                subset="training",
                duration_sec=(24 + 4 * i) / FPS,
                num_frames=24 + 4 * i if annotated else None,
                fps=float(FPS) if annotated else None,
                segments_sec=np.stack([starts, starts + 0.5], axis=1),
                labels=np.arange(i % 3 + 1),
            )
        )
    return Dataset(
        records=tuple(records),
        classes=("a", "b", "c"),
        video_paths={f"video {i}": folder / f"{i}.mp4" for i in range(COUNT)},
        findings=Findings(),
        ground_truth={},
    )


@pytest.fixture
def damaged(folder, tmp_path):
    """The same videos, number 2 empty and number 5 no video."""
    for i in range(COUNT):
        (tmp_path / f"{i}.mp4").write_bytes((folder / f"{i}.mp4").read_bytes())
    (tmp_path / "2.mp4").write_bytes(b"")
    (tmp_path / "5.mp4").write_text("no video")
    return dataset(tmp_path)


def loader(data, policy=WHOLE, config=SMALL, *, train=True, seed=0, batch_size=2, **process):
    return Loader(data, policy, config, seed=seed, train=train, batch_size=batch_size, **process)


def take(source, count):
    batches = iter(source)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def assert_equal(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_batch_holds_what_the_policy_asks_of_the_video(folder):
    data = dataset(folder)
    batch = list(loader(data, train=False, batch_size=3))[1]
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "video": ((3, 8, 32, 32, 3), "uint8"),
        "frame_size": ((3, 2), "float32"),
        "mask": ((3, 4), "bool"),
        "gt_segments": ((3, 3, 2), "float32"),
        "gt_labels": ((3, 3), "int32"),
        "gt_mask": ((3, 3), "bool"),
        "window": ((3,), "int32"),
    }
    assert batch["window"].tolist() == [3, 4, 5]
    # video 4: 40 frames as 8, that is the middles 2, 7, 12 … of eight parts; 4 s on 4 snippets, two segments
    assert frame_numbers(batch["video"][1]) == [2, 7, 12, 17, 22, 27, 32, 37]
    np.testing.assert_array_equal(batch["video"][1], read_frames(folder / "4.mp4", range(2, 40, 5), 32, 32))
    np.testing.assert_allclose(batch["gt_segments"][1], [[0, 0.5], [0.7, 1.2], [0, 0]], rtol=1e-6)
    assert batch["gt_labels"][1].tolist() == [0, 1, 0]
    assert batch["gt_mask"][1].tolist() == [True, True, False]
    assert batch["mask"].all()
    assert batch["frame_size"].tolist() == [[32, 48]] * 3


def test_short_windows_are_filled_and_masked(folder):
    policy = SlidingWindow(num_snippets=20, frames_per_snippet=2, snippet_stride=4, overlap=0.5)
    batch = next(iter(loader(dataset(folder), policy, train=False, batch_size=1)))
    assert batch["mask"].tolist() == [[True] * 6 + [False] * 14]  # 24 frames, four a snippet
    assert frame_numbers(batch["video"][0]) == [*range(0, 24, 2), *[22] * 28]


def test_an_epoch_has_every_window_once_and_the_next_in_another_order(folder):
    data = dataset(folder)
    source = loader(data, batch_size=7)
    first, second = (batch["window"].tolist() for batch in take(source, 2))
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second
    assert take(loader(data, batch_size=7, seed=1), 1)[0]["window"].tolist() != first
    assert len(loader(data, batch_size=3)) == 2  # the seventh window waits for another epoch
    windows = [w for batch in take(loader(data, batch_size=3), 2) for w in batch["window"].tolist()]
    assert len(set(windows)) == 6


def test_workers_and_threads_change_nothing(folder):
    data = dataset(folder)
    expected = take(loader(data, RANDOM), 9)
    threads = LoaderConfig(height=32, width=32, threads=3, ahead=7)
    assert_equal(take(loader(data, RANDOM, threads), 9), expected)
    workers = LoaderConfig(height=32, width=32, workers=2, threads=1)
    assert_equal(take(loader(data, RANDOM, workers), 9), expected)


def test_workers_leave_no_shared_memory_behind(folder):
    gc.disable()
    try:
        list(loader(dataset(folder), config=LoaderConfig(height=32, width=32, workers=1, threads=1), train=False))
        assert not [held for held in gc.get_objects() if type(held) is SharedMemoryArray]
    finally:
        gc.enable()


@pytest.mark.parametrize("policy", [WHOLE, RANDOM])
def test_a_resumed_stream_goes_on_exactly_also_past_unreadable_videos(damaged, policy):
    skip = LoaderConfig(height=32, width=32, on_error="skip")
    expected = take(loader(damaged, policy, skip), 12)
    source = loader(damaged, policy, skip)
    assert_equal(take(source, 5), expected[:5])
    state = json.loads(json.dumps(source.get_state()))
    resumed = loader(damaged, policy, skip)
    resumed.set_state(state)
    assert_equal(take(resumed, 7), expected[5:])
    assert_equal(take(source, 7), expected[5:])  # iterating anew goes on as well


def test_random_windows_differ_from_epoch_to_epoch(folder):
    source = loader(dataset(folder), RANDOM, batch_size=7)
    epochs = [dict(zip(b["window"].tolist(), b["video"], strict=True)) for b in take(source, 6)]
    starts = [{frame_numbers(epoch[i])[0] for epoch in epochs} for i in range(COUNT)]
    assert [i for i in range(COUNT) if len(starts[i]) > 1] == [1, 2, 4, 5]  # the others' one segment is at second 0


def test_evaluation_is_one_pass_in_order_filled_with_empty_rows(folder):
    source = loader(dataset(folder), train=False, batch_size=4)
    batches = list(source)
    assert [batch["window"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, -1]]
    assert len(source) == 2
    assert not batches[1]["mask"][3].any()
    assert not batches[1]["gt_mask"][3].any()
    assert_equal(list(source), batches)


@pytest.mark.parametrize("train", [True, False])
def test_processes_share_every_batch_by_rows(folder, train):
    data = dataset(folder)
    whole = take(loader(data, RANDOM if train else WHOLE, train=train, batch_size=4), 2)
    parts = [
        take(loader(data, RANDOM if train else WHOLE, train=train, batch_size=4, process_index=i, process_count=2), 2)
        for i in range(2)
    ]
    joined = [
        {name: np.concatenate([first[name], second[name]]) for name in first}
        for first, second in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


def test_an_unreadable_video_stops_the_run_with_id_file_and_way_out(damaged):
    with pytest.raises(
        DataError, match=r"Video 'video 2': .*2\.mp4: the video file is empty.*--config.eval.loader.on_error=skip"
    ):
        list(loader(damaged, train=False))


def test_an_unreadable_video_in_a_worker_stops_the_run_too(damaged):
    workers = LoaderConfig(height=32, width=32, workers=1, threads=1)
    with pytest.raises(DataError, match=r"Video 'video 2': .*2\.mp4"):
        list(loader(damaged, config=workers, train=False))


def test_skipped_videos_are_replaced_named_once_and_counted(damaged, caplog):
    source = loader(damaged, config=LoaderConfig(height=32, width=32, on_error="skip"), batch_size=7)
    with caplog.at_level(logging.WARNING):
        batches = take(source, 3)
    for batch in batches:
        assert not {2, 5} & set(batch["window"].tolist())
        assert {0, 1, 3, 4, 6} <= set(batch["window"].tolist())
    assert sorted(source.skipped) == ["video 2", "video 5"]
    assert sorted(r.message.split("'")[1] for r in caplog.records) == ["video 2", "video 5"]
    assert "2.mp4: the video file is empty" in source.skipped["video 2"]


def test_an_evaluation_leaves_skipped_videos_empty(damaged):
    source = loader(damaged, config=LoaderConfig(height=32, width=32, on_error="skip"), train=False, batch_size=7)
    (batch,) = source
    assert batch["window"].tolist() == [0, 1, -1, 3, 4, -1, 6]
    assert len(source.skipped) == 2


def test_a_data_set_without_readable_videos_ends(tmp_path):
    for i in range(COUNT):
        (tmp_path / f"{i}.mp4").write_bytes(b"")
    source = loader(dataset(tmp_path), config=LoaderConfig(height=32, width=32, on_error="skip"))
    with pytest.raises(DataError, match="11 windows in a row cannot be read"):
        take(source, 1)


def test_the_cache_gives_the_same_batches_without_the_files(folder, tmp_path):
    for i in range(COUNT):
        (tmp_path / f"{i}.mp4").write_bytes((folder / f"{i}.mp4").read_bytes())
    expected = take(loader(dataset(folder), batch_size=7), 3)
    config = LoaderConfig(height=32, width=32, cache_mib=1, threads=1, ahead=1)  # one thread: none is read twice
    source = loader(dataset(tmp_path), config=config, batch_size=7)
    batches = iter(source)
    first = next(batches)
    for i in range(COUNT):
        (tmp_path / f"{i}.mp4").unlink()
    assert_equal([first, next(batches), next(batches)], expected)


def test_windows_tell_record_and_grid(folder):
    source = loader(dataset(folder), WINDOWS, train=False)
    ref = source.windows[1]
    assert (ref.record.video_id, ref.index) == ("video 0", 1)
    grid = source.grid(1)
    assert (grid.start_sec, grid.seconds_per_snippet, grid.duration_sec) == (0.8, 0.4, 2.4)
    whole = loader(dataset(folder), train=False).grid(4)
    assert (whole.start_sec, whole.seconds_per_snippet) == (0, 1.0)


def test_windows_are_counted_from_the_files_where_the_annotation_is_silent(folder):
    known, silent = (loader(dataset(folder, annotated=a), WINDOWS, train=False) for a in (True, False))
    assert len(known.windows) == len(silent.windows) > COUNT
    assert_equal(list(known), list(silent))
    assert known.grid(9) == silent.grid(9)


def test_the_index_of_a_video_of_many_windows_is_read_once(folder, monkeypatch):
    read, index = [], decoding.read_index
    monkeypatch.setattr(decoding, "read_index", lambda path: read.append(path) or index(path))
    source = loader(dataset(folder), WINDOWS, train=False)
    list(source)
    assert len(source.windows) > 2 * COUNT
    assert read == [folder / f"{i}.mp4" for i in range(COUNT)]


def test_no_video_stays_open_behind_an_evaluation_or_a_training_step(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)  # threads of other tests may still read from the folder

    before = set(threading.enumerate())
    list(loader(dataset(tmp_path), WINDOWS, train=False))
    batches = iter(loader(dataset(tmp_path)))
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)  # it ends when it has read what it was at
        assert not thread.is_alive()
    gc.collect()  # what a reference cycle holds may go then only
    files = [file.path for file in psutil.Process().open_files()]
    assert [file for file in files if file.startswith(f"{tmp_path}/")] == []


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 3}])
def test_a_state_of_another_run_is_refused(folder, change):
    state = loader(dataset(folder)).get_state()
    name, value = next(iter(change.items()))
    with pytest.raises(CheckpointError, match=f"has {name} = {state[name]}, this run has {value}"):
        loader(dataset(folder), **change).set_state(state)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 8}, "batch_size = 8 is more than the 7 windows"),
        ({"batch_size": 3, "process_count": 2}, "batch_size = 3 must be a multiple of the 2 processes"),
        ({"policy": RANDOM, "train": False}, "random_trunc draws a new window"),
        ({"policy": RANDOM, "config": LoaderConfig(height=8, width=8, cache_mib=9)}, "random_trunc draws a new window"),
    ],
)
def test_what_cannot_be_loaded_is_said_at_once(folder, options, reason):
    with pytest.raises(ConfigError, match=reason):
        loader(dataset(folder), **options)


def test_a_video_without_file_is_named(folder):
    data = dataset(folder)
    del data.video_paths["video 3"]
    with pytest.raises(DataError, match="Video 'video 3' has no file"):
        loader(data)


def test_prefetched_batches_are_split_over_the_devices_and_their_state_is_that_of_the_last_taken(folder):
    data, mesh = dataset(folder), make_mesh(MeshConfig(), jax.devices())
    expected = take(loader(data, RANDOM, batch_size=4), 5)
    with Prefetch(loader(data, RANDOM, batch_size=4), lambda batch: batch_of(batch, mesh)) as batches:
        taken = [next(batches) for _ in range(2)]
        state = batches.get_state()
    assert isinstance(taken[0], Batch)
    twice = [{name: np.repeat(rows, 2, axis=0) for name, rows in batch.items()} for batch in expected[:2]]
    assert_equal([{name: np.asarray(rows) for name, rows in vars(batch).items()} for batch in taken], twice)
    assert len(taken[0].video.sharding.device_set) == 8
    resumed = loader(data, RANDOM, batch_size=4)
    resumed.set_state(state)
    assert_equal(take(resumed, 3), expected[2:])


def batch_of(batch, mesh):
    """Place a batch of four on eight devices, each row twice."""
    return put_batch({name: np.repeat(rows, 2, axis=0) for name, rows in batch.items()}, mesh)


def test_prefetch_ends_with_the_evaluation_and_passes_errors_on(folder, damaged):
    with Prefetch(loader(dataset(folder), train=False), dict) as batches:
        assert [b["window"].tolist() for b in batches] == [[0, 1], [2, 3], [4, 5], [6, -1]]
    with Prefetch(loader(damaged, train=False), dict) as batches, pytest.raises(DataError, match="video 2"):
        list(batches)


def test_another_order_of_as_many_windows_is_not_resumed(folder):
    """A data set, or a policy, that has as many windows is still another one."""
    data = dataset(folder)
    state = loader(data).get_state()
    backwards = replace(data, records=data.records[::-1])
    with pytest.raises(CheckpointError, match="has checksum = "):
        loader(backwards).set_state(state)
    with pytest.raises(CheckpointError, match="has checksum = "):
        loader(data, replace(WHOLE, frames_per_snippet=WHOLE.frames_per_snippet + 1)).set_state(state)
    loader(data).set_state(state)
