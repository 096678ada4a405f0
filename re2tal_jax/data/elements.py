"""One row of a batch: which window it is, and its arrays. What runs in the decoding threads and processes.

Row n follows from (seed, n) alone: the permutation of its epoch, its own random generator, and the windows that stand
in for unreadable ones. How many processes and threads decode changes nothing in it.
"""

import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8

from re2tal_jax.data.features import Features
from re2tal_jax.data.sampling import Policy
from re2tal_jax.data.video import Crop, OpenVideo, source_size
from re2tal_jax.data.video_source import VideoSource
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.types import VideoRecord, Window

REPLACEMENTS = 10
"""How many other windows are tried in the place of one that cannot be read."""

NO_FRAMES = (0, 0)
"""`Batch.frame_size` of features."""

_ORDER, _WINDOW, _REPLACEMENT = range(3)  # streams of random numbers that never meet


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How videos are decoded and handed over.

    height, width: stored size of a frame; augmentation crops and resizes on the accelerator. None: snippet features are
        loaded, not frames.
    crop: `squeeze` stores the whole picture, `center` the centre in the source's proportions (see `read_frames`).
    workers: decoding processes; 0 decodes in this one.
    threads: decoding threads in each process, each busy with one window.
    ahead: windows that each process holds ready.
    cache_mib: memory in each process for decoded windows, for data that fits; not for random windows.
    on_error: an unreadable video stops the run (`error`), or is named, counted and replaced (`skip`): in training by
        another window, in evaluation by an empty row (window -1).
    """

    height: int | None
    width: int | None
    crop: Crop = "squeeze"
    workers: int = 0
    threads: int = 2
    ahead: int = 4
    cache_mib: int = 0
    on_error: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        least = {"height": 1, "width": 1, "workers": 0, "threads": 1, "ahead": 1, "cache_mib": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} = {value} is too small; at least {low} is needed.")
        if (self.height is None) != (self.width is None):
            raise ConfigError(f"height = {self.height}, width = {self.width}: both are None for features, or neither.")

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Height and width of a stored frame.

        Raises:
            ConfigError: they are None, as for features, and frames are to be loaded.
        """
        if self.height is None or self.width is None:
            raise ConfigError("loader.height and loader.width are None, which is for features: give frames a size.")
        return self.height, self.width


@dataclass(frozen=True, kw_only=True)
class WindowRef:
    """Window number `index` of a video; `total_frames` is known where the annotation or the start-up tells it."""

    record: VideoRecord
    path: Path | VideoSource
    index: int
    total_frames: int | None


@dataclass(frozen=True, kw_only=True)
class ElementLoader:
    """Row number -> arrays of one window, with the fields of `Batch` and the `failures` met on the way.

    `first_row` of `num_rows` rows in each batch of `batch_size` are this process's; an epoch has `steps` batches. With
    `features` these stand in the place of frames.
    """

    windows: tuple[WindowRef, ...]
    policy: Policy
    config: LoaderConfig
    seed: int
    train: bool
    max_segments: int
    batch_size: int
    first_row: int
    num_rows: int
    steps: int
    cache: "Cache"
    videos: "ThreadVideos"
    features: Features | None = None

    def __call__(self, row: int) -> dict[str, Any]:
        """Return the arrays of a row, counted from the start of the stream.

        Raises:
            DataError: in training, no replacement could be read either.
        """
        step, within = divmod(row, self.num_rows)
        epoch, step = divmod(step, self.steps)
        place = step * self.batch_size + self.first_row + within
        if not self.train:
            return self._first_readable([place] if place < len(self.windows) else [], None)
        order = _permutation(self.seed, epoch, len(self.windows))
        others = np.random.default_rng((self.seed, _REPLACEMENT, epoch, place)).integers(len(order), size=REPLACEMENTS)
        candidates = [int(order[place]), *others.tolist()] if self.config.on_error == "skip" else [int(order[place])]
        return self._first_readable(candidates, np.random.default_rng((self.seed, _WINDOW, epoch, place)))

    def _first_readable(self, candidates: list[int], rng: np.random.Generator | None) -> dict[str, Any]:
        """Return the first window that can be read. Failures are told, not raised: they may have to cross processes."""
        failures = []
        for number in candidates:
            try:
                return {**self._element(number, rng), "window": np.int32(number), "failures": failures}
            except DataError as error:
                failures.append((self.windows[number].record.video_id, str(error)))
        if self.train and self.config.on_error == "skip":
            raise DataError(f"{len(candidates)} windows in a row cannot be read; the first is of {failures[0]}.")
        return {**self._empty(), "window": np.int32(-1), "failures": failures}

    def _element(self, number: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        known = self.cache.get(number)
        if known is not None:
            return known
        ref = self.windows[number]
        if self.features is None:
            window, video, size = self._frames(ref, rng)
        else:
            window, video = self.features.window(self.policy, ref.record, ref.index, rng=rng)
            size = NO_FRAMES
        element = {"video": video, "frame_size": np.asarray(size, np.float32), **self._targets(window)}
        self.cache.put(number, element)
        return element

    def _frames(
        self, ref: WindowRef, rng: np.random.Generator | None
    ) -> tuple[Window, UInt8[np.ndarray, "F H W 3"], tuple[float, float]]:
        height, width = self.config.frame_shape
        video = self.videos.open(ref.path)
        try:
            window = self.policy.window(ref.record, video.info.num_frames, ref.index, rng=rng)
            frames = video.frames(window.frame_indices, height, width, crop=self.config.crop)
            return window, frames, source_size(video.info, height, width, self.config.crop)
        finally:
            if self.train:  # the next window is of another video
                self.videos.close()

    def _targets(self, window: Window) -> dict[str, np.ndarray]:
        count = len(window.gt_labels)
        segments = np.zeros((self.max_segments, 2), np.float32)
        labels = np.zeros(self.max_segments, np.int32)
        segments[:count], labels[:count] = window.gt_segments, window.gt_labels
        return {
            "mask": np.arange(window.num_snippets) < window.num_valid_snippets,
            "gt_segments": segments,
            "gt_labels": labels,
            "gt_mask": np.arange(self.max_segments) < count,
        }

    def _empty(self) -> dict[str, np.ndarray]:
        snippets = self.policy.num_snippets
        if self.features is not None:
            size, video = NO_FRAMES, np.zeros((snippets, self.features.channels), np.float32)
        else:
            size = self.config.frame_shape
            video = np.zeros((snippets * self.policy.frames_per_snippet, *size, 3), np.uint8)
        return {
            "video": video,
            "frame_size": np.asarray(size, np.float32),
            "mask": np.zeros(snippets, bool),
            "gt_segments": np.zeros((self.max_segments, 2), np.float32),
            "gt_labels": np.zeros(self.max_segments, np.int32),
            "gt_mask": np.zeros(self.max_segments, bool),
        }


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Int[np.ndarray, " count"]:
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(count)


class ThreadVideos(threading.local):
    """The video that each decoding thread read its last window from, kept open for the next one.

    Windows of an evaluation come video by video, and a long one has many. Pickled, it travels empty.
    """

    def __init__(self) -> None:
        self._path: Path | VideoSource | None = None
        self._video: OpenVideo | None = None

    def open(self, path: Path | VideoSource) -> OpenVideo:
        """Return the video, opened unless it is the one that is open.

        Raises:
            DataError: it cannot be read.
        """
        if self._video is None or path != self._path:
            self.close()
            self._path, self._video = path, OpenVideo(path)
        return self._video

    def close(self) -> None:
        """Close this thread's video."""
        if self._video is not None:
            self._video.close()
        self._path = self._video = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadVideos, ()


class Cache:
    """Elements by window number, kept until the memory is full; the first ones stay, as every epoch asks for all.

    Pickled, it travels empty: each process fills its own.
    """

    def __init__(self, mib: int):
        self._mib = mib
        self._free = mib * 2**20
        self._elements: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def get(self, number: int) -> dict[str, np.ndarray] | None:
        """Return the element of a window, or None; it must not be written to."""
        return self._elements.get(number)

    def put(self, number: int, element: dict[str, np.ndarray]) -> None:
        """Keep an element if there is room."""
        size = sum(array.nbytes for array in element.values())
        with self._lock:
            if size <= self._free and number not in self._elements:
                self._free -= size
                self._elements[number] = element

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self._mib,)
