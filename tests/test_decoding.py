import gc

import numpy as np
import psutil
import pytest

from re2tal_jax.data.container import open_video
from re2tal_jax.data.decoding import InOrder
from tests.video_files import frame_numbers, numbered_frames, write_video


@pytest.fixture
def numbered(tmp_path):
    """48 frames, frame i of grey level 16 + 4 i."""
    return write_video(tmp_path / "numbered.mp4", numbered_frames(48, 32, 48))


def opened(path):
    return [file.path for file in psutil.Process().open_files() if file.path == str(path)]


def test_a_video_that_is_dropped_is_closed_at_once(numbered):
    """Also without the garbage collector, which may not come for long."""
    gc.disable()
    try:
        frames = InOrder(numbered, 48)
        assert frame_numbers(frames.frames(np.array([3, 7]), (32, 32))) == [3, 7]
        assert opened(numbered) == [str(numbered)]
        del frames
        assert opened(numbered) == []
    finally:
        gc.enable()


def test_frames_go_on_from_where_the_last_ones_ended(numbered, monkeypatch):
    times, open_once = [], open_video
    monkeypatch.setattr("re2tal_jax.data.decoding.open_video", lambda path: times.append(path) or open_once(path))
    frames = InOrder(numbered, 48)
    for wanted in ([0, 5], [6, 7], [8]):
        assert frame_numbers(frames.frames(np.array(wanted), (32, 32))) == wanted
    assert len(times) == 1
    assert frame_numbers(frames.frames(np.array([2]), (32, 32))) == [2]
    assert len(times) == 2
    frames.close()
    assert opened(numbered) == []
