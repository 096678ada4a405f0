"""What was found wrong with the data and set right or left out: counted, with examples, for the start-up header."""

from collections import Counter
from typing import Any

_EXAMPLES = 3


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with what it counts, "1 video" or "12,000 videos"; `many` where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


class Findings(Counter[str]):
    """How often each defect was found, with a few video ids each: what the start-up header tells of the data."""

    def __init__(self, *args: Any, examples: dict[str, list[str]] | None = None):
        super().__init__(*args)
        self.examples: dict[str, list[str]] = {k: list(v) for k, v in (examples or {}).items()}

    def note(self, name: str, video_id: str) -> None:
        """Count one finding of a video."""
        self[name] += 1
        known = self.examples.setdefault(name, [])
        if len(known) < _EXAMPLES and video_id not in known:
            known.append(video_id)

    def take(self, other: "Findings") -> None:
        """Add the counts and examples of other findings."""
        for name, count in other.items():
            self[name] += count
            self.examples[name] = (self.examples.get(name, []) + other.examples.get(name, []))[:_EXAMPLES]

    def lines(self) -> list[str]:
        """Return one line for each kind of finding: name, count, examples."""
        return [f"{name}: {count} (such as {', '.join(self.examples.get(name, []))})" for name, count in self.items()]

    def __reduce__(self) -> tuple[Any, ...]:
        return _findings, (dict(self), self.examples)


def _findings(counts: dict[str, int], examples: dict[str, list[str]]) -> Findings:
    return Findings(counts, examples=examples)
