"""The device mesh, and where batches, parameters and optimizer state lie on it.

The mesh has an axis `data`, over which only batches are split, and an axis `fsdp`, over which batches and large
parameters are split. One device is a mesh of 1 x 1: the same code runs there. No parameter carries metadata; (regex,
axes) rules over parameter paths say where each lies, and what a rule does not match is split over fsdp by itself.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from re2tal_jax.errors import ConfigError, did_you_mean
from re2tal_jax.types import Batch

log = logging.getLogger(__name__)

AXES = ("data", "fsdp")


@dataclass(frozen=True, kw_only=True)
class ShardingRule:
    """Parameters in whose path `pattern` is found are split so: per dimension a mesh axis, or None for whole."""

    pattern: str
    axes: tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes, of which one may be -1, all devices that are left.

    Parameters of at least `fsdp_min_size` values that no rule matches are split over fsdp along their largest dimension
    that divides evenly; smaller ones are kept whole on every device, gathering them would cost more than it saves.
    Without an accelerator the CPU counts as `cpu_devices` devices: its cores then share a batch, where one small
    program would leave all but one idle.
    """

    data: int = -1
    fsdp: int = 1
    fsdp_min_size: int = 2**16
    cpu_devices: int = 1
    rules: tuple[ShardingRule, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """A run of several processes. Left at None, jax finds out from the cluster (SLURM, TPU pods, …)."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def initialise_distributed(config: DistributedConfig | None) -> None:
    """Connect this process to the others of the run; must come before anything touches a device. None: one process."""
    if config is None:
        return
    jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    log.info("process %d of %d, %d local devices", jax.process_index(), jax.process_count(), jax.local_device_count())


def open_mesh(config: MeshConfig) -> Mesh:
    """Return the mesh over all devices there are; call it before anything else touches a device.

    Raises:
        ConfigError: as `make_mesh`, or devices were used before with another number of CPU devices.
    """
    if config.cpu_devices < 1:
        raise ConfigError(f"mesh.cpu_devices = {config.cpu_devices} must be at least 1.")
    if config.cpu_devices > 1 and jax.config.jax_num_cpu_devices != config.cpu_devices:  # pyright: ignore
        try:
            jax.config.update("jax_num_cpu_devices", config.cpu_devices)
        except RuntimeError as error:
            raise ConfigError(
                f"mesh.cpu_devices = {config.cpu_devices} comes too late, this process has used its devices already: "
                "set it to 1, or start another process."
            ) from error
    return make_mesh(config, jax.devices())


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Arrange devices as (data, fsdp); axis types are Auto, the compiler places what lies between.

    Raises:
        ConfigError: sizes whose product is not the number of devices, two sizes of -1, or a size of 0.
    """
    sizes, available = {"data": config.data, "fsdp": config.fsdp}, len(devices)
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"mesh {sizes}: every size is at least 1, and one of them may be -1 (all devices left).")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        if available % fixed:
            raise ConfigError(
                f"mesh {sizes}: {available} devices are no multiple of {fixed}. Choose a divisor of {available}."
            )
        sizes = {axis: available // fixed if size == -1 else size for axis, size in sizes.items()}
    elif fixed != available:
        raise ConfigError(
            f"mesh {sizes} has {fixed} places, but there are {available} devices. Set data = -1 to use all that fsdp "
            f"= {config.fsdp} leaves, or sizes whose product is {available}."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=kinds, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Every leaf of a batch has the batch axis first, which is split over all devices."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1, *, key: str) -> None:
    """Raise ConfigError, which calls the batch `key`, unless it splits evenly over micro-batches and devices."""
    parts = mesh.size * accumulate
    if batch_size < 1 or batch_size % parts:
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        micro = "" if accumulate == 1 else f" x {accumulate} micro-batches (config.optimizer.accumulate)"
        raise ConfigError(
            f"{key} = {batch_size} does not split evenly over {mesh.size} devices "
            f"(config.mesh{'.cpu_devices' if on_cpu else ''}){micro}: choose a multiple of {parts}, for example "
            f"{max(1, round(batch_size / parts)) * parts}."
        )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """Return this process's rows of a batch as its part of global arrays, split over the mesh."""
    sharding = batch_sharding(mesh)
    return Batch(**{name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()})


def parameter_shardings(
    shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, config: MeshConfig
) -> dict[str, NamedSharding]:
    """Return where each parameter lies: by the first rule that matches its path, else by size (see MeshConfig).

    Raises:
        ConfigError: a rule that names no mesh axis or has more axes than its parameter dimensions, a dimension that an
            axis does not divide, or a rule that matches nothing.
    """
    shardings, used = {}, set()
    for path, shape in shapes.items():
        rule = next((rule for rule in config.rules if re.search(rule.pattern, path)), None)
        used.add(rule)
        axes = _automatic(shape, mesh, config.fsdp_min_size) if rule is None else _checked(rule, path, shape, mesh)
        shardings[path] = NamedSharding(mesh, P(*axes))
    for rule in config.rules:
        if rule not in used:
            raise ConfigError(
                f"sharding rule {rule.pattern!r} decides no parameter: no path matches, or earlier rules do."
            )
    return shardings


def _automatic(shape: tuple[int, ...], mesh: Mesh, min_size: int) -> tuple[str | None, ...]:
    size = mesh.shape["fsdp"]
    divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or math.prod(shape) < min_size or not divisible:
        return ()
    largest = max(divisible, key=lambda axis: shape[axis])
    return tuple("fsdp" if axis == largest else None for axis in range(len(shape)))


def _checked(rule: ShardingRule, path: str, shape: tuple[int, ...], mesh: Mesh) -> tuple[str | None, ...]:
    if len(rule.axes) > len(shape):
        raise ConfigError(f"sharding rule {rule.pattern!r} has axes {rule.axes}, but {path} has shape {shape}.")
    for axis, length in zip(rule.axes, shape, strict=False):
        if axis is not None and axis not in mesh.shape:
            raise ConfigError(f"sharding rule {rule.pattern!r}: no axis {axis!r}. {did_you_mean(axis, mesh.shape)}")
        if axis is not None and length % mesh.shape[axis]:
            raise ConfigError(
                f"sharding rule {rule.pattern!r}: {path} has shape {shape}, and {length} is no multiple of the "
                f"{mesh.shape[axis]} devices along {axis!r}."
            )
    return rule.axes


def state_shardings(state: Any, parameters: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Return shardings for a whole train state: what is kept per parameter lies like it, the rest is everywhere."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return parameters[keys[-1]] if keys and keys[-1] in parameters else replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)
