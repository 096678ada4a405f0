"""One video encoded again so that it is quick to read: short side, constant frame rate, key frames close together.

H.264, yuv420p, mp4, without sound, turned as it is displayed, pixels square, never enlarged. The picture at each time
stays within half a frame of what a player shows, from the start of the file on, so annotations in seconds hold; unless
the file's timestamps jump, which is told.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import av.filter
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.video.frame import PictureType
from av.video.stream import VideoStream

from re2tal_jax.data.container import open_video
from re2tal_jax.data.decoding import TRANSPOSE
from re2tal_jax.errors import ConfigError, DataError

CRF = 23
"""Quality by x264's scale."""

LOST_SEC = 1.0
"""A video whose frames end so long before its header says so is truncated."""


BACK_SEC, LEAP_SEC = 1.0, 10.0
"""Timestamps jump if they run back by more than the one, or leave out more than the other of what frames last."""


@dataclass(frozen=True, kw_only=True)
class Jump:
    """Where the frames after it came to lie `by_sec` earlier (later, if negative) than their timestamps say."""

    at_sec: float
    by_sec: float

    def __str__(self) -> str:
        return f"at {self.at_sec:.2f} s by {self.by_sec:+.2f} s"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How videos are encoded: pixels of the short side, frames per second, frames from key frame to key frame."""

    short_side: int = 256
    fps: float = 30.0
    gop: int = 15

    def __post_init__(self) -> None:
        if self.short_side < 16 or self.short_side % 2:
            raise ConfigError(f"short_side = {self.short_side} must be an even number from 16 on.")
        if not 1 <= self.fps <= 240:
            raise ConfigError(f"fps = {self.fps} must lie between 1 and 240.")
        if self.gop < 1:
            raise ConfigError(f"gop = {self.gop} must be at least 1.")

    @property
    def rate(self) -> Fraction:
        """The frame rate as containers have it."""
        return Fraction(self.fps).limit_denominator(1001)


def encode_video(source: Path, target: Path, encoding: Encoding) -> tuple[int, list[Jump]]:
    """Encode a video to `target`, an mp4 file; one thread.

    Where timestamps run backwards or leap (files joined end to end, a clock that was set), frames go on in their order,
    each as long as it says, and later timestamps count from there.

    Returns:
        how many frames it has, and the jumps of its source's timestamps.

    Raises:
        DataError: the source cannot be read, not to its end, or holds no frame.
    """
    with open_video(source) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        squareness = float(stream.sample_aspect_ratio or 1)
        with av.open(str(target), "w", format="mp4", options={"movflags": "faststart"}) as output:
            clock = _Clock(start_sec=(container.start_time or 0) / av.time_base)
            count = _Encoder(output, encoding, squareness).run(_timed_frames(source, container, stream, clock))
            return count, clock.jumps


@dataclass
class _Clock:
    """When frames come on the screen, by their timestamps as far as these can be.

    start_sec: of the file.
    now, step, interval: when the last frame came, how long it lasts, and how long the one before was shown.
    shift: what is added to timestamps because of jumps before.
    told_end: the latest end of a frame by its timestamp alone.
    """

    start_sec: float
    now: float = -math.inf
    step: float = 0.0
    interval: float = 0.0
    shift: float = 0.0
    told_end: float = 0.0
    jumps: list[Jump] = field(default_factory=list)

    @property
    def end(self) -> float:
        """When the last frame goes."""
        return max(self.now, 0.0) + self.step

    def tick(self, timestamp: float | None, lasts: float) -> float:
        """Take the next frame and return when it comes."""
        told = None if timestamp is None else timestamp - self.start_sec
        if self.now == -math.inf:
            self.now = told or 0.0
        else:
            stamp = self.end if told is None else self._mended(told)
            # equal or slightly earlier timestamps: keep the order of the frames
            after = stamp if stamp > self.now else self.now + self.step / 1000
            self.now, self.interval = after, after - self.now
        self.step = lasts
        self.told_end = max(self.told_end, (self.now if told is None else told) + lasts)
        return max(self.now, 0.0)

    def _mended(self, told: float) -> float:
        if self.shift and abs(told - self.end) <= BACK_SEC:
            self.shift = 0.0  # what jumped was a stretch in the middle, and is over
        stamp = told + self.shift
        if self.now - stamp > BACK_SEC or stamp - self.end > LEAP_SEC:
            self.jumps.append(Jump(at_sec=self.end, by_sec=stamp - self.end))
            after = max(self.end, self.now + self.interval)  # some formats say that a frame lasts no time
            self.shift += after - stamp
            return after
        return stamp


def _timed_frames(
    source: Path, container: InputContainer, stream: VideoStream, clock: _Clock
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield frames with the second at which each comes on the screen; the last again with the second at which it goes.

    Raises:
        DataError: the stream breaks off or holds no frame.
    """
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    expected = _expected_sec(container, stream)
    frame = None
    try:
        for frame in container.decode(stream):
            lasts = float((frame.duration or 0) * (frame.time_base or 0)) or 1.0 / rate
            yield clock.tick(frame.time, lasts), frame
    except FFmpegError as error:
        raise DataError(
            f"{source}: cannot be decoded after {max(clock.now, 0):.2f} s: {error.strerror}: the file is damaged."
        ) from error
    if frame is None:
        raise DataError(f"{source}: the video stream holds no frames.")
    if expected is not None and clock.told_end < expected - LOST_SEC:
        raise DataError(
            f"{source}: only {clock.told_end:.2f} of {expected:.2f} s can be decoded: the file is truncated or damaged."
        )
    yield clock.end, frame


def _expected_sec(container: InputContainer, stream: VideoStream) -> float | None:
    """Return when the video stream ends, from the start of the file, as the file says."""
    if stream.duration is None or stream.time_base is None:
        return None
    begin = 0.0 if stream.start_time is None else float(stream.start_time * stream.time_base)
    return begin - (container.start_time or 0) / av.time_base + float(stream.duration * stream.time_base)


class _Encoder:
    """Repeats and drops frames for a constant rate, scales and encodes them."""

    def __init__(self, output: OutputContainer, encoding: Encoding, squareness: float):
        self._output, self._encoding, self._squareness = output, encoding, squareness
        self._stream: VideoStream | None = None
        self._scale: _Scale | None = None
        self._count = 0

    def run(self, frames: Iterator[tuple[float, av.VideoFrame]]) -> int:
        """Encode the frames and return how many came out."""
        rate = float(self._encoding.rate)
        for (_, frame), (until, _) in itertools.pairwise(frames):
            # The frame that is on the screen is shown until the output frame nearest to when the next one comes.
            shown = max(round(until * rate), 1)
            if shown > self._count:
                self._emit(frame, shown - self._count)
        assert self._stream is not None
        self._output.mux(self._stream.encode())
        return self._count

    def _emit(self, frame: av.VideoFrame, times: int) -> None:
        key = (frame.width, frame.height, frame.format.name, frame.rotation)
        if self._scale is None or self._scale.key != key:
            if self._stream is None:
                self._stream = self._add_stream(*self._size(frame))
            self._scale = _Scale(key, frame, self._stream.width, self._stream.height)
        assert self._stream is not None
        picture = self._scale(frame)
        for _ in range(times):
            picture.pts, picture.time_base = self._count, 1 / self._encoding.rate
            picture.pict_type = PictureType.NONE  # the source's key frames are not ours
            self._output.mux(self._stream.encode(picture))
            self._count += 1

    def _size(self, frame: av.VideoFrame) -> tuple[int, int]:
        width, height = frame.width * self._squareness, float(frame.height)
        if frame.rotation % 180:
            width, height = height, width
        return output_size(width, height, self._encoding.short_side)

    def _add_stream(self, width: int, height: int) -> VideoStream:
        options = {"crf": str(CRF), "preset": "fast"}
        stream = self._output.add_stream("libx264", rate=self._encoding.rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size, stream.thread_count = self._encoding.gop, 1
        stream.codec_context.time_base = 1 / self._encoding.rate
        return stream


class _Scale:
    """Turns a frame as it is displayed and scales it, in ffmpeg's filters."""

    def __init__(self, key: tuple[int, int, str, int], frame: av.VideoFrame, width: int, height: int):
        self.key = key
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
        )
        nodes = [source, *(graph.add("transpose", turn) for turn in TRANSPOSE.get(frame.rotation, ()))]
        nodes.append(graph.add("scale", f"{width}:{height}:flags=bicubic"))
        nodes += [graph.add("setsar", "1"), graph.add("format", "pix_fmts=yuv420p"), graph.add("buffersink")]
        for before, after in itertools.pairwise(nodes):
            before.link_to(after)
        graph.configure()
        self._graph = graph

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        self._graph.push(frame)
        picture = self._graph.pull()
        assert isinstance(picture, av.VideoFrame)
        return picture


def output_size(width: float, height: float, short_side: int) -> tuple[int, int]:
    """Return the (width, height) to encode: short side as asked or smaller, proportions kept, both even, at least 2."""
    scale = min(short_side / min(width, height), 1.0)
    return _even(width * scale), _even(height * scale)


def _even(length: float) -> int:
    return max(2 * math.floor(length / 2 + 0.5), 2)
