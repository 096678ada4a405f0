"""`--mode eval`: detections and mAP of a run's best checkpoint. Training evaluates through the same `Evaluator`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from re2tal_jax.activitynet_format import to_activitynet, write_activitynet
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.errors import ConfigError
from re2tal_jax.evaluation import DetectionMap, detection_map
from re2tal_jax.experiment import Blueprint, describe_data, draw_blueprint, make_loader, make_preprocess, open_split
from re2tal_jax.external_classifier import ExternalClassifier
from re2tal_jax.inference.detect import check_windows, detect
from re2tal_jax.inference.html_report import write_html_report
from re2tal_jax.inference.report import draw_report
from re2tal_jax.settings import Settings
from re2tal_jax.trained import check_same_classes, stored_classes, trained_parameters
from re2tal_jax.training.checkpoint import best_or_latest, prepare_workdir
from re2tal_jax.training.compile_cache import compile_cache
from re2tal_jax.training.optim import Params
from re2tal_jax.training.sharding import initialise_distributed, open_mesh
from re2tal_jax.training.step import make_eval_step
from re2tal_jax.types import Detections

log = logging.getLogger(__name__)

PREDICTIONS, REPORT, PAGE = "predictions.json", "report.png", "report.html"


class Evaluator:
    """Parameters -> mAP on the evaluation split, with predictions and a report picture in the workdir."""

    def __init__(self, settings: Settings, blueprint: Blueprint, mesh: Mesh, workdir: Path):
        """Open the split and check all that an evaluation needs, so that faults are known before anything is trained.

        Raises:
            ConfigError: windows, classes and post-processing that do not fit together.
            DataError: data that cannot be used, no ground truth, videos or classes that the external classifier lacks.
        """
        self.settings, self.mesh, self.workdir = settings, mesh, workdir
        self.dataset: Dataset = open_split(settings, settings.eval, train=False)
        self.loader = make_loader(settings, self.dataset, train=False)
        self.external = None
        if settings.external_classifier is not None:
            self.external = ExternalClassifier(settings.external_classifier)
        self.metric_names = tuple(self._score({}).metrics())
        self._check()
        preprocess = make_preprocess(settings.eval, self.dataset.classes)
        self._step = make_eval_step(blueprint.model, preprocess, mesh, blueprint.spec.shardings.ema_params)

    def __call__(self, params: Params, step: int | None = None, *, final: bool = False) -> DetectionMap:
        """Detect, write `predictions.json`, evaluate, draw `report.png`; the `final` one also writes `report.html`."""
        settings = self.settings
        videos = detect(
            lambda batch: self._step(params, batch),
            self.loader,
            self.mesh,
            settings.postprocess,
            self.dataset.classes,
            self.external,
        )
        results = {found.video_id: found.detections for found in videos if found.detections is not None}
        scored = self._score(results)
        if jax.process_index() == 0:
            write_activitynet(self.workdir / PREDICTIONS, results)
            title = scored.subset if step is None else f"{scored.subset}, step {step}"
            predictions = to_activitynet(results)
            draw_report(self.workdir / REPORT, scored, self.dataset.ground_truth, predictions, title=title)
            if final:
                write_html_report(
                    self.workdir / PAGE,
                    predictions,
                    videos=self.dataset.video_paths,
                    durations_sec={record.video_id: record.duration_sec for record in self.dataset.records},
                    title=title,
                    ground_truth=self.dataset.ground_truth,
                    scored=scored,
                )
        return scored

    def _score(self, results: Mapping[str, Detections]) -> DetectionMap:
        settings = self.settings
        return detection_map(
            self.dataset.ground_truth,
            to_activitynet(results),
            subset=str(settings.eval.subset),
            tiou_thresholds=settings.evaluation.tiou_thresholds,
            blocked=None if settings.evaluation.blocked is None else Path(settings.evaluation.blocked),
        )

    def _check(self) -> None:
        """Find what would fail, or give an mAP of 0, only at the first evaluation."""
        settings = self.settings
        check_windows(self.loader.windows, settings.postprocess, settings.eval.policy["name"])
        if self.external is not None:
            self.external.check_videos(dict.fromkeys(window.record.video_id for window in self.loader.windows))
        classes = self.dataset.classes if self.external is None else self.external.classes
        videos = self.dataset.ground_truth["database"].values()
        wanted = {annotation["label"] for video in videos for annotation in video["annotations"]}
        if unknown := wanted - set(classes):
            raise ConfigError(
                f"{len(unknown)} of {len(wanted)} classes of the ground truth can never be detected, such as "
                f"{min(unknown)!r}: {'the external classifier' if self.external else 'the data set'} names "
                f"{', '.join(classes[:3])}{', …' if len(classes) > 3 else ''}."
                + (" Class-agnostic detections need config.external_classifier." if self.external is None else "")
            )


def evaluate(settings: Settings, config: Mapping[str, Any], workdir: Path) -> None:
    """Evaluate the best checkpoint of `workdir` (the latest, if none was evaluated) and print the table.

    Raises:
        ConfigError: settings that cannot run, an unwritable workdir, other classes than those that were trained.
        DataError: annotations or videos that cannot be used.
        CheckpointError: no checkpoint, or one of another architecture.
    """
    del config
    initialise_distributed(settings.distributed)
    mesh = open_mesh(settings.mesh)
    step = best_or_latest(workdir)
    blueprint = draw_blueprint(settings, mesh)
    params = trained_parameters(workdir, step, blueprint.model)
    workdir = prepare_workdir(workdir)
    evaluator = Evaluator(settings, blueprint, mesh, workdir)
    if (stored := stored_classes(workdir)) is not None:
        check_same_classes(evaluator.dataset.classes, stored, "config.data", workdir)
    log.info("evaluating step %d of %s: %s", step, workdir, describe_data(evaluator.dataset, evaluator.loader))
    shardings = blueprint.spec.shardings.ema_params
    placed = {path: jax.device_put(value, shardings[path]) for path, value in params.items()}
    with compile_cache(workdir):
        scored = evaluator(placed, step, final=True)
    log.info("%s\nwritten: %s, %s, %s", scored, workdir / PREDICTIONS, workdir / REPORT, workdir / PAGE)
