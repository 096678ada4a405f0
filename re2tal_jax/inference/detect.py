"""Detections of one video of a loader after the other: the devices run ahead, the host post-processes meanwhile."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from re2tal_jax.data.elements import WindowRef
from re2tal_jax.data.pipeline import Loader
from re2tal_jax.errors import ConfigError
from re2tal_jax.external_classifier import ExternalClassifier
from re2tal_jax.postprocess import Gathering, PostprocessConfig, postprocess
from re2tal_jax.progress import WorkProgress
from re2tal_jax.training.sharding import put_batch
from re2tal_jax.types import Detections

log = logging.getLogger(__name__)

Predict = Callable[[Any], tuple[jax.Array, jax.Array, jax.Array]]
"""A placed batch -> (proposals (B, P, 2) in snippets, scores (B, P, K), valid (B, P)) on the mesh."""


class VideoResult(NamedTuple):
    """What was found in a video: None where not one of its windows could be read.

    `unreadable` of its `windows` windows could not; the loader's `skipped` has the reason.
    """

    video_id: str
    detections: Detections | None
    windows: int
    unreadable: int


def detect(
    predict: Predict,
    loader: Loader,
    mesh: Mesh,
    config: PostprocessConfig,
    classes: Sequence[str],
    external: ExternalClassifier | None = None,
    *,
    what: str = "evaluation",
) -> Iterator[VideoResult]:
    """Yield the result of every video of the loader, each as soon as its last window is done.

    No more is held than the windows of one video and two batches, so that memory does not grow with the data set; a
    batch may hold windows of several videos.

    Args:
        predict: see `Predict`.
        loader: one pass in order, from its start; rows with window -1 are padding, or could not be read.
        mesh: where batches are placed.
        config, classes, external: see `postprocess`.
        what: names the work in the progress.
    """
    windows, gathered, first = loader.windows, None, 0
    last = {ref.record.video_id: place for place, ref in enumerate(windows)}
    count = Counter(ref.record.video_id for ref in windows)
    with WorkProgress(len(windows), what, "window") as progress:
        for numbers, outputs in _ahead(_run(predict, loader, mesh)):
            proposals, scores, valid = (_whole(output) for output in outputs)
            # By number, not by row: how the rows of several processes are put together is up to the mesh.
            rows = {number: row for row, number in enumerate(_whole(numbers).tolist()) if number >= 0}
            places = range(first, min(first + numbers.shape[0], len(windows)))
            for place in places:
                video_id = windows[place].record.video_id
                gathered = Gathering(video_id, config) if gathered is None else gathered
                if place in rows:
                    row, grid = rows[place], loader.grid(place)
                    candidates = proposals[row], scores[row], valid[row]
                    gathered.add(postprocess(*candidates, grid, config, classes, external, video_id=video_id))
                if place == last[video_id]:
                    found = gathered.result() if len(gathered) else None
                    yield VideoResult(video_id, found, count[video_id], count[video_id] - len(gathered))
                    gathered = None
            first = places.stop
            progress.advance(len(places))


def check_windows(windows: Sequence[WindowRef], config: PostprocessConfig, policy: str) -> None:
    """Raise ConfigError for a video of several windows where each would be suppressed alone."""
    if config.suppress_in == "video":
        return
    video_id, most = Counter(ref.record.video_id for ref in windows).most_common(1)[0]
    if most > 1:
        raise ConfigError(
            f"config.postprocess.suppress_in = 'window', but video {video_id} has {most} windows under the policy "
            f"{policy!r}: set it to 'video'."
        )


def _run(predict: Predict, loader: Loader, mesh: Mesh) -> Iterator[tuple[jax.Array, Any]]:
    for rows in loader:
        batch = put_batch(rows, mesh)
        yield batch.window, predict(batch)


def _ahead(steps: Iterable[Any]) -> Iterator[Any]:
    """Yield each step's result after the next one has been started, so that the devices never wait for the host."""
    waiting = None
    for step in steps:
        if waiting is not None:
            yield waiting
        waiting = step
    if waiting is not None:
        yield waiting


def _whole(array: jax.Array) -> np.ndarray:
    """Return an array that lies over the devices of all processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
