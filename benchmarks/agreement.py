"""Do contestants compute the same? Features and gradients of those that are to agree, compared before any is timed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.conductor import Contestant, WorkerError, started
from checkpoints_convert.verify import compare
from re2tal_jax.errors import Re2TalError

TOLERANCE = 1e-3
"""Of float32 features and gradients, relative to the largest value of each array; what is seen is near 1e-5."""


class BenchmarkError(Re2TalError):
    """Contestants that compute different things, or none left to time."""


def compare_outputs(
    contestants: Sequence[Contestant],
    frames: int,
    folder: Path,
    translate: Callable[[Contestant, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
) -> list[Contestant]:
    """Return the contestants that could be run, after comparing features and gradients of those that are to agree.

    Our workers run a timed step too, so that what they compile is on disk when they are timed.

    Args:
        contestants: all of them.
        frames: how many frames to compare on.
        folder: for what workers write and say.
        translate: gives arrays by our paths under the names of a contestant of OpenTAD's.

    Raises:
        BenchmarkError: arrays differ by more than TOLERANCE, or on one side nothing could be run.
    """
    outputs: dict[str, dict[str, np.ndarray]] = {}
    running = []
    for contestant in contestants:
        out = folder / f"{contestant.title}.npz"
        try:
            with started(contestant, folder) as worker:
                worker.ask("build", **contestant.build)
                worker.ask("check", frames=frames, out=str(out))
                if contestant.ours:
                    worker.ask("step")
        except WorkerError as error:
            print(f"left out   {error}")
            continue
        with np.load(out, allow_pickle=False) as arrays:
            outputs[contestant.title] = {name: arrays[name] for name in arrays.files}
        out.unlink()
        running.append(contestant)
    for side, ours in (("OpenTAD's", False), ("ours", True)):
        if not any(contestant.ours == ours for contestant in running):
            raise BenchmarkError(f"None of {side} could be run; the reasons are above.")
    for theirs in (c for c in running if not c.ours):
        partners = [c for c in running if c.ours and c.rewired == theirs.rewired]
        if not partners:
            print(f"unchecked  {theirs.title}: none of ours computes the same")
        for ours in partners:
            _compare_pair(ours, theirs, outputs[ours.title], outputs[theirs.title], translate)
    return running


def _compare_pair(
    ours: Contestant,
    theirs: Contestant,
    mine: Mapping[str, np.ndarray],
    other: Mapping[str, np.ndarray],
    translate: Callable[[Contestant, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
) -> None:
    """Print the largest difference of features and of gradients, and raise BenchmarkError if one is too large."""
    prefix = "gradient "
    gradients = {name.removeprefix(prefix): value for name, value in mine.items() if name.startswith(prefix)}
    mine = {"features": mine["features"]}
    mine.update({prefix + name: value for name, value in translate(theirs, gradients).items()})
    if odd := sorted(mine.keys() ^ other.keys()):
        raise BenchmarkError(
            f"{ours.title} and {theirs.title} do not give the same arrays: {len(odd)} are of one alone, such as "
            f"{odd[0]}."
        )
    features = compare("features", mine["features"], other["features"], TOLERANCE)
    worst = max(
        (compare(name, mine[name], other[name], TOLERANCE) for name in mine if name != "features"),
        key=lambda row: row.error,
    )
    print(
        f"checked    {ours.title} against {theirs.title}: features differ by {features.error:.1e}, of "
        f"{len(mine) - 1} gradients at most by {worst.error:.1e}"
    )
    for row in (features, worst):
        if not row.passed:
            raise BenchmarkError(
                f"{ours.title} and {theirs.title} compute different things: {row.name} differs by {row.error:.1e} of "
                f"its largest value, allowed is {TOLERANCE:.0e}. Nothing was timed."
            )
