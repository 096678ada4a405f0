"""ActionFormer as OpenTAD names it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from checkpoints_convert.dialects.dialect import Dialect
from checkpoints_convert.rules import Ignored, Rule

_ATTENTION = tuple(
    rule
    for part in ("query", "key", "value")
    for rule in (
        Rule(f"attn.{part}_conv.conv", f"attn.{part}_conv", "conv"),
        Rule(f"attn.{part}_norm", f"attn.{part}_norm", "norm"),
        Rule(f"attn.{part}", f"attn.{part}", "conv"),
    )
)
_BLOCK = (
    Rule("ln1", "norm1", "norm"),
    Rule("ln2", "norm2", "norm"),
    *_ATTENTION,
    Rule("attn.proj", "attn.proj", "conv"),
    Rule("mlp.0", "mlp_in", "conv"),
    Rule("mlp.3", "mlp_out", "conv"),
    Rule("drop_path_attn.scale", "drop_path_attn.scale", "channels"),
    Rule("drop_path_mlp.scale", "drop_path_mlp.scale", "channels"),
)

_NORMALIZER = "rpn_head.loss_normalizer"


def _normalizer(localizer: Any, keys: Iterable[str]) -> Mapping[str, np.ndarray]:
    """Return the buffer that a strict load wants: the value that training starts from, an integer there."""
    del keys
    return {_NORMALIZER: np.asarray(int(localizer.loss_normalizer), np.int64)}


OPENTAD = Dialect(
    "opentad",
    "actionformer",
    "OpenTAD's ActionFormer",
    (
        Rule("projection.embed.{i}.conv", "pyramid.embed.{i}.conv", "conv"),
        Rule("projection.embed.{i}.norm", "pyramid.embed.{i}.norm", "norm"),
        *(
            rule.prefixed(f"projection.{part}.{{i}}.", f"pyramid.{part}.{{i}}.")
            for part in ("stem", "branch")
            for rule in _BLOCK
        ),
        Rule("neck.fpn_norms.{i}", "fpn_norms.{i}", "norm"),
        *(
            Rule(f"rpn_head.{part}_convs.{{i}}.{layer}", f"head.{part}_convs.{{i}}.{layer}", kind)
            for part in ("cls", "reg")
            for layer, kind in (("conv", "conv"), ("norm", "norm"))
        ),
        Rule("rpn_head.cls_head", "head.cls_head", "conv"),
        Rule("rpn_head.reg_head", "head.reg_head", "conv"),
        Rule("rpn_head.scale.{i}.scale", "head.scales.{i}.scale"),
    ),
    (Ignored(re.escape(_NORMALIZER), "part of the training state, not a parameter; truncated to an integer there"),),
    constants=_normalizer,
)
