"""A folder of videos encoded into another: in processes, going on where it stopped, damage to one costing no other."""

import dataclasses
import json
import logging
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from re2tal_jax.data.prepare.encode import Encoding, encode_video
from re2tal_jax.data.prepare.record import Made, Record
from re2tal_jax.data.video_folder import VIDEO_SUFFIXES, VideoFolder, printable, without_suffix
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.locks import claim
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
    """What became of the videos.

    encoded, there: how many were encoded now, and before.
    failures: why others could not be, by source.
    jumps: where the timestamps of sources jumped, now or before; segments after that lie elsewhere in the video.
    """

    encoded: int
    there: int
    failures: Mapping[Path, str]
    jumps: Mapping[Path, Sequence[str]]


def prepare(videos: str | Path, out: str | Path, encoding: Encoding, *, workers: int) -> Result:
    """Encode a video, or every video below a folder, into a folder, `workers` at a time.

    Raises:
        ConfigError: the output folder is that of the videos, or holds videos of another encoding.
        DataError: no videos there, two that would be one, another run at work in the output folder, or one that cannot
            be written to.
    """
    out = Path(out)
    jobs = plan(Path(videos), out)
    try:
        with _claimed(out, encoding):
            record = Record(out)
            for job in jobs:
                record.check(job.source, job.target)
            _remove_parts(jobs)
            missing = [job for job in jobs if not job.target.exists()]
            for folder in {job.target.parent for job in missing}:
                folder.mkdir(parents=True, exist_ok=True)
            try:
                failures = _encode_all(missing, encoding, workers, record)
            finally:
                _remove_parts(missing)
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot be written: {error.strerror}.") from error
    jumps = {job.source: record.jumps(job.target) for job in jobs if job.target.exists()}
    return Result(
        encoded=len(missing) - len(failures),
        there=len(jobs) - len(missing),
        failures=failures,
        jumps={source: found for source, found in jumps.items() if found},
    )


def plan(videos: Path, out: Path) -> list[Job]:
    """Return what there is to encode, and as what: `day 1/a.avi` as `day 1/a.mp4`.

    Of videos that would be the same file, `a.avi` and `a.mov`, each keeps its extension: `a.avi.mp4`.

    Raises:
        ConfigError: the output folder is that of the videos.
        DataError: no videos there, or two that would be the same file even so.
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
    by_name: dict[str, str] = {}
    for file, name in names.items():
        if by_name.setdefault(name, file) != file:
            raise DataError(
                f"{videos}: {printable(by_name[name])!r} and {printable(file)!r} would both be {printable(name)!r}: "
                "rename one."
            )
    return [Job(source=root / file, target=out / name) for file, name in names.items()]


@contextmanager
def _claimed(out: Path, encoding: Encoding) -> Iterator[None]:
    """Write how the folder's videos are encoded, or check it, and keep other runs out of it."""
    mine = json.dumps(dataclasses.asdict(encoding))
    with claim(out / SETTINGS, work="preparation", option="--out") as file:
        file.seek(0)
        text = file.read().decode(errors="replace")
        if not text:
            file.write(mine.encode())
            file.flush()
        elif text != mine:
            raise ConfigError(f"{out} holds videos encoded as {text[:200]}, asked for {mine}: name another.")
        yield


def _remove_parts(jobs: Iterable[Job]) -> None:
    """Remove what interrupted encodings of these jobs left, and nothing else in a folder that may be anybody's."""
    for job in jobs:
        job.part.unlink(missing_ok=True)


def _encode_all(jobs: Sequence[Job], encoding: Encoding, workers: int, record: Record) -> dict[Path, str]:
    """Encode videos in processes and return why some could not be.

    A decoder that crashes on a file takes all processes with it; videos that were at work then are tried one by one.
    """
    failures: dict[Path, str] = {}
    waiting = list(jobs)
    with WorkProgress(sum(map(_mib, jobs)), "prepare", "MiB") as progress:

        def finish(job: Job, outcome: Made | str) -> None:
            if isinstance(outcome, Made):
                record.add(job.target, outcome)
            else:
                failures[job.source] = outcome
                logger.warning("cannot encode %s", printable(outcome))
            progress.advance(_mib(job))

        while waiting:
            crashed = _encode_until_crash(waiting, encoding, workers, finish)
            waiting = [job for job in waiting if not job.target.exists() and job.source not in failures]
            for job in [job for job in waiting if job.part.exists()] or waiting if crashed else ():
                if _encode_until_crash([job], encoding, 1, finish):
                    failures[job.source] = f"{job.source}: the decoder crashed on it."
            waiting = [job for job in waiting if not job.target.exists() and job.source not in failures]
    return failures


def _encode_until_crash(
    jobs: Sequence[Job], encoding: Encoding, workers: int, finish: Callable[[Job, Made | str], None]
) -> bool:
    """Encode videos in a pool of processes, and tell whether one of them crashed, which ends all.

    `finish` takes each video and what `encode_job` returned.
    """
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
                finish(futures[future], future.result())
        except BrokenProcessPool:
            return True
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # what it was writing is removed by `prepare`
            raise
    return False


def encode_job(job: Job, encoding: Encoding) -> Made | str:
    """Encode a video in this process, moved into place when it is whole; return what it is made of, or why it is not.

    Raises:
        OSError: the disk is full, say, which is not the fault of this video.
    """
    try:
        _, jumps = encode_video(job.source, job.part, encoding)
        try:
            made = Made.of(job.source, jumps)
        except OSError as error:
            return f"{job.source}: cannot be read any more: {error.strerror}."
        job.part.replace(job.target)
        return made
    except OSError:
        raise
    except DataError as error:
        return str(error)
    except Exception as error:  # whatever a decoder raises is about this file, and the others are to be encoded
        return f"{job.source}: {type(error).__name__}: {error}"
    finally:
        job.part.unlink(missing_ok=True)


def _mib(job: Job) -> int:
    """Return the size of a source, at least 1: what progress counts."""
    try:
        return max(job.source.stat().st_size // _MIB, 1)
    except OSError:
        return 1
