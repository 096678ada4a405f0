"""Detections of every video of a loader: proposals from the devices, post-processing on the host meanwhile."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from re2tal_jax.data.pipeline import Loader
from re2tal_jax.external_classifier import ExternalClassifier
from re2tal_jax.postprocess import PostprocessConfig, gather, postprocess
from re2tal_jax.training.sharding import put_batch
from re2tal_jax.types import Detections

log = logging.getLogger(__name__)

REPORT_SEC = 10.0


def detect_all(
    predict: Callable[[Any], tuple[jax.Array, jax.Array, jax.Array]],
    loader: Loader,
    mesh: Mesh,
    config: PostprocessConfig,
    classes: Sequence[str],
    external: ExternalClassifier | None = None,
) -> dict[str, Detections]:
    """Return the detections of every video the loader can read, by video id; a video without any has an empty entry.

    Args:
        predict: a placed batch -> (proposals (B, P, 2) in snippets, scores (B, P, K), valid (B, P)) on the mesh.
        loader: one pass in order; rows with window -1 are padding.
        mesh: where batches are placed.
        config, classes, external: see `postprocess`.
    """
    windows: dict[str, list[Detections]] = defaultdict(list)
    for numbers, outputs in _ahead(_run(predict, loader, mesh), len(loader)):
        proposals, scores, valid = (_whole(output) for output in outputs)
        for row, number in enumerate(_whole(numbers).tolist()):
            if number < 0:
                continue
            video_id = loader.windows[number].record.video_id
            grid = loader.grid(number)
            windows[video_id].append(
                postprocess(proposals[row], scores[row], valid[row], grid, config, classes, external, video_id=video_id)
            )
    return gather(windows, config)


def _run(predict: Callable[..., Any], loader: Loader, mesh: Mesh) -> Iterable[tuple[jax.Array, Any]]:
    for rows in loader:
        batch = put_batch(rows, mesh)
        yield batch.window, predict(batch)


def _ahead(steps: Iterable[Any], total: int) -> Iterable[Any]:
    """Yield each step's result after the next one has been started, so that the devices never wait for the host."""
    waiting, begin, told = None, time.monotonic(), time.monotonic()
    for done, step in enumerate(steps):
        if waiting is not None:
            yield waiting
        waiting = step
        if time.monotonic() - told > REPORT_SEC:
            told = time.monotonic()
            left = (told - begin) / max(done, 1) * (total - done)
            log.info("evaluation | batch %d of %d | %.0f s left", done, total, left)
    if waiting is not None:
        yield waiting


def _whole(array: jax.Array) -> np.ndarray:
    """Return an array that lies over the devices of all processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
