"""Seconds to suppress and to evaluate, on one core; `python -m benchmarks.evaluation [--out FILE.csv]`.

Evaluation is at the size of ActivityNet's validation set: 4,728 videos with 100 detections each, 200 classes, ten
thresholds, from files on disk. Everything is made from a seed. Rows of the CSV: date, machine, versions, benchmark,
setting, value, unit.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.rows import Row, append_rows
from re2tal_jax.evaluation import detection_map
from re2tal_jax.nms import NMSConfig, batched_nms

VIDEOS, DETECTIONS, CLASSES = 4728, 100, 200


def best_of(repeats: int, run: Callable[[], object]) -> float:
    """Return the seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def write_files(folder: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    """Write ground truth (1.5 segments a video) and predictions: half near the truth, two classes a video."""
    database, results = {}, {}
    for i in range(VIDEOS):
        duration = rng.uniform(20, 240)
        truth = np.sort(rng.uniform(0, duration, (rng.integers(1, 3), 2)), axis=1)
        label, other = (f"class {k}" for k in rng.choice(CLASSES, 2, replace=False))
        annotations = [{"segment": segment, "label": label} for segment in truth.tolist()]
        database[f"v_{i}"] = {"subset": "validation", "duration": duration, "annotations": annotations}
        near = truth[rng.integers(0, len(truth), DETECTIONS // 2)] + rng.normal(
            0, 0.05 * duration, (DETECTIONS // 2, 2)
        )
        far = rng.uniform(0, duration, (DETECTIONS - len(near), 2))
        segments = np.sort(np.concatenate([near, far]).clip(0, duration), axis=1).round(2)
        scores = rng.uniform(0, 1, DETECTIONS).round(4)
        results[f"v_{i}"] = [
            {"segment": segment, "label": label if j % 2 else other, "score": score}
            for j, (segment, score) in enumerate(zip(segments.tolist(), scores.tolist(), strict=True))
        ]
    paths = folder / "ground_truth.json", folder / "predictions.json"
    paths[0].write_text(json.dumps({"database": database}))
    paths[1].write_text(json.dumps({"results": results}))
    return paths


def evaluation(rng: np.random.Generator) -> Iterator[Row]:
    """Time `detection_map` from files and from parsed content."""
    thresholds = np.linspace(0.5, 0.95, 10).tolist()
    setting = f"{VIDEOS} videos x {DETECTIONS} detections, {CLASSES} classes, 10 tIoU"
    with tempfile.TemporaryDirectory() as folder:
        truth, found = write_files(Path(folder), rng)
        parsed = json.loads(truth.read_text()), json.loads(found.read_text())
        for what, (a, b) in {"from files": (truth, found), "parsed": parsed}.items():
            seconds = best_of(3, lambda a=a, b=b: detection_map(a, b, subset="validation", tiou_thresholds=thresholds))
            yield "detection_map", f"{setting}, {what}", seconds, "s"


def suppression(rng: np.random.Generator) -> Iterator[Row]:
    """Time `batched_nms` as the ActivityNet and the THUMOS recipe call it."""
    anet = NMSConfig(sigma=0.7, multiclass=False, voting_threshold=0.9)
    thumos = NMSConfig(sigma=0.7, max_seg_num=2000)
    recipes = {
        "anet: 200 candidates, gaussian, voting": (200, 1, anet),
        "thumos: 2000 candidates of 20 classes, gaussian": (2000, 20, thumos),
        "40000 candidates of 20 classes, gaussian": (40000, 20, thumos),
    }
    for setting, (count, classes, config) in recipes.items():
        centre, half = rng.uniform(0, 500, (count, 1)), rng.exponential(10, (count, 1))
        segments = np.concatenate([centre - half, centre + half], axis=1)
        scores, labels = rng.uniform(0, 1, count), rng.integers(0, classes, count)
        run = lambda s=segments, p=scores, k=labels, c=config: batched_nms(s, p, k, c)  # noqa: E731
        yield "batched_nms", setting, 1e3 * best_of(5, run), "ms"


def main() -> None:
    """Print one line per figure and append them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV that the rows are appended to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rng = np.random.default_rng(options.seed)
    results = [*suppression(rng), *evaluation(rng)]
    for benchmark, setting, value, unit in results:
        print(f"{benchmark:15s} {setting:75s} {value:8.2f} {unit}")
    if options.out is not None:
        append_rows(options.out, results, packages=("numpy",), cores=1)


if __name__ == "__main__":
    main()
