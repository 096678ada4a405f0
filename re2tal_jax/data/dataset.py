"""What every data set shares: from a whole annotation file to the videos of a subset, ready to be sampled.

A data set of its own is one file with a factory that reads its annotations and calls `open_dataset`, and one line in
`re2tal_jax.data`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from re2tal_jax.data.annotations import Annotations, activitynet_form
from re2tal_jax.data.features import FeatureConfig, Features, open_features
from re2tal_jax.data.features.files import SUFFIXES as FEATURE_SUFFIXES
from re2tal_jax.data.files import find_files
from re2tal_jax.data.findings import Findings, counted
from re2tal_jax.data.video_source import VideoSource
from re2tal_jax.errors import ConfigError, DataError, did_you_mean
from re2tal_jax.types import VideoRecord

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
AGNOSTIC = ("action",)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A subset's videos, what their labels index, where their files are, and what was found wrong with them.

    `ground_truth` is the subset in ActivityNet form as the file has it, for the evaluation: every segment and label,
    also what training leaves out or cannot use, without blocked videos, with videos whose file is missing.
    `features` stand in the place of videos, `video_sources` in that of files; `video_paths` is empty then.
    """

    records: tuple[VideoRecord, ...]
    classes: tuple[str, ...]
    video_paths: Mapping[str, Path]
    findings: Findings
    ground_truth: Mapping[str, Any]
    features: Features | None = None
    video_sources: Mapping[str, VideoSource] = dataclasses.field(default_factory=dict)


def open_dataset(
    annotations: Annotations,
    *,
    subset: str | tuple[str, ...],
    videos: str | None = None,
    features: FeatureConfig | None = None,
    training: bool = False,
    min_length_ratio: float = 0.0,
    class_agnostic: bool = False,
    blocked: str | tuple[str, ...] | None = None,
    missing_videos: Literal["error", "skip"] = "error",
    unlabelled: bool = False,
    find: Callable[[str, Iterable[str]], Mapping[str, Path]] | None = None,
    adjust: Callable[[VideoRecord], VideoRecord] | None = None,
) -> Dataset:
    """Choose a subset of the annotations and find its videos.

    Args:
        annotations: the whole file.
        subset: one name or several.
        videos: folder with <id>.mp4, .mkv, .webm, .avi or .mov, with or without "v_" before the id; None looks for
            none and leaves `video_paths` empty.
        features: in the place of videos, which are not looked for then.
        training: leave out segments of at most `min_length_ratio` of their video, then videos without segments.
        min_length_ratio: 0 leaves out only what has no length.
        class_agnostic: one class, "action"; an external classifier names the detections.
        blocked: ids of videos to leave out, or a file with one on each line.
        missing_videos: "error" names the videos without a file (or features) together, "skip" leaves them out.
        unlabelled: allow a subset without a single segment (to predict on; nothing can be learnt or evaluated).
        find: a data set's own way to find the files of ids in the folder `videos`; None is `find_videos`.
        adjust: a data set's own view of a record, before the filters.

    Raises:
        ConfigError: `min_length_ratio` outside [0, 1).
        DataError: a subset without videos or segments, a folder that does not exist, missing videos.
    """
    if not 0 <= min_length_ratio < 1:
        raise ConfigError(f"min_length_ratio = {min_length_ratio} must lie in [0, 1).")
    subsets = (subset,) if isinstance(subset, str) else tuple(subset)
    annotated = _of_subsets(annotations, subsets, unlabelled)
    findings = Findings()
    for name in subsets:
        findings.take(annotations.findings[name])
    names = _blocked_ids(blocked)
    records = _only(annotated, lambda record: record.video_id not in names, "video_blocked", findings)
    if adjust:
        records = [adjust(record) for record in records]
    records = [_view(record, class_agnostic, min_length_ratio if training else None, findings) for record in records]
    if training:
        records = _only(records, lambda record: len(record.labels) > 0, "video_without_segments", findings)
    paths, opened = {}, None
    if features is not None:
        opened = open_features(features, [record.video_id for record in records])
        _report_missing(records, opened.places, " and ".join(features.folders), FEATURE_SUFFIXES, missing_videos)
        records = _only(records, lambda record: record.video_id in opened.places, "features_missing", findings)
    elif videos is not None:
        paths = (find or find_videos)(videos, [record.video_id for record in records])
        _report_missing(records, paths, videos, SUFFIXES, missing_videos)
        records = _only(records, lambda record: record.video_id in paths, "video_missing", findings)
    if not records:
        raise DataError(f"{annotations.path}: {_nothing_left(subsets, len(annotated), findings)}")
    return Dataset(
        records=tuple(records),
        classes=AGNOSTIC if class_agnostic else annotations.classes,
        video_paths=paths,
        findings=findings,
        ground_truth=activitynet_form(
            entry for entry in annotations.entries if entry.subset in subsets and entry.video_id not in names
        ),
        features=opened,
    )


_WAYS_OUT = {
    "video_blocked": "change the list of blocked videos (option blocked)",
    "video_without_segments": "annotate segments in them",
    "too_short": "lower min_length_ratio",
    "video_missing": "put the files where the option videos says, or name another folder",
    "features_missing": "extract the features (--mode extract), or name another features.folder",
}


def _nothing_left(subsets: tuple[str, ...], count: int, findings: Findings) -> str:
    """Return in words why a subset has no video, with the way out of each reason."""
    reasons = Findings({name: findings[name] for name in _WAYS_OUT if findings[name]}, examples=findings.examples)
    ways = "; ".join(_WAYS_OUT[name] for name in reasons)
    return (
        f"no video of subset {', '.join(subsets)} is left of {counted(count, 'video')}. Left out: "
        f"{'; '.join(reasons.lines())}. To go on: {ways}."
    )


def find_videos(folder: str | Path, video_ids: Iterable[str]) -> dict[str, Path]:
    """Return the file of every id that has one, from a single scan of the folder (no call per video).

    A name equal to the id goes before one with a "v_" more or less; among suffixes the order of `SUFFIXES` decides.

    Raises:
        DataError: the folder does not exist.
    """
    return find_files(folder, video_ids, SUFFIXES, what="Video folder", option="videos")


def _of_subsets(annotations: Annotations, subsets: tuple[str, ...], unlabelled: bool) -> list[VideoRecord]:
    videos = Counter(record.subset for record in annotations.records)
    segments = Counter(dict.fromkeys(videos, 0))
    for record in annotations.records:
        segments[record.subset] += len(record.labels)
    there_are = ", ".join(
        f"{name} ({counted(count, 'video')}, {counted(segments[name], 'segment')})" for name, count in videos.items()
    )
    for name in subsets:
        if name not in videos:
            raise DataError(
                f"{annotations.path}: no video in subset {name!r}. {did_you_mean(name, videos)} "
                f"There are: {there_are or 'none'}."
            )
    if not unlabelled and not any(segments[name] for name in subsets):
        raise DataError(
            f"{annotations.path}: subset {', '.join(subsets)} has videos but no ground truth: nothing to learn or to "
            f"evaluate (to predict only, set unlabelled). There are: {there_are}."
        )
    return [record for record in annotations.records if record.subset in subsets]


def _blocked_ids(blocked: str | tuple[str, ...] | None) -> frozenset[str]:
    if not isinstance(blocked, str):
        return frozenset(blocked or ())
    path = Path(blocked)
    if not path.is_file():
        raise DataError(f"List of blocked videos {path} does not exist (option blocked).")
    return frozenset(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())


def _only(
    records: list[VideoRecord], keep: Callable[[VideoRecord], bool], finding: str, findings: Findings
) -> list[VideoRecord]:
    """Return the records to keep, the others counted."""
    for record in records:
        if not keep(record):
            findings.note(finding, record.video_id)
    return [record for record in records if keep(record)]


def _view(record: VideoRecord, agnostic: bool, min_length_ratio: float | None, findings: Findings) -> VideoRecord:
    """Return the record as the policies get it: one class if agnostic, short segments and repeats left out."""
    labels = np.zeros_like(record.labels) if agnostic else record.labels
    seen: set[tuple[float, float, int]] = set()
    kept = np.ones(len(labels), bool)
    for i, ((start, end), label) in enumerate(zip(record.segments_sec.tolist(), labels.tolist(), strict=True)):
        if min_length_ratio is not None and (end - start) / record.duration_sec <= min_length_ratio:
            findings.note("too_short", record.video_id)
            kept[i] = False
        elif (start, end, label) in seen:
            findings.note("duplicate", record.video_id)
            kept[i] = False
        seen.add((start, end, label))
    return dataclasses.replace(record, segments_sec=record.segments_sec[kept], labels=labels[kept])


def _report_missing(
    records: list[VideoRecord],
    found: Container[str],
    folder: str,
    suffixes: Sequence[str],
    policy: Literal["error", "skip"],
) -> None:
    missing = [record.video_id for record in records if record.video_id not in found]
    if missing and policy == "error":
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise DataError(
            f"{len(missing)} of {len(records)} videos have no file in {folder}: {shown}. Looked for <id> and v_<id> "
            f"with {', '.join(suffixes)}. Put them there, or set missing_videos to 'skip'."
        )
