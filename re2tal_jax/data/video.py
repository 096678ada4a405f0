"""Video files, or what stands for one, to uint8 frames: decord seeks those far apart, PyAV decodes all others.

Frames are resized while they are decoded, both readers by the same bilinear filter, so that their pixels are equal;
where decord has no wheel, PyAV reads everything.
A function opens the file for its call; an `OpenVideo` keeps it open, for one thread of the process that opened it: a
decord reader that is shared between threads or inherited by a forked process ends the process. What cannot be read is a
`DataError` that names the file; callers add the video id.
"""

import importlib
import io
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import av.filter
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from jaxtyping import Float, Int, UInt8

from re2tal_jax.errors import ConfigError, DataError

decord: Any = None
with suppress(ImportError):  # there are wheels for x86-64 Linux and Windows alone
    decord = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)  # its lines would go to stderr beside our own errors

Crop = Literal["squeeze", "center"]
Reader = Literal["auto", "decord", "pyav"]

TAIL_FRAMES = 16
"""Containers may count some frames more than can be decoded: so many at the end are replaced by the last good one."""

SPARSE = 8
"""Frames that are, on average, this far apart or farther are sought one by one, others decoded with what is between."""

TRANSPOSE = {0: (), 90: ("2",), -90: ("1",), 180: ("1", "1"), -180: ("1", "1")}
"""Display rotation in degrees, counter-clockwise, to arguments of ffmpeg's transpose filter."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a file says about its video: frames, mean frames per second, seconds, and pixels as displayed (rotated)."""

    num_frames: int
    fps: float
    duration_sec: float
    height: int
    width: int


class VideoSource(ABC):
    """A video that is no file of its own, such as a record of an archive; its `str` is what errors call it.

    Instances are small and travel to other processes; what they read from is opened in the process that reads.
    """

    @abstractmethod
    def info(self) -> VideoInfo | None:
        """Return what `probe` would say, where that is known without reading, else None."""

    @property
    @abstractmethod
    def kept_in(self) -> Path:
        """A file that changes when the video does."""

    @abstractmethod
    def read(self) -> bytes:
        """Return the video as its file would have it.

        Raises:
            DataError: it cannot be read.
        """


@dataclass(frozen=True)
class VideoBytes:
    """A video in memory; `name` is what errors call it."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


Video = str | Path | VideoSource | VideoBytes
"""What is read: a file, or what stands for one."""


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
    path = _fetched(path)
    with open_video(path) as container:
        stream = container.streams.video[0]
        num_frames = stream.frames
        rate = stream.average_rate or stream.guessed_rate
        duration = _duration(container, stream)
        height, width = stream.height, stream.width
        if abs(_rotation(container, stream)) == 90:
            height, width = width, height
    if not num_frames:
        num_frames = len(_index(path).pts)
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
        self._video = _fetched(path)
        self.info = info or known or probe(self._video)
        self._opened = ExitStack()
        self._decord: tuple[tuple[int, int], Any] | None = None
        self._in_order: _InOrder | None = None
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
        later ones is an error, except that up to `TAIL_FRAMES` at a video's end repeat the last frame that can be
        decoded.

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
                "Sample with the frame count of the file (video.probe), not of the annotation."
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
            self._in_order = _InOrder(self._video, self.info.num_frames)
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


def frame_times(path: Video) -> Float[np.ndarray, " F"]:
    """Return the second at which each frame comes on the screen, in order; exact for variable frame rates.

    Raises:
        DataError: as `probe`, or a format that stores no timestamps.
    """
    index = _index(path)
    if not len(index.pts):
        raise DataError(f"{path}: the file stores no timestamps. Encode it again as mp4.")
    return index.pts * index.time_base - index.start_sec


def seconds_to_frames(seconds: Float[np.ndarray, "*N"], times_sec: Float[np.ndarray, " F"]) -> Int[np.ndarray, "*N"]:
    """Return the number of the frame that is on the screen at each time, given `frame_times`; clipped to the video."""
    return np.clip(np.searchsorted(times_sec, seconds, side="right") - 1, 0, len(times_sec) - 1)


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


class _InOrder:
    """Frames of a video by PyAV in their order, on from where the last ones ended where that is the shorter way."""

    def __init__(self, path: Video, num_frames: int):
        self._path, self._num_frames = path, num_frames
        self._container: InputContainer | None = None
        self._decoding: Iterator[tuple[int, av.VideoFrame]] = iter(())
        self._last = -1
        self._index = _index(path)

    def close(self) -> None:
        """Close the file; the next frames open it again."""
        self._decoding, self._last = iter(()), -1
        if self._container is not None:
            self._container.close()
        self._container = None

    def __del__(self) -> None:
        self.close()  # a thread that ends drops its video; PyAV's reference cycles would keep the file open

    def frames(self, unique: Int[np.ndarray, " F"], size: tuple[int, int]) -> UInt8[np.ndarray, "F H W 3"]:
        """Return the frames of these numbers, which ascend, scaled to (height, width).

        Raises:
            DataError: some cannot be decoded, and are not the last few of the video.
        """
        first, wanted, found = int(unique[0]), set(unique.tolist()), {}
        goes_on = self._container is not None and self._index.key_frame(first) - 1 <= self._last < first
        stream = self._stream(None if goes_on else first)
        frame, convert = None, None
        for number, frame in self._decoding:
            self._last = number
            if number in wanted and number not in found:
                convert = convert or _Converter(stream, frame, size)
                found[number] = convert(frame)
            if number >= unique[-1]:
                break
        missing, last = sorted(wanted - found.keys()), self._last
        if missing and goes_on:
            self.close()
            return self.frames(unique, size)  # from a key frame on
        if missing and (frame is None or missing[0] < last or self._num_frames - 1 - last > TAIL_FRAMES):
            raise DataError(
                f"{self._path}: frames {missing[0]}..{missing[-1]} cannot be decoded, the last good one is {last}: the "
                "file is truncated or damaged. Download or encode it again, or leave it out."
            )
        if missing and frame is not None and last not in found:
            found[last] = (convert or _Converter(stream, frame, size))(frame)
        return np.stack([found[min(n, last)] for n in unique.tolist()])

    def _stream(self, first: int | None) -> VideoStream:
        """Return the stream that is being decoded, from a key frame at or before frame `first` on if one is given."""
        if first is not None or self._container is None:
            self.close()
            self._container = open_video(self._path)
        stream = self._container.streams.video[0]
        if first is not None:
            stream.codec_context.thread_count = 1  # loading is parallel over windows
            if first and first < len(self._index.pts):
                self._container.seek(int(self._index.pts[first]), stream=stream, backward=True)
            self._decoding = _numbered(self._container, stream, self._index.pts)
        return stream


def _numbered(
    container: InputContainer, stream: VideoStream, pts: Int[np.ndarray, " F"]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (number, frame) until the end or the first fault."""
    count = -1
    try:
        for frame in container.decode(stream):
            timed = len(pts) and frame.pts is not None
            count = int(np.searchsorted(pts, np.int64(frame.pts or 0))) if timed else count + 1
            yield count, frame
    except FFmpegError:
        return


class _Converter:
    """Rotate, scale and convert decoded frames by the filters (and flags) that decord uses."""

    def __init__(self, stream: VideoStream, frame: av.VideoFrame, size: tuple[int, int]):
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base
        )
        nodes = [source]
        nodes += [graph.add("transpose", turn) for turn in TRANSPOSE.get(frame.rotation, ())]
        nodes.append(graph.add("scale", f"{size[1]}:{size[0]}:flags=bilinear"))
        nodes.append(graph.add("format", "pix_fmts=rgb24"))
        nodes.append(graph.add("buffersink"))
        for before, after in itertools.pairwise(nodes):
            before.link_to(after)
        graph.configure()
        self._graph = graph

    def __call__(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
        self._graph.push(frame)
        return self._graph.pull().to_ndarray()


def open_video(path: Video) -> InputContainer:
    """Open a file that has a video stream, for reading.

    Raises:
        DataError: the file is missing, empty, no video, audio only, or its header is damaged.
    """
    path = _fetched(path)
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


def _fetched(path: Video) -> str | Path | VideoBytes:
    """Return the video with its bytes in memory, unless it is a file."""
    return VideoBytes(str(path), path.read()) if isinstance(path, VideoSource) else path


def _rotation(container: InputContainer, stream: VideoStream) -> int:
    try:
        return next(container.decode(stream)).rotation
    except (FFmpegError, StopIteration):
        return 0


def _duration(container: InputContainer, stream: VideoStream) -> float | None:
    if stream.duration:
        return float(stream.duration * (stream.time_base or 1))
    return container.duration / av.time_base if container.duration else None


class _Index(NamedTuple):
    """When frames are shown: ticks in ascending order, numbers of key frames, seconds per tick, the file's start."""

    pts: Int[np.ndarray, " F"]
    key_frames: Int[np.ndarray, " K"]
    time_base: float
    start_sec: float

    def key_frame(self, number: int) -> int:
        """Return the last key frame at or before a frame, 0 where none is known."""
        place = int(np.searchsorted(self.key_frames, number, side="right"))
        return int(self.key_frames[place - 1]) if place else 0


def _index(path: Video) -> _Index:
    """Read the index of a video from its packets; decodes nothing."""
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
        return _Index(ticks, keys, float(stream.time_base or 1), start_sec)


def _covering_size(info: VideoInfo, height: int, width: int) -> tuple[int, int]:
    """Return the size to which the source scales, proportions kept, so that it just covers (height, width)."""
    scale = max(height / info.height, width / info.width)
    return max(height, round(info.height * scale)), max(width, round(info.width * scale))
