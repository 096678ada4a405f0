import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from re2tal_jax.data import decoding, video
from re2tal_jax.data.container import probe
from re2tal_jax.data.video import OpenVideo, read_frames, source_size
from re2tal_jax.errors import ConfigError, DataError
from tests.video_files import (
    READERS,
    frame_numbers,
    needs_decord,
    numbered_frames,
    rotate,
    write_audio,
    write_video,
)

decord = video.decord

FAST_START = {"movflags": "faststart"}  # header first, so that a truncated file still opens


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """48 frames at 10 fps, frame i of grey level 16 + 4 i, header first."""
    return write_video(
        tmp_path_factory.mktemp("videos") / "numbered.mp4", numbered_frames(48, 32, 48), options=FAST_START
    )


@pytest.fixture(scope="module")
def thirds(tmp_path_factory):
    """A picture twice as wide as high: red quarter, green half, blue quarter."""
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, :32, 0] = picture[:, 32:96, 1] = picture[:, 96:, 2] = 200
    return write_video(tmp_path_factory.mktemp("videos") / "thirds.mp4", np.repeat(picture[None], 4, axis=0))


@needs_decord
@pytest.mark.parametrize("crop", ["squeeze", "center"])
def test_both_readers_give_equal_pixels(data_dir, crop):
    path, indices = data_dir / "videos" / "test.mp4", [299, 3, 150, 3, 151, 0]
    by_decord = read_frames(path, indices, 96, 64, crop=crop, reader="decord")
    by_pyav = read_frames(path, indices, 96, 64, crop=crop, reader="pyav")
    assert by_decord.shape == (6, 96, 64, 3)
    assert by_decord.dtype == np.uint8
    np.testing.assert_array_equal(by_decord, by_pyav)


@needs_decord
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_both_readers_turn_a_rotated_video(tmp_path, thirds, degrees):
    path = rotate(tmp_path / "turned.mp4", degrees, thirds)
    info = probe(path)
    assert (info.height, info.width) == ((64, 128) if degrees == 180 else (128, 64))
    upright = read_frames(thirds, [0], 64, 128)[0]
    frames = [read_frames(path, [0], info.height, info.width, reader=r)[0] for r in ("decord", "pyav")]
    np.testing.assert_array_equal(*frames)
    difference = frames[0].astype(int) - np.rot90(upright, -degrees // 90)
    assert np.abs(difference).mean() < 3  # chroma samples sit elsewhere in a turned picture


@pytest.mark.parametrize("reader", READERS)
def test_frames_come_in_the_order_asked_for(numbered, reader):
    frames = read_frames(numbered, [5, 2, 2, 40, 0, 47], 32, 32, reader=reader)
    assert frame_numbers(frames) == [5, 2, 2, 40, 0, 47]


@needs_decord
def test_each_different_frame_is_decoded_once(numbered, monkeypatch):
    asked, read = [], decord.VideoReader.get_batch
    monkeypatch.setattr(decord.VideoReader, "get_batch", lambda self, these: asked.append(these) or read(self, these))
    read_frames(numbered, [7, 7, 3, 7, 3], 32, 32, reader="decord")
    assert [these.tolist() for these in asked] == [[3, 7]]
    converted, convert = [], decoding._Converter.__call__
    monkeypatch.setattr(
        decoding._Converter, "__call__", lambda self, frame: converted.append(1) or convert(self, frame)
    )
    read_frames(numbered, [7, 7, 3, 7, 3], 32, 32, reader="pyav")
    assert len(converted) == 2


@needs_decord
def test_frames_far_apart_are_sought_and_others_decoded_on(numbered, monkeypatch):
    asked, read = [], decord.VideoReader.get_batch
    monkeypatch.setattr(decord.VideoReader, "get_batch", lambda self, these: asked.append(these) or read(self, these))
    for frames in ([5], [0, 7], [0, 3, 15], [0, 8], [0, 3, 16], list(range(0, 48, 4))):
        assert frame_numbers(read_frames(numbered, frames, 32, 32)) == frames
    assert [these.tolist() for these in asked] == [[0, 8], [0, 3, 16]]


@pytest.mark.parametrize("reader", READERS)
def test_an_open_video_is_read_on_and_back_and_its_index_once(data_dir, monkeypatch, reader):
    path, indexed = data_dir / "videos" / "test.mp4", []
    for owner, name in (*([(decord, "VideoReader")] if decord else []), (decoding, "read_index")):
        read = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, read=read, **how: indexed.append(a) or read(*a, **how))
    with OpenVideo(path) as opened:
        assert opened.info == probe(path)
        parts = [
            opened.frames(range(*part), 64, 64, reader=reader) for part in ((0, 40, 2), (40, 90), (20, 60), (0, 9))
        ]
    assert len(indexed) == 1
    monkeypatch.undo()
    every = read_frames(path, range(90), 64, 64)
    for part, frames in zip((every[0:40:2], every[40:90], every[20:60], every[:9]), parts, strict=True):
        np.testing.assert_array_equal(frames, part)


@needs_decord
def test_an_open_video_goes_on_with_pyav_from_where_decord_fails(numbered, monkeypatch):
    opened, reader = [], decord.VideoReader
    monkeypatch.setattr(decord, "VideoReader", lambda *a, **how: opened.append(a) or reader(*a, **how))
    with OpenVideo(numbered) as there:
        assert frame_numbers(there.frames([1, 40], 16, 16)) == [1, 40]  # decord hands over no frames 16 wide
        assert frame_numbers(there.frames([47, 8], 16, 16)) == [47, 8]
    assert len(opened) == 1


def test_squeeze_shows_all_and_center_keeps_proportions(thirds):
    squeezed = read_frames(thirds, [0], 32, 32)[0].astype(int)
    assert squeezed[16, [2, 16, 29]].argmax(-1).tolist() == [0, 1, 2]
    centred = read_frames(thirds, [0], 32, 32, crop="center")[0].astype(int)
    assert (centred[:, 2:-2].argmax(-1) == 1).all()
    info = probe(thirds)
    assert source_size(info, 32, 32, "squeeze") == (64, 128)
    assert source_size(info, 32, 32, "center") == (64, 64)
    assert source_size(info, 16, 64, "center") == (32, 128)


def bad_files(folder, good):
    content = good.read_bytes()
    header_last = write_video(folder / "whole.mp4", numbered_frames(24)).read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video at all\n" * 99)
    (folder / "headless.mp4").write_bytes(header_last[: len(header_last) // 2])
    (folder / "damaged.mp4").write_bytes(content[:40] + bytes(200) + content[240:])
    write_audio(folder / "audio.mp4")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.mp4", "no such video file"),
        ("empty.mp4", "is empty"),
        ("text.mp4", "not readable as a video"),
        ("headless.mp4", "not readable as a video"),
        ("damaged.mp4", "not readable|no video stream|no frames"),
        ("audio.mp4", "holds no video stream"),
    ],
)
def test_what_is_no_video_is_named_with_its_reason(tmp_path, numbered, name, reason):
    bad_files(tmp_path, numbered)
    for read in (probe, lambda path: read_frames(path, [0], 16, 16)):
        with pytest.raises(DataError, match=reason) as raised:
            read(tmp_path / name)
        assert name in str(raised.value)


def truncated(path, whole, share):
    content = whole.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def test_a_truncated_video_gives_the_frames_before_the_fault(tmp_path, data_dir):
    path = tmp_path / "truncated.mp4"
    whole = tmp_path / "whole.mp4"
    with av.open(str(data_dir / "videos" / "test.mp4")) as source, av.open(str(whole), "w", options=FAST_START) as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                sink.mux(packet)
    truncated(path, whole, 0.5)
    assert probe(path).num_frames == 300
    np.testing.assert_array_equal(
        read_frames(path, range(0, 80, 9), 32, 32), read_frames(whole, range(0, 80, 9), 32, 32)
    )
    with pytest.raises(
        DataError, match=r"truncated.mp4: frames 280..290 cannot be decoded, the last good one is 1\d\d"
    ):
        read_frames(path, [20, 280, 290], 32, 32)
    if decord:
        with pytest.raises((decord.DECORDError, RuntimeError)):
            read_frames(path, [20, 280, 290], 32, 32, reader="decord")


def test_a_few_missing_frames_at_the_end_repeat_the_last_good_one(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)  # frames of about equal size in bytes
    whole = write_video(tmp_path / "whole.mp4", noise, options=FAST_START)
    short = truncated(tmp_path / "short.mp4", whole, 0.9)
    frames = read_frames(short, range(48), 16, 16)
    np.testing.assert_array_equal(frames[:40], read_frames(whole, range(40), 16, 16))
    repeats = int((frames[1:] == frames[:-1]).all(axis=(1, 2, 3)).sum())
    assert 1 <= repeats <= decoding.TAIL_FRAMES
    np.testing.assert_array_equal(frames[47 - repeats], read_frames(whole, [47 - repeats], 16, 16)[0])
    np.testing.assert_array_equal(
        read_frames(short, [0, 47], 16, 16), frames[[0, 47]]
    )  # the last good, not the last read


@needs_decord
def test_widths_that_decord_cannot_hand_over_are_read_all_the_same(numbered):
    with pytest.raises(decord.DECORDError):
        read_frames(numbered, [1, 9], 16, 16, reader="decord")
    assert frame_numbers(read_frames(numbered, [1, 9], 16, 16)) == [1, 9]


def test_without_decord_pyav_reads_all(numbered):
    code = f"""
import sys
sys.modules["decord"] = None  # as where it is not installed
from re2tal_jax.data.video import read_frames
from re2tal_jax.errors import ConfigError
from tests.video_files import frame_numbers
print(frame_numbers(read_frames({str(numbered)!r}, [0, 16, 40], 32, 32)))
try:
    read_frames({str(numbered)!r}, [0], 32, 32, reader="decord")
except ConfigError as error:
    print(error)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers, error = done.stdout.splitlines()
    assert numbers == "[0, 16, 40]"
    assert error.startswith("reader = 'decord', but decord is not installed")


@pytest.mark.parametrize("indices", [[48], [-1, 3], []])
def test_frames_outside_the_video_are_an_error(numbered, indices):
    with pytest.raises(DataError, match=r"numbered.mp4: asked for frames .* has 48 \(0..47\)"):
        read_frames(numbered, indices, 16, 16)


def test_an_unknown_crop_is_an_error(numbered):
    with pytest.raises(ConfigError, match="crop = 'middle'"):
        read_frames(numbered, [0], 16, 16, crop="middle")
