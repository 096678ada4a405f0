"""Encode videos again so that training reads them quickly: python -m re2tal_jax.data.prepare VIDEOS --out DIR

Short side 256, 30 frames per second, a key frame every 15 frames, H.264 in mp4 without sound; annotations in seconds
hold. Folders below VIDEOS are mirrored, one process encodes one video. What is finished is skipped when the command is
given again, a video is there as a whole or not at all, and the sources are only read. Videos that cannot be decoded to
their end are named, and make the exit code 1; those whose timestamps jump are encoded in the order of their frames, and
named.

    --short-side N   pixels; smaller videos keep their size
    --fps RATE       30, 29.97, 30000/1001 …
    --gop N          frames from one key frame to the next
    --workers N      videos that are encoded at a time (default: the number of cores)
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from fractions import Fraction
from types import FrameType

from re2tal_jax.command import Parser
from re2tal_jax.data.findings import counted
from re2tal_jax.data.prepare.encode import Encoding
from re2tal_jax.data.prepare.jobs import Result, prepare
from re2tal_jax.data.video_folder import printable
from re2tal_jax.errors import ConfigError, Re2TalError


def main(arguments: Sequence[str] | None = None) -> int:
    """Encode what the command line names; return 0, 1 if videos failed, 130 after Ctrl-C or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        options = _parser().parse_all(sys.argv[1:] if arguments is None else arguments)
        if options.workers < 1:
            raise ConfigError(f"--workers {options.workers} must be at least 1.")
        encoding = Encoding(short_side=options.short_side, fps=float(options.fps), gop=options.gop)
        result = prepare(options.videos, options.out, encoding, workers=options.workers)
    except Re2TalError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)  # noqa: T201
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(describe(result, options.out))  # noqa: T201
    return int(bool(result.failures))


def describe(result: Result, out: str) -> str:
    """Return the result in words: what failed and why, what was mended, and what to do about both."""
    lines = [
        f"{counted(result.encoded, 'video')} encoded, {result.there:,} there before, {len(result.failures):,} failed"
    ]
    if result.failures:
        lines.append(f"failed, and not in {out}:")
        lines += [f"  {printable(reason)}" for reason in result.failures.values()]
        lines.append(
            "  -> Play them to see what is wrong, and download or copy them again; the same command then encodes what "
            "is missing. To train without them: config.data.missing_videos=skip."
        )
    if result.jumps:
        lines.append("encoded in the order of the frames, because timestamps jump:")
        lines += [f"  {printable(str(source))}: {', '.join(jumps)}" for source, jumps in result.jumps.items()]
        lines.append("  -> Look whether segments after these times still lie where the action is.")
    return "\n".join(lines)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> Parser:
    parser = Parser(
        prog="python -m re2tal_jax.data.prepare", allow_abbrev=False, description=(__doc__ or "").split(":")[0]
    )
    default = Encoding()
    parser.add_argument("videos", metavar="VIDEOS", help="folder of videos, or one video")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the encoded videos")
    parser.add_argument("--short-side", metavar="N", type=int, default=default.short_side, help="pixels")
    parser.add_argument("--fps", metavar="RATE", type=Fraction, default=default.fps, help="frames per second")
    parser.add_argument("--gop", metavar="N", type=int, default=default.gop, help="frames between key frames")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=os.cpu_count() or 1, help="videos that are encoded at a time"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
