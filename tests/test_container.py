import av
import numpy as np

from re2tal_jax.data.container import frame_times, probe, seconds_to_frames
from tests.video_files import numbered_frames, write_video


def test_probe_tells_frames_rate_duration_and_size(tmp_path):
    info = probe(write_video(tmp_path / "numbered.mp4", numbered_frames(48, 32, 48)))
    assert (info.num_frames, info.fps, info.duration_sec) == (48, 10.0, 4.8)
    assert (info.height, info.width) == (32, 48)


def test_probe_of_a_real_video(data_dir):
    info = probe(data_dir / "videos" / "test.mp4")
    assert (info.num_frames, info.fps, info.duration_sec, info.height, info.width) == (300, 30.0, 10.0, 256, 340)


def test_probe_counts_frames_where_the_container_does_not(tmp_path):
    path = write_video(tmp_path / "a.mkv", numbered_frames(20))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert probe(path).num_frames == 20


def test_seconds_find_their_frame_at_a_variable_rate(tmp_path):
    times = [0, 100, 200, 1000, 1100, 3000]
    path = write_video(tmp_path / "variable.mp4", numbered_frames(6), times=times)
    seconds = frame_times(path)
    np.testing.assert_allclose(seconds, np.array(times) / 1000, atol=1e-3)
    at = np.array([-1.0, 0.05, 0.15, 0.99, 1.01, 2.9, 3.0, 99.0])
    assert seconds_to_frames(at, seconds).tolist() == [0, 0, 1, 2, 3, 4, 5, 5]
