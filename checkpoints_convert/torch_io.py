"""Checkpoint files: reading them safely and without torch, choosing the weights in them, writing them.

What a file is, its content says, never its suffix. Reading never imports or calls what a file names; what it holds
beside tensors and plain Python values is listed by name (`Source.placeholders`).
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from checkpoints_convert.containers import read_legacy, read_safetensors, read_zip
from checkpoints_convert.pickle_names import Placeholder
from checkpoints_convert.torch_tensors import Tensor
from checkpoints_convert.unpickle import Unpickled
from re2tal_jax.errors import CheckpointError, did_you_mean


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


# Averaged weights first, for they are what was evaluated; then the names of the trainers that we know, of which a file
# has one; a file that is itself a state dict has no name.
PREFERRED = (
    "state_dict_ema",  # OpenTAD, ActionFormer, timm
    "ema_state_dict",  # but see `_swapped`
    "model_ema",  # torchvision, VideoMAE
    "model_ema.module",
    "ema.module",
    "ema.state_dict",
    "ema_model",
    "ema",
    "state_dict",  # mmengine, Lightning, Video-Swin-Transformer
    "model_state",  # PySlowFast, pytorchvideo
    "model_state_dict",
    "model",  # VideoMAE
    "module",  # DeepSpeed, VideoMAEv2
    "",
)
DEPTH = 3  # levels below the root; ("ema.module" is at the second)
OPTIMIZER = ("optim", "sched", "scaler")  # parts of the names of what is no model
OPTIMIZER_KEYS = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg"})
SPECIAL_TENSORS = "torch._utils._rebuild_"  # sparse, quantized and others, by the functions that would make them
NUMPY_ARRAYS = tuple(
    f"numpy.{core}.{function}"
    for core in ("core", "_core")
    for function in ("multiarray._reconstruct", "numeric._frombuffer")
)


def state_dicts(tree: Any) -> dict[str, dict[str, Tensor]]:
    """Return every dict of a tree that holds tensors for the most part, by its path ("" for the tree itself)."""
    return {path: _tensors(found) for path, found in _candidates(tree)}


def choose_state_dict(tree: Any, which: str | None = None) -> tuple[str, dict[str, Tensor]]:
    """Return path and tensors of the state dict that holds the weights.

    Averaged weights are preferred to plain ones; an optimizer's state is never chosen.

    Args:
        tree: that of a `Source`.
        which: its path, where the choice is not to be made here.

    Raises:
        CheckpointError: there is none, there are several of unknown names, or none is called `which`.
    """
    found = {path: entries for path, entries in _candidates(tree) if not _of_optimizer(path, entries)}
    if not found:
        raise CheckpointError(
            f"There is no state dict in the file; it holds {_describe(tree)}. Save model.state_dict() instead."
        )
    if which is not None and which not in found:
        raise CheckpointError(f"There is no state dict {which!r} in the file. {did_you_mean(which, found)}")
    path = which if which is not None else _preferred(found)
    for key, value in found[path].items():
        if _is_special(value, (SPECIAL_TENSORS, *NUMPY_ARRAYS)):  # not to be lost in silence
            raise CheckpointError(
                f"{key} is an array that is not read ({value.name}): save it as a dense torch.Tensor."
            )
    return path, _tensors(found[path])


def _candidates(
    tree: Any, path: tuple[str, ...] = (), seen: dict[int, bool] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what looks like a state dict; a dict that stands in many places, or in itself, is looked into once."""
    if not isinstance(tree, dict):
        return
    seen = {} if seen is None else seen
    is_new = id(tree) not in seen
    if is_new:
        tensors = sum(isinstance(value, Tensor) or _is_special(value) for value in tree.values())
        seen[id(tree)] = tensors * 2 > len(tree) and all(isinstance(key, str) for key in tree)
    if seen[id(tree)]:
        yield ".".join(path), tree
    if is_new and len(path) < DEPTH:
        for key, value in tree.items():
            if isinstance(key, str):
                yield from _candidates(value, (*path, key), seen)


def _tensors(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in entries.items() if isinstance(value, Tensor)}


def _is_special(value: Any, names: str | tuple[str, ...] = SPECIAL_TENSORS) -> bool:
    return isinstance(value, Placeholder) and value.name.startswith(names)


def _of_optimizer(path: str, entries: Mapping[str, Any]) -> bool:
    return any(part in path.lower() for part in OPTIMIZER) or not OPTIMIZER_KEYS.isdisjoint(entries)


def _preferred(found: Mapping[str, Mapping[str, Any]]) -> str:
    for path in PREFERRED:
        if path in found and not (path == "ema_state_dict" and "state_dict" in found and _swapped(found[path])):
            return path
    if len(found) > 1:
        raise CheckpointError(
            f"The file holds several state dicts: {', '.join(map(repr, found))}. Say which one: --state-dict NAME."
        )
    return next(iter(found))


def _swapped(entries: Mapping[str, Any]) -> bool:
    """Whether mmengine's EMAHook wrote this: it puts the averages in `state_dict` and the plain weights here.

    Its averaging wrapper, and no other that we know, counts in a buffer `steps` beside the `module.` that it wraps.
    """
    return "steps" in entries and all(key == "steps" or key.startswith("module.") for key in entries)


def _describe(tree: Any) -> str:
    if isinstance(tree, dict):
        names = [key[:50] for key in tree if isinstance(key, str)]
        return (
            f"a dict of {', '.join(names[:10])}{' …' if len(names) > 10 else ''}" if names else "a dict without names"
        )
    return f"an object of {tree.name}" if isinstance(tree, Placeholder) else f"a {type(tree).__name__}"


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError for a file that `write` would refuse by its name."""
    if path.suffix not in WRITERS:
        raise CheckpointError(f"{path}: suffix {path.suffix!r}: allowed are {', '.join(WRITERS)}.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory: name a file in it.")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already: choose another name, or add --overwrite.")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path} cannot be written: there is no folder {path.absolute().parent}.")


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], *, overwrite: bool = False) -> None:
    """Write a state dict: `.safetensors`, or `.pth`, `.pt` and `.bin` through torch; whole or not at all.

    The same tensors give the same bytes in safetensors.

    Raises:
        CheckpointError: the file exists, cannot be written, has another suffix, or torch is needed and not installed.
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    arrays = {key: np.asarray(value, order="C") for key, value in sorted(tensors.items())}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        WRITERS[path.suffix](temporary, arrays)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch makes a RuntimeError of the system's error
        raise CheckpointError(f"{path} cannot be written ({error}): nothing was left there.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    # transformers asks for the format's name, which is that of torch for all who write its state dicts
    safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})


def _write_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            "Writing .pth, .pt and .bin needs torch: pip install 're2tal-jax[convert]', or write .safetensors."
        ) from error
    with open(path, "wb") as file:  # of a path torch would make the name of a folder in the file
        torch.save({key: _to_torch(value) for key, value in tensors.items()}, file)


def _to_torch(value: np.ndarray) -> Any:
    import torch

    writable = np.require(value, requirements="W")  # torch warns of arrays that it must not write to
    if value.dtype == ml_dtypes.bfloat16:  # which torch does not take from numpy
        return torch.from_numpy(writable.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(writable)


WRITERS: Mapping[str, Callable[[Path, Mapping[str, np.ndarray]], None]] = {
    ".safetensors": _write_safetensors,
    ".pth": _write_torch,
    ".pt": _write_torch,
    ".bin": _write_torch,
}
