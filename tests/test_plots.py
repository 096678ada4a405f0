"""Figures of an evaluation: what is drawn, by numbers checked by hand."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from re2tal_jax.evaluation import DetectionMap, match_detections
from re2tal_jax.inference import plots
from re2tal_jax.inference.diagnosis import break_down
from re2tal_jax.inference.plots import MAX_CLASSES, MAX_VIDEOS, draw_classes, draw_timelines, draw_tiou


def scored(per_class, tious=(0.5,)):
    return DetectionMap(
        subset="validation",
        tiou_thresholds=tious,
        per_class={name: np.asarray(values) for name, values in per_class.items()},
        recall={},
        num_ground_truth=1,
        num_predictions=1,
        findings={},
    )


def video(duration, *annotations):
    return {
        "subset": "validation",
        "duration": duration,
        "annotations": [{"segment": [start, end], "label": label} for start, end, label in annotations],
    }


@pytest.fixture
def axes():
    return Figure().add_subplot()


def test_curve_has_the_map_of_every_threshold(axes):
    draw_tiou(axes, scored({"a": [0.8, 0.4], "b": [0.4, 0.0]}, tious=(0.3, 0.7)))
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0.3, 60.0], [0.7, 20.0]])


def test_classes_are_ordered_and_only_extremes_are_shown_of_many(axes):
    draw_classes(axes, scored({f"class {i}": [i / 100] for i in range(50)}))
    widths = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(widths, [*range(10), *range(40, 50)])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert (len(names), names[0], names[-1]) == (MAX_CLASSES, "class 0", "class 49")


def test_timelines_show_ground_truth_above_detections_in_percent_of_the_video(axes):
    videos = {"b": video(20.0, (5.0, 10.0, "x")), "a": video(10.0, (1.0, 3.0, "y")), "empty": video(9.0)}
    results = {"a": [{"segment": [2.0, 4.0], "label": "x", "score": 0.25}]}
    draw_timelines(axes, videos, results)
    bars = [(bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2, bar.get_alpha()) for bar in axes.patches]
    drawn = [bar for bar in bars if bar[1]]  # the others are entries of the legend
    np.testing.assert_allclose(drawn, [(10, 20, 0.18, 1.0), (20, 20, -0.18, 0.25), (25, 25, 1.18, 1.0)])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["x", "y"]


def test_timelines_of_many_videos_show_the_first_ones(axes):
    videos = {f"{i:02d}": video(10.0, (1.0, 3.0, "y")) for i in range(30)}
    draw_timelines(axes, videos, {})
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{i:02d}" for i in range(MAX_VIDEOS)]


TRUTH = {"database": {"v": video(100.0, (0, 10, "a"), (20, 22, "a"), (40, 50, "b$_$")), "w": video(10.0)}}
FOUND = {
    "v": [
        {"segment": [0, 10], "label": "a", "score": 0.9},
        {"segment": [60, 70], "label": "a", "score": 0.5},
        {"segment": [20, 22], "label": "a", "score": 0.4},
    ]
}


@pytest.fixture
def matching():
    return match_detections(TRUTH, {"results": FOUND}, subset="validation", tiou_thresholds=(0.3, 0.5))


def test_precision_over_recall_has_a_line_for_each_class_and_their_mean(matching):
    axes = plots.precision_recall(matching, 0.5).axes[0]
    of_a, of_b, mean = axes.lines
    np.testing.assert_allclose(of_a.get_xydata(), [[0, 100], [50, 100], [100, 200 / 3]])
    np.testing.assert_allclose(of_b.get_xydata(), [[0, 0]])
    np.testing.assert_allclose(mean.get_ydata()[[0, 50, 51, 100]], [50, 50, 100 / 3, 100 / 3])


def heights(axes):
    """The values of each stacked histogram, summed over its bins; bars carry what lies below them as their base."""
    return [sum(bar.get_height() for bar in container) for container in axes.containers]


def test_lengths_and_scores_count_every_segment_and_detection_once(matching):
    assert heights(plots.length_distribution(matching, 0.5).axes[0]) == [2, 1]
    assert heights(plots.score_distribution(matching, 0.5).axes[0]) == [2, 1]


def test_errors_show_the_profile_and_what_is_won(matching):
    profile, gains = plots.error_breakdown(break_down(matching)).axes
    first = [container[0].get_height() for container in profile.containers]
    np.testing.assert_allclose(first, [50, 0, 0, 0, 0, 50])
    won = dict(
        zip([t.get_text() for t in gains.get_yticklabels()], [b.get_width() for b in gains.patches], strict=True)
    )
    np.testing.assert_allclose(won["background"], 100 * (1 - (1 + 2 / 3) / 2) / 2)


def test_a_threshold_that_was_not_matched_is_refused(matching):
    with pytest.raises(ValueError, match=r"0\.6 was not matched\. Allowed: 0\.3, 0\.5"):
        plots.precision_recall(matching, 0.6)


def test_every_figure_can_be_saved_whatever_the_names_and_without_any_detection(tmp_path, matching):
    empty = match_detections(TRUTH, {"results": {}}, subset="validation", tiou_thresholds=(0.5,))
    result = scored({"b$_$": [0.5], "a": [0.1]})
    for m in (matching, empty):
        figures = [
            plots.timelines(TRUTH["database"], FOUND),
            plots.map_by_tiou(result),
            plots.class_precision(result),
            plots.precision_recall(m, 0.5),
            plots.length_distribution(m, 0.5),
            plots.score_distribution(m, 0.5),
            plots.error_breakdown(break_down(m)),
        ]
        for figure in figures:
            figure.savefig(tmp_path / "figure.png", dpi=20)
