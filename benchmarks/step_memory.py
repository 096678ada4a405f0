"""Memory of a whole training step; `python -m benchmarks.step_memory [--target TARGET] [--configs FILE …] [--out CSV]`.

Backbone, localizer, optimizer and moving average of a config, batch 1, compiled for an accelerator that need not be
there (packages `aot`) in four ways:

    ordinary                     the pretrained network, autodiff keeps what it needs
    checkpointed                 the same, every residual function recomputed from its input (jax.checkpoint)
    reversible by whole tensors  rewired, as published: states recomputed one whole state at a time
    reversible by tiles          what this project runs: tile by tile, in place

From the second to the third row is what reversibility saves, from the third to the last what tiles save. With --frames
each is compiled for each of so many frames: memory over frames. Rows of the CSV: date, machine, versions, benchmark,
setting, value, unit.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.rows import Row, append_rows
from re2tal_jax.accelerators import absent_devices
from re2tal_jax.config import read_config_file
from re2tal_jax.detector import Detector
from re2tal_jax.errors import ConfigError
from re2tal_jax.experiment import Blueprint, draw_blueprint, make_detector
from re2tal_jax.modes.fit import quantity
from re2tal_jax.modes.inspect import step_plan
from re2tal_jax.reversible import PLAIN, REWIRED, Wiring, make_runs, plain_step, rewire
from re2tal_jax.runs import scan_run
from re2tal_jax.settings import Settings, read_settings
from re2tal_jax.training.metrics import MIB
from re2tal_jax.training.sharding import make_mesh
from re2tal_jax.training.state import describe_model, describe_state

WHOLE = 2**60  # elements of workspace: everything is one tile
CONFIGS = ("configs/anet.py", "configs/anet_slowfast101.py", "configs/anet_videomae_b.py")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Checkpointed(Wiring):
    """The pretrained network; its states are kept, its residual functions recomputed from them in the backward pass."""

    def states(self, branches: Any, x: Any, *, key: Any = None, aux: Any = None, stored: int = 0) -> Any:
        """Run the branches and return the last two states; every state is stored."""
        del stored
        (repeats, runs), _, x = make_runs(branches, x, key, aux)
        alpha, beta = jnp.asarray(self.alpha, x.dtype), jnp.asarray(self.beta, x.dtype)

        @jax.checkpoint
        def step(states: Any, link: Any) -> Any:
            return plain_step(states, link, alpha, beta, aux)

        def body(states: Any, run: Any) -> Any:
            for link in run:
                states = step(states, link)
            return states, None

        states = (x, x)
        for count, run in zip(repeats, runs, strict=True):
            states, _ = scan_run(count, body, states, run)
        return states


WAYS: dict[str, tuple[Wiring, int | None]] = {
    "ordinary": (PLAIN, WHOLE),
    "checkpointed": (Checkpointed(alpha=1.0, beta=0.0, reversible=False), WHOLE),
    "reversible by whole tensors": (REWIRED, WHOLE),
    "reversible by tiles": (REWIRED, None),
}
"""How a backbone runs: its wiring, and its workspace (None: the config's)."""


def temporaries(settings: Settings, target: str, way: str) -> float | None:
    """Return the MiB of temporaries that are planned for a device; None if the compiler gives up on the program."""
    wiring, workspace = WAYS[way]
    if workspace is not None:
        settings = replace(settings, backbone={**settings.backbone, "workspace": workspace})
    mesh = make_mesh(settings.mesh, absent_devices(target)[:1])
    step = step_plan(settings, mesh, wired(draw_blueprint(settings, mesh), settings, mesh, wiring))
    if step.memory is not None:
        return step.memory.temporary / MIB
    return None if step.needed is None else step.needed / MIB


def wired(blueprint: Blueprint, settings: Settings, mesh: Any, wiring: Wiring) -> Blueprint:
    """Return the blueprint of the same parameters with another wiring of the backbone."""

    def make() -> Detector:
        detector = make_detector(settings)()
        detector.backbone = rewire(detector.backbone, wiring)
        return detector

    model = describe_model(make)
    return Blueprint(model, blueprint.optimizer, describe_state(model, blueprint.optimizer, mesh, settings.mesh))


def by_way(path: str, target: str) -> Iterator[Row]:
    """Compile a config in every way."""
    settings = batch_of_one(path)
    frames = settings.num_snippets * settings.frames_per_snippet
    seen = settings.train.augment
    assert seen is not None, "recipes of step memory take frames"
    size = f"{seen.height} x {seen.width}"
    for way in WAYS:
        mib = temporaries(settings, target, way)
        name = f"{target}: {settings.backbone['name']}, {frames:,} frames at {size}, {way}"
        if mib is None:
            print(f"{name}: not told")
        else:
            yield "step memory by way", name, round(mib), "MiB"


def by_frames(path: str, target: str, frames: list[int]) -> Iterator[Row]:
    """Compile a config in every way for several numbers of frames."""
    settings = batch_of_one(path)
    varied = quantity("frames", settings, 1)
    if odd := [count for count in frames if count < 1 or count % varied.unit]:
        raise ConfigError(f"--frames {odd}: allowed are multiples of {varied.unit}, which the localizer takes.")
    for way in reversed(WAYS):
        for count in frames:
            mib = temporaries(varied.apply(count // varied.unit), target, way)
            name = f"{target}: {settings.backbone['name']}, {count:,} frames, {way}"
            if mib is None:
                print(f"{name}: not told")
            else:
                yield "step memory by frames", name, round(mib), "MiB"


def batch_of_one(path: str) -> Settings:
    """Return the settings of a config file with one video a step."""
    settings = read_settings(read_config_file(Path(path)))
    return replace(settings, train=replace(settings.train, batch_size=1), eval=replace(settings.eval, batch_size=1))


def main() -> None:
    """Print one line per figure and append them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100", help="what to compile for, see `--mode inspect`")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, metavar="FILE")
    parser.add_argument("--frames", nargs="+", type=int, help="compile for these numbers of frames instead")
    parser.add_argument("--out", type=Path, help="CSV that the rows are appended to")
    options = parser.parse_args()
    for path in options.configs:
        rows = by_frames(path, options.target, options.frames) if options.frames else by_way(path, options.target)
        for row in rows:
            print(f"{row[1]:96s} {row[2]:10,.0f} {row[3]}", flush=True)
            if options.out is not None:
                append_rows(options.out, [row], packages=("jax", "jaxlib"))


if __name__ == "__main__":
    main()
