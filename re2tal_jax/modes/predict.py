"""`--mode predict`: a trained detector on files of your own, or on the evaluation subset, with or without labels.

Every video is on the disk as soon as its last window is done (`inference.finished`); the same command goes on behind
the finished ones, after Ctrl-C, SIGTERM or a kill.
"""

import csv
import inspect
import io
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from re2tal_jax.activitynet_format import to_activitynet, write_activitynet
from re2tal_jax.data import DATASETS
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.findings import counted
from re2tal_jax.data.video_files import find_video_files, open_video_files
from re2tal_jax.errors import CheckpointError, ConfigError, DataError
from re2tal_jax.evaluation import DetectionMap, detection_map
from re2tal_jax.experiment import open_split
from re2tal_jax.external_classifier import ExternalClassifier
from re2tal_jax.inference.finished import Finished, FinishedVideos
from re2tal_jax.inference.html_report import write_html_report
from re2tal_jax.inference.localize import TrainedDetector, localize_all, open_loader
from re2tal_jax.settings import Settings
from re2tal_jax.trained import CLASSES, check_same_classes, class_list, open_trained, stored_classes
from re2tal_jax.training.checkpoint import best_or_latest
from re2tal_jax.training.compile_cache import compile_cache
from re2tal_jax.training.metrics import MIB, peak_memory
from re2tal_jax.training.sharding import initialise_distributed, open_mesh
from re2tal_jax.types import Detections
from re2tal_jax.weights import holds_parameters

log = logging.getLogger(__name__)

FOLDER, PREDICTIONS, TABLE, PAGE = "predict", "predictions.json", "predictions.csv", "report.html"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What there is to predict on: the file of every video by its id, and for a subset its data set."""

    files: Mapping[str, Path]
    classes: Sequence[str]
    external: ExternalClassifier | None
    dataset: Dataset | None = None
    records: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    """What an annotation says of a video: where its windows lie in time depends on it."""

    def finished(self, finished: FinishedVideos) -> set[str]:
        """Return the videos that are finished as they are now."""
        return {i for i, file in self.files.items() if finished.holds(i, file, self.records.get(i, ()))}

    def open(self, video_ids: Sequence[str], settings: Settings) -> tuple[Dataset, dict[str, str]]:
        """Return some of the videos as a data set, and the reason of each that cannot be read."""
        if self.dataset is None:
            files = {video_id: self.files[video_id] for video_id in video_ids}
            return open_video_files(files, on_error=settings.eval.loader.on_error, classes=self.classes)
        chosen = set(video_ids)
        records = tuple(record for record in self.dataset.records if record.video_id in chosen)
        return replace(self.dataset, records=records), {}


def predict(
    settings: Settings,
    config: Mapping[str, Any],
    workdir: Path,
    *,
    videos: Sequence[str] | None = None,
    checkpoint: str | None = None,
    out: str | None = None,
    classes: str | None = None,
    overwrite: bool = False,
) -> dict[str, Detections]:
    """Write the detections of every video that can be read, as json, table and page, and return them by video id.

    Of several processes the first writes and returns them.

    Args:
        settings: those that the checkpoint was trained with.
        config: not used.
        workdir: the run's folder.
        videos: files, folders, patterns; None takes the evaluation subset, whose mAP is told if it has labels.
        checkpoint: a run's folder, or converted parameters; None is the workdir.
        out: folder of the results; None is `predict` in the workdir.
        classes: a file with the class list, for a checkpoint that carries none.
        overwrite: start anew, whatever is finished in `out`.

    Raises:
        ConfigError: settings that cannot run or are not those of the checkpoint, an unknown or another class list.
        DataError: a video that cannot be read, where `config.eval.loader.on_error` is "error"; none that can.
        CheckpointError: no checkpoint, one that does not fit, or `out` holds the results of another.
    """
    del config
    initialise_distributed(settings.distributed)
    mesh = open_mesh(settings.mesh)
    directory = workdir if checkpoint is None else Path(checkpoint)
    if checkpoint is None:
        _check_trained(workdir)
    step = best_or_latest(directory)
    given = None if classes is None else Path(classes)
    task = open_subset(settings, directory, given) if videos is None else open_files(settings, directory, given, videos)
    model = open_trained(settings, directory, mesh, settings.mesh, task.classes, step=step, external=task.external)
    folder = _prepare(workdir / FOLDER if out is None else Path(out))
    writes = jax.process_index() == 0
    finished_videos = FinishedVideos(folder, model.identity, overwrite=overwrite, writes=writes)
    with finished_videos as finished, _sigterm_interrupts():
        before = task.finished(finished)
        log.info(
            "predicting on %s, %d finished before, with step %d of %s",
            counted(len(task.files), "video"),
            len(before),
            step,
            directory,
        )
        with compile_cache(workdir if checkpoint is None else folder):
            done, damaged = _predict(model, task, [i for i in task.files if i not in before], finished, settings)
        if damaged:
            shown = "".join(f"\n  {video_id!r}: {reason}" for video_id, reason in damaged.items())
            log.warning("%d of %d videos could not be read, or not wholly:%s", len(damaged), len(task.files), shown)
        if not before and not done:
            raise DataError(f"None of {len(task.files)} videos can be read; the first: {next(iter(damaged.values()))}")
        if not writes:
            return {}
        found = {video_id: finished.read(video_id) for video_id in task.files if video_id in before or video_id in done}
        _write(folder, task, model, settings, found)
    return {video_id: result.detections for video_id, result in found.items()}


def open_subset(settings: Settings, directory: Path, given: Path | None) -> Task:
    """Return the videos of the evaluation subset, labelled or not.

    Their classes are those of the checkpoint, where it says, and of the annotation alone where it does not.

    Raises:
        ConfigError: the annotation has other classes than the checkpoint.
        DataError: the annotation cannot be used; as the external classifier.
    """
    known = given is not None or stored_classes(directory) is not None
    names = class_list(directory, settings, given) if known else None
    options: dict[str, Any] = {}
    parameters = inspect.signature(DATASETS[settings.data["name"]]).parameters
    if "unlabelled" in parameters:
        options["unlabelled"] = True
    if names is not None and settings.num_classes > 1 and "classes" in parameters and not settings.data.get("classes"):
        options["classes"] = names  # the file may show only some of them, or none
    try:
        dataset = open_split(replace(settings, data={**settings.data, **options}), settings.eval, train=False)
    except DataError as error:
        if "classes" not in options:
            raise
        raise DataError(f"{error} The classes are those of {given or directory / CLASSES}.") from error
    if names is not None:
        check_same_classes(dataset.classes, names, "config.data", directory)
    external = None
    if settings.external_classifier is not None:
        external = ExternalClassifier(settings.external_classifier)
        external.check_videos(record.video_id for record in dataset.records)
    files = dict(dataset.video_paths) | {i: source.kept_in for i, source in dataset.video_sources.items()}
    if dataset.features is not None:
        files = {video_id: places[0].path for video_id, places in dataset.features.places.items()}
    if missing := [record.video_id for record in dataset.records if record.video_id not in files]:
        raise DataError(f"Video {missing[0]!r} has no file: set config.data.videos to the folder of the videos.")
    ids = [record.video_id for record in dataset.records]
    return Task(
        files={video_id: files[video_id] for video_id in ids},
        classes=dataset.classes,
        external=external,
        dataset=dataset,
        records={r.video_id: (r.duration_sec, r.fps, r.num_frames) for r in dataset.records},
    )


def open_files(settings: Settings, directory: Path, given: Path | None, videos: Sequence[str]) -> Task:
    """Return files that nobody annotated; none is opened yet.

    Raises:
        ConfigError: no class list, another one than the checkpoint's, or a localizer of features.
        DataError: a name that matches no video.
    """
    if settings.from_features:
        raise ConfigError(
            f"--videos names videos, but config.backbone.name = {settings.backbone['name']!r} takes features of them: "
            "extract features first, and predict without --videos on the data set that names their folder."
        )
    files, external = find_video_files(videos), None
    if settings.external_classifier is not None:
        try:
            external = ExternalClassifier(replace(settings.external_classifier, missing="error"))
            external.check_videos(files)
        except DataError as error:
            external = None
            log.warning("config.external_classifier is left out, and all detections are called 'action': %s", error)
    return Task(files=files, classes=class_list(directory, settings, given), external=external)


def _predict(
    model: TrainedDetector, task: Task, video_ids: Sequence[str], finished: FinishedVideos, settings: Settings
) -> tuple[dict[str, float], dict[str, str]]:
    """Predict on videos, keeping each when it is done; return seconds of these, and the reasons of damaged ones."""
    done: dict[str, float] = {}
    if not video_ids:
        return done, {}
    begin, first_sec = time.monotonic(), 0.0
    try:
        dataset, damaged = task.open(video_ids, settings)
        durations = {record.video_id: record.duration_sec for record in dataset.records}
        if not dataset.records:
            return done, damaged
        loader = open_loader(model, dataset)
        parts = counted(len(loader.windows), "window"), counted(len(loader), "batch", "batches")
        log.info("%s in %s of %d", *parts, model.batch_size)
        begin = time.monotonic()
        for video_id, detections, _, unreadable in localize_all(model, loader):
            first_sec = first_sec or time.monotonic() - begin
            if unreadable:
                damaged[video_id] = loader.skipped.get(video_id, "see the log of another process.")
            if detections is not None:
                result = Finished(durations[video_id], unreadable, detections)
                finished.add(video_id, task.files[video_id], result, task.records.get(video_id, ()))
                done[video_id] = durations[video_id]
    except BaseException as error:
        if done or isinstance(error, KeyboardInterrupt):
            log.warning(
                "stopped: %d of %d videos are finished and kept; the same command goes on from there.",
                len(task.finished(finished)),
                len(task.files),
            )
        raise
    _log_speed(model, sum(done.values()), time.monotonic() - begin, first_sec)
    return done, {**loader.skipped, **damaged}


def _log_speed(model: TrainedDetector, length_sec: float, seconds: float, first_sec: float) -> None:
    where, peak = peak_memory(model.mesh.local_devices)
    _, host = peak_memory([])
    log.info(
        "%.1f s of video in %.1f s, %.1f of them until the first result: %.1f video seconds per second | "
        "peak %shost RSS %.0f MiB",
        length_sec,
        seconds,
        first_sec,
        length_sec / seconds,
        "" if where == "host RSS" else f"{where} {peak / MIB:.0f} MiB, ",
        host / MIB,
    )


def _write(folder: Path, task: Task, model: TrainedDetector, settings: Settings, found: Mapping[str, Finished]) -> None:
    """Write json, table and page, and log the evaluation where there is ground truth."""
    results = {video_id: result.detections for video_id, result in found.items()}
    write_activitynet(folder / PREDICTIONS, results)
    _write_text(folder / TABLE, _table(results))
    scored = _score(task, settings, results)
    # of features and of records there are no files that a browser could play
    own_files = task.dataset is None or task.dataset.video_paths
    playable = {video_id: task.files[video_id] for video_id in results} if own_files else {}
    write_html_report(
        folder / PAGE,
        to_activitynet(results),
        videos=playable,
        durations_sec={video_id: result.duration_sec for video_id, result in found.items()},
        title=f"{model.source.name}, step {model.step}",
        ground_truth=None if scored is None or task.dataset is None else task.dataset.ground_truth,
        scored=scored,
    )
    if scored is not None:
        log.info("%s", scored)
    log.info(
        "%d detections in %d videos; written: %s, %s, %s",
        sum(map(len, results.values())),
        len(results),
        folder / PREDICTIONS,
        folder / TABLE,
        folder / PAGE,
    )


def _score(task: Task, settings: Settings, results: Mapping[str, Detections]) -> DetectionMap | None:
    """Return the evaluation as `--mode eval` does it, or None where nothing is labelled."""
    truth = {} if task.dataset is None else task.dataset.ground_truth
    if not any(video["annotations"] for video in truth.get("database", {}).values()):
        return None
    blocked = settings.evaluation.blocked
    return detection_map(
        truth,
        to_activitynet(results),
        subset=str(settings.eval.subset),
        tiou_thresholds=settings.evaluation.tiou_thresholds,
        blocked=None if blocked is None else Path(blocked),
    )


def _table(results: Mapping[str, Detections]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("video", "start_sec", "end_sec", "label", "score"))
    for video_id, found in results.items():
        for (start, end), label, score in zip(
            found.segments_sec.tolist(), found.labels, found.scores.tolist(), strict=True
        ):
            writer.writerow((video_id, start, end, label, score))
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; what is no UTF-8 in a file's name is escaped."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_trained(workdir: Path) -> None:
    """Raise CheckpointError for a folder in which nothing was trained yet; damage is told by those who read it."""
    if not holds_parameters(workdir):
        raise CheckpointError(
            f"{workdir} holds no trained detector. Train one first (the same config and --workdir with --mode train), "
            "or name a run's folder, or converted parameters, with --checkpoint DIR."
        )


def _prepare(folder: Path) -> Path:
    """Create the folder of the results, before anything is computed."""
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}): choose another folder with --out."
        ) from error
    return folder


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
