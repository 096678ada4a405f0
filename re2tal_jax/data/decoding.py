"""Frames of a video by PyAV, in their order, scaled and turned as decord does it, so that pixels are equal."""

import itertools
from collections.abc import Iterator

import av
import av.filter
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from jaxtyping import Int, UInt8

from re2tal_jax.data.container import open_video, read_index
from re2tal_jax.data.video_source import Video
from re2tal_jax.errors import DataError

TAIL_FRAMES = 16
"""Containers may count some frames more than can be decoded: so many at the end are replaced by the last good one."""

TRANSPOSE = {0: (), 90: ("2",), -90: ("1",), 180: ("1", "1"), -180: ("1", "1")}
"""Display rotation in degrees, counter-clockwise, to arguments of ffmpeg's transpose filter."""


class InOrder:
    """Frames of a video by PyAV in their order, on from where the last ones ended where that is the shorter way.

    Its index is read once, when it is made; `num_frames` is what `container.probe` tells.

    Raises:
        DataError: as `container.open_video`.
    """

    def __init__(self, path: Video, num_frames: int):
        self._path, self._num_frames = path, num_frames
        self._container: InputContainer | None = None
        self._decoding: Iterator[tuple[int, av.VideoFrame]] = iter(())
        self._last = -1
        self._index = read_index(path)

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
