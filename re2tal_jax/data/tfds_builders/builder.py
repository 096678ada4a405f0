"""The tensorflow-datasets builder that writes videos, shard by shard, in the order of the annotation.

It is a `ShardBasedBuilder`: a `GeneratorBasedBuilder` sorts through a buffer that needs TensorFlow above 1 GiB, and its
order would be that of hashed keys. One shard is in memory at a time, in each Beam worker where Beam is used.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer

from re2tal_jax.data.tfds_builders.contents import VERSION, Job
from re2tal_jax.errors import DataError

Example = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Videos that become one file; called, it yields them as examples. `first` is the number of the first in its split.

    `finished` is where the file lies when an earlier run finished it: its videos are then counted and not read.
    """

    jobs: tuple[Job, ...]
    first: int
    finished: Path

    def __call__(self) -> Iterator[tuple[int, Example | None]]:
        """Yield number and example of every video.

        Raises:
            DataError: a file that is gone, or not the one that was planned.
        """
        there = self.finished.exists()
        for number, job in enumerate(self.jobs, self.first):
            yield number, None if there else _example(job)


@dataclass(frozen=True)
class Told:
    """A shard that tells how many bytes of it are done."""

    shard: Shard
    advance: Callable[[int], None]

    def __call__(self) -> Iterator[tuple[int, Example | None]]:
        """Yield as the shard does; a video is done when the next is asked for."""
        for job, example in zip(self.shard.jobs, self.shard(), strict=True):
            yield example
            self.advance(job.size)


class KeptShards(writer.ExampleWriter):
    """Writes shards into a folder of their own, and links them to where tfds wants them: they outlive a run.

    tfds throws its own folder away when it is interrupted.
    """

    def __init__(self, folder: Path):
        super().__init__(tfds.core.FileFormat.ARRAY_RECORD)
        self.folder = folder

    def write(self, path: os.PathLike[str] | str, examples: Iterable[Any]) -> None:
        """Write a shard, unless it was finished before; `examples` are not asked for then."""
        kept = self.folder / Path(path).name
        if not kept.exists():
            part = kept.with_name(f".{kept.name}.{uuid.uuid4().hex}")  # Beam may start a shard twice
            try:
                super().write(part, examples)
                part.replace(kept)
            finally:
                part.unlink(missing_ok=True)
        try:
            os.link(kept, path)
        except FileExistsError:
            pass
        except OSError:  # file systems without links
            shutil.copyfile(kept, path)


class PreparedVideos(tfds.core.ShardBasedBuilder):
    """Videos as they are in their files, with what is annotated; see `contents` for the metadata.

    Example: `video` are the bytes of the file and `suffix` its container, `fps` and `num_frames` are what the file says
    (0 where it cannot be read), `duration_sec` and `segments_sec` (N, 2), in seconds, and `labels` (N,), in words, are
    what is annotated.
    """

    VERSION = tfds.core.Version(VERSION)
    url_infos: ClassVar[dict[str, Any]] = {}
    """Nothing is downloaded; tfds would look for checksums, by a package that it does not require."""

    def __init__(
        self,
        *,
        splits: Mapping[str, Sequence[Job]] | None = None,
        metadata: Mapping[str, Any] | None = None,
        unfinished: Path | None = None,
        advance: Callable[[int], None] | None = None,
        shard_bytes: int = 0,
        **options: Any,
    ):
        """Describe what is to be written; all but `options` is not needed to read.

        Args:
            splits: videos by the name of their split.
            metadata: see `contents`.
            unfinished: folder of the shards that are finished while others are not.
            advance: takes the bytes of every finished video; not with Beam.
            shard_bytes: about the size of a shard; a video is never cut.
            options: of tfds; `data_dir` is the folder in which the builder makes its own.
        """
        self._splits, self._metadata = splits or {}, dict(metadata or {})
        self._unfinished, self._advance, self._shard_bytes = unfinished, advance, shard_bytes
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        number = {"dtype": np.float64, "encoding": features.Encoding.BYTES}  # without it, 32 bits
        return tfds.core.DatasetInfo(
            builder=self,
            description="Untrimmed videos with the segments in which actions happen.",
            features=features.FeaturesDict(
                {
                    "video_id": features.Text(),
                    "subset": features.Text(),
                    "video": features.Tensor(shape=(), dtype=np.object_),
                    "suffix": features.Text(),
                    "duration_sec": features.Tensor(shape=(), **number),
                    "fps": features.Tensor(shape=(), **number),
                    "num_frames": features.Scalar(np.int64),
                    "segments_sec": features.Tensor(shape=(None, 2), **number),
                    "labels": features.Sequence(features.Text()),
                }
            ),
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: Any
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, Example | None]]]]]:
        del dl_manager
        return {name: self._shards(name, jobs) for name, jobs in self._splits.items()}

    def _shards(self, split: str, jobs: Sequence[Job]) -> list[Any]:
        assert self._unfinished is not None
        parts = divide([job.size for job in jobs], self._shard_bytes)
        template = self._get_filename_template(split_name=split)
        shards = [
            Shard(
                jobs=tuple(jobs[part.start : part.stop]),
                first=part.start,
                finished=self._unfinished / template.sharded_filepath(shard_index=index, num_shards=len(parts)).name,
            )
            for index, part in enumerate(parts)
        ]
        return [Told(shard, self._advance) for shard in shards] if self._advance else shards

    def _example_writer(self) -> writer.ExampleWriter:
        assert self._unfinished is not None
        return KeptShards(self._unfinished)


def divide(sizes: Sequence[int], limit: int) -> list[range]:
    """Return consecutive parts of at most `limit` in all, or of one; no part is empty."""
    parts, start, total = [], 0, 0
    for number, size in enumerate(sizes):
        if number > start and total + size > limit:
            parts.append(range(start, number))
            start, total = number, 0
        total += size
    return [*parts, range(start, len(sizes))]


def _example(job: Job) -> Example:
    record, info = job.record, job.info
    try:
        content = job.path.read_bytes()
    except OSError as error:
        raise DataError(f"Video {record.video_id!r}: {job.path}: cannot be read: {error.strerror}.") from error
    if len(content) != job.size:
        raise DataError(
            f"Video {record.video_id!r}: {job.path}: had {job.size} bytes and now has {len(content)}: is it being "
            "written? Give the command again when it is whole."
        )
    return {
        "video_id": record.video_id,
        "subset": record.subset,
        "video": content,
        "suffix": job.path.suffix.lower(),
        "duration_sec": record.duration_sec,
        "fps": 0.0 if info is None else info.fps,
        "num_frames": 0 if info is None else info.num_frames,
        "segments_sec": record.segments_sec,
        "labels": list(job.label_names),
    }
