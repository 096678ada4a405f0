"""What a config file may say: every key, its type and what it sets. What a file leaves out, `inspect` shows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from re2tal_jax.backbones.precomputed import NAME as FEATURES
from re2tal_jax.config import build
from re2tal_jax.data.augment import AugmentConfig
from re2tal_jax.data.elements import LoaderConfig
from re2tal_jax.errors import ConfigError
from re2tal_jax.external_classifier import ExternalClassifierConfig
from re2tal_jax.postprocess import PostprocessConfig
from re2tal_jax.training.checkpoint import CheckpointConfig
from re2tal_jax.training.loop import LoopConfig
from re2tal_jax.training.optim import OptimConfig
from re2tal_jax.training.sharding import DistributedConfig, MeshConfig


@dataclass(frozen=True, kw_only=True)
class MirrorConfig:
    """Mirror clips and play them backward, labels with them, where classes are motions with a direction.

    `flip` and `reverse` are probabilities; the two tables say which class a class becomes.
    """

    flip: float
    reverse: float
    flip_classes: Mapping[str, str]
    reverse_classes: Mapping[str, str]

    def __post_init__(self):
        for name, value in (("flip", self.flip), ("reverse", self.reverse)):
            if not 0 <= value <= 1:
                raise ConfigError(f"mirror.{name} = {value} is no probability: it must lie in [0, 1].")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """The videos of one purpose and how they become batches.

    subset: of the annotation; one name or several.
    policy: `name` of a sampling policy (data/sampling.py) and its options.
    loader: how frames are decoded and handed over.
    augment: what the accelerator makes of them; in evaluation only its size and `center` count. None: of features.
    mirror: None, or label-respecting mirroring (training).
    """

    subset: str | tuple[str, ...]
    batch_size: int
    policy: Mapping[str, Any]
    loader: LoaderConfig
    augment: AugmentConfig | None
    mirror: MirrorConfig | None


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """tIoU thresholds whose mean is the average mAP, and a file with videos that do not count (or None)."""

    tiou_thresholds: tuple[float, ...]
    blocked: str | None

    def __post_init__(self):
        different = len(set(self.tiou_thresholds)) == len(self.tiou_thresholds)
        if not self.tiou_thresholds or not different or not all(0 < t <= 1 for t in self.tiou_thresholds):
            raise ConfigError(
                f"evaluation.tiou_thresholds = {self.tiou_thresholds}: expected different numbers above 0 up to 1."
            )


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Pixel normalisation (RGB, 0..255; None of features) and weight of the auxiliary snippet loss; see `Detector`."""

    pixel_mean: tuple[float, float, float] | None
    pixel_std: tuple[float, float, float] | None
    snippet_loss_weight: float

    def __post_init__(self):
        if not 0 <= self.snippet_loss_weight < math.inf or min(self.pixel_std or (1.0,)) <= 0:
            raise ConfigError(
                f"detector: snippet_loss_weight = {self.snippet_loss_weight} must be finite and at least 0, "
                f"pixel_std = {self.pixel_std} above 0."
            )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole config.

    num_snippets, frames_per_snippet: T and how many frames a snippet has, in training and evaluation.
    num_classes: of the localizer; 1 is class-agnostic and needs an external classifier.
    compute_dtype: of backbone and localizer (pixels: `augment.dtype`); parameters, states, losses are float32 always.
    data: `name` of a data set and its options, without subset.
    backbone, localizer: `name` and options; `backbone.checkpoint` is a directory whose backbone to start from, or None.
        With the name `features` the backbone is left out, and `data.features` says what is read in its place.
    parameter_groups: arguments of `training.optim.recipe_rules`.
    """

    seed: int
    compute_dtype: Literal["float32", "bfloat16"]
    num_snippets: int
    frames_per_snippet: int
    num_classes: int
    data: Mapping[str, Any]
    train: SplitConfig
    eval: SplitConfig
    backbone: Mapping[str, Any]
    localizer: Mapping[str, Any]
    detector: DetectorConfig
    parameter_groups: Mapping[str, Any]
    optimizer: OptimConfig
    mesh: MeshConfig
    distributed: DistributedConfig | None
    loop: LoopConfig
    checkpoints: CheckpointConfig
    postprocess: PostprocessConfig
    external_classifier: ExternalClassifierConfig | None
    evaluation: EvaluationConfig

    def __post_init__(self):
        named = {"data": self.data, "backbone": self.backbone, "localizer": self.localizer}
        named |= {"train.policy": self.train.policy, "eval.policy": self.eval.policy}
        for path, section in named.items():
            if not isinstance(section.get("name"), str):
                raise ConfigError(f"config.{path}.name = {section.get('name')!r}: it must be text, add it to the file.")
        checkpoint = self.backbone.get("checkpoint")
        if not isinstance(checkpoint, str | None):
            raise ConfigError(f"config.backbone.checkpoint = {checkpoint!r}: expected a folder, or None.")
        self._check_inputs()
        if not isinstance(self.eval.subset, str):
            raise ConfigError(f"config.eval.subset = {self.eval.subset!r}: mAP is of one subset, give one name.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"config.seed = {self.seed}: expected a whole number from 0 to 2**32 - 1.")
        if self.external_classifier is not None and self.num_classes != 1:
            raise ConfigError(
                f"config.external_classifier names the classes, but config.num_classes = {self.num_classes}: set "
                "num_classes = 1 (and data.class_agnostic), or external_classifier to None."
            )

    @property
    def from_features(self) -> bool:
        """Whether features are read, not frames."""
        return self.backbone["name"] == FEATURES

    def _check_inputs(self) -> None:
        """Raise ConfigError where one section is for features and another for frames."""
        given = self.data.get("features") is not None
        if self.from_features and not given:
            raise ConfigError(
                f"config.backbone.name = {FEATURES!r} leaves the backbone out, but config.data.features is None: name "
                "the folder, data.features = dict(folder=…), or a backbone that makes features of the videos."
            )
        if given and not self.from_features:
            raise ConfigError(
                f"config.data.features stands in the place of the videos, but config.backbone.name = "
                f"{self.backbone['name']!r} takes frames: set backbone = dict(name={FEATURES!r}, channels=…, "
                "checkpoint=None), or data.features to None."
            )
        pixels = {
            **{f"{split}.loader.height": part.loader.height for split, part in self._splits()},
            **{f"{split}.augment": part.augment for split, part in self._splits()},
            "detector.pixel_mean": self.detector.pixel_mean,
            "detector.pixel_std": self.detector.pixel_std,
        }
        if given:
            pixels |= {f"{split}.mirror": part.mirror for split, part in self._splits()}
            pixels |= {"backbone.checkpoint": self.backbone.get("checkpoint")}
            pixels |= {"parameter_groups.backbone_lr": self.parameter_groups.get("backbone_lr")}
        wrong = [key for key, value in pixels.items() if (value is None) != given]
        if wrong and given:
            raise ConfigError(f"config.{wrong[0]} needs frames or a backbone: with config.data.features it is None.")
        if wrong:
            raise ConfigError(f"config.{wrong[0]} = None is for features, but config.data.features is None, too.")

    def _splits(self) -> tuple[tuple[str, SplitConfig], ...]:
        return ("train", self.train), ("eval", self.eval)


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Return the settings of a config, every key and value checked.

    Raises:
        ConfigError: naming the key, its value, what is allowed and the nearest word.
    """
    _check_json(config, "config")
    return build(Settings, config, path="config")


def _check_json(value: Any, path: str) -> None:
    """Refuse what could not be saved beside the run."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{path} has the key {key!r}; keys are text.")
            _check_json(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_json(item, f"{path}[{i}]")
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise ConfigError(f"{path} = {value!r:.80} has type {type(value).__name__}; expected text, a number or None.")
