"""Which frames of a video make one input of the network: four policies from VideoRecord to Window.

A window is T snippets of `frames_per_snippet` frames each. `Resize` spreads them over the whole video; the other three
walk in steps of `snippet_stride` frames: `RandomTrunc` draws one stretch that holds an action, `SlidingWindow` covers
the video by overlapping windows, `Padding` takes all of it. What runs short is filled with the last frame and masked.

How many windows a video has follows from the annotation, so an epoch is known before a video is opened; the frames
themselves follow what the decoder reports (`total_frames`). Seconds and frames are tied by the annotation.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.registry import Registry
from re2tal_jax.types import SnippetGrid, VideoRecord, Window

TRIALS = 200


class RandomSource(Protocol):
    """Where randomness comes from: any object with numpy's `Generator.integers`."""

    def integers(self, low: int, high: int) -> Any:
        """Return an integer in [low, high)."""
        ...


def annotated_frames(record: VideoRecord) -> int | None:
    """Return the number of frames that the annotation states, or that its duration and fps amount to, or None."""
    if record.num_frames is None and record.fps is not None:
        return int(record.duration_sec * record.fps)
    return record.num_frames


def frame_rate(record: VideoRecord, total_frames: int) -> float:
    """Return frames per second, by the annotation where it says, else by the decoder's frames over the duration."""
    if record.fps is not None:
        return record.fps
    return (record.num_frames or total_frames) / record.duration_sec


def _require(value: float, least: float, name: str) -> None:
    if value < least:
        raise ConfigError(f"{name} = {value} is too small; at least {least} is needed.")


class Sample(NamedTuple):
    """What a policy decides about a window: frame numbers, valid snippets, segments and labels in it, and its line."""

    frames: np.ndarray
    valid: int
    segments: np.ndarray
    labels: np.ndarray
    grid: SnippetGrid


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """What every policy has: T = `num_snippets` on the localizer's grid, each of `frames_per_snippet` frames."""

    num_snippets: int
    frames_per_snippet: int = 1

    def __post_init__(self) -> None:
        _require(self.num_snippets, 1, "num_snippets")
        _require(self.frames_per_snippet, 1, "frames_per_snippet")

    def num_windows(self, record: VideoRecord, total_frames: int | None = None) -> int:
        """Return how many windows the video has; `total_frames` counts only where the annotation gives no frames.

        Raises:
            DataError: a sliding window, and neither of the two tells the number of frames.
        """
        del record, total_frames
        return 1

    def window(
        self, record: VideoRecord, total_frames: int, index: int = 0, *, rng: RandomSource | None = None
    ) -> Window:
        """Return window `index` of the video, 0 <= index < num_windows(record).

        `total_frames` is what the decoder reports; `rng` is needed by `RandomTrunc` alone.

        Raises:
            DataError: the video has no frame in this window, or does not fit it (padding).
        """
        if total_frames < 1:
            raise DataError(f"Video {record.video_id!r} has {total_frames} frames; at least one is needed.")
        sample = self._sample(record, total_frames, index, rng)
        return Window(
            video_id=record.video_id,
            frame_indices=sample.frames,
            num_snippets=self.num_snippets,
            num_valid_snippets=sample.valid,
            gt_segments=sample.segments.astype(np.float32),
            gt_labels=sample.labels.astype(np.int32),
            grid=sample.grid,
        )

    @abstractmethod
    def _sample(self, record: VideoRecord, total_frames: int, index: int, rng: RandomSource | None) -> Sample:
        """Decide about window `index`; `total_frames` is at least one."""


@dataclass(frozen=True, kw_only=True)
class Resize(Policy):
    """The whole video as T snippets, its frames spread evenly, segments clipped to [0, T]: the ActivityNet recipe."""

    def _sample(self, record: VideoRecord, total_frames: int, index: int, rng: RandomSource | None) -> Sample:
        frames = spread_frames(total_frames, self.num_snippets * self.frames_per_snippet)
        shares = np.clip(record.segments_sec.astype(np.float32) / np.float32(record.duration_sec), 0, 1)
        segments = shares * np.float32(self.num_snippets)
        grid = SnippetGrid(
            start_sec=0.0,
            seconds_per_snippet=record.duration_sec / self.num_snippets,
            duration_sec=record.duration_sec,
        )
        return Sample(frames, self.num_snippets, segments, record.labels, grid)


def spread_frames(total_frames: int, count: int) -> np.ndarray:
    """Return `count` frame numbers at the centres (i + 0.5) * stride - 0.5 of equal parts of the video.

    Rounded half to even. The published code walks a floating-point range, which now and then yields one frame too many
    and stops it; here the count is given. The step is the difference of the first two centres, as such a range has it,
    so that centres halfway between two frames fall to the same side.
    """
    stride = total_frames / count
    first = stride / 2 - 0.5
    step = (first + stride) - first
    centres = first + np.arange(count) * step
    return np.clip(centres, 0, total_frames - 1).round().astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class StridedPolicy(Policy):
    """A policy whose snippets are `snippet_stride` frames apart, in *positions* `snippet_stride / frames_per_snippet`.

    `offset_frames` says where in the video snippet 0 is centred when seconds are computed; it moves no frame.
    """

    snippet_stride: int
    offset_frames: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.snippet_stride, 1, "snippet_stride")
        _require(self.offset_frames, 0, "offset_frames")

    @property
    def num_positions(self) -> int:
        """How many positions, that is frames, a window has."""
        return self.num_snippets * self.frames_per_snippet

    def positions_in(self, total_frames: int) -> int:
        """Return how many positions lie in a video of so many frames."""
        return -(-total_frames * self.frames_per_snippet // self.snippet_stride)

    def segments_in_snippets(self, record: VideoRecord, fps: float) -> np.ndarray:
        """Return the segments (N, 2) float32 in snippets from the start of the video."""
        frames = (record.segments_sec * fps).astype(np.float32)
        return (frames - np.float32(self.offset_frames)) / np.float32(self.snippet_stride)

    def frames(self, record: VideoRecord, total_frames: int, first: int, last: int) -> tuple[np.ndarray, int]:
        """Return the frame numbers of positions [first, last), filled with the last, and how many snippets are valid.

        A snippet is valid when all its frames are real; a video shorter than one snippet counts as one, so that no
        window is masked as a whole.
        """
        last = min(last, self.positions_in(total_frames))
        if first >= last:
            raise DataError(
                f"Video {record.video_id!r} has {total_frames} frames, but its annotation puts a window at frame "
                f"{first * self.snippet_stride // self.frames_per_snippet}: is the file truncated, or the annotation "
                "for another frame rate (option fps)?"
            )
        positions = np.minimum(np.arange(first, first + self.num_positions), last - 1)
        frames = (positions * (self.snippet_stride / self.frames_per_snippet)).round()
        valid = min(max((last - first) // self.frames_per_snippet, 1), self.num_snippets)
        return np.clip(frames, 0, total_frames - 1).astype(np.int64), valid

    def grid(self, record: VideoRecord, fps: float, first: int) -> SnippetGrid:
        """Return the line of snippets that starts at position `first`."""
        start_frame = first * self.snippet_stride / self.frames_per_snippet
        return SnippetGrid(
            start_sec=(start_frame + self.offset_frames) / fps,
            seconds_per_snippet=self.snippet_stride / fps,
            duration_sec=record.duration_sec,
        )


@dataclass(frozen=True, kw_only=True)
class Padding(StridedPolicy):
    """The whole video from frame 0, filled up to T snippets; a video longer than that is refused."""

    def _sample(self, record: VideoRecord, total_frames: int, index: int, rng: RandomSource | None) -> Sample:
        length = self.positions_in(total_frames)
        if length > self.num_positions:
            raise DataError(
                f"Video {record.video_id!r} has {math.ceil(length / self.frames_per_snippet)} snippets, more than "
                f"num_snippets = {self.num_snippets}: raise num_snippets or use sliding_window."
            )
        fps = frame_rate(record, total_frames)
        frames, valid = self.frames(record, total_frames, 0, length)
        return Sample(frames, valid, self.segments_in_snippets(record, fps), record.labels, self.grid(record, fps, 0))


@dataclass(frozen=True, kw_only=True)
class RandomTrunc(StridedPolicy):
    """A stretch of T snippets that starts at any position and holds a segment: the THUMOS training recipe.

    A segment is kept, clipped to the stretch, when at least `min_overlap` of its length lies in it. `crop_ratio` (low,
    high) shortens videos that fit as a whole to a random part of their length.
    """

    min_overlap: float = 0.75
    crop_ratio: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_overlap <= 1:
            raise ConfigError(f"min_overlap = {self.min_overlap} must lie in (0, 1].")
        if self.crop_ratio is not None and not 0 < self.crop_ratio[0] <= self.crop_ratio[1] <= 1:
            raise ConfigError(f"crop_ratio = {self.crop_ratio} must be (low, high) with 0 < low <= high <= 1, or None.")

    def _sample(self, record: VideoRecord, total_frames: int, index: int, rng: RandomSource | None) -> Sample:
        if rng is None:
            raise ConfigError("random_trunc needs a random generator: pass rng=numpy.random.default_rng(seed).")
        fps = frame_rate(record, total_frames)
        segments = self.segments_in_snippets(record, fps) * np.float32(self.frames_per_snippet)
        length = self.positions_in(total_frames)
        size = self._draw_size(length, rng)
        if size == length:
            start, kept = 0, np.ones(len(segments), bool)
        else:
            start, segments, kept = self._draw_start(segments, length, size, rng)
        frames, valid = self.frames(record, total_frames, start, start + size)
        segments = (segments[kept] - np.float32(start)) / np.float32(self.frames_per_snippet)
        return Sample(frames, valid, segments, record.labels[kept], self.grid(record, fps, start))

    def _draw_size(self, length: int, rng: RandomSource) -> int:
        """Return how many positions the stretch has; only a video that fits and may be cropped costs a draw."""
        if length > self.num_positions:
            return self.num_positions
        if self.crop_ratio is None:
            return length
        low, high = (max(round(ratio * length), 1) for ratio in self.crop_ratio)
        return int(rng.integers(low, high + 1))

    def _draw_start(
        self, segments: np.ndarray, length: int, size: int, rng: RandomSource
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """Return a start, the segments clipped to the stretch, and which of them are kept."""
        inside = clip_segments(segments, 0, length)[1]
        if not (inside > 0).any():
            start = int(rng.integers(0, length - size + 1))
            return start, segments, np.zeros(len(segments), bool)
        for _ in range(TRIALS):
            start = int(rng.integers(0, length - size + 1))
            clipped, overlap = clip_segments(segments, start, start + size)
            kept = overlap >= self.min_overlap
            if kept.any():
                return start, clipped, kept
        # The published code goes on with the last trial and no segment at all. A segment longer than the stretch
        # would never be learnt from: aim at one instead, and keep what the stretch shows of it.
        candidates = np.flatnonzero(inside > 0)
        chosen = int(candidates[int(rng.integers(0, len(candidates)))])
        begin, end = sorted((segments[chosen, 0], segments[chosen, 1] - size))
        low = int(np.clip(np.ceil(begin), 0, length - size))
        high = max(int(np.clip(np.floor(end), 0, length - size)), low)
        start = int(rng.integers(low, high + 1))
        clipped, overlap = clip_segments(segments, start, start + size)
        kept = overlap >= self.min_overlap
        kept[chosen] = True
        return start, clipped, kept


def clip_segments(
    segments: np.ndarray, start: float | np.ndarray, end: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the segments (N, 2) clipped to [start, end], and the part of each one's length that lies inside (N,).

    A segment without length has no part inside. Columns (W, 1) of starts and ends give (W, N, 2) and (W, N).
    """
    clipped = np.stack([np.maximum(segments[:, 0], start), np.minimum(segments[:, 1], end)], axis=-1)
    length = np.broadcast_to(segments[:, 1] - segments[:, 0], clipped.shape[:-1])
    inside = np.clip(clipped[..., 1] - clipped[..., 0], 0, None)
    return clipped, np.divide(inside, length, out=np.zeros_like(inside), where=length > 0)


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(StridedPolicy):
    """Windows of T snippets, each overlapping the one before by `overlap` of its length; together the whole video.

    The last window is moved back to end with the video; a video shorter than a window is filled. A window's targets are
    the segments with more than `min_overlap` of their length in it, clipped to it; `require_segment` leaves out windows
    without one (training).
    """

    overlap: float
    min_overlap: float = 0.75
    require_segment: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.overlap < 1 or self.step < 1:
            raise ConfigError(
                f"overlap = {self.overlap} leaves no step between windows of {self.num_snippets} snippets; "
                "it must lie in [0, 1) with num_snippets * (1 - overlap) >= 1."
            )
        if not 0 <= self.min_overlap < 1:
            raise ConfigError(f"min_overlap = {self.min_overlap} must lie in [0, 1).")

    @property
    def step(self) -> int:
        """Snippets from one window to the next."""
        return int(self.num_snippets * (1 - self.overlap))

    def snippet_ranges(self, num_frames: int) -> list[tuple[int, int]]:
        """Return first and last + 1 of every window's snippets.

        The published code stops after `snippets // step` windows, which loses the end of a video at overlaps below a
        half and lists its last window twice where the steps come out even; here windows run to the end, each once.
        """
        total = -(-num_frames // self.snippet_stride)
        starts = range(0, max(total - self.num_snippets, 0), self.step)
        last = max(total - self.num_snippets, 0)
        return [(s, s + self.num_snippets) for s in starts] + [(last, total)]

    def num_windows(self, record: VideoRecord, total_frames: int | None = None) -> int:
        """Return how many windows cover the video, or hold a segment if that is required."""
        return len(self.layout(record, total_frames)[0])

    def _sample(self, record: VideoRecord, total_frames: int, index: int, rng: RandomSource | None) -> Sample:
        ranges, segments, kept = (array[index] for array in self.layout(record, total_frames))
        first, last = (ranges * self.frames_per_snippet).tolist()
        frames, valid = self.frames(record, total_frames, first, last)
        grid = self.grid(record, frame_rate(record, total_frames), first)
        return Sample(frames, valid, segments[kept], record.labels[kept], grid)

    def layout(self, record: VideoRecord, total_frames: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the W windows that count and what the N segments are in them.

        First and last + 1 snippet (W, 2); the segments clipped, in snippets of the window (W, N, 2); which of them
        count in it (W, N).

        Raises:
            DataError: neither the annotation nor `total_frames` tells the number of frames.
        """
        num_frames = annotated_frames(record) or total_frames
        if not num_frames:
            raise DataError(
                f"Video {record.video_id!r}: its annotation gives neither frames nor fps, so its windows are unknown "
                "until the video is opened; pass total_frames."
            )
        segments = (record.segments_sec * frame_rate(record, num_frames)).astype(np.float32).astype(np.float64)
        ranges = np.array(self.snippet_ranges(num_frames))
        # targets end at the last snippet's first frame, as published: one stride before the window does
        start, end = ranges[:, :1] * self.snippet_stride, (ranges[:, 1:] - 1) * self.snippet_stride
        clipped, inside = clip_segments(segments, start, end)
        kept = inside > self.min_overlap
        in_window = (clipped - start[..., None] - self.offset_frames) / self.snippet_stride
        if not self.require_segment:
            return ranges, in_window, kept
        count = kept.any(axis=1)
        return ranges[count], in_window[count], kept[count]


POLICIES = Registry(
    "sampling policy",
    {"resize": Resize, "random_trunc": RandomTrunc, "sliding_window": SlidingWindow, "padding": Padding},
)
