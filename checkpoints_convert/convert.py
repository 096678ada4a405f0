"""From a PyTorch file to a folder of our parameters, and back; `__main__.py` is the command line of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert import torch_io
from checkpoints_convert.dialects import DIALECTS, OPENTAD_BACKBONE, OURS, backbone_of_detector, detector_rules
from checkpoints_convert.dialects.dialect import Dialect
from checkpoints_convert.networks import BACKBONE, Network
from checkpoints_convert.report import Report
from checkpoints_convert.rules import Plan, Rules, Shape, plan, to_state_dict
from re2tal_jax.backbones import list_backbones
from re2tal_jax.errors import CheckpointError, ConfigError, did_you_mean
from re2tal_jax.training.checkpoint import load_config, load_params
from re2tal_jax.weights import check_writable, holds_weights, load_about, save_weights

_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


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
        """Return our parameters by path, those of a backbone alone without the prefix `backbone.`."""
        read = self.plan.convert(lambda key: self.tensors[key].array())
        return read | self.network.initial_values(self.report.allowed.keys())

    def __str__(self) -> str:
        """Return what the command prints."""
        count = sum(int(np.prod(shape)) for shape in self.network.shapes.values())
        lines = [
            f"source   {self.source.format}, SHA-256 {self.source.sha256}",
            f"         {len(self.tensors)} arrays in {self.state_dict or 'the file itself'}",
        ]
        if self.source.placeholders:
            lines.append(f"         objects left as inert placeholders: {', '.join(self.source.placeholders)}")
        lines += [
            f"dialect  {self.spoken.name}",
            f"network  {self.network.name}, {count:,} parameters",
            *(f"         built with {key} = {value!r}" for key, value in self.spoken.dialect.options.items()),
            str(self.report),
        ]
        return "\n".join(lines)


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
        if (dtype := tensors[key].dtype) != "float32":
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
    targets = network.with_options(spoken.dialect.options).shapes
    report = plan(shapes, spoken.rules, targets, from_images=spoken.dialect.inflate).report
    return len(report.unmapped) + len(report.wrong_shape) + len(report.unfilled)


def dialects_of(network: Network) -> dict[str, Dialect]:
    """Return the dialects of a network's backbone, by name."""
    return {d.name: d for d in DIALECTS if network.backbone_name.startswith(d.family)}


def _best_prefix(keys: Any, dialect: Dialect, *, whole: bool) -> Spoken:
    if whole:
        candidates = [Spoken(dialect, "", detector_rules(dialect))]
    else:
        candidates = [Spoken(dialect, prefix, dialect.inside(prefix)) for prefix in dialect.prefixes]
        candidates.append(Spoken(dialect, OPENTAD_BACKBONE, backbone_of_detector(dialect)))
    counted = [replace(s, known=sum(1 for key in keys if s.rules.targets_of(key))) for s in candidates]
    return max(counted, key=lambda s: s.known)


def _wrong_network(keys: Any, network: Network, known: int, other: Spoken) -> str:
    first = ", ".join(list(keys)[:3])
    text = f"{known} of {len(keys)} keys (such as {first}) are known as those of {network.name}."
    if other.known == 0:
        return f"{text} No network that is known has such keys."
    names = [name for name in list_backbones() if name.startswith(other.dialect.family)]
    return (
        f"{text} {other.known} of them are those of {other.dialect.family}: {other.dialect.about}. "
        f"Networks of this kind: {', '.join(names)}."
    )


def networks_that_fit(conversion: Conversion) -> list[str]:
    """Return the registered networks of the same kind, as published, that the file fills completely."""
    spoken, shapes = conversion.spoken, {key: tensor.shape for key, tensor in conversion.tensors.items()}
    fitting = []
    for name in (name for name in list_backbones() if name.startswith(spoken.dialect.family)):
        network = Network(name, {"backbone": {"name": name, **spoken.dialect.options}}, whole=False)
        rules = _best_prefix(shapes, spoken.dialect, whole=False).rules
        report = plan(shapes, rules, network.shapes, from_images=spoken.dialect.inflate).report
        if not (report.unmapped or report.wrong_shape or report.unfilled.keys() - spoken.dialect.computed.keys()):
            fitting.append(name)
    return fitting


def write(conversion: Conversion, out: Path, source: Path, *, overwrite: bool = False) -> str:
    """Write a complete conversion as a folder and return the SHA-256 of its parameters.

    Raises:
        CheckpointError: it is not complete, or the folder cannot be written.
    """
    if not conversion.report.complete:
        raise CheckpointError("The conversion is not complete; nothing was written.")
    check_writable(out, overwrite=overwrite)
    params = conversion.parameters()
    if not conversion.network.whole:
        params = {BACKBONE + path: value for path, value in params.items()}
    about = {
        "config": conversion.network.resolved(),
        "whole": conversion.network.whole,
        "source": {
            "file": source.name,
            "sha256": conversion.source.sha256,
            "state_dict": conversion.state_dict,
            "dialect": conversion.spoken.dialect.name,
            "placeholders": list(conversion.source.placeholders),
        },
        "report": conversion.report.to_json(),
    }
    return save_weights(out, params, about, files={"report.txt": f"{conversion}\n"}, overwrite=overwrite)


def load_converted(directory: Path, network: Network | None = None) -> tuple[Network, dict[str, np.ndarray]]:
    """Return the network of a folder of ours (converted, or a run's workdir) and its parameters by path.

    Args:
        directory: a folder of converted parameters, or a run's.
        network: what to take of it, a backbone or a detector; None: all that it holds.

    Raises:
        CheckpointError: no such folder, or its parameters are not those of the network.
    """
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
    """Return the state dict of a dialect that a strict load takes: parameters and what is constant beside them.

    What only we have (`dialects.OURS`, tables that the dialect computes) is left out.

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
    result = to_state_dict(params, rules)
    return result | dict(found.constants(network.backbone, result.keys()))


def _ours(path: str) -> str | None:
    """Return why a parameter of a detector has no name in PyTorch, or None."""
    return next((reason for prefix, reason in OURS.items() if path.startswith(prefix)), None)


def _unwrapped(tensors: Mapping[str, torch_io.Tensor]) -> dict[str, torch_io.Tensor]:
    """Return the arrays without what wrappers of a whole network put before every key."""
    result = dict(tensors)
    while result and (prefix := next((w for w in _WRAPPERS if all(key.startswith(w) for key in result)), None)):
        result = {key.removeprefix(prefix): value for key, value in result.items()}
    return result


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--allow-missing {pattern!r} is no regular expression: {error}.") from None
