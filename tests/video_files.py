"""Small video files made on the fly, good and bad, for the tests of reading and loading."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from re2tal_jax.data import video

needs_decord = pytest.mark.skipif(
    video.decord is None, reason="no decord: there are wheels of it for x86-64 Linux and Windows alone"
)
READERS = (pytest.param("decord", marks=needs_decord), "pyav")


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    fps: int = 10,
    times: Sequence[int] | None = None,
    key_frames: int = 12,
    options: dict[str, str] | None = None,
) -> Path:
    """Write RGB frames (F, H, W, 3) as H.264; `times` are presentation times in milliseconds."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "10"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.gop_size = key_frames
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered_frames(count: int, height: int = 32, width: int = 32, step: int = 4) -> np.ndarray:
    """Return grey frames; frame i has the level 16 + step * i."""
    levels = 16 + step * np.arange(count)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


def frame_numbers(frames: np.ndarray, step: int = 4) -> list[int]:
    """Return which `numbered_frames` these are, whatever their size; coding darkens them by one or two levels."""
    return np.rint((frames.mean(axis=(-3, -2, -1)) - 14.5) / step).astype(int).tolist()


def write_audio(path: Path) -> Path:
    """Write half a second of silence, without video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for _ in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rotate(path: Path, degrees: int, source: Path) -> Path:
    """Write a copy of an mp4 whose header asks players to turn it clockwise by 90, 180 or 270 degrees."""
    content = bytearray(source.read_bytes())
    matrix = content.find(b"tkhd") + 8 + 20 + 8 + 8
    turn = {90: (0, 1, 0, -1, 0, 0, 0, 0), 180: (-1, 0, 0, 0, -1, 0, 0, 0), 270: (0, -1, 0, 1, 0, 0, 0, 0)}[degrees]
    content[matrix : matrix + 36] = struct.pack(">9i", *(65536 * value for value in turn), 1 << 30)
    path.write_bytes(content)
    return path
