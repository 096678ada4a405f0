"""What a prepared directory holds: metadata, which make it complete, made of data sets and read back.

The metadata are one JSON object:

    {"format": 1, "source": "thumos14", "classes": ["BaseballPitch", …],
     "subsets": {"training": {"split": "training",
                              "findings": {"past_end": [3, ["video_validation_0000051", …]]},
                              "ground_truth": {"database": {…}},
                              "videos": [{"video_id", "duration_sec", "num_frames", "fps", "segments_sec", "labels",
                                          "suffix", "bytes", "file": {"num_frames", "fps", "duration_sec", …} | null},
                                         …]}}}

Record number i of a split is the file of video number i. `num_frames` and `fps` are what the annotation says, `file` is
what the file says, null where it cannot be read: the loader then meets the same bytes, and treats them the same.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from re2tal_jax.data.annotations import Annotations, Entry
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.findings import Findings
from re2tal_jax.data.video_source import VideoInfo
from re2tal_jax.errors import DataError
from re2tal_jax.types import VideoRecord

NAME = "prepared_videos"
"""Of the builder, and of the folder that it makes in the directory."""

VERSION = "1.0.0"
"""Of the builder, and of the folder below `NAME`; its first number counts changes to what is written."""

FORMAT = 1

_SPLIT = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A video to be written, all paths and numbers; it may travel to another machine.

    `record` is the annotation, `label_names` its labels in words, `info` what the file says, or None, `size` its bytes,
    `changed_ns` when it was last written to.
    """

    record: VideoRecord
    label_names: tuple[str, ...]
    path: Path
    size: int
    changed_ns: int
    info: VideoInfo | None


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a video lies in the prepared directory, and what its file said when it was written."""

    video_id: str
    split: str
    index: int
    info: VideoInfo | None


def plan_jobs(dataset: Dataset, infos: Mapping[Path, VideoInfo | None]) -> tuple[Job, ...]:
    """Return the videos of a subset in the order of its annotation.

    Raises:
        DataError: a file that is gone.
    """
    return tuple(_job(record, dataset, infos) for record in dataset.records)


def split_names(subsets: Sequence[str]) -> dict[str, str]:
    """Return the split of each subset: its own name, or a number where a file name could not hold one of the names."""
    plain = all(_SPLIT.fullmatch(name) and name.lower() != "all" for name in subsets)
    plain = plain and len({name.lower() for name in subsets}) == len(subsets)  # file systems that know no case
    return {name: name if plain else f"subset_{number}" for number, name in enumerate(subsets)}


def make_metadata(source: str, datasets: Mapping[str, Dataset], jobs: Mapping[str, Sequence[Job]]) -> dict[str, Any]:
    """Return the metadata of subsets by name."""
    splits = split_names(list(datasets))
    return {
        "format": FORMAT,
        "source": source,
        "classes": list(next(iter(datasets.values())).classes),
        "subsets": {
            name: {
                "split": splits[name],
                "findings": {
                    kind: [n, dataset.findings.examples.get(kind, [])] for kind, n in dataset.findings.items()
                },
                "ground_truth": dict(dataset.ground_truth),
                "videos": [_video(job) for job in jobs[name]],
            }
            for name, dataset in datasets.items()
        },
    }


def read_metadata(directory: Path, metadata: Mapping[str, Any]) -> tuple[Annotations, dict[str, Stored]]:
    """Return annotations as a file of them would give, and where each video lies, by id.

    Raises:
        DataError: metadata of another form, or damaged.
    """
    if metadata.get("format") != FORMAT:
        raise DataError(
            f"{directory}: prepared in form {metadata.get('format')!r}, this version reads form {FORMAT}: prepare it "
            "again."
        )
    try:
        records, entries, stored, findings = [], [], {}, {}
        for subset, content in metadata["subsets"].items():
            counts, examples = content["findings"], {kind: names for kind, (_, names) in content["findings"].items()}
            findings[subset] = Findings({kind: count for kind, (count, _) in counts.items()}, examples=examples)
            entries += _entries(content["ground_truth"])
            for index, video in enumerate(content["videos"]):
                records.append(_record(subset, video))
                info = None if video["file"] is None else VideoInfo(**video["file"])
                stored[video["video_id"]] = Stored(
                    video_id=video["video_id"], split=content["split"], index=index, info=info
                )
        annotations = Annotations(
            path=directory,
            records=tuple(records),
            classes=tuple(metadata["classes"]),
            findings=findings,
            entries=tuple(entries),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{directory}: its metadata.json is damaged ({error!r}): copy or prepare it again.") from error
    return annotations, stored


def _job(record: VideoRecord, dataset: Dataset, infos: Mapping[Path, VideoInfo | None]) -> Job:
    path = dataset.video_paths[record.video_id]
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"Video {record.video_id!r}: {path}: cannot be read: {error.strerror}.") from error
    return Job(
        record=record,
        label_names=tuple(dataset.classes[label] for label in record.labels.tolist()),
        path=path,
        size=status.st_size,
        changed_ns=status.st_mtime_ns,
        info=infos[path],
    )


def _video(job: Job) -> dict[str, Any]:
    record = job.record
    return {
        "video_id": record.video_id,
        "duration_sec": record.duration_sec,
        "num_frames": record.num_frames,
        "fps": record.fps,
        "segments_sec": record.segments_sec.tolist(),
        "labels": record.labels.tolist(),
        "suffix": job.path.suffix.lower(),
        "bytes": job.size,
        "file": None if job.info is None else dataclasses.asdict(job.info),
    }


def _record(subset: str, video: Mapping[str, Any]) -> VideoRecord:
    return VideoRecord(
        video_id=video["video_id"],
        subset=subset,
        duration_sec=video["duration_sec"],
        num_frames=video["num_frames"],
        fps=video["fps"],
        segments_sec=np.array(video["segments_sec"], np.float64).reshape(-1, 2),
        labels=np.array(video["labels"], np.int64),
    )


def _entries(ground_truth: Mapping[str, Any]) -> Iterator[Entry]:
    for video_id, video in ground_truth["database"].items():
        segments = [(*annotation["segment"], annotation["label"]) for annotation in video["annotations"]]
        yield Entry(video_id, video["subset"], video["duration"], None, None, segments)
