"""A small report with real video files, for the tests of the page and of the browser that opens it."""

from pathlib import Path
from typing import Any

from re2tal_jax.evaluation import DetectionMap, detection_map
from re2tal_jax.inference.html_report import write_html_report
from tests.video_files import numbered_frames, write_video

MARKUP = "<img src=x onerror=hacked()>"
CLASSES = ("a & b", MARKUP, "רץ </script><!--", 'quote"s 🏃')
SECONDS = 6.0

# (start, end, class), and with a score: what is found is found at a tIoU of 0.5, in the first video.
TRUTH = {
    "first": [(0.0, 1.0, 0), (2.0, 4.0, 1), (5.0, 6.0, 2)],
    "second": [(1.0, 2.0, 0)],
    "third": [],
}
FOUND = {
    "first": [
        (2.1, 4.0, 1, 0.9),
        (0.0, 1.1, 0, 0.8),
        (2.0, 3.8, 3, 0.7),  # wrong label
        (4.4, 5.2, 2, 0.2),  # localisation: 0.2 / 1.6
        (2.0, 4.0, 1, 0.1),  # double detection
        (1.2, 1.8, 0, 0.05),  # background
    ],
    "second": [(1.0, 2.0, 0, 0.6)],
    "third": [],
}


def predictions(found: dict[str, list[Any]] | None = None) -> dict[str, Any]:
    found = FOUND if found is None else found
    return {
        "results": {
            video_id: [{"segment": [s, e], "label": CLASSES[c], "score": score} for s, e, c, score in rows]
            for video_id, rows in found.items()
        }
    }


def ground_truth(truth: dict[str, list[Any]] | None = None) -> dict[str, Any]:
    truth = TRUTH if truth is None else truth
    return {
        "database": {
            video_id: {
                "subset": "validation",
                "duration": SECONDS,
                "annotations": [{"segment": [s, e], "label": CLASSES[c]} for s, e, c in rows],
            }
            for video_id, rows in truth.items()
        }
    }


def score(truth: dict[str, Any], found: dict[str, Any]) -> DetectionMap:
    return detection_map(truth, found, subset="validation", tiou_thresholds=(0.3, 0.5, 0.7))


def write_clip(path: Path) -> Path:
    """Six seconds at 10 frames a second."""
    return write_video(path, numbered_frames(60, 48, 64, step=3))


def write_report(path: Path, videos: dict[str, Path], **options: Any) -> Path:
    """Write the report of the detections above."""
    truth, found = ground_truth(), predictions()
    write_html_report(
        path,
        found,
        videos=videos,
        durations_sec=dict.fromkeys(TRUTH, SECONDS),
        title=f"Report {MARKUP}",
        ground_truth=truth,
        scored=score(truth, found),
        **options,
    )
    return path
