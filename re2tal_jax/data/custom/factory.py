"""Your own data set: a folder of videos and an annotation as people make it (see `tables.py`, docs/your_data.md).

What the annotation does not tell is made: classes from its labels, durations and frame counts from the files, training
and validation by a hash of each video's id.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal

from re2tal_jax.data.annotations import Annotations, parse_annotations
from re2tal_jax.data.container import probe
from re2tal_jax.data.custom.tables import Listing, add_video, read_listing
from re2tal_jax.data.dataset import Dataset, open_dataset
from re2tal_jax.data.features import FeatureConfig
from re2tal_jax.data.findings import counted
from re2tal_jax.data.video_folder import VideoFolder, printable, split_name, video_id, without_suffix
from re2tal_jax.data.video_source import VideoInfo
from re2tal_jax.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

TRAINING, VALIDATION = "training", "validation"
"""The subsets that are made where the annotation has none."""

_PROBES = 16  # threads: they wait for the disk


def custom(
    *,
    annotations: str,
    subset: str | tuple[str, ...],
    videos: str | None = None,
    features: FeatureConfig | None = None,
    classes: str | tuple[str, ...] | None = None,
    tiers: str | tuple[str, ...] | None = None,
    validation_share: float = 0.2,
    training: bool = False,
    min_length_ratio: float = 0.0,
    class_agnostic: bool = False,
    fps: float | None = None,
    blocked: str | tuple[str, ...] | None = None,
    missing_videos: Literal["error", "skip"] = "error",
    unlabelled: bool = False,
) -> Dataset:
    """Open a subset of a data set of your own.

    A video's id is the path of its file below `videos` without extension. Other arguments are as in `read_annotations`
    and `open_dataset`.

    Args:
        annotations: a .csv, .tsv, .eaf or .json file, or a folder of them.
        subset: as the annotation names it; training or validation where it names none.
        videos: the folder of videos, with folders in it or without; None only where the annotation tells durations.
        tiers: the ELAN tiers or VIA attributes to take; None takes all.
        validation_share: of the videos, where the annotation has no subsets; a video stays in its subset when others
            are added.
        missing_videos: as in `open_dataset`. Videos that cannot be read are counted; the loader decides (`on_error`).

    Raises:
        ConfigError: `validation_share` outside (0, 1).
        DataError: as `read_listing`, `VideoFolder.find`, `parse_annotations` and `open_dataset`; only some videos with
            a subset; durations that neither the annotation nor a file tells.
    """
    if not 0 < validation_share < 1:
        raise ConfigError(f"validation_share = {validation_share} must lie in (0, 1).")
    path = Path(annotations)
    folder = None if videos is None else VideoFolder(videos)
    listing, files = _by_id(path, read_listing(path, tiers=(tiers,) if isinstance(tiers, str) else tiers), folder)
    unreadable = _fill_durations(path, listing, files)
    made = _fill_subsets(path, listing, validation_share)
    if made and len(listing) == 1 and TRAINING not in ((subset,) if isinstance(subset, str) else subset):
        raise DataError(
            f"{path}: {next(iter(listing))!r} is the only video and has no subset, so it is for {TRAINING}, and none "
            f"is left for {VALIDATION}: annotate more videos, or add the column subset and choose it in both places "
            "(config.train.subset, config.eval.subset); the mAP is then of a video that was trained on."
        )
    parsed = parse_annotations(path, {"database": listing}, classes=classes, fps=fps)
    for name in unreadable:
        parsed.findings[listing[name]["subset"]].note("video_unreadable", name)
    if training:
        _tell_split(parsed, validation_share if made else None)
    return open_dataset(
        parsed,
        subset=subset,
        videos=videos,
        features=features,
        training=training,
        min_length_ratio=min_length_ratio,
        class_agnostic=class_agnostic,
        blocked=blocked,
        missing_videos=missing_videos,
        unlabelled=unlabelled,
        find=lambda _, ids: {name: files[name] for name in ids if name in files},
    )


def _by_id(path: Path, listing: Listing, folder: VideoFolder | None) -> tuple[Listing, dict[str, Path]]:
    """Return the videos by id, several names of one file joined, and the files that there are."""
    by_id: Listing = {}
    files: dict[str, Path] = {}
    named: dict[str, tuple[str, str | None]] = {}
    for name, video in listing.items():
        file = None if folder is None else folder.find(name)
        key = video_id(file) if file is not None else printable(without_suffix("/".join(split_name(name))))
        before, known = named.setdefault(key, (name, file))
        if file != known or _contradict(name, before):
            raise DataError(
                f"{path}: '{printable(before)}' and '{printable(name)}' would both be the video {key!r}. If they are "
                "two videos, name both with their folders, or rename one file."
            )
        if folder is not None and file is not None:
            files[key] = folder.path(file)
        add_video(by_id, key, video, where=f"{path}: video {key!r}")
    return by_id, files


def _contradict(name: str, other: str) -> bool:
    """Tell whether two names of one file have folders that differ."""
    first, second = split_name(name)[:-1], split_name(other)[:-1]
    common = min(len(first), len(second))
    return common > 0 and first[-common:] != second[-common:]


def _fill_durations(path: Path, listing: Listing, files: Mapping[str, Path]) -> list[str]:
    """Set missing durations, with the frame counts, as the files have them; return the videos that cannot be read.

    A video whose file is missing or cannot be read gets the end of its last segment: no window of it is ever seen, only
    its ground truth counts.
    """
    unknown = [name for name, video in listing.items() if "duration" not in video]
    if unknown and not files:
        raise DataError(
            f"{path}: no duration of video {unknown[0]!r}{_and_others(len(unknown) - 1)}, and no file found to ask: "
            "name the folder of the videos (option videos), or add the column duration_sec."
        )
    there = [name for name in unknown if name in files]
    failures: dict[str, str] = {}
    with ThreadPoolExecutor(_PROBES) as pool:
        for name, info in zip(there, pool.map(_probe, [files[name] for name in there]), strict=True):
            if isinstance(info, VideoInfo):
                listing[name] |= {"duration": info.duration_sec, "frame": info.num_frames}
            else:
                failures[name] = info
    for name, reason in failures.items():
        logger.warning("video %r cannot be read: %s", name, reason)
    for name in unknown:
        if "duration" not in listing[name]:
            listing[name]["duration"] = _last_end(listing[name])
    return list(failures)


def _and_others(number: int) -> str:
    return f" and {counted(number, 'other')}" if number else ""


def _probe(path: Path) -> VideoInfo | str:
    """Return what a file says, or why it cannot."""
    try:
        status = path.stat()
        return _probe_once(path, status.st_size, status.st_mtime_ns)
    except (DataError, OSError) as error:
        return printable(str(error))


@cache
def _probe_once(path: Path, size: int, changed: int) -> VideoInfo:
    """Probe a file once for all the subsets that a process opens."""
    del size, changed
    return probe(path)


def _last_end(video: Mapping[str, Any]) -> float:
    try:
        ends = [annotation["segment"][1] for annotation in video["annotations"]]
        return max([end for end in ends if math.isfinite(end) and end > 0], default=1.0)
    except (TypeError, KeyError, IndexError):
        return 1.0  # what is wrong is told when the segments are parsed


def _fill_subsets(path: Path, listing: Listing, validation_share: float) -> bool:
    """Share the videos between training and validation if none has a subset; tell whether that was done."""
    without = [name for name, video in listing.items() if "subset" not in video]
    if without and len(without) < len(listing):
        raise DataError(
            f"{path}: {len(without)} of {len(listing)} videos have no subset, the first is {without[0]!r}; give every "
            "video one, or none."
        )
    held_out = held_out_videos(without, validation_share)
    for name in without:
        listing[name]["subset"] = VALIDATION if name in held_out else TRAINING
    return bool(without)


def held_out_videos(video_ids: Iterable[str], share: float) -> set[str]:
    """Return the videos whose hash, a number in [0, 1), is below `share`; of two or more at least one, and not all.

    Which subset a video is in follows from its id alone, unless the data set is so small that one would be empty.
    """
    numbers = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in video_ids}
    ordered = sorted(numbers, key=numbers.__getitem__)
    count = sum(number < share for number in numbers.values())
    return set(ordered[: min(max(count, 1), len(ordered) - 1)]) if len(ordered) > 1 else set()


def _tell_split(annotations: Annotations, share: float | None) -> None:
    """Log the split that was made, if any, and the classes that one of its subsets lacks."""
    if share is None:
        return
    counts = {name: Counter[int]() for name in (TRAINING, VALIDATION)}
    videos = Counter(record.subset for record in annotations.records)
    for record in annotations.records:
        counts[record.subset].update(record.labels.tolist())
    logger.info(
        "%s has no subsets: %s for %s, %d for %s (by a hash of their ids, validation_share = %s)",
        *(annotations.path, counted(videos[TRAINING], "video"), TRAINING, videos[VALIDATION], VALIDATION, share),
    )
    for subset, count in counts.items():
        lacking = [name for number, name in enumerate(annotations.classes) if not count[number]]
        if lacking:
            classes = counted(len(lacking), "class", "classes")
            logger.warning("no segment for %s of %s: %s", subset, classes, ", ".join(lacking[:10]))


VARIANTS = {"custom": custom}
