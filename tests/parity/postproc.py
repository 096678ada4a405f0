"""Replay of postproc.json (classifier fusion, seconds, whole post-processing) and of its classifier's scores file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from re2tal_jax.external_classifier import ExternalClassifier, ExternalClassifierConfig
from re2tal_jax.postprocess import Gathering, PostprocessConfig, postprocess
from re2tal_jax.segments import to_seconds
from re2tal_jax.types import Detections, SnippetGrid
from tests.parity.nms import config_of
from tests.parity.replay import Row, compare

FLOAT32 = 1e-6
SEGMENT_ROUNDING = 0.01 + 1e-9  # results are rounded to 2 and 4 decimals: one unit either way
SCORE_ROUNDING = 1e-4 + 1e-9


def recognises(path: Path, content: object) -> bool:
    """Any of the recorded sections, or a scores file: results beside class names."""
    return isinstance(content, Mapping) and ((bool(content) and set(content) <= set(SECTIONS)) or _is_scores(content))


def replay(path: Path, content: Mapping[str, Any]) -> Iterator[Row]:
    """Rows for every output of every section."""
    if _is_scores(content):
        yield from _scores_file(path, content)
        return
    for section, cases in content.items():
        for i, case in enumerate(cases):
            for row in SECTIONS[section](case, path):
                yield Row(f"{section}[{i}]/{row.name}", row.error, row.tolerance)


def _is_scores(content: object) -> bool:
    return isinstance(content, Mapping) and "results" in content and bool({"class", "classes"} & set(content))


def _scores_file(path: Path, content: Mapping[str, Any]) -> Iterator[Row]:
    """Fusing unit scores gives back the file: every class once, best first."""
    classes = content["class"] if "class" in content else content["classes"]
    classifier = ExternalClassifier(ExternalClassifierConfig(path=str(path), top_k=len(classes)))
    for video_id, want in content["results"].items():
        _, scores, names = classifier.fuse(video_id, np.zeros((1, 2)), np.ones(1))
        fused = dict(zip(names, scores, strict=True))
        yield compare(f"{video_id}/scores", [fused.get(label, np.nan) for label in classes], want, 0.0)
        yield compare(f"{video_id}/best first", scores, sorted(want, reverse=True), 0.0)


def external_classifier(path: Path, videos: set[str], top_k: int) -> ExternalClassifier:
    """The scores file beside `path`, recognised by content, that has the videos asked for."""
    for file in sorted(path.parent.glob("*.json")):
        content = json.loads(file.read_text())
        if _is_scores(content) and videos <= set(content["results"]):
            return ExternalClassifier(ExternalClassifierConfig(path=str(file), top_k=top_k))
    raise SystemExit(f"{path}: no scores file for {sorted(videos)} lies beside it")


def _cuhk(case: Mapping[str, Any], path: Path) -> Iterator[Row]:
    classifier = external_classifier(path, {case["video"]}, case["topk"])
    segments = np.array(case["segs"], np.float32).reshape(-1, 2)
    segments, scores, names = classifier.fuse(case["video"], segments, np.array(case["scores"], np.float32))
    yield compare("segments", segments, np.array(case["out_segs"], np.float32).reshape(-1, 2), 0.0)
    yield compare("labels", names, case["out_labels"], 0.0)
    yield compare("scores", scores, np.array(case["out_scores"], np.float32), FLOAT32)


def _seconds(case: Mapping[str, Any], path: Path) -> Iterator[Row]:
    segments = to_seconds(np.array(case["segs"], np.float32).reshape(-1, 2), _grid(case["meta"]))
    yield compare("seconds", segments, np.array(case["out"], np.float32).reshape(-1, 2), FLOAT32)


def _anet_resize(case: Mapping[str, Any], path: Path) -> Iterator[Row]:
    config = PostprocessConfig(nms=config_of(case["nms"]))
    classifier = external_classifier(path, {meta["video_name"] for meta in case["metas"]}, case["topk"])
    for meta, proposals, scores in zip(case["metas"], case["props"], case["scores"], strict=True):
        got = run_postprocess(proposals, scores, meta, config, (), classifier)
        yield from same_detections(meta["video_name"], got, case["results"][meta["video_name"]])


def _thumos_padding(case: Mapping[str, Any], path: Path) -> Iterator[Row]:
    config = PostprocessConfig(
        nms=config_of(case["nms"]), pre_nms_threshold=case["pre_nms_thresh"], pre_nms_top_k=case["pre_nms_topk"]
    )
    got = run_postprocess(case["props"], case["scores"], case["meta"], config, case["class_map"])
    yield from same_detections(case["meta"]["video_name"], got, case["results"][case["meta"]["video_name"]])


def _thumos_sliding(case: Mapping[str, Any], path: Path) -> Iterator[Row]:
    """Windows, then the gathering of the recorded windows.

    Ours are not gathered here: they are float64 and round to another hundredth now and then, which suppression
    amplifies between segments a fifth of a second long.
    """
    config = PostprocessConfig(nms=config_of(case["nms"]), suppress_in="video")
    recorded: dict[str, Gathering] = {}
    for i, window in enumerate(case["windows"]):
        video_id = window["meta"]["video_name"]
        got = run_postprocess(window["props"], window["scores"], window["meta"], config, case["class_map"])
        yield from same_detections(f"windows[{i}]", got, window["results"][video_id])
        recorded.setdefault(video_id, Gathering(video_id, config)).add(_detections(window["results"][video_id]))
    for video_id, want in case["final"].items():
        yield from same_detections(f"final {video_id}", recorded[video_id].result(), want)


SECTIONS = {
    "cuhk": _cuhk,
    "seconds": _seconds,
    "anet_resize": _anet_resize,
    "thumos_sliding": _thumos_sliding,
    "thumos_padding": _thumos_padding,
}


def _grid(meta: Mapping[str, Any]) -> SnippetGrid:
    duration = meta["duration"]
    if meta["fps"] == -1:
        return SnippetGrid(start_sec=0.0, seconds_per_snippet=duration / meta["resize_length"], duration_sec=duration)
    return SnippetGrid(
        start_sec=(meta.get("window_start_frame", 0) + meta["offset_frames"]) / meta["fps"],
        seconds_per_snippet=meta["snippet_stride"] / meta["fps"],
        duration_sec=duration,
    )


def run_postprocess(
    proposals: Sequence[Any],
    scores: Sequence[Any],
    meta: Mapping[str, Any],
    config: PostprocessConfig,
    classes: Sequence[str],
    external: ExternalClassifier | None = None,
) -> Detections:
    proposals, scores = np.array(proposals, np.float32).reshape(-1, 2), np.array(scores, np.float32)
    scores = scores.reshape(len(proposals), len(classes) or 1)
    valid = np.ones(len(proposals), bool)
    return postprocess(proposals, scores, valid, _grid(meta), config, classes, external, video_id=meta["video_name"])


def _detections(entries: Sequence[Mapping[str, Any]]) -> Detections:
    return Detections(
        segments_sec=np.array([entry["segment"] for entry in entries], np.float64).reshape(-1, 2),
        labels=tuple(entry["label"] for entry in entries),
        scores=np.array([entry["score"] for entry in entries], np.float64),
    )


def same_detections(name: str, got: Detections, entries: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """The same set: every recorded detection has its own among ours, same label, within rounding; best first."""
    want = _detections(entries)
    yield compare(f"{name}/count", len(got), len(want), 0.0)
    yield compare(f"{name}/labels", sorted(got.labels), sorted(want.labels), 0.0)
    if len(got) != len(want):
        return
    close = np.array(got.labels)[:, None] == np.array(want.labels)[None]
    close &= np.abs(got.segments_sec[:, None] - want.segments_sec[None]).max(axis=2, initial=0) <= SEGMENT_ROUNDING
    close &= np.abs(got.scores[:, None] - want.scores[None]) <= SCORE_ROUNDING
    yield Row(f"{name}/detections without counterpart", float(len(want) - _matched(close)), 0.0)
    descending = np.abs(got.scores - np.sort(want.scores)[::-1]).max(initial=0.0)
    yield Row(f"{name}/scores, best first", float(descending), SCORE_ROUNDING)


def _matched(close: np.ndarray) -> int:
    """Size of the largest one-to-one matching of rows and columns (augmenting paths)."""
    owner: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column in np.flatnonzero(close[row]).tolist():
            if column not in tried:
                tried.add(column)
                if column not in owner or place(owner[column], tried):
                    owner[column] = row
                    return True
        return False

    return sum(place(row, set()) for row in range(len(close)))
