"""The network that a checkpoint is converted for: a registered backbone, or the whole detector of a config."""

import functools
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from checkpoints_convert.rules import fill, flatten
from re2tal_jax.backbones import NETWORKS
from re2tal_jax.config import bind, override, read_config_file, resolve
from re2tal_jax.errors import ConfigError
from re2tal_jax.experiment import FREE_OPTIONS, make_detector, resolved_config
from re2tal_jax.seeds import Seeded
from re2tal_jax.settings import Settings, read_settings

BACKBONE = "backbone."
_NOT_OPTIONS = ("name", "checkpoint")


@dataclass(frozen=True)
class Network:
    """A network by its config: `config["backbone"]` alone, or all of a detector's.

    Args:
        name: what the user called it.
        config: nested dictionaries as of a config file; with only a backbone, nothing else is in it.
        whole: a detector, or its backbone alone.
    """

    name: str
    config: Mapping[str, Any]
    whole: bool

    @property
    def backbone_name(self) -> str:
        """The registered name of its backbone."""
        return self.config["backbone"]["name"]

    def with_options(self, options: Mapping[str, Any]) -> "Network":
        """Return the network whose backbone has these arguments too; those that were given stand."""
        return replace(self, config={**self.config, "backbone": {**options, **self.config["backbone"]}})

    @functools.cached_property
    def settings(self) -> Settings:
        """The checked settings of a detector."""
        return read_settings(self.config)

    @functools.cached_property
    def make(self) -> Callable[[], Any]:
        """The constructor; parameters are drawn from the config's seed, or from 0."""
        if self.whole:
            return make_detector(self.settings)
        factory = NETWORKS[self.backbone_name]
        options = bind(factory, self._options, path="config.backbone", given=("dtype", "rngs"))
        return lambda: factory(**options, rngs=Seeded(0))

    @functools.cached_property
    def abstract(self) -> Any:
        """The module without arrays: what `nnx.eval_shape` gives."""
        return nnx.eval_shape(self.make)

    @property
    def backbone(self) -> Any:
        """The abstract backbone."""
        return self.abstract.backbone if self.whole else self.abstract

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by path."""
        return {path: tuple(leaf.shape) for path, leaf in flatten(self.abstract).items()}

    def initial_values(self, paths: Collection[str]) -> dict[str, np.ndarray]:
        """Return some parameters as they are before training; no others are computed."""
        if not paths:
            return {}
        drawn = jax.jit(lambda: {path: value for path, value in flatten(self.make()).items() if path in paths})()
        return {path: np.asarray(value) for path, value in drawn.items()}

    def build(self, params: Mapping[str, np.ndarray]) -> Any:
        """Return the module with parameters given by path."""
        return fill(self.abstract, params)

    def resolved(self) -> dict[str, Any]:
        """Return its config with every default filled in, JSON: what a folder of converted parameters keeps."""
        if self.whole:
            return resolved_config(self.settings)
        factory = NETWORKS[self.backbone_name]
        options = resolve(factory, self._options, path="config.backbone", given=("dtype", "rngs"))
        return {"backbone": {"name": self.backbone_name, **options}}

    def options_beyond(self, other: "Network") -> dict[str, Any]:
        """Return the backbone's arguments that its weights need and another network has otherwise, by name."""
        mine, theirs = (
            Network(network.name, {"backbone": network.config["backbone"]}, whole=False).resolved()["backbone"]
            for network in (self, other)
        )
        return {key: value for key, value in mine.items() if key not in FREE_OPTIONS and theirs.get(key) != value}

    @property
    def option_names(self) -> list[str]:
        """The backbone's arguments that make other weights fit, or mean something else."""
        backbone = Network(self.name, {"backbone": self.config["backbone"]}, whole=False).resolved()["backbone"]
        return sorted(backbone.keys() - set(FREE_OPTIONS))

    @property
    def _options(self) -> dict[str, Any]:
        return {key: value for key, value in self.config["backbone"].items() if key not in _NOT_OPTIONS}


def as_overrides(options: Mapping[str, Any]) -> list[str]:
    """Return what to type on a command line to give a backbone these arguments."""
    return [shlex.quote(f"--config.{BACKBONE}{key}={value!r}") for key, value in options.items()]


def open_network(name: str, overrides: Sequence[tuple[str, str]] = ()) -> Network:
    """Return the network that the user names: a registered backbone, or a config file for the whole detector.

    Args:
        name: a name of `re2tal_jax.list_backbones()`, or the path of a config file.
        overrides: (key, text) pairs as of `--config.key=text`.

    Raises:
        ConfigError: an unknown name, file or key.
    """
    whole = name.endswith(".py")
    if whole:
        config = read_config_file(Path(name))
    else:
        NETWORKS[name]  # an unknown name is told with the nearest
        config = {"backbone": {"name": name}}
    for key, text in overrides:
        if not whole and not key.startswith(BACKBONE):
            raise ConfigError(
                f"--config.{key}: the network is a backbone alone; allowed is --config.backbone.KEY=VALUE."
            )
        override(config, key, text)
    return Network(name, config, whole)
