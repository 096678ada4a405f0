"""What a run tells: one console line, `metrics.jsonl`, TensorBoard; how much memory it takes."""

import json
import logging
import math
import os
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

log = logging.getLogger(__name__)

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes per device that the compiler plans for a program (`compiled.memory_analysis()`)."""

    arguments: int
    outputs: int
    shared: int
    temporary: int
    code: int = 0

    @property
    def peak(self) -> int:
        """Arguments, outputs that do not take an argument's place, temporaries and the program, all at once."""
        return self.arguments + self.outputs - self.shared + self.temporary + self.code

    def __str__(self) -> str:
        parts = (
            f"arguments {self.arguments / MIB:,.1f} of which outputs take {self.shared / MIB:,.1f}, "
            f"temporaries {self.temporary / MIB:,.1f}"
        )
        return f"{self.peak / MIB:,.1f} MiB per device ({parts})"


def memory_estimate(compiled: jax.stages.Compiled) -> MemoryEstimate | None:
    """Return what the compiler plans, or None where the backend does not tell."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return MemoryEstimate(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        shared=stats.alias_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,  # told by TPUs, where it lies in the same memory
    )


def peak_memory(devices: Sequence[jax.Device]) -> tuple[str, int]:
    """Return ("device", bytes) of the fullest device so far, or ("host RSS", bytes) where devices keep no count."""
    stats = [device.memory_stats() for device in devices]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return "device", max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return "host RSS", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def format_seconds(seconds: float) -> str:
    """Return 93784.0 as '1d 02:03:04'; an unknown time as '?'."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"


class MetricWriter:
    """Writes scalars to every place at once. Lines of a previous run beyond the resumed step are dropped first.

    `metrics.jsonl` has one object per written step: {"step": 20, "loss/total": …}; a kill loses at most a line.
    """

    def __init__(self, workdir: Path, *, resumed_step: int, enabled: bool = True):
        self.path = workdir / "metrics.jsonl"
        self.enabled = enabled
        if enabled:
            drop_lines_after(self.path, resumed_step)
            self._file = self.path.open("a")
            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append a line and flush it."""
        if not self.enabled:
            return
        self._file.write(json.dumps({"step": step, **{k: float(v) for k, v in scalars.items()}}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._tensorboard.add_scalar(re.sub(r"[^\w./-]", "_", name), float(value), step)  # mAP@0.5 is no tag there

    def close(self) -> None:
        """Flush everything; writing afterwards is an error."""
        if self.enabled:
            self._file.close()
            self._tensorboard.close()


def drop_lines_after(path: Path, step: int) -> None:
    """Keep only the lines of a JSONL file up to and including `step`, whole ones; replaced in one move."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that a kill cut short
        return math.inf


class Progress:
    """Turns the metrics of single steps into a line now and then: means since the last line, speed, time left.

    Time spent outside of steps (compiling, evaluating, saving) is left out through `pause`.
    """

    def __init__(self, total_steps: int, devices: Sequence[jax.Device]):
        self.total_steps, self.devices = total_steps, devices
        self._sums: dict[str, float] = {}
        self._count, self._since, self._waited = 0, time.monotonic(), 0.0

    def waited(self, seconds: float) -> None:
        """Count these seconds of training as spent waiting for data."""
        self._waited += seconds

    def pause(self, seconds: float) -> None:
        """Do not count these seconds as training."""
        self._since += seconds

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Take in the metrics of one step."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._count += 1

    def report(self, step: int) -> dict[str, float]:
        """Log one line, start anew, and return the scalars to write."""
        scalars = {name: total / self._count for name, total in self._sums.items()}
        seconds = (time.monotonic() - self._since) / self._count
        where, peak = peak_memory(self.devices)
        losses = " ".join(f"{k.removeprefix('loss/')} {v:.4f}" for k, v in sorted(scalars.items()) if "loss/" in k)
        log.info(
            "step %d/%d | ETA %s | %.3f s/step | %s | grad norm %.3f | peak %s %.0f MiB",
            step,
            self.total_steps,
            format_seconds(seconds * (self.total_steps - step)),
            seconds,
            losses,
            scalars["grad_norm"],
            where,
            peak / MIB,
        )
        scalars |= {"sec_per_step": seconds, "data_sec_per_step": self._waited / self._count}
        scalars[f"peak_mib/{where.replace(' ', '_')}"] = peak / MIB
        self._sums, self._count, self._since, self._waited = {}, 0, time.monotonic(), 0.0
        return scalars
