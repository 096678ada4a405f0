"""Frames a second of decoding, resizing and hand-over; `python -m benchmarks.loader [--video FILE] [--out FILE.csv]`.

The videos are those of the synthetic data set, rendered to a temporary folder, and FILE where one is given. Rows of the
CSV: date, machine, versions, benchmark, setting, value, unit.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.rows import Row, append_rows
from re2tal_jax.data.container import probe
from re2tal_jax.data.elements import LoaderConfig
from re2tal_jax.data.pipeline import Loader
from re2tal_jax.data.sampling import Resize
from re2tal_jax.data.synthetic import synthetic
from re2tal_jax.data.video import Reader, read_frames

VIDEOS, REPEATS, BATCHES = 24, 3, 12
POLICY = Resize(num_snippets=48, frames_per_snippet=2)
READERS: tuple[Reader, ...] = ("decord", "pyav")


def frames_a_second(run: Callable[[], int]) -> float:
    """Return the best rate of a few runs; `run` returns how many frames it read."""
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        rates.append(run() / (time.perf_counter() - start))
    return max(rates)


def decoding(name: str, files: list[Path], sizes: dict[str, tuple[int, int] | None]) -> Iterator[Row]:
    """Time both readers in one process: every frame of a file, and 96 spread over it."""
    for reader in READERS:
        for what, size in sizes.items():
            for spread in (False, True):

                def run(reader: Reader = reader, size: tuple[int, int] | None = size, spread: bool = spread) -> int:
                    count = 0
                    for file in files:
                        info = probe(file)
                        last = info.num_frames - 1
                        indices = np.linspace(0, last, min(96, last)).astype(int) if spread else np.arange(last + 1)
                        count += len(read_frames(file, indices, *(size or (info.height, info.width)), reader=reader))
                    return count

                setting = f"{name}, {what}, {reader}, {'96 spread frames' if spread else 'all frames'}"
                yield "decode", setting, frames_a_second(run), "frames/s"


def handing_over(root: str, workers: tuple[int, ...]) -> Iterator[Row]:
    """Time the loader from its first batch on, start-up of the workers apart."""
    data = synthetic(root=root, subset="training", num_train=VIDEOS, num_validation=1)
    for count in workers:
        for threads in (1, 2):
            config = LoaderConfig(height=32, width=32, workers=count, threads=threads)
            batches = iter(Loader(data, POLICY, config, seed=0, train=True, batch_size=4))
            next(batches)
            start = time.perf_counter()
            frames = sum(next(batches)["video"][..., 0, 0, 0].size for _ in range(BATCHES))
            rate = frames / (time.perf_counter() - start)
            batches.close()
            yield "loader", f"synthetic to 32x32, {count} workers, {threads} threads", rate, "frames/s"


def main() -> None:
    """Print one line per figure and append them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="a video file to decode as well")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="numbers of decoding processes")
    parser.add_argument("--out", type=Path, help="CSV that the rows are appended to")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        data = synthetic(root=root, subset="training", num_train=VIDEOS, num_validation=1, processes=1)
        rows.append(("render", "synthetic, one process", (VIDEOS + 1) / (time.perf_counter() - start), "videos/s"))
        files = [data.video_paths[record.video_id] for record in data.records]
        rows += decoding("synthetic", files, {"own size": None, "to 32x32": (32, 32)})
        if options.video is not None:
            rows += decoding(options.video.name, [options.video], {"own size": None, "to 224x224": (224, 224)})
        rows += handing_over(root, tuple(options.workers))
    for benchmark, setting, value, unit in rows:
        print(f"{benchmark:8s} {setting:60s} {value:8.1f} {unit}")
    if options.out is not None:
        append_rows(options.out, rows, packages=("decord", "av", "grain", "numpy"))


if __name__ == "__main__":
    main()
