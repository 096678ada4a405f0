"""Sampling policies: which frames, which targets, on which line."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from re2tal_jax.config import build
from re2tal_jax.data.sampling import (
    POLICIES,
    Padding,
    Policy,
    RandomTrunc,
    Resize,
    SlidingWindow,
    clip_segments,
    spread_frames,
)
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.segments import to_seconds
from re2tal_jax.types import VideoRecord
from tests.parity import data as golden

FPS = 10.0
properties = settings(max_examples=60, deadline=None)


def video(*segments: tuple[float, float], frames: int | None = 100, duration: float | None = None) -> VideoRecord:
    """A video of 10 frames a second, segments in seconds labelled 0, 1, 2 …"""
    return VideoRecord(
        video_id="v",
        subset="training",
        duration_sec=duration if duration is not None else (frames or 100) / FPS,
        num_frames=frames,
        fps=None if frames is None else FPS,
        segments_sec=np.array(segments, np.float64).reshape(-1, 2),
        labels=np.arange(len(segments)),
    )


@st.composite
def videos(draw: st.DrawFn, *, least: int = 0) -> VideoRecord:
    frames = draw(st.integers(1, 400))
    ends = st.tuples(st.integers(0, frames - 1), st.integers(1, frames)).filter(lambda s: s[0] < s[1])
    segments = draw(st.lists(ends, min_size=least, max_size=4))
    return video(*[(a / FPS, b / FPS) for a, b in segments], frames=frames)


STRIDED = {
    "num_snippets": st.integers(1, 40),
    "frames_per_snippet": st.integers(1, 5),
    "snippet_stride": st.integers(1, 9),
}


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    sizes = {name: draw(values) for name, values in STRIDED.items()}
    kind = draw(st.sampled_from(["resize", "random_trunc", "crop", "sliding_window"]))
    if kind == "resize":
        return Resize(num_snippets=sizes["num_snippets"], frames_per_snippet=sizes["frames_per_snippet"])
    if kind == "sliding_window":
        return SlidingWindow(**sizes, overlap=draw(st.sampled_from([0.0, 0.5 if sizes["num_snippets"] > 1 else 0.0])))
    return RandomTrunc(**sizes, crop_ratio=(0.3, 0.9) if kind == "crop" else None)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_resize_takes_centres_rounded_to_even():
    # 8 frames in 4 parts: centres 0.5, 2.5, 4.5, 6.5
    assert spread_frames(8, 4).tolist() == [0, 2, 4, 6]
    # fewer frames than wanted: every frame is repeated
    assert spread_frames(2, 4).tolist() == [0, 0, 1, 1]


def test_resize_maps_seconds_to_snippets_and_clips():
    window = Resize(num_snippets=20, frames_per_snippet=2).window(video((1, 4), (9, 12)), 100)
    np.testing.assert_allclose(window.gt_segments, [[2, 8], [18, 20]], rtol=1e-6)
    assert window.frame_indices.shape == (40,)
    assert window.num_valid_snippets == window.num_snippets == 20
    assert (window.grid.start_sec, window.grid.seconds_per_snippet) == (0.0, 0.5)


@pytest.mark.parametrize(("total", "count"), [(8189, 768), (16375, 768), (57, 400), (69, 400), (113, 400)])
def test_resize_gives_as_many_frames_as_asked(total: int, count: int):
    """Lengths at which the published code stops with one frame too many."""
    frames = spread_frames(total, count)
    assert len(frames) == count
    assert frames[-1] <= total - 1


def test_windows_overlap_by_half_and_the_last_moves_back():
    policy = SlidingWindow(num_snippets=4, snippet_stride=1, overlap=0.5)
    assert policy.snippet_ranges(9) == [(0, 4), (2, 6), (4, 8), (5, 9)]


def test_no_window_comes_twice():
    """8 // 2 = 4 windows in the published code, the third and the fourth the same."""
    assert SlidingWindow(num_snippets=4, snippet_stride=1, overlap=0.5).snippet_ranges(8) == [(0, 4), (2, 6), (4, 8)]


def test_the_end_of_a_video_has_a_window_at_any_overlap():
    """10 // 4 = 2 windows in the published code, frames 8 and 9 in none."""
    assert SlidingWindow(num_snippets=4, snippet_stride=1, overlap=0.0).snippet_ranges(10) == [(0, 4), (4, 8), (6, 10)]


def test_a_window_keeps_what_is_mostly_inside():
    policy = SlidingWindow(num_snippets=10, frames_per_snippet=2, snippet_stride=2, overlap=0.5, min_overlap=0.5)
    record = video((0.2, 0.6), (1.0, 2.4), (1.6, 3.0), frames=40)
    assert policy.num_windows(record) == 3
    first = policy.window(record, 40, 0)  # frames 0..19, targets up to the last snippet's first frame, 18
    np.testing.assert_allclose(first.gt_segments, [[1, 3], [5, 9]])
    assert first.gt_labels.tolist() == [0, 1]
    second = policy.window(record, 40, 1)  # frames 10..29
    assert second.frame_indices.tolist() == list(range(10, 30))
    np.testing.assert_allclose(second.gt_segments, [[0, 7], [3, 9]])
    assert second.grid.start_sec == 1.0


def test_training_windows_hold_a_segment():
    options = {"num_snippets": 4, "snippet_stride": 5, "overlap": 0.0}
    record = video((0.1, 1.0))
    assert SlidingWindow(**options).num_windows(record) == 5
    assert SlidingWindow(**options, require_segment=True).num_windows(record) == 1


def test_a_short_video_is_filled_with_its_last_frame_and_masked():
    record = video((0, 0.5), frames=7)
    for policy in (
        SlidingWindow(num_snippets=5, frames_per_snippet=2, snippet_stride=2, overlap=0.5),
        Padding(num_snippets=5, frames_per_snippet=2, snippet_stride=2),
    ):
        window = policy.window(record, 7)
        assert window.frame_indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6, 6]
        assert window.num_valid_snippets == 3  # the snippet of frame 6 alone is not whole


def test_a_video_of_one_frame_is_one_snippet():
    window = Padding(num_snippets=4, frames_per_snippet=4, snippet_stride=4).window(video(frames=1), 1)
    assert window.frame_indices.tolist() == [0] * 16
    assert window.num_valid_snippets == 1


def test_padding_refuses_a_video_that_does_not_fit():
    with pytest.raises(DataError, match=r"'v' has 25 snippets, more than num_snippets = 20"):
        Padding(num_snippets=20, snippet_stride=4).window(video(), 100)


def test_an_offset_moves_seconds_not_frames():
    options = {"num_snippets": 25, "snippet_stride": 4}
    plain, moved = (Padding(**options, offset_frames=n).window(video((2, 4)), 100) for n in (0, 8))
    assert np.array_equal(plain.frame_indices, moved.frame_indices)
    np.testing.assert_allclose(moved.gt_segments, plain.gt_segments - 2)
    np.testing.assert_allclose(to_seconds(moved.gt_segments, moved.grid), [[2, 4]])


def test_a_stride_need_not_be_a_multiple_of_the_frames_per_snippet():
    window = Padding(num_snippets=3, frames_per_snippet=3, snippet_stride=4).window(video(frames=12), 12)
    assert window.frame_indices.tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 11]  # 0, 4/3, 8/3, 4, …
    assert window.num_valid_snippets == 3


def test_the_annotation_ties_seconds_to_frames_and_the_decoder_says_which_there_are():
    record = video((2.0, 4.0), frames=100)
    window = Padding(num_snippets=120, snippet_stride=1).window(record, 97)
    np.testing.assert_allclose(window.gt_segments, [[20, 40]])
    assert window.frame_indices.max() == 96
    assert window.num_valid_snippets == 97


def test_clipping_tells_the_part_inside():
    clipped, inside = clip_segments(np.array([[0.0, 4], [3, 5], [8, 9], [2, 2]]), 2, 4)
    assert clipped[:2].tolist() == [[2, 4], [3, 4]]
    assert inside.tolist() == [0.5, 0.5, 0, 0]


# --- random truncation -----------------------------------------------------------------------------------------------


@properties
@given(videos(least=1), st.sampled_from([None, (0.3, 0.9), (0.9, 1.0)]), st.integers(0, 2**32), st.data())
def test_random_trunc_always_keeps_a_segment(record, crop, seed, data):
    sizes = {name: data.draw(values) for name, values in STRIDED.items()}
    policy = RandomTrunc(**sizes, crop_ratio=crop)
    window = policy.window(record, record.num_frames, rng=np.random.default_rng(seed))
    assert len(window.gt_segments) == len(window.gt_labels) > 0
    assert (window.gt_segments[:, 1] > window.gt_segments[:, 0]).all()


def test_a_segment_longer_than_the_window_is_still_seen():
    """The published code goes on without any target after 200 trials."""
    policy = RandomTrunc(num_snippets=10, snippet_stride=1)
    for seed in range(5):
        window = policy.window(video((2.0, 8.0)), 100, rng=np.random.default_rng(seed))
        assert window.gt_segments.tolist() == [[0, 10]]


def test_a_video_without_segments_gives_a_window_without():
    window = RandomTrunc(num_snippets=10, snippet_stride=1).window(video(), 100, rng=np.random.default_rng(0))
    assert window.gt_segments.shape == (0, 2)
    assert window.num_valid_snippets == 10


def test_random_trunc_starts_at_any_frame():
    policy = RandomTrunc(num_snippets=8, frames_per_snippet=4, snippet_stride=4)
    record = video((0.0, 10.0))
    windows = [policy.window(record, 100, rng=np.random.default_rng(seed)) for seed in range(40)]
    assert {window.frame_indices[0] % 4 for window in windows} == {0, 1, 2, 3}


def test_crop_ratio_shortens_only_what_fits():
    policy = RandomTrunc(num_snippets=50, snippet_stride=1, crop_ratio=(0.5, 0.6))
    record = video((0, 4), frames=40)
    valid = {policy.window(record, 40, rng=np.random.default_rng(s)).num_valid_snippets for s in range(30)}
    assert valid <= set(range(20, 25))
    assert len(valid) > 1
    assert policy.window(video((0, 4)), 100, rng=np.random.default_rng(0)).num_valid_snippets == 50


def test_random_trunc_is_a_function_of_its_generator():
    policy, record = RandomTrunc(num_snippets=10, snippet_stride=1), video((0.0, 10.0))
    a, b, c = (policy.window(record, 100, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(a.frame_indices, b.frame_indices)
    assert np.array_equal(a.gt_segments, b.gt_segments)
    assert not np.array_equal(a.frame_indices, c.frame_indices)


def test_random_trunc_needs_a_generator():
    with pytest.raises(ConfigError, match="needs a random generator"):
        RandomTrunc(num_snippets=10, snippet_stride=1).window(video((0, 1)), 100)


# --- properties of all -----------------------------------------------------------------------------------------------


@properties
@given(videos(), policies(), st.integers(-3, 3), st.integers(0, 2**32))
def test_every_window_asks_for_frames_that_are_there(record, policy, difference, seed):
    total = max(1, record.num_frames + difference)
    index = policy.num_windows(record) - 1
    try:
        window = policy.window(record, total, index, rng=np.random.default_rng(seed))
    except DataError:
        assert difference < 0  # a decoder that ends before the last window starts
        return
    scale = policy.frames_per_snippet
    assert window.frame_indices.dtype == np.int64
    assert window.frame_indices.shape == (policy.num_snippets * scale,)
    assert window.frame_indices.min() >= 0
    assert window.frame_indices.max() < total
    assert (np.diff(window.frame_indices) >= 0).all()
    assert 1 <= window.num_valid_snippets <= window.num_snippets == policy.num_snippets
    assert len(set(window.frame_indices[window.num_valid_snippets * scale :][scale:].tolist())) <= 1  # the last frame
    assert window.gt_segments.dtype == np.float32
    assert window.gt_labels.dtype == np.int32
    assert window.gt_segments.shape == (len(window.gt_labels), 2)


@properties
@given(videos(), st.integers(1, 20), st.integers(1, 6), st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.75]))
def test_windows_cover_every_frame(record, size, stride, overlap):
    assume(int(size * (1 - overlap)) >= 1)
    policy = SlidingWindow(num_snippets=size, frames_per_snippet=stride, snippet_stride=stride, overlap=overlap)
    windows = [policy.window(record, record.num_frames, i) for i in range(policy.num_windows(record))]
    assert set(np.concatenate([w.frame_indices for w in windows]).tolist()) == set(range(record.num_frames))
    starts = [w.grid.start_sec for w in windows]
    assert starts == sorted(set(starts))


@properties
@given(videos(least=1), policies(), st.integers(0, 2**32))
def test_targets_come_back_as_seconds(record, policy, seed):
    index = policy.num_windows(record) - 1
    window = policy.window(record, record.num_frames, index, rng=np.random.default_rng(seed))
    back = to_seconds(window.gt_segments, window.grid, clamp=False)
    for (start, end), label in zip(back, window.gt_labels, strict=True):
        wanted_start, wanted_end = record.segments_sec[label]
        if isinstance(policy, Resize):
            np.testing.assert_allclose([start, end], [wanted_start, wanted_end], atol=1e-4)
        else:  # perhaps clipped to the window, never beyond the segment
            assert wanted_start - 1e-4 <= start < end <= wanted_end + 1e-4


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resize", {"num_snippets": 0}, r"num_snippets = 0 is too small; at least 1"),
        ("resize", {"num_snippets": 4, "frames_per_snippet": 0}, r"frames_per_snippet = 0 is too small"),
        ("padding", {"num_snippets": 4, "snippet_stride": 0}, r"snippet_stride = 0 is too small"),
        ("padding", {"num_snippets": 4, "snippet_stride": 1, "offset_frames": -1}, r"offset_frames = -1 is too small"),
        ("random_trunc", {"num_snippets": 4, "snippet_stride": 1, "min_overlap": 0.0}, r"min_overlap = 0.0 must lie"),
        (
            "random_trunc",
            {"num_snippets": 4, "snippet_stride": 1, "crop_ratio": (0.9, 0.5)},
            r"crop_ratio = \(0.9, 0.5\) must be \(low, high\)",
        ),
        ("sliding_window", {"num_snippets": 4, "snippet_stride": 1, "overlap": 1.0}, r"overlap = 1.0 leaves no step"),
        ("sliding_window", {"num_snippets": 4, "snippet_stride": 1, "overlap": 0.9}, r"overlap = 0.9 leaves no step"),
        (
            "sliding_window",
            {"num_snippets": 4, "snippet_stride": 1, "overlap": 0.5, "min_overlap": 1.0},
            r"min_overlap = 1.0 must lie in \[0, 1\)",
        ),
        ("sliding_window", {"num_snippets": 4, "snippet_stride": 1, "overlap": 0.5, "stride": 2}, r"Unknown key"),
    ],
)
def test_impossible_settings_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build(POLICIES[name], options, path="config.data.sampling")


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Unknown sampling policy 'sliding'. Did you mean 'sliding_window'"):
        POLICIES["sliding"]


def test_a_video_without_frames_is_refused():
    with pytest.raises(DataError, match="Video 'v' has 0 frames"):
        Resize(num_snippets=4).window(video(), 0)


def test_a_truncated_file_is_named():
    policy = SlidingWindow(num_snippets=10, snippet_stride=1, overlap=0.5)
    with pytest.raises(DataError, match=r"'v' has 30 frames, but its annotation puts a window at frame 90"):
        policy.window(video(), 30, policy.num_windows(video()) - 1)


def test_windows_of_a_video_of_unknown_length_need_the_decoder():
    policy, record = SlidingWindow(num_snippets=10, snippet_stride=1, overlap=0.5), video(frames=None)
    with pytest.raises(DataError, match="gives neither frames nor fps"):
        policy.num_windows(record)
    assert policy.num_windows(record, 30) == 5
    assert policy.window(record, 30, 4).grid.seconds_per_snippet == pytest.approx(10 / 30)


# --- golden ----------------------------------------------------------------------------------------------------------


def test_published_items_are_met():
    """Items of the published data sets, its order of random draws included; all of them by `python -m tests.parity`."""
    rows = list(golden.replay(Path(__file__).parent / "golden" / "data", None))
    assert len(rows) > 150
    assert [row for row in rows if not row.passed] == []


def test_all_published_items_are_met(parity_dir):
    rows = list(golden.replay(parity_dir / "data", None))
    assert len(rows) > 1200
    assert [row for row in rows if not row.passed] == []
