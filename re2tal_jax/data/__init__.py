"""From annotation and video files to batches: data sets, sampling policies, decoding, augmentation, loading."""

from typing import Any

from re2tal_jax.data import activitynet, custom, prepared, synthetic, thumos
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.registry import Registry

DATASETS = Registry(
    "dataset", activitynet.VARIANTS, thumos.VARIANTS, synthetic.VARIANTS, custom.VARIANTS, prepared.VARIANTS
)


def list_datasets() -> list[str]:
    """Return the names that `build_dataset` takes."""
    return sorted(DATASETS)


def build_dataset(name: str, **options: Any) -> Dataset:
    """Open the data set of this name; its factory's signature says which options there are."""
    return DATASETS[name](**options)
