"""One directory of a data set: python -m re2tal_jax.data.tfds_builders --config FILE --out DIR [--config.key=VALUE …]

Writes the videos of the config's training and evaluation subsets with all that is annotated into DIR, as array_record
files of tensorflow-datasets. `data=dict(name="prepared", root=DIR)` trains from it, with the same batches. What the
config leaves out (blocked, missing) is not written; what is only a view of it (class_agnostic, min_length_ratio) is
given again when it is read.

The same command goes on where it stopped. Videos that cannot be read are written as they are, named, and make the exit
code 1.

    --workers N                      videos that are opened at a time to look at them (default: 16)
    --beam_runner NAME               write shards on a cluster: DirectRunner, DataflowRunner …
    --beam_pipeline_options A=1,B=2  its options
"""

import contextlib
import importlib.util
import inspect
import io
import json
import logging
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from re2tal_jax.command import Parser, read_config, split_overrides
from re2tal_jax.config import build
from re2tal_jax.data import DATASETS
from re2tal_jax.data.container import probe
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.findings import counted
from re2tal_jax.data.tfds_builders.contents import NAME, VERSION, Job, make_metadata, plan_jobs
from re2tal_jax.data.video_folder import printable
from re2tal_jax.data.video_source import VideoInfo
from re2tal_jax.errors import ConfigError, DataError, Re2TalError
from re2tal_jax.locks import claim
from re2tal_jax.progress import WorkProgress

logger = logging.getLogger(__name__)

VIEWS = ("class_agnostic", "min_length_ratio")
"""Options of a data set that choose from its annotation, and are given when it is read."""

UNFINISHED = "unfinished"
SHARD_BYTES = 256 * 2**20
"""About the size of a file of records; a video is never cut, so a longer one has a file of its own."""

_CLAIM = "claim.json"
_WORKERS = 16  # threads: they wait for the disk
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is in the directory: videos, bytes, and why some cannot be read; `written` is False if it was there before.

    `view` are the options of the config that are given again when it is read.
    """

    videos: int
    size: int
    failures: Mapping[str, str]
    written: bool
    view: Mapping[str, Any]


def prepare(
    config: Mapping[str, Any],
    out: str | Path,
    *,
    workers: int = _WORKERS,
    beam_runner: str | None = None,
    beam_options: Sequence[str] = (),
    shard_bytes: int | None = None,
) -> Result:
    """Write the videos of a config's subsets, with what is annotated, into a directory.

    Args:
        config: its sections `data`, `train` and `eval` count.
        out: the directory; it holds one data set.
        workers: files that are looked at at a time.
        beam_runner: name of a runner of Apache Beam that writes the shards; None writes them here.
        beam_options: command line options of the runner.
        shard_bytes: about the size of a file of records; None is `SHARD_BYTES`.

    Raises:
        ConfigError: a config that cannot be prepared, Beam not installed, or another data set in the directory.
        DataError: the data set cannot be opened, a file that vanishes, or a directory that cannot be written to.
    """
    if beam_runner is not None and importlib.util.find_spec("apache_beam") is None:
        raise ConfigError(f"--beam_runner {beam_runner} needs Apache Beam: pip install -e '.[beam]' in the checkout.")
    name, datasets, view = open_subsets(config)
    infos, failures = _look_at_all(datasets, workers)
    jobs = {subset: plan_jobs(dataset, infos) for subset, dataset in datasets.items()}
    metadata = make_metadata(name, datasets, jobs)
    folder = Path(out) / NAME
    if not (written := not _is_there(folder, metadata)):
        logger.info("%s holds this data set already", out)
    else:
        try:
            with _claimed(folder, _claim(metadata, jobs, shard_bytes or SHARD_BYTES)) as unfinished:
                _write(folder, unfinished, metadata, jobs, beam_runner, beam_options, shard_bytes or SHARD_BYTES)
        except Re2TalError:
            raise
        except (OSError, RuntimeError) as error:
            raise DataError(f"{out}: cannot be written: {error}. The same command goes on.") from error
    every = [job for several in jobs.values() for job in several]
    return Result(videos=len(every), size=sum(job.size for job in every), failures=failures, written=written, view=view)


def open_subsets(config: Mapping[str, Any]) -> tuple[str, dict[str, Dataset], dict[str, Any]]:
    """Return the name of the config's data set, its subsets whole, and the options that are a view of them.

    Raises:
        ConfigError: a section or name that there is not, features in the place of videos, or no folder of videos.
        DataError: the data set cannot be opened.
    """
    section = dict(_section(config, "data"))
    name = str(section.pop("name", None))
    factory = DATASETS[name]
    if section.get("features") is not None:
        raise ConfigError("config.data.features: features are files already; set it to None to prepare the videos.")
    parameters = inspect.signature(factory).parameters
    view = {key: section.get(key, parameters[key].default) for key in VIEWS if key in parameters}
    options = {**section, **({"class_agnostic": False} if "class_agnostic" in parameters else {})}
    subsets: dict[str, None] = {}
    for purpose in ("train", "eval"):
        subset = _section(config, purpose).get("subset")
        if subset is None:
            raise ConfigError(f"config.{purpose} lacks subset: name the videos to prepare.")
        subsets |= dict.fromkeys([subset] if isinstance(subset, str) else subset)
    datasets = {subset: build(factory, options, path="config.data", subset=subset) for subset in subsets}
    for dataset in datasets.values():
        if dataset.video_sources:
            raise ConfigError(f"config.data.name = {name!r} is prepared already: copy its directory.")
        if not dataset.video_paths:
            raise ConfigError("config.data.videos is None: name the folder of the videos.")
    return name, datasets, view


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(config.get(name), Mapping):
        raise ConfigError(f"config lacks the section {name}: add it to the config file.")
    return config[name]


def _look_at_all(datasets: Mapping[str, Dataset], workers: int) -> tuple[dict[Path, VideoInfo | None], dict[str, str]]:
    """Return what every file says, and why some cannot be read, by video id."""
    files = {path: name for dataset in datasets.values() for name, path in dataset.video_paths.items()}
    infos: dict[Path, VideoInfo | None] = {}
    failures: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool, WorkProgress(len(files), "look at files", "video") as progress:
        for path, found in zip(files, pool.map(_look, files), strict=True):
            infos[path] = found if isinstance(found, VideoInfo) else None
            if isinstance(found, str):
                failures[files[path]] = found
                logger.warning("video %r cannot be read: %s", files[path], found)
            progress.advance()
    return infos, failures


def _look(path: Path) -> VideoInfo | str:
    try:
        return probe(path)
    except (DataError, OSError) as error:
        return printable(str(error))


def _is_there(folder: Path, metadata: Mapping[str, Any]) -> bool:
    """Tell whether the data set is written.

    Raises:
        ConfigError: another one is.
    """
    if not (folder / VERSION / "dataset_info.json").is_file():
        return False
    if difference := _difference(_json(folder / VERSION / "metadata.json"), metadata):
        raise ConfigError(
            f"{folder.parent} holds another data set, or files have changed since: {difference}. Name another "
            "directory, or delete it."
        )
    return True


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _difference(there: Any, wanted: Mapping[str, Any]) -> str:
    """Return in words what metadata disagree on first, or nothing."""
    wanted = json.loads(json.dumps(wanted))  # as JSON has it
    if there == wanted:
        return ""
    if not isinstance(there, dict) or there.get("format") != wanted["format"] or "subsets" not in there:
        return "it is not of this form"
    for key in ("source", "classes"):
        if there[key] != wanted[key]:
            return f"its {key} is {there[key]!r:.60}, not {wanted[key]!r:.60}"
    if list(there["subsets"]) != list(wanted["subsets"]):
        return f"its subsets are {', '.join(there['subsets'])}, not {', '.join(wanted['subsets'])}"
    for name, subset in wanted["subsets"].items():
        known = {video["video_id"]: video for video in there["subsets"][name]["videos"]}
        for video in subset["videos"]:
            if known.get(video["video_id"]) != video:
                return f"video {video['video_id']!r} of {name} differs"
    return "there are other videos, or other ground truth"


def _claim(metadata: Mapping[str, Any], jobs: Mapping[str, Sequence[Job]], shard_bytes: int) -> str:
    """Return what the shards of an unfinished run depend on."""
    changed = [job.changed_ns for several in jobs.values() for job in several]
    return json.dumps({"shard_bytes": shard_bytes, "changed": changed, "metadata": metadata})


@contextlib.contextmanager
def _claimed(folder: Path, mine: str) -> Iterator[Path]:
    """Yield the folder of the shards that earlier runs finished, kept from other runs, and remove it in the end.

    It is emptied if it was claimed for another content: its shards hold other videos.
    """
    unfinished = folder / UNFINISHED
    with claim(unfinished / _CLAIM, work="preparation", option="--out") as file:
        file.seek(0)
        if file.read() != mine.encode():
            for path in unfinished.iterdir():
                if path.name != _CLAIM:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            file.truncate(0)
            file.write(mine.encode())
            file.flush()
        for left in folder.glob("incomplete.*"):  # of a run that was killed
            shutil.rmtree(left)
        yield unfinished
        shutil.rmtree(unfinished)


def _write(
    folder: Path,
    unfinished: Path,
    metadata: Mapping[str, Any],
    jobs: Mapping[str, Sequence[Job]],
    beam_runner: str | None,
    beam_options: Sequence[str],
    shard_bytes: int,
) -> None:
    import tensorflow_datasets as tfds

    from re2tal_jax.data.tfds_builders.builder import PreparedVideos

    options = None
    if beam_runner is not None:
        from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]

        options = PipelineOptions(flags=[f"--{option}" for option in beam_options])
    splits = {content["split"]: jobs[subset] for subset, content in metadata["subsets"].items()}
    total = sum(job.size for several in jobs.values() for job in several)
    with WorkProgress(max(total // _MIB, 1), "write", "MiB") as progress:
        builder = PreparedVideos(
            splits=splits,
            metadata=metadata,
            unfinished=unfinished,
            advance=_MibCounter(progress) if beam_runner is None else None,
            shard_bytes=shard_bytes,
            data_dir=folder.parent,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # tfds would tell of a download
            builder.download_and_prepare(
                download_dir=unfinished / "downloads",
                download_config=tfds.download.DownloadConfig(
                    beam_runner=beam_runner, beam_options=options, try_download_gcs=False
                ),
            )
    for left in (folder / VERSION).glob("*.shard_infos.json"):  # by tfds, with Beam
        left.unlink()


class _MibCounter:
    """Adds bytes up, and tells the progress of every MiB."""

    def __init__(self, progress: WorkProgress):
        self._progress, self._bytes = progress, 0

    def __call__(self, count: int) -> None:
        before, self._bytes = self._bytes // _MIB, self._bytes + count
        self._progress.advance(self._bytes // _MIB - before)


# --- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare what the command line names; return 0, 1 if videos could not be read, 130 after Ctrl-C or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_all(rest)
        if options.workers < 1:
            raise ConfigError(f"--workers {options.workers} must be at least 1.")
        result = prepare(
            read_config(options.config, overrides),
            options.out,
            workers=options.workers,
            beam_runner=options.beam_runner,
            beam_options=[option for option in (options.beam_pipeline_options or "").split(",") if option],
        )
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
    """Return the result in words, with the section of a config that reads it."""
    lines = [
        f"{counted(result.videos, 'video')}, {result.size / _MIB:.0f} MiB, in {out}"
        f"{'' if result.written else ' (written before)'}; {len(result.failures)} cannot be read",
        *(f"  {name!r}: {reason}" for name, reason in result.failures.items()),
    ]
    options = "".join(f", {key}={value!r}" for key, value in result.view.items())
    return "\n".join([*lines, f"to read it: data=dict(name='prepared', root={str(out)!r}{options})"])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> Parser:
    parser = Parser(
        prog="python -m re2tal_jax.data.tfds_builders", allow_abbrev=False, description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="config of the data set")
    parser.add_argument("--out", metavar="DIR", required=True, help="directory that is made")
    parser.add_argument("--workers", metavar="N", type=int, default=_WORKERS, help="videos looked at at a time")
    parser.add_argument("--beam_runner", metavar="NAME", help="runner of Apache Beam that writes the shards")
    parser.add_argument("--beam_pipeline_options", metavar="A=1,B=2", help="its options")
    return parser


if __name__ == "__main__":
    sys.exit(main())
