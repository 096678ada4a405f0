"""Annotation files to VideoRecords, with every defect either an error that names file and video, or counted.

Two forms are read: ActivityNet's, {"database": {id: {"subset", "duration", "annotations": [{"label", "segment"}]}}}
with optional "frame" and "fps", and that of BMN and G-TAD, {id: {"duration_second", "duration_frame", "annotations"}}
with a table (`video_info`) for the subsets. A file of the wrong shape, a missing field, a value that is no number or a
label outside the class list stops the program. A segment that cannot be is set right or left out, and counted:

    finding           segment                                   what happens
    not_finite        NaN or infinite start or end              left out
    reversed          end before start                          left out
    zero_length       end equal to start                        left out
    outside           ends at or before 0, or starts at or      left out
                      after the end of the video
    negative_start    starts before 0, ends after it            starts at 0            (clip=True)
    past_end          ends after the end of the video           ends with the video    (clip=True)
    duplicate         same start, end and label as one before   left out
    ignored_label     label in `ignored_labels`                 left out
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from re2tal_jax.data.classes import infer_classes, read_classes
from re2tal_jax.data.findings import Findings
from re2tal_jax.errors import ConfigError, DataError, did_you_mean
from re2tal_jax.types import VideoRecord


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """A whole annotation file: every record in the order of the file, the classes they index, findings by subset.

    `entries` are the videos as the file has them, before segments were checked, without the ignored labels.
    """

    path: Path
    records: tuple[VideoRecord, ...]
    classes: tuple[str, ...]
    findings: Mapping[str, Findings]
    entries: tuple["Entry", ...]


class Entry(NamedTuple):
    """A video as the file has it; `annotations` are (start, end, label)."""

    video_id: str
    subset: str
    duration_sec: float
    num_frames: int | None
    fps: float | None
    annotations: list[tuple[float, float, str]]


def read_annotations(
    path: str | Path,
    *,
    video_info: str | Path | None = None,
    classes: str | Path | Sequence[str] | None = None,
    ignored_labels: Iterable[str] = (),
    fps: float | None = None,
    clip: bool = True,
) -> Annotations:
    """Read an annotation file.

    Args:
        path: the JSON file, UTF-8.
        video_info: the table with columns video and subset that belongs to the BMN form.
        classes: class list file (see `read_classes`) or names in order; None takes the file's labels, sorted.
        ignored_labels: labels whose segments are left out.
        fps: the rate of the videos at hand where they were re-encoded; replaces what the file says of frames and fps.
        clip: move starts and ends into the video; False keeps them as published THUMOS-14 code does.

    Raises:
        ConfigError: `fps` is no rate.
        DataError: the file, the table or the class list is missing or not of its form; the text names what and where.
    """
    path = Path(path)
    return parse_annotations(
        path,
        load_json(path),
        video_info=video_info,
        classes=classes,
        ignored_labels=ignored_labels,
        fps=fps,
        clip=clip,
    )


def parse_annotations(
    path: Path,
    content: Any,
    *,
    video_info: str | Path | None = None,
    classes: str | Path | Sequence[str] | None = None,
    ignored_labels: Iterable[str] = (),
    fps: float | None = None,
    clip: bool = True,
) -> Annotations:
    """Return the annotations in the content of a JSON file, or in what was made of another; as `read_annotations`.

    `path` is what errors name.
    """
    if fps is not None and not 0 < fps < math.inf:
        raise ConfigError(f"fps = {fps} must be a positive number, or None for what the file says.")
    ignored = frozenset(ignored_labels)
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON object is needed, found {_kind(content)}.")
    entries = list(_database(path, content) if "database" in content else _bmn(path, content, video_info))
    labels = {label for entry in entries for _, _, label in entry.annotations} - ignored
    if classes is None:
        names = infer_classes(path, labels)
    else:
        names = read_classes(classes) if isinstance(classes, (str, Path)) else tuple(classes)
        _check_labels(path, entries, set(names) | ignored, classes)
    index = {name: i for i, name in enumerate(names)}
    findings = {entry.subset: Findings() for entry in entries}
    records = tuple(_record(entry, index, ignored, fps, clip, findings[entry.subset]) for entry in entries)
    entries = [e._replace(annotations=[a for a in e.annotations if a[2] not in ignored]) for e in entries]
    return Annotations(path=path, records=records, classes=names, findings=findings, entries=tuple(entries))


def activitynet_form(entries: Iterable[Entry]) -> dict[str, Any]:
    """Return videos as a ground truth in ActivityNet form, for the evaluation; only what is not finite is left out."""
    return {
        "database": {
            entry.video_id: {
                "subset": entry.subset,
                "duration": entry.duration_sec,
                "annotations": [
                    {"segment": [start, end], "label": label}
                    for start, end, label in entry.annotations
                    if math.isfinite(start) and math.isfinite(end)
                ],
            }
            for entry in entries
        }
    }


def load_json(path: Path) -> Any:
    """Return the content of an annotation file in JSON.

    Raises:
        DataError: no such file, no UTF-8, no JSON, or a key twice in one object.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"Annotation file {path} {what}; docs/data.md says where each file goes.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=lambda pairs: _object(path, pairs))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; is the file complete?"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from error


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise DataError(f"{path}: {twice[0]!r} occurs twice in one object; each video may be listed once.")
    return content


def _database(path: Path, content: dict[str, Any]) -> Iterator[Entry]:
    """Yield the videos of an ActivityNet-form file."""
    database = content["database"]
    if not isinstance(database, dict):
        raise DataError(f'{path}: "database" must be an object of videos, found {_kind(database)}.')
    for video_id, video in database.items():
        where = f"{path}: video {video_id!r}"
        subset = _field(where, video, "subset")
        if not isinstance(subset, str):
            raise DataError(f'{where}: "subset" must be text, found {_kind(subset)}.')
        if "duration" not in video:
            raise DataError(
                f'{where}: no "duration"; found {", ".join(map(repr, video)) or "nothing"}. Some published files leave '
                "it out (thumos_gt.json is one): take one that has durations (docs/data.md), or let the video files "
                "tell: config.data.name=custom with config.data.videos."
            )
        duration = _positive(where, video, "duration")
        num_frames = _positive(where, video, "frame") if "frame" in video else None
        rate = _positive(where, video, "fps") if "fps" in video else None
        yield _entry(where, video_id, video, subset, duration, num_frames, rate)


def _bmn(path: Path, content: dict[str, Any], video_info: str | Path | None) -> Iterator[Entry]:
    """Yield the videos of a BMN-form file, their subsets taken from the table."""
    if video_info is None:
        raise DataError(
            f'{path}: no "database" at the top. Either it is not in ActivityNet form, or it is in that of BMN, '
            "which needs the option video_info, the table with a subset for every video."
        )
    subsets = _read_subsets(Path(video_info))
    for video_id, video in content.items():
        where = f"{path}: video {video_id!r}"
        if video_id not in subsets:
            raise DataError(f"{where} is missing in {video_info}, which gives its subset.")
        duration = _positive(where, video, "duration_second")
        num_frames = _positive(where, video, "duration_frame")
        yield _entry(where, video_id, video, subsets[video_id], duration, num_frames, None)


def _read_subsets(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise DataError(f"Table of videos {path} does not exist.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        for column in ("video", "subset"):
            if column not in (table.fieldnames or ()):
                raise DataError(f"{path}: no column {column!r}; found {', '.join(table.fieldnames or ())}.")
        return {row["video"]: row["subset"] for row in table}


def _entry(
    where: str,
    video_id: str,
    video: dict[str, Any],
    subset: str,
    duration: float,
    num_frames: float | None,
    fps: float | None,
) -> Entry:
    """Check the annotations of a video; frames over duration are its fps where both are known."""
    annotations = _field(where, video, "annotations")
    if not isinstance(annotations, list):
        raise DataError(f'{where}: "annotations" must be a list, found {_kind(annotations)}.')
    segments = [_annotation(f"{where}: annotation {i}", a) for i, a in enumerate(annotations)]
    if num_frames is not None:
        fps = num_frames / duration
    return Entry(video_id, subset, duration, None if num_frames is None else int(num_frames), fps, segments)


def _annotation(where: str, annotation: Any) -> tuple[float, float, str]:
    label, segment = _field(where, annotation, "label"), _field(where, annotation, "segment")
    if not isinstance(label, str):
        raise DataError(f'{where}: "label" must be text, found {_kind(label)}.')
    if not isinstance(segment, list) or len(segment) != 2 or not all(map(_is_number, segment)):
        quoted = isinstance(segment, list) and any(isinstance(time, str) for time in segment)
        hint = " Take the quotes off the numbers." if quoted else ""
        raise DataError(f'{where}: "segment" must be two numbers [start, end] in seconds, found {segment!r}.{hint}')
    return float(segment[0]), float(segment[1]), label


def _field(where: str, holder: Any, name: str) -> Any:
    if not isinstance(holder, dict):
        raise DataError(f"{where} must be an object, found {_kind(holder)}.")
    if name not in holder:
        raise DataError(f'{where}: no "{name}"; found {", ".join(map(repr, holder)) or "nothing"}.')
    return holder[name]


def _positive(where: str, video: Any, name: str) -> float:
    value = _field(where, video, name)
    if not _is_number(value) or not math.isfinite(value) or value <= 0:
        raise DataError(f'{where}: "{name}" = {value!r} must be a positive number.')
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return f"{kinds.get(type(value), 'a number')} ({str(value)[:40]})"


def _check_labels(path: Path, entries: list[Entry], known: set[str], classes: object) -> None:
    """Raise with the first label outside the class list, and how many segments have such labels."""
    unknown = [(entry.video_id, label) for entry in entries for _, _, label in entry.annotations if label not in known]
    if unknown:
        video_id, label = unknown[0]
        source = f"the class list {classes}" if isinstance(classes, (str, Path)) else "the given classes"
        raise DataError(
            f"{path}: video {video_id!r}: label {label!r} is not in {source} ({len(unknown)} such segments in all). "
            f"{did_you_mean(label, known)}"
        )


def _record(
    entry: Entry, index: dict[str, int], ignored: frozenset[str], fps: float | None, clip: bool, findings: Findings
) -> VideoRecord:
    """Build a record, its segments checked by the table above."""
    kept: dict[tuple[float, float, str], None] = {}  # ordered, and each segment once
    for start, end, label in entry.annotations:
        if label in ignored:
            findings.note("ignored_label", entry.video_id)
            continue
        segment = _checked(start, end, entry, clip, findings)
        if segment is None:
            continue
        if (*segment, label) in kept:
            findings.note("duplicate", entry.video_id)
        kept[(*segment, label)] = None
    return VideoRecord(
        video_id=entry.video_id,
        subset=entry.subset,
        duration_sec=entry.duration_sec,
        num_frames=entry.num_frames if fps is None else None,
        fps=entry.fps if fps is None else fps,
        segments_sec=np.array([(start, end) for start, end, _ in kept], np.float64).reshape(-1, 2),
        labels=np.array([index[label] for _, _, label in kept], np.int64),
    )


def _checked(start: float, end: float, entry: Entry, clip: bool, findings: Findings) -> tuple[float, float] | None:
    """Return a segment as it may stand, or None where it is left out."""
    refused = None
    if not (math.isfinite(start) and math.isfinite(end)):
        refused = "not_finite"
    elif end < start:
        refused = "reversed"
    elif end == start:
        refused = "zero_length"
    elif end <= 0 or start >= entry.duration_sec:
        refused = "outside"
    if refused:
        findings.note(refused, entry.video_id)
        return None
    if not clip:
        return start, end
    if start < 0:
        findings.note("negative_start", entry.video_id)
    if end > entry.duration_sec:
        findings.note("past_end", entry.video_id)
    return max(start, 0.0), min(end, entry.duration_sec)
