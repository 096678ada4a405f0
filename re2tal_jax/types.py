"""The data classes that layers hand to each other. Shapes: B batch, F raw frames, T snippets, N segments, K classes."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAINT = 0.1
"""`Detections.plot` leaves out what scores less than this share of the best score."""


@dataclass(frozen=True, kw_only=True)
class VideoRecord:
    """One video of an annotation file: where it is, how long it lasts, and when actions happen in it.

    `segments_sec` is (N, 2) float64 start and end; `labels` is (N,) int64 into the data set's class list.
    `num_frames` and `fps` come from the annotation and are None where it does not say.
    """

    video_id: str
    subset: str
    duration_sec: float
    num_frames: int | None
    fps: float | None
    segments_sec: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SnippetGrid:
    """The line on which a window's snippets lie: seconds = start_sec + snippets * seconds_per_snippet.

    A video resized to T snippets has start 0 and seconds_per_snippet duration/T; a window of a sliding policy
    starts at (start_frame + offset_frames)/fps and has seconds_per_snippet = snippet_stride/fps.
    """

    start_sec: float
    seconds_per_snippet: float
    duration_sec: float


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a sampling policy asks of one video: which frames, how many snippets are real, and the targets in them.

    `frame_indices` (F,) int64, F = T * frames_per_snippet; `gt_segments` (N, 2) float32 in snippets of this window;
    `gt_labels` (N,) int32.
    """

    video_id: str
    frame_indices: np.ndarray
    num_snippets: int
    num_valid_snippets: int
    gt_segments: np.ndarray
    gt_labels: np.ndarray
    grid: SnippetGrid


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step consumes; every leaf has the batch axis first, so one sharding rule fits all.

    `video` is frames as stored, or, of a data set of features, one feature a snippet; `frame_size` is 0 then.
    `frame_size` is the source's (height, width) in pixels: stored frames may be squeezed to a common size, and crops
    are drawn in the source's geometry. `gt_*` are padded to a common N; `gt_mask` tells which are real.
    `window` numbers the windows of a pass (-1: padding to fill the last batch), so that the host finds their records.
    """

    video: UInt8[Array, "B F H W 3"] | Float[Array, "B T C"]
    frame_size: Float[Array, "B 2"]
    mask: Bool[Array, "B T"]
    gt_segments: Float[Array, "B N 2"]
    gt_labels: Int[Array, "B N"]
    gt_mask: Bool[Array, "B N"]
    window: Int[Array, " B"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Detections:
    """Detections of a video, best first: segments (N, 2) in seconds, labels (N,) class names, scores (N,) in [0, 1]."""

    segments_sec: np.ndarray
    labels: tuple[str, ...]
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        if not len(self):
            return "Detections(none)"
        (start, end), label = self.segments_sec[0].tolist(), self.labels[0]
        return f"Detections({len(self)}, the best {label!r} {start:g}-{end:g} s, score {self.scores[0]:.3g})"

    def to_json(self) -> str:
        """Return ActivityNet's entries, best first: [{"segment": [start, end], "label": name, "score": number}, …].

        Raises:
            ValueError: a start, end or score that is not finite.
        """
        entries = zip(self.segments_sec.tolist(), self.labels, self.scores.tolist(), strict=True)
        found = [{"segment": segment, "label": label, "score": score} for segment, label, score in entries]
        return json.dumps(found, allow_nan=False)

    def plot(self, *, min_score: float | None = None, duration_sec: float | None = None) -> "Figure":
        """Draw the detections on a time line, a row for each class, the best class on top; opacity is the score.

        Args:
            min_score: what scores less is left out; None: what scores less than a tenth of the best. A detector keeps
                hundreds of faint detections in a video, which mAP counts and nobody can tell apart in a picture.
            duration_sec: where the line ends; None ends it with the last detection that is drawn.
        """
        from matplotlib import colormaps, rc_context  # where nothing is drawn nothing of it is needed
        from matplotlib.figure import Figure

        floor = FAINT * max(self.scores, default=0.0) if min_score is None else min_score
        shown = [
            (start, stop, label, score)
            for (start, stop), label, score in zip(
                self.segments_sec.tolist(), self.labels, self.scores.tolist(), strict=True
            )
            if score >= floor
        ]
        rows = {label: row for row, label in enumerate(dict.fromkeys(label for *_, label, _ in shown))}
        end = max((stop for _, stop, *_ in shown), default=1.0) if duration_sec is None else duration_sec
        with rc_context({"text.parse_math": False}):  # "$" in a name starts no formula
            figure = Figure(figsize=(10, 1 + 0.35 * max(len(rows), 1)), layout="constrained")
            axes = figure.add_subplot()
            for start, stop, label, score in reversed(shown):
                color, opacity = colormaps["tab10"](rows[label] % 10), min(max(score, 0.02), 1.0)
                axes.barh(rows[label], stop - start, left=start, height=0.8, color=color, alpha=opacity)
            axes.set(xlim=(0, end), ylim=(max(len(rows), 1) - 0.5, -0.5), xlabel="seconds (opacity: score)")
            axes.set_yticks(range(len(rows)), list(rows))
        return figure
