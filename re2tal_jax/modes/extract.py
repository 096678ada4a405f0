"""`--mode extract`: the features that the localizer would be given, of every video, in files to train from.

Each process extracts its share of the videos on its own devices; they meet only in the folder. Windows are those of the
evaluation, so nothing is random.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from re2tal_jax.backbones import EXECUTION
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.extraction import FeatureFolder, VideoRows, covering, unfinished
from re2tal_jax.data.pipeline import Loader, Prefetch
from re2tal_jax.data.sampling import Policy
from re2tal_jax.errors import ConfigError, DataError, did_you_mean
from re2tal_jax.experiment import (
    Blueprint,
    backbone_parameters,
    draw_blueprint,
    make_detector,
    make_policy,
    make_preprocess,
    open_split,
    resolved_config,
)
from re2tal_jax.progress import WorkProgress
from re2tal_jax.settings import Settings
from re2tal_jax.training.checkpoint import best_or_latest, prepare_workdir
from re2tal_jax.training.compile_cache import compile_cache
from re2tal_jax.training.interrupt import StopSignals
from re2tal_jax.training.sharding import (
    MeshConfig,
    batch_sharding,
    check_batch_size,
    initialise_distributed,
    make_mesh,
    open_mesh,
    put_batch,
)
from re2tal_jax.types import Batch
from re2tal_jax.weights import holds_weights

log = logging.getLogger(__name__)

FOLDER = "features"
DTYPES = ("float32", "float16")
_BACKBONE = "backbone."
_NO_PART = ("checkpoint", "drop_path_rate", *EXECUTION)
"""Options of a backbone that change no feature."""


def extract(
    settings: Settings,
    config: Mapping[str, Any],
    workdir: Path,
    *,
    out: str | None = None,
    checkpoint: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Write the features of all videos of the training and the evaluation subset, and return their folder.

    The same command again goes on where it stopped. Videos that cannot be read stop it or are named and left out, by
    `config.eval.loader.on_error`; what is finished stays.

    Args:
        settings: their `eval` section decides about windows and frames.
        config: not used.
        workdir: of the run whose backbone is taken, and where compiled programs are kept.
        out: the folder; `features` in the workdir if not given.
        checkpoint: a run or converted weights whose backbone is taken, its best evaluated step. If not given, the
            workdir's; without one `config.backbone.checkpoint`; without that the backbone is random.
        dtype: of the files, float32 or float16.
        overwrite: make all anew, in a folder that holds features of another backbone or config.

    Raises:
        ConfigError: settings that cannot run, or that read features themselves.
        DataError: annotations or videos that cannot be used; a folder that cannot be written, or in which another
            extraction is at work.
        CheckpointError: a checkpoint of another backbone; or the folder holds features of another one.
    """
    del config
    if settings.from_features:
        raise ConfigError(
            "--mode extract needs a backbone and videos; this config reads features (config.data.features)."
        )
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is no type of features. {did_you_mean(dtype, DTYPES)}")
    initialise_distributed(settings.distributed)
    mesh = own_mesh(settings.mesh)
    rows = settings.eval.batch_size // jax.process_count()
    shared = "" if jax.process_count() == 1 else f" / {jax.process_count()} processes"
    check_batch_size(rows, mesh, key=f"config.eval.batch_size{shared}")
    blueprint = draw_blueprint(settings, mesh)
    backbone = find_backbone(settings, blueprint, workdir, checkpoint)
    subsets = dict.fromkeys([*_names(settings.train.subset), *_names(settings.eval.subset)])
    dataset = open_split(settings, replace(settings.eval, subset=tuple(subsets)), train=False)
    policy = covering(make_policy(settings, settings.eval, path="config.eval"))
    folder = FeatureFolder(Path(out) if out else workdir / FOLDER, policy, jax.process_index())
    with folder.claimed():
        if jax.process_index() == 0:
            identity = features_identity(settings, policy, backbone.about["sha256"], dtype)
            channels = jax.eval_shape(lambda: make_detector(settings)().backbone).out_channels
            folder.prepare(identity, backbone.about, channels, overwrite=overwrite)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("feature folder")
        workdir = prepare_workdir(workdir)
        mine = unfinished(dataset.records, folder.finished(), jax.process_index(), jax.process_count())
        log.info("features of %d videos, %d still to do, to %s", len(dataset.records), len(mine), folder.folder)
        skipped: dict[str, str] = {}
        try:
            with compile_cache(workdir):
                todo = replace(dataset, records=tuple(mine))
                stopped = bool(mine) and _extract(
                    settings, blueprint, mesh, backbone, todo, folder, rows, dtype, skipped
                )
        finally:
            folder.gather(skipped, alone=jax.process_count() == 1)
    if stopped:
        log.warning("stopped; run the same command again to go on.")
        raise KeyboardInterrupt  # so that what follows in a script does not take these for all
    if skipped:
        log.warning("%d videos could not be read and have no features: %s", len(skipped), ", ".join(skipped))
    log.info("written: %s", folder.folder)
    return folder.folder


def own_mesh(config: MeshConfig) -> Mesh:
    """Return the mesh over this process's devices alone: processes need not wait for each other."""
    mesh = open_mesh(config)
    return mesh if jax.process_count() == 1 else make_mesh(replace(config, data=-1), jax.local_devices())


@dataclass(frozen=True)
class Backbone:
    """Parameters by path, on the devices, and where they are from: `source`, `step`, `sha256`."""

    params: Mapping[str, jax.Array]
    about: Mapping[str, Any]


def find_backbone(settings: Settings, blueprint: Blueprint, workdir: Path, checkpoint: str | None) -> Backbone:
    """Return the backbone of the checkpoint, of the workdir, of the config, or a random one, in this order."""
    given = settings.backbone.get("checkpoint")
    if checkpoint is not None:
        directory, named_by = Path(checkpoint), "--checkpoint"
    elif (workdir / "checkpoints").is_dir() or holds_weights(workdir):
        directory, named_by = workdir, "--workdir"
    elif given:
        directory, named_by = Path(given), "config.backbone.checkpoint"
    else:
        log.warning("no checkpoint is given and the workdir holds none: the backbone's parameters are random.")
        drawn = blueprint.spec.create().ema_params
        params = {path: value for path, value in drawn.items() if path.startswith(_BACKBONE)}
        return Backbone(params, {"source": "random", "step": None, "sha256": parameters_sha256(params)})
    step: int | Literal["latest"] = best_or_latest(directory) if named_by != "config.backbone.checkpoint" else "latest"
    loaded = backbone_parameters(settings, blueprint.model, directory, step=step, named_by=named_by)
    about = {"source": directory.name, "step": step, "sha256": parameters_sha256(loaded)}
    log.info("backbone: step %s of %s, SHA-256 %s", step, directory, about["sha256"])
    shardings = blueprint.spec.shardings.ema_params
    return Backbone({path: jax.device_put(value, shardings[path]) for path, value in loaded.items()}, about)


def parameters_sha256(params: Mapping[str, Any]) -> str:
    """Return a SHA-256 of parameters, by path, shape, type and value."""
    digest = hashlib.sha256()
    for path in sorted(params):
        value = np.asarray(params[path], order="C")
        digest.update(f"{path} {value.shape} {value.dtype}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def features_identity(settings: Settings, policy: Policy, sha256: str, dtype: str) -> dict[str, Any]:
    """Return all of a config on which features depend, as JSON has it."""
    config, split = resolved_config(settings), settings.eval
    assert split.augment is not None  # these are for frames
    parts = {
        "checkpoint": {"sha256": sha256},
        "backbone": {key: value for key, value in config["backbone"].items() if key not in _NO_PART},
        "detector": {"pixel_mean": settings.detector.pixel_mean, "pixel_std": settings.detector.pixel_std},
        "policy": {"name": split.policy["name"], **asdict(policy)},
        "loader": {key: config["eval"]["loader"][key] for key in ("height", "width", "crop")},
        "augment": {key: config["eval"]["augment"][key] for key in ("height", "width", "center", "dtype")},
        "fps": config["data"].get("fps"),
        "compute_dtype": settings.compute_dtype,
        "dtype": dtype,
    }
    return json.loads(json.dumps(parts))


def make_feature_step(settings: Settings, blueprint: Blueprint, backbone: Backbone, mesh: Mesh, dtype: str) -> Any:
    """Return the jitted (backbone's parameters, batch) -> features (B, T, C)."""
    preprocess = make_preprocess(replace(settings.eval, mirror=None), classes=())
    model = blueprint.model

    def step(params: Any, batch: Batch) -> jax.Array:
        video, _ = preprocess(batch, None)
        # what stands behind the backbone is not run; its parameters are never made
        rest = {path: jnp.zeros(v.shape, v.dtype) for path, v in model.parameters.items() if path not in params}
        return model.merge({**params, **rest}).features(video).astype(dtype)

    shardings = {path: blueprint.spec.shardings.ema_params[path] for path in backbone.params}
    return jax.jit(step, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=batch_sharding(mesh))


def _extract(
    settings: Settings,
    blueprint: Blueprint,
    mesh: Mesh,
    backbone: Backbone,
    dataset: Dataset,
    folder: FeatureFolder,
    batch_size: int,
    dtype: str,
    skipped: dict[str, str],
) -> bool:
    """Extract the videos of a data set; return whether a signal came first. Unreadable ones are added to `skipped`."""
    loader_config = replace(settings.eval.loader, cache_mib=0)
    try:
        loader = Loader(dataset, folder.policy, loader_config, seed=settings.seed, train=False, batch_size=batch_size)
    except DataError as error:
        if loader_config.on_error == "error":
            raise
        skipped |= {record.video_id: str(error) for record in dataset.records}  # not one has a window
        return False
    step, videos = (
        make_feature_step(settings, blueprint, backbone, mesh, dtype),
        VideoRows(folder.policy, loader.windows),
    )
    params = dict(backbone.params)
    try:
        with StopSignals() as signals, WorkProgress(len(loader.windows), "extract", "window") as progress:
            for batch, features in _run(step, params, loader, mesh):
                numbers, masks, features = (np.asarray(x) for x in (batch.window, batch.mask, features))
                for number, mask, rows in zip(numbers.tolist(), masks, features, strict=True):
                    done = videos.add(number, rows[: np.count_nonzero(mask)]) if number >= 0 else None
                    if done is not None:
                        folder.write(*done)
                progress.advance(int((numbers >= 0).sum()))
                if signals.requested:
                    return True
    finally:
        skipped |= loader.skipped
    return False


def _run(step: Any, params: Any, loader: Loader, mesh: Mesh) -> Iterator[tuple[Batch, jax.Array]]:
    """Yield batches and their features, each after the next has been started, so that the devices never wait."""
    waiting = None
    with Prefetch(loader, lambda rows: put_batch(rows, mesh)) as batches:
        for batch in batches:
            started = batch, step(params, batch)
            if waiting is not None:
                yield waiting
            waiting = started
    if waiting is not None:
        yield waiting


def _names(subset: str | tuple[str, ...]) -> tuple[str, ...]:
    return (subset,) if isinstance(subset, str) else subset
