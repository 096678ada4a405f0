"""The `synthetic` data set: videos of moving figures, rendered to H.264 files when they are first asked for.

The files are ordinary ones: mp4 videos of several rates and sizes beside an annotation in ActivityNet form, read
through the same door as real data. What they show is told in `re2tal_jax.data.scenes`.

    root/annotations.json   root/recipe.json   root/videos/synthetic_training_00000.mp4 …
"""

import io
import json
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np

from re2tal_jax.data.annotations import read_annotations
from re2tal_jax.data.dataset import Dataset, open_dataset
from re2tal_jax.data.features import FeatureConfig
from re2tal_jax.data.scenes import CLASSES, Scene, draw_scene, render
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.progress import WorkProgress

logger = logging.getLogger(__name__)

RECIPE = 4
"""Counts the changes to what is rendered: a folder of another recipe is refused, not mixed."""

SUBSETS = ("training", "validation")
_FEW = 12  # so many videos are rendered before the processes of a pool have started
_ENCODER = {"preset": "veryfast", "crf": "20", "x264-params": "mbtree=0"}  # with mbtree the bytes vary from run to run
_KEY_FRAMES = 12


def synthetic(
    *,
    root: str,
    features: FeatureConfig | None = None,
    subset: str | tuple[str, ...],
    num_train: int = 160,
    num_validation: int = 40,
    seed: int = 0,
    training: bool = False,
    min_length_ratio: float = 0.0,
    class_agnostic: bool = False,
    processes: int | None = None,
) -> Dataset:
    """Open a subset (training, validation) of the rendered data set, rendering what is not there yet.

    Args:
        root: folder of the data set; made if absent. One folder holds one seed.
        features: in the place of the videos.
        subset: one name or several.
        num_train: videos for training.
        num_validation: videos held out; they are drawn from other random streams than those for training.
        seed: decides every video. Video number i of a subset does not depend on how many there are.
        training: leave out videos without segments, as `open_dataset` does.
        min_length_ratio: as in `open_dataset`.
        class_agnostic: as in `open_dataset`.
        processes: how many render at a time; None takes one for each core.

    Raises:
        ConfigError: a count below one.
        DataError: `root` holds the videos of another seed or recipe, or cannot be written.
    """
    render_dataset(root, num_train=num_train, num_validation=num_validation, seed=seed, processes=processes)
    return open_dataset(
        read_annotations(Path(root) / "annotations.json", classes=CLASSES),
        subset=subset,
        videos=str(Path(root) / "videos"),
        features=features,
        training=training,
        min_length_ratio=min_length_ratio,
        class_agnostic=class_agnostic,
    )


def render_dataset(
    root: str | Path, *, num_train: int, num_validation: int, seed: int, processes: int | None = None
) -> Path:
    """Render the videos that are missing, write the annotation, and return its path.

    Whole files only, each moved into place when it is complete: a run that was killed is taken up by the next, and
    the result is the same, byte for byte, whatever the number of processes.
    """
    if num_train < 1 or num_validation < 1:
        raise ConfigError(f"num_train = {num_train} and num_validation = {num_validation} must be at least 1.")
    root = Path(root)
    try:
        (root / "videos").mkdir(parents=True, exist_ok=True)
        _claim(root, seed)
        videos = {
            video_id(subset, i): (seed, number, i)
            for number, (subset, count) in enumerate(zip(SUBSETS, (num_train, num_validation), strict=True))
            for i in range(count)
        }
        missing = [(root / "videos" / f"{name}.mp4", key) for name, key in videos.items()]
        missing = [(path, key) for path, key in missing if not path.is_file()]
        _render_all(missing, processes)
        database = {name: _annotation(draw_scene(np.random.default_rng(key)), key) for name, key in videos.items()}
        content = {"version": f"synthetic recipe {RECIPE} seed {seed}", "database": database}
        _write(root / "annotations.json", json.dumps(content, indent=1).encode())
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot write the synthetic data set: {error.strerror}.") from error
    return root / "annotations.json"


def video_id(subset: str, index: int) -> str:
    """Return the name of a video."""
    return f"synthetic_{subset}_{index:05d}"


def render_video(path: Path, key: tuple[int, int, int]) -> None:
    """Render the video of one key (seed, number of the subset, index) to an H.264 file."""
    rng = np.random.default_rng(key)
    scene = draw_scene(rng)
    _write(path, _encode(scene, rng))


def _claim(root: Path, seed: int) -> None:
    """Write which seed and recipe the folder holds, or check it."""
    mine = {"recipe": RECIPE, "seed": seed}
    file = root / "recipe.json"
    if not file.is_file():
        _write(file, json.dumps(mine).encode())
        return
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = file.read_text()[:80]
    if found != mine:
        raise DataError(
            f"{root} holds synthetic videos of {found}, asked for {mine}: name another folder (root) or delete it."
        )


def _render_all(missing: list[tuple[Path, tuple[int, int, int]]], processes: int | None) -> None:
    if not missing:
        return
    processes = min(processes or os.cpu_count() or 1, -(-len(missing) // _FEW))
    logger.info("rendering %d videos to %s, %d at a time", len(missing), missing[0][0].parent, processes)
    with WorkProgress(len(missing), "render", "video") as progress:
        if processes == 1:
            for path, key in missing:
                render_video(path, key)
                progress.advance()
            return
        # Spawned, not forked: the parent may hold JAX's threads.
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            for _ in pool.map(render_video, *zip(*missing, strict=True), chunksize=4):
                progress.advance()


def _encode(scene: Scene, rng: np.random.Generator) -> bytes:
    """Return the scene as an mp4 file; one thread, so that the bytes do not depend on the machine's cores."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=scene.fps, options=_ENCODER)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.gop_size, stream.thread_count = _KEY_FRAMES, 1
        for picture in render(scene, rng):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _annotation(scene: Scene, key: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "subset": SUBSETS[key[1]],
        "duration": scene.num_frames / scene.fps,
        "frame": scene.num_frames,
        "resolution": f"{scene.width}x{scene.height}",
        "annotations": [
            {"segment": [actor.start / scene.fps, actor.end / scene.fps], "label": actor.label}
            for actor in scene.instances
        ],
    }


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


VARIANTS = {"synthetic": synthetic}
