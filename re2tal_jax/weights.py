"""Parameters in a folder of two files: `params.safetensors` and `model.json`, which says what network they are of.

This is what a conversion from PyTorch writes; `training.checkpoint.load_params` reads it like a run's checkpoint. The
same parameters give the same bytes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from re2tal_jax.errors import CheckpointError

PARAMS, ABOUT = "params.safetensors", "model.json"


def holds_weights(directory: Path) -> bool:
    """Tell whether a folder is of this form."""
    return (Path(directory) / PARAMS).is_file()


def load_weights(directory: Path) -> dict[str, np.ndarray]:
    """Return the parameters by path.

    Raises:
        CheckpointError: no such folder, or a damaged file.
    """
    path = Path(directory) / PARAMS
    try:
        return dict(sorted(load_file(path).items()))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): convert the source again with --overwrite.") from error


def load_about(directory: Path) -> dict[str, Any]:
    """Return what `model.json` says.

    Raises:
        CheckpointError: it is missing or no JSON.
    """
    path = Path(directory) / ABOUT
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): convert the source again with --overwrite.") from error


def check_writable(directory: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if `save_weights` would refuse the folder."""
    directory = Path(directory)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not holds_weights(directory):
        raise CheckpointError(f"{directory} exists and holds other things: name a new folder.")
    if not overwrite:
        raise CheckpointError(f"{directory} holds converted parameters already: add --overwrite, or name a new folder.")


def save_weights(
    directory: Path,
    params: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    *,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> str:
    """Write the folder as a whole or not at all, and return the SHA-256 of its parameters.

    Args:
        directory: to create; one of this form is replaced with `overwrite`.
        params: arrays by path.
        about: JSON; gets the SHA-256 as `sha256`.
        files: names and texts of what else is to lie there.

    Raises:
        CheckpointError: the folder may not be replaced, or cannot be written (a full disk, say).
    """
    directory = Path(directory).absolute()
    check_writable(directory, overwrite=overwrite)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        save_file({path: np.asarray(params[path], order="C") for path in sorted(params)}, partial / PARAMS)
        digest = sha256(partial / PARAMS)
        texts = {ABOUT: json.dumps({**about, "sha256": digest}, indent=1, sort_keys=True) + "\n", **(files or {})}
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _replace(partial, directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{directory} cannot be written ({error}); nothing was left there.") from error
    return digest


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(partial: Path, directory: Path) -> None:
    """Put a finished folder in its place; what was there goes only once the new one stands."""
    if not directory.exists():
        partial.rename(directory)
        return
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    directory.rename(old)
    try:
        partial.rename(directory)
    except OSError:
        old.rename(directory)
        raise
    shutil.rmtree(old)
