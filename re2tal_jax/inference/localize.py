"""A trained detector (`trained.load`) on videos: `localize` for one of your own, `localize_all` for a data set."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.elements import LoaderConfig
from re2tal_jax.data.pipeline import Loader
from re2tal_jax.data.sampling import Policy
from re2tal_jax.data.video_files import open_video_files
from re2tal_jax.data.video_folder import printable
from re2tal_jax.errors import DataError
from re2tal_jax.external_classifier import ExternalClassifier
from re2tal_jax.inference.detect import Predict, VideoResult, check_windows, detect
from re2tal_jax.postprocess import PostprocessConfig
from re2tal_jax.types import Detections


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedDetector:
    """A detector with its parameters on the devices; it compiles at its first batch and then no more.

    Attributes:
        source, step: the checkpoint's folder, and of which training step its parameters are (0: converted).
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
    return loader


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
    path = Path(video)
    # One video gives decoding processes little to do, and starting them needs a guarded main module.
    model = replace(model, loader=replace(model.loader, workers=0, on_error="error"))
    dataset, _ = open_video_files({printable(path.stem): path}, on_error="error", classes=model.classes)
    (result,) = localize_all(model, open_loader(model, dataset))
    if result.detections is None:
        raise DataError(f"{path}: not one of its {result.windows} windows can be read.")
    return result.detections
