"""Features as they are published: an array for each video, in npy, npz or pt files or in one HDF5 file.

Nothing that a file says is run: npy and npz are read without pickles, pt by our own reader, which knows tensors only.
"""

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from re2tal_jax.data.files import find_files, spellings
from re2tal_jax.errors import CheckpointError, ConfigError, DataError, did_you_mean
from re2tal_jax.torch_files import Tensor, read

SUFFIXES = (".npy", ".npz", ".pt", ".pth")
HDF5 = (".h5", ".hdf5")


@dataclass(frozen=True)
class Place:
    """Where the features of one video are: a file, and in an HDF5 file the name of the data set."""

    path: Path
    name: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.name is None else f"{self.path}[{self.name!r}]"


def find_features(folder: str, video_ids: Iterable[str]) -> dict[str, Place]:
    """Return where the features of every id are that has some.

    Args:
        folder: with <id>.npy, .npz, .pt or .pth, or one HDF5 file; ids with or without "v_" before them.
        video_ids: which to look for.

    Raises:
        DataError: no such folder, or an HDF5 file that cannot be read.
        ConfigError: an HDF5 file, and h5py is not installed.
    """
    check_folder(folder)
    if Path(folder).suffix.lower() not in HDF5:
        ids = list(video_ids)
        found = find_files(folder, ids, SUFFIXES, what="Feature folder", option="features.folder")
        for video_id in (i for i in ids if "/" in i):  # below it: the scan is of the folder alone
            paths = (Path(folder) / f"{video_id}{suffix}" for suffix in SUFFIXES)
            path = next((path for path in paths if path.is_file()), None)
            found |= {} if path is None else {video_id: path}
        return {video_id: Place(path) for video_id, path in found.items()}
    path = Path(folder)
    with _open_hdf5(path) as file:
        names = set(file)
    places = {}
    for video_id in video_ids:
        name = next((n for n in spellings(video_id) if n in names), None)
        if name is not None:
            places[video_id] = Place(path, name)
    return places


def check_folder(folder: str) -> None:
    """Raise DataError unless a folder of features, or an HDF5 file, is there; nothing in it is read."""
    path = Path(folder)
    one_file = path.suffix.lower() in HDF5
    if path.is_file() if one_file else path.is_dir():
        return
    what = "Feature file" if one_file else "Feature folder"
    state = "does not exist" if not path.exists() else "is a folder" if one_file else "is no folder"
    out = f"{path.with_suffix('')}, and name that folder" if one_file else folder
    raise DataError(
        f"{what} {folder} {state} (option features.folder). Extract features from the videos, with a config that has "
        f"a backbone: python -m re2tal_jax.main --config FILE --mode extract --out {out}; or fetch published ones: "
        "docs/features.md."
    )


def read_features(place: Place, *, key: str | None = None, channels_first: bool = False) -> np.ndarray:
    """Return the array (L, C) of one video as it is stored; of npy files only what is used is read later.

    Args:
        place: see `find_features`.
        key: which array, where a file (of HDF5, a group) holds several.
        channels_first: the file has (C, L).

    Raises:
        DataError: no such file, a damaged one, one that holds something else; the text names it and what was found.
    """
    try:
        array = _READERS[place.path.suffix.lower()](place, key)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place}: its features cannot be read: {error}. Copy or make the file again.") from error
    if array.ndim != 2 or not all(array.shape):
        raise DataError(f"{place}: the array has shape {array.shape}; expected (rows, channels), both at least 1.")
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise DataError(f"{place}: the array is of {array.dtype}; expected numbers.")
    return array.T if channels_first else array


def _read_npy(place: Place, key: str | None) -> np.ndarray:
    if key is not None:
        raise DataError(f"{place}: an npy file holds one array, without a name: set features.key = None.")
    return np.load(place.path, mmap_mode="r", allow_pickle=False)


def _read_npz(place: Place, key: str | None) -> np.ndarray:
    # opened here: of a path numpy would leave it open where it is no archive
    with place.path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(f"{place}: it is a single array, as npy files are: name it so.")
        return archive[_choose(place, archive.files, key)]


def _read_pt(place: Place, key: str | None) -> np.ndarray:
    try:
        tree = read(place.path).tree
        if isinstance(tree, dict):
            tensors = {str(name): value for name, value in tree.items() if isinstance(value, Tensor)}
            tree = tensors[_choose(place, list(tensors), key)]
        if not isinstance(tree, Tensor):
            raise DataError(f"{place}: it holds a {type(tree).__name__}; expected a tensor, or a dict of tensors.")
        return tree.array()
    except CheckpointError as error:  # names the file, and what to do
        raise DataError(str(error)) from error


def _read_hdf5(place: Place, key: str | None) -> np.ndarray:
    with _open_hdf5(place.path) as file:
        node = file[str(place.name)]
        if hasattr(node, "keys"):
            node = node[_choose(place, list(node.keys()), key)]
        return np.asarray(node[()])


def _choose(place: Place, names: list[str], key: str | None) -> str:
    """Return the name of the array to take."""
    if key is None and len(names) == 1:
        return names[0]
    if key is None:
        raise DataError(f"{place}: it holds {len(names)} arrays ({', '.join(names[:8])}): name one as features.key.")
    if key not in names:
        raise DataError(f"{place}: no array is called {key!r} (features.key). {did_you_mean(key, names)}")
    return key


def _open_hdf5(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ConfigError(f"{path}: reading HDF5 needs h5py: pip install -e '.[h5]' in the checkout.") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: no HDF5 file, or a damaged one ({error}).") from error


_READERS = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
    ".pth": _read_pt,
    **dict.fromkeys(HDF5, _read_hdf5),
}
