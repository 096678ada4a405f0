"""`--mode inspect`: what a config is, without data or accelerator: parameters, shapes, groups, memory of a step."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from re2tal_jax.experiment import Blueprint, abstract_batch, check_shapes, draw_blueprint, make_preprocess
from re2tal_jax.settings import Settings
from re2tal_jax.training.header import describe_devices, describe_parameters
from re2tal_jax.training.metrics import MemoryEstimate, memory_estimate
from re2tal_jax.training.sharding import open_mesh
from re2tal_jax.training.step import make_train_step

MAX_SEGMENTS = 32


def inspect(settings: Settings, config: Mapping[str, Any], workdir: Path) -> str:
    """Log and return the report; nothing is read, trained or written.

    Raises:
        ConfigError: settings that cannot run.
    """
    del workdir
    log = logging.getLogger(__name__)
    mesh = open_mesh(settings.mesh)
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
    parts.append("memory of a training step as compiled for these devices:\n" + memory_table(settings, mesh, blueprint))
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
    split = settings.train
    frames = settings.num_snippets * settings.frames_per_snippet
    size = (split.batch_size, frames, split.augment.height, split.augment.width, 3)
    video = jax.ShapeDtypeStruct(size, jnp.dtype(split.augment.dtype))
    mask = jax.ShapeDtypeStruct((split.batch_size, settings.num_snippets), jnp.bool_)

    names: list[str] = []  # in order; a dictionary that jax returns is sorted

    def forward(params: Any, video: Any, mask: Any) -> list[Any]:
        detector = blueprint.model.merge(params)
        _, named = detector.backbone.intermediates(video)
        outputs, features = detector(video, mask)
        proposals, scores, _ = detector.localizer.decode(outputs)
        arrays = {"video": video, **named, "snippet features": features, "proposals": proposals, "scores": scores}
        names[:] = arrays
        return list(arrays.values())

    shapes = jax.eval_shape(forward, blueprint.spec.abstract.params, video, mask)
    return "\n".join(f"  {n:32s} {s.dtype.name:9s} {s.shape}" for n, s in zip(names, shapes, strict=True))


def memory_table(settings: Settings, mesh: Mesh, blueprint: Blueprint) -> str:
    """Return what the compiler plans for the step, rewired and ordinary, with the seconds it took to compile."""
    rows = []
    for name, rewired in (("reversible", True), ("plain", False)):
        begin = time.monotonic()
        memory = step_memory(settings, mesh, blueprint.with_wiring(settings, mesh, rewired=rewired))
        seconds = time.monotonic() - begin
        if memory is None:
            return "  this backend does not tell"
        rows.append(f"  {name:12s} {memory}; compiled in {seconds:.0f} s")
    return "\n".join(rows)


def step_memory(settings: Settings, mesh: Mesh, blueprint: Blueprint) -> MemoryEstimate | None:
    """Compile the training step for the mesh and return its memory per device."""
    split = replace(settings.train, mirror=None)  # its classes are known from the data alone; it costs no memory
    preprocess = make_preprocess(split, classes=())
    step = make_train_step(blueprint.spec, preprocess, mesh)
    batch = abstract_batch(settings, max_segments=MAX_SEGMENTS)
    return memory_estimate(step.lower(blueprint.spec.abstract, batch, jax.random.key(0)).compile())
