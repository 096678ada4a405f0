"""From features of windows to the files of a feature folder: rows of a video joined, written, counted as finished."""

import dataclasses
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float

from re2tal_jax.data.container import probe
from re2tal_jax.data.elements import WindowRef
from re2tal_jax.data.manifest import (
    NAME,
    Manifest,
    VideoEntry,
    note_video,
    read_manifest,
    remove_notes,
    write_file,
    write_manifest,
)
from re2tal_jax.data.sampling import Policy, SlidingWindow, StridedPolicy, frame_rate
from re2tal_jax.errors import CheckpointError, DataError
from re2tal_jax.locks import claimed
from re2tal_jax.types import VideoRecord

LOCK = ".extraction"
"""In a feature folder while an extraction is at work there."""


def join_windows(windows: Sequence[tuple[int, Float[np.ndarray, "n C"]]]) -> Float[np.ndarray, "L C"]:
    """Return one row for each snippet of a video from overlapping windows, (first snippet, rows) each.

    A snippet's row is that of the window in which it is farthest from an edge, so that it has seen most of what is
    around it; the ends of the video are no edges. Of two as far the earlier window is taken.
    """
    length = max(first + len(rows) for first, rows in windows)
    joined = np.zeros((length, windows[0][1].shape[1]), windows[0][1].dtype)
    farthest = np.full(length, -1)
    for first, rows in sorted(windows, key=lambda window: window[0]):
        place, last = np.arange(first, first + len(rows)), first + len(rows) - 1
        before = np.full(len(rows), length) if first == 0 else place - first
        after = np.full(len(rows), length) if last == length - 1 else last - place
        better = np.minimum(before, after) > farthest[place]
        joined[place[better]] = rows[better]
        farthest[place] = np.maximum(farthest[place], np.minimum(before, after))
    return joined


@dataclass
class VideoRows:
    """Windows of videos as they come, to whole videos."""

    policy: Policy
    windows: Sequence[WindowRef]
    _waiting: dict[str, list[tuple[int, np.ndarray]]] = field(default_factory=lambda: defaultdict(list))
    _counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        for ref in self.windows:
            self._counts[ref.record.video_id] += 1

    def add(self, number: int, rows: Float[np.ndarray, "n C"]) -> tuple[WindowRef, Float[np.ndarray, "L C"]] | None:
        """Take the valid rows of a window; return all rows of its video once that has no other window."""
        ref = self.windows[number]
        parts = self._waiting[ref.record.video_id]
        parts.append((self._first(ref), rows))
        if len(parts) < self._counts[ref.record.video_id]:
            return None
        return ref, join_windows(self._waiting.pop(ref.record.video_id))

    def _first(self, ref: WindowRef) -> int:
        if not isinstance(self.policy, SlidingWindow):
            return 0
        return int(self.policy.layout(ref.record, ref.total_frames)[0][ref.index][0])


def describe_video(policy: Policy, ref: WindowRef, rows: int) -> VideoEntry:
    """Return what the manifest says of a video."""
    num_frames = probe(ref.path).num_frames
    grid = policy.window(ref.record, num_frames, 0).grid
    return VideoEntry(
        rows=rows,
        start_sec=grid.start_sec,
        seconds_per_snippet=grid.seconds_per_snippet,
        duration_sec=grid.duration_sec,
        num_frames=num_frames,
        fps=frame_rate(ref.record, num_frames),
    )


def covering(policy: Policy) -> Policy:
    """Return the policy with windows over the whole of each video, also where nothing happens."""
    return dataclasses.replace(policy, require_segment=False) if isinstance(policy, SlidingWindow) else policy


class FeatureFolder:
    """A folder that is being filled by one or several processes."""

    def __init__(self, folder: Path, policy: Policy, process: int):
        self.folder, self.policy, self.process = folder, policy, process

    def claimed(self) -> AbstractContextManager[None]:
        """Create the folder, and keep other extractions out of it while the first process is at work.

        Raises:
            DataError: another one is at work there, or the folder cannot be written.
        """
        return nullcontext() if self.process else claimed(self.folder / LOCK, work="extraction", option="--out")

    def prepare(
        self, identity: Mapping[str, Any], checkpoint: Mapping[str, Any], channels: int, *, overwrite: bool
    ) -> None:
        """Begin the folder, or check that it holds features of the same identity; called by one process alone.

        Raises:
            CheckpointError: it holds features of another identity, and `overwrite` is not given; the key is named.
            DataError: it holds other files, or cannot be written.
        """
        try:
            known = read_manifest(self.folder)
        except DataError:
            if not overwrite:
                raise
            known = None
        if known is not None and known.videos and not overwrite:  # one that failed at its first video binds nobody
            _check_same(self.folder, known, identity)
            return
        if known is None and any(self.folder.glob("*.npy")) and not (self.folder / NAME).is_file():
            raise DataError(
                f"{self.folder} holds npy files without a manifest, which no extraction wrote: name another."
            )
        try:
            remove_notes(self.folder)
            for video_id in known.videos if known is not None else ():
                self.path(video_id).unlink(missing_ok=True)
            stride, offset = None, 0
            if isinstance(self.policy, StridedPolicy):
                stride, offset = self.policy.snippet_stride, self.policy.offset_frames
            empty = Manifest(
                identity=identity,
                checkpoint=checkpoint,
                channels=channels,
                stride=stride,
                offset_frames=offset,
                videos={},
                skipped={},
            )
            write_manifest(self.folder, empty)
        except OSError as error:
            raise DataError(f"{self.folder} cannot be written ({error.strerror or error}): name another.") from error

    def path(self, video_id: str) -> Path:
        """Return the file of a video; an id with folders in it has them here, too.

        Raises:
            DataError: an id that would lead out of the folder.
        """
        parts = PurePosixPath(video_id).parts
        if not parts or video_id.startswith("/") or ".." in parts or "\0" in video_id:
            raise DataError(f"Video {video_id!r}: no file can have this name in {self.folder}; rename the video.")
        return self.folder / f"{video_id}.npy"

    def finished(self) -> set[str]:
        """Return the videos that are written."""
        manifest = read_manifest(self.folder)
        return {video_id for video_id in manifest.videos if self.path(video_id).is_file()} if manifest else set()

    def write(self, ref: WindowRef, rows: Float[np.ndarray, "L C"]) -> VideoEntry:
        """Write the rows of a video, and then that it is finished.

        Raises:
            DataError: rows that are not finite, or a folder that cannot be written.
        """
        video_id = ref.record.video_id
        if not np.isfinite(rows).all():
            raise DataError(
                f"Video {video_id!r}: its features are not finite as {rows.dtype}: the backbone gives NaN or values "
                "beyond that type; store float32, and compute in float32 (config.compute_dtype)."
            )
        entry = describe_video(self.policy, ref, len(rows))
        buffer = io.BytesIO()
        np.save(buffer, rows, allow_pickle=False)
        path = self.path(video_id)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, buffer.getvalue())
            note_video(self.folder, self.process, video_id, entry)
        except OSError as error:
            raise DataError(f"Video {video_id!r}: {path} cannot be written: {error.strerror or error}.") from error
        return entry

    def gather(self, skipped: Mapping[str, str], *, alone: bool) -> None:
        """Write all that is finished into the manifest; `alone`: no other process still adds to it."""
        gathered: Manifest | None = None
        while (found := read_manifest(self.folder)) is not None:
            if gathered is not None and found.videos.keys() <= gathered.videos.keys():
                break  # else another process has finished a video meanwhile, and may have been the first to write
            missed = {v: why for v, why in {**found.skipped, **skipped}.items() if v not in found.videos}
            gathered = dataclasses.replace(found, skipped=missed)
            write_manifest(self.folder, gathered)
        if alone:
            remove_notes(self.folder)


def unfinished(records: Sequence[VideoRecord], finished: set[str], process: int, count: int) -> list[VideoRecord]:
    """Return the videos of this process that are still to be done."""
    return [record for record in records[process::count] if record.video_id not in finished]


def _check_same(folder: Path, known: Manifest, identity: Mapping[str, Any]) -> None:
    mine, theirs = dict(_flat(identity)), dict(_flat(known.identity))
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            raise CheckpointError(
                f"{folder} holds features with {key} = {theirs.get(key)!r}, this command makes them with "
                f"{mine.get(key)!r}: name another folder with --out, or add --overwrite to make all of them anew."
            )


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in section.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs
