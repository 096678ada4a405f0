"""Which file each encoded video was made of, kept beside the videos: another one of the same name is noticed."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from re2tal_jax.data.video_folder import printable
from re2tal_jax.errors import DataError

SOURCES = "prepare_sources.jsonl"
"""The file in the output folder that tells what each video was made of, a line for each."""

_HEAD = 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a video was made of, and what had to be mended.

    source: its path; files may be moved, so it is what errors say and no more.
    size, head: of the source, in bytes, and SHA-256 of its first MiB.
    jumps: where its timestamps jumped, in words.
    """

    source: str
    size: int
    head: str
    jumps: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Path, jumps: Iterable[object] = ()) -> "Made":
        """Return what tells this source from others, from its first MiB."""
        with source.open("rb") as file:
            head = hashlib.sha256(file.read(_HEAD)).hexdigest()
        return cls(source=str(source.absolute()), size=source.stat().st_size, head=head, jumps=tuple(map(str, jumps)))


class Record:
    """What the videos of a folder were made of; each line is written when its video is whole."""

    def __init__(self, folder: Path):
        """Read what is there; a line that a kill cut short is of no use, and its video counts as one that is there."""
        self._folder, self._path = folder, folder / SOURCES
        self._made = dict(_lines(self._path))

    def add(self, target: Path, made: Made) -> None:
        """Write what a video was made of."""
        name = self._name(target)
        self._made[name] = made
        line = json.dumps({"video": name, **dataclasses.asdict(made)}) + "\n"
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else "\n" + line  # a kill cut the last one short
            file.write(line.encode())

    def jumps(self, target: Path) -> tuple[str, ...]:
        """Return where the timestamps of a video's source jumped."""
        made = self._made.get(self._name(target))
        return () if made is None else made.jumps

    def check(self, source: Path, target: Path) -> None:
        """Raise DataError if the video is there, made of another file than this one.

        A file that was moved is the same: where the path differs size and first MiB decide.
        """
        made = self._made.get(self._name(target))
        if made is None or not target.exists() or not source.exists():
            return
        size = source.stat().st_size
        same_place = made.source == str(source.absolute())
        if size == made.size and (same_place or Made.of(source).head == made.head):
            return
        there, mine = printable(str(target)), printable(str(source))
        if same_place:
            raise DataError(
                f"{mine} has changed since {there} was made of it ({made.size:,} bytes then, {size:,} now): delete "
                f"{there}, and the same command encodes it again."
            )
        raise DataError(
            f"{mine} and {printable(made.source)} would both be {there}, which is made of the second: name another "
            "--out, or the folder that holds both of their folders as VIDEOS, which mirrors them."
        )

    def _name(self, target: Path) -> str:
        return target.relative_to(self._folder).as_posix()


def _lines(path: Path) -> Iterator[tuple[str, Made]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(line)
            name = fields.pop("video")
            yield name, Made(**{**fields, "jumps": tuple(fields["jumps"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
