"""What an annotation tells about a data set: bad segments, doubled ones, rare classes, lengths beside the windows.

Segments are looked at as the file has them, before anything is set right or left out. Every function yields problems.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from re2tal_jax.data.check.problems import Problem, problem, share
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.findings import counted
from re2tal_jax.data.sampling import Padding, Policy, SlidingWindow, StridedPolicy

FEW = 10
"""Instances for training, below which a class is called rare."""

ROUNDING_SEC = 1.0
"""Seconds by which segments may end after their video without a warning."""

SAME = 0.9
"""tIoU from which two segments of one label are taken for the same one, annotated twice."""

ROUNDED = 0.98
"""tIoU above which they are taken for one segment that was written down twice: times differ by rounding."""

MANY_SHORT = 0.05
"""Share of segments shorter than a snippet from which it is a warning."""


_EPSILON = 1e-6  # a segment of exactly one snippet is often a little less in floats


class Segment(NamedTuple):
    """A segment as the file has it."""

    video_id: str
    start: float
    end: float
    label: str

    def __str__(self) -> str:
        return f"{self.video_id} {_shown(self.start)}-{_shown(self.end)} s ({self.label})"


@dataclass(frozen=True, kw_only=True)
class Subset:
    """What a section of the config (train, eval) reads: its subset of the data set, and how windows are made of it.

    `rates` are the frames per second of each video, by the annotation or else by its file, where either is known.
    """

    section: str
    name: str
    dataset: Dataset
    policy: Policy
    rates: Mapping[str, float]

    @cached_property
    def videos(self) -> Mapping[str, Any]:
        """The subset's videos in ActivityNet form, as the file has them."""
        return self.dataset.ground_truth["database"]

    @cached_property
    def segments(self) -> list[Segment]:
        """Every finite segment, in the order of the file."""
        return [
            Segment(name, start, end, annotation["label"])
            for name, video in self.videos.items()
            for annotation in video["annotations"]
            for start, end in [annotation["segment"]]
        ]

    @cached_property
    def usable(self) -> list[Segment]:
        """The segments with a length that lie in their video, at least in part."""
        return [s for s in self.segments if s.end > s.start and s.end > 0 and s.start < self.duration_sec(s.video_id)]

    def length_sec(self, segment: Segment) -> float:
        """Return how long a usable segment is in its video, which cuts it off at both ends."""
        return min(segment.end, self.duration_sec(segment.video_id)) - max(segment.start, 0.0)

    def duration_sec(self, video_id: str) -> float:
        """Return how long the annotation says that a video is."""
        return self.videos[video_id]["duration"]


def annotation_problems(subsets: Sequence[Subset], *, min_length_ratio: float) -> Iterator[Problem]:
    """Yield what is wrong in the annotations of the subsets, those of training first."""
    for subset in {subset.name: subset for subset in subsets}.values():
        yield from _bad_segments(subset)
        yield from _doubled_segments(subset)
        yield from _without_segments(subset)
    for subset in subsets:
        yield from _beside_the_windows(subset)
    train, evaluation = subsets
    yield from _left_out_of_training(train, min_length_ratio)
    yield from _in_both(train, evaluation)
    yield from _classes(train, evaluation)


def _bad_segments(subset: Subset) -> Iterator[Problem]:
    defects: dict[str, tuple[Callable[[Segment], bool], tuple[str, str], str]] = {
        "reversed": (lambda s: s.end < s.start, ("ends before it starts", "end before they start"), "left out"),
        "zero_length": (lambda s: s.end == s.start, ("has no length", "have no length"), "left out"),
        "outside": (
            lambda s: s.end > s.start and (s.end <= 0 or s.start >= subset.duration_sec(s.video_id)),
            ("lies outside its video", "lie outside their video"),
            "left out",
        ),
        "negative_start": (lambda s: s.start < 0 < s.end, ("starts before 0", "start before 0"), "moved to start at 0"),
    }
    findings = subset.dataset.findings
    yield from problem(
        "warning",
        "not_finite",
        findings.examples.get("not_finite", []),
        f"{subset.name}: {counted(findings['not_finite'], 'segment has', 'segments have')} a NaN or infinite time; "
        "left out.",
        "Correct them in the annotation.",
        count=findings["not_finite"],
    )
    for code, (has, verbs, then) in defects.items():
        found = [segment for segment in subset.segments if has(segment)]
        yield from problem(
            "warning",
            code,
            [_told(segment, subset) if code == "outside" else str(segment) for segment in found],
            f"{subset.name}: {share(found, subset.segments, 'segments', *verbs)}; {then}.",
            "Correct them, or the durations, in the annotation." if code == "outside" else "Correct them.",
        )
    yield from _past_end(subset)
    ignored = findings["ignored_label"]
    yield from problem(
        "note",
        "ignored_label",
        [],
        f"{subset.name}: {counted(ignored, 'segment has', 'segments have')} a label that is left out.",
        count=ignored,
    )


def _past_end(subset: Subset) -> Iterator[Problem]:
    found = [s for s in subset.usable if s.end > subset.duration_sec(s.video_id)]
    excess = {segment: segment.end - subset.duration_sec(segment.video_id) for segment in found}
    found.sort(key=excess.__getitem__, reverse=True)
    most = max(excess.values(), default=0.0)
    yield from problem(
        "warning" if most > ROUNDING_SEC else "note",
        "past_end",
        [_told(segment, subset) for segment in found],
        f"{subset.name}: {share(found, subset.segments, 'segments', 'ends after its video', 'end after their video')}, "
        f"by {_shown(most)} s at most; cut off there.",
        "Correct them, or the durations, in the annotation." if most > ROUNDING_SEC else "",
    )


def _told(segment: Segment, subset: Subset) -> str:
    return f"{segment} of {_shown(subset.duration_sec(segment.video_id))} s"


def _shown(seconds: float) -> str:
    return f"{seconds:.3f}".rstrip("0").rstrip(".")


def _doubled_segments(subset: Subset) -> Iterator[Problem]:
    """Compare the segments of each video and label; those that start together or overlap stand near each other."""
    groups: defaultdict[tuple[str, str], list[Segment]] = defaultdict(list)
    for segment in subset.usable:
        groups[segment.video_id, segment.label].append(segment)
    equal, rounded, near = [], [], []
    for segments in groups.values():
        segments.sort()
        for i, first in enumerate(segments):
            second = _same(first, segments[i + 1 :])
            if second is None:
                continue
            both = f"{first} and {_shown(second.start)}-{_shown(second.end)} s"
            if first == second:
                equal.append(str(second))
            elif _tiou(first, second) > ROUNDED:
                rounded.append(both)
            else:
                near.append(both)
    found = len(equal) + len(rounded)
    yield from problem(
        "warning",
        "duplicate",
        [*equal, *rounded],
        f"{subset.name}: {counted(found, 'segment is', 'segments are')} in the file twice, with one label"
        + (
            f", {len(rounded)} of them with times that differ by rounding, which count twice."
            if rounded
            else "; one of each counts."
        ),
        "Remove the second.",
    )
    yield from problem(
        "warning",
        "overlapping_duplicate",
        near,
        f"{subset.name}: {counted(len(near), 'segment overlaps', 'segments overlap')} another of the same label with a "
        f"tIoU of {SAME} or more.",
        "If two annotators marked the same action, keep one: the evaluation counts the other as missed.",
    )


def _same(segment: Segment, later: Sequence[Segment]) -> Segment | None:
    """Return the first of the later segments, ordered by their start, that is taken for the same, or None."""
    for other in later:
        if other.start >= segment.end:
            return None
        if _tiou(segment, other) >= SAME:
            return other
    return None


def _tiou(first: Segment, second: Segment) -> float:
    inside = min(first.end, second.end) - max(first.start, second.start)
    return inside / (max(first.end, second.end) - min(first.start, second.start))


def _without_segments(subset: Subset) -> Iterator[Problem]:
    with_segments = {segment.video_id for segment in subset.usable}
    found = [name for name in subset.videos if name not in with_segments]
    yield from problem(
        "note",
        "video_without_segments",
        found,
        f"{subset.name}: {share(found, subset.videos, 'videos', 'has', 'have')} no segment that can be used"
        + ("; left out in training." if subset.section == "train" else "."),
    )


def _left_out_of_training(train: Subset, min_length_ratio: float) -> Iterator[Problem]:
    found = [s for s in train.usable if train.length_sec(s) / train.duration_sec(s.video_id) <= min_length_ratio]
    yield from problem(
        "note",
        "too_short",
        list(map(str, found)),
        f"{train.name}: {counted(len(found), 'segment is', 'segments are')} at most {min_length_ratio:g} of the video; "
        "left out in training (config.data.min_length_ratio).",
    )


# --- lengths beside the windows --------------------------------------------------------------------------------------


def snippet_sec(policy: Policy, duration_sec: float, fps: float | None) -> float | None:
    """Return the seconds between two snippets of a video, or None where a strided policy meets no known frame rate."""
    if isinstance(policy, StridedPolicy):
        return None if fps is None else policy.snippet_stride / fps
    return duration_sec / policy.num_snippets


def _beside_the_windows(subset: Subset) -> Iterator[Problem]:
    """Compare the lengths of segments and videos with a snippet and a window of the policy."""
    policy = subset.policy
    snippets = {name: snippet_sec(policy, subset.duration_sec(name), subset.rates.get(name)) for name in subset.videos}
    lengths = [  # in snippets
        (segment, subset.length_sec(segment) / step)
        for segment in subset.usable
        if (step := snippets.get(segment.video_id))
    ]
    yield from _shorter_than_a_snippet(subset, lengths)
    if not isinstance(policy, StridedPolicy):
        return
    unknown = [name for name, step in snippets.items() if step is None]
    yield from problem(
        "note",
        "rate_unknown",
        unknown,
        f"{subset.name}: the annotation tells no frame rate of {len(unknown)} of {len(subset.videos)} videos, so their "
        "segments were not compared with windows and snippets.",
        "Give the data set videos that can be read (config.data.videos), or say the rate (config.data.fps).",
    )
    yield from _longer_than_a_window(subset, lengths)
    windows = {name: policy.num_snippets * step for name, step in snippets.items() if step is not None}
    if not windows:
        return
    section = f"config.{subset.section}.policy"
    if isinstance(policy, Padding):
        found = [name for name, window in windows.items() if subset.duration_sec(name) > window + _EPSILON]
        yield from problem(
            "error",
            "longer_than_padding",
            found,
            f"{subset.name}: {share(found, windows, 'videos', 'is', 'are')} longer than the window of `padding`.",
            f"Raise config.num_snippets or {section}.snippet_stride, or use sliding_window.",
        )
        return
    found = [name for name, window in windows.items() if subset.duration_sec(name) < window - _EPSILON]
    yield from problem(
        "note",
        "shorter_than_window",
        found,
        f"{subset.name}: {share(found, windows, 'videos', 'is', 'are')} shorter than a window "
        f"({_span(list(windows.values()))}); the rest of it is filled.",
        f"If these are most of them, a lower {section}.snippet_stride or config.num_snippets wastes less."
        if len(found) > len(windows) / 2
        else "",
    )


def _shorter_than_a_snippet(subset: Subset, lengths: list[tuple[Segment, float]]) -> Iterator[Problem]:
    found = [segment for segment, length in lengths if length < 1 - _EPSILON]
    if not found:
        return
    part, policy = len(found) / len(lengths), subset.policy
    # In snippets; the lower of two neighbours, as all but 5 % are to be longer.
    short = max(float(np.quantile([length for _, length in lengths], MANY_SHORT, method="lower")), 1e-3)
    if isinstance(policy, StridedPolicy):
        stride = max(math.floor(policy.snippet_stride * short + _EPSILON), 1)
        advice = f"lower config.{subset.section}.policy.snippet_stride from {policy.snippet_stride} to {stride}"
        if stride == policy.snippet_stride:
            advice = "snippets cannot be closer than this: encode the videos at a higher frame rate"
    else:
        wanted = math.ceil(policy.num_snippets / short - _EPSILON)
        advice = (
            f"raise config.num_snippets from {policy.num_snippets} to {wanted}, or walk through the video in windows "
            "(random_trunc and sliding_window)"
        )
    yield from problem(
        "warning" if part >= MANY_SHORT else "note",
        "shorter_than_snippet",
        list(map(str, found)),
        f"{subset.name}: {share(found, lengths, 'segments', 'is', 'are')} shorter than a snippet of "
        f"config.{subset.section} ({part:.1%}); what falls between two points is hardly ever found.",
        f"For all but 5 % to have a snippet: {advice}." if part >= MANY_SHORT else "",
    )


def _longer_than_a_window(subset: Subset, lengths: list[tuple[Segment, float]]) -> Iterator[Problem]:
    policy = subset.policy
    found = [segment for segment, length in lengths if length > policy.num_snippets + _EPSILON]
    longest = max([length for _, length in lengths], default=0.0)
    seen = "no window shows the whole, and ends are learnt from parts"
    if isinstance(policy, SlidingWindow):
        seen = "no window shows the whole"
    yield from problem(
        "warning",
        "longer_than_window",
        list(map(str, found)),
        f"{subset.name}: {share(found, lengths, 'segments', 'is', 'are')} longer than a window of "
        f"config.{subset.section}; {seen}.",
        f"The longest needs {math.ceil(longest - _EPSILON)} snippets: raise config.num_snippets, or "
        f"config.{subset.section}.policy.snippet_stride.",
    )


def _span(seconds: list[float]) -> str:
    low, high = min(seconds), max(seconds)
    return f"{low:.0f} s" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f} s"


# --- subsets and classes ---------------------------------------------------------------------------------------------


def _in_both(train: Subset, evaluation: Subset) -> Iterator[Problem]:
    found = [name for name in train.videos if name in evaluation.videos]
    yield from problem(
        "error",
        "in_both_subsets",
        found,
        f"{counted(len(found), 'video is', 'videos are')} in both {train.name} and {evaluation.name}: the mAP would be "
        "of videos that were trained on.",
        "Choose subsets without common videos (config.train.subset, config.eval.subset).",
    )


def _classes(train: Subset, evaluation: Subset) -> Iterator[Problem]:
    classes = train.dataset.classes
    trained = Counter(segment.label for segment in train.usable)
    scored = Counter(segment.label for segment in evaluation.usable)
    nowhere = [name for name in classes if not trained[name] and not scored[name]]
    yield from problem(
        "warning",
        "class_without_segments",
        nowhere,
        f"{share(nowhere, classes, 'classes', 'has', 'have')} no segment in {train.name} and {evaluation.name}.",
        "Correct the class list, and lower config.num_classes.",
    )
    only_scored = [f"{name} ({scored[name]})" for name in classes if scored[name] and not trained[name]]
    yield from problem(
        "warning",
        "class_only_in_evaluation",
        only_scored,
        f"{share(only_scored, classes, 'classes', 'has', 'have')} segments in {evaluation.name} and none in "
        f"{train.name}: nothing can be learnt, and the AP is 0.",
        "Annotate some for training, or give each video its subset (of a CSV a column: training, validation) so that "
        "each class is in both.",
    )
    only_trained = [f"{name} ({trained[name]})" for name in classes if trained[name] and not scored[name]]
    yield from problem(
        "note",
        "class_not_in_evaluation",
        only_trained,
        f"{share(only_trained, classes, 'classes', 'has', 'have')} no segment in {evaluation.name}; not in the mAP.",
    )
    rare = [f"{name} ({trained[name]})" for name in classes if 0 < trained[name] < FEW]
    yield from problem(
        "warning",
        "rare_class",
        rare,
        f"{share(rare, classes, 'classes', 'has', 'have')} fewer than {FEW} segments in {train.name}.",
        "Annotate more, or join classes that are alike.",
    )
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[re.sub(r"[\s_-]+", "", name.casefold())].append(name)
    doubled = [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    yield from problem(
        "warning",
        "labels_alike",
        doubled,
        f"{counted(len(doubled), 'class is', 'classes are')} written in several ways.",
        "If they are one class, write its label the same everywhere.",
    )
