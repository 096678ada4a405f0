"""The video files below a folder, and which of them a name means, however an annotation writes it.

An annotation may name `day 1/v_clip.mp4` by path, of this machine or another (`D:\\study\\day 1\\v_clip.mp4`), with
or without extension, with or without "v_". Names that are not UTF-8 are found by their bytes; ids are always text.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from re2tal_jax.data.dataset import SUFFIXES
from re2tal_jax.errors import DataError

VIDEO_SUFFIXES = (*SUFFIXES, ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv")
"""What counts as a video; of several files with one name the first of these is taken."""

_DRIVE = re.compile(r"[A-Za-z]:")


class VideoFolder:
    """The video files below a folder, from one scan.

    Attributes:
        root: the folder.
        files: paths relative to it, with forward slashes, sorted. Hidden files and folders are left out.
    """

    def __init__(self, root: str | Path):
        """Scan the folder and those below it, links followed, each folder once.

        Raises:
            DataError: it does not exist.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"Video folder {self.root} does not exist (option videos).")
        self.files = tuple(sorted(_scan(self.root, "", set())))
        self._named: defaultdict[str, list[str]] = defaultdict(list)
        self._called: defaultdict[str, list[str]] = defaultdict(list)
        for file in self.files:
            name = _comparable(file.rpartition("/")[2])
            self._named[name].append(file)
            self._called[without_suffix(name)].append(file)

    def find(self, name: str) -> str | None:
        """Return the file (one of `files`) that a name means, or None.

        Folders in the name have to be those of the file as far as both have any. The name as it stands goes before a
        "v_" more or less, and the file with most folders in common before others.

        Raises:
            DataError: several files, and nothing in the name says which.
        """
        *folders, last = [_comparable(part) for part in split_name(name)] or [""]
        bare = without_suffix(last)
        for files in (
            self._named.get(last, []),
            self._called.get(last, []),
            self._called.get(bare, []),
            self._called.get(f"v_{bare}", []),
            self._called.get(bare.removeprefix("v_"), []),
        ):
            ranked = [(rank, file) for file in files if (rank := _agreement(folders, file)) is not None]
            if ranked:
                best = max(rank for rank, _ in ranked)
                return self._one_of(name, [file for rank, file in ranked if rank == best])
        return None

    def path(self, file: str) -> Path:
        """Return the path of one of `files`."""
        return self.root / file

    def _one_of(self, name: str, files: list[str]) -> str:
        if len({without_suffix(file) for file in files}) > 1:
            shown = ", ".join(printable(file) for file in files[:3])
            raise DataError(
                f"{self.root}: '{printable(name)}' may mean {len(files)} files ({shown}): write its folder, too, in "
                "the annotation."
            )
        return min(files, key=_suffix_rank)


def video_id(file: str) -> str:
    """Return the id of a video file: its path below the folder without extension, as text that can be printed."""
    return printable(without_suffix(file))


def split_name(name: str) -> list[str]:
    """Return the parts of a name that an annotation gives a video, without drive and what leads upwards."""
    parts = [part for part in name.strip().replace("\\", "/").split("/") if part not in ("", ".")]
    while ".." in parts:
        parts = parts[parts.index("..") + 1 :]
    return [part for part in parts if not _DRIVE.fullmatch(part)]


def without_suffix(name: str) -> str:
    """Return a name without the extension of a video; other dots stay."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in VIDEO_SUFFIXES else name


def printable(name: str) -> str:
    """Return a file name as text: bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace") if _escaped(name) else name


def _escaped(name: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in name)


def _scan(root: Path, below: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    try:
        yield from _scan_one(root, below, seen)
    except OSError as error:
        raise DataError(
            f"Folder {error.filename or root / below} cannot be read: {error.strerror}. Allow it, or name the folders "
            "beside it."
        ) from error


def _scan_one(root: Path, below: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    status = (root / below).stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(root / below) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _scan(root, f"{below}{entry.name}/", seen)
            elif os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES:
                yield f"{below}{entry.name}"


def _comparable(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS writes accents apart, spreadsheets do not


def _agreement(folders: list[str], file: str) -> tuple[bool, int] | None:
    """Return (the same, how many last folders are) for a name's folders and a file's, or None if they contradict."""
    own = [_comparable(part) for part in file.split("/")[:-1]]
    common = min(len(folders), len(own))
    if common and folders[-common:] != own[-common:]:
        return None
    return folders == own, common


def _suffix_rank(file: str) -> int:
    return VIDEO_SUFFIXES.index(os.path.splitext(file)[1].lower())
