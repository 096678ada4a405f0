"""A row of the parity table, the max-norm comparison behind it, and the rows that every network's golden file has."""

from collections.abc import Iterator, Mapping
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


def compare_loss(name: str, loss: float, wanted: float, terms: np.ndarray, tolerance: float) -> Row:
    """The loss is a sum of signed terms: where they cancel, its error is measured against the terms' norm."""
    norm = float(np.linalg.norm(np.asarray(terms, np.float64)))
    return Row(name, abs(loss - wanted) / max(abs(wanted), norm), tolerance)


def compare_gradients(
    case: str, golden: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], tolerance: float
) -> Iterator[Row]:
    """Full gradients, then norm and signature of every parameter; those the reference lacks have to be zero here."""
    for key in (key for key in golden if key.startswith("g/")):
        yield compare(f"{case}/{key}", ours[key[2:]], golden[key], tolerance)
    names = [str(name) for name in golden["gnames"]]
    for name, norm, signature in zip(names, golden["gnorm"], golden["gsig"], strict=True):
        flat = np.asarray(ours[name], np.float64).ravel()
        wave = np.cos(0.7 * np.arange(flat.size) + 0.3)
        yield compare(f"{case}/gnorm/{name}", np.linalg.norm(flat), norm, tolerance)
        # a signature is a sum that may cancel, so its error is measured against the gradient's norm
        yield Row(f"{case}/gsig/{name}", float(abs(flat @ wave - signature) / max(norm, 1e-30)), tolerance)
    for name in sorted(set(ours) - set(names)):
        yield compare(f"{case}/no gradient/{name}", ours[name], np.zeros_like(ours[name]), 0.0)
