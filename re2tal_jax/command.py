"""What command lines share: a parser whose faults are ConfigErrors, and a config file with values set over it."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from re2tal_jax.config import override, read_config_file
from re2tal_jax.errors import ConfigError, did_you_mean

_OVERRIDE = re.compile(r"--?config\.([^=]+)(?:=(.*))?", re.DOTALL)

Overrides = list[tuple[str, str]]
"""Keys below `config` and the text that each is set to, in the order of the command line."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the arguments."""
        raise ConfigError(f"{message}; {self.prog} --help tells more.")

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the arguments.

        Raises:
            ConfigError: an argument that there is not; the nearest one is named.
        """
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            raise ConfigError(f"Unknown argument {unknown[0]!r}. {did_you_mean(unknown[0].partition('=')[0], names)}")
        return known


def split_overrides(arguments: Sequence[str]) -> tuple[Overrides, list[str]]:
    """Return the overrides as (key, text), written --config.key=value or --config.key value, and all else.

    Raises:
        ConfigError: an override without a value.
    """
    overrides, rest, words = [], [], list(arguments)
    while words:
        word = words.pop(0)
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        text = match[2]
        if text is None:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{word} has no value: write {word}=value.")
            text = words.pop(0)
        overrides.append((match[1], text))
    return overrides, rest


def read_config(file: str | Path, overrides: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the config of a file with values set as the command line says; errors as in `config`."""
    return set_values(read_config_file(Path(file)), overrides)


def set_values(config: dict[str, Any], overrides: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the config, in which values are set as the command line says; errors as `config.override`."""
    for key, text in overrides:
        override(config, key, text)
    return config
