"""What the compiler plans for a program: bytes per device, and what they are held for when most are in use.

XLA tells its buffers only in files that it dumps while it compiles; they go to a temporary folder.
"""

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from re2tal_jax.training.metrics import MIB, MemoryEstimate, memory_estimate

_PACKAGE = "/re2tal_jax/"
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([BKMGT])"
_TOO_LARGE = (rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", rf"Used {_SIZE} of {_SIZE} hbm")

_LIVE = re.compile(r"^    (\S+?)(\{[\d,]*\}):(\d+)-(\d+)$", re.MULTILINE)
_VALUE = re.compile(r"^ value: <\d+ (\S+?)(\{[\d,]*\})? @0> \(size=(\d+),offset=\d+\): (.*)$", re.MULTILINE)
_METADATA = re.compile(r"^\s+(?:ROOT )?%?(\S+) = .*metadata=\{([^{}]*)\}", re.MULTILINE)


@dataclass(frozen=True)
class Buffers:
    """Arrays of one shape and one origin that are held at once.

    Args:
        size: bytes of all of them.
        count: how many there are.
        shape: dtype and sizes as XLA writes them, f32[1,384,56,56,96].
        source: the line of code they come from, as far as XLA knows (that of the call, for what a chain computes
            again), and the operation; a parameter's path; or what the compiler itself put in, such as a copy.
    """

    size: int
    count: int
    shape: str
    source: str

    def __str__(self) -> str:
        several = f"{self.count} x " if self.count > 1 else ""
        return f"{self.size / MIB:10,.1f} MiB  {several + self.shape:36s} {self.source}"


@dataclass(frozen=True)
class Plan:
    """A program as compiled.

    Args:
        needed: bytes per device, at the peak; None where the backend does not tell.
        seconds: that compiling took.
        memory: what `needed` is made of; None also for a program that the compiler found too large.
        available: bytes that the compiler said a device has, when it found the program too large.
        largest: what is held at the peak, the most first; empty if the compiler does not tell.
    """

    needed: int | None
    seconds: float
    memory: MemoryEstimate | None = None
    available: int | None = None
    largest: tuple[Buffers, ...] = ()


def plan(lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None) -> Plan:
    """Compile a program for the devices it was lowered for, without running it, and return what is planned.

    Args:
        lowered: the program.
        options: of the compiler, such as `accelerators.compile_options` tells for a device.

    Raises:
        JaxRuntimeError: the compiler fails for another reason than the size of the program.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="re2tal-plan-") as folder:
        try:
            compiled = lowered.compile({**(options or {}), "xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            sizes = sizes_of_refusal(str(error))
            if sizes is None:
                raise
            needed, available = sizes
            return Plan(needed, time.monotonic() - begin, available=available)
        seconds = time.monotonic() - begin
        largest = buffers_at_peak(Path(folder))
    memory = memory_estimate(compiled)
    return Plan(memory and memory.peak, seconds, memory, largest=largest)


def sizes_of_refusal(message: str) -> tuple[int, int] | None:
    """Return (needed, available) bytes of the message that a program is too large; None if it says something else."""
    for pattern in _TOO_LARGE:
        match = re.search(pattern, message)
        if match is not None:
            needed, needed_unit, available, available_unit = match.groups()
            return round(float(needed) * _UNITS[needed_unit]), round(float(available) * _UNITS[available_unit])
    return None


def buffers_at_peak(folder: Path) -> tuple[Buffers, ...]:
    """Read from XLA's dump what is held when most is in use, alike buffers together, the most bytes first.

    The files are written for people and not promised to stay as they are: whatever is not found is left out.
    """
    dumps = sorted(folder.glob("*-buffer-assignment.txt"), key=lambda path: path.stat().st_size)
    if not dumps:
        return ()
    stem = str(dumps[-1]).removesuffix("-buffer-assignment.txt")  # the largest: helper programs are dumped too
    assignment, live, program = (_read(f"{stem}{end}") for end in ("-buffer-assignment.txt", "-live-range.txt", ".txt"))
    values = {  # of main memory, @0; the others are scratch memory on the chip
        (name, index or "{}"): (int(size), re.sub(r"\{[^{}]*\}", "", shape))
        for name, index, size, shape in _VALUE.findall(assignment)
    }
    ranges = [
        (int(begin), int(end), (name, index))
        for name, index, begin, end in _LIVE.findall(live)
        if (name, index) in values
    ]
    moment = _fullest([(begin, end, values[value][0]) for begin, end, value in ranges])
    sources = _sources(program)
    together: dict[tuple[str, str], list[int]] = defaultdict(list)
    for begin, end, value in ranges:
        if begin <= moment < end:
            size, shape = values[value]
            source = sources.get(value[0]) or re.sub(r"[.\d]+$", "", value[0])  # what the compiler put in, a copy
            together[shape, source].append(size)
    found = (Buffers(sum(sizes), len(sizes), shape, source) for (shape, source), sizes in together.items())
    return tuple(sorted(found, key=lambda buffers: -buffers.size))


def _fullest(ranges: Sequence[tuple[int, int, int]]) -> int:
    """Return when most bytes are held, given (begin, end, bytes) of each buffer; the first such moment."""
    changes: dict[int, int] = defaultdict(int)
    for begin, end, size in ranges:
        changes[begin] += size
        changes[end] -= size
    held, most, moment = 0, 0, 0
    for when, change in sorted(changes.items()):
        held += change
        if held > most:
            most, moment = held, when
    return moment


def _sources(program: str) -> dict[str, str]:
    """Return where each instruction of an HLO text comes from: 'file.py:12, operation'."""
    lines = _lines(program)
    sources = {}
    for name, metadata in _METADATA.findall(program):
        operation = re.search(r'op_name="([^"]*)"', metadata)
        at = re.search(r"stack_frame_id=(\d+)", metadata)
        line = lines.get(at[1], "") if at else ""
        last = operation[1].replace("\\", "").rpartition("/")[2] if operation else ""
        sources[name] = ", ".join(part for part in (line, last) if part)
    return sources


def _lines(program: str) -> dict[str, str]:
    """Return file and line of each stack frame of an HLO text: the innermost of this package, if one is."""
    files = dict(re.findall(r'^(\d+) "(.*)"$', _section(program, "FileNames"), re.MULTILINE))
    place = re.compile(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", re.MULTILINE)
    places = {
        number: (files.get(file, "?"), line) for number, file, line in place.findall(_section(program, "FileLocations"))
    }
    frame = re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", re.MULTILINE)
    frames = {
        int(number): (places.get(location, ("?", "?")), int(parent or 1) - 1)  # parents are written one too high
        for number, location, parent in frame.findall(_section(program, "StackFrames"))
    }
    lines = {}
    for number in frames:
        outer = number
        while outer in frames and _PACKAGE not in frames[outer][0][0]:
            outer = frames[outer][1] if frames[outer][1] < outer else 0
        file, line = frames[outer if outer in frames else number][0]
        lines[str(number)] = f"{'/'.join(Path(file).parts[-2:])}:{line}"
    return lines


def _section(program: str, title: str) -> str:
    return program.partition(f"\n{title}\n")[2].partition("\n\n")[0]


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""
