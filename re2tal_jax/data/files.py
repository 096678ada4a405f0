"""The file of each video in a folder, whatever the files hold: videos, or features of them."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from re2tal_jax.errors import DataError


def spellings(video_id: str) -> tuple[str, ...]:
    """Return the names under which a video is looked for, best first: its id, with "v_" before it, without."""
    return tuple(dict.fromkeys((video_id, f"v_{video_id}", video_id.removeprefix("v_"))))


def find_files(
    folder: str | Path, video_ids: Iterable[str], suffixes: Sequence[str], *, what: str, option: str
) -> dict[str, Path]:
    """Return the file of every id that has one, from a single scan of the folder (no call per video).

    Args:
        folder: what is scanned, without its sub-folders.
        video_ids: a name equal to the id goes before one with a "v_" more or less.
        suffixes: lower case; of several files of one name the earliest suffix wins.
        what: what the folder is, for the error.
        option: what names it, for the error.

    Raises:
        DataError: the folder does not exist.
    """
    folder, rank = Path(folder), {suffix: place for place, suffix in enumerate(suffixes)}
    if not folder.is_dir():
        raise DataError(f"{what} {folder} does not exist (option {option}).")
    files: dict[str, tuple[int, str]] = {}
    with os.scandir(folder) as entries:
        for name in (entry.name for entry in entries):
            stem, suffix = os.path.splitext(name)
            place = rank.get(suffix.lower())
            if place is not None and (stem not in files or (place, name) < files[stem]):
                files[stem] = (place, name)
    found = {}
    for video_id in video_ids:
        name = next((files[n][1] for n in spellings(video_id) if n in files), None)
        if name is not None:
            found[video_id] = folder / name
    return found
