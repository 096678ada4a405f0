"""Command line: python -m re2tal_jax.main --config FILE [--workdir DIR] [--mode MODE] [--config.section.key=VALUE …]

`--mode inspect` also takes --target TARGET, --plain and --fit WHAT.
"""

import argparse
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from re2tal_jax.accelerators import LOCAL, read_target
from re2tal_jax.config import override, read_config_file
from re2tal_jax.errors import ConfigError, Re2TalError, did_you_mean
from re2tal_jax.experiment import resolved_config
from re2tal_jax.modes import MODES
from re2tal_jax.modes.fit import FITS
from re2tal_jax.settings import read_settings

_OVERRIDE = re.compile(r"--?config\.([^=]+)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """What a command line asks for: the config with its overrides, what to do with it, and where."""

    config: Mapping[str, Any]
    mode: str
    workdir: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the mode."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help tells more.")


def read_command(arguments: Sequence[str]) -> Command:
    """Return what the arguments (without the program's name) ask for.

    Raises:
        ConfigError: unknown or incomplete arguments, a config file that cannot be read, an override without a section.
    """
    parser = _Parser(prog="python -m re2tal_jax.main", allow_abbrev=False, add_help=False)
    options = {
        "--config": ("FILE", "what to run, for example configs/demo.py; required"),
        "--config.section.key": ("VALUE", "overrides a value of the config file"),
        "--workdir": ("DIR", "folder of the run; runs/<name of the config file> if not given"),
        "--mode": ("MODE", f"one of {', '.join(sorted(MODES))}; train if not given"),
        "--target": (
            "TARGET",
            "inspect: what to compile for: local, or accelerators that are not there, h100, v5e:2x2 …",
        ),
        "--fit": ("WHAT", f"inspect: the largest {', '.join(FITS)} that the target's memory holds"),
    }
    for name, (value, text) in options.items():
        parser.add_argument(name, metavar=value, help=text)
    parser.add_argument("--plain", action="store_true", help="inspect: the ordinary network's memory, too")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    overrides, rest = split_overrides(arguments)
    known, unknown = parser.parse_known_args(rest)
    if unknown:
        names = [name for name in options if "." not in name] + ["--plain", "--config.<section>.<key>"]
        raise ConfigError(f"Unknown argument {unknown[0]!r}. {did_you_mean(unknown[0].partition('=')[0], names)}")
    if not known.config:
        raise ConfigError("--config is missing: name a config file, for example --config configs/demo.py.")
    mode = known.mode or "train"
    if mode not in MODES:
        raise ConfigError(f"Unknown mode {mode!r}. {did_you_mean(mode, MODES)}")
    chosen = {name: getattr(known, name) for name in ("target", "fit", "plain") if getattr(known, name)}
    if chosen and mode != "inspect":
        raise ConfigError(f"--{next(iter(chosen))} belongs to --mode inspect; the mode is {mode!r}.")
    if "target" in chosen and chosen["target"] != LOCAL:
        read_target(chosen["target"])
    if chosen.get("fit", FITS[0]) not in FITS:
        raise ConfigError(f"--fit {chosen['fit']!r} is no quantity. {did_you_mean(chosen['fit'], FITS)}")
    path = Path(known.config)
    config = read_config_file(path)
    for key, text in overrides:
        override(config, key, text)
    return Command(config, mode, Path(known.workdir or Path("runs") / path.stem), chosen)


def split_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the overrides as (key, text), written --config.key=value or --config.key value, and all else."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for and return the exit code; log and results go to stdout.

    Errors that are meant for the user end in one message on stderr and 1, Ctrl-C where nothing can be saved in 130.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout, force=True
    )
    for chatty in ("jax", "absl"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        command = read_command(sys.argv[1:] if arguments is None else arguments)
        settings = read_settings(command.config)
        MODES[command.mode](settings, resolved_config(settings), command.workdir, **command.options)
    except Re2TalError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)  # noqa: T201
        return 130  # what a shell says of a program that SIGINT ended
    return 0


if __name__ == "__main__":
    sys.exit(main())
