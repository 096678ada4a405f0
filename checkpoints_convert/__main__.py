"""Command line: python -m checkpoints_convert SOURCE --model NAME --out DIR

    SOURCE --model NAME --out DIR       a PyTorch file to a folder that config.backbone.checkpoint takes
    SOURCE --to torch --dialect D --out FILE
                                        a folder of ours (converted, or a run's) to a PyTorch file

SOURCE is a file, or a folder or index of Hugging Face's; NAME a registered backbone, or a config file for a whole
detector.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from checkpoints_convert import torch_io
from checkpoints_convert.convert import Conversion, export, load_converted, plan_conversion, what_would_fit, write
from checkpoints_convert.live import compare_live
from checkpoints_convert.networks import as_overrides, open_network
from checkpoints_convert.verify import Row, replay
from re2tal_jax.command import split_overrides
from re2tal_jax.errors import CheckpointError, ConfigError, Re2TalError
from re2tal_jax.reversible import PLAIN, REWIRED, rewire
from re2tal_jax.weights import check_writable

log = logging.getLogger("checkpoints_convert")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; python -m checkpoints_convert --help tells more.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m checkpoints_convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, help="a PyTorch or safetensors file, or its folder; with --to torch, a folder of ours")
    add("--model", metavar="NAME", help="a registered backbone, or a config file for a whole detector")
    add("--out", type=Path, metavar="PATH", help="the folder, or with --to torch the file, to write")
    add("--to", choices=("jax", "torch"), default="jax", help="jax if not given")
    add("--dialect", metavar="NAME", help="the file's dialect, where its keys do not tell; needed with --to torch")
    add("--state-dict", metavar="NAME", help="which state dict of the file, where it holds several")
    add("--dry-run", action="store_true", help="print the report and write nothing")
    add("--allow-missing", metavar="REGEX", help="parameters (our paths) that may stay as they are initialised")
    add("--overwrite", action="store_true", help="replace what --out names, if a conversion wrote all that is there")
    add("--golden", type=Path, metavar="FILE", help="replay activations recorded from the source (.npz)")
    add("--check", action="store_true", help="run the source's own network too, on one random clip, and compare")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, print the report and return the exit code: 1 if anything is not as it should be."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    for chatty in ("jax", "absl"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")  # an accelerator would be waited for and held, for nothing
    try:
        overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_args(rest)
        return _to_torch(options, overrides) if options.to == "torch" else _to_jax(options, overrides)
    except Re2TalError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing half-written was left", file=sys.stderr)  # noqa: T201
        return 130


def _to_jax(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    if options.model is None:
        raise ConfigError("--model is missing: name a backbone (re2tal_jax.list_backbones()) or a config file.")
    if options.out is not None:
        check_writable(options.out, overwrite=options.overwrite)
    elif not options.dry_run:
        raise ConfigError("--out is missing: name the folder to write, or add --dry-run.")
    network = open_network(options.model, overrides)
    conversion = plan_conversion(
        options.source,
        network,
        dialect=options.dialect,
        state_dict=options.state_dict,
        allow_missing=options.allow_missing,
    )
    log.info("%s", conversion)
    if not conversion.report.complete:
        shard = f"{conversion.source.shard}. " if conversion.source.shard else ""
        raise CheckpointError(
            "not every key is mapped and every parameter filled (see above); nothing was written. "
            f"{shard}{what_would_fit(conversion)} Sizes are set by --config.backbone.KEY=VALUE, KEY one of "
            f"{', '.join(conversion.network.option_names)}; --allow-missing REGEX initialises parameters anew."
        )
    conversion.parameters()  # values that are no weights are known in a dry run too
    rows = _verify(options, conversion)
    for row in rows:
        log.info("%s", row)
    if not all(row.passed for row in rows):
        raise CheckpointError("the converted network does not compute what the source did; nothing was written.")
    if options.out is not None and not options.dry_run:
        digest = write(conversion, options.out, overwrite=options.overwrite)
        log.info("written  %s, parameters' SHA-256 %s", options.out, digest)
        needed = conversion.network.options_beyond(open_network(options.model))
        use = " ".join([f"--config.backbone.checkpoint={options.out}", *as_overrides(needed)])
        log.info("use      %s", use)
        if conversion.network.whole:
            log.info("         --config=%s --mode=eval --workdir=%s for all of it", options.model, options.out)
    return 0


def _verify(options: argparse.Namespace, conversion: Conversion) -> list[Row]:
    """Return the rows of the checks that were asked for."""
    if options.golden is None and not options.check:
        return []
    rows = []
    module = conversion.network.build(conversion.parameters())
    backbone = module.backbone if conversion.network.whole else module
    if options.golden is not None:
        wiring = REWIRED if conversion.spoken.dialect.rewired else PLAIN  # as the file's project runs it
        replayed, left_out = replay(rewire(backbone, wiring), options.golden)
        rows += replayed
        if left_out:
            log.info("golden   not compared, this network gives no such output: %s", ", ".join(left_out))
    if options.check:
        rows += compare_live(conversion, backbone)
    return rows


def _to_torch(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    given = {
        "--golden": options.golden is not None,
        "--check": options.check,
        "--allow-missing": options.allow_missing is not None,
        "--state-dict": options.state_dict is not None,
        "--config.… without --model": bool(overrides) and options.model is None,
    }
    if unused := [name for name, is_given in given.items() if is_given]:
        raise ConfigError(f"--to torch has no use for {', '.join(unused)}: leave that out.")
    if options.dialect is None or options.out is None:
        raise ConfigError("--to torch needs --dialect NAME, whose names to write, and --out FILE.")
    torch_io.check_target(options.out, overwrite=options.overwrite)
    network = None if options.model is None else open_network(options.model, overrides)
    network, params = load_converted(options.source, network)
    state_dict = export(network, params, options.dialect)
    if not options.dry_run:
        torch_io.write(options.out, state_dict, overwrite=options.overwrite)
    done = "would write" if options.dry_run else "written"
    log.info("%s %s, %d arrays of %s as %s", done, options.out, len(state_dict), network.name, options.dialect)
    return 0


if __name__ == "__main__":
    sys.exit(main())
