"""Proof that converted parameters compute what the source computed: its recorded activations replayed.

`replay` reads a golden file: an .npz with `<case>/in/x` (B, C, T, H, W), outputs `<case>/out/…` and, if recorded,
`<case>/mid/<name>` of the network whose weights were converted. live.py runs the source's own package instead.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from re2tal_jax.errors import CheckpointError, DataError

TOLERANCE = 1e-5  # of float32 networks, relative to the largest value; golden data of the published ones agree to 1e-6


@dataclass(frozen=True)
class Row:
    """One compared array: its relative error in the max norm, and what is allowed."""

    name: str
    error: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        """Return the row of a table."""
        return f"{self.name:32s} {self.error:9.2e}  {'ok' if self.passed else 'FAIL'}"


def compare(name: str, ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> Row:
    """Return max |ours - theirs| / max |theirs|, of integers the share that differs.

    Another shape, or NaN in only one of the two, is an infinite error.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        return Row(f"{name} {ours.shape} != {theirs.shape}", np.inf, tolerance)
    if theirs.dtype.kind not in "fc" and ours.dtype.kind not in "fc":
        return Row(name, float(np.mean(ours != theirs)) if ours.size else 0.0, tolerance)
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(theirs)
    if not np.array_equal(ours[~finite], theirs[~finite], equal_nan=True) or not np.isfinite(ours[finite]).all():
        return Row(name, np.inf, tolerance)
    difference = np.abs(ours[finite] - theirs[finite]).max(initial=0.0)
    return Row(name, float(difference / max(np.abs(theirs[finite]).max(initial=0.0), 1e-30)), tolerance)


def replay(backbone: Any, path: Path) -> tuple[list[Row], list[str]]:
    """Return one row per recorded output of a golden file that the network gives, and the names of the others.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no case that the network can be run on.
    """
    content = _read(path)
    cases = sorted({key.split("/")[0] for key in content if key.endswith("/in/x")})
    if not cases:
        raise CheckpointError(f"--golden {path} holds no recorded input <case>/in/x, only {sorted(content)[:5]}.")
    run = jax.jit(_outputs)
    rows, left_out = [], []
    for case in cases:
        golden = {key.split("/", 1)[1]: value for key, value in content.items() if key.startswith(case + "/")}
        video = _video(path, f"{case}/in/x", golden["in/x"], backbone.in_channels)
        try:
            ours = run(backbone, video)
        except DataError as error:
            raise CheckpointError(f"--golden {path}: {case}/in/x is no input of this network. {error}") from error
        rows += _rows(case, golden, ours)
        left_out += [f"{case}/{key}" for key in golden if key != "in/x" and key not in ours]
    if not rows:
        raise CheckpointError(f"--golden {path} holds no output that this network gives: {sorted(content)[:5]}.")
    return rows, left_out


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return the inputs and outputs of an .npz."""
    damaged = (OSError, ValueError, BadZipFile, zlib.error, EOFError, NotImplementedError)
    try:
        with path.open("rb") as opened:  # numpy leaves a damaged file open
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array, as .npy files do")
            return {key: file[key] for key in file.files if "/in/" in key or "/out/" in key or "/mid/" in key}
    except damaged as error:
        raise CheckpointError(f"--golden {path} cannot be read as an .npz of arrays: {error}.") from error


def _video(path: Path, name: str, recorded: np.ndarray, channels: int) -> jax.Array:
    """Return a recorded input with its channels last."""
    if recorded.ndim != 5 or recorded.shape[1] != channels or recorded.dtype.kind not in "fiu" or not recorded.size:
        raise CheckpointError(
            f"--golden {path}: {name} is {recorded.dtype} of shape {recorded.shape}: allowed are numbers of shape "
            f"(B, {channels}, T, H, W)."
        )
    return jnp.asarray(np.moveaxis(recorded, 1, -1), jnp.float32)


def _outputs(backbone: Any, video: jax.Array) -> dict[str, jax.Array]:
    """Return what the network gives, under the names of golden files."""
    features, named = backbone.intermediates(video)
    ours = {f"mid/{name}": value for name, value in named.items()}
    if isinstance(features, tuple):
        return ours | {"out/slow": features[0], "out/fast": features[1]}
    pooled = getattr(backbone, "final_norm", None) == "pooled"  # what such a network's file is recorded of
    return ours | {"out/y": backbone.pooled(video) if pooled else features}


def _rows(case: str, golden: Mapping[str, np.ndarray], ours: Mapping[str, Any]) -> Iterator[Row]:
    for name, value in ours.items():
        if name in golden:
            theirs = golden[name]
            # a rewired stage is recorded behind its down-sampling
            behind = ours.get(name.replace("layer", "downsample"), value)
            forms = [form for given in (value, behind) for form in (np.moveaxis(given, -1, 1), np.asarray(given))]
            form = next((form for form in forms if form.shape == theirs.shape), forms[0])
            yield compare(f"{case}/{name}", form, theirs)
