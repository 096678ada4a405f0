"""Video files, or what stands for one, to uint8 frames: decord seeks those far apart, PyAV decodes all others.

Frames are resized while they are decoded, both readers by the same bilinear filter, so that their pixels are equal;
where decord has no wheel, PyAV reads everything.
A function opens the file for its call; an `OpenVideo` keeps it open, for one thread of the process that opened it: a
decord reader that is shared between threads or inherited by a forked process ends the process. What cannot be read is a
`DataError` that names the file; callers add the video id.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8

from re2tal_jax.data.container import probe
from re2tal_jax.data.decoding import InOrder
from re2tal_jax.data.video_source import Video, VideoBytes, VideoInfo, VideoSource, fetched
from re2tal_jax.errors import ConfigError, DataError

decord: Any = None
with suppress(ImportError):  # there are wheels for x86-64 Linux and Windows alone
    decord = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)  # its lines would go to stderr beside our own errors

Crop = Literal["squeeze", "center"]
Reader = Literal["auto", "decord", "pyav"]

SPARSE = 8
"""Frames that are, on average, this far apart or farther are sought one by one, others decoded with what is between."""


def read_frames(
    path: Video,
    frame_indices: Sequence[int] | Int[np.ndarray, " F"],
    height: int,
    width: int,
    *,
    crop: Crop = "squeeze",
    reader: Reader = "auto",
    info: VideoInfo | None = None,
) -> UInt8[np.ndarray, "F H W 3"]:
    """Return frames of a video that is opened for this call; see `OpenVideo`, whose arguments and errors they are."""
    with OpenVideo(path, info=info) as video:
        return video.frames(frame_indices, height, width, crop=crop, reader=reader)


class OpenVideo:
    """A video that one thread reads from again and again; a context that closes it.

    Its index is read once, at the first frames: of the windows of a long video each then costs what its own frames
    cost. A window that begins where the last one ended is decoded on from there, for another PyAV opens the file again.

    Attributes:
        info: what `probe` tells.
    """

    def __init__(self, path: Video, *, info: VideoInfo | None = None):
        """Probe the video, unless `info` is given, which `probe` returned for it.

        Raises:
            DataError: as `probe`.
        """
        known = path.info() if isinstance(path, VideoSource) else None
        self._video = fetched(path)
        self.info = info or known or probe(self._video)
        self._opened = ExitStack()
        self._decord: tuple[tuple[int, int], Any] | None = None
        self._in_order: InOrder | None = None
        self._decord_fails = False

    def __enter__(self) -> "OpenVideo":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the next frames would open it again."""
        self._close_decord()
        if self._in_order is not None:
            self._in_order.close()

    def frames(
        self,
        frame_indices: Sequence[int] | Int[np.ndarray, " F"],
        height: int,
        width: int,
        *,
        crop: Crop = "squeeze",
        reader: Reader = "auto",
    ) -> UInt8[np.ndarray, "F H W 3"]:
        """Return the frames of these numbers (from 0, in any order, repeats allowed) as RGB of one size.

        Each different frame is decoded once. `squeeze` scales to (height, width) whatever the source's proportions;
        `center` keeps them: the source is scaled until it just covers (height, width), and the centre is cut out.

        A file that is truncated or damaged in the middle gives the frames before the fault (through PyAV); asking for
        later ones is an error, except that up to `decoding.TAIL_FRAMES` at a video's end repeat the last frame that
        can be decoded.

        Args:
            frame_indices, height, width, crop: see above.
            reader: `auto` is decord, which seeks quickly, for frames far apart, and PyAV, which decodes on, for those
                close together and where decord fails or is not installed; the other two are for tests and benchmarks.

        Raises:
            ConfigError: an unknown crop, or decord by name where it is not installed.
            DataError: a frame number outside the video; frames that cannot be decoded.
        """
        if crop not in ("squeeze", "center"):
            raise ConfigError(f"crop = {crop!r} is not allowed. Allowed: 'squeeze', 'center'.")
        count, indices = self.info.num_frames, np.asarray(frame_indices, np.int64)
        if indices.ndim != 1 or not indices.size or indices.min() < 0 or indices.max() >= count:
            span = f"{indices.min()}..{indices.max()}" if indices.size else "none"
            raise DataError(
                f"{self._video}: asked for frames {span}, but the video has {count} (0..{count - 1}). "
                "Sample with the frame count of the file (data.container.probe), not of the annotation."
            )
        unique, inverse = np.unique(indices, return_inverse=True)
        size = (height, width) if crop == "squeeze" else _covering_size(self.info, height, width)
        frames = self._read(unique, size, reader)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        frames = frames[:, top : top + height, left : left + width]
        in_order = len(unique) == len(indices) and np.array_equal(unique, indices)
        return np.ascontiguousarray(frames) if in_order else frames[inverse]

    def _close_decord(self) -> None:
        self._decord = None
        self._opened.close()

    def _read(self, unique: Int[np.ndarray, " F"], size: tuple[int, int], reader: Reader) -> np.ndarray:
        if reader == "decord" and decord is None:
            raise ConfigError(
                "reader = 'decord', but decord is not installed (it has wheels for x86-64 Linux and Windows alone). "
                "Choose 'auto' or 'pyav', which give the same pixels."
            )
        sparse = len(unique) > 1 and unique[-1] - unique[0] >= SPARSE * (len(unique) - 1)
        if reader == "decord" or (reader == "auto" and sparse and decord is not None and not self._decord_fails):
            try:
                return self._read_decord(unique, size)
            except (
                decord.DECORDError,
                RuntimeError,
                IndexError,
                UnicodeEncodeError,  # a path that is no UTF-8
            ):  # also raised for frames that are 8, 12, 16, 24, 48 or 72 wide
                self._close_decord()
                if reader == "decord":
                    raise
                self._decord_fails = True
        if self._in_order is None:
            self._in_order = InOrder(self._video, self.info.num_frames)
        return self._in_order.frames(unique, size)

    def _read_decord(self, unique: Int[np.ndarray, " F"], size: tuple[int, int]) -> np.ndarray:
        if self._decord is None or self._decord[0] != size:
            self._close_decord()
            name = self._opened.enter_context(_named(self._video))
            # One thread: more did not help, loading is parallel over processes.
            self._decord = size, decord.VideoReader(name, height=size[0], width=size[1], num_threads=1)
        video = self._decord[1]
        if unique[-1] >= len(video):
            raise IndexError(f"decord counts {len(video)} frames in {self._video}")
        return video.get_batch(unique).asnumpy()


def source_size(info: VideoInfo, height: int, width: int, crop: Crop) -> tuple[float, float]:
    """Return (height, width), in source pixels, of the part of the picture that `read_frames` shows."""
    if crop == "squeeze":
        return float(info.height), float(info.width)
    scale = max(height / info.height, width / info.width)
    return height / scale, width / scale


@contextmanager
def _named(path: str | Path | VideoBytes) -> Iterator[str]:
    """Yield the name of a video's file; for bytes, of one in memory that is gone afterwards.

    decord takes bytes, too, but holds them in a reference cycle: gigabytes, until garbage happens to be collected.
    """
    if not isinstance(path, VideoBytes):
        yield os.path.abspath(path)  # "12:30 clip.mp4" by itself would be a protocol to ffmpeg
        return
    if not hasattr(os, "memfd_create"):
        raise RuntimeError("only Linux has files in memory")  # PyAV takes over
    with open(os.memfd_create("video"), "wb") as file:
        file.write(path.content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _covering_size(info: VideoInfo, height: int, width: int) -> tuple[int, int]:
    """Return the size to which the source scales, proportions kept, so that it just covers (height, width)."""
    scale = max(height / info.height, width / info.width)
    return max(height, round(info.height * scale)), max(width, round(info.width * scale))
