"""Encoding videos again: what comes out, that times hold, and that interruption and damage cost nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from re2tal_jax.data.container import frame_times, probe, seconds_to_frames
from re2tal_jax.data.prepare import jobs as command
from re2tal_jax.data.prepare.__main__ import main
from re2tal_jax.data.prepare.encode import Encoding, encode_video, output_size
from re2tal_jax.data.prepare.jobs import Job, plan
from re2tal_jax.data.prepare.record import SOURCES, Record
from re2tal_jax.data.video import read_frames
from re2tal_jax.errors import ConfigError, DataError
from tests.video_files import frame_numbers, numbered_frames, rotate, write_audio, write_video

ENCODING = Encoding(short_side=16, fps=10, gop=5)
FLAGS = ("--short-side", 16, "--fps", 10, "--gop", 5, "--workers", 1)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch) -> None:
    """Encode without a pool, whose processes take seconds to start; `test_processes_…` has its own."""

    def encode_all(jobs, encoding, workers, finish) -> bool:
        del workers
        for job in jobs:
            finish(job, command.encode_job(job, encoding))
        return False

    monkeypatch.setattr(command, "_encode_until_crash", encode_all)


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def shown_at(path: Path, seconds: np.ndarray, step: int = 4) -> list[int]:
    """Which of `numbered_frames` is on the screen at each time."""
    frames = seconds_to_frames(seconds, frame_times(path))
    return frame_numbers(read_frames(path, frames, 16, 16), step)


def files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())


# --- one video -------------------------------------------------------------------------------------------------------


def test_the_encoding_is_what_was_asked_for(tmp_path):
    source = write_video(tmp_path / "a.mkv", numbered_frames(40, 64, 96), fps=20)
    assert encode_video(source, tmp_path / "b.mp4", ENCODING) == (20, [])
    info = probe(tmp_path / "b.mp4")
    assert (info.num_frames, info.fps, info.duration_sec, info.height, info.width) == (20, 10.0, 2.0, 16, 24)
    with av.open(str(tmp_path / "b.mp4")) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        keys = [packet.pts * packet.time_base for packet in container.demux(stream) if packet.is_keyframe]
    assert np.diff([float(key) for key in keys]).max() <= 0.5


@pytest.mark.parametrize(("fps", "rate"), [(8, 8), (25, 10), (10, 10), (10, 30), (30, 29.97)])
def test_every_time_shows_the_same_picture(tmp_path, fps, rate):
    source = write_video(tmp_path / "a.mp4", numbered_frames(50), fps=fps)
    encode_video(source, tmp_path / "b.mp4", Encoding(short_side=16, fps=rate, gop=5))
    seconds = np.arange(0.013, 50 / fps, 0.05)
    allowed = {tuple(shown_at(source, np.clip(seconds + shift / rate, 0, None))) for shift in (-0.5, 0, 0.5)}
    low, *_, high = np.sort(np.array(list(allowed)), axis=0)
    found = np.array(shown_at(tmp_path / "b.mp4", seconds))
    assert ((low <= found) & (found <= high)).all()
    assert abs(probe(tmp_path / "b.mp4").duration_sec - 50 / fps) <= 0.5 / rate


def test_a_variable_rate_becomes_constant_and_times_hold(tmp_path):
    times = [0, 100, 200, 1000, 1100, 1900, 2000]
    source = write_video(tmp_path / "a.mkv", numbered_frames(7, step=20), times=times)
    encode_video(source, tmp_path / "b.mp4", ENCODING)
    steps = np.diff(frame_times(tmp_path / "b.mp4"))
    np.testing.assert_allclose(steps, 0.1, atol=1e-4)
    assert shown_at(tmp_path / "b.mp4", np.array([0.05, 0.25, 0.95, 1.05, 1.5, 1.95, 2.05]), 20) == [
        0,
        2,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.parametrize(
    ("times", "jump", "order"),
    [
        ([0, 100, 200, 300, 20300, 20400, 20500], "at 0.40 s by +19.90 s", [0, 1, 2, 3, 4, 5, 6]),
        ([0, 100, 200, 1000, 1100, 9000, 9100], "", [0, 1, 2, 2, 2, 2, 2]),  # pauses that may well be meant
    ],
)
def test_timestamps_that_leap_are_told_and_frames_go_on_in_order(tmp_path, times, jump, order):
    source = write_video(tmp_path / "a.mkv", numbered_frames(7, step=20), times=times)
    _, jumps = encode_video(source, tmp_path / "b.mp4", ENCODING)
    assert [str(found) for found in jumps] == [jump] * bool(jump)
    assert shown_at(tmp_path / "b.mp4", np.arange(7) / 10 + 0.05, 20) == order


def test_timestamps_that_begin_again_are_told_and_no_frame_is_lost(tmp_path):
    parts = [write_video(tmp_path / f"{n}.ts", numbered_frames(20) + np.uint8(80 * n)) for n in range(2)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames, (jump,) = encode_video(joined, tmp_path / "b.mp4", ENCODING)
    assert frames == 40
    assert str(jump) == "at 2.00 s by -2.00 s"
    assert shown_at(tmp_path / "b.mp4", np.arange(40) / 10 + 0.05) == list(range(40))


def test_a_video_is_turned_as_it_is_displayed(tmp_path):
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :, :32] = 255  # white left half
    source = rotate(tmp_path / "b.mp4", 90, write_video(tmp_path / "a.mp4", frames))
    encode_video(source, tmp_path / "c.mp4", ENCODING)
    (picture,) = read_frames(tmp_path / "c.mp4", [0], 32, 16)
    assert probe(tmp_path / "c.mp4").height == 32
    np.testing.assert_allclose(picture, read_frames(source, [0], 32, 16)[0], atol=40)
    assert picture[:8].mean() > 200 > 50 > picture[-8:].mean()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1920, 1080), (456, 256)), ((1080, 1920), (256, 456)), ((320, 240), (320, 240)), ((101, 333), (102, 334))],
)
def test_sizes_are_even_and_never_larger(size, expected):
    assert output_size(*size, 256) == expected


def test_sound_is_dropped_and_damage_is_told(tmp_path):
    with pytest.raises(DataError, match=r"no video stream"):
        encode_video(write_audio(tmp_path / "a.mp4"), tmp_path / "b.mp4", ENCODING)
    whole = write_video(tmp_path / "c.mp4", numbered_frames(60, 64, 64), options={"movflags": "faststart"})
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(DataError, match=r"c.mp4: (only .* of 6.00 s can be decoded|cannot be decoded after)"):
        encode_video(whole, tmp_path / "b.mp4", ENCODING)


@pytest.mark.parametrize(("name", "value"), [("short_side", 15), ("short_side", 8), ("fps", 0.0), ("gop", 0)])
def test_an_encoding_that_cannot_be_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} = {value}"):
        Encoding(**{name: value})


# --- a folder --------------------------------------------------------------------------------------------------------


def test_folders_are_mirrored_and_equal_names_told_apart(tmp_path):
    for name in ("a.avi", "a.mov", "day 1/b.v2.MKV", "day 1/c.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    targets = {str(job.target.relative_to(tmp_path / "out")) for job in plan(tmp_path / "in", tmp_path / "out")}
    assert targets == {"a.avi.mp4", "a.mov.mp4", "day 1/b.v2.mp4"}
    assert [job.target.name for job in plan(tmp_path / "in" / "a.avi", tmp_path / "out")] == ["a.mp4"]


def test_a_run_goes_on_where_it_stopped_and_leaves_the_sources_alone(tmp_path, capsys, monkeypatch):
    for name in ("a.mp4", "in/b.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "videos" / name, numbered_frames(10))
    before = {path: path.read_bytes() for path in (tmp_path / "videos").rglob("*.mp4")}
    out = tmp_path / "videos" / "out"  # below the sources: not taken for one of them
    real = command.encode_video

    def interrupted(source, target, encoding):
        if source.name == "b.mp4":
            target.write_bytes(b"half")
            raise KeyboardInterrupt
        return real(source, target, encoding)

    monkeypatch.setattr(command, "encode_video", interrupted)
    assert run(tmp_path / "videos", "--out", out, *FLAGS) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert list(files(out)) == ["a.mp4", "prepare.json", SOURCES]
    finished = (out / "a.mp4").stat().st_mtime_ns
    (out / "in" / ".b.mp4.part").write_bytes(b"left by a kill")
    others = out / ".download.part"
    others.write_bytes(b"of another program")
    monkeypatch.setattr(command, "encode_video", real)
    assert run(tmp_path / "videos", "--out", out, *FLAGS) == 0
    assert capsys.readouterr().out == "1 video encoded, 1 there before, 0 failed\n"
    assert others.read_bytes() == b"of another program"
    others.unlink()
    assert list(files(out)) == ["a.mp4", "in/b.mp4", "prepare.json", SOURCES]
    assert (out / "a.mp4").stat().st_mtime_ns == finished
    assert {path: path.read_bytes() for path in before} == before
    assert run(tmp_path / "videos", "--out", out, *FLAGS[:-1], 3) == 0
    assert capsys.readouterr().out == "0 videos encoded, 2 there before, 0 failed\n"


def test_damaged_videos_are_named_and_counted_and_tried_again(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", numbered_frames(10))
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video" * 100)
    for _ in range(2):
        assert run(tmp_path / "videos", "--out", tmp_path / "out", *FLAGS) == 1
        first, title, reason, advice = capsys.readouterr().out.splitlines()
        assert first.endswith("1 failed")
        assert title == f"failed, and not in {tmp_path / 'out'}:"
        assert "bad.mp4: not readable as a video" in reason
        assert "the same command then encodes what is missing" in advice
    assert list(files(tmp_path / "out")) == ["a.mp4", "prepare.json", SOURCES]


def test_jumps_are_named_again_when_the_command_is_given_again(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mkv", numbered_frames(4), times=[0, 100, 30000, 30100])
    for _ in range(2):
        assert run(tmp_path / "videos", "--out", tmp_path / "out", *FLAGS) == 0
        _, title, jump, advice = capsys.readouterr().out.splitlines()
        assert title == "encoded in the order of the frames, because timestamps jump:"
        assert jump == f"  {tmp_path / 'videos' / 'a.mkv'}: at 0.20 s by +29.80 s"
        assert "segments after these times" in advice


def test_a_video_of_the_same_name_is_not_taken_for_the_one_that_is_there(tmp_path, capsys):
    for number in range(2):
        (tmp_path / f"day {number}").mkdir()
        write_video(tmp_path / f"day {number}" / "a.mp4", numbered_frames(4 + number))
    assert run(tmp_path / "day 0", "--out", tmp_path / "out", *FLAGS) == 0
    assert run(tmp_path / "day 1", "--out", tmp_path / "out", *FLAGS) == 1
    assert "day 0/a.mp4 would both be" in capsys.readouterr().err
    (tmp_path / "day 0").rename(tmp_path / "moved")  # the same file elsewhere is the same
    with (tmp_path / "out" / SOURCES).open("a") as file:
        file.write('{"video": "b.mp4", "sou')  # a kill in the middle
    assert run(tmp_path / "moved", "--out", tmp_path / "out", *FLAGS) == 0
    write_video(tmp_path / "moved" / "a.mp4", numbered_frames(9))
    (tmp_path / "moved").rename(tmp_path / "day 0")
    assert run(tmp_path / "day 0", "--out", tmp_path / "out", *FLAGS) == 1
    assert "has changed since" in capsys.readouterr().err
    (tmp_path / "out" / "a.mp4").unlink()
    for _ in range(2):  # the second finds what the first has written behind the line that was cut short
        assert run(tmp_path / "day 0", "--out", tmp_path / "out", *FLAGS) == 0


def test_what_cannot_be_done_is_told(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", numbered_frames(4))
    assert run(tmp_path / "videos", "--out", tmp_path / "out", *FLAGS) == 0
    for arguments, message in (
        ((tmp_path / "videos", "--out", tmp_path / "videos"), "is the folder of the videos, which are never written"),
        ((tmp_path / "nowhere", "--out", tmp_path / "o"), "Video folder"),
        ((tmp_path / "out" / "..", "--out", tmp_path / "out", "--fps", 12), "holds videos encoded as"),
        ((tmp_path / "videos", "--out", tmp_path / "o", "--fsp", 12), "Did you mean '--fps'"),
        ((tmp_path / "videos", "--out", tmp_path / "o", "--fps", "many"), "invalid Fraction value: 'many'"),
        ((tmp_path / "videos",), "--out"),
        ((tmp_path / "videos", "--out", tmp_path / "o", "--workers", 0), "--workers 0 must be at least 1"),
    ):
        capsys.readouterr()
        assert run(*arguments) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no video is there"):
        plan(tmp_path / "empty", tmp_path / "o")
    for name in ("a.avi", "a.mov", "a.avi.mkv"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(DataError, match=r"'a.avi' and 'a.avi.mkv' would both be 'a.avi.mp4': rename one"):
        plan(tmp_path / "empty", tmp_path / "o")


def test_two_runs_do_not_share_a_folder(tmp_path):
    with (
        command._claimed(tmp_path, ENCODING),
        pytest.raises(DataError, match=r"another preparation is at work there"),
        command._claimed(tmp_path, ENCODING),
    ):
        pass
    assert json.loads((tmp_path / "prepare.json").read_text())["short_side"] == 16


def test_a_video_whose_decoder_crashes_is_named_and_costs_no_other(tmp_path, monkeypatch):
    jobs = [Job(source=tmp_path / f"{n}.mp4", target=tmp_path / "out" / f"{n}.mp4") for n in "abcd"]
    (tmp_path / "out").mkdir()
    for job in jobs:
        job.source.touch()

    def crashing(jobs, encoding, workers, finish) -> bool:
        """A pool of two, in which c brings the decoder down."""
        for first, second in zip(jobs[::2], [*jobs[1::2], None], strict=False):
            for job in (first, second):
                if job is not None:
                    job.part.touch()
            if any(job is not None and job.source.stem == "c" for job in (first, second)):
                return True
            for job in (first, second):
                if job is not None:
                    job.part.replace(job.target)
        return False

    monkeypatch.setattr(command, "_encode_until_crash", crashing)
    failures = command._encode_all(jobs, ENCODING, 2, Record(tmp_path / "out"))
    assert failures == {jobs[2].source: f"{jobs[2].source}: the decoder crashed on it."}
    assert sorted(path.name for path in (tmp_path / "out").glob("[a-z]*")) == ["a.mp4", "b.mp4", "d.mp4"]


def test_processes_encode_and_end_with_the_command(tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", numbered_frames(4))
    long = numbered_frames(60, 512, 512, step=3)
    for name in ("b.mp4", "c.mp4"):
        write_video(tmp_path / "videos" / name, np.tile(long, (8, 1, 1, 1)))
    arguments = [sys.executable, "-m", "re2tal_jax.data.prepare", tmp_path / "videos", "--out", tmp_path / "out"]
    flags = ["--short-side", 512, "--fps", 240, "--workers", 2]
    process = subprocess.Popen(list(map(str, [*arguments, *flags])), stderr=subprocess.PIPE, text=True)
    out = tmp_path / "out"
    while not (out / "a.mp4").exists() or not list(out.glob(".*.part")):
        assert process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 130
    assert "interrupted; the same command goes on" in process.stderr.read()
    process.stderr.close()
    assert "a.mp4" in list(files(out))
    assert not list(out.glob(".*.part"))
    deadline = time.monotonic() + 60  # the helper that watches shared resources ends a moment after the rest
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
