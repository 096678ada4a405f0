"""What every network's golden file needs: its weights converted, and rows of the table, one for each array."""

from collections.abc import Iterator, Mapping

import numpy as np

from checkpoints_convert.rules import Rules, Shape, plan
from checkpoints_convert.verify import Row, compare
from re2tal_jax.errors import CheckpointError

__all__ = ["Row", "compare", "compare_gradients", "compare_loss", "convert_state_dict"]


def convert_state_dict(
    state_dict: Mapping[str, np.ndarray], rules: Rules, targets: Mapping[str, Shape]
) -> dict[str, np.ndarray]:
    """Return our parameters by path from a whole state dict.

    Raises:
        CheckpointError: with the report, unless every key is mapped or ignored and every target filled.
    """
    found = plan({key: tuple(value.shape) for key, value in state_dict.items()}, rules, targets)
    if not found.report.complete:
        raise CheckpointError(str(found.report))
    return found.convert(lambda key: state_dict[key])


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
