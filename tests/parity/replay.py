"""A row of the parity table, and the max-norm comparison behind it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """One compared array: its relative error in the max norm, and what is allowed."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def compare(name: str, got: object, want: object, tolerance: float) -> Row:
    """Return max|got - want| / max|want|; a wrong shape, or NaN in only one of the two, is an infinite error."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return Row(f"{name} {got.shape} != {want.shape}", np.inf, tolerance)
    if want.dtype.kind in "fc" or got.dtype.kind in "fc":
        got, want = got.astype(np.float64), want.astype(np.float64)
        if not np.array_equal(np.isfinite(got), np.isfinite(want)):
            return Row(name, np.inf, tolerance)
        finite = np.isfinite(want)
        if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
            return Row(name, np.inf, tolerance)
        difference = np.abs(got[finite] - want[finite]).max(initial=0.0)
        return Row(name, float(difference / max(np.abs(want[finite]).max(initial=0.0), 1e-30)), tolerance)
    return Row(name, float(np.mean(got != want)) if got.size else 0.0, tolerance)
