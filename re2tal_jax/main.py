"""Command line: python -m re2tal_jax.main [--config FILE] [--workdir DIR] [--mode MODE] [--config.section.key=VALUE …]

Without --config the config is that of the run in --workdir, or of --checkpoint.

Further arguments belong to single modes: --help tells of which.
"""

import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from re2tal_jax.accelerators import LOCAL, read_target
from re2tal_jax.command import Parser, read_config, set_values, split_overrides
from re2tal_jax.errors import ConfigError, Re2TalError, did_you_mean
from re2tal_jax.experiment import resolved_config
from re2tal_jax.modes import MODES
from re2tal_jax.modes.fit import FITS
from re2tal_jax.settings import read_settings
from re2tal_jax.trained import config_of


@dataclass(frozen=True)
class Command:
    """What a command line asks for: the config with its overrides, what to do with it, and where."""

    config: Mapping[str, Any]
    mode: str
    workdir: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the mode."""


INTERRUPTED = 130
"""The exit code that shells give a program which SIGINT ended."""

_INSPECT, _PREDICT, _EXTRACT = ("inspect",), ("predict",), ("extract",)
_OPTIONS: Mapping[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "target": (
        _INSPECT,
        {
            "metavar": "TARGET",
            "help": "what to compile for: local, or accelerators that are not there, h100, v5e:2x2 …",
        },
    ),
    "fit": (_INSPECT, {"metavar": "WHAT", "help": f"the largest {', '.join(FITS)} that the target's memory holds"}),
    "plain": (_INSPECT, {"action": "store_true", "help": "the ordinary network's memory, too"}),
    "videos": (
        _PREDICT,
        {"metavar": "PATH", "nargs": "+", "help": "files, folders, patterns; config.eval.subset if not given"},
    ),
    "checkpoint": (
        _PREDICT + _EXTRACT,
        {"metavar": "DIR", "help": "folder of a run or of converted parameters; the workdir if not given"},
    ),
    "out": (
        _PREDICT + _EXTRACT,
        {"metavar": "DIR", "help": "folder of the results; WORKDIR/predict, WORKDIR/features if not given"},
    ),
    "dtype": (_EXTRACT, {"metavar": "TYPE", "help": "of the features: float32 (if not given) or float16"}),
    "classes": (_PREDICT, {"metavar": "FILE", "help": "class list, for a checkpoint that carries none"}),
    "overwrite": (
        _PREDICT + _EXTRACT,
        {"action": "store_true", "help": "start anew, whatever is finished in that folder"},
    ),
}
"""Arguments that belong to some modes: to which, and how they are read."""


def read_command(arguments: Sequence[str]) -> Command:
    """Return what the arguments (without the program's name) ask for.

    Raises:
        ConfigError: unknown or incomplete arguments, a config file that cannot be read, an override without a section.
    """
    parser = Parser(prog="python -m re2tal_jax.main", allow_abbrev=False, add_help=False)
    for name, (value, text) in {
        "--config": (
            "FILE",
            "what to run, for example configs/demo.py; if not given, what --checkpoint or --workdir holds",
        ),
        "--config.section.key": ("VALUE", "overrides a value of the config file"),
        "--workdir": ("DIR", "folder of the run; runs/<name of the config file or checkpoint> if not given"),
        "--mode": ("MODE", f"one of {', '.join(sorted(MODES))}; train if not given"),
    }.items():
        parser.add_argument(name, metavar=value, help=text)
    for name, (modes, kind) in _OPTIONS.items():
        parser.add_argument(f"--{name}", **{**kind, "help": f"{', '.join(modes)}: {kind['help']}"})
    parser.add_argument("-h", "--help", action="help", help="show this text")
    overrides, rest = split_overrides(arguments)
    known = parser.parse_all(rest)
    mode = known.mode or "train"
    if mode not in MODES:
        raise ConfigError(f"Unknown mode {mode!r}. {did_you_mean(mode, MODES)}")
    chosen = {name: getattr(known, name) for name in _OPTIONS if getattr(known, name)}
    for name in chosen:
        if mode not in _OPTIONS[name][0]:
            raise ConfigError(f"--{name} belongs to --mode {' or '.join(_OPTIONS[name][0])}; the mode is {mode!r}.")
    if "target" in chosen and chosen["target"] != LOCAL:
        read_target(chosen["target"])
    if chosen.get("fit", FITS[0]) not in FITS:
        raise ConfigError(f"--fit {chosen['fit']!r} is no quantity. {did_you_mean(chosen['fit'], FITS)}")
    source = known.config or chosen.get("checkpoint") or known.workdir
    if not source:
        raise ConfigError(
            "--config is missing: name a config file, for example --config configs/demo.py, or with --workdir the "
            "folder of a run, whose config is taken."
        )
    name = Path(source).stem if known.config else Path(source).absolute().name
    workdir = Path(known.workdir or Path("runs") / name)
    config = read_config(source, overrides) if known.config else set_values(config_of(Path(source)), overrides)
    return Command(config, mode, workdir, chosen)


def without_traceback(record: logging.LogRecord) -> bool:
    """Put what jax failed at in one line: each plugin without its accelerator would be twenty; a logging filter."""
    if record.exc_info and record.name.partition(".")[0] == "jax":
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
        record.exc_info = record.exc_text = None
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for and return the exit code; log and results go to stdout.

    Errors that are meant for the user end in one message on stderr and 1, Ctrl-C where nothing can be saved in 130.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout, force=True
    )
    for chatty in ("jax", "absl"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(without_traceback)
    try:
        command = read_command(sys.argv[1:] if arguments is None else arguments)
        settings = read_settings(command.config)
        MODES[command.mode](settings, resolved_config(settings), command.workdir, **command.options)
    except Re2TalError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    return 0


def run() -> NoReturn:
    """Do as `main`, and end the process.

    Compiling that was interrupted goes on in XLA's threads, which crash when Python takes away what they use. So the
    end of the process is left to the system; files were closed on the way out of `main`.
    """
    code = main()
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
