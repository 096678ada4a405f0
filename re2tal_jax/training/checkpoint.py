"""Saving and restoring a run: atomic, in the background, latest and best, onto any mesh, never a silent mismatch.

A checkpoint `<workdir>/checkpoints/<step>` holds the items `params`, `ema_params`, `progress` (step, optimizer and
localizer state), each a flat dict from path to array, and as JSON `data` (the position in the data), `config` and the
evaluation's `metrics`. A save that was killed leaves a folder with another name, which is ignored and cleaned up.
"""

import json
import logging
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from re2tal_jax.errors import CheckpointError, ConfigError, did_you_mean
from re2tal_jax.training.state import TrainState
from re2tal_jax.weights import holds_weights, load_weights

log = logging.getLogger(__name__)

ARRAYS = ("params", "ema_params", "progress")
JSON = ("data", "config")
CONFIG = "config.json"
"""In a run's folder: the resolved configuration."""

RANK = "rank"  # beside the metrics of an evaluation: the one that ranks checkpoints


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How many checkpoints are kept: the latest, and the best by an evaluation metric, of which more is better."""

    keep_latest: int = 1
    keep_best: int = 1
    best_metric: str = "average_mAP"

    def __post_init__(self):
        if self.keep_latest < 1 or self.keep_best < 0:
            raise ConfigError(
                f"checkpoints: keep_latest = {self.keep_latest} must be at least 1, or nothing could be resumed, and "
                f"keep_best = {self.keep_best} at least 0."
            )


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds."""

    step: int
    state: TrainState
    data: Any
    config: Any
    metrics: Mapping[str, float] | None


def prepare_workdir(workdir: Path) -> Path:
    """Create the folder and make sure that files can be written in it.

    Raises:
        ConfigError: it cannot be created or written, which is better known before training than after.
    """
    workdir = Path(workdir).absolute()
    probe = workdir / f".write-test-{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)  # another host's process may have the same number
    except OSError as error:
        raise ConfigError(
            f"workdir {workdir} cannot be written ({error.strerror}): choose another with --workdir."
        ) from error
    return workdir


def write_config(workdir: Path, config: Mapping[str, Any]) -> Path:
    """Write the resolved configuration as `config.json`, as a whole or not at all."""
    path = Path(workdir) / CONFIG
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    partial.replace(path)
    return path


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for saves under way when it is left."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        self.directory, self.config = Path(workdir).absolute() / "checkpoints", config
        self._manager = _open(self.directory, config, write=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluated checkpoint, or None where none was evaluated."""
        return _best_step(self._manager)

    def metrics(self, step: int) -> Mapping[str, float] | None:
        """The evaluation that was saved with a checkpoint."""
        saved = dict(self._manager.metrics(step) or {})
        return saved if saved.pop(RANK, None) is not None else None

    def save(
        self, state: TrainState, *, data: Any, config: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> int:
        """Start to save a state under its step and return that; arrays are copied before this returns.

        Args:
            state: the state after `state.step` steps.
            data: where this process stands in the data, JSON; every process keeps its own.
            config: the resolved configuration, JSON.
            metrics: evaluation results of this state; must hold the configured best metric.

        Raises:
            CheckpointError: that step is saved already.
            ConfigError: the metric that ranks checkpoints is missing.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            raise CheckpointError(f"{self.directory} holds step {step} already: resume from it, or use a new workdir.")
        if metrics is not None:
            self.check_metrics(metrics)
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        texts = {"data": ocp.args.JsonSave({"processes": _gather(data)}), "config": ocp.args.JsonSave(dict(config))}
        saved = {RANK: None} if metrics is None else self._ranked(metrics)  # orbax warns at every save without metrics
        self._manager.save(step, args=ocp.args.Composite(**arrays, **texts), metrics=saved)
        return step

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Let a complete checkpoint that was saved without an evaluation be as one that was saved with it.

        Only its small file of metrics is replaced, in one move: saving the step anew would first delete it.

        Raises:
            ConfigError: the metric that ranks checkpoints is missing.
        """
        self.check_metrics(metrics)
        if jax.process_index() == 0:
            path = self.directory / str(step) / "metrics" / "metrics"
            partial = path.with_name(f".metrics.{os.getpid()}")
            partial.write_text(json.dumps(self._ranked(metrics)))
            partial.replace(path)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"metrics of step {step}")  # the others read what was written
        self._manager.reload()

    def _ranked(self, metrics: Mapping[str, float]) -> dict[str, float]:
        saved = {name: float(value) for name, value in metrics.items()}
        return saved | {RANK: saved[self.config.best_metric]}

    def check_metrics(self, metrics: Collection[str]) -> None:
        """Raise ConfigError unless the metric that ranks checkpoints is among those of this name."""
        if self.config.best_metric not in metrics:
            words = did_you_mean(self.config.best_metric, metrics)
            raise ConfigError(f"best_metric = {self.config.best_metric!r} is none of the evaluation's. {words}")

    def wait(self) -> None:
        """Return when everything is on disk."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState, step: int | None = None) -> Restored:
        """Return a checkpoint's content, arrays placed as `abstract` says (on another mesh than they were saved from).

        Raises:
            CheckpointError: no checkpoint, an unreadable one, one of another architecture or dtype (the first
                differences named), or one of a run with another number of processes.
        """
        step = self._step(step)
        wanted = _items(abstract)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        args |= {name: ocp.args.JsonRestore() for name in JSON}
        with _telling_damage(self._manager, step):
            _check_alike(self._manager, step, wanted)
            content = self._manager.restore(step, args=ocp.args.Composite(**args))
        leaves = [content[item][path] for item, path in _keys(abstract)]
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        data = self._own_part(content["data"]["processes"])
        return Restored(step, state, data, content["config"], self.metrics(step))

    def _step(self, step: int | None) -> int:
        step = self.latest_step if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise CheckpointError(f"{self.directory} holds no checkpoint{'' if step is None else f' of step {step}'}.")
        return step

    def _own_part(self, data: list[Any]) -> Any:
        if len(data) != jax.process_count():
            raise CheckpointError(
                f"{self.directory} was saved by {len(data)} processes and this run has {jax.process_count()}: the data "
                f"cannot go on where they were. Start {len(data)} processes, or a new run from its parameters."
            )
        return data[jax.process_index()]


def best_or_latest(directory: Path) -> int:
    """Return the step of the best evaluated checkpoint of a workdir, of the latest where none was evaluated.

    Converted parameters are of step 0.

    Raises:
        CheckpointError: there is none.
    """
    if holds_weights(directory):
        return 0
    with _reading(directory, "latest") as (manager, latest):
        best = _best_step(manager)
        return latest if best is None else best


def load_params(
    directory: Path, which: Literal["ema", "raw"] = "ema", step: int | Literal["latest", "best"] = "latest"
) -> dict[str, np.ndarray]:
    """Return the parameters of a checkpoint by path, as host arrays: the averaged ones, or those that were trained.

    `directory` is a run's workdir, its checkpoints folder, or a folder of converted parameters, which has one set.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    if holds_weights(directory):
        return load_weights(directory)
    item = {"ema": "ema_params", "raw": "params"}[which]
    with _reading(directory, step) as (manager, found):
        tree = manager.item_metadata(found)[item].tree
        as_numpy = {path: np.empty(saved.shape, saved.dtype) for path, saved in tree.items()}
        args = {item: ocp.args.StandardRestore(as_numpy)}
        return manager.restore(found, args=ocp.args.Composite(**args))[item]


def load_config(directory: Path, step: int | Literal["latest", "best"] = "latest") -> dict[str, Any]:
    """Return the configuration that was saved with a checkpoint."""
    with _reading(directory, step) as (manager, found):
        return manager.restore(found, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]


def _rank(metrics: Mapping[str, float | None]) -> float:
    """A checkpoint's place among others: its metric, below all if it was not evaluated or the metric is NaN."""
    value = metrics.get(RANK)
    return value if value is not None and np.isfinite(value) else -np.inf


def _best_step(manager: ocp.CheckpointManager) -> int | None:
    step = manager.best_step()
    return step if step is not None and np.isfinite(_rank(manager.metrics(step) or {})) else None


def _open(directory: Path, config: CheckpointConfig, *, write: bool) -> ocp.CheckpointManager:
    # max_to_keep together with best_fn would delete the latest step; best_fn alone makes orbax write metrics.
    best = BestN(n=config.keep_best, get_metric_fn=_rank, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(n=config.keep_latest), best]),
        best_fn=_rank,
        create=write,
        cleanup_tmp_directories=write,
    )
    handlers = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
    handlers |= {name: ocp.JsonCheckpointHandler() for name in JSON}
    try:
        return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
    except ValueError as error:  # the metrics of all checkpoints are read here
        raise CheckpointError(
            f"{directory}: the metrics of a checkpoint cannot be read: {error}. Delete the folder "
            "<step> whose file metrics/metrics is damaged to go on from another."
        ) from error


@contextmanager
def _reading(directory: Path, step: int | str) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    directory = Path(directory).absolute()
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is no folder: give a run's workdir, its checkpoints folder, or one that a conversion wrote."
        )
    with _open(directory, CheckpointConfig(), write=False) as manager:
        named = {"latest": manager.latest_step, "best": lambda: _best_step(manager)}
        found = named[step]() if isinstance(step, str) else step
        if found is None or found not in manager.all_steps():
            have = ", ".join(map(str, manager.all_steps())) or "none"
            raise CheckpointError(f"{directory} holds no checkpoint {step!r}. Complete ones: {have}.")
        with _telling_damage(manager, found):
            yield manager, found


@contextmanager
def _telling_damage(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    hook = sys.unraisablehook

    def quieter(unraisable: "sys.UnraisableHookArgs") -> None:
        # The first array that cannot be read ends orbax's event loop, and each of the others would tell so.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = quieter
    try:
        yield
        sys.unraisablehook = hook  # not after an error, some of those others are still to come
    except CheckpointError:
        sys.unraisablehook = hook
        raise
    except (ValueError, KeyError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error  # str() of that one is quoted
        reason = str(text).split(" [tensorstore_spec")[0]
        raise CheckpointError(
            f"{manager.directory}/{step} cannot be read: {reason}\n"
            "If it is damaged, delete that folder to go on from an earlier checkpoint."
        ) from error


def _keys(state: TrainState) -> list[tuple[str, str]]:
    """Item and path of every leaf, in the order of the tree's leaves."""
    keys = []
    for path, _ in jax.tree_util.tree_leaves_with_path(state):
        field = path[0].name
        item = field if field in ARRAYS else "progress"
        rest = path[1:] if field in ARRAYS else path
        keys.append((item, jax.tree_util.keystr(rest, simple=True, separator=".")))
    return keys


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """Take a state apart into the flat dicts that are saved."""
    items: dict[str, dict[str, Any]] = {name: {} for name in ARRAYS}
    for (item, path), leaf in zip(_keys(state), jax.tree.leaves(state), strict=True):
        items[item][path] = leaf
    return items


def _check_alike(manager: ocp.CheckpointManager, step: int, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise CheckpointError unless a checkpoint has the wanted arrays, of their shapes and dtypes, and no others.

    Orbax would cast a wrong dtype in silence, and tell of a missing array without naming the likely other.
    """
    problems = []
    metadata = manager.item_metadata(step)
    for item, tree in wanted.items():
        saved = metadata[item].tree if metadata[item] is not None else {}
        if not saved:
            raise KeyError(f"{item} is empty or has lost its file _METADATA.")
        for path in (p for p in tree if p not in saved):
            problems.append(f"{item} lacks {path} {tree[path].shape}. {did_you_mean(path, saved)}")
        for path in (p for p in saved if p not in tree):
            problems.append(f"{item} has {path} {saved[path].shape}, which the model lacks. {did_you_mean(path, tree)}")
        for path in (p for p in tree if p in saved):
            if tuple(saved[path].shape) != tuple(tree[path].shape):
                problems.append(f"{item}: {path} has shape {saved[path].shape}, the model {tuple(tree[path].shape)}")
            elif np.dtype(saved[path].dtype) != np.dtype(tree[path].dtype):
                problems.append(f"{item}: {path} is {saved[path].dtype}, the model {np.dtype(tree[path].dtype)}")
    if problems:
        shown = "\n  ".join(problems[:8]) + ("" if len(problems) <= 8 else f"\n  … and {len(problems) - 8} more")
        raise CheckpointError(
            f"{manager.directory}/{step} belongs to another architecture. Resume with the configuration it was saved "
            f"with, or start a new run with another --workdir. {len(problems)} differences:\n  {shown}"
        )


def _gather(value: Any) -> list[Any]:
    """Return the JSON value of every process, in order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray([text.size], np.int32)).ravel()
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
