"""The picture of an evaluation: what is drawn, by hand-checkable numbers, and names that drawing must not trip over."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from re2tal_jax.evaluation import DetectionMap, detection_map
from re2tal_jax.inference.report import MAX_CLASSES, MAX_VIDEOS, draw_classes, draw_report, draw_timelines, draw_tiou


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


FOUND = [{"segment": [0.0, 2.0], "label": "$\\frac$", "score": 1.0}]


@pytest.mark.parametrize("results", [{}, {"v" * 99: []}, {"v" * 99: FOUND}])
def test_any_name_and_no_detection_at_all_can_be_drawn(tmp_path, results):
    names = ["$\\frac$", "举重", "7", "_hidden", "a" * 200]
    truth = {"database": {"v" * 99: video(10.0, *((i, i + 1, name) for i, name in enumerate(names)))}}
    predictions = {"results": results}
    result = detection_map(truth, predictions, subset="validation", tiou_thresholds=(0.3, 0.5))
    draw_report(tmp_path / "report.png", result, truth, predictions, title="$\\title$")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
