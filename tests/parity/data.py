"""Data set items and frame indices: annotations, filters, the sampling policies and their order of random draws."""

import dataclasses
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from re2tal_jax.data.annotations import read_annotations
from re2tal_jax.data.dataset import open_dataset
from re2tal_jax.data.sampling import (
    POLICIES,
    Policy,
    RandomTrunc,
    Resize,
    SlidingWindow,
    spread_frames,
)
from re2tal_jax.data.thumos import AMBIGUOUS, on_whole_frames
from re2tal_jax.types import VideoRecord, Window
from tests.parity.replay import Row, compare

ITEM = {"dataset", "kw", "load", "total_frames", "frame_inds"}
LENGTH = {"total_frames", "resize_length", "scale"}


def recognises(path: Path, content: Any) -> bool:
    """A file of items or of resize lengths, or a folder with one."""
    if path.is_dir():
        return any(_form(rows) for rows in _lists(path))
    return _form(content) is not None


def replay(path: Path, content: Any) -> Iterator[Row]:
    """Replay the file, or every such file of the folder."""
    folder = path if path.is_dir() else path.parent
    for rows in _lists(path) if path.is_dir() else [content]:
        if _form(rows) == "items":
            yield from _items(folder, rows)
        elif _form(rows) == "lengths":
            yield from map(_length, rows)


def _form(rows: Any) -> str | None:
    if not (isinstance(rows, list) and rows and isinstance(rows[0], dict)):
        return None
    keys = set(rows[0])
    return "items" if keys >= ITEM else "lengths" if keys >= LENGTH else None


def _lists(folder: Path) -> Iterator[Any]:
    for file in sorted(folder.glob("*.json")):
        text = file.read_text()
        if text.lstrip().startswith("["):
            yield json.loads(text)


def _length(row: dict[str, Any]) -> Row:
    count = row["resize_length"] * row["scale"]
    got = spread_frames(row["total_frames"], count)
    name = f"resize {row['total_frames']} frames to {row['resize_length']}x{row['scale']}"
    if "assertion" in row:  # the published code stops here with one frame too many
        fine = len(got) == count and np.all(np.diff(got) >= 0) and got[0] >= 0 and got[-1] < row["total_frames"]
        return Row(f"{name}: right count, monotone", 0.0 if fine else np.inf, 0.0)
    weighted = int((got * (np.arange(len(got)) % 97 + 1)).sum())
    got = [len(got), *got[:8], *got[-8:], got.sum(), weighted]
    return compare(name, got, [row["n"], *row["first8"], *row["last8"], row["sum"], row["wsum"]], 0.0)


def _items(folder: Path, items: list[dict[str, Any]]) -> Iterator[Row]:
    (annotations,) = (f for f in sorted(folder.glob("*.json")) if '"database"' in f.read_text()[:200])
    (classes,) = sorted(folder.glob("*.txt"))
    cache: dict[Any, Any] = {}  # videos of a data set, windows of a video
    for item in items:
        key = json.dumps([item["dataset"], item["kw"]], sort_keys=True)
        if key not in cache:
            cache[key] = _records(annotations, classes, item)
        yield from _item(item, cache[key], cache)


def _records(annotations: Path, classes: Path, item: dict[str, Any]) -> list[VideoRecord]:
    """Return the videos that the published data set lists; it has no clipping and leaves out unlabelled videos."""
    kw, thumos = item["kw"], item["dataset"].startswith("Thumos")
    file = read_annotations(
        annotations,
        classes=classes,
        ignored_labels=(AMBIGUOUS,) if thumos else (),
        fps=float(kw["fps"]) if kw.get("fps", -1) > 0 else None,
        clip=False,
    )
    test = kw.get("test_mode", False)
    filtered = kw.get("filter_gt", False) and not test
    offset = kw.get("offset_frames", 0) if filtered and not thumos else 0
    names = kw["subset_name"]  # a substring test there if it is text
    dataset = open_dataset(
        file,
        subset=tuple(s for s in dict.fromkeys(r.subset for r in file.records) if s in names),
        training=filtered,
        min_length_ratio=0.01 if "Resize" in item["dataset"] else 0.0,
        class_agnostic=kw.get("class_agnostic", False),
        adjust=on_whole_frames if thumos else partial(_after, offset),
        unlabelled=test,
    )
    return [record for record in dataset.records if test or len(record.labels)]


def _after(offset_frames: int, record: VideoRecord) -> VideoRecord:
    """Leave out what ends before the first snippet's centre, as the published ActivityNet filter does."""
    kept = record.segments_sec[:, 1] * (record.fps or 0) > offset_frames
    if offset_frames == 0 or kept.all():
        return record
    return dataclasses.replace(record, segments_sec=record.segments_sec[kept], labels=record.labels[kept])


def _policy(item: dict[str, Any]) -> Policy:
    kw, load, method = item["kw"], item["load"], item["load"]["method"]
    options = {"frames_per_snippet": load["scale_factor"]}
    if method == "resize":
        return POLICIES[method](num_snippets=kw["resize_length"], **options)
    options["snippet_stride"] = kw["feature_stride"] * kw.get("sample_stride", 1)
    options["offset_frames"] = kw.get("offset_frames", 0)
    if method == "random_trunc":
        options |= {"num_snippets": load["trunc_len"], "min_overlap": load["trunc_thresh"]}
        options["crop_ratio"] = load["crop_ratio"] and tuple(load["crop_ratio"])
    else:
        options |= {"num_snippets": kw["window_size"], "min_overlap": kw.get("ioa_thresh", 0.75)}
        options["overlap"] = kw.get("window_overlap_ratio", 0.25)
        options["require_segment"] = not kw.get("test_mode", False)
    return POLICIES[method](**options)


class _PythonRandom:
    """Python's generator in the clothes of numpy's."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def integers(self, low: int, high: int) -> int:
        return self._random.randint(low, high - 1)


def _item(item: dict[str, Any], records: list[VideoRecord], cache: dict[Any, Any]) -> Iterator[Row]:
    name = (
        f"{item['dataset']} {item['load']['method']} x{item['load']['scale_factor']} #{item['index']} {item['video']}"
    )
    policy = _policy(item)
    if isinstance(policy, SlidingWindow):
        window, metas = _sliding(policy, item, records, cache)
        if window is None:
            yield Row(f"{name}: no such window", np.inf, 0.0)
            return
    else:
        record = records[item["index"]]
        yield Row(f"{name} video", 0.0 if record.video_id == item["video"] else np.inf, 0.0)
        seed = item["py_random_seed"]
        window = policy.window(record, item["total_frames"], rng=None if seed is None else _PythonRandom(seed))
        metas = _metas(policy, window)
        if isinstance(policy, RandomTrunc) and item.get("gt_segments") == []:
            # after 200 trials the published code goes on without a segment; ours never does if there is one
            lost = len(window.gt_segments) == 0 and (np.diff(record.segments_sec) > 0).any()
            yield Row(f"{name}: a segment is kept", np.inf if lost else 0.0, 0.0)
            return
    yield compare(f"{name} frame_inds", window.frame_indices, item["frame_inds"], 0.0)
    masks = [item["masks"], item["mask_len"], item["num_clips"] * item["clip_len"], item["mask_is_prefix"]]
    got = [window.num_valid_snippets, window.num_snippets, len(window.frame_indices), True]
    yield compare(f"{name} masks", got, masks, 0.0)
    yield compare(f"{name} meta", [metas[k] for k in item["meta"]], list(item["meta"].values()), 1e-12)
    if "gt_segments" in item:
        segments = np.asarray(item["gt_segments"], np.float64).reshape(-1, 2)
        yield compare(f"{name} gt_segments", window.gt_segments, segments, 1e-6)
        yield compare(f"{name} gt_labels", window.gt_labels, np.asarray(item["gt_labels"], np.int32), 0.0)


def _sliding(
    policy: SlidingWindow, item: dict[str, Any], records: list[VideoRecord], cache: dict[Any, Any]
) -> tuple[Window | None, dict[str, float]]:
    """Return the window with the item's first snippet: the published list has repeats and lacks ends of videos."""
    total, first = item["total_frames"], item["meta"]["feature_start_idx"]
    record = next(record for record in records if record.video_id == item["video"])
    key = (policy, item["video"], total, id(records))
    if key not in cache:
        cache[key] = {start: (i, last) for i, (start, last) in enumerate(policy.layout(record, total)[0].tolist())}
    if first not in cache[key]:
        return None, {}
    index, last = cache[key][first]
    window = policy.window(record, total, index)
    return window, _metas(policy, window) | {"feature_end_idx": last - 1}


def _metas(policy: Policy, window: Window) -> dict[str, float]:
    """Return what the published loader hands to post-processing, from our grid."""
    grid = window.grid
    if isinstance(policy, Resize):
        return {"fps": -1, "duration": grid.duration_sec, "resize_length": policy.num_snippets}
    fps = policy.snippet_stride / grid.seconds_per_snippet
    start = round(grid.start_sec * fps - policy.offset_frames, 6)
    return {
        "fps": fps,
        "duration": grid.duration_sec,
        "snippet_stride": policy.snippet_stride,
        "offset_frames": policy.offset_frames,
        "window_start_frame": start,
        "window_size": policy.num_snippets,
        "feature_start_idx": start / policy.snippet_stride,
    }
