"""Finished videos of a prediction: what counts as one, for whom, and who may write."""

import numpy as np
import pytest

from re2tal_jax.errors import CheckpointError, DataError
from re2tal_jax.inference.finished import NAME, Finished, FinishedVideos
from re2tal_jax.types import Detections

NOTHING = Detections(segments_sec=np.zeros((0, 2)), labels=(), scores=np.zeros(0))


def test_a_video_partly_unreadable_is_kept_and_tried_again(tmp_path):
    (tmp_path / "a.mp4").write_text("x")
    with FinishedVideos(tmp_path, {"key": (1, 2)}) as finished:
        finished.add("a", tmp_path / "a.mp4", Finished(1.5, 2, NOTHING))
        assert not finished.holds("a", tmp_path / "a.mp4")
        assert finished.read("a").duration_sec == 1.5
        finished.add("a", tmp_path / "a.mp4", Finished(1.5, 0, NOTHING))
    with FinishedVideos(tmp_path, {"key": [1, 2]}) as finished:
        assert finished.holds("a", tmp_path / "a.mp4")
        (tmp_path / "a.mp4").unlink()
        assert not finished.holds("a", tmp_path / "a.mp4")


def test_a_prediction_that_holds_no_video_binds_no_later_one(tmp_path):
    (tmp_path / "a.mp4").write_text("x")
    with FinishedVideos(tmp_path, {"batch": 8}):
        pass
    with FinishedVideos(tmp_path, {"batch": 4}, writes=False) as other:
        assert not other.holds("a", tmp_path / "a.mp4")
    with FinishedVideos(tmp_path, {"batch": 4}) as finished:
        finished.add("a", tmp_path / "a.mp4", Finished(1.5, 0, NOTHING))
    for writes in (True, False):
        with pytest.raises(CheckpointError, match="batch: 4 there, 8 now"):
            FinishedVideos(tmp_path, {"batch": 8}, writes=writes)
    with FinishedVideos(tmp_path, {"batch": 4}) as finished:
        assert finished.holds("a", tmp_path / "a.mp4")


def test_a_video_whose_record_was_corrected_is_not_finished(tmp_path):
    (tmp_path / "a.mp4").write_text("x")
    with FinishedVideos(tmp_path, {}) as finished:
        finished.add("a", tmp_path / "a.mp4", Finished(1.5, 0, NOTHING), (1.5, None, 45))
    with FinishedVideos(tmp_path, {}) as finished:
        assert finished.holds("a", tmp_path / "a.mp4", (1.5, None, 45))
        assert not finished.holds("a", tmp_path / "a.mp4", (1.6, None, 45))


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    with FinishedVideos(tmp_path, {}):
        before = (tmp_path / NAME).read_bytes()
        for overwrite in (False, True):
            with pytest.raises(DataError, match="another prediction is at work there"):
                FinishedVideos(tmp_path, {}, overwrite=overwrite)
        assert (tmp_path / NAME).read_bytes() == before
    with FinishedVideos(tmp_path, {}):
        pass
