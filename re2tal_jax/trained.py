"""From a checkpoint's folder to a detector that runs: parameters, config and classes, checked against each other."""

import contextlib
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from re2tal_jax.backbones import EXECUTION
from re2tal_jax.config import read_config_file
from re2tal_jax.data.classes import read_classes
from re2tal_jax.data.dataset import AGNOSTIC
from re2tal_jax.errors import CheckpointError, ConfigError, DataError, similar_file
from re2tal_jax.experiment import make_detector, make_policy, make_preprocess, resolved_config
from re2tal_jax.external_classifier import ExternalClassifier
from re2tal_jax.inference.localize import TrainedDetector
from re2tal_jax.settings import Settings, read_settings
from re2tal_jax.training.checkpoint import CONFIG, best_or_latest, load_config, load_params
from re2tal_jax.training.sharding import MeshConfig, check_batch_size, make_mesh, parameter_shardings
from re2tal_jax.training.state import Model, check_parameters, describe_model
from re2tal_jax.training.step import make_eval_step
from re2tal_jax.weights import holds_weights, load_about

CLASSES = "classes.json"
"""In a run's folder: the classes that it was trained on and their numbers."""

_COMPARED = {
    "num_snippets": (),
    "frames_per_snippet": (),
    "num_classes": (),
    "backbone": ("checkpoint", "drop_path_rate", *EXECUTION),
    "localizer": ("path_drop_rate",),
    "detector": ("snippet_loss_weight",),
    "eval.policy": ("overlap", "min_overlap", "require_segment"),
}
"""Sections in which a config has to be the one of the training, and keys of them that change no detection for worse."""


def load(
    checkpoint_dir: str | Path, *, config: str | Path | None = None, classes: str | Path | None = None
) -> TrainedDetector:
    """Return a trained detector, ready for `localize`; its parameters are placed once, it compiles at the first video.

    It runs on all devices of which `config.eval.batch_size` is a multiple, whatever those of the training were. A
    classifier of its config (`config.external_classifier`) is left out, as it knows no videos of your own.

    Args:
        checkpoint_dir: a run's workdir, whose best checkpoint is taken (the latest, if none was evaluated), or a folder
            of converted parameters of a whole detector.
        config: a config file to take in the place of the one that the checkpoint was saved with.
        classes: a file with the class list, for a checkpoint that carries none (see `data.classes.read_classes`).

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one that does not fit the config.
        ConfigError: a config that cannot be used, no class list, or another than the checkpoint's.
        DataError: `classes` is not there or cannot be read.
    """
    directory = Path(checkpoint_dir)
    step = best_or_latest(directory)
    settings = read_settings(saved_config(directory, step) if config is None else read_config_file(Path(config)))
    mesh = _mesh_of_batch(settings.eval.batch_size, settings.mesh.cpu_devices)
    given = None if classes is None else Path(classes)
    names = class_list(directory, settings, given, option="classes={!r}")
    return open_trained(settings, directory, mesh, MeshConfig(), names, step=step)


def open_trained(
    settings: Settings,
    directory: Path,
    mesh: Mesh,
    mesh_config: MeshConfig,
    classes: Sequence[str],
    *,
    step: int,
    external: ExternalClassifier | None = None,
) -> TrainedDetector:
    """Return a checkpoint as a detector on a mesh; errors as `load`, and of batches that the mesh cannot share."""
    check_batch_size(settings.eval.batch_size, mesh, key="config.eval.batch_size")
    config = resolved_config(settings)
    saved = saved_config(directory, step)
    check_agreement(config, saved, directory)
    policy = make_policy(settings, settings.eval, path="config.eval")
    model = describe_model(make_detector(settings))
    params = trained_parameters(directory, step, model)
    shardings = parameter_shardings(model.shapes, mesh, mesh_config)
    placed = {path: jax.device_put(value, shardings[path]) for path, value in params.items()}
    eval_step = make_eval_step(model, make_preprocess(settings.eval, tuple(classes)), mesh, shardings)
    return TrainedDetector(
        source=directory,
        step=step,
        trained_fps=saved["data"].get("fps"),
        config=config,
        classes=tuple(classes),
        identity=_identity(config, classes, params, external),
        predict=lambda batch: eval_step(placed, batch),
        mesh=mesh,
        policy=policy,
        loader=settings.eval.loader,
        batch_size=settings.eval.batch_size,
        postprocess=settings.postprocess,
        external=external,
    )


def saved_config(directory: Path, step: int) -> dict[str, Any]:
    """Return the config that a checkpoint was saved, or its parameters converted, with.

    Raises:
        CheckpointError: it cannot be read, or the folder holds a backbone alone.
    """
    if not holds_weights(directory):
        return load_config(directory, step)
    about = load_about(directory)
    if not about["whole"]:
        raise CheckpointError(
            f"{directory} holds the parameters of a backbone alone ({about['config']['backbone']['name']}), which "
            "detects nothing: train a detector from it (config.backbone.checkpoint), or convert a whole one."
        )
    return about["config"]


def config_of(directory: Path) -> dict[str, Any]:
    """Return the config that the folder of a run, or of converted parameters, tells; no checkpoint is opened.

    Raises:
        ConfigError: it tells none.
        CheckpointError: the folder of converted parameters is damaged.
    """
    if holds_weights(directory):
        return load_about(directory)["config"]
    path = directory / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"--config is missing, and {directory} is no folder of a run (it has no {CONFIG}), whose config would be "
            "taken: name a config file with --config."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): name a config file with --config.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is no config of a run: name a config file with --config.")
    return config


def trained_parameters(directory: Path, step: int, model: Model) -> dict[str, np.ndarray]:
    """Return the averaged parameters of a checkpoint, which are exactly the model's.

    Raises:
        CheckpointError: they are not; every difference is named.
    """
    params = load_params(directory, step=step)
    check_parameters({path: (v.shape, v.dtype) for path, v in params.items()}, model.parameters)
    if missing := sorted(model.parameters.keys() - params.keys()):
        raise CheckpointError(f"{directory}: the checkpoint lacks {len(missing)} parameters: {', '.join(missing[:5])}.")
    return params


def check_agreement(config: Mapping[str, Any], saved: Mapping[str, Any], directory: Path) -> None:
    """Raise ConfigError if parameters would compute something else than they were trained to; every key is named.

    Sizes that do not fit are told by the parameters' shapes, too; what this finds would give wrong detections in
    silence: windows, attention, pixels of another kind. Keys that only one of both has are not compared.
    """
    found = list(_differences(json.loads(json.dumps(config)), json.loads(json.dumps(saved))))  # lists for tuples
    if found:
        lines = "".join(f"\n  config.{key} = {mine!r}, trained with {theirs!r}" for key, mine, theirs, _, _ in found)
        fixes = " ".join(shlex.quote(f"--config.{key}={value!r}") for *_, key, value in found)
        raise ConfigError(
            f"{directory} was trained with another config, with which the same parameters compute something else:"
            f"{lines}\nUse the config that it was trained with, or add {fixes}"
        )


def _differences(config: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, str, Any]]:
    """Yield key, value, saved value of every difference, and the key and value that mend it."""
    for section, free in _COMPARED.items():
        mine, theirs = (_section(c, section) for c in (config, saved))
        if not isinstance(mine, dict):
            if mine != theirs:
                yield section, mine, theirs, section, theirs
        elif mine.get("name") != theirs.get("name"):  # then most keys differ, or are not there
            yield f"{section}.name", mine["name"], theirs["name"], section, theirs
        else:
            for key in (key for key in mine if key in theirs and key not in free and mine[key] != theirs[key]):
                yield f"{section}.{key}", mine[key], theirs[key], f"{section}.{key}", theirs[key]


def class_list(
    directory: Path, settings: Settings, given: Path | None, *, option: str = "--classes {}"
) -> tuple[str, ...]:
    """Return the classes of a checkpoint: those stored beside it, those of the file `given`, or "action" for one class.

    `option` is how the user names the file, for errors.

    Raises:
        ConfigError: none is known, both are and differ, or there are more or fewer than outputs.
        DataError: a file that is not there or cannot be read.
    """
    stored = stored_classes(directory)
    if given is not None:
        if not given.is_file():
            raise DataError(f"{option.format(str(given))}: there is no such file.{similar_file(given)}")
        names = read_classes(given)
        if stored is not None:
            check_same_classes(names, stored, option.format(str(given)), directory)
    elif stored is not None:
        names = stored
    elif settings.num_classes == 1:
        names = AGNOSTIC
    else:
        raise ConfigError(
            f"{directory} does not say what its {settings.num_classes} classes are ({CLASSES} is missing: it was "
            "converted, or trained before class lists were kept). Name a file that lists them in the order of the "
            f"training, one name a line, with {option.format('FILE')}."
        )
    if len(names) != settings.num_classes:
        source = option.format(str(given)) if given else str(directory / CLASSES)
        instead = f"name a list of {settings.num_classes}" if given else "use the config of the training"
        raise ConfigError(
            f"{source} lists {len(names)} classes, but config.num_classes = {settings.num_classes}: add "
            f"--config.num_classes={len(names)}, or {instead}."
        )
    return names


def stored_classes(directory: Path) -> tuple[str, ...] | None:
    """Return the class list in a run's folder, in the order of the localizer's outputs, or None where there is none."""
    directory = Path(directory)
    folder = directory.parent if directory.name == "checkpoints" else directory
    return read_classes(folder / CLASSES) if (folder / CLASSES).is_file() else None


def write_classes(workdir: Path, classes: Sequence[str]) -> Path:
    """Write the class list of a run, as a whole or not at all."""
    path = Path(workdir) / CLASSES
    partial = path.with_name(f".{path.name}")
    # From 1: number 0 would leave out a class that is called "Background".
    partial.write_text(json.dumps({name: number for number, name in enumerate(classes, 1)}, indent=1) + "\n")
    partial.replace(path)
    return path


def check_same_classes(found: Sequence[str], stored: Sequence[str], source: str, directory: Path) -> None:
    """Raise ConfigError, naming the first difference, unless two class lists are the same in the same order."""
    if tuple(found) == tuple(stored):
        return
    place = next(
        (i for i, (a, b) in enumerate(zip(found, stored, strict=False)) if a != b), min(len(found), len(stored))
    )
    mine, theirs = (repr(names[place]) if place < len(names) else "nothing" for names in (found, stored))
    raise ConfigError(
        f"{source}: the class list is not the one of {directory} ({CLASSES}): class {place} is {mine}, there {theirs} "
        f"({len(found)} classes, there {len(stored)}). Outputs would get wrong names: use the classes of the training."
    )


def _identity(
    config: Mapping[str, Any],
    classes: Sequence[str],
    params: Mapping[str, np.ndarray],
    external: ExternalClassifier | None,
) -> dict[str, Any]:
    split = config["eval"]
    return {
        "parameters_sha256": _digest(params),
        "classes": list(classes),
        "external_classifier": None if external is None else external.identity(),
        "config": {
            **{key: config[key] for key in ("num_snippets", "frames_per_snippet", "compute_dtype")},
            **{key: config[key] for key in ("localizer", "postprocess")},
            "backbone": {k: v for k, v in config["backbone"].items() if k not in ("checkpoint", *EXECUTION)},
            "detector": {key: config["detector"][key] for key in ("pixel_mean", "pixel_std")},
            "eval": {
                "policy": split["policy"],
                "loader": {key: split["loader"][key] for key in ("height", "width", "crop")},
                "augment": split["augment"],
            },
        },
    }


def _digest(params: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of parameters: their names, kinds, shapes and values."""
    digest = hashlib.sha256()
    for path in sorted(params):
        value = np.asarray(params[path])
        digest.update(f"{path} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _mesh_of_batch(batch_size: int, cpu_devices: int) -> Mesh:
    """Return as many devices as a batch splits evenly over; no error where the devices were touched before."""
    with contextlib.suppress(RuntimeError):  # they were used before: then with those that there are
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return make_mesh(MeshConfig(), devices[:count])


def _section(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value[key]
    return value
