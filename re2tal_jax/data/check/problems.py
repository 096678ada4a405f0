"""What a check of a data set finds: problems with their number, examples and a way out, as text and as JSON."""

import textwrap
from collections.abc import Iterable, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any, Literal

from re2tal_jax.data.video_folder import printable

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_TITLES = {
    "error": "errors: training or evaluation would stop, or its figures would be wrong",
    "warning": "warnings: it runs, and learns or scores less than it could",
    "note": "notes",
}
_EXAMPLES = 3
_WIDTH = 116


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One kind of defect.

    code: a word for programs.
    message: what is wrong, as a sentence that tells how many of how many.
    count: how many.
    examples: the first few.
    advice: what to do about it; empty where nothing has to be done.
    """

    severity: Severity
    code: str
    message: str
    count: int
    examples: tuple[str, ...] = ()
    advice: str = ""


def problem(
    severity: Severity, code: str, found: Sequence[str], message: str, advice: str = "", *, count: int | None = None
) -> Iterable[Problem]:
    """Yield the problem that was `found`, or nothing if nothing was; `count` where examples stand for more of them."""
    number = len(found) if count is None else count
    if number:
        examples = tuple(printable(text) for text in found[:_EXAMPLES])
        yield Problem(
            severity=severity, code=code, message=printable(message), count=number, examples=examples, advice=advice
        )


def share(found: Sized, among: Sized, noun: str, one: str, many: str) -> str:
    """Return "1 of 12 videos has" or "3 of 12 videos have": the verb is that of the first number."""
    return f"{len(found):,} of {len(among):,} {noun} {one if len(found) == 1 else many}"


def as_json(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    """Return the problems as what JSON can hold."""
    return [asdict(found) for found in problems]


def as_text(problems: Sequence[Problem]) -> str:
    """Return the problems by severity, each with examples and advice, and a line that counts them."""
    blocks = []
    for severity in SEVERITIES:
        found = [item for item in problems if item.severity == severity]
        if found:
            blocks.append("\n".join([_TITLES[severity], *(_paragraph(item) for item in found)]))
    counts = {severity: sum(item.severity == severity for item in problems) for severity in SEVERITIES}
    blocks.append(", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items()))
    return "\n\n".join(blocks)


def _paragraph(item: Problem) -> str:
    more = ", …" if item.count > len(item.examples) else ""
    examples = f" Such as: {', '.join(item.examples).removesuffix('.')}{more}." if item.examples else ""
    lines = _wrapped(f"{item.code}: {item.message}{examples}", first="  ", others="    ")
    return "\n".join(lines + _wrapped(item.advice, first="    -> ", others="       "))


def _wrapped(text: str, *, first: str, others: str) -> list[str]:
    """Return the lines of a text; paths stay whole, to be copied."""
    wrapper = textwrap.TextWrapper(
        _WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )
    return wrapper.wrap(text)
