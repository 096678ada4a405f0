"""Parameters in a folder: `params.safetensors`, `model.json`, which says what network they are of, and `report.txt`.

This is what a conversion from PyTorch writes; `training.checkpoint.load_params` reads it like a run's checkpoint, and
a run may write beside it. The same parameters give the same bytes.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from re2tal_jax.errors import CheckpointError

log = logging.getLogger(__name__)

PARAMS, ABOUT, REPORT = "params.safetensors", "model.json", "report.txt"


def holds_weights(directory: Path) -> bool:
    """Tell whether a folder is of this form."""
    return (Path(directory) / PARAMS).is_file()


def holds_parameters(directory: Path) -> bool:
    """Tell whether there are parameters: weights, or checkpoints of a run, whose folder or their own this may be."""
    steps = Path(directory) / "checkpoints"
    steps = steps if steps.is_dir() else Path(directory)
    return holds_weights(directory) or any(path.name.isdigit() for path in steps.glob("*"))


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
    """Return what `model.json` says: `config`, `whole` (a detector or a backbone), `sha256`, and where it comes from.

    Raises:
        CheckpointError: it is missing, or not what `save_weights` writes.
    """
    path = Path(directory) / ABOUT
    again = "convert the source again with --overwrite."
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {again}") from error
    kinds = {"config": dict, "whole": bool, "sha256": str}
    wrong = [key for key, kind in kinds.items() if not (isinstance(about, dict) and isinstance(about.get(key), kind))]
    if wrong:
        raise CheckpointError(f"{path} is damaged: it does not say {', '.join(wrong)} as a conversion does; {again}")
    backbone = about["config"].get("backbone")
    if not (isinstance(backbone, dict) and isinstance(backbone.get("name"), str)):
        raise CheckpointError(f"{path} is damaged: config.backbone names no network; {again}")
    return about


def verify_weights(directory: Path) -> None:
    """Raise CheckpointError unless the parameters are those that `model.json` was written with."""
    recorded, found = load_about(directory)["sha256"], sha256(Path(directory) / PARAMS)
    if recorded != found:
        raise CheckpointError(
            f"{Path(directory) / PARAMS} was changed: its SHA-256 is {found}, {ABOUT} records {recorded}. Convert the "
            "source again with --overwrite."
        )


def check_writable(directory: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if `save_weights` would refuse the folder: what no conversion wrote is never replaced."""
    directory = _resolved(directory)
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory} exists and is no folder: name a new one.")
    entries = list(directory.iterdir())
    others = sorted(e.name for e in entries if e.name not in (PARAMS, ABOUT, REPORT) or not e.is_file())
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise CheckpointError(
            f"{directory} holds what no conversion wrote: {', '.join(others[:5])}{more}. Name a new folder, or move "
            "that away first."
        )
    if entries and not overwrite:
        raise CheckpointError(f"{directory} holds converted parameters already: add --overwrite, or name a new folder.")


def save_weights(
    directory: Path,
    params: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    *,
    report: str = "",
    overwrite: bool = False,
) -> str:
    """Write the folder as a whole or not at all, and return the SHA-256 of its parameters.

    Args:
        directory: to create; one that holds nothing but what this function writes is replaced with `overwrite`.
        params: arrays by path.
        about: JSON; gets the SHA-256 as `sha256`.
        report: text for people.

    Raises:
        CheckpointError: the folder may not be replaced, or cannot be written (a full disk, say).
    """
    directory = _resolved(directory)
    check_writable(directory, overwrite=overwrite)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        save_file({path: np.asarray(params[path], order="C") for path in sorted(params)}, partial / PARAMS)
        digest = sha256(partial / PARAMS)
        text = json.dumps({**about, "sha256": digest}, indent=1, sort_keys=True)
        (partial / ABOUT).write_text(f"{text}\n", encoding="utf-8")
        (partial / REPORT).write_text(report, encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _replace(partial, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be written ({error}); nothing was left there.") from error
    finally:  # also where it was interrupted
        shutil.rmtree(partial, ignore_errors=True)
    return digest


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _replace(partial: Path, directory: Path) -> None:
    """Put a finished folder in its place; what was there goes only once the new one stands."""
    if not directory.exists():
        partial.rename(directory)
        return
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    directory.rename(old)
    try:
        partial.rename(directory)
    except BaseException:  # an interruption too
        old.rename(directory)
        raise
    try:
        shutil.rmtree(old)
    except OSError as error:  # the new folder stands, so this is no failure of the conversion
        log.warning("%s was replaced, but its old content is still in %s (%s): remove it.", directory, old, error)


def _resolved(directory: Path) -> Path:
    """Return where the folder really is: of a symbolic link the place that it names is written, not the link."""
    return Path(os.path.realpath(directory))
