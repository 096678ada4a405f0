"""`--mode train`: train from the workdir's latest checkpoint or from the start, evaluate, report."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from re2tal_jax.evaluation import DetectionMap
from re2tal_jax.experiment import (
    check_shapes,
    describe_data,
    draw_blueprint,
    initial_parameters,
    make_loader,
    make_preprocess,
    open_split,
)
from re2tal_jax.modes.evaluate import PAGE, PREDICTIONS, REPORT, Evaluator
from re2tal_jax.settings import Settings
from re2tal_jax.trained import check_same_classes, stored_classes, write_classes
from re2tal_jax.training.checkpoint import Checkpoints, prepare_workdir
from re2tal_jax.training.compile_cache import compile_cache
from re2tal_jax.training.loop import Run, TrainResult
from re2tal_jax.training.sharding import initialise_distributed, open_mesh
from re2tal_jax.training.step import make_train_step

log = logging.getLogger(__name__)


def train(settings: Settings, config: Mapping[str, Any], workdir: Path) -> TrainResult:
    """Train to the end of the recipe, or until a signal; the same call again goes on where it stopped.

    What can be wrong is looked for in the order of what it costs: settings, model, data, evaluation, and only then is
    anything compiled or trained.

    Raises:
        ConfigError: settings that cannot run, an unwritable workdir, other classes than those that the run has.
        DataError: annotations or videos that cannot be used.
        CheckpointError: the workdir holds a run of another architecture.
    """
    initialise_distributed(settings.distributed)
    mesh = open_mesh(settings.mesh)
    blueprint = draw_blueprint(settings, mesh)
    check_shapes(settings, blueprint)
    initial = initial_parameters(settings, blueprint.model)
    workdir = prepare_workdir(workdir)
    dataset = open_split(settings, settings.train, train=True)
    loader = make_loader(settings, dataset, train=True)
    blueprint = blueprint.for_epochs_of(loader.steps_per_epoch)
    train_step = make_train_step(blueprint.spec, make_preprocess(settings.train, dataset.classes), mesh)
    evaluator = Evaluator(settings, blueprint, mesh, workdir)
    last_step, _, _ = settings.loop.in_steps(loader.steps_per_epoch)
    tables: dict[int, DetectionMap] = {}

    def evaluate(params: Any, step: int) -> Mapping[str, float]:
        tables[step] = evaluator(params, step, final=step == last_step)
        return tables[step].metrics()

    with compile_cache(workdir) as cache, Checkpoints(workdir, settings.checkpoints) as checkpoints:
        checkpoints.check_metrics(evaluator.metric_names)
        begins, stored = checkpoints.latest_step is None, stored_classes(workdir)
        if not begins and stored is not None:
            check_same_classes(dataset.classes, stored, "config.data", workdir)
        if begins and jax.process_index() == 0:
            write_classes(workdir, dataset.classes)
        result = Run(
            config=settings.loop,
            spec=blueprint.spec,
            train_step=train_step,
            mesh=mesh,
            loader=loader,
            key=jax.random.key(settings.seed),
            workdir=workdir,
            checkpoints=checkpoints,
            evaluate=evaluate,
            saved_config=config,
            initial=initial,
            about={
                "training data": describe_data(dataset, loader),
                "evaluation data": describe_data(evaluator.dataset, evaluator.loader),
                "compile cache": cache,
            },
        ).run()
        best = checkpoints.best_step
        if not begins and stored is None and jax.process_index() == 0:  # begun before class lists were kept
            write_classes(workdir, dataset.classes)
    if tables:
        step, table = tables.popitem()  # the latest; a signal may have come at a later step
        files = (PREDICTIONS, REPORT, PAGE) if step == last_step else (PREDICTIONS, REPORT)
        written = (checkpoints.directory, *(workdir / name for name in files))
        log.info("step %d, %s\nwritten: %s", step, table, ", ".join(map(str, written)))
        if result.metrics is None and best is not None:
            words = "step %d was not evaluated; of those that were, step %d is the best: --mode eval takes it."
            log.info(words, result.step, best)
        elif best not in (None, result.step):
            log.info("step %d was better: it is kept, and --mode eval takes it.", best)
    elif not result.interrupted:
        log.info(
            "this run was finished before, at step %d: average mAP %.4f. Evaluate it again with --mode eval, or train "
            "on with a longer config.loop.stop.",
            result.step,
            (result.metrics or {})["average_mAP"],
        )
    return result
