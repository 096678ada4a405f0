"""Command line: python -m re2tal_jax.main --config FILE [--workdir DIR] [--mode MODE] [--config.section.key=value …]."""

import logging
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from re2tal_jax.errors import Re2TalError
from re2tal_jax.modes import MODES
from re2tal_jax.settings import read_settings

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; --config.section.key=value overrides a value.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; empty: runs/<name of the config file>.")
_MODE = flags.DEFINE_enum("mode", "train", sorted(MODES), "What to do.")


def main(arguments: list[str]) -> int:
    """Run the chosen mode; errors that are meant for the user end in one message and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for chatty in ("jax", "absl"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        if len(arguments) > 1:
            raise app.UsageError(f"unexpected arguments {arguments[1:]}: options are written --name=value.")
        config = _CONFIG.value.to_dict()
        name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
        MODES[_MODE.value](read_settings(config), config, Path(_WORKDIR.value or Path("runs") / name))
    except Re2TalError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def run() -> None:
    """Parse the command line and leave with main's exit code."""
    flags.mark_flag_as_required("config")
    app.run(main)


if __name__ == "__main__":
    run()
