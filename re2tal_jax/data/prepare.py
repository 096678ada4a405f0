"""Encode videos again so that training reads them quickly: python -m re2tal_jax.data.prepare VIDEOS --out DIR

Short side 256, 30 frames per second, a key frame every 15 frames, H.264 in mp4 without sound; annotations in seconds
hold. Folders below VIDEOS are mirrored, one process encodes one video. What is finished is skipped when the command is
given again, a video is there as a whole or not at all, and the sources are only read. Videos that cannot be read to
their end are named, and make the exit code 1.

    --short-side N   pixels; smaller videos keep their size
    --fps RATE       30, 29.97, 30000/1001 …
    --gop N          frames from one key frame to the next
    --workers N      videos that are encoded at a time (default: the number of cores)
"""

import dataclasses
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import FrameType

from re2tal_jax.command import Parser
from re2tal_jax.data.encode import Encoding, encode_video
from re2tal_jax.data.video_folder import VIDEO_SUFFIXES, VideoFolder, printable, without_suffix
from re2tal_jax.errors import ConfigError, DataError, Re2TalError
from re2tal_jax.progress import WorkProgress

logger = logging.getLogger(__name__)

SETTINGS = "prepare.json"
"""The file in the output folder that tells how its videos were encoded; another encoding is refused."""

_PART = ".part"
_MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A video to encode."""

    source: Path
    target: Path

    @property
    def part(self) -> Path:
        """Where it is written until it is whole."""
        return self.target.with_name(f".{self.target.name}{_PART}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What became of the videos: how many were encoded now, were there before, and why others could not be read."""

    encoded: int
    there: int
    failures: Mapping[Path, str]


def prepare(videos: str | Path, out: str | Path, encoding: Encoding, *, workers: int) -> Result:
    """Encode a video, or every video below a folder, into a folder, `workers` at a time.

    Raises:
        ConfigError: the output folder is that of the videos, or holds videos of another encoding.
        DataError: no videos there, another run at work in the output folder, or one that cannot be written to.
    """
    out = Path(out)
    jobs = plan(Path(videos), out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _claimed(out, encoding):
            _remove_parts(jobs)
            missing = [job for job in jobs if not job.target.exists()]
            for folder in {job.target.parent for job in missing}:
                folder.mkdir(parents=True, exist_ok=True)
            try:
                failures = _encode_all(missing, encoding, workers)
            finally:
                _remove_parts(missing)
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot be written: {error.strerror}.") from error
    return Result(encoded=len(missing) - len(failures), there=len(jobs) - len(missing), failures=failures)


def plan(videos: Path, out: Path) -> list[Job]:
    """Return what there is to encode, and as what: `day 1/a.avi` as `day 1/a.mp4`.

    Of videos that would be the same file, `a.avi` and `a.mov`, each keeps its extension: `a.avi.mp4`.
    """
    if videos.is_file():
        root, files = videos.parent, [videos.name]
    else:
        folder = VideoFolder(videos)
        root, files = folder.root, list(folder.files)
    if out.resolve() == root.resolve():
        raise ConfigError(f"--out {out} is the folder of the videos, which are never written over: name another.")
    inside = [file for file in files if not (root / file).resolve().is_relative_to(out.resolve())]
    if not inside:
        raise DataError(f"{videos}: no video is there. Looked for {', '.join(VIDEO_SUFFIXES)}.")
    stems = Counter(map(without_suffix, inside))
    names = {file: (without_suffix(file) if stems[without_suffix(file)] == 1 else file) + ".mp4" for file in inside}
    return [Job(source=root / file, target=out / name) for file, name in names.items()]


@contextmanager
def _claimed(out: Path, encoding: Encoding) -> Iterator[None]:
    """Write how the folder's videos are encoded, or check it, and keep other runs out of it."""
    mine = dataclasses.asdict(encoding)
    with open(out / SETTINGS, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{out}: another run is at work in this folder; wait for it, or name another.") from error
        file.seek(0)
        text = file.read()
        if not text:
            json.dump(mine, file)
            file.flush()
        elif text != json.dumps(mine):
            raise ConfigError(
                f"{out} holds videos encoded as {text[:200]}, asked for {json.dumps(mine)}: name another."
            )
        yield


def _remove_parts(jobs: Iterable[Job]) -> None:
    """Remove what interrupted encodings of these jobs left, and nothing else in a folder that may be anybody's."""
    for job in jobs:
        job.part.unlink(missing_ok=True)


def _encode_all(jobs: Sequence[Job], encoding: Encoding, workers: int) -> dict[Path, str]:
    """Encode videos in processes and return why some could not be.

    A decoder that crashes on a file takes all processes with it; videos that were at work then are tried one by one.
    """
    failures: dict[Path, str] = {}
    waiting = list(jobs)
    with WorkProgress(sum(map(_mib, jobs)), "prepare", "MiB") as progress:
        while waiting:
            crashed = _encode_until_crash(waiting, encoding, workers, failures, progress)
            waiting = [job for job in waiting if not job.target.exists() and job.source not in failures]
            for job in [job for job in waiting if job.part.exists()] or waiting if crashed else ():
                if _encode_until_crash([job], encoding, 1, failures, progress):
                    failures[job.source] = f"{job.source}: the decoder crashed on it."
            waiting = [job for job in waiting if not job.target.exists() and job.source not in failures]
    return failures


def _encode_until_crash(
    jobs: Sequence[Job], encoding: Encoding, workers: int, failures: dict[Path, str], progress: WorkProgress
) -> bool:
    """Encode videos in a pool of processes, and tell whether one of them crashed, which ends all."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),  # not forked: the parent may hold JAX's threads
        initializer=signal.signal,  # Ctrl-C reaches the parent, which ends its processes
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    with pool:
        try:
            futures = {pool.submit(encode_job, job, encoding): job for job in jobs}
            for future in as_completed(futures):
                failure, job = future.result(), futures[future]
                if failure is not None:
                    failures[job.source] = failure
                    logger.warning("cannot encode %s", printable(failure))
                progress.advance(_mib(job))
        except BrokenProcessPool:
            return True
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # what it was writing is removed by `prepare`
            raise
    return False


def encode_job(job: Job, encoding: Encoding) -> str | None:
    """Encode a video in this process, moved into place when it is whole; return why it cannot be read, or None."""
    try:
        encode_video(job.source, job.part, encoding)
        job.part.replace(job.target)
    except OSError:
        raise  # a full disk is not the fault of this video
    except DataError as error:
        return str(error)
    except Exception as error:  # whatever a decoder raises is about this file, and the others are to be encoded
        return f"{job.source}: {type(error).__name__}: {error}"
    finally:
        job.part.unlink(missing_ok=True)
    return None


def _mib(job: Job) -> int:
    """Return the size of a source, at least 1: what progress counts."""
    try:
        return max(job.source.stat().st_size // _MIB, 1)
    except OSError:
        return 1


# --- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Encode what the command line names; return 0, 1 if videos could not be read, 130 after Ctrl-C or SIGTERM."""
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
    lines = [f"{result.encoded} encoded, {result.there} were there, {len(result.failures)} cannot be read"]
    lines += [f"  {printable(reason)}" for reason in result.failures.values()]
    print("\n".join(lines))  # noqa: T201
    return int(bool(result.failures))


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
