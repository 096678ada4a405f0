"""The conductor's side of a benchmark in turns: contestants, each in a process of its own, step by step.

One runs at a time, all stay alive, and every round begins with another, so that what the machine does beside them meets
all alike. `benchmarks.worker` is the side of their processes.
"""

import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from re2tal_jax.errors import Re2TalError

ROOT = Path(__file__).resolve().parents[1]
PAUSE = 0.25
"""Seconds between two turns: idle threads of the one before may spin for some time."""


class WorkerError(Re2TalError):
    """A contestant's process that failed or died; `module` is what it could not import, if that was it."""

    def __init__(self, text: str, module: str = ""):
        super().__init__(text)
        self.module = module


@dataclass(frozen=True)
class Contestant:
    """One backbone.

    Args:
        title: what it is called, unique.
        ours: whose it is.
        rewired: whether it computes the rewired network or the ordinary one.
        command: its worker.
        build: arguments of the worker's command `build`.
        environment: of the worker, beside this process's own.
    """

    title: str
    ours: bool
    rewired: bool
    command: tuple[str, ...]
    build: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Measured:
    """What was seen of a contestant: seconds of each step; memory in bytes, before its first step and at most."""

    seconds: list[float]
    start: int
    peak: int = 0
    device_peak: int | None = None

    @property
    def fastest(self) -> float:
        """Seconds of its fastest step."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Seconds of its median step."""
        return statistics.median(self.seconds)

    @property
    def memory(self) -> int:
        """Bytes that it is compared by: the GPU's if it ran there."""
        return self.peak if self.device_peak is None else self.device_peak


class Worker:
    """A contestant's process; `ask` it, one command at a time."""

    def __init__(self, contestant: Contestant, log: Path):
        self.title, self._log = contestant.title, log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                contestant.command,
                cwd=ROOT,
                env={**os.environ, **contestant.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is for the conductor
                text=True,
                encoding="utf-8",
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a command.

        Raises:
            WorkerError: the command failed, or the process is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.title}: {self._death()} at the command {do}.\n{self._words()}")
        answer = json.loads(line)
        if "error" in answer:
            text = f"{self.title}: {do} failed with {answer['kind']}: {answer['error']}\n{self._words()}"
            raise WorkerError(text, answer.get("module", ""))
        return answer

    def _death(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "the process was killed, as the system does when memory runs out,"
        return f"the process ended with exit code {code}"

    def _words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-8:])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.communicate(timeout=10)  # closes its stdin, at which it ends
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


@contextmanager
def started(contestant: Contestant, folder: Path) -> Iterator[Worker]:
    """Start a contestant's worker, and end it whatever happens; `folder` keeps what it says."""
    worker = Worker(contestant, folder / f"{contestant.title}.log")
    try:
        yield worker
    finally:
        worker.close()


def take_turns(contestants: Sequence[Contestant], repeats: int, folder: Path) -> dict[str, Measured]:
    """Return what was measured, by title: all processes alive, one step of each in turn, `repeats` times.

    Each has one step before, which is not counted. Every round begins with another contestant. One that fails is told
    and left out; KeyboardInterrupt ends the rounds if one is complete.
    """
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        measured: dict[str, Measured] = {}

        def attempt(title: str, *commands: tuple[str, dict[str, Any]]) -> list[dict[str, Any]] | None:
            try:
                return [workers[title].ask(do, **arguments) for do, arguments in commands]
            except WorkerError as error:
                print(f"left out   {error}")
                del workers[title]
                measured.pop(title, None)
                return None

        for contestant in contestants:
            workers[contestant.title] = stack.enter_context(started(contestant, folder))
            if answers := attempt(contestant.title, ("build", dict(contestant.build)), ("step", {})):
                measured[contestant.title] = Measured([], answers[0]["rss"])
                if contestant.ours and not answers[1]["from_cache"]:
                    print(f"note       {contestant.title} was compiled in its process: its peak memory is of that")
        try:
            for number in range(repeats):
                for title in _rotated(list(workers), number):
                    time.sleep(PAUSE)
                    if answers := attempt(title, ("step", {})):
                        measured[title].seconds.append(answers[0]["seconds"])
                now = ", ".join(f"{title} {m.seconds[-1]:.3f} s" for title, m in measured.items())
                print(f"round {number + 1}/{repeats}  {now}")
        except KeyboardInterrupt:
            complete = min((len(m.seconds) for m in measured.values()), default=0)
            if not complete:
                raise
            print(f"interrupted after {complete} complete rounds")
        for title in list(workers):
            if answers := attempt(title, ("memory", {})):
                measured[title].peak = answers[0]["peak"]
                measured[title].device_peak = answers[0].get("device_peak")
    return measured


def _rotated(titles: list[str], by: int) -> list[str]:
    by %= max(len(titles), 1)
    return titles[by:] + titles[:by]
