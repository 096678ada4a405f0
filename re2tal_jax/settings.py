"""What a config file may say: every key, its type and what it sets. No key has a default here; the file shows all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """The videos of one purpose and how they become batches.

    subset: of the annotation; one name or several.
    policy: `name` of a sampling policy (data/sampling.py) and its options.
    loader: how frames are decoded and handed over.
    augment: what the accelerator makes of them; in evaluation only its size and `center` count.
    mirror: None, or label-respecting mirroring (training).
    """

    subset: str | tuple[str, ...]
    batch_size: int
    policy: Mapping[str, Any]
    loader: LoaderConfig
    augment: AugmentConfig
    mirror: MirrorConfig | None


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """tIoU thresholds whose mean is the average mAP, and a file with videos that do not count (or None)."""

    tiou_thresholds: tuple[float, ...]
    blocked: str | None


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Pixel normalisation (RGB, 0..255) and the weight of the auxiliary snippet loss; see `Detector`."""

    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    snippet_loss_weight: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole config.

    num_snippets, frames_per_snippet: T and how many frames a snippet has, in training and evaluation.
    num_classes: of the localizer; 1 is class-agnostic and needs an external classifier.
    compute_dtype: of backbone, localizer and pixels; parameters, states and losses are float32 always.
    data: `name` of a data set and its options, without subset.
    backbone, localizer: `name` and options; `backbone.checkpoint` is a directory whose backbone to start from, or None.
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
        for section in ("data", "backbone", "localizer"):
            if "name" not in getattr(self, section):
                raise ConfigError(f"config.{section} lacks name: add it to the config file.")
        if not isinstance(self.eval.subset, str):
            raise ConfigError(f"config.eval.subset = {self.eval.subset!r}: mAP is of one subset, give one name.")
        for split in ("train", "eval"):
            if "name" not in getattr(self, split).policy:
                raise ConfigError(f"config.{split}.policy lacks name: add it to the config file.")


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Return the settings of a config, every key and value checked.

    Raises:
        ConfigError: naming the key, its value, what is allowed and the nearest word.
    """
    return build(Settings, config, path="config")
