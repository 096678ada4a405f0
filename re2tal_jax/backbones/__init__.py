"""Video backbones by name; each serves the ordinary and the rewired network from the same parameters.

Contract: `backbone(video, *, key=None)` maps a video (B, F, H, W, C), normalised or as `frames.Frames` that it is to
normalise, to features (B, T, h, w, D), or to a tuple of such features, one a pathway; `.intermediates(video)` returns
them with a dict of what the stages gave. `temporal_stride` (frames per feature; a tuple where features are one),
`out_channels` (D, of all pathways together), `wiring` and, of a network, `stored_blocks` (how many of each chain; of
the longest pathway) are attributes. Without a key nothing is random. `features` stands among them for features that are
read from files: it maps (B, T, C) to (B, T, 1, 1, C) and has neither parameters nor another wiring.
"""

from typing import Any

from flax import nnx

from re2tal_jax.backbones import precomputed, resnet3d, slowfast, video_swin, vit
from re2tal_jax.registry import Registry
from re2tal_jax.seeds import Seeded

NETWORKS = Registry("backbone", video_swin.VARIANTS, slowfast.VARIANTS, resnet3d.VARIANTS, vit.VARIANTS)
BACKBONES = Registry("backbone", NETWORKS, precomputed.VARIANTS)
"""What `config.backbone.name` chooses from: the networks, and features in the place of one."""

EXECUTION = ("workspace", "stored_blocks")
"""Arguments of networks that say how they run, and change nothing of what they compute."""


def list_backbones() -> list[str]:
    """Return the names that `build_backbone` takes."""
    return sorted(NETWORKS)


def build_backbone(name: str, *, rewired: bool = True, rngs: nnx.Rngs | None = None, **config: Any) -> nnx.Module:
    """Build a backbone with random parameters (seed 0 if no `rngs` are given).

    Args:
        name: one of `list_backbones()`.
        rewired: the reversible network, or the ordinary one; both have the same parameters.
        rngs: random streams for the initial parameters.
        config: arguments of the backbone that are to differ from its published form.

    Raises:
        ConfigError: an unknown name (the nearest is named), or sizes that make no network.
    """
    return NETWORKS[name](rewired=rewired, rngs=Seeded(0) if rngs is None else rngs, **config)
