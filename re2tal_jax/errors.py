"""The errors that users meet, and the sentences that name the nearest allowed word or file."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class Re2TalError(Exception):
    """Base of every error this package raises on purpose: its text is written for the user."""


class ConfigError(Re2TalError, ValueError):
    """A configuration key, value or combination that cannot be run."""


class DataError(Re2TalError, ValueError):
    """An annotation or video that cannot be used; the text names file and video id."""


class CheckpointError(Re2TalError, ValueError):
    """A checkpoint that is missing, damaged or belongs to another configuration."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return a sentence that names the closest allowed words, or all of them when none is close."""
    allowed = sorted(map(str, allowed))
    close = difflib.get_close_matches(name, allowed, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Allowed: {', '.join(allowed)}."


def similar_file(path: Path) -> str:
    """Return a sentence, after a space, that names what beside `path` has the closest name, or nothing."""
    try:
        siblings = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f" Did you mean {str(path.parent / close[0])!r}?" if close else ""
