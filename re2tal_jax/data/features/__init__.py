"""Snippet features in the place of videos."""

from re2tal_jax.data.features.windows import FeatureConfig, Features, open_features, take_rows

__all__ = ["FeatureConfig", "Features", "open_features", "take_rows"]
