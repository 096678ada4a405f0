"""What a run says before its first step: versions, devices, data, parameters, length and where its files go."""

import logging
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from re2tal_jax.training.metrics import MIB
from re2tal_jax.training.optim import Optimizer
from re2tal_jax.training.state import StateSpec

log = logging.getLogger(__name__)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
START_LEFT = 0.05
"""The most that a run's moving average should hold of its start at the end.

An average remembers about 1 / (1 - decay) steps; a run of three times that leaves e**-3 = 5 %. The shortest of the
published recipes, configs/thumos_features.py with 35 epochs of 100 steps at 0.999, leaves 3 %.
"""


def log_header(spec: StateSpec, mesh: Mesh, workdir: Path, about: Mapping[str, Any]) -> None:
    """Log the start-up header; `about` adds lines of the caller's, data counts and findings above all."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    log.info("versions: python %s, %s", platform.python_version(), versions)
    log.info("devices: %s", describe_devices(mesh))
    for name, text in about.items():
        log.info("%s: %s", name, text)
    log.info("parameters: %s", describe_parameters(spec.optimizer))
    log.info("train state: %.1f MiB per device", state_bytes(spec.abstract) / MIB)
    log.info("workdir: %s", workdir)


def describe_devices(mesh: Mesh) -> str:
    """Return e.g. '8 x TPU v5e in 2 processes, mesh data 4 x fsdp 2'."""
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{mesh.size} x {'/'.join(kinds)} in {jax.process_count()} process(es), mesh {axes}"


def describe_parameters(optimizer: Optimizer) -> str:
    """Return e.g. '27,851,982 in 176 arrays, 27,800,000 of them trained'."""
    rows = optimizer.table()
    total = sum(math.prod(row.shape) for row in rows)
    trained = sum(math.prod(row.shape) for row in rows if not row.frozen)
    return f"{total:,} in {len(rows)} arrays, {trained:,} of them trained"


def state_bytes(abstract: Any) -> int:
    """Return the bytes that a tree of abstract arrays takes on each device."""
    leaves = jax.tree.leaves(abstract)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def warn_of_start_in_average(decay: float, steps: int) -> None:
    """Warn if the moving average, which is what is evaluated, is still much of its start when a run ends."""
    if (left := decay**steps) > START_LEFT:
        lower = decay_that_forgets(steps)
        log.warning(
            "the moving average that is evaluated still holds %.1f %% of its start after %d steps "
            "(config.optimizer.ema_decay = %s): lower it, %s leaves %.1f %%.",
            100 * left,
            steps,
            decay,
            lower,
            100 * lower**steps,
        )


def decay_that_forgets(steps: int) -> float:
    """Return the largest decay, of two digits behind its nines, that leaves at most START_LEFT after so many steps."""
    forgets = -math.expm1(math.log(START_LEFT) / steps)  # 1 - decay
    digits = 1 - math.floor(math.log10(forgets))
    return round(1 - math.ceil(forgets * 10**digits) / 10**digits, digits)
