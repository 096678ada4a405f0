"""`--mode eval`: detections and mAP of a run's best checkpoint. Training evaluates through the same `Evaluator`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from re2tal_jax.activitynet_format import to_activitynet, write_activitynet
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.errors import CheckpointError
from re2tal_jax.evaluation import DetectionMap, detection_map
from re2tal_jax.experiment import Blueprint, draw_blueprint, make_loader, make_preprocess, open_split
from re2tal_jax.external_classifier import ExternalClassifier
from re2tal_jax.inference.detect import detect_all
from re2tal_jax.inference.report import draw_report
from re2tal_jax.settings import Settings
from re2tal_jax.training.checkpoint import load_params, prepare_workdir
from re2tal_jax.training.optim import Params
from re2tal_jax.training.sharding import initialise_distributed, make_mesh
from re2tal_jax.training.state import check_parameters
from re2tal_jax.training.step import make_eval_step

log = logging.getLogger(__name__)

PREDICTIONS, REPORT = "predictions.json", "report.png"


class Evaluator:
    """Parameters -> mAP on the evaluation split, with predictions and a report picture in the workdir."""

    def __init__(self, settings: Settings, blueprint: Blueprint, mesh: Mesh, workdir: Path):
        """Open the split, so that what is wrong with it is known before anything is trained."""
        self.settings, self.mesh, self.workdir = settings, mesh, workdir
        self.dataset: Dataset = open_split(settings, settings.eval, train=False)
        self.loader = make_loader(settings, self.dataset, train=False)
        self.external = None
        if settings.external_classifier is not None:
            self.external = ExternalClassifier(settings.external_classifier)
        preprocess = make_preprocess(settings.eval, self.dataset.classes)
        self._step = make_eval_step(blueprint.model, preprocess, mesh, blueprint.spec.shardings.ema_params)

    def __call__(self, params: Params, step: int | None = None) -> DetectionMap:
        """Detect, write `predictions.json`, evaluate, draw `report.png`."""
        settings = self.settings
        results = detect_all(
            lambda batch: self._step(params, batch),
            self.loader,
            self.mesh,
            settings.postprocess,
            self.dataset.classes,
            self.external,
        )
        predictions = to_activitynet(results)
        scored = detection_map(
            self.dataset.ground_truth,
            predictions,
            subset=str(settings.eval.subset),
            tiou_thresholds=settings.evaluation.tiou_thresholds,
            blocked=None if settings.evaluation.blocked is None else Path(settings.evaluation.blocked),
        )
        if jax.process_index() == 0:
            write_activitynet(self.workdir / PREDICTIONS, results)
            title = scored.subset if step is None else f"{scored.subset}, step {step}"
            draw_report(self.workdir / REPORT, scored, self.dataset.ground_truth, predictions, title=title)
        return scored


def evaluate(settings: Settings, config: Mapping[str, Any], workdir: Path) -> None:
    """Evaluate the best checkpoint of `workdir` (the latest, if none was evaluated) and print the table.

    Raises:
        CheckpointError: no checkpoint, or one of another architecture.
    """
    del config
    initialise_distributed(settings.distributed)
    workdir = prepare_workdir(workdir)
    mesh = make_mesh(settings.mesh, jax.devices())
    blueprint = draw_blueprint(settings, mesh, steps_per_epoch=1000)  # no schedule is followed here
    evaluator = Evaluator(settings, blueprint, mesh, workdir)
    params = _load(workdir)
    check_parameters({path: (v.shape, v.dtype) for path, v in params.items()}, blueprint.model.parameters)
    if missing := sorted(blueprint.model.parameters.keys() - params.keys()):
        raise CheckpointError(f"{workdir}: the checkpoint lacks {len(missing)} parameters: {', '.join(missing[:5])}.")
    shardings = blueprint.spec.shardings.ema_params
    placed = {path: jax.device_put(value, shardings[path]) for path, value in params.items()}
    log.info("%s\nwritten: %s, %s", evaluator(placed), workdir / PREDICTIONS, workdir / REPORT)


def _load(workdir: Path) -> Mapping[str, Any]:
    try:
        return load_params(workdir, step="best")
    except CheckpointError:
        log.info("no checkpoint of %s was evaluated yet; taking the latest", workdir)
        return load_params(workdir, step="latest")
