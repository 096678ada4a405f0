"""Look at a data set before training: python -m re2tal_jax.data.check --config FILE [--config.section.key=VALUE …]

Reads what the config reads, annotation and video files, and prints what is wrong with them, by severity, with a way
out of each; counts and a histogram of lengths before that. Exits with 1 if there are errors. Nothing is compiled, and
of the config only the sections `data`, `train` and `eval` and the numbers of snippets and classes count.

    --json FILE    also write the report as JSON
    --workers N    files that are opened at a time (default: the number of cores)
"""

import inspect
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from re2tal_jax.command import Parser, read_config, split_overrides
from re2tal_jax.config import build
from re2tal_jax.data import DATASETS
from re2tal_jax.data.check_annotations import Subset, annotation_problems
from re2tal_jax.data.check_videos import Look, look_at_all, video_problems
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.problems import Problem, as_json, as_text, problem
from re2tal_jax.data.sampling import POLICIES
from re2tal_jax.data.video_folder import VideoFolder, printable
from re2tal_jax.errors import ConfigError, DataError, Re2TalError

_BAR = 40
_CLASSES_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a check found: the subsets that could be opened (none or two) and the problems."""

    subsets: tuple[Subset, ...]
    problems: tuple[Problem, ...]

    @property
    def failed(self) -> bool:
        """Whether there are errors."""
        return any(found.severity == "error" for found in self.problems)

    def __str__(self) -> str:
        tables = [_table(self.subsets), _class_table(self.subsets), histogram(self.subsets)] if self.subsets else []
        return "\n\n".join([*tables, as_text(self.problems)])

    def as_json(self) -> dict[str, Any]:
        """Return the report as what JSON can hold."""
        return {"subsets": [_counts(subset) for subset in self.subsets], "problems": as_json(self.problems)}


def check(config: Mapping[str, Any], *, workers: int) -> Report:
    """Check the data set of a config; `workers` files are opened at a time.

    Raises:
        ConfigError: the config lacks one of the sections that count, or names what there is not.
    """
    section = dict(_section(config, "data"))
    factory = DATASETS[str(section.pop("name", None))]
    splits = {name: _section(config, name) for name in ("train", "eval")}
    policies = {
        name: build(
            POLICIES[str(_section(split, "policy", f"config.{name}").get("name"))],
            {key: value for key, value in split["policy"].items() if key != "name"},
            path=f"config.{name}.policy",
            num_snippets=_value(config, "num_snippets"),
            frames_per_snippet=_value(config, "frames_per_snippet"),
        )
        for name, split in splits.items()
    }
    problems: list[Problem] = []
    folder = _video_folder(section, problems)
    datasets: dict[str, Dataset] = {}
    for name, split in splits.items():
        try:
            datasets[name] = _open(factory, section, _value(split, "subset", f"config.{name}"))
        except DataError as error:
            if str(error) not in [found.message for found in problems]:
                problems += problem("error", "cannot_open", [], str(error), count=1)
    if len(datasets) < len(splits):
        return Report(subsets=(), problems=tuple(problems))
    paths = list(dict.fromkeys(path for dataset in datasets.values() for path in dataset.video_paths.values()))
    if folder is None and paths:  # a data set that knows itself where its videos are
        folder = VideoFolder(paths[0].parent)
    looks = dict(zip(paths, look_at_all(paths, workers), strict=True))
    subsets = tuple(
        Subset(
            section=name,
            name=", ".join(_names(splits[name]["subset"])),
            dataset=dataset,
            policy=policies[name],
            rates=_rates(dataset, looks),
        )
        for name, dataset in datasets.items()
    )
    problems += _class_count(config, section, datasets["train"])
    problems += annotation_problems(subsets, min_length_ratio=float(section.get("min_length_ratio", 0.0)))
    if folder is None:
        problems += _not_looked_at(subsets, section)
    else:
        problems += video_problems(
            subsets,
            looks,
            folder,
            missing_severe=section.get("missing_videos", "error") == "error",
            unreadable_severe=any(
                _section(split, "loader", f"config.{name}").get("on_error", "error") == "error"
                for name, split in splits.items()
            ),
        )
    return Report(subsets=subsets, problems=tuple(problems))


def _section(holder: Mapping[str, Any], name: str, path: str = "config") -> Mapping[str, Any]:
    value = _value(holder, name, path)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}.{name} = {value!r:.80} must be a section.")
    return value


def _value(holder: Mapping[str, Any], name: str, path: str = "config") -> Any:
    if name not in holder:
        raise ConfigError(f"{path} lacks {name}: add it to the config file.")
    return holder[name]


def _names(subset: str | Sequence[str]) -> tuple[str, ...]:
    return (subset,) if isinstance(subset, str) else tuple(subset)


def _video_folder(section: dict[str, Any], problems: list[Problem]) -> VideoFolder | None:
    """Return the folder of videos, or None; one that does not exist is a problem, and taken out of the section."""
    if section.get("features") is not None or section.get("videos") is None:
        return None
    try:
        return VideoFolder(section["videos"])
    except DataError as error:
        problems += problem(
            "error",
            "no_video_folder",
            [],
            str(error),
            "Name the folder with --config.data.videos=DIR; --config.data.videos=None checks the annotation alone.",
            count=1,
        )
        section["videos"] = None
        return None


def _open(factory: Any, section: Mapping[str, Any], subset: Any) -> Dataset:
    """Open a subset with all that it has: missing videos and segments of every class, short ones too."""
    wishes = {"missing_videos": "skip", "class_agnostic": False, "unlabelled": True}
    parameters = inspect.signature(factory).parameters
    options = {**section, **{name: value for name, value in wishes.items() if name in parameters}}
    try:
        return build(factory, options, path="config.data", subset=subset)
    except DataError:
        if options.get("videos") is None:
            raise
        try:
            return build(factory, {**options, "videos": None}, path="config.data", subset=subset)
        except DataError:
            pass
        raise


def _rates(dataset: Dataset, looks: Mapping[Path, Look]) -> dict[str, float]:
    """Return the frame rate of each video, by the annotation or else its file."""
    rates = {record.video_id: record.fps for record in dataset.records if record.fps is not None}
    for record in dataset.records:
        look = looks.get(dataset.video_paths.get(record.video_id, Path()))
        if record.video_id not in rates and look is not None and look.info is not None:
            rates[record.video_id] = look.info.num_frames / record.duration_sec
    return rates


def _class_count(config: Mapping[str, Any], section: Mapping[str, Any], dataset: Dataset) -> Sequence[Problem]:
    count = 1 if section.get("class_agnostic") else len(dataset.classes)
    stated = _value(config, "num_classes")
    if stated == count:
        return ()
    message = f"config.num_classes = {stated!r}, but the data set has {count} classes."
    return list(problem("error", "num_classes", [], message, f"Set config.num_classes={count}.", count=1))


def _not_looked_at(subsets: Sequence[Subset], section: Mapping[str, Any]) -> list[Problem]:
    if section.get("features") is not None:
        lacking = sum(subset.dataset.findings["features_missing"] for subset in subsets)
        message = f"{lacking} videos have no features."
        severe = section.get("missing_videos", "error") == "error"
        missing = problem("error" if severe else "warning", "features_missing", [], message, count=lacking)
        what = "Features stand in the place of the videos: no video file was looked at."
        return [*missing, *problem("note", "videos_not_checked", [], what, count=1)]
    what = "No folder of videos: files were not looked at."
    return list(problem("note", "videos_not_checked", [], what, count=1))


# --- what is there ---------------------------------------------------------------------------------------------------


def _counts(subset: Subset) -> dict[str, Any]:
    lengths = [segment.end - segment.start for segment in subset.usable]
    return {
        "section": subset.section,
        "subset": subset.name,
        "videos": len(subset.videos),
        "files": len(subset.dataset.video_paths),
        "hours": round(sum(subset.duration_sec(name) for name in subset.videos) / 3600, 3),
        "segments": len(subset.segments),
        "classes": dict(sorted(Counter(segment.label for segment in subset.usable).items())),
        "median_length_sec": round(float(np.median(lengths)), 3) if lengths else None,
        "longest_sec": round(max(lengths), 3) if lengths else None,
    }


def _table(subsets: Sequence[Subset]) -> str:
    rows: list[tuple[str, ...]] = [
        ("", "subset", "videos", "files", "hours", "segments", "classes", "median", "longest")
    ]
    for subset in subsets:
        counts = _counts(subset)
        lengths = [counts["median_length_sec"], counts["longest_sec"]]
        rows.append(
            (
                counts["section"],
                printable(counts["subset"]),
                *(f"{counts[key]:,}" for key in ("videos", "files")),
                f"{counts['hours']:,.1f}",
                f"{counts['segments']:,}",
                f"{len(counts['classes']):,}",
                *("" if length is None else f"{length:,.1f} s" for length in lengths),
            )
        )
    return _aligned(rows, left=2)


def _class_table(subsets: Sequence[Subset]) -> str:
    """Return the classes with the fewest segments, how many they have in each subset."""
    counts = [Counter(segment.label for segment in subset.usable) for subset in subsets]
    classes = sorted(subsets[0].dataset.classes, key=lambda name: (counts[0][name], name))
    shown = classes[:_CLASSES_SHOWN]
    title = f"{len(classes)} classes" + (f", the {len(shown)} with fewest segments" if shown != classes else "")
    rows: list[tuple[str, ...]] = [(title, *(subset.section for subset in subsets))]
    rows += [(printable(name), *(f"{count[name]:,}" for count in counts)) for name in shown]
    return _aligned(rows, left=1)


def _aligned(rows: Sequence[Sequence[str]], *, left: int) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def histogram(subsets: Sequence[Subset]) -> str:
    """Return the lengths of segments as a text, one line for each doubling, the subsets side by side."""
    lengths = [[segment.end - segment.start for segment in subset.usable] for subset in subsets]
    if not any(lengths):
        return "no segments"
    bins = [Counter(math.floor(math.log2(max(length, 2**-5))) for length in part) for part in lengths]
    low, high = min(min(part) for part in bins if part), max(max(part) for part in bins if part)
    most = max(max(part.values()) for part in bins if part)
    rows: list[tuple[str, ...]] = [("length of segments", *(subset.section for subset in subsets), "")]
    for exponent in range(low, high + 1):
        count = bins[0][exponent]
        bar = "#" * math.ceil(_BAR * count / most)
        span = f"{2.0**exponent:g} to {2.0 ** (exponent + 1):g} s" if exponent > -5 else f"below {2.0**-4:g} s"
        rows.append((span, *(f"{part[exponent]:,}" for part in bins), bar))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join(
            [row[0].rjust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)), row[-1]]
        ).rstrip()
        for row in rows
    )


# --- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the command line names and return the exit code: 0 without errors, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("re2tal_jax.progress").setLevel(logging.INFO)
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
