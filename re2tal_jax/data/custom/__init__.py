"""A data set of your own: videos in a folder, annotations as people make them."""

from re2tal_jax.data.custom.factory import VARIANTS, custom, held_out_videos

__all__ = ["VARIANTS", "custom", "held_out_videos"]
