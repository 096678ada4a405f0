"""Replay of nms.npz: the two suppression operators, voting, and `batched_nms` under every recorded configuration."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from re2tal_jax.nms import NMSConfig, batched_nms, hard_nms, soft_nms, vote
from tests.parity.replay import Row, compare

SOFT_METHODS = ("zero", "linear", "gaussian", "bmn")
VOTED_SEGMENTS = 1e-3  # absolute; the reference votes in float32
SCORES = 1e-6


def recognises(path: Path, content: object) -> bool:
    """Arrays of sets, with the configurations in `meta`."""
    return isinstance(content, Mapping) and "nms_cfgs" in (content.get("meta") or {})


def replay(path: Path, content: Mapping[str, Any]) -> Iterator[Row]:
    """Rows for every op/* and bnms/* array."""
    names = [key.split("/")[1] for key in content if key.startswith("set/") and key.endswith("/segs")]
    ties = set(content["meta"].get("tie_order_dependent_sets", ()))
    for name in names:
        data = [content[f"set/{name}/{field}"] for field in ("segs", "scores", "labels")]
        recorded = {key.split("/")[2]: content[key] for key in content if key.startswith(f"op/{name}/")}
        yield from _operators(name, data, recorded, name in ties)
        for setting, options in content["meta"]["nms_cfgs"].items():
            yield from _batched(name, setting, options, data, content, name in ties)


def config_of(options: Mapping[str, Any]) -> NMSConfig:
    """Translate the keyword arguments of the reference's `batched_nms`, its defaults included."""
    options = {
        "iou_threshold": 0.0,
        "min_score": 0.0,
        "max_seg_num": 100,
        "use_soft_nms": True,
        "multiclass": True,
        "sigma": 0.5,
        "voting_thresh": 0.0,
        "method": 2,
        "t1": 0.0,
        "t2": 0.0,
    } | dict(options)
    votes = options["voting_thresh"] > 0 and not options["multiclass"]
    return NMSConfig(
        method=SOFT_METHODS[options["method"]] if options["use_soft_nms"] else "hard",
        tiou_threshold=float(options["iou_threshold"]),
        voting_threshold=options["voting_thresh"] if votes else None,
        **{key: float(options[key]) for key in ("sigma", "t1", "t2", "min_score")},
        **{key: options[key] for key in ("max_seg_num", "multiclass")},
    )


def absolute(name: str, got: np.ndarray, want: np.ndarray, tolerance: float) -> Row:
    """Compare by max|got - want|."""
    if got.shape != want.shape or not np.isfinite(want).all():
        return Row(f"{name} {got.shape} != {want.shape}", np.inf, tolerance)
    return Row(name, float(np.abs(got.astype(np.float64) - want).max(initial=0.0)), tolerance)


def _operators(name: str, data: list[np.ndarray], recorded: dict[str, np.ndarray], ties: bool) -> Iterator[Row]:
    segments, scores, _ = data
    for key, want in recorded.items():
        row = f"op/{name}/{key}"
        if match := re.fullmatch(r"nms_inds_([\d.e-]+)", key):
            yield compare(row, _hard_in_recorded_order(segments, scores, float(match[1]), want, ties), want, 0.0)
        elif match := re.fullmatch(r"soft(\d)_([\d.e-]+)_([\d.e-]+)_(inds|dets)", key):
            options = {"method": int(match[1]), "sigma": float(match[2]), "min_score": float(match[3])}
            indices, decayed = soft_nms(segments, scores, config_of(options))
            if match[4] == "inds":
                yield compare(row, indices, want, 0.0)
            else:
                yield compare(f"{row}[segments]", segments[indices], want[:, :2], 0.0)
                yield compare(f"{row}[scores]", decayed, want[:, 2], SCORES)
        elif match := re.fullmatch(r"voting_([\d.e-]+)_first(\d+)", key):
            voted = vote(segments[: int(match[2])], segments, scores, float(match[1]))
            yield from _voted(row, voted, segments[: int(match[2])], want)
        else:
            yield Row(f"{row}: unknown operator", np.inf, 0.0)


def _hard_in_recorded_order(
    segments: np.ndarray, scores: np.ndarray, threshold: float, want: np.ndarray, ties: bool
) -> np.ndarray:
    """Equal scores come in any order in the reference: among them, put first what it kept, as it ordered them."""
    order = np.arange(len(scores))
    if ties:
        place = np.full(len(scores), len(scores))
        place[want] = np.arange(len(want))
        order = np.argsort(place, kind="stable")
    return order[hard_nms(segments[order], scores[order], threshold)]


def _batched(
    name: str, setting: str, options: Mapping[str, Any], data: list[np.ndarray], content: Mapping[str, Any], ties: bool
) -> Iterator[Row]:
    stable = f"bnms_stable/{name}/{setting}"
    prefix = stable if f"{stable}/segs" in content else f"bnms/{name}/{setting}"
    if f"{prefix}/segs" not in content:
        return
    want = [content[f"{prefix}/{field}"] for field in ("segs", "scores", "labels")]
    config = config_of(options)
    got = list(batched_nms(*data, config))
    if ties and not prefix.startswith("bnms_stable"):
        got, want = _sorted_rows(got), _sorted_rows(want)
    if config.voting_threshold is None:
        yield compare(f"{prefix}/segs", got[0], want[0], 0.0)
    else:
        unvoted, *_ = batched_nms(*data, config_of(dict(options) | {"voting_thresh": 0.0}))
        yield from _voted(f"{prefix}/segs", got[0], unvoted, want[0])
    yield compare(f"{prefix}/scores", got[1], want[1], SCORES)
    yield compare(f"{prefix}/labels", got[2], want[2], 0.0)


def _voted(row: str, got: np.ndarray, unvoted: np.ndarray, want: np.ndarray) -> Iterator[Row]:
    """Where the reference votes 0/0 for a zero-length segment, ours stays where it was."""
    if got.shape != want.shape:
        yield compare(row, got, want, 0.0)
        return
    lost = np.isnan(want).any(axis=1)
    yield absolute(row, got[~lost], want[~lost], VOTED_SEGMENTS)
    if lost.any():
        yield compare(f"{row}[NaN in the reference: unmoved]", got[lost], unvoted[lost], 0.0)


def _sorted_rows(columns: list[np.ndarray]) -> list[np.ndarray]:
    segments, scores, labels = columns
    order = np.lexsort((segments[:, 1], segments[:, 0], labels, -scores))
    return [column[order] for column in columns]
