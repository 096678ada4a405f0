"""Parameter groups, frozen norms and learning-rate schedules of the published configs (`optim/*.json`)."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from re2tal_jax.training.optim import Duration, Rule, Schedule, assign_rules, recipe_rules
from tests.parity.replay import Row, compare

KEYS = {"optimizer", "scheduler", "groups", "schedule", "frozen_after_first_forward"}


def recognises(path: Path, content: object) -> bool:
    """A file that lists optimizer groups and a schedule, or a folder that holds one."""
    if content is None and path.is_dir():
        return any(_is_optim(json.loads(file.read_text())) for file in path.glob("*.json"))
    return _is_optim(content)


def replay(path: Path, content: object) -> Iterator[Row]:
    """Compare lr, weight decay and freezing of every parameter, and every listed rate of the schedule."""
    if content is not None:
        yield from _replay(path.stem, content)
        return
    for file in sorted(path.glob("*.json")):
        listed = json.loads(file.read_text())
        if _is_optim(listed):
            yield from _replay(file.stem, listed)


def _is_optim(content: object) -> bool:
    return isinstance(content, Mapping) and content.keys() >= KEYS


def our_path(name: str, shape: tuple[int, ...]) -> str:
    """Translate a torch name: `weight` is a kernel, or a norm's scale if it has one axis; the rest is the localizer."""
    stem, _, leaf = name.rpartition(".")
    if leaf == "weight":
        leaf = "kernel" if len(shape) > 1 else "scale"
    path = f"{stem}.{leaf}" if stem else leaf
    return path if path.startswith("backbone.") else f"localizer.{path}"


def config_rules(optimizer: Mapping[str, Any], has_backbone: bool, freezes_norms: bool) -> tuple[Rule, ...]:
    """Return the rules that a recipe file would hold for the reference's optimizer section."""
    backbone = optimizer.get("backbone", {}) if has_backbone else {}
    custom = tuple(
        Rule(
            name=c["name"], pattern=rf"^backbone\..*{re.escape(c['name'])}", lr=c["lr"], weight_decay=c["weight_decay"]
        )
        for c in backbone.get("custom", ())
    )
    rules = recipe_rules(
        backbone_lr=backbone.get("lr"),
        localizer_lr=optimizer["lr"],
        weight_decay=optimizer.get("weight_decay", 0.01),  # torch's default
        backbone_weight_decay=backbone.get("weight_decay"),
        freeze_backbone_norms=freezes_norms,
        decay_kernels_only=bool(optimizer.get("paramwise")),
    )
    return custom + rules


def config_schedule(scheduler: Mapping[str, Any]) -> Schedule:
    """Return our schedule for the reference's scheduler section; its durations are in epochs."""
    decay = "cosine" if "Cosine" in scheduler["type"] else "multistep"
    return Schedule(
        decay=decay,
        length=Duration(epochs=scheduler["max_epoch"]),
        warmup=Duration(epochs=scheduler.get("warmup_epoch", 0)),
        min_lr=scheduler.get("eta_min", 1e-8),
        milestones=tuple(Duration(epochs=m) for m in scheduler.get("milestones", ())),
        gamma=scheduler.get("gamma", 0.1),
    )


def _replay(config: str, listed: Mapping[str, Any]) -> Iterator[Row]:
    names = {our_path(name, tuple(shape)): name for name, shape, *_ in listed["groups"]}
    shapes = {our_path(name, tuple(shape)): tuple(shape) for name, shape, *_ in listed["groups"]}
    frozen = set(listed["frozen_after_first_forward"])
    has_backbone = any(path.startswith("backbone.") for path in shapes)
    rules = config_rules(listed["optimizer"], has_backbone, freezes_norms=bool(frozen))
    assignment = assign_rules(shapes, _used(rules, shapes))
    ours = [assignment[path] for path in names]
    yield compare(f"{config} number of distinct paths", len(names), len(listed["groups"]), 0)
    yield compare(f"{config} lr of every parameter", [r.lr for r in ours], [row[3] for row in listed["groups"]], 0)
    decays = [row[4] for row in listed["groups"]]
    yield compare(f"{config} weight decay of every parameter", [r.weight_decay for r in ours], decays, 0)
    ours_frozen = [assignment[path].frozen for path in names]
    yield compare(f"{config} frozen parameters", ours_frozen, [name in frozen for name in names.values()], 0)
    peaks = {row[2]: assignment[path].lr for path, row in zip(names, listed["groups"], strict=True)}
    peaks = np.asarray([peaks[group] for group in sorted(peaks)], np.float32)
    for steps_per_epoch, at, rates in _samples(listed["schedule"]):
        learning_rate = config_schedule(listed["scheduler"]).resolve(steps_per_epoch)
        got = np.asarray(learning_rate(np.asarray(at, np.int32)[:, None], peaks), np.float64)
        name = f"{config} schedule, {steps_per_epoch} steps an epoch, {len(at)} steps from {at[0]}"
        yield _compare_each(name, got, np.asarray(rates, np.float64), 1e-6)
        if at[0] == 0:
            yield compare(f"{config} first rate, {steps_per_epoch} steps an epoch", got[0] == 0, rates[0] == 0, 0)


def _used(rules: tuple[Rule, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    first = {path: next(r.name for r in rules if re.search(r.pattern, path)) for path in shapes}
    return tuple(rule for rule in rules if rule.name in first.values())


def _samples(schedule: Mapping[str, Any]) -> Iterator[tuple[int, list[int], np.ndarray]]:
    """Yield (steps per epoch, iterations, rates (iterations, groups)); `far<n>` holds single later iterations."""
    for key, rows in schedule.items():
        if not re.search(r"\d", key):
            yield from _samples({f"{key}{length}": row for length, row in rows.items()})
            continue
        steps_per_epoch = int(re.search(r"\d+", key)[0])
        if isinstance(rows, Mapping):
            pairs = [(int(at), rates) for at, rates in rows.items()]
        elif key.isdigit():
            pairs = list(enumerate(rows))
        else:
            pairs = [(int(row[0]), row[1] if isinstance(row[1], list) else row[1:]) for row in rows]
        yield steps_per_epoch, [at for at, _ in pairs], np.asarray([rates for _, rates in pairs], np.float64)


def _compare_each(name: str, got: np.ndarray, want: np.ndarray, tolerance: float) -> Row:
    """Return the largest relative error of single values; a wanted 0 must be 0."""
    if got.shape != want.shape:
        return Row(f"{name} {got.shape} != {want.shape}", np.inf, tolerance)
    error = np.where(want == 0, np.where(got == 0, 0.0, np.inf), np.abs(got - want) / np.maximum(np.abs(want), 1e-300))
    return Row(name, float(error.max(initial=0.0)), tolerance)
