"""A prepared directory as a data set: `python -m re2tal_jax.data.tfds_builders` makes one (docs/prepared_data.md).

Annotation, classes and ground truth come from its metadata; a video's bytes are read by their place in it when a window
is decoded, in the process that decodes.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from re2tal_jax.data.dataset import Dataset, open_dataset
from re2tal_jax.data.tfds_builders.contents import NAME, VERSION, Stored, read_metadata
from re2tal_jax.data.video_source import VideoInfo, VideoSource
from re2tal_jax.errors import DataError

METADATA = "metadata.json"
_COMMAND = "python -m re2tal_jax.data.tfds_builders --config FILE --out DIR"


@dataclass(frozen=True)
class PreparedVideo(VideoSource):
    """One record of a prepared directory."""

    directory: Path
    stored: Stored

    def __str__(self) -> str:
        return f"{self.directory}, record {self.stored.index} of split {self.stored.split}"

    def info(self) -> VideoInfo | None:
        """Return what the file said when it was prepared; None if it could not be read then."""
        return self.stored.info

    @property
    def kept_in(self) -> Path:
        """The metadata: a directory is written as a whole."""
        return self.directory / METADATA

    def read(self) -> bytes:
        """Return the bytes of the video's file.

        Raises:
            DataError: the record is missing or damaged.
        """
        try:
            example = _split(self.directory, self.stored.split)[self.stored.index]
        except Exception as error:  # neither array_record nor protobuf says what it raises of damaged bytes
            reason = (str(error).splitlines() or [""])[0]
            raise DataError(
                f"{self}: cannot be read ({reason[:200]}): the file of records is missing or damaged. Copy the "
                "directory again."
            ) from error
        if example["video_id"].decode() != self.stored.video_id:
            raise DataError(
                f"{self}: holds the video {example['video_id'].decode()!r}: files of another prepared directory were "
                "copied into this one. Copy it again."
            )
        return example["video"]


def prepared(
    *,
    root: str,
    subset: str | tuple[str, ...],
    training: bool = False,
    min_length_ratio: float = 0.0,
    class_agnostic: bool = False,
    blocked: str | tuple[str, ...] | None = None,
    unlabelled: bool = False,
) -> Dataset:
    """Open a subset of a prepared directory; its other arguments are as in `open_dataset`.

    Args:
        root: the directory that the command made, on a disk or where a bucket is mounted.
        subset: as the data set that was prepared names it.

    Raises:
        DataError: no prepared directory, one of another version, an incomplete copy, a subset that is not in it.
    """
    directory = find_directory(Path(root))
    annotations, stored = read_metadata(directory, _metadata(directory))
    dataset = open_dataset(
        annotations,
        subset=subset,
        training=training,
        min_length_ratio=min_length_ratio,
        class_agnostic=class_agnostic,
        blocked=blocked,
        unlabelled=unlabelled,
    )
    chosen = {record.video_id: stored[record.video_id] for record in dataset.records}
    check_records(directory, list(stored.values()), {place.split for place in chosen.values()})
    sources = {video_id: PreparedVideo(directory, place) for video_id, place in chosen.items()}
    return dataclasses.replace(dataset, video_sources=sources)


def find_directory(root: Path) -> Path:
    """Return the folder of this version's records in a prepared directory.

    Raises:
        DataError: there is none; other versions, or a run that was not finished, are named.
    """
    found = root / NAME / VERSION
    if (found / "dataset_info.json").is_file():
        return found
    if not root.is_dir():
        raise DataError(f"Prepared directory {root} does not exist (option root). Made by: {_COMMAND}")
    others = sorted(path.parent.name for path in (root / NAME).glob("*/dataset_info.json"))
    if others:
        raise DataError(
            f"{root} was prepared by version {', '.join(others)}, this one reads {VERSION}: prepare it again, into "
            "another directory."
        )
    if (root / NAME).is_dir():
        raise DataError(f"{root} is not finished: give the command that makes it again, it goes on: {_COMMAND}")
    raise DataError(f"{root} is no prepared directory, it has no folder {NAME} (option root). Made by: {_COMMAND}")


def check_records(directory: Path, stored: Sequence[Stored], splits: set[str]) -> None:
    """Look for the files of splits, and count their records; nothing of them is read.

    Raises:
        DataError: a file is missing, or there are more or fewer records than videos.
    """
    known = _builder(directory).info.splits
    for split in sorted(splits):
        videos = sum(place.split == split for place in stored)
        if split not in known or known[split].num_examples != videos:
            count = known[split].num_examples if split in known else 0
            raise DataError(
                f"{directory}: split {split} has {count} records for {videos} videos: dataset_info.json and "
                "metadata.json are of different directories. Copy it again."
            )
        missing = [Path(path).name for path in known[split].filepaths if not Path(path).is_file()]
        if missing:
            raise DataError(
                f"{directory}: {len(missing)} of {len(known[split].filepaths)} files of split {split} are missing, "
                f"such as {missing[0]}: copy the directory again."
            )


def _metadata(directory: Path) -> Mapping[str, Any]:
    path = directory / METADATA
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Copy the directory again.") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}): copy or prepare the directory again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON object is needed: copy or prepare the directory again.")
    return content


@cache
def _split(directory: Path, split: str) -> Sequence[Mapping[str, Any]]:
    """Return the records of a split, opened once in each process that reads."""
    return _builder(directory).as_data_source(split)


def _builder(directory: Path) -> Any:
    import tensorflow_datasets as tfds  # other data sets do without it

    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # json, protobuf and tfds raise what they like of damaged descriptions
        raise DataError(f"{directory}: its descriptions cannot be read ({error!r:.200}): copy it again.") from error


VARIANTS = {"prepared": prepared}
