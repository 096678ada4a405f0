"""Which video files a report page carries inside, which it links, and small copies of those too large to carry.

A browser plays H.264 in mp4, and VP8, VP9 or AV1 in webm. Such a file is carried as it is where the budget allows it;
another format, or a file too large, becomes a preview: a copy of at most 240 lines, without sound. What does not fit is
linked by relative path.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote

import av
import av.filter
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream

from re2tal_jax.progress import WorkProgress

PREVIEW_HEIGHT = 240
PREVIEW_BYTES_PER_SEC = 24 << 10
"""What a preview is expected to need, about 200 kbit a second; decides which files are tried."""

_TRANSPOSE = {90: ("2",), -90: ("1",), 180: ("1", "1"), -180: ("1", "1")}
"""Display rotation in degrees, counter-clockwise, to arguments of ffmpeg's transpose filter."""


@dataclass(frozen=True, kw_only=True)
class Media:
    """How a page shows a video: `carried` inside it (a file to copy in), by `link`, or not at all; `note` says why."""

    carried: Path | None = None
    link: str | None = None
    mime: str = "video/mp4"
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class _File:
    path: Path
    size: int
    duration_sec: float
    mime: str | None  # None: no browser plays it as it is

    @property
    def preview_size(self) -> float:
        return self.duration_sec * PREVIEW_BYTES_PER_SEC


def choose_media(videos: Mapping[str, Path], *, page: Path, budget: int, scratch: Path) -> dict[str, Media]:
    """Decide for each video how `page` shows it, and encode the previews that this takes.

    The smallest files are carried first, so that as many videos as possible play wherever the page is copied to. A file
    that is damaged or missing is noted, never an error.

    Args:
        videos: id to file.
        page: where the page will be; links are relative to its folder.
        budget: bytes that may be carried in all.
        scratch: folder for previews, which must exist until the page is written.
    """
    files, media = {}, {}
    with WorkProgress(len(videos), "report: files", "video") as progress:
        for video_id, path in videos.items():
            try:
                files[video_id] = _inspect(Path(path))
            except (FFmpegError, OSError, ValueError) as error:
                media[video_id] = Media(note=f"The video cannot be shown: {_reason(error)}.")
            progress.advance()
    whole = sum(file.size if file.mime else file.preview_size for file in files.values()) <= budget
    with WorkProgress(len(files), "report: what it carries", "video") as progress:
        for video_id in sorted(files, key=lambda name: _cost(files[name], whole)):
            media[video_id] = _place(files[video_id], whole, budget, page, scratch / f"{len(media)}.mp4")
            if carried := media[video_id].carried:
                try:
                    budget -= carried.stat().st_size
                except OSError:  # it vanished since it was looked at
                    media[video_id] = Media(note="The file of this video is gone.")
            progress.advance()
    return media


def encode_preview(source: Path, target: Path, *, limit: int) -> bool:
    """Write the video of a file as H.264 in mp4 (4:2:0, index first), at most 240 lines high; return whether it fits.

    Frames keep their times, so seconds mean the same in both files. What lies before a fault of the source is kept.

    Args:
        limit: bytes; a preview that grows beyond is given up and removed.

    Raises:
        FFmpegError, OSError, ValueError: no video, or not one frame that can be decoded.
    """
    try:
        _encode(source, target, limit)
        fits = target.stat().st_size <= limit
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    if not fits:
        target.unlink()
    return fits


def _encode(source: Path, target: Path, limit: int) -> None:
    output = {"movflags": "+faststart"}
    with av.open(_spelled(source)) as read, av.open(str(target), "w", format="mp4", options=output) as write:
        stream = read.streams.video[0]
        stream.thread_type = "AUTO"
        encoder = write.add_stream(
            "libx264", rate=stream.average_rate or 25, options={"preset": "veryfast", "crf": "30", "bf": "0"}
        )
        encoder.pix_fmt = "yuv420p"
        time_base = stream.time_base or Fraction(1, 1000)
        encoder.codec_context.time_base = time_base
        start = round((read.start_time or 0) / av.time_base / time_base)
        scaler, last, size = None, -1, 0
        for frame in _decoded(read, stream):
            if frame.pts is None or frame.pts - start <= last:
                continue
            scaler = scaler or _Scaler(frame, stream.sample_aspect_ratio or Fraction(1))
            scaled = scaler(frame)
            if last < 0:
                encoder.width, encoder.height = scaled.width, scaled.height
            last = frame.pts - start
            scaled.pts, scaled.time_base = last, time_base
            packets = encoder.encode(scaled)
            size += sum(packet.size for packet in packets)
            write.mux(packets)
            if size > limit:
                break
        if scaler is None:
            raise ValueError("not one frame can be decoded")
        write.mux(encoder.encode())


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Yield frames until the end or the first fault."""
    try:
        yield from container.decode(stream)
    except FFmpegError:
        return


class _Scaler:
    """Turn and shrink frames to square pixels and even sides, whatever the size of later frames."""

    def __init__(self, frame: av.VideoFrame, pixel_aspect: Fraction):
        turns = _TRANSPOSE.get(frame.rotation, ())
        height, width = float(frame.height), float(frame.width * pixel_aspect)
        if len(turns) == 1:
            height, width = width, height
        scale = min(PREVIEW_HEIGHT / height, 1)
        self._steps = [("transpose", turn) for turn in turns]
        self._steps += [("scale", f"{_even(width * scale)}:{_even(height * scale)}"), ("setsar", "1")]
        self._steps += [("format", "pix_fmts=yuv420p")]
        self._of: tuple[object, ...] = ()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        if self._of != (frame.width, frame.height, frame.format.name):
            self._of = (frame.width, frame.height, frame.format.name)
            self._graph = av.filter.Graph()
            nodes = [
                self._graph.add_buffer(
                    width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
                )
            ]
            nodes += [self._graph.add(name, arguments) for name, arguments in self._steps]
            nodes.append(self._graph.add("buffersink"))
            for before, after in itertools.pairwise(nodes):
                before.link_to(after)
            self._graph.configure()
        self._graph.push(frame)
        return self._graph.vpull()


def _even(pixels: float) -> int:
    return max(2, 2 * round(pixels / 2))


def _inspect(path: Path) -> _File:
    size = path.stat().st_size
    if not size:
        raise ValueError("the file is empty")
    with av.open(_spelled(path)) as container:
        if not container.streams.video:
            raise ValueError("the file holds no video stream")
        stream = container.streams.video[0]
        codec, pixels = stream.codec_context.name, stream.codec_context.pix_fmt
        names = container.format.name.split(",")
        if "mp4" in names and codec == "h264" and pixels in ("yuv420p", "yuvj420p"):
            mime = "video/mp4"
        elif "webm" in names and codec in ("vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d"):
            mime = "video/webm"
        else:
            mime = None
        if stream.duration:
            duration = float(stream.duration * (stream.time_base or 1))
        else:
            duration = (container.duration or 0) / av.time_base
    return _File(path=path, size=size, duration_sec=duration, mime=mime)


def _cost(file: _File, whole: bool) -> float:
    """Return the bytes that carrying a file is expected to take."""
    if file.mime is None:
        return file.preview_size
    return file.size if whole else min(file.size, file.preview_size)


def _place(file: _File, whole: bool, budget: int, page: Path, preview: Path) -> Media:
    as_it_is = file.mime is not None and (whole or file.size <= file.preview_size)
    if as_it_is and file.size <= budget:
        return Media(carried=file.path, mime=file.mime or "")
    note = ""
    if not as_it_is and file.preview_size <= budget:
        try:
            if encode_preview(file.path, preview, limit=budget):
                return Media(carried=preview, note="A small copy of the video, without sound.")
        except (FFmpegError, OSError, ValueError) as error:
            note = f"The video may be damaged: {_reason(error)}. "
    note += "Played from its own file, which must stay where it is."
    if file.mime is None:
        note += " The browser may not know its format."
    return Media(link=_link(file.path, page), mime=file.mime or "", note=note)


def _link(path: Path, page: Path) -> str:
    """Return the url of a file, relative to the page's folder; bytes that are no UTF-8 are quoted as they are."""
    absolute = os.path.abspath(path)
    try:
        relative = os.path.relpath(absolute, os.path.abspath(page.parent))
    except ValueError:  # another drive
        return Path(absolute).as_uri()
    return quote(os.fsencode(relative.replace(os.sep, "/")))


def _spelled(path: Path) -> str:
    """Return the path as ffmpeg takes it for a file, whatever colons it has."""
    return os.path.abspath(path)


def _reason(error: Exception) -> str:
    stated = error.strerror if isinstance(error, (FFmpegError, OSError)) else None
    return str(stated or error).rstrip(".")
