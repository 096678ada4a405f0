"""A checkpoint file read whole, in shards or from its folder; what it is, its content says, never its suffix."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from re2tal_jax.errors import CheckpointError
from re2tal_jax.torch_files.containers import read_legacy, read_safetensors, read_zip
from re2tal_jax.torch_files.unpickle import Unpickled


@dataclass(frozen=True)
class Source:
    """What a checkpoint file holds.

    path: the file that was read, in a folder the one that was found there.
    tree: nested dicts, lists and scalars as in the file, with `Tensor` leaves that are read on demand.
    format: "safetensors", "torch zip" or "torch legacy", with the number of shards where there are several.
    placeholders: dotted names of every foreign class or function, none of which was loaded.
    sha256: of the whole file; of several shards, of their names and digests.
    """

    path: Path
    tree: Any
    format: str
    placeholders: tuple[str, ...]
    sha256: str

    @property
    def shard(self) -> str:
        """A sentence where the file is but one of several by its name, else nothing."""
        match = SHARD.search(self.path.name)
        if match is None or int(match[2]) < 2:
            return ""
        return f"{self.path.name} is one shard of {int(match[2])}: name their folder, or the index ({INDEX}) in it"


READERS: Mapping[str, Callable[[Path], Unpickled]] = {
    "safetensors": read_safetensors,
    "torch zip": read_zip,
    "torch legacy": read_legacy,
}
ZIP = b"PK\3\4"
# How files begin that are often taken for checkpoints: (offset, beginning in lower case, what it is, what to do).
OTHERS = (
    (0, b"version https://git-lfs", "a git-LFS pointer, not the file itself", "Fetch it with `git lfs pull`."),
    (0, b"<", "an HTML or XML page saved under this name", "Download the file itself; the server sent a page instead."),
    (0, b"\x1f\x8b", "a gzip archive", "Unpack it."),
    (0, b"\xfd7zxz", "an xz archive", "Unpack it."),
    (0, b"bzh", "a bzip2 archive", "Unpack it."),
    (0, b"rar!", "a rar archive", "Unpack it."),
    (0, b"7z\xbc\xaf", "a 7z archive", "Unpack it."),
    (0, b"\x89hdf", "an HDF5 file", "Allowed are PyTorch's files: .pth, .bin, .safetensors and the like."),
    (
        257,
        b"ustar",
        "a tar archive",
        "Unpack it; if sys_info, pickle and storages are in it, it is of torch before 0.1.10: load it with torch.load "
        "and save it again.",
    ),
)


SHARD = re.compile(r"-(\d+)-of-(\d+)\.")
INDEX = ".index.json"
HUGGING_FACE = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX))


def read(path: str | os.PathLike[str]) -> Source:
    """Read a checkpoint; the file must stay where it is for as long as its tensors are wanted.

    Args:
        path: a file; or as Hugging Face has it, a folder with `model.safetensors`, `pytorch_model.bin` or shards of
            them, or the index of the shards.

    Raises:
        RunsCodeError: it tries to run code; nothing of it was executed.
        CheckpointError: it is missing, damaged or no checkpoint; the text names the file and what was found.
    """
    path = Path(path)
    path = next((path / name for name in HUGGING_FACE if (path / name).is_file()), path)
    return _read_shards(path) if path.name.endswith(INDEX) else _read_file(path)


def _read_shards(index: Path) -> Source:
    """Return the union of the files that an index names, each key in the file where the index has it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of shards, whose `weight_map` names a file for each key."
        ) from error
    odd = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if odd or not names:
        raise CheckpointError(f"{index} names {odd[0] if odd else 'no file'}: allowed are files of its own folder.")
    shards = {name: _read_file(index.with_name(name)) for name in names}
    tree = {}
    for name, shard in shards.items():
        held = shard.tree if isinstance(shard.tree, dict) else {}
        wanted = {key for key, place in places.items() if place == name}
        if held.keys() != wanted:
            key = sorted(map(str, held.keys() ^ wanted))[0]
            raise CheckpointError(f"{index.with_name(name)} and {index.name} disagree about {key}: copy both again.")
        tree |= held
    formats = ", ".join(sorted({shard.format for shard in shards.values()}))
    placeholders = sorted({name for shard in shards.values() for name in shard.placeholders})
    digests = "".join(f"{name} {shard.sha256}\n" for name, shard in shards.items())
    digest = hashlib.sha256(digests.encode()).hexdigest()
    return Source(index, tree, f"{len(shards)} shards, {formats}", tuple(placeholders), digest)


def _read_file(path: Path) -> Source:
    try:
        kind = _recognise(path)
        tree, placeholders = READERS[kind](path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    return Source(path, tree, kind, tuple(sorted(placeholders)), digest)


def _recognise(path: Path) -> str:
    """Return the format of a file by how it begins."""
    if path.is_dir():
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{path} is a directory: name the file in it. It holds {inside}.")
    if not path.is_file():
        raise CheckpointError(
            f"{path}: there is no such file." if not path.exists() else f"{path} is no ordinary file."
        )
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path}: the file is empty: copy it again.")
    for offset, beginning, what, fix in OTHERS:
        if (head.lstrip(b"\xef\xbb\xbf \t\r\n") if beginning == b"<" else head)[offset:].lower().startswith(beginning):
            raise CheckpointError(f"{path}: {what}. {fix}")
    if head.startswith(ZIP):
        return "torch zip"
    # the length of a JSON header, far below 2**48, then the header
    if head[6:9] == b"\0\0{":
        return "safetensors"
    return "torch legacy"
