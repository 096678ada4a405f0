"""Finished videos of a prediction, kept as they come, so that a run that was killed goes on where it stopped.

`finished.jsonl` has a line that says what decides the detections (parameters, classes, what of the config matters),
then one for every finished video:

    {"identity": {…}}
    {"video": id, "size": bytes, "modified_ns": …, "record": [12.5, 30, 375], "duration_sec": 12.5, "unreadable": 0,
     "results": [entries]}

Entries are ActivityNet's, numbers as they were computed, to the last bit. Of two lines of a video the later one counts.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from re2tal_jax.activitynet_format import read_activitynet, to_activitynet
from re2tal_jax.errors import CheckpointError, DataError
from re2tal_jax.locks import claim
from re2tal_jax.types import Detections

NAME = "finished.jsonl"
_SHOWN = 5


class Finished(NamedTuple):
    """A finished video: how long it lasts, how many windows could not be read, and what was found."""

    duration_sec: float
    unreadable: int
    detections: Detections


class FinishedVideos:
    """The finished videos of a folder; a context that closes the file.

    A video counts as finished while its file has the size and time of change that it had, and its `record`, what an
    annotation says of it, is the same. One run at a time writes into a folder.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, overwrite: bool = False, writes: bool = True):
        """Read what is finished, and go on behind it.

        Args:
            folder: where `finished.jsonl` is, or will be.
            identity: JSON, nested by key: what decides the detections.
            overwrite: forget what is there.
            writes: whether this process appends; of several processes one does.

        Raises:
            CheckpointError: what is there was found by other parameters or another config; every difference is named.
            DataError: the file is damaged or no such file, cannot be written, or another run is at work in the folder.
        """
        self.path, self._writes = Path(folder) / NAME, writes
        self._places: dict[str, tuple[int, dict[str, Any]]] = {}
        identity = json.loads(json.dumps(identity))
        try:
            if writes:
                self._file = self._claim(identity, overwrite)
            elif self.path.exists() and not overwrite:
                self._read(identity)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be used: {error.strerror}. Choose another folder with --out."
            ) from error
        if writes and not self._file.tell():
            self._append({"identity": identity})

    def _claim(self, identity: Mapping[str, Any], overwrite: bool) -> BinaryIO:
        """Return the file, ours until it is closed, at the end of its last whole line."""
        file = claim(self.path, work="prediction", option="--out")
        try:
            end = 0 if overwrite else self._read(identity)
            file.truncate(end)  # a line that a kill cut short
            file.seek(end)
        except BaseException:
            file.close()
            raise
        return file

    def __enter__(self) -> "FinishedVideos":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writes:
            self._file.close()

    def holds(self, video_id: str, file: Path, record: Sequence[float | None] = ()) -> bool:
        """Tell whether this video, as its file and its record are now, is finished to the last window."""
        if video_id not in self._places:
            return False
        about = self._places[video_id][1]
        stamp = _stamp(file, record)
        return about["unreadable"] == 0 and {key: about[key] for key in stamp} == stamp

    def add(self, video_id: str, file: Path, found: Finished, record: Sequence[float | None] = ()) -> None:
        """Append a video; it is on the disk when this returns."""
        if not self._writes:
            return
        entries = to_activitynet({video_id: found.detections})["results"][video_id]
        about = {
            "video": video_id,
            **_stamp(file, record),
            "duration_sec": found.duration_sec,
            "unreadable": found.unreadable,
        }
        place = self._append({**about, "results": entries})
        self._places[video_id] = (place, about)

    def read(self, video_id: str) -> Finished:
        """Return what was found in a video that is there."""
        place, about = self._places[video_id]
        with self.path.open("rb") as file:
            file.seek(place)
            line = json.loads(file.readline())
        detections = read_activitynet({"results": {video_id: line["results"]}})[video_id]
        return Finished(about["duration_sec"], about["unreadable"], detections)

    def _append(self, line: Mapping[str, Any]) -> int:
        place = self._file.tell()
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return place

    def _read(self, identity: Mapping[str, Any]) -> int:
        """Note where every video's line is, and return the end of the last whole line.

        A file that holds no video binds nobody: a prediction that failed at its first one is begun anew, at 0.
        """
        end, found = 0, {}
        with self.path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    break
                try:
                    line = json.loads(text)
                    if number == 1:
                        found = dict(_flat(line["identity"]))
                    else:
                        kept = ("video", "size", "modified_ns", "record", "duration_sec", "unreadable")
                        self._places[line["video"]] = (end, {key: line[key] for key in kept})
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{self.path}: line {number} is damaged, or none of a prediction. Delete the file, or add "
                        "--overwrite, to start anew; or choose another folder with --out."
                    ) from error
                end += len(text)
        wanted = dict(_flat(identity))
        if self._places:
            self._check(found, wanted)
        return end if found == wanted else 0

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if keys:
            shown = "".join(f"\n  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in keys[:_SHOWN])
            more = f"\n  … and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            raise CheckpointError(
                f"{self.path} holds videos of another prediction, with which these are not to be mixed:{shown}{more}\n"
                "Choose another folder with --out, or add --overwrite to start anew in this one."
            )


def _stamp(file: Path, record: Sequence[float | None]) -> dict[str, Any]:
    """Return what changes with a file's content, and the record; of a file that is gone, what no file has."""
    try:
        status = file.stat()
    except OSError:
        return {"size": -1, "modified_ns": -1, "record": list(record)}
    return {"size": status.st_size, "modified_ns": status.st_mtime_ns, "record": list(record)}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else key)
    else:
        yield path, value
