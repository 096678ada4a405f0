"""From a PyTorch file to a folder of our parameters, and back; `__main__.py` is the command line of it."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert import torch_io
from checkpoints_convert.dialects import (
    DIALECTS,
    LOCALIZERS,
    OPENTAD_BACKBONE,
    OURS,
    backbone_of_detector,
    detector_rules,
)
from checkpoints_convert.dialects.dialect import Dialect
from checkpoints_convert.networks import BACKBONE, Network, as_overrides
from checkpoints_convert.report import Report
from checkpoints_convert.rules import Plan, Rules, Shape, plan, to_state_dict
from re2tal_jax.backbones import list_backbones
from re2tal_jax.errors import CheckpointError, ConfigError, did_you_mean
from re2tal_jax.training.checkpoint import load_config, load_params
from re2tal_jax.weights import holds_weights, load_about, save_weights, verify_weights

_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DataParallel and averaging, torch.compile, Lightning
_COUNTERS = ("n_averaged", "steps")  # what averaging wrappers keep beside; dialects ignore them


@dataclass(frozen=True)
class Spoken:
    """A dialect with the prefix that its keys have in a file, and the rules that follow."""

    dialect: Dialect
    prefix: str
    rules: Rules
    known: int = 0

    @property
    def name(self) -> str:
        """As the report tells it."""
        return f"{self.dialect.name} ({self.dialect.about})" + (f", keys begin {self.prefix}" if self.prefix else "")


@dataclass(frozen=True)
class Conversion:
    """A conversion that was planned and, if it is complete, can be written."""

    source: torch_io.Source
    state_dict: str
    tensors: Mapping[str, torch_io.Tensor]
    spoken: Spoken
    network: Network
    plan: Plan

    @property
    def report(self) -> Report:
        """What became of every key and parameter."""
        return self.plan.report

    def parameters(self) -> dict[str, np.ndarray]:
        """Return our parameters by path, those of a backbone alone without the prefix `backbone.`.

        Raises:
            CheckpointError: values that are no weights, such as NaN.
        """
        return dict(self._parameters)

    @functools.cached_property
    def _parameters(self) -> dict[str, np.ndarray]:
        read = self.plan.convert(lambda key: self.tensors[key].array())
        return read | self.network.initial_values(self.report.allowed.keys())

    def __str__(self) -> str:
        """Return what the command prints."""
        count = sum(int(np.prod(shape)) for shape in self.network.shapes.values())
        dialect, options = self.spoken.dialect, self.network.config["backbone"]
        lines = [
            f"source   {self.source.format}, SHA-256 {self.source.sha256}",
            f"         {len(self.tensors)} arrays in {self.state_dict or 'the file itself'}",
        ]
        if self.source.shard:
            lines.append(f"         {self.source.shard}")
        if self.source.placeholders:
            lines.append(f"         objects left as inert placeholders: {', '.join(self.source.placeholders)}")
        lines += [
            f"dialect  {self.spoken.name}",
            f"network  {self.network.name}, {count:,} parameters",
            *(_built_with(key, options[key], usual) for key, usual in dialect.options.items()),
            *([f"note     {dialect.note}"] if dialect.note else []),
            str(self.report),
        ]
        return "\n".join(lines)


def _built_with(key: str, value: Any, usual: Any) -> str:
    """Return the line of an option that the dialect sets where the user does not."""
    return f"         built with {key} = {value!r}" + ("" if value == usual else f"; such files have {usual!r}")


def plan_conversion(
    source: Path,
    network: Network,
    *,
    dialect: str | None = None,
    state_dict: str | None = None,
    allow_missing: str | None = None,
) -> Conversion:
    """Read a file and match its keys with a network, without reading arrays.

    Args:
        source: a PyTorch or safetensors file.
        network: what to convert it for.
        dialect: its dialect, where it is not to be recognised by its keys.
        state_dict: which of the file's state dicts, where the choice is not to be made here.
        allow_missing: regular expression of parameters (by path) that may stay as they are initialised.

    Raises:
        CheckpointError: no checkpoint, or one of another network.
        ConfigError: an unknown dialect, no regular expression, arguments that make no network.
    """
    allowed = _compiled(allow_missing)
    file = torch_io.read(source)
    chosen, tensors = torch_io.choose_state_dict(file.tree, state_dict)
    tensors = _unwrapped(tensors)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    spoken = recognise(shapes, network, dialect)
    network = network.with_options(spoken.dialect.options)
    spoken = replace(spoken, rules=spoken.rules.for_network(network.backbone))
    found = plan(shapes, spoken.rules, network.shapes, from_images=spoken.dialect.inflate)
    report = found.report
    inside = BACKBONE if network.whole else ""
    for path in list(report.unfilled):
        reason = spoken.dialect.computed.get(path.removeprefix(inside)) or _ours(path)
        if reason is None and allowed is not None and allowed.search(path):
            reason = f"initialised anew, --allow-missing {allowed.pattern}"
        if reason is not None:
            del report.unfilled[path]
            report.allowed[path] = reason
    for key in report.mapped:
        if (dtype := tensors[key].dtype).startswith("complex"):
            raise CheckpointError(f"{key} is of {dtype}: allowed are real numbers, which weights are.")
        if dtype != "float32":
            report.cast[dtype] = report.cast.get(dtype, 0) + 1
    return Conversion(file, chosen, tensors, spoken, network, found)


def recognise(shapes: Mapping[str, Shape], network: Network, name: str | None = None) -> Spoken:
    """Return the dialect that knows most keys of a file, among those of the network.

    Where several know as many (a network for images and its form for video), shapes decide.

    Args:
        shapes: PyTorch's shape of every key.
        network: what the file is to be converted for.
        name: the dialect, where the user names it.

    Raises:
        ConfigError: an unknown dialect.
        CheckpointError: the keys are those of another network, or of none that is known.
    """
    own = dialects_of(network)
    if name is not None:
        if name not in own:
            raise ConfigError(f"Unknown dialect {name!r} for {network.backbone_name}. {did_you_mean(name, own)}")
        own = {name: own[name]}
    spoken = [_best_prefix(shapes, dialect, whole=network.whole) for dialect in own.values()]
    most = max(found.known for found in spoken)
    others = [_best_prefix(shapes, d, whole=False) for d in DIALECTS] if name is None else spoken
    other = max(others, key=lambda found: found.known)
    if most == 0 or other.known > 2 * most:
        raise CheckpointError(_wrong_network(shapes, network, most, other))
    best = [found for found in spoken if found.known == most]
    return best[0] if len(best) == 1 else min(best, key=lambda found: _misfits(found, shapes, network))


def _misfits(spoken: Spoken, shapes: Mapping[str, Shape], network: Network) -> int:
    network = network.with_options(spoken.dialect.options)
    rules = spoken.rules.for_network(network.backbone)
    report = plan(shapes, rules, network.shapes, from_images=spoken.dialect.inflate).report
    return len(report.unmapped) + len(report.wrong_shape) + len(report.unfilled)


def dialects_of(network: Network) -> dict[str, Dialect]:
    """Return the dialects of a network's backbone, by name."""
    return {d.name: d for d in DIALECTS if network.backbone_name.startswith(d.family)}


def _best_prefix(keys: Any, dialect: Dialect, *, whole: bool) -> Spoken:
    """Return the dialect with the prefix under which it knows most keys of a backbone; a localizer's tell nothing."""
    if whole:
        candidates = [Spoken(dialect, "", detector_rules(dialect))]
    else:
        candidates = [Spoken(dialect, prefix, dialect.inside(prefix)) for prefix in dialect.prefixes]
        candidates.append(Spoken(dialect, OPENTAD_BACKBONE, backbone_of_detector(dialect)))
    backbone = BACKBONE if whole else ""
    counted = [
        replace(s, known=sum(any(t.path.startswith(backbone) for t in s.rules.targets_of(key)) for key in keys))
        for s in candidates
    ]
    return max(counted, key=lambda s: s.known)


def _wrong_network(keys: Any, network: Network, known: int, other: Spoken) -> str:
    first = ", ".join(list(keys)[:3])
    whose = f"the backbone of {network.name}, {network.backbone_name}" if network.whole else network.name
    text = f"{known} of {len(keys)} keys (such as {first}) are known as those of {whose}."
    if other.known == 0:
        return f"{text} No network that is known has such keys."
    names = [name for name in list_backbones() if name.startswith(other.dialect.family)]
    return (
        f"{text} {other.known} of them are those of {other.dialect.family}: {other.dialect.about}. "
        f"Networks of this kind: {', '.join(names)}."
    )


def what_would_fit(conversion: Conversion) -> str:
    """Return a sentence that tells which network the file of an incomplete conversion is of."""
    report = conversion.report
    paths = [*(path for _, _, path in report.wrong_shape.values()), *report.unfilled]
    in_backbone = [path for path in paths if path.startswith(BACKBONE)]
    in_backbone += [key for key in report.unmapped if key.startswith(OPENTAD_BACKBONE)]
    if conversion.network.whole and not in_backbone:
        return "Its backbone fits, its localizer is another: set --config.localizer.KEY=VALUE to its sizes and parts."
    fitting = networks_that_fit(conversion)
    whose = "Its backbone" if conversion.network.whole else "The file"
    return f"{whose} fits --model {' or '.join(fitting)}." if fitting else f"{whose} fits no published network."


def networks_that_fit(conversion: Conversion) -> list[str]:
    """Return the registered networks of the same kind that the file fills completely, with the options they need.

    They are as published, or have what the file's own shapes tell (`Dialect.sizes`).
    """
    dialect, shapes = conversion.spoken.dialect, {key: tensor.shape for key, tensor in conversion.tensors.items()}
    rules = _best_prefix(shapes, dialect, whole=False).rules
    told = dialect.sizes({t.path: shape for key, shape in shapes.items() for t in rules.targets_of(key)})
    fitting = []
    for name in (name for name in list_backbones() if name.startswith(dialect.family)):
        for options in ({}, told) if told else ({},):
            network = Network(name, {"backbone": {"name": name, **dialect.options, **options}}, whole=False)
            known = rules.for_network(network.backbone)
            report = plan(shapes, known, network.shapes, from_images=dialect.inflate).report
            if not (report.unmapped or report.wrong_shape or report.unfilled.keys() - dialect.computed.keys()):
                fitting.append(" ".join([name, *as_overrides(options)]))
                break
    return fitting


def write(conversion: Conversion, out: Path, *, overwrite: bool = False) -> str:
    """Write a complete conversion as a folder and return the SHA-256 of its parameters.

    Raises:
        CheckpointError: it is not complete, its values are no weights, or the folder cannot be written.
    """
    if not conversion.report.complete:
        raise CheckpointError("The conversion is not complete; nothing was written.")
    params = conversion.parameters()
    if not conversion.network.whole:
        params = {BACKBONE + path: value for path, value in params.items()}
    about = {
        "config": conversion.network.resolved(),
        "whole": conversion.network.whole,
        "source": {
            "file": conversion.source.path.name,
            "sha256": conversion.source.sha256,
            "state_dict": conversion.state_dict,
            "dialect": conversion.spoken.dialect.name,
            "placeholders": list(conversion.source.placeholders),
        },
        "report": conversion.report.to_json(),
    }
    return save_weights(out, params, about, report=f"{conversion}\n", overwrite=overwrite)


def load_converted(directory: Path, network: Network | None = None) -> tuple[Network, dict[str, np.ndarray]]:
    """Return the network of a folder of ours (converted, or a run's workdir) and its parameters by path.

    Args:
        directory: a folder of converted parameters, or a run's.
        network: what to take of it, a backbone or a detector; None: all that it holds.

    Raises:
        CheckpointError: no such folder, a damaged one, or its parameters are not those of the network.
    """
    if holds_weights(directory):
        verify_weights(directory)
    if network is None:
        network = _network_of(directory)
    params = load_params(directory)
    if not network.whole:
        params = {path.removeprefix(BACKBONE): value for path, value in params.items() if path.startswith(BACKBONE)}
    given = {path: tuple(value.shape) for path, value in params.items()}
    if given != network.shapes:
        odd = sorted(path for path, _ in given.items() ^ network.shapes.items())
        raise CheckpointError(
            f"{directory} does not hold the parameters of {network.name}: {len(set(odd))} differ, such as {odd[0]} "
            f"({given.get(odd[0], 'absent')} there, {network.shapes.get(odd[0], 'absent')} in the network)."
        )
    return network, params


def _network_of(directory: Path) -> Network:
    if holds_weights(directory):
        about = load_about(directory)
        config, whole = about["config"], about["whole"]
    else:
        config, whole = load_config(directory), True
    return Network(config["backbone"]["name"] + (" detector" if whole else ""), config, whole)


def export(network: Network, params: Mapping[str, np.ndarray], dialect: str) -> dict[str, np.ndarray]:
    """Return the state dict of a dialect: parameters, and what a strict load wants beside them.

    What only we have (`dialects.OURS`, tables that the dialect computes) is left out. Hugging Face's names are those of
    its files, for `from_pretrained`; from version 5 on transformers has others in memory.

    Raises:
        ConfigError: a dialect that the network has not, or that has no way back.
    """
    known = {name: d for name, d in dialects_of(network).items() if not d.inflate}
    if dialect not in known:
        raise ConfigError(f"No dialect {dialect!r} to write {network.name} in. {did_you_mean(dialect, known)}")
    found = known[dialect]
    inside = BACKBONE if network.whole else ""
    left_out = {path for path in params if path.removeprefix(inside) in found.computed or _ours(path)}
    params = {path: value for path, value in params.items() if path not in left_out}
    rules = detector_rules(found) if network.whole else found.inside(found.prefixes[0])
    result = to_state_dict(params, rules.for_network(network.backbone))
    constants = dict(found.constants(network.backbone, result.keys()))
    if network.whole:
        name = network.config["localizer"]["name"]
        localizer = next(d for d in LOCALIZERS if name.startswith(d.family))
        constants |= localizer.constants(network.abstract.localizer, result.keys())
    return result | constants


def _ours(path: str) -> str | None:
    """Return why a parameter of a detector has no name in PyTorch, or None."""
    return next((reason for prefix, reason in OURS.items() if path.startswith(prefix)), None)


def _unwrapped(tensors: Mapping[str, torch_io.Tensor]) -> dict[str, torch_io.Tensor]:
    """Return the arrays without what wrappers of a whole network put before every key but their own counters."""
    result = dict(tensors)
    while wrapped := [key for key in result if key not in _COUNTERS]:
        prefix = next((w for w in _WRAPPERS if all(key.startswith(w) for key in wrapped)), None)
        if prefix is None:
            break
        result = {key.removeprefix(prefix): value for key, value in result.items()}
    return result


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--allow-missing {pattern!r} is no regular expression: {error}.") from None
