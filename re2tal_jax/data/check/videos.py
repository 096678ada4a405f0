"""What the files tell about a data set: those that are missing, damaged, of varying rate, or not what is annotated.

Of each file header and index are read, and its first, middle and last frame decoded.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from re2tal_jax.data.check.annotations import Subset
from re2tal_jax.data.check.problems import Problem, problem, share
from re2tal_jax.data.container import frame_times, open_video, probe
from re2tal_jax.data.findings import counted
from re2tal_jax.data.sampling import StridedPolicy
from re2tal_jax.data.video import read_frames
from re2tal_jax.data.video_folder import VideoFolder
from re2tal_jax.data.video_source import VideoInfo
from re2tal_jax.progress import WorkProgress

DURATION_SEC, DURATION_SHARE = 0.5, 0.01
"""An annotated duration is off if it differs by more than both: so many seconds, and this share of the file's."""

RATE_SHARE = 0.01
"""An annotated frame rate is off if it differs by more than this share."""

UNSTEADY_SEC, UNSTEADY_FRAMES = 0.05, 1.5
"""A frame rate varies if a frame is shown more than both, so many seconds and frames, from where a constant one is."""

_HEAD = 2**20
_DECODED = 32  # pixels: as small as both readers take


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a look at a file told: its header, or why it cannot be read, and how far its frames are from a steady rate.

    `size` is in bytes.
    """

    path: Path
    size: int
    info: VideoInfo | None
    fault: str
    unsteady_sec: float


def look_at_all(paths: Sequence[Path], workers: int) -> list[Look]:
    """Look at files, `workers` at a time, with progress shown; a damaged one stops nothing."""
    looks = []
    with WorkProgress(len(paths), "check", "video") as progress, ThreadPoolExecutor(workers) as pool:
        try:
            for look in pool.map(look_at, paths):
                looks.append(look)
                progress.advance()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for thousands of files
    return looks


def look_at(path: Path) -> Look:
    """Read the header, index and three frames of a file."""
    size, info, unsteady = 0, None, 0.0
    try:
        size = os.stat(path).st_size
        info = probe(path)
        last = info.num_frames - 1
        read_frames(path, sorted({0, last // 2, last}), _DECODED, _DECODED, info=info)
        unsteady = unsteadiness(_times(path))
        fault = ""
    except Exception as error:  # whatever a decoder raises is about this file, and the others are to be looked at
        fault = str(error)
    return Look(path=path, size=size, info=info, fault=fault, unsteady_sec=unsteady)


def unsteadiness(times_sec: Float[np.ndarray, " F"]) -> float:
    """Return by how many seconds a frame is furthest from where it would be at the mean rate."""
    if len(times_sec) < 3:
        return 0.0
    steady = np.linspace(times_sec[0], times_sec[-1], len(times_sec))
    return float(np.abs(times_sec - steady).max())


def _times(path: Path) -> Float[np.ndarray, " F"]:
    """Return the times of the frames, by the index if the file has a whole one, which spares reading all of it."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        index, scale = stream.index_entries, float(stream.time_base or 1)
        ticks = [entry.timestamp for entry in (index[i] for i in range(len(index))) if not entry.is_discard]
        if stream.frames and len(ticks) >= stream.frames:
            return np.sort(np.asarray(ticks, np.float64)) * scale
    return frame_times(path)


def video_problems(
    subsets: Sequence[Subset],
    looks: Mapping[Path, Look],
    folder: VideoFolder,
    *,
    missing_severe: bool,
    unreadable_severe: bool,
) -> Iterator[Problem]:
    """Yield what is wrong with the files of the subsets.

    Args:
        subsets: those of the config; each is reported once.
        looks: what was seen, by path.
        folder: where they are, with the files that belong to no video.
        missing_severe: whether a missing video would stop the run.
        unreadable_severe: whether a damaged one would.
    """
    distinct = list({subset.name: subset for subset in subsets}.values())
    for subset in distinct:
        yield from _missing(subset, missing_severe)
        yield from _unreadable(subset, looks, unreadable_severe)
        yield from _not_as_annotated(subset, looks)
        yield from _unsteady(subset, looks)
    used = {path for subset in distinct for path in subset.dataset.video_paths.values()}
    names = " or ".join(subset.name for subset in distinct)
    spare = [file for file in folder.files if folder.path(file) not in used]
    yield from problem(
        "note",
        "file_not_annotated",
        spare,
        f"{share(spare, folder.files, 'video files', 'belongs', 'belong')} to no video of {names}.",
        "If they should, compare their names with those in the annotation.",
    )
    yield from _equal(subsets, looks)


def _missing(subset: Subset, severe: bool) -> Iterator[Problem]:
    found = [name for name in subset.videos if name not in subset.dataset.video_paths]
    yield from problem(
        "error" if severe else "warning",
        "video_missing",
        found,
        f"{subset.name}: {share(found, subset.videos, 'videos', 'has', 'have')} no file.",
        "Put the files there, or leave the videos out (config.data.missing_videos=skip); in the evaluation they still "
        "count, as missed."
        if severe
        else "In the evaluation they count as missed.",
    )


def _seen(subset: Subset, looks: Mapping[Path, Look]) -> Iterator[tuple[str, Look]]:
    return ((name, looks[path]) for name, path in subset.dataset.video_paths.items())


def _readable(subset: Subset, looks: Mapping[Path, Look]) -> Iterator[tuple[str, Look, VideoInfo]]:
    return ((name, look, look.info) for name, look in _seen(subset, looks) if look.info is not None and not look.fault)


def _unreadable(subset: Subset, looks: Mapping[Path, Look], severe: bool) -> Iterator[Problem]:
    found = [f"{name}: {look.fault}" for name, look in _seen(subset, looks) if look.fault]
    yield from problem(
        "error" if severe else "warning",
        "video_unreadable",
        found,
        f"{subset.name}: {share(found, subset.dataset.video_paths, 'videos', 'cannot', 'cannot')} be read.",
        f"Download or encode them again, or skip them (config.{subset.section}.loader.on_error=skip).",
    )


def _not_as_annotated(subset: Subset, looks: Mapping[Path, Look]) -> Iterator[Problem]:
    wrong = []
    for name, _, info in _readable(subset, looks):
        stated, real = subset.duration_sec(name), info.duration_sec
        if abs(stated - real) > max(DURATION_SEC, DURATION_SHARE * real):
            wrong.append(f"{name} ({stated:.2f} s annotated, {real:.2f} s in the file)")
    yield from problem(
        "warning",
        "duration_differs",
        wrong,
        f"{subset.name}: {counted(len(wrong), 'video lasts', 'videos last')} longer or shorter than annotated, so "
        "segments lie elsewhere.",
        "Look whether these are the annotated videos, whole and not sped up; else correct the durations.",
    )
    stated_rates = {record.video_id: record.fps for record in subset.dataset.records}
    wrong = [
        f"{name} ({stated:.2f} fps annotated, {info.fps:.2f} in the file)"
        for name, _, info in _readable(subset, looks)
        if (stated := stated_rates.get(name)) is not None and abs(stated / info.fps - 1) > RATE_SHARE
    ]
    strided = isinstance(subset.policy, StridedPolicy)
    yield from problem(
        "error" if strided else "note",
        "rate_differs",
        wrong,
        f"{subset.name}: {counted(len(wrong), 'video has', 'videos have')} another frame rate than annotated"
        + (", so frames and segments drift apart in a window." if strided else "; this policy does not use it."),
        "For videos that were encoded at one other rate set config.data.fps; else correct the annotation.",
    )


def _unsteady(subset: Subset, looks: Mapping[Path, Look]) -> Iterator[Problem]:
    found = sorted(
        (
            (look.unsteady_sec, name)
            for name, look, info in _readable(subset, looks)
            if look.unsteady_sec > max(UNSTEADY_SEC, UNSTEADY_FRAMES / info.fps)
        ),
        reverse=True,
    )
    yield from problem(
        "warning",
        "variable_frame_rate",
        [f"{name} (off by {sec:.2f} s)" for sec, name in found],
        f"{subset.name}: {counted(len(found), 'video has', 'videos have')} a variable frame rate; frames are found as "
        "if it were constant.",
        "Encode them at a constant rate: python -m re2tal_jax.data.prepare VIDEOS --out DIR.",
    )


def _equal(subsets: Sequence[Subset], looks: Mapping[Path, Look]) -> Iterator[Problem]:
    """Compare files of one size by their first MiB."""
    homes: defaultdict[Path, dict[str, str]] = defaultdict(dict)  # name of the subset to id
    sizes: defaultdict[int, list[Path]] = defaultdict(list)
    for subset in subsets:
        for name, look in _seen(subset, looks):
            homes[look.path][subset.name] = name
            if look.size and look.path not in sizes[look.size]:
                sizes[look.size].append(look.path)
    groups: defaultdict[tuple[int, bytes], list[Path]] = defaultdict(list)
    for size, paths in sizes.items():
        for path in paths if len(paths) > 1 else ():
            groups[size, _digest(path)].append(path)
    across, within = [], []
    for paths in (paths for paths in groups.values() if len(paths) > 1):
        ids = " and ".join(f"{name} ({subset})" for path in paths for subset, name in homes[path].items())
        (across if len({subset for path in paths for subset in homes[path]}) > 1 else within).append(ids)
    yield from problem(
        "error",
        "equal_across_subsets",
        across,
        f"{counted(len(across), 'file is', 'files are')} there as videos of different subsets: the mAP would be of "
        "videos that were trained on.",
        "Keep each in one subset.",
    )
    yield from problem(
        "warning",
        "equal_videos",
        within,
        f"{counted(len(within), 'file is', 'files are')} there as several videos of one subset.",
        "Join their annotations under one of them.",
    )


def _digest(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(_HEAD)).digest()
    except OSError:
        return str(path).encode("utf-8", "surrogateescape")  # vanished: equal to nothing
