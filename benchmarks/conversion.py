"""Seconds and memory of converting a whole detector; `python -m benchmarks.conversion [--out FILE.csv]`.

The file has the recorded keys and shapes of the published Re2Swin-T with ActionFormer (`parity/optim` below the folder
that RE2TAL_SHARED names) and random values. The command runs as users run it, in a process of its own, there and back.
Rows of the CSV: date, machine, versions, benchmark, setting, value, unit.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.rows import Row, append_rows
from checkpoints_convert import torch_io

ROOT = Path(__file__).resolve().parents[1]
KEYS = "parity/optim/re2tal__e2e_anet_re2tal_actionformer_swin_tiny.state_dict_keys.json"
NETWORK = "Re2Swin-T with ActionFormer"


def write_source(path: Path, keys: Path, rng: np.random.Generator) -> None:
    """Write a state dict of random values, statistics and integers as they can be."""
    listed = json.loads(keys.read_text())
    tensors = {}
    for key, (shape, dtype) in listed.items():
        is_float = dtype == "torch.float32"
        tensors[key] = rng.normal(size=shape).astype(np.float32) if is_float else np.ones(shape, np.int64)
    torch_io.write(path, tensors)


def measure(setting: str, *arguments: str | Path) -> Iterator[Row]:
    """Run the command in a process of its own: seconds on the clock, and of the processor."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "checkpoints_convert", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    yield "conversion", setting, seconds, "s"
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    yield "conversion", f"{setting}, processor time", used, "s"


def conversions(keys: Path) -> Iterator[Row]:
    """Convert the file, and write it back."""
    with tempfile.TemporaryDirectory() as folder:
        source, ours, back = (Path(folder) / name for name in ("source.safetensors", "ours", "back.safetensors"))
        write_source(source, keys, np.random.default_rng(0))
        config = ROOT / "configs" / "anet.py"
        yield from measure(f"{NETWORK}, from PyTorch", source, "--model", config, "--out", ours)
        yield from measure(f"{NETWORK}, to PyTorch", ours, "--to", "torch", "--dialect", "re2tal", "--out", back)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the larger of both
        yield "conversion", f"{NETWORK}, there and back, peak memory", peak, "MiB"


def main() -> None:
    """Print one line per figure and append them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV that the rows are appended to")
    options = parser.parse_args()
    shared = os.environ.get("RE2TAL_SHARED")
    if not shared:
        parser.error("RE2TAL_SHARED is not set: it names the folder that holds parity/.")
    rows = list(conversions(Path(shared) / KEYS))
    for benchmark, setting, value, unit in rows:
        print(f"{benchmark:12s} {setting:60s} {value:8.1f} {unit}")
    if options.out is not None:
        append_rows(options.out, rows, packages=("jax", "numpy", "safetensors"))


if __name__ == "__main__":
    main()
