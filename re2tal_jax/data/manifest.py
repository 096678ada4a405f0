"""`manifest.json` of a feature folder: what its features are of, and when in each video every row lies.

While features are written each process adds finished videos to a file of lines, `.videos-<process>.jsonl`, so that no
video is lost when it is stopped; at the end they are gathered in the manifest. Reading counts both.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from re2tal_jax.errors import DataError

NAME = "manifest.json"
FORMAT = "re2tal features 1"


@dataclass(frozen=True, kw_only=True)
class VideoEntry:
    """One video: row r lies at start_sec + r * seconds_per_snippet; without a stride, rows share the video evenly.

    `num_frames` is what the decoder reported, `fps` the rate by which frames became seconds.
    """

    rows: int
    start_sec: float
    seconds_per_snippet: float
    duration_sec: float
    num_frames: int
    fps: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a feature folder holds.

    identity: the config parts on which the features depend; features of another identity are never mixed in.
    checkpoint: `sha256` of the backbone's parameters, `step`, and `source`, where they came from.
    channels: of a row.
    stride, offset_frames: frames from row to row, and where row 0 is centred; stride None: rows share the video evenly.
    videos: by id.
    skipped: id and reason of videos that could not be read.
    """

    identity: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    channels: int
    stride: int | None
    offset_frames: int
    videos: Mapping[str, VideoEntry]
    skipped: Mapping[str, str]

    @property
    def checkpoint_sha256(self) -> str:
        """Of the parameters of the backbone that the features are of."""
        return str(self.checkpoint.get("sha256", ""))


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder with all videos finished so far, or None where there is none.

    Raises:
        DataError: it is damaged, or of another format.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise DataError(f"{path}: its format is {found!r}, expected {FORMAT!r}: extract the features again.")
        videos = {video_id: _entry(entry) for video_id, entry in content["videos"].items()}
        skipped = {str(video_id): str(reason) for video_id, reason in content["skipped"].items()}
        for part in sorted(folder.glob(".videos-*.jsonl")):
            videos |= dict(_lines(part))
        return Manifest(
            identity=content["identity"],
            checkpoint=content["checkpoint"],
            channels=int(content["channels"]),
            stride=None if content["stride"] is None else int(content["stride"]),
            offset_frames=int(content["offset_frames"]),
            videos=videos,
            skipped={video_id: reason for video_id, reason in skipped.items() if video_id not in videos},
        )
    except DataError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: it is damaged ({error!r}): extract the features again with --overwrite.") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest as a whole or not at all."""
    content = {"format": FORMAT, **asdict(manifest)}
    content["videos"] = dict(sorted(content["videos"].items()))
    write_file(folder / NAME, (json.dumps(content, indent=1) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def note_video(folder: Path, process: int, video_id: str, entry: VideoEntry) -> None:
    """Add a finished video to this process's lines; its file has to be there already."""
    line = json.dumps({"video_id": video_id, **asdict(entry)}).encode() + b"\n"
    with (folder / f".videos-{process}.jsonl").open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if file.read(1) not in (b"", b"\n"):  # a line that was cut short must not swallow this one
            line = b"\n" + line
        file.write(line)


def remove_notes(folder: Path) -> None:
    """Remove the lines of all processes: the manifest holds them, or what they tell of is to be made anew."""
    for part in folder.glob(".videos-*.jsonl"):
        part.unlink(missing_ok=True)


def _lines(part: Path) -> Iterable[tuple[str, VideoEntry]]:
    for line in part.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue  # the line that was being written when a process was killed: its video is made again
        yield content.pop("video_id"), _entry(content)


def _entry(content: Mapping[str, Any]) -> VideoEntry:
    entry = VideoEntry(**{field.name: content[field.name] for field in fields(VideoEntry)})
    numbers = (entry.start_sec, entry.seconds_per_snippet, entry.duration_sec, entry.fps)
    if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers) or min(numbers[1:]) <= 0:
        raise ValueError(f"a video has {content}")
    if not all(isinstance(n, int) and n > 0 for n in (entry.rows, entry.num_frames)):
        raise ValueError(f"a video has {content}")
    return entry
