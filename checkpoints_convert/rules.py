"""Name rules: which parameter of ours a PyTorch key becomes, how its layout changes, and the way back.

A `Rule` names the same module on both sides; `{i}` stands for a number, `{n+}` for one from 1 on, and the kind says how
the module's arrays are called and laid out:

    linear, conv    weight (out, in, *window)                    kernel (*window, in, out)
                    bias                                         bias
    norm            weight, bias                                 scale, bias
    batch_norm      weight, bias, running_mean, running_var      scale, bias, mean, var
    array           the key itself, as it is
    matrix          the key itself, (out, in)                    (in, out)
    channels        the key itself, (1, C, 1)                    (C,)
    table           the key itself, (1, N, C)                    (N, C)

Rules are data that are read in both directions. Where PyTorch keeps three arrays and we one, `ours` ends in `[0/3]`:
the first third of the last axis.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints_convert.report import Report
from re2tal_jax.errors import CheckpointError

Shape = tuple[int, ...]
M = TypeVar("M", bound=nnx.Module)


class Layout(NamedTuple):
    """How an array of PyTorch becomes ours, and back; both work on views."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda value: value, lambda value: value)
KERNEL = Layout(
    lambda value: np.moveaxis(value, (0, 1), (-1, -2)) if value.ndim >= 2 else value,
    lambda value: np.moveaxis(value, (-1, -2), (0, 1)),
)
TABLE = Layout(
    lambda value: value[0] if value.ndim == 3 and value.shape[0] == 1 else value,
    lambda value: value[None],
)
CHANNELS = Layout(
    lambda value: value[0, :, 0] if value.ndim == 3 and value.shape[::2] == (1, 1) else value,
    lambda value: value[None, :, None],
)

# kind -> (PyTorch's leaf, ours, layout) of each array of such a module
KINDS: Mapping[str, tuple[tuple[str, str, Layout], ...]] = {
    "linear": ((".weight", ".kernel", KERNEL), (".bias", ".bias", SAME)),
    "conv": ((".weight", ".kernel", KERNEL), (".bias", ".bias", SAME)),
    "norm": ((".weight", ".scale", SAME), (".bias", ".bias", SAME)),
    "batch_norm": (
        (".weight", ".scale", SAME),
        (".bias", ".bias", SAME),
        (".running_mean", ".mean", SAME),
        (".running_var", ".var", SAME),
    ),
    "array": (("", "", SAME),),
    "matrix": (("", "", KERNEL),),
    "channels": (("", "", CHANNELS),),
    "table": (("", "", TABLE),),
}


@dataclass(frozen=True)
class Rule:
    """One module under its PyTorch name and ours.

    Args:
        torch: template of the name in PyTorch.
        ours: template of our path, with the same holes, perhaps with a part such as `[0/3]` at its end.
        kind: one of `KINDS`.
        optional: for a module that our network can be built without: why it is not needed then.
        when: an attribute of our network and the value that it must have for the rule to hold.
        read_only: another name that is read, but not the one that is written.
        outside: it does not stand within the network, but beside it, whatever prefix that has.
    """

    torch: str
    ours: str
    kind: str = "array"
    optional: str = ""
    when: tuple[str, Any] | None = None
    read_only: bool = False
    outside: bool = False

    def prefixed(self, torch: str = "", ours: str = "") -> "Rule":
        """Return the rule of the same module inside another."""
        return replace(self, torch=self.torch if self.outside else torch + self.torch, ours=ours + self.ours)


@dataclass(frozen=True)
class Ignored:
    """Keys that become no parameter: a regular expression of the whole key, and the reason."""

    pattern: str
    reason: str


class Target(NamedTuple):
    """Where an array of PyTorch goes: all of `path`, or the part numbered part[0] of part[1] of its last axis."""

    path: str
    part: tuple[int, int]
    layout: Layout
    optional: str = ""


@dataclass(frozen=True)
class Rules:
    """The rules of one dialect, and what it ignores; read in both directions."""

    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = ()

    def targets_of(self, key: str) -> list[Target]:
        """Return where a key goes, by every rule that knows it."""
        found = []
        for head, tail, pattern, target in self._by_key:
            if key.startswith(head) and key.endswith(tail) and (match := pattern.fullmatch(key)) is not None:
                found.append(target._replace(path=_expand(target.path, match)))
        return found

    @functools.cached_property
    def _by_key(self) -> list[tuple[str, str, re.Pattern[str], Target]]:
        """How keys begin and end, their pattern, and where they go, for every rule; most keys fit none."""
        rows = []
        for rule in self.rules:
            module, part = _split_part(rule.ours)
            for theirs, ours, layout in KINDS[rule.kind]:
                template = rule.torch + theirs
                pieces = _HOLE.split(template)
                target = Target(module + ours, part, layout, rule.optional)
                rows.append((pieces[0], pieces[-1], _pattern(template), target))
        return rows

    def keys_of(self, path: str) -> list[tuple[str, tuple[int, int], Layout]]:
        """Return the PyTorch keys that make up a parameter of ours, in the order of their parts."""
        found: dict[int, tuple[str, tuple[int, int], Layout]] = {}
        for rule in self.rules:
            module, part = _split_part(rule.ours)
            for theirs, ours, layout in () if rule.read_only else KINDS[rule.kind]:
                match = _pattern(module + ours).fullmatch(path)
                if match is not None and part[0] not in found:  # an earlier rule is the canonical name
                    found[part[0]] = (_expand(rule.torch + theirs, match), part, layout)
        return [found[index] for index in sorted(found)]

    def for_network(self, network: Any) -> "Rules":
        """Return the rules that hold for a network as it is built; keys of the others are ignored."""
        others = [r for r in self.rules if r.when is not None and getattr(network, r.when[0], None) != r.when[1]]
        not_needed = (
            Ignored(_pattern(r.torch + leaf).pattern, r.optional) for r in others for leaf, _, _ in KINDS[r.kind]
        )
        return Rules(tuple(rule for rule in self.rules if rule not in others), (*self.ignored, *not_needed))

    def reason_to_ignore(self, key: str) -> str | None:
        """Return why a key becomes no parameter, or None."""
        return next((rule.reason for rule in self.ignored if re.fullmatch(rule.pattern, key)), None)


@dataclass
class Plan:
    """What becomes of every key of a state dict, decided from names and shapes alone."""

    report: Report
    targets: dict[str, Target] = field(default_factory=dict)
    inflated: dict[str, Shape] = field(default_factory=dict)

    def convert(self, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        """Return our parameters by path, in float32; `read` gives the array of a key.

        Raises:
            CheckpointError: values that are no weights: NaN, infinite, complex, or too large for float32.
        """
        parts: dict[str, dict[int, np.ndarray]] = {}
        wrong: dict[str, str] = {}
        for key, target in self.targets.items():
            value, fault = _as_float32(read(key))
            if fault:
                wrong[key] = fault
                continue
            if key in self.inflated:
                value = inflate(value, self.inflated[key])
            value = target.layout.to_ours(value)
            parts.setdefault(target.path, {})[target.part[0]] = value
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            told = "; ".join(f"{key} {fault}" for key, fault in list(wrong.items())[:5])
            raise CheckpointError(f"Allowed are finite real numbers, but {told}{more}. The source itself is spoilt.")
        return {path: _join([found[i] for i in sorted(found)]) for path, found in sorted(parts.items())}


def _as_float32(value: np.ndarray) -> tuple[np.ndarray, str]:
    """Return an array in float32, and what is wrong with it, if anything."""
    value = np.asarray(value)
    if np.iscomplexobj(value):
        return value, f"is of {value.dtype}"
    with np.errstate(over="ignore"):  # what overflows is told below
        cast = value.astype(np.float32, copy=False)
    odd = cast.size - np.count_nonzero(np.isfinite(cast))
    cause = "" if value.dtype == np.float32 else f" (cast from {value.dtype})"
    return cast, f"has {odd} of {cast.size} values that are NaN or infinite{cause}" if odd else ""


def can_inflate(shape: Shape, video: Shape) -> bool:
    """Tell whether an array of a network for images can be spread over time to the shape of one for video.

    A kernel (O, I, h, w) lacks the axis of time of (O, I, t, h, w); a table of relative positions has one of the
    2t - 1 equal parts.
    """
    if len(shape) == 4:
        return len(video) == 5 and (*video[:2], *video[3:]) == shape
    return len(shape) == len(video) == 2 and shape[1] == video[1] and video[0] % shape[0] == 0


def inflate(value: np.ndarray, video: Shape) -> np.ndarray:
    """Spread an array over time so that a video of equal frames gives what the image gave (I3D, arXiv 1705.07750)."""
    if value.ndim == 4:
        return np.repeat(value[:, :, None] / video[2], video[2], axis=2)
    return np.tile(value, (video[0] // value.shape[0], 1))


def plan(shapes: Mapping[str, Shape], rules: Rules, targets: Mapping[str, Shape], *, from_images: bool = False) -> Plan:
    """Match every key with a parameter.

    Args:
        shapes: PyTorch's shape of every key.
        rules: those of the file's dialect.
        targets: shape of every parameter to fill, by path.
        from_images: arrays of a network for images may be inflated where they do not fit.
    """
    result = Plan(Report())
    report, filled = result.report, {}
    for key, shape in shapes.items():
        found = rules.targets_of(key)
        present = [target for target in found if target.path in targets]
        if len(present) == 1:
            _assign(result, filled, key, shape, present[0], targets, from_images=from_images)
        elif len(present) > 1:
            report.unmapped[key] = f"{len(present)} rules match: {', '.join(t.path for t in present)}"
        elif (reason := rules.reason_to_ignore(key)) is not None:
            report.ignored[key] = reason
        elif found and all(target.optional for target in found):
            report.ignored[key] = found[0].optional
        else:
            wanted = found[0].path if found else key
            free = [path for path in targets if path not in filled] or targets
            close = difflib.get_close_matches(wanted, free, n=1, cutoff=0.0)
            why = f"the network has no parameter {wanted}" if found else "no rule matches"
            report.unmapped[key] = why + (f"; nearest: {close[0]}" if close else "")
    for path, shape in targets.items():
        parts = filled.get(path, {})
        wanted = next(iter(parts.values()))[1] if parts else 1
        if len(parts) < wanted or not parts:
            report.unfilled[path] = tuple(shape)
    return result


def _assign(
    result: Plan,
    filled: dict[str, Any],
    key: str,
    shape: Shape,
    target: Target,
    targets: Mapping[str, Shape],
    *,
    from_images: bool,
) -> None:
    """Enter that a key fills its target, or what stands against it."""
    index, count = target.part
    parts, report = filled.setdefault(target.path, {}), result.report
    if index in parts:
        report.unmapped[key] = f"{target.path} is filled by {parts[index][0]} already"
        return
    parts[index] = (key, count)
    wanted = tuple(targets[target.path])
    wanted = (*wanted[:-1], wanted[-1] // count) if count > 1 else wanted
    needed = tuple(target.layout.to_torch(np.broadcast_to(np.float32(0), wanted)).shape)
    if target.layout.to_ours(np.broadcast_to(np.float32(0), shape)).shape != wanted:
        if not (from_images and can_inflate(tuple(shape), needed)):
            report.wrong_shape[key] = (tuple(shape), needed, target.path)
            return
        result.inflated[key] = needed
        report.inflated[key] = (tuple(shape), needed)
    result.targets[key] = target
    report.mapped[key] = target.path if count == 1 else f"{target.path}[{index}/{count}]"


def to_state_dict(params: Mapping[str, Any], rules: Rules) -> dict[str, np.ndarray]:
    """Return parameters (or gradients, or what else is laid out so) under PyTorch's keys, in its layouts.

    Raises:
        CheckpointError: a parameter that the dialect has no name for.
    """
    result: dict[str, np.ndarray] = {}
    nameless = []
    for path, value in params.items():
        keys = rules.keys_of(path)
        if not keys:
            nameless.append(path)
        for key, (index, count), layout in keys:
            value = np.asarray(value)
            piece = value if count == 1 else np.split(value, count, axis=-1)[index]
            result[key] = layout.to_torch(piece)
    if nameless:
        raise CheckpointError(
            f"The dialect has no name for {len(nameless)} parameters: {', '.join(sorted(nameless)[:5])}."
        )
    return result


def flatten(state: Any) -> dict[str, Any]:
    """Return what the parameters of a module or of a state like it hold (arrays, shapes), by dot-separated path."""
    if isinstance(state, nnx.Module):
        state = nnx.state(state, nnx.Param)
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def fill(module: M, values: Mapping[str, np.ndarray]) -> M:
    """Return the module with the parameters given by path. A module from `nnx.eval_shape` has none to lose."""
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    leaves = [
        (path, leaf.replace(jnp.asarray(values[".".join(map(str, path))]))) for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(leaves), rest)


_HOLE = re.compile(r"\{(\w+)(\+?)\}")


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """Return the regular expression of a template; a hole may stand in it more than once."""
    return re.compile("".join(_pattern_parts(template)))


def _pattern_parts(template: str) -> Iterator[str]:
    seen, end = set(), 0
    for hole in _HOLE.finditer(template):
        yield re.escape(template[end : hole.start()])
        name, positive = hole.groups()
        yield rf"(?P={name})" if name in seen else rf"(?P<{name}>{'[1-9][0-9]*' if positive else '[0-9]+'})"
        seen.add(name)
        end = hole.end()
    yield re.escape(template[end:])


def _expand(template: str, match: re.Match[str]) -> str:
    return _HOLE.sub(lambda hole: match[hole[1]], template)


def _split_part(ours: str) -> tuple[str, tuple[int, int]]:
    """Return `("a", (0, 3))` for `a[0/3]`, and `("a", (0, 1))` for `a`."""
    match = re.fullmatch(r"(.*)\[(\d+)/(\d+)\]", ours)
    return (match[1], (int(match[2]), int(match[3]))) if match else (ours, (0, 1))


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(parts[0], order="C") if len(parts) == 1 else np.concatenate(parts, axis=-1)
