"""Look at a data set before training: python -m re2tal_jax.data.check --config FILE [--config.section.key=VALUE …]

Reads what the config reads, annotation and video files, and prints what is wrong with them, by severity, with a way
out of each; counts and a histogram of lengths before that. Exits with 1 if there are errors. Nothing is compiled, and
of the config only the sections `data`, `train` and `eval`, `backbone.checkpoint` and the numbers of snippets and
classes count. The synthetic data set is rendered first where its videos are not there yet.

    --json FILE    also write the report as JSON
    --workers N    files that are opened at a time (default: the number of cores)
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from re2tal_jax.command import Parser, read_config, split_overrides
from re2tal_jax.data.check.run import check
from re2tal_jax.errors import ConfigError, Re2TalError


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the command line names and return the exit code: 0 without errors, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("progress", "data.synthetic"):  # what takes long says so, on stderr
        logging.getLogger(f"re2tal_jax.{name}").setLevel(logging.INFO)
    try:
        overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_all(rest)
        if options.workers < 1:
            raise ConfigError(f"--workers {options.workers} must be at least 1.")
        if options.json is not None and not Path(options.json).absolute().parent.is_dir():
            raise ConfigError(f"--json {options.json}: there is no such folder.")
        report = check(read_config(options.config, overrides), workers=options.workers)
        print(report)  # noqa: T201
        if options.json is not None:
            _write(Path(options.json), json.dumps(report.as_json(), indent=1))
        return int(report.failed)
    except Re2TalError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)  # noqa: T201
        return 130


def _parser() -> Parser:
    parser = Parser(
        prog="python -m re2tal_jax.data.check", allow_abbrev=False, description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="the config whose data set to check")
    parser.add_argument("--config.section.key", metavar="VALUE", help="overrides a value of the config file")
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=os.cpu_count() or 1, help="files that are opened at a time"
    )
    return parser


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
