"""Memory of the backward pass by depth; `python -m benchmarks.memory [--targets cpu h100 v5e] [--out FILE.csv]`.

Temporaries that XLA plans for the gradient of one stage of Video Swin, that of tests/test_memory.py: nothing is run,
only compiled. Targets other than cpu need the optional packages `aot`. Rows of the CSV: date, machine, versions,
benchmark, setting, value, unit.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from benchmarks.rows import Row, append_rows
from re2tal_jax.accelerators import absent_devices
from tests.test_memory import DEEP, SHALLOW, TARGETS, temp_bytes

FRAMES = 32  # so that the ordinary stage of 32 blocks fits the targets too
DEPTHS = (SHALLOW, 8, 16, DEEP)
COMPILED_FOR = {"cpu": "CPU", "h100": "H100", "v5e": "TPU v5e"}


def stage_memory(targets: Sequence[str]) -> Iterator[Row]:
    """Compile the stage at every depth, ordinary and rewired, for every target."""
    # Absent devices first: once JAX has started without them it knows them no more.
    devices = {target: absent_devices(target)[0] for target in targets if target != "cpu"}
    for target in targets:
        device = jax.devices("cpu")[0] if target == "cpu" else devices[target]
        for name, rewired in (("ordinary", False), ("rewired", True)):
            for depth in DEPTHS:
                setting = f"{COMPILED_FOR[target]}: {depth} blocks, {name}"
                try:
                    mib = temp_bytes(device, depth, rewired=rewired, frames=FRAMES) / 2**20
                except jax.errors.JaxRuntimeError as error:
                    print(f"{setting}: no figure, {str(error).splitlines()[0]}")
                    continue
                yield "stage memory", setting, round(mib), "MiB"


def main() -> None:
    """Print one line per figure and append them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["cpu"], choices=TARGETS)
    parser.add_argument("--out", type=Path, help="CSV that the rows are appended to")
    options = parser.parse_args()
    rows = []
    for row in stage_memory(options.targets):
        rows.append(row)
        print(f"{row[0]:14s} {row[1]:40s} {row[2]:10,.0f} {row[3]}")
    if options.out is not None:
        append_rows(options.out, rows, packages=("jax", "jaxlib"))


if __name__ == "__main__":
    main()
