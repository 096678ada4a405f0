"""Detections in ActivityNet's json form, and the columns that evaluation reads out of such files.

    {"version": …, "results": {video id: [{"segment": [start, end], "label": name, "score": number}, …]}, …}

Ground truth has the same entries without score, under database -> video id -> annotations. Reading is column by column,
so that half a million entries take a second; only a fault is then looked for entry by entry, and named by its file,
video and entry.
"""

import gc
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float, Int

from re2tal_jax.errors import DataError, did_you_mean
from re2tal_jax.segments import check_segments
from re2tal_jax.types import Detections

Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Instances:
    """Labelled segments of many videos as columns, in file order.

    `video` numbers `video_ids`, which also holds the videos without any entry; `segments` are in seconds.
    """

    video_ids: tuple[str, ...]
    video: Int[np.ndarray, " N"]
    segments: Float[np.ndarray, "N 2"]
    labels: list[str]
    scores: Float[np.ndarray, " N"] | None

    def __len__(self) -> int:
        return len(self.labels)


def to_activitynet(
    results: Mapping[str, Detections], *, external_data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return detections, keyed by video id, as ActivityNet's submission form.

    Args:
        results: detections per video; one without any becomes an empty list, so that it counts as processed.
        external_data: what else decided the result, for example the external classifier; free text, as the form asks.

    Raises:
        DataError: segments or scores that are not finite, with their video named.
    """
    return {
        "version": "VERSION 1.3",
        "results": {video_id: _entries(video_id, detections) for video_id, detections in results.items()},
        "external_data": dict(external_data or {}),
    }


def write_activitynet(
    path: str | os.PathLike[str],
    results: Mapping[str, Detections],
    *,
    external_data: Mapping[str, Any] | None = None,
) -> Path:
    """Write `to_activitynet` as json; a reader sees the old file or the whole new one, never a part of it."""
    path = Path(path)
    text = json.dumps(to_activitynet(results, external_data=external_data), allow_nan=False)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_activitynet(
    source: str | os.PathLike[str] | Mapping[str, Any], *, classes: Collection[str] | None = None
) -> dict[str, Detections]:
    """Return the detections of a file, or of its parsed content, best first per video; the inverse of `to_activitynet`.

    Raises:
        DataError: missing or malformed file or entry, or a label outside `classes` if these are given.
    """
    content, name = load(source, "results")
    instances = columns(content["results"], name, scored=True)
    if classes is not None and (unknown := set(instances.labels) - set(classes)):
        label = min(unknown)
        video_id = instances.video_ids[instances.video[instances.labels.index(label)]]
        more = f" ({len(unknown)} such labels in all)" if len(unknown) > 1 else ""
        raise DataError(f"{name}: {video_id}: label {label!r} is not a class{more}. {did_you_mean(label, classes)}")
    assert instances.scores is not None
    order = np.lexsort((-instances.scores, instances.video))
    ends = np.cumsum(np.bincount(instances.video, minlength=len(instances.video_ids)))
    parts = np.split(order, ends[:-1]) if len(ends) else []
    return {
        video_id: Detections(
            segments_sec=instances.segments[rows],
            labels=tuple(instances.labels[i] for i in rows),
            scores=instances.scores[rows],
        )
        for video_id, rows in zip(instances.video_ids, parts, strict=True)
    }


def load(source: str | os.PathLike[str] | Mapping[str, Any], field: str) -> tuple[Mapping[str, Any], str]:
    """Return the parsed content of `source` and the name that errors give it; `content[field]` is a mapping.

    Raises:
        DataError: file missing or unreadable, no json, or `field` missing or no mapping.
    """
    if isinstance(source, Mapping):
        content, name = source, f"the {field} given"
    else:
        name = os.fspath(source)
        content = read_json(name)
    if not isinstance(content, Mapping) or not isinstance(content.get(field), Mapping):
        found = f"its keys are {sorted(map(str, content))[:10]}" if isinstance(content, Mapping) else "it is no mapping"
        raise DataError(f"{name}: expected ActivityNet form, {{{field!r}: {{video id: …}}}}; {found}.")
    return content, name


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the content of a json file.

    Raises:
        DataError: missing, unreadable, or no json.
    """
    collecting = gc.isenabled()
    gc.disable()  # json makes no cycles, and collecting among half a million dictionaries triples the time
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise DataError(f"{os.fspath(path)}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{os.fspath(path)}: is no json: {error}.") from error
    finally:
        if collecting:
            gc.enable()


def columns(videos: Mapping[str, Entries], name: str, *, scored: bool) -> Instances:
    """Return the entries of all videos as columns.

    Numbers may be written as text ("18.6"), as one public THUMOS-14 file does.

    Raises:
        DataError: an entry lacks a field, has a label that is no text, or a number that is none or not finite;
            `name`, video id, entry and value are named.
    """
    try:
        counts = np.array([len(entries) for entries in videos.values()], np.int64)
        entries = list(chain.from_iterable(videos.values()))
        labels = [entry["label"] for entry in entries]
        segments = np.array([entry["segment"] for entry in entries], np.float64).reshape(-1, 2)
        scores = np.array([entry["score"] for entry in entries], np.float64) if scored else np.zeros(len(entries))
        sound = segments.shape == (len(entries), 2) and scores.shape == (len(entries),)
        sound = sound and all(issubclass(kind, str) for kind in set(map(type, labels)))
        sound = sound and bool(np.isfinite(segments).all() and np.isfinite(scores).all())
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        sound = False
    if not sound:
        _raise_first_fault(videos, name, scored)
    return Instances(
        video_ids=tuple(videos),
        video=np.repeat(np.arange(len(counts)), counts),
        segments=segments,
        labels=labels,
        scores=scores if scored else None,
    )


def _raise_first_fault(videos: Mapping[str, Any], name: str, scored: bool) -> NoReturn:
    for video_id, entries in videos.items():
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise DataError(f"{name}: {video_id}: expected a list of entries, not {entries!r:.80}.")
        for number, entry in enumerate(entries):
            if fault := _fault(entry, scored):
                raise DataError(f"{name}: {video_id}: entry {number} {fault}; the entry is {entry!r:.200}.")
    raise DataError(f"{name}: entries are malformed.")


def _fault(entry: Any, scored: bool) -> str | None:
    if not isinstance(entry, Mapping):
        return "is no mapping"
    for field in ("segment", "label", *(["score"] if scored else [])):
        if field not in entry:
            return f"lacks {field!r}"
    if not isinstance(entry["label"], str):
        return f"has label {entry['label']!r}; expected text"
    segment = entry["segment"]
    if isinstance(segment, str) or not isinstance(segment, (Sequence, np.ndarray)) or len(segment) != 2:
        return f"has segment {segment!r}; expected [start, end]"
    for what, value in (("start", segment[0]), ("end", segment[1]), *([("score", entry["score"])] if scored else [])):
        if not _is_finite(value):
            return f"has {what} {value!r}; expected a finite number"
    return None


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (Real, str)) and bool(np.isfinite(float(value)))
    except (ValueError, OverflowError):
        return False


def _entries(video_id: str, detections: Detections) -> list[dict[str, Any]]:
    segments = check_segments(detections.segments_sec, f"detections of {video_id}")
    scores = np.asarray(detections.scores, np.float64)
    if not np.isfinite(scores).all():
        raise DataError(f"detections of {video_id}: {int((~np.isfinite(scores)).sum())} scores are not finite.")
    return [
        {"segment": segment, "label": label, "score": score}
        for segment, label, score in zip(segments.tolist(), detections.labels, scores.tolist(), strict=True)
    ]
