"""Networks whose every parameter is drawn by numpy: jax would compile a program for each shape."""

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from checkpoints_convert.rules import fill, flatten

M = TypeVar("M", bound=nnx.Module)


def drawn(make: Callable[[], M], dtype: Any = np.float32) -> M:
    """Return the module that `make` builds, kernels of unit gain, scales and variances near 1, all else near 0."""
    model, values = nnx.eval_shape(make), {}
    for path, leaf in flatten(model).items():
        generator = np.random.default_rng(zlib.crc32(path.encode()))  # the same for a path, whatever else there is
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if path.endswith("kernel") else 0.3
        value = spread * generator.normal(size=leaf.shape)
        if path.endswith(("scale", "var")):
            value = 1 + np.clip(value, -0.5, 0.5)
        values[path] = value.astype(dtype)
    return fill(model, values)
