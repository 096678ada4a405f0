"""What a conversion did with every key and every parameter, as text and as JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 20  # lines of one kind


@dataclass
class Report:
    """Every key of the source is in exactly one of the first four, every parameter without a source in `unfilled`.

    mapped: key -> our path.
    ignored: key -> the reason why it becomes no parameter.
    unmapped: key -> what stands against it, the nearest name with it.
    wrong_shape: key -> (its shape, the shape that would fit, our path).
    unfilled: our path -> shape.
    allowed: our path -> why it keeps the value that the network is built with.
    inflated: mapped key -> (its shape, the shape it was spread to over time).
    cast: dtype of the source -> number of mapped keys, where it is not float32.
    """

    mapped: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unmapped: dict[str, str] = field(default_factory=dict)
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = field(default_factory=dict)
    unfilled: dict[str, tuple[int, ...]] = field(default_factory=dict)
    allowed: dict[str, str] = field(default_factory=dict)
    inflated: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    cast: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every key is mapped or ignored, and every parameter filled or allowed to stay empty."""
        return not (self.unmapped or self.wrong_shape or self.unfilled)

    def to_json(self) -> dict[str, Any]:
        """Return all of it, for a file."""
        return asdict(self)

    def __str__(self) -> str:
        """Return counts, then what is wrong by key, then what was ignored by reason."""
        counts = [
            f"mapped {len(self.mapped)}",
            f"ignored {len(self.ignored)}",
            f"unmapped {len(self.unmapped)}",
            f"wrong shape {len(self.wrong_shape)}",
            f"unfilled {len(self.unfilled)}",
        ]
        lines = [", ".join(counts)]
        lines += _section("unmapped keys", [f"{key}: {why}" for key, why in self.unmapped.items()])
        lines += _section(
            "keys of the wrong shape",
            [f"{key} {has}: {path} needs {needs}" for key, (has, needs, path) in self.wrong_shape.items()],
        )
        lines += _section("parameters that no key fills", [f"{path} {shape}" for path, shape in self.unfilled.items()])
        lines += _section("left as initialised", [f"{path}: {why}" for path, why in self.allowed.items()])
        lines += _section("ignored keys", _by_reason(self.ignored))
        lines += _section("inflated over time", [f"{key} {a} -> {b}" for key, (a, b) in self.inflated.items()])
        lines += _section("cast to float32", [f"{count} keys from {dtype}" for dtype, count in self.cast.items()])
        return "\n".join(lines)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    more = [f"    … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"  {title}:", *(f"    {line}" for line in lines[:SHOWN]), *more]


def _by_reason(ignored: Mapping[str, str]) -> list[str]:
    """One line a reason, with the number of keys and the first of them."""
    first: dict[str, str] = {}
    for key, reason in ignored.items():
        first.setdefault(reason, key)
    return [f"{count} such as {first[reason]}: {reason}" for reason, count in Counter(ignored.values()).items()]
