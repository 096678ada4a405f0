"""A trained detector (`trained.load`) on videos: `localize` for one of your own, `localize_all` for a data set."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.elements import LoaderConfig
from re2tal_jax.data.pipeline import Loader
from re2tal_jax.data.sampling import Policy, StridedPolicy
from re2tal_jax.data.video_files import open_video_files
from re2tal_jax.data.video_folder import printable
from re2tal_jax.errors import DataError, similar_file
from re2tal_jax.external_classifier import ExternalClassifier
from re2tal_jax.inference.detect import Predict, VideoResult, check_windows, detect
from re2tal_jax.postprocess import PostprocessConfig
from re2tal_jax.types import Detections

OTHER_RATE = 1.5
"""By which factor a snippet may be longer or shorter than in the training without a word."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedDetector:
    """A detector with its parameters on the devices; it compiles at its first batch and then no more.

    Attributes:
        source, step: the checkpoint's folder, and of which training step its parameters are (0: converted).
        trained_fps: frames a second of the videos of the training, where its config says so (`config.data.fps`).
        config: the whole config, every default filled in.
        classes: names of the localizer's outputs.
        identity: JSON; what decides the detections: parameters, classes, and what of the config matters.
        predict: see `inference.detect.Predict`.
        mesh, policy, loader, batch_size: where batches lie, which windows there are, how they are decoded, how many of
            them fill a batch.
        postprocess, external: see `postprocess.postprocess`.
    """

    source: Path
    step: int
    trained_fps: float | None
    config: Mapping[str, Any]
    classes: tuple[str, ...]
    identity: Mapping[str, Any]
    predict: Predict
    mesh: Mesh
    policy: Policy
    loader: LoaderConfig
    batch_size: int
    postprocess: PostprocessConfig
    external: ExternalClassifier | None

    def __repr__(self) -> str:
        name, backbone = self.config["localizer"]["name"], self.config["backbone"]["name"]
        return f"TrainedDetector({name} on {backbone}, {len(self.classes)} classes, step {self.step} of {self.source})"


def open_loader(model: TrainedDetector, dataset: Dataset) -> Loader:
    """Return the windows of a data set as the detector takes them, each decoded once.

    Raises:
        ConfigError: a video of several windows, each of which would be suppressed alone.
        DataError: a video without a file, or not a single window.
    """
    loader = Loader(
        dataset,
        model.policy,
        replace(model.loader, cache_mib=0),
        seed=0,  # nothing is random here
        train=False,
        batch_size=model.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    check_windows(loader.windows, model.postprocess, model.config["eval"]["policy"]["name"])
    _tell_other_rates(model, dataset)
    return loader


def _tell_other_rates(model: TrainedDetector, dataset: Dataset) -> None:
    """Log one line if there are videos whose snippets last much longer, or shorter, than those of the training."""
    rate = model.trained_fps
    if rate is None or not isinstance(model.policy, StridedPolicy):
        return
    factors = {r.video_id: r.fps / rate for r in dataset.records if r.fps is not None}
    other = [video_id for video_id, factor in factors.items() if max(factor, 1 / factor) > OTHER_RATE]
    if other:
        log.warning(
            "%d of %d videos have another frame rate than those of the training (config.data.fps = %g), the first is "
            "%r with %.4g frames a second: a snippet of it lasts %.3g s in the place of %.3g s. Encode them again "
            "with that rate (python -m re2tal_jax.data.prepare).",
            len(other),
            len(dataset.records),
            rate,
            other[0],
            factors[other[0]] * rate,
            model.policy.snippet_stride / (factors[other[0]] * rate),
            model.policy.snippet_stride / rate,
        )


def localize_all(model: TrainedDetector, loader: Loader) -> Iterator[VideoResult]:
    """Yield the result of every video, each as soon as its last window is done; memory does not grow with them."""
    return detect(model.predict, loader, model.mesh, model.postprocess, model.classes, model.external, what="predict")


def localize(model: TrainedDetector, video: str | Path) -> Detections:
    """Return the detections of one video file, best first; the same as `--mode predict` writes.

    Args:
        model: of `re2tal_jax.load`.
        video: a file of any length that the decoder reads.

    Raises:
        DataError: the file is missing, damaged or no video.
    """
    path = _video_file(video)
    # One video gives decoding processes little to do, and starting them needs a guarded main module.
    model = replace(model, loader=replace(model.loader, workers=0, on_error="error"))
    dataset, _ = open_video_files({printable(path.stem): path}, on_error="error", classes=model.classes)
    (result,) = localize_all(model, open_loader(model, dataset))
    if result.detections is None:
        raise DataError(f"{path}: not one of its {result.windows} windows can be read.")
    return result.detections


def _video_file(video: Any) -> Path:
    """Return the path of one file, or raise DataError for what is none."""
    if not isinstance(video, str | os.PathLike):
        raise DataError(f"localize takes the path of one video file; this is {video!r:.80}, a {type(video).__name__}.")
    path = Path(video)
    if path.is_dir():
        raise DataError(f"{path} is a folder: name one video file in it; --mode predict takes folders.")
    if not path.is_file():
        raise DataError(f"{path}: there is no such video file.{similar_file(path)}")
    return path
