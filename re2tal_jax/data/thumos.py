"""THUMOS-14 in ActivityNet form: segments on whole frames, 'Ambiguous' ones left out."""

import dataclasses
from typing import Literal

import numpy as np

from re2tal_jax.data.annotations import read_annotations
from re2tal_jax.data.dataset import Dataset, open_dataset
from re2tal_jax.data.features import FeatureConfig
from re2tal_jax.types import VideoRecord

AMBIGUOUS = "Ambiguous"


def thumos14(
    *,
    annotations: str,
    subset: str | tuple[str, ...],
    videos: str | None = None,
    features: FeatureConfig | None = None,
    classes: str | tuple[str, ...] | None = None,
    training: bool = False,
    min_length_ratio: float = 0.0,
    class_agnostic: bool = False,
    fps: float | None = None,
    blocked: str | tuple[str, ...] | None = None,
    missing_videos: Literal["error", "skip"] = "error",
    unlabelled: bool = False,
) -> Dataset:
    """Open a subset of THUMOS-14; the names of subsets differ between public files (Validation, validation, training).

    A class list in the file that distributes it counts every line, 'Ambiguous' included if it is there. Arguments as
    in `read_annotations` and `open_dataset`.
    """
    return open_dataset(
        read_annotations(annotations, classes=classes, ignored_labels=(AMBIGUOUS,), fps=fps),
        subset=subset,
        videos=videos,
        features=features,
        training=training,
        min_length_ratio=min_length_ratio,
        class_agnostic=class_agnostic,
        blocked=blocked,
        missing_videos=missing_videos,
        unlabelled=unlabelled,
        adjust=on_whole_frames,
    )


def on_whole_frames(record: VideoRecord) -> VideoRecord:
    """Move starts and ends down to whole frames, as published; a record that tells neither frames nor fps stays.

    The frame is int(seconds / duration * frames), in this order of operations, else int(seconds * fps).
    """
    if record.fps is None:
        return record
    if record.num_frames is not None:
        frames = np.trunc(record.segments_sec / record.duration_sec * record.num_frames)
    else:
        frames = np.trunc(record.segments_sec * record.fps)
    return dataclasses.replace(record, segments_sec=frames / record.fps)


VARIANTS = {"thumos14": thumos14}
