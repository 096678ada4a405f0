"""A training run: steps, log lines, evaluations, checkpoints, and an exact continuation after any end."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from re2tal_jax.data.pipeline import Loader, Prefetch
from re2tal_jax.errors import ConfigError, DataError, Re2TalError
from re2tal_jax.training.checkpoint import Checkpoints, write_config
from re2tal_jax.training.compile_cache import cache_hits
from re2tal_jax.training.header import log_header, warn_of_start_in_average
from re2tal_jax.training.host_memory import give_back
from re2tal_jax.training.interrupt import Leave, StopSignals
from re2tal_jax.training.metrics import MetricWriter, Progress, memory_estimate
from re2tal_jax.training.optim import CONSTANTS, Duration, Params
from re2tal_jax.training.sharding import put_batch
from re2tal_jax.training.state import StateSpec, TrainState
from re2tal_jax.types import Batch

log = logging.getLogger(__name__)


class NonFiniteError(Re2TalError):
    """A loss or gradient that is NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """When a run ends, and what it does on the way; a run always ends with an evaluation and a checkpoint."""

    stop: Duration
    evaluate_every: Duration
    checkpoint_every: Duration
    log_every_steps: int = 10

    def __post_init__(self):
        if self.log_every_steps < 1:
            raise ConfigError(f"log_every_steps = {self.log_every_steps} must be >= 1.")

    def in_steps(self, steps_per_epoch: int) -> tuple[int, int, int]:
        """Return (stop, evaluate_every, checkpoint_every) in steps, each at least 1."""
        stop, evaluate, checkpoint = (
            length.to_steps(steps_per_epoch) for length in (self.stop, self.evaluate_every, self.checkpoint_every)
        )
        if min(stop, evaluate, checkpoint) < 1:
            steps = f"{stop}, {evaluate} and {checkpoint} steps"
            raise ConfigError(f"stop, evaluate_every, checkpoint_every are {steps}; each must be at least 1.")
        return stop, evaluate, checkpoint


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: its state, the evaluation of that step (None if it has none), and whether it was stopped."""

    state: TrainState
    step: int
    metrics: Mapping[str, float] | None
    interrupted: bool


@dataclass(kw_only=True)
class Run:
    """Everything a run is made of; `run()` trains from the latest checkpoint of the workdir, or from the start.

    Args:
        train_step: see `make_train_step`.
        loader: endless batches; its place is saved with every checkpoint.
        key: the run's random key, the same whenever it is resumed.
        evaluate: (averaged parameters, step) -> metrics, the one that ranks checkpoints among them.
        saved_config: the resolved configuration, JSON, kept with every checkpoint.
        initial: parameters that replace freshly drawn ones when nothing is resumed.
        about: lines for the start-up header, such as data counts and findings.
    """

    config: LoopConfig
    spec: StateSpec
    train_step: Any
    mesh: Mesh
    loader: Loader
    key: PRNGKeyArray
    workdir: Path
    checkpoints: Checkpoints
    evaluate: Callable[[Params, int], Mapping[str, float]]
    saved_config: Mapping[str, Any]
    initial: Mapping[str, np.ndarray] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def run(self) -> TrainResult:
        """Train to the end, or until a signal; see the module's docstring.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite. No state that it has touched is saved.
            CheckpointError: the workdir's latest checkpoint does not fit the model.
        """
        log_header(self.spec, self.mesh, self.workdir, self.about)
        self._begin()
        if jax.process_index() == 0:
            write_config(self.workdir, self.saved_config)  # not before: the folder may hold a run that does not fit
        self.progress = Progress(self.total, self.mesh.local_devices)
        self.writer = MetricWriter(self.workdir, resumed_step=self.step, enabled=jax.process_index() == 0)
        self.pending: deque[tuple[int, Any, jax.Array]] = deque()
        try:
            with StopSignals() as self.signals:
                interrupted = self._train()
        finally:
            self.writer.close()
            self.checkpoints.wait()
        if interrupted:
            log.warning(
                "stopped at step %d of %d; run the same command again to go on from there.", self.step, self.total
            )
        return TrainResult(self.state, self.step, self.metrics, interrupted)

    def _begin(self) -> None:
        """Restore the latest checkpoint, or create the state."""
        per_epoch = self.loader.steps_per_epoch
        self.total, self.evaluate_every, self.checkpoint_every = self.config.in_steps(per_epoch)
        if self.checkpoints.latest_step is None:
            self._warn_of_frozen_noise()
            warn_of_start_in_average(self.spec.optimizer.config.ema_decay, self.total)
            self.state, self.metrics, self.step = self.spec.create(self.initial), None, 0
            log.info("start: new run of %d steps, %d an epoch", self.total, per_epoch)
        else:
            restored = self.checkpoints.restore(self.spec.abstract)
            self.state, self.metrics, self.step = restored.state, restored.metrics, restored.step
            self.loader.set_state(restored.data)
            log.info("start: resumed at step %d of %d, %d an epoch", self.step, self.total, per_epoch)
        self.position = self.loader.get_state()
        self.saved_at = self.checkpoints.latest_step

    def _warn_of_frozen_noise(self) -> None:
        given = self.initial or {}
        rows = [row for row in self.spec.optimizer.table() if row.frozen and row.group != CONSTANTS]
        frozen = [row.path for row in rows if row.path not in given]
        if frozen:
            log.warning(
                "%d frozen parameters, such as %s, keep the values they are drawn with: recipes that freeze norms "
                "start from a pretrained backbone (config.backbone.checkpoint).",
                len(frozen),
                frozen[0],
            )

    def _train(self) -> bool:
        """Train and evaluate to the end; return whether a signal came first."""
        if not self._make_up_for_evaluation():
            return True
        if self.step < self.total:
            with Prefetch(self.loader, lambda rows: put_batch(rows, self.mesh)) as batches:
                return self._take_steps(batches)
        return False

    def _make_up_for_evaluation(self) -> bool:
        """Evaluate the checkpoint that was resumed from, if it was left before; return False if a signal came again."""
        if self.step == 0 or self.metrics is not None or not self._evaluation_is_due():
            return True
        log.info("step %d was saved without the evaluation that is due there: it comes first", self.step)
        begin = time.monotonic()
        try:
            self._evaluate()
        except Leave:
            return False
        assert self.metrics is not None  # _evaluate
        self.checkpoints.add_metrics(self.step, self.metrics)
        self.progress.pause(time.monotonic() - begin)
        return True

    def _take_steps(self, batches: Prefetch) -> bool:
        batch = self._next_batch(batches)
        self._compile(batch)
        while True:
            self.state, metrics = self.train_step(self.state, batch, self.key)
            self.step, self.metrics = self.step + 1, None
            self._settle()  # of the step before, while the devices work on this one
            self.pending.append((self.step, metrics, batch.window))
            if self.signals.agreed(may_wait=self.step % self.config.log_every_steps == 0):
                self._save()
                return True
            if not self._evaluate_and_save():
                return True
            if self.step == self.total:
                return False
            batch = self._next_batch(batches)

    def _next_batch(self, batches: Prefetch) -> Batch:
        """Take a batch; if the data fail, keep what was trained before telling."""
        begin = time.monotonic()
        try:
            batch = next(batches)
        except Exception as error:
            if self.step > 0 and jax.process_count() == 1:  # saving needs all processes, the others are in the step
                self._save()
            if isinstance(error, StopIteration):
                raise DataError(f"the training data ended at step {self.step}; batches must be endless.") from None
            raise
        self.position = batches.get_state()
        self.progress.waited(time.monotonic() - begin)
        return batch

    def _compile(self, batch: Batch) -> None:
        """Compile the step ahead of the first call, which then finds it, to tell its time and memory apart."""
        begin = time.monotonic()
        lowered = self.train_step.lower(self.state, batch, self.key)
        with cache_hits() as hits:
            compiled = lowered.compile()
        seconds = time.monotonic() - begin
        give_back()
        how = "from the cache" if hits else "compiled"
        log.info("train step: %s in %.1f s, plans %s", how, seconds, memory_estimate(compiled))
        self.progress.pause(seconds)

    def _settle(self) -> None:
        """Wait for the metrics of the steps under way; stop if they are not finite, log them when it is time."""
        while self.pending:
            step, metrics, windows = self.pending.popleft()
            metrics = jax.device_get(metrics)
            if not all(math.isfinite(metrics[name]) for name in ("loss/total", "grad_norm")):
                self._stop_not_finite(step, metrics, windows)
            self.progress.add(metrics)
            if step % self.config.log_every_steps == 0 or step == self.total:
                self.writer.write(step, self.progress.report(step))

    def _stop_not_finite(self, step: int, metrics: Mapping[str, Any], windows: jax.Array) -> None:
        values = ", ".join(f"{k} = {float(v):g}" for k, v in metrics.items() if not k.startswith("lr/"))
        mine = np.concatenate([np.asarray(shard.data) for shard in windows.addressable_shards])
        videos = ", ".join(self.loader.windows[i].record.video_id for i in mine if i >= 0)
        last = "nothing was before" if self.saved_at is None else f"the latest saved is step {self.saved_at}"
        raise NonFiniteError(
            f"step {step} is not finite: {values}. Its videos: {videos}. No state from here on is saved; {last}. "
            "Look at these videos, lower the learning rate, or compute in float32."
        )

    def _evaluate_and_save(self) -> bool:
        """Do what is due after this step; return False if a signal came while evaluating."""
        evaluate = self._evaluation_is_due()
        if not evaluate and self.step % self.checkpoint_every:
            return True
        self._settle()
        begin = time.monotonic()
        try:
            if evaluate:
                self._evaluate()
        except Leave:
            return False
        finally:
            self._save()  # also when the evaluation fails: the training before it is not lost
            self.progress.pause(time.monotonic() - begin)
        return True

    def _evaluation_is_due(self) -> bool:
        return self.step % self.evaluate_every == 0 or self.step >= self.total

    def _evaluate(self) -> None:
        """Evaluate this step and tell it; a signal leaves the evaluation (Leave), and then nothing is told."""
        with self.signals.leaving_early():
            metrics = dict(self.evaluate(self.state.ema_params, self.step))
        self.checkpoints.check_metrics(metrics)
        self.metrics = metrics
        self.writer.write(self.step, {f"eval/{name}": value for name, value in metrics.items()})
        log.info("step %d | evaluation | %s", self.step, " ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def _save(self) -> None:
        """Save this step once, if everything up to it is finite."""
        self._settle()
        if self.step != self.saved_at:
            self.checkpoints.save(self.state, data=self.position, config=self.saved_config, metrics=self.metrics)
            self.saved_at = self.step
