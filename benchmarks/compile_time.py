"""Time to compile a whole training step by depth of the backbone; `python -m benchmarks.compile_time [--out FILE.csv]`.

Backbone, localizer, optimizer and moving average of a config, batch 1: for a chain that is scanned, the time does not
follow the number of blocks. Told apart: tracing (Python's part) and compiling (XLA's). Targets other than `local` need
the optional packages `aot`. Rows of the CSV: date, machine, versions, benchmark, setting, value, unit.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from benchmarks.rows import Row, append_rows
from benchmarks.step_memory import batch_of_one
from re2tal_jax.accelerators import LOCAL, absent_devices
from re2tal_jax.experiment import draw_blueprint
from re2tal_jax.modes.inspect import step_plan
from re2tal_jax.training.sharding import make_mesh

BACKBONES = ("video_swin_tiny", "video_swin_small", "video_swin_base")


def compile_time(path: str, target: str, backbones: Sequence[str]) -> Iterator[Row]:
    """Trace and compile the step of a config with each of the backbones; nothing is taken from a cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    settings = batch_of_one(path)
    devices = jax.devices()[:1] if target == LOCAL else absent_devices(target)[:1]
    mesh = make_mesh(settings.mesh, devices)
    for name in backbones:
        changed = replace(settings, backbone={**settings.backbone, "name": name})
        blueprint = draw_blueprint(changed, mesh)
        begin = time.perf_counter()
        compiling = step_plan(changed, mesh, blueprint).seconds
        tracing = time.perf_counter() - begin - compiling
        where = f"{Path(path).stem} with {name}, for {'this machine' if target == LOCAL else target}"
        yield "compile time", f"{where}, tracing", tracing, "s"
        yield "compile time", f"{where}, compiling", compiling, "s"


def main() -> None:
    """Print one line per figure and append them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/anet.py", metavar="FILE")
    parser.add_argument("--target", default="h100", help="what to compile for, see `--mode inspect`")
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, metavar="NAME")
    parser.add_argument("--out", type=Path, help="CSV that the rows are appended to")
    options = parser.parse_args()
    for row in compile_time(options.config, options.target, options.backbones):
        print(f"{row[1]:64s} {row[2]:8.1f} {row[3]}", flush=True)
        if options.out is not None:
            append_rows(options.out, [row], packages=("jax", "jaxlib"))


if __name__ == "__main__":
    main()
