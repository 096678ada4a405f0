"""The check itself: the subsets of a config are opened, files looked at, problems gathered."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from re2tal_jax.config import build
from re2tal_jax.data import DATASETS
from re2tal_jax.data.check.annotations import Subset, annotation_problems
from re2tal_jax.data.check.problems import Problem, problem
from re2tal_jax.data.check.report import Report
from re2tal_jax.data.check.videos import Look, look_at_all, video_problems
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.features.files import check_folder
from re2tal_jax.data.findings import counted
from re2tal_jax.data.sampling import POLICIES, Policy
from re2tal_jax.data.video_folder import VideoFolder
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.weights import holds_parameters


def check(config: Mapping[str, Any], *, workers: int) -> Report:
    """Check the data set of a config, and that the weights it starts from are there.

    `workers` files are opened at a time. Data that render themselves are rendered first.

    Raises:
        ConfigError: the config lacks one of the sections that count, or names what there is not.
    """
    section = dict(_section(config, "data"))
    factory = DATASETS[str(section.pop("name", None))]
    splits = {name: _section(config, name) for name in ("train", "eval")}
    policies = {name: _policy(config, split, f"config.{name}") for name, split in splits.items()}
    problems = list(_checkpoint(_section(config, "backbone")))
    problems += _feature_folders(section)
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


def _policy(config: Mapping[str, Any], split: Mapping[str, Any], path: str) -> Policy:
    section = _section(split, "policy", path)
    return build(
        POLICIES[str(section.get("name"))],
        {key: value for key, value in section.items() if key != "name"},
        path=f"{path}.policy",
        num_snippets=_value(config, "num_snippets"),
        frames_per_snippet=_value(config, "frames_per_snippet"),
    )


def _checkpoint(backbone: Mapping[str, Any]) -> Iterable[Problem]:
    """Yield that the folder of the backbone's weights is not there, or holds none; they are not read."""
    name = backbone.get("checkpoint")  # a backbone may be drawn at random
    if not isinstance(name, str):
        return
    folder = Path(name)
    if holds_parameters(folder):
        return
    what = "holds neither converted weights nor a run's checkpoints" if folder.is_dir() else "is no folder"
    yield from problem(
        "error",
        "no_checkpoint",
        [],
        f"config.backbone.checkpoint = {name!r} {what}.",
        "Convert a PyTorch file to it (python -m checkpoints_convert SOURCE --model NAME --out DIR), or name the "
        "folder that holds the weights; --config.backbone.checkpoint=None starts from random ones.",
        count=1,
    )


def _feature_folders(section: dict[str, Any]) -> list[Problem]:
    """Return that folders of features do not exist; features and videos are then taken out of the section."""
    features = section.get("features")
    folders = _names(features.get("folder") or ()) if isinstance(features, Mapping) else ()
    problems: list[Problem] = []
    for folder in folders:
        try:
            check_folder(folder)
        except DataError as error:
            problems += problem("error", "no_feature_folder", [], str(error), count=1)
    if problems:
        section |= {"features": None, "videos": None}
    return problems


def _open(factory: Any, section: Mapping[str, Any], subset: Any) -> Dataset:
    """Open a subset with all that it has: missing videos and segments of every class, short ones too.

    Where no video has a file, or features, the annotation is opened alone.
    """
    wishes = {"missing_videos": "skip", "class_agnostic": False, "unlabelled": True}
    parameters = inspect.signature(factory).parameters
    options = {**section, **{name: value for name, value in wishes.items() if name in parameters}}
    try:
        return build(factory, options, path="config.data", subset=subset)
    except DataError:
        alone = {name: None for name in ("videos", "features") if options.get(name) is not None}
        if not alone:
            raise
        with suppress(DataError):
            return build(factory, {**options, **alone}, path="config.data", subset=subset)
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
    has = counted(count, "class", "classes")
    message = f"config.num_classes = {stated!r}, but the data set has {has}."
    return list(problem("error", "num_classes", [], message, f"Set config.num_classes={count}.", count=1))


def _not_looked_at(subsets: Sequence[Subset], section: Mapping[str, Any]) -> list[Problem]:
    if section.get("features") is not None:
        lacking = list(dict.fromkeys(name for subset in subsets for name in _without_features(subset)))
        severe = section.get("missing_videos", "error") == "error"
        missing = problem(
            "error" if severe else "warning",
            "features_missing",
            lacking,
            f"{counted(len(lacking), 'video has', 'videos have')} no features.",
            "Extract them (--mode extract), or leave the videos out (config.data.missing_videos=skip)."
            if severe
            else "In the evaluation they count as missed.",
        )
        what = "Features stand in the place of the videos: no video file was looked at."
        return [*missing, *problem("note", "videos_not_checked", [], what, count=1)]
    what = "No folder of videos: files were not looked at."
    return list(problem("note", "videos_not_checked", [], what, count=1))


def _without_features(subset: Subset) -> list[str]:
    """Return the videos of a subset that the features lack."""
    features = subset.dataset.features
    return [name for name in subset.videos if features is None or name not in features.places]
