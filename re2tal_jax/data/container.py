"""What a video says of itself: frames, rate, size, and when each frame is shown.

What cannot be read is a `DataError` that names the file; callers add the video id.
"""

import io
import os
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from jaxtyping import Float, Int

from re2tal_jax.data.video_source import Video, VideoBytes, VideoInfo, VideoSource, fetched
from re2tal_jax.errors import DataError


def probe(path: Video) -> VideoInfo:
    """Return frames, rate, duration and displayed size of a video file, from its header where that is enough.

    The frame count is the container's; formats that keep none are demuxed to count. A truncated file whose header is
    whole reports the frames it once had.

    Raises:
        DataError: the file is missing, empty, no video, audio only, or its header is damaged.
    """
    known = path.info() if isinstance(path, VideoSource) else None
    if known is not None:
        return known
    path = fetched(path)
    with open_video(path) as container:
        stream = container.streams.video[0]
        num_frames = stream.frames
        rate = stream.average_rate or stream.guessed_rate
        duration = _duration(container, stream)
        height, width = stream.height, stream.width
        if abs(_rotation(container, stream)) == 90:
            height, width = width, height
    if not num_frames:
        num_frames = len(read_index(path).pts)
    if not num_frames or not height or not width:
        raise DataError(f"{path}: the video stream holds no frames. Download or encode the file again.")
    if rate is None:
        rate = num_frames / duration if duration else 0.0
    if duration is None and rate:
        duration = num_frames / float(rate)
    if not rate or not duration:
        raise DataError(f"{path}: the file tells neither frame rate nor duration. Encode it again as mp4.")
    return VideoInfo(
        num_frames=num_frames, fps=float(rate), duration_sec=float(duration), height=int(height), width=int(width)
    )


def frame_times(path: Video) -> Float[np.ndarray, " F"]:
    """Return the second at which each frame comes on the screen, in order; exact for variable frame rates.

    Raises:
        DataError: as `probe`, or a format that stores no timestamps.
    """
    index = read_index(path)
    if not len(index.pts):
        raise DataError(f"{path}: the file stores no timestamps. Encode it again as mp4.")
    return index.pts * index.time_base - index.start_sec


def seconds_to_frames(seconds: Float[np.ndarray, "*N"], times_sec: Float[np.ndarray, " F"]) -> Int[np.ndarray, "*N"]:
    """Return the number of the frame that is on the screen at each time, given `frame_times`; clipped to the video."""
    return np.clip(np.searchsorted(times_sec, seconds, side="right") - 1, 0, len(times_sec) - 1)


def open_video(path: Video) -> InputContainer:
    """Open a file that has a video stream, for reading.

    Raises:
        DataError: the file is missing, empty, no video, audio only, or its header is damaged.
    """
    path = fetched(path)
    if isinstance(path, (str, Path)) and not Path(path).is_file():
        raise DataError(f"{path}: there is no such video file. Check the data set's video folder and file names.")
    if not (len(path.content) if isinstance(path, VideoBytes) else Path(path).stat().st_size):
        raise DataError(f"{path}: the video file is empty. Download it again.")
    file = io.BytesIO(path.content) if isinstance(path, VideoBytes) else os.path.abspath(path)
    try:
        container: InputContainer = av.open(file, mode="r")
    except (FFmpegError, OSError) as error:
        raise DataError(
            f"{path}: not readable as a video ({error.strerror}): truncated, damaged, or another kind of file. "
            "Download or encode it again."
        ) from error
    if not container.streams.video:
        container.close()
        raise DataError(f"{path}: the file holds no video stream (audio only?). Get the file with its video.")
    return container


class Index(NamedTuple):
    """When frames are shown: ticks in ascending order, numbers of key frames, seconds per tick, the file's start."""

    pts: Int[np.ndarray, " F"]
    key_frames: Int[np.ndarray, " K"]
    time_base: float
    start_sec: float

    def key_frame(self, number: int) -> int:
        """Return the last key frame at or before a frame, 0 where none is known."""
        place = int(np.searchsorted(self.key_frames, number, side="right"))
        return int(self.key_frames[place - 1]) if place else 0


def read_index(path: Video) -> Index:
    """Read the index of a video from its packets, up to a fault in the file; decodes nothing.

    Raises:
        DataError: as `open_video`.
    """
    pts, key_pts = [], []
    with open_video(path) as container:
        stream = container.streams.video[0]
        try:
            for packet in container.demux(stream):
                if packet.pts is not None and packet.size and not packet.is_discard:
                    pts.append(packet.pts)
                    if packet.is_keyframe:
                        key_pts.append(packet.pts)
        except FFmpegError:
            pass  # a truncated file: what lies before the fault counts
        start_sec = (container.start_time or 0) / av.time_base
        ticks = np.sort(np.asarray(pts, np.int64))
        keys = np.searchsorted(ticks, np.sort(np.asarray(key_pts, np.int64)))
        return Index(ticks, keys, float(stream.time_base or 1), start_sec)


def _rotation(container: InputContainer, stream: VideoStream) -> int:
    try:
        return next(container.decode(stream)).rotation
    except (FFmpegError, StopIteration):
        return 0


def _duration(container: InputContainer, stream: VideoStream) -> float | None:
    if stream.duration:
        return float(stream.duration * (stream.time_base or 1))
    return container.duration / av.time_base if container.duration else None
