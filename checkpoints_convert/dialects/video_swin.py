"""Video Swin: mmaction2, its rewired form in OpenTAD, the original repository, torchvision, and Swin for images."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from checkpoints_convert.dialects.dialect import PREPROCESSING, Dialect, head
from checkpoints_convert.rules import Ignored, Rule
from re2tal_jax.backbones.video_swin import VideoSwin
from re2tal_jax.backbones.windows import relative_position_index

_INDEX = Ignored(r".*\.relative_position_index", "a constant of the window size, computed here")
_MASK = Ignored(r".*\.attn_mask", "a constant of the window and input size, computed here")
_IGNORED = (_INDEX, head("cls_head"), PREPROCESSING)
_BLOCK, _OURS = "layers.{i}.blocks.{j}.", "stages.{i}.blocks.{j}."


def _indices(network: VideoSwin, keys: Iterable[str]) -> Mapping[str, np.ndarray]:
    """Return the index into each table of relative positions."""
    index = relative_position_index(network.window_size).astype(np.int64)
    tables = [key for key in keys if key.endswith("relative_position_bias_table")]
    return {key.replace("bias_table", "index"): index for key in tables}


def _names(*, attention: str = "", mlp: str = "", norm: str) -> Sequence[Rule]:
    """Return the names of the original repository; what stands before a block's two branches, and the final norm's."""
    return (
        Rule("patch_embed.proj", "patch_embed.proj", "conv"),
        Rule("patch_embed.norm", "patch_embed.norm", "norm"),
        Rule(_BLOCK + attention + "norm1", _OURS + "attn.norm", "norm"),
        Rule(_BLOCK + attention + "attn.qkv", _OURS + "attn.qkv", "linear"),
        Rule(_BLOCK + attention + "attn.proj", _OURS + "attn.proj", "linear"),
        Rule(_BLOCK + attention + "attn.relative_position_bias_table", _OURS + "attn.relative_position_bias"),
        Rule(_BLOCK + mlp + "norm2", _OURS + "mlp.norm", "norm"),
        Rule(_BLOCK + mlp + "mlp.fc1", _OURS + "mlp.fc1", "linear"),
        Rule(_BLOCK + mlp + "mlp.fc2", _OURS + "mlp.fc2", "linear"),
        Rule("layers.{i}.downsample.norm", "stages.{i}.downsample.norm", "norm"),
        Rule("layers.{i}.downsample.reduction", "stages.{i}.downsample.reduction", "linear"),
        Rule(norm, "norm", "norm"),
    )


def _torchvision() -> Sequence[Rule]:
    block, rules = "features.{stage}.{j}.", []
    for stage in range(4):
        theirs, ours = block.replace("{stage}", str(2 * stage)), _OURS.replace("{i}", str(stage))
        rules += [
            Rule(theirs + "norm1", ours + "attn.norm", "norm"),
            Rule(theirs + "attn.qkv", ours + "attn.qkv", "linear"),
            Rule(theirs + "attn.proj", ours + "attn.proj", "linear"),
            Rule(theirs + "attn.relative_position_bias_table", ours + "attn.relative_position_bias"),
            Rule(theirs + "norm2", ours + "mlp.norm", "norm"),
            Rule(theirs + "mlp.0", ours + "mlp.fc1", "linear"),
            Rule(theirs + "mlp.3", ours + "mlp.fc2", "linear"),
            Rule(f"features.{2 * stage + 1}.norm", f"stages.{stage}.downsample.norm", "norm"),
            Rule(f"features.{2 * stage + 1}.reduction", f"stages.{stage}.downsample.reduction", "linear"),
        ]
    return (
        Rule("patch_embed.proj", "patch_embed.proj", "conv"),
        Rule("patch_embed.norm", "patch_embed.norm", "norm"),
        *rules,
        Rule("norm", "norm", "norm"),
    )


MMACTION2 = Dialect(
    "mmaction2",
    "video_swin",
    "mmaction2's SwinTransformer3D",
    _names(norm="norm3"),
    _IGNORED,
    prefixes=("backbone.", ""),
    constants=_indices,
)
RE2TAL = Dialect(
    "re2tal",
    "video_swin",
    "OpenTAD's SwinTransformer3D_inv, Kinetics files of Re2TAL",
    _names(attention="inv_block.Fm.", mlp="inv_block.Gm.", norm="norm3"),
    _IGNORED,
    prefixes=("backbone.", ""),
    constants=_indices,
    rewired=True,
)
DIALECTS = (
    MMACTION2,
    RE2TAL,
    Dialect(
        "swin_transformer",
        "video_swin",
        "the repository Video-Swin-Transformer",
        _names(norm="norm"),
        _IGNORED,
        prefixes=("backbone.", ""),
        constants=_indices,
    ),
    Dialect(
        "torchvision",
        "video_swin",
        "torchvision's swin3d_t, swin3d_s, swin3d_b",
        _torchvision(),
        (_INDEX, head("head")),
        constants=_indices,
    ),
    Dialect(
        "swin2d",
        "video_swin",
        "Swin Transformer for images (microsoft), inflated",
        _names(norm="norm"),
        (_INDEX, _MASK, head("head")),
        inflate=True,
    ),
)
