"""Checkpoint files: choosing the weights in what was read (`re2tal_jax.torch_files`), and writing them."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from re2tal_jax.errors import CheckpointError, did_you_mean
from re2tal_jax.torch_files import Placeholder, Source, Tensor, read

__all__ = ["Source", "Tensor", "check_target", "choose_state_dict", "read", "state_dicts", "write"]

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
            "Writing .pth, .pt and .bin needs torch (pip install -e '.[convert]' in the checkout); "
            "or write .safetensors."
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
