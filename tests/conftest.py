"""Every test sees eight fake CPU devices, compiled for quickly, strict dtype promotion and warnings as errors."""

import os
from pathlib import Path

from tests import quick

os.environ |= quick.environment(devices=8)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

SHARED = "RE2TAL_SHARED"


def _shared(folder: str) -> Path:
    root = os.environ.get(SHARED)
    if not root:
        pytest.skip(f"{SHARED} is not set: it names the folder that holds parity/ and data/")
    return Path(root) / folder


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Golden data of the published implementation."""
    return _shared("parity")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real annotations and videos."""
    return _shared("data")
