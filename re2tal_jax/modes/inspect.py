"""`--mode inspect`: what a config is, without data or accelerator: parameters, shapes, groups, memory of a step.

With `--target` the step is compiled for accelerators that are not there, with `--fit` it is made as large as they hold.
"""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from re2tal_jax.accelerators import LOCAL, absent_devices, compile_options, read_target
from re2tal_jax.errors import ConfigError
from re2tal_jax.experiment import Blueprint, abstract_batch, check_shapes, draw_blueprint, make_preprocess
from re2tal_jax.modes.fit import MARGIN, largest_that_fits, quantity
from re2tal_jax.settings import Settings
from re2tal_jax.training.header import describe_devices, describe_parameters
from re2tal_jax.training.memory import Plan, plan
from re2tal_jax.training.metrics import MIB
from re2tal_jax.training.sharding import make_mesh, open_mesh
from re2tal_jax.training.step import make_train_step

MAX_SEGMENTS = 32
LARGEST = 5
"""How many buffers the report names."""

log = logging.getLogger(__name__)


def inspect(
    settings: Settings,
    config: Mapping[str, Any],
    workdir: Path,
    *,
    target: str = LOCAL,
    plain: bool = False,
    fit: str | None = None,
) -> str:
    """Log and return the report; nothing is read, trained or written.

    Args:
        settings: what is inspected.
        config: the same, resolved, as it is shown.
        workdir: not used.
        target: what the step is compiled for, see `accelerators`; "local" is the devices of this machine.
        plain: also tell the memory of the ordinary network.
        fit: None, or "frames", "batch", "size" or "stored_blocks": what is to be made as large as the memory allows.
            Only that is reported then.

    Raises:
        ConfigError: settings that cannot run, or a target that cannot be compiled for.
    """
    del workdir
    mesh = open_mesh(settings.mesh) if target == LOCAL else make_mesh(settings.mesh, absent_devices(target))
    memory = memory_of(mesh) if target == LOCAL else read_target(target).memory
    if fit is not None:
        return fit_report(fit, settings, mesh, memory)
    blueprint = draw_blueprint(settings, mesh)
    check_shapes(settings, blueprint)
    parts = [
        "config:\n" + "\n".join(f"  {key} = {value!r}" for key, value in flat(config)),
        f"devices: {describe_devices(mesh)}",
        f"parameters: {describe_parameters(blueprint.optimizer)}\n" + module_table(blueprint),
        "parameters and their groups:\n" + parameter_table(blueprint),
        "shapes:\n" + shape_table(settings, blueprint),
    ]
    for part in parts:
        log.info("%s", part)
    parts.append(f"memory of a training step, compiled for {target}:")
    log.info("%s", parts[-1])
    for rewired in (True, False) if plain else (True,):
        if target != LOCAL:
            kind = "reversible" if rewired else "plain"
            log.info("compiling the %s step for %s: this takes some minutes", kind, target)
        parts.append(memory_rows(settings, mesh, blueprint, memory, rewired=rewired))
        log.info("%s", parts[-1])
    return "\n".join(parts)


def flat(config: Mapping[str, Any], prefix: str = "config") -> Iterator[tuple[str, Any]]:
    """Yield every key as it is written on the command line, with its value."""
    for key in sorted(config):
        value = config[key]
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


def parameter_table(blueprint: Blueprint) -> str:
    """Return path, shape, group, peak learning rate and weight decay of every parameter."""
    rows = blueprint.optimizer.table()
    width = max(len(row.path) for row in rows)
    return "\n".join(
        f"  {row.path:{width}s} {row.shape!s:18s} {row.group:20s} "
        + ("frozen" if row.frozen else f"lr {row.lr:g}, weight decay {row.weight_decay:g}")
        for row in rows
    )


def module_table(blueprint: Blueprint) -> str:
    """Return the number of parameters of every part, two levels deep."""
    counts: dict[str, int] = defaultdict(int)
    for path, shape in blueprint.model.shapes.items():
        names = [name for name in path.split(".")[:-1] if not name.isdigit()]
        counts[".".join(names[:2])] += math.prod(shape)
    return "\n".join(f"  {name:32s} {count:>12,}" for name, count in counts.items())


def shape_table(settings: Settings, blueprint: Blueprint) -> str:
    """Return the shape and dtype of what every stage gives, for one training batch."""
    batch, split = abstract_batch(settings, max_segments=1), replace(settings.train, mirror=None)
    video, _ = jax.eval_shape(lambda b: make_preprocess(split, classes=())(b, None), batch)
    mask = batch.mask

    names: list[str] = []  # in order; a dictionary that jax returns is sorted

    def forward(params: Any, video: Any, mask: Any) -> list[Any]:
        detector = blueprint.model.merge(params)
        _, named = detector.backbone.intermediates(detector.given(video))
        outputs, features = detector(video, mask)
        proposals, scores, _ = detector.localizer.decode(outputs)
        arrays = {"video": video, **named, "snippet features": features, "proposals": proposals, "scores": scores}
        names[:] = arrays
        return list(arrays.values())

    shapes = jax.eval_shape(forward, blueprint.spec.abstract.params, video, mask)
    return "\n".join(f"  {n:32s} {s.dtype.name:9s} {s.shape}" for n, s in zip(names, shapes, strict=True))


def memory_rows(settings: Settings, mesh: Mesh, blueprint: Blueprint, memory: int | None, *, rewired: bool) -> str:
    """Return what the compiler plans for the step, rewired or ordinary, whether it fits, and its largest buffers."""
    name = "reversible" if rewired else "plain"
    step = step_plan(settings, mesh, blueprint.with_wiring(settings, mesh, rewired=rewired))
    told = f"at least {step.needed / MIB:,.1f} MiB per device" if step.needed is not None else "memory is not told"
    rows = [
        f"  {name:12s} {step.memory or told}; {'refused' if step.available else 'compiled'} in {step.seconds:.0f} s"
    ]
    if step.needed is not None and (step.available or memory):
        rows.append(f"  {'':12s} {verdict(step.needed, step.available or memory or 0)}")
    if step.needed is not None and _is_more_than_jax_takes(step.needed, memory, mesh):
        rows.append(f"  {'':12s} JAX takes 75 % of a GPU by itself: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.")
    if step.largest:
        rows.append(f"  {'':12s} the largest of what is held when that is most:")
        rows += [f"  {'':12s} {buffers}" for buffers in step.largest[:LARGEST]]
    elif step.memory is not None:
        rows.append(f"  {'':12s} this compiler does not tell its buffers")
    return "\n".join(rows)


def verdict(needed: int, memory: int) -> str:
    """Return whether so many bytes fit a device, and how well."""
    if needed > memory:
        return f"does not fit: {(needed - memory) / MIB:,.1f} MiB more than the {memory / MIB:,.1f} of a device"
    return f"fits: {100 * needed / memory:.1f} % of the {memory / MIB:,.1f} MiB of a device"


def _is_more_than_jax_takes(needed: int, memory: int | None, mesh: Mesh) -> bool:
    """Whether a GPU would hold the program, but not the part of it that JAX takes if it is not told otherwise."""
    if memory is None or mesh.devices.flat[0].platform not in ("cuda", "gpu"):
        return False
    return "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ and 0.75 * memory < needed <= memory


def fit_report(name: str, settings: Settings, mesh: Mesh, memory: int | None) -> str:
    """Log and return the largest of a quantity whose step fits, every program that was compiled as a row.

    Raises:
        ConfigError: devices that do not tell their memory, or settings that cannot run.
    """
    if memory is None:
        raise ConfigError("--fit needs a target whose memory is known; these devices do not tell: give --target.")
    varied = quantity(name, settings, mesh.size)
    limit = int((1 - MARGIN) * memory)
    head = f"{100 * (1 - MARGIN):.0f} % of a device's memory, {limit / MIB:,.1f} MiB, on {describe_devices(mesh)}:"
    rows = [head]
    log.info("%s", head)

    def needed(n: int) -> int:
        changed = varied.apply(n)
        blueprint = draw_blueprint(changed, mesh)
        check_shapes(changed, blueprint)
        log.info("  %s: compiling the step", varied.describe(n))
        step = step_plan(changed, mesh, blueprint)
        if step.needed is None:
            raise ConfigError("--fit needs a compiler that tells its memory; this backend does not: give --target.")
        fits = "fits" if step.needed <= limit else "does not fit"
        text = f"{step.needed / MIB:12,.1f} MiB  {fits:12s}  compiled in {step.seconds:.0f} s"
        rows.append(f"  {varied.describe(n):24s} {text}")
        log.info("%s", rows[-1])
        return step.needed

    found = largest_that_fits(needed, limit, varied.start, power=varied.power, most=varied.most)
    least = 1 if varied.most is None else 0  # of blocks, none can be stored
    fits = found.largest > 0 or (least == 0 and needed(0) <= limit)
    largest = varied.describe(found.largest) if fits else f"none, not even {varied.describe(least)}"
    rows.append(f"the largest that fits: {largest}")
    if found.too_large is None:
        rows[-1] += ", as far as was tried" if varied.most is None else ", all there are"
    log.info("%s", rows[-1])
    return "\n".join(rows)


def step_plan(settings: Settings, mesh: Mesh, blueprint: Blueprint) -> Plan:
    """Compile the training step for the mesh, which need not be there."""
    split = replace(settings.train, mirror=None)  # its classes are known from the data alone; it costs no memory
    preprocess = make_preprocess(split, classes=())
    step = make_train_step(blueprint.spec, preprocess, mesh)
    batch = abstract_batch(settings, max_segments=MAX_SEGMENTS)
    lowered = step.lower(blueprint.spec.abstract, batch, jax.eval_shape(lambda: jax.random.key(0)))
    return plan(lowered, compile_options(mesh.devices.flat[0]))


def memory_of(mesh: Mesh) -> int | None:
    """Return the bytes that programs may fill of each of the devices at hand; None if that is not known."""
    devices = mesh.local_devices
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    if all(limits):
        return min(limit for limit in limits if limit)
    if devices[0].platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return None
