"""A config made into what runs: data, detector, steps, evaluation. `main.py` chooses which of it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, Shaped

from re2tal_jax.backbones import BACKBONES, EXECUTION
from re2tal_jax.config import bind, build, resolve
from re2tal_jax.data import DATASETS
from re2tal_jax.data.augment import LabelSwap, augment, mirror
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.pipeline import Loader
from re2tal_jax.data.sampling import POLICIES, Policy
from re2tal_jax.detector import Detector
from re2tal_jax.errors import CheckpointError, ConfigError
from re2tal_jax.localizers import LOCALIZERS
from re2tal_jax.seeds import Seeded
from re2tal_jax.settings import Settings, SplitConfig
from re2tal_jax.training.checkpoint import load_params
from re2tal_jax.training.optim import Optimizer, Params, make_optimizer, recipe_rules
from re2tal_jax.training.sharding import check_batch_size
from re2tal_jax.training.state import Model, StateSpec, check_parameters, describe_model, describe_state
from re2tal_jax.training.step import Preprocess
from re2tal_jax.types import Batch
from re2tal_jax.weights import holds_weights, load_about

_BACKBONE = "backbone."
FREE_OPTIONS = ("name", "checkpoint", "rewired", "drop_path_rate", *EXECUTION)
"""Arguments of a backbone that may be others than those its weights were made with."""
_ANY_EPOCH = 2**20  # steps; stands in until the data are known


def resolved_config(settings: Settings) -> dict[str, Any]:
    """Return the whole config with every default filled in: what a run is saved with and `inspect` shows.

    It reads back as the same settings.
    """
    config = asdict(settings)
    backbone = {key: value for key, value in settings.backbone.items() if key not in ("name", "checkpoint")}
    for name, factory, options, given in (
        ("data", DATASETS[settings.data["name"]], _without_name(settings.data), ("subset", "training")),
        ("backbone", BACKBONES[settings.backbone["name"]], backbone, ("dtype", "rngs")),
        (
            "localizer",
            LOCALIZERS[settings.localizer["name"]],
            _without_name(settings.localizer),
            ("in_channels", "num_classes", "dtype", "rngs"),
        ),
    ):
        resolved = resolve(factory, options, path=f"config.{name}", given=given)
        config[name] = {**config[name], **{key: _plain(value) for key, value in resolved.items()}}
    for split in ("train", "eval"):
        policy = config[split]["policy"]
        given = ("num_snippets", "frames_per_snippet")
        options = resolve(POLICIES[policy["name"]], _without_name(policy), path=f"config.{split}.policy", given=given)
        config[split]["policy"] = {**policy, **options}
    config["parameter_groups"] = resolve(recipe_rules, settings.parameter_groups, path="config.parameter_groups")
    return config


BEHIND_BACKBONE = 1  # the part of a seed's keys that localizer and snippet head are drawn from


def make_detector(settings: Settings, *, rewired: bool | None = None) -> Callable[[], Detector]:
    """Return the constructor of the detector, its parameters drawn from the config's seed.

    `rewired` overrides the config's choice (to compare both). What is behind the backbone starts from the same values
    whatever the backbone: one seed compares frames with features, or two backbones, and nothing else.
    """
    dtype = jnp.dtype(settings.compute_dtype)
    options = {key: value for key, value in settings.backbone.items() if key not in ("name", "checkpoint")}
    if rewired is not None and not settings.from_features:
        options["rewired"] = rewired

    def make() -> Detector:
        backbone = build(
            BACKBONES[settings.backbone["name"]],
            options,
            path="config.backbone",
            dtype=dtype,
            rngs=Seeded(settings.seed),
        )
        rngs = Seeded(settings.seed, part=BEHIND_BACKBONE)
        localizer = build(
            LOCALIZERS[settings.localizer["name"]],
            _without_name(settings.localizer),
            path="config.localizer",
            in_channels=backbone.out_channels,
            num_classes=settings.num_classes,
            dtype=dtype,
            rngs=rngs,
        )
        return Detector(
            backbone,
            localizer,
            num_snippets=settings.num_snippets,
            num_classes=settings.num_classes,
            pixel_mean=settings.detector.pixel_mean,
            pixel_std=settings.detector.pixel_std,
            snippet_loss_weight=settings.detector.snippet_loss_weight,
            rngs=rngs,
        )

    return make


def check_settings(settings: Settings) -> None:
    """Raise ConfigError for what can be known to be wrong before data or devices are touched."""
    data = _without_name(settings.data)
    bind(DATASETS[settings.data["name"]], data, path="config.data", given=("subset", "training"))
    make_policy(settings, settings.train, path="config.train")
    make_policy(settings, settings.eval, path="config.eval")
    settings.loop.in_steps(steps_per_epoch=2**32)  # finds what is 0 steps whatever the data


def open_split(settings: Settings, split: SplitConfig, *, train: bool) -> Dataset:
    """Open the data set of a split and check its classes against the config.

    Raises:
        ConfigError: `num_classes` or the channels of features are not what the data set has.
    """
    path = "config.data"
    factory = DATASETS[settings.data["name"]]
    dataset = build(factory, _without_name(settings.data), path=path, subset=split.subset, training=train)
    if len(dataset.classes) != settings.num_classes:
        raise ConfigError(
            f"config.num_classes = {settings.num_classes}, but the data set {settings.data['name']!r} has "
            f"{len(dataset.classes)} classes ({', '.join(dataset.classes[:5])}, …): set num_classes to that."
        )
    if dataset.features is not None and dataset.features.channels != settings.backbone.get("channels"):
        raise ConfigError(
            f"config.backbone.channels = {settings.backbone.get('channels')}, but the features of "
            f"{' and '.join(dataset.features.config.folders)} have {dataset.features.channels}: set channels to that"
            f"{'' if dataset.features.config.channels_first else ', or features.channels_first if files hold (C, L)'}."
        )
    return dataset


def make_policy(settings: Settings, split: SplitConfig, *, path: str) -> Policy:
    """Build the sampling policy of a split."""
    return build(
        POLICIES[split.policy["name"]],
        _without_name(split.policy),
        path=f"{path}.policy",
        num_snippets=settings.num_snippets,
        frames_per_snippet=settings.frames_per_snippet,
    )


def make_loader(settings: Settings, dataset: Dataset, *, train: bool) -> Loader:
    """Return batches of a split, this process's share of rows."""
    split = settings.train if train else settings.eval
    return Loader(
        dataset,
        make_policy(settings, split, path="config.train" if train else "config.eval"),
        split.loader,
        seed=settings.seed,
        train=train,
        batch_size=split.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def describe_data(dataset: Dataset, loader: Loader) -> str:
    """Return counts and findings of a split for the start-up header."""
    segments = sum(len(record.labels) for record in dataset.records)
    counts = (
        f"{len(dataset.records)} videos, {segments} segments, {len(dataset.classes)} classes, "
        f"{len(loader.windows)} windows, {loader.steps_per_epoch} batches"
    )
    unreadable = [f"unreadable: {len(loader.skipped)}"] if loader.skipped else []
    features = [] if dataset.features is None else [dataset.features.describe()]
    return "\n  ".join([counts, *features, *dataset.findings.lines(), *unreadable])


def make_preprocess(split: SplitConfig, classes: tuple[str, ...]) -> Preprocess:
    """Return what the accelerator does to a batch before the detector sees it."""
    mirrored = split.mirror
    if mirrored is not None:
        swap = LabelSwap.from_names(classes, mirrored.flip_classes, mirrored.reverse_classes)

    def preprocess(batch: Batch, key: PRNGKeyArray | None) -> tuple[Shaped[Array, "B F H W 3"], Batch]:
        if split.augment is None:  # features
            return batch.video, batch
        if key is None:
            return augment(batch.video, batch.frame_size, split.augment, None), batch
        mirror_key, augment_key = jax.random.split(key)
        if mirrored is not None:
            batch = mirror(batch, swap, mirror_key, flip=mirrored.flip, reverse=mirrored.reverse)
        return augment(batch.video, batch.frame_size, split.augment, augment_key), batch

    return preprocess


@dataclass(frozen=True)
class Blueprint:
    """The model, its optimizer and how their state lies on the mesh, without a byte of it allocated."""

    model: Model
    optimizer: Optimizer
    spec: StateSpec

    def for_epochs_of(self, steps: int) -> "Blueprint":
        """Return the blueprint whose schedule counts epochs of so many steps."""
        optimizer = replace(self.optimizer, learning_rate=self.optimizer.config.schedule.resolve(steps))
        return Blueprint(self.model, optimizer, replace(self.spec, optimizer=optimizer))

    def with_wiring(self, settings: Settings, mesh: Mesh, *, rewired: bool) -> "Blueprint":
        """Return the blueprint of the same parameters, rewired or ordinary whatever the config says."""
        model = describe_model(make_detector(settings, rewired=rewired))
        return Blueprint(model, self.optimizer, describe_state(model, self.optimizer, mesh, settings.mesh))


def draw_blueprint(settings: Settings, mesh: Mesh) -> Blueprint:
    """Work out model, parameter groups and shardings; the schedule's epochs are given by `for_epochs_of`.

    Needs no data, so that a config that cannot run is known before any are read or rendered.

    Raises:
        ConfigError: a section that cannot run, or batches that the mesh cannot share.
    """
    check_settings(settings)
    check_batch_size(settings.train.batch_size, mesh, settings.optimizer.accumulate, key="config.train.batch_size")
    check_batch_size(settings.eval.batch_size, mesh, key="config.eval.batch_size")
    model = describe_model(make_detector(settings))
    rules = build(recipe_rules, settings.parameter_groups, path="config.parameter_groups")
    optimizer = make_optimizer(settings.optimizer, rules, model.shapes, _ANY_EPOCH)
    return Blueprint(model, optimizer, describe_state(model, optimizer, mesh, settings.mesh))


def initial_parameters(settings: Settings, model: Model) -> dict[str, np.ndarray]:
    """Return the backbone of `config.backbone.checkpoint` by path; empty if there is none.

    Raises:
        CheckpointError: it cannot be read, is not exactly this model's backbone, or was made with other options.
    """
    directory = settings.backbone.get("checkpoint")
    return backbone_parameters(settings, model, Path(directory)) if directory else {}


def backbone_parameters(
    settings: Settings,
    model: Model,
    directory: Path,
    *,
    step: int | Literal["latest", "best"] = "latest",
    named_by: str = "config.backbone.checkpoint",
) -> dict[str, np.ndarray]:
    """Return the backbone of a run, or of converted weights, by path; `named_by` is what errors call its folder.

    Raises:
        CheckpointError: as `initial_parameters`.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"{named_by} = {str(directory)!r} is no folder: give a run's workdir, its checkpoints folder, or one that "
            "python -m checkpoints_convert wrote; config.backbone.checkpoint = None starts from random weights."
        )
    saved = load_params(directory, which="ema", step=step)
    backbone = {path: value for path, value in saved.items() if path.startswith(_BACKBONE)}
    missing = [path for path in model.parameters if path.startswith(_BACKBONE) and path not in backbone]
    try:
        check_parameters({path: (value.shape, value.dtype) for path, value in backbone.items()}, model.parameters)
        if missing:
            raise CheckpointError(f"It lacks {len(missing)} parameters: {', '.join(missing[:5])}.")
    except CheckpointError as error:
        raise CheckpointError(f"{named_by} = {str(directory)!r} holds another backbone. {error}") from error
    _check_options(settings, directory)
    return backbone


def _check_options(settings: Settings, directory: Path) -> None:
    """Raise CheckpointError if converted weights are of a network that computes something else, sizes apart."""
    if not holds_weights(directory):
        return
    made_with = load_about(directory)["config"]["backbone"]
    # as JSON has them: lists for tuples
    wanted = json.loads(json.dumps(resolved_config(settings)["backbone"]))
    for key, value in made_with.items():
        if key not in FREE_OPTIONS and key in wanted and wanted[key] != value:
            raise CheckpointError(
                f"config.backbone.checkpoint = {str(directory)!r} was made with {key} = {value!r}, and config.backbone."
                f"{key} is {wanted[key]!r}, with which the same weights compute something else. Add "
                f"--config.backbone.{key}={value!r}, or convert the source again with the value that you want."
            )


def abstract_batch(settings: Settings, *, max_segments: int) -> Batch:
    """Return the shapes of a training batch, for compiling without data."""
    split, loader = settings.train, settings.train.loader
    size, snippets = split.batch_size, settings.num_snippets
    if settings.from_features:
        video = ((snippets, settings.backbone["channels"]), jnp.float32)
    else:
        video = ((snippets * settings.frames_per_snippet, *loader.frame_shape, 3), jnp.uint8)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "video": video,
        "frame_size": ((2,), jnp.float32),
        "mask": ((snippets,), jnp.bool_),
        "gt_segments": ((max_segments, 2), jnp.float32),
        "gt_labels": ((max_segments,), jnp.int32),
        "gt_mask": ((max_segments,), jnp.bool_),
        "window": ((), jnp.int32),
    }
    leaves: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in shapes.items()
    }
    return Batch(**leaves)


def check_shapes(settings: Settings, blueprint: Blueprint) -> None:
    """Trace the loss of a batch, without data: raise ConfigError for windows that the model cannot take."""
    preprocess = make_preprocess(replace(settings.train, mirror=None), classes=())

    def loss(params: Params, batch: Batch, state: Any, key: PRNGKeyArray) -> Any:
        video, batch = preprocess(batch, key)
        return blueprint.model.merge(params).loss(video, batch, state, key=key)

    abstract = blueprint.spec.abstract
    key = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(loss, abstract.params, abstract_batch(settings, max_segments=1), abstract.localizer_state, key)


def _plain(value: Any) -> Any:
    """Return an argument as a config file has it: a dictionary for a data class."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _without_name(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "name"}
