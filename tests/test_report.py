"""The picture of an evaluation: names that drawing must not trip over. What is drawn: test_plots.py."""

import pytest

from re2tal_jax.evaluation import detection_map
from re2tal_jax.inference.report import draw_report


def video(duration, *annotations):
    return {
        "subset": "validation",
        "duration": duration,
        "annotations": [{"segment": [start, end], "label": label} for start, end, label in annotations],
    }


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
