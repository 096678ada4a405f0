"""VSGN as OpenTAD names it, with plain levels and with graphs."""

from checkpoints_convert.dialects.dialect import Dialect
from checkpoints_convert.rules import Rule

OPENTAD = Dialect(
    "opentad",
    "vsgn",
    "OpenTAD's VSGN",
    (
        Rule("projection.stem_convs.conv", "pyramid.stem.conv", "conv"),
        Rule("projection.pyramid_convs.{i}.conv", "pyramid.levels.{i}.conv", "conv"),
        Rule("projection.pyramid_convs.{i}.tconv1", "pyramid.levels.{i}.temporal", "conv"),
        Rule("projection.pyramid_convs.{i}.nconv1.mlp", "pyramid.levels.{i}.graph", "linear"),
        Rule("neck.levels_transit.0", "fpn.transit", "conv"),
        Rule("neck.levels_enc.{i}.0", "fpn.lateral.{i}", "conv"),
        # a transposed convolution's weight (in, out, 3) becomes the kernel (3, out, in)
        Rule("neck.levels_dec.{i}.0", "fpn.up.{i}", "conv"),
        Rule("neck.levels_fuse.{i}.0", "fpn.fuse.{i}", "conv"),
        *(
            rule
            for part in ("cls", "reg")
            for rule in (
                Rule(f"rpn_head.{part}_tower.{{i}}.0", f"head.{part}.convs.{{i}}", "conv"),
                Rule(f"rpn_head.{part}_tower.{{i}}.1", f"head.{part}.norms.{{i}}", "norm"),
                Rule(f"rpn_head.{part}_head", f"head.{part}.out", "conv"),
            )
        ),
        Rule("rpn_head.tem_head.tem.{i}.0.conv", "boundaries.branches.{i}.conv", "conv"),
        Rule("rpn_head.tem_head.tem.{i}.1.conv", "boundaries.branches.{i}.out", "conv"),
        *(
            rule
            for part in ("start", "end")
            for rule in (
                Rule(f"roi_head.{part}_conv.0", f"corners.{part}.conv", "conv"),
                Rule(f"roi_head.{part}_conv.2", f"corners.{part}.out", "conv"),
            )
        ),
    ),
)
