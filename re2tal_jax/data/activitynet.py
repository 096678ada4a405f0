"""ActivityNet-1.3, and any other data set annotated in its form or in that of BMN."""

from typing import Literal

from re2tal_jax.data.annotations import read_annotations
from re2tal_jax.data.dataset import Dataset, open_dataset
from re2tal_jax.data.features import FeatureConfig


def activitynet(
    *,
    annotations: str,
    subset: str | tuple[str, ...],
    videos: str | None = None,
    features: FeatureConfig | None = None,
    video_info: str | None = None,
    classes: str | tuple[str, ...] | None = None,
    training: bool = False,
    min_length_ratio: float = 0.01,
    class_agnostic: bool = False,
    fps: float | None = None,
    blocked: str | tuple[str, ...] | None = None,
    missing_videos: Literal["error", "skip"] = "error",
    unlabelled: bool = False,
) -> Dataset:
    """Open a subset of ActivityNet (subsets training, validation, testing).

    The recipe trains on one class and leaves out segments of at most 1 % of their video and videos without any other;
    the evaluation keeps all. Arguments as in `read_annotations` and `open_dataset`.
    """
    return open_dataset(
        read_annotations(annotations, video_info=video_info, classes=classes, fps=fps),
        subset=subset,
        videos=videos,
        features=features,
        training=training,
        min_length_ratio=min_length_ratio,
        class_agnostic=class_agnostic,
        blocked=blocked,
        missing_videos=missing_videos,
        unlabelled=unlabelled,
    )


VARIANTS = {"activitynet": activitynet}
