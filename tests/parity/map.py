"""Replay of the map folder: every <name>_{gt,pred,expected}.json, some with <name>_blocked.json."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from re2tal_jax.evaluation import DetectionMap, detection_map
from tests.parity.replay import Row, compare

EXACT = 1e-9
EXPECTED = "_expected.json"


def recognises(path: Path, content: object) -> bool:
    """A folder that holds expected results."""
    return path.is_dir() and any(path.glob(f"*{EXPECTED}"))


def replay(path: Path, content: None) -> Iterator[Row]:
    """Rows for every metric and every class."""
    for file in sorted(path.glob(f"*{EXPECTED}")):
        name = file.name.removesuffix(EXPECTED)
        expected = json.loads(file.read_text())
        blocked = path / f"{name}_blocked.json"
        result = detection_map(
            path / f"{name}_gt.json",
            path / f"{name}_pred.json",
            subset=expected["subset"],
            tiou_thresholds=expected["tiou"],
            blocked=blocked if expected["blocked"] else None,
            recall_at=expected.get("top_k") or (),
        )
        yield from _rows(name, result, expected)


def _rows(name: str, result: DetectionMap, expected: dict[str, Any]) -> Iterator[Row]:
    # Ties: the file says how far the reference is from an evaluation with a stable sort, best first, as ours is.
    slack = max(EXACT, expected["tie_sensitivity_stable_desc"] * (1 + EXACT))
    got = result.metrics()
    yield compare(f"{name}/metric names", sorted(got), sorted(expected["metrics"]), 0.0)
    for key, want in expected["metrics"].items():
        if key == "average_mAP" and slack > EXACT:
            low, high = expected["mAP_range"]
            yield Row(f"{name}/{key} in mAP_range", max(low - got[key], got[key] - high, 0.0), EXACT)
        yield _absolute(f"{name}/{key}", got.get(key, np.nan), want, slack)
    yield compare(f"{name}/classes", sorted(result.per_class), sorted(expected["ap_per_class"]), 0.0)
    for label, want in expected["ap_per_class"].items():
        yield _absolute(f"{name}/AP {label}", result.per_class.get(label, np.nan), want, slack)
    yield compare(f"{name}/num_gt", result.num_ground_truth, expected["num_gt"], 0.0)
    yield compare(f"{name}/num_pred", result.num_predictions, expected["num_pred"], 0.0)


def _absolute(name: str, got: object, want: object, tolerance: float) -> Row:
    return Row(name, float(np.abs(np.asarray(got) - np.asarray(want)).max()), tolerance)
