"""Video files that nobody annotated, as a data set to predict on: what was named is found, named apart, and probed."""

import glob
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from re2tal_jax.data.container import probe
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.findings import Findings
from re2tal_jax.data.video_folder import VIDEO_SUFFIXES, VideoFolder, printable
from re2tal_jax.data.video_source import VideoInfo
from re2tal_jax.errors import DataError, similar_file
from re2tal_jax.progress import WorkProgress
from re2tal_jax.types import VideoRecord

SUBSET = "files"
_THREADS = 8  # they wait for disks more than they compute


def find_video_files(names: Sequence[str | Path]) -> dict[str, Path]:
    """Return the files that are named, by video id, in the order in which they are named and sorted inside folders.

    Args:
        names: files of any suffix; folders, searched with those below them for `VIDEO_SUFFIXES`; patterns with `*`,
            `?`, `[…]` and `**`, of whose matches only folders and files of these suffixes count.

    The id of a video is its name without the suffix; videos that share it have the path below the folder that they
    share, with the suffix. Bytes of a name that are no UTF-8 become \\xNN. A file that is named twice is one.

    Raises:
        DataError: a name that matches nothing, or a folder without videos.
    """
    files = {os.path.abspath(path): path for name in names for path in _files(str(name))}
    by_stem = defaultdict(list)
    for absolute in files:
        by_stem[Path(absolute).stem].append(absolute)
    ids = {}
    for stem, alike in by_stem.items():
        shared = os.path.commonpath([os.path.dirname(absolute) for absolute in alike])
        for absolute in alike:
            ids[absolute] = printable(stem if len(alike) == 1 else Path(os.path.relpath(absolute, shared)).as_posix())
    count = Counter(ids.values())
    return {ids[a] if count[ids[a]] == 1 else printable(Path(a).as_posix()): path for a, path in files.items()}


def open_video_files(
    files: Mapping[str, Path], *, on_error: Literal["error", "skip"], classes: Sequence[str]
) -> tuple[Dataset, dict[str, str]]:
    """Return a data set of these videos, probed for length and rate, and the reason of each that cannot be read.

    Frames over duration is the rate: where it varies, times are right on the average only.

    Args:
        files: file of each video, by its id.
        on_error: what a video that cannot be read does: stop, or be left out, be it all of them.
        classes: what detections are called.

    Raises:
        DataError: a video that cannot be read, with `on_error` "error".
    """
    records, damaged = [], {}
    with WorkProgress(len(files), "opening", "video") as progress:
        for video_id, info in _probe_all(files):
            progress.advance()
            if isinstance(info, VideoInfo):
                records.append(_record(video_id, info))
                continue
            if on_error == "error":
                hint = "" if len(files) == 1 else " To go on without it add --config.eval.loader.on_error=skip."
                raise DataError(f"Video {video_id!r}: {info}{hint}")
            damaged[video_id] = str(info)
    dataset = Dataset(
        records=tuple(records),
        classes=tuple(classes),
        video_paths={record.video_id: files[record.video_id] for record in records},
        findings=Findings(),
        ground_truth={"database": {}},
    )
    return dataset, damaged


def _files(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = _below(path)
    elif path.exists():
        return [path]
    elif glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        if not matches:
            raise DataError(f"--videos {name!r}: no file or folder matches this pattern.")
        found = [file for match in matches for file in (_below(match) if match.is_dir() else [match])]
        found = [file for file in found if file.suffix.lower() in VIDEO_SUFFIXES]
    else:
        raise DataError(f"--videos {name!r}: there is no such file or folder.{similar_file(path)}")
    if not found:
        raise DataError(f"--videos {name!r}: no video is there. Looked for {', '.join(VIDEO_SUFFIXES)}.")
    return found


def _below(folder: Path) -> list[Path]:
    videos = VideoFolder(folder)
    return [videos.path(file) for file in videos.files]


def _probe_all(files: Mapping[str, Path]) -> Iterator[tuple[str, VideoInfo | DataError]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            yield from zip(files, pool.map(_probe, files.values()), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)  # a fault or Ctrl-C does not wait for thousands of files


def _probe(path: Path) -> VideoInfo | DataError:
    try:
        return probe(path)
    except DataError as error:
        return error


def _record(video_id: str, info: VideoInfo) -> VideoRecord:
    return VideoRecord(
        video_id=video_id,
        subset=SUBSET,
        duration_sec=info.duration_sec,
        num_frames=info.num_frames,
        fps=info.num_frames / info.duration_sec,
        segments_sec=np.zeros((0, 2)),
        labels=np.zeros(0, np.int64),
    )
