"""Proof that converted parameters compute what the source computed: its recorded activations replayed.

`replay` reads a golden file: an .npz with `<case>/in/x` (B, C, T, H, W), outputs `<case>/out/…` and, if recorded,
`<case>/mid/<name>` of the network whose weights were converted. live.py runs the source's own package instead.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from re2tal_jax.errors import CheckpointError

TOLERANCE = 1e-5  # of float32 networks, relative to the largest value; golden data of the published ones agree to 1e-6


@dataclass(frozen=True)
class Row:
    """One compared output: max |ours - theirs| / max |theirs|."""

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


def compare(name: str, ours: Any, theirs: Any) -> Row:
    """Return the relative error of an output in the max norm; another shape is an infinite error."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return Row(f"{name} {ours.shape} != {theirs.shape}", np.inf)
    return Row(name, float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)))


def replay(backbone: Any, path: Path) -> list[Row]:
    """Return one row per recorded output of a golden file.

    Raises:
        CheckpointError: the file is missing, damaged or holds no case.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {key: file[key] for key in file.files if "/in/" in key or "/out/" in key or "/mid/" in key}
    except (OSError, ValueError, BadZipFile) as error:
        raise CheckpointError(f"--golden {path} cannot be read as an .npz of arrays: {error}.") from error
    cases = sorted({key.split("/")[0] for key in content if key.endswith("/in/x")})
    if not cases:
        raise CheckpointError(f"--golden {path} holds no recorded input <case>/in/x, only {sorted(content)[:5]}.")
    run = jax.jit(lambda network, video: network.intermediates(video))
    rows = []
    for case in cases:
        golden = {key.split("/", 1)[1]: value for key, value in content.items() if key.startswith(case + "/")}
        features, named = run(backbone, jnp.asarray(rearrange(golden["in/x"], "b c t h w -> b t h w c")))
        rows += _rows(case, golden, features, named)
    if not rows:
        raise CheckpointError(f"--golden {path} holds no output that this network gives: {sorted(content)[:5]}.")
    return rows


def _rows(case: str, golden: Mapping[str, np.ndarray], features: Any, named: Mapping[str, Any]) -> Iterator[Row]:
    outputs = features if isinstance(features, tuple) else (features,)
    names = ("out/slow", "out/fast") if len(outputs) == 2 else ("out/y",)
    ours = dict(zip(names, outputs, strict=True)) | {f"mid/{name}": value for name, value in named.items()}
    for name, value in ours.items():
        if name not in golden:
            continue
        theirs = golden[name]
        channels_first = np.moveaxis(np.asarray(value), -1, 1)
        yield compare(f"{case}/{name}", channels_first if channels_first.shape == theirs.shape else value, theirs)
