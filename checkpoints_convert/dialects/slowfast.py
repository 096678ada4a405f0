"""SlowFast, and its slow pathway alone: mmaction2, rewired in OpenTAD, PySlowFast, pytorchvideo, ResNet for images."""

from collections.abc import Iterable, Mapping

import numpy as np

from checkpoints_convert.dialects.dialect import PREPROCESSING, Dialect, head
from checkpoints_convert.rules import Ignored, Rule, Shape

_COUNT = Ignored(r".*\.num_batches_tracked", "a count of training batches that evaluation does not use")
_IGNORED = (_COUNT, head("cls_head"), PREPROCESSING)
_STAGES, _CONVS = range(1, 5), (("conv1", "a"), ("conv2", "b"), ("conv3", "c"))


def _counts(network: object, keys: Iterable[str]) -> Mapping[str, np.ndarray]:
    """Return the batch counts that a strict load wants beside the statistics; what they were is not kept."""
    del network
    means = [key for key in keys if key.endswith(".running_mean")]
    return {key.replace("running_mean", "num_batches_tracked"): np.asarray(0, np.int64) for key in means}


def _fusion_kernel(shapes: Mapping[str, Shape]) -> Mapping[str, int]:
    """Return the option that the shape (O, I, frames, 1, 1) of a lateral convolution tells."""
    shape = shapes.get("laterals.0.conv.kernel", ())
    return {"fusion_kernel": shape[2]} if len(shape) == 5 and shape[2] % 2 else {}


_RATES = (
    "no key tells resample_rate and speed_ratio: both are 4 for files called 8x8 and 16x8, and 8 for those called 4x16"
)


def _layer(theirs: str, ours: str, conv: str = ".conv", norm: str = ".bn") -> tuple[Rule, Rule]:
    """Return the rules of a convolution and its batch norm."""
    return Rule(theirs + conv, ours + ".conv", "conv"), Rule(theirs + norm, ours + ".norm", "batch_norm")


def _pathway(*, first: str, others: str) -> list[Rule]:
    """Return mmaction2's names of a ResNet; `first` and `others` stand between a stage and a block's convolutions."""
    rules = [*_layer("conv1", "stem")]
    for stage in _STAGES:
        ours = f"stages.{stage - 1}.blocks."
        for conv, _ in _CONVS:
            rules += _layer(f"layer{stage}.{first}{conv}", f"{ours}0.{conv}")
            rules += _layer(f"layer{stage}.{others}{conv}", f"{ours}{{n+}}.{conv}")
        rules += _layer(f"layer{stage}.{first.replace('Fm.', '')}downsample", f"{ours}0.downsample")
    return rules


def _mmaction2(*, first: str, others: str) -> tuple[Rule, ...]:
    laterals = [Rule("slow_path.conv1_lateral.conv", "laterals.0.conv", "conv")]
    laterals += [Rule(f"slow_path.layer{i}_lateral.conv", f"laterals.{i}.conv", "conv") for i in (1, 2, 3)]
    pathways = [
        rule.prefixed(f"{path}_path.", f"{path}.")
        for path in ("slow", "fast")
        for rule in _pathway(first=first, others=others)
    ]
    return (*laterals, *pathways)


def _pyslowfast() -> tuple[Rule, ...]:
    rules = []
    for number, path in enumerate(("slow", "fast")):
        rules += _layer(f"s1.pathway{number}_stem", f"{path}.stem")
        for stage in _STAGES:
            theirs, ours = f"s{stage + 1}.pathway{number}_res{{j}}.", f"{path}.stages.{stage - 1}.blocks.{{j}}."
            for conv, letter in _CONVS:
                rules += _layer(f"{theirs}branch2.{letter}", ours + conv, "", "_bn")
            rules += _layer(f"{theirs}branch1", f"{ours}downsample", "", "_bn")
    for number in range(4):
        rules += _layer(f"s{number + 1}_fuse", f"laterals.{number}", ".conv_f2s", ".bn")
    return tuple(rules)


def _pytorchvideo() -> tuple[Rule, ...]:
    rules = []
    for number, path in enumerate(("slow", "fast")):
        rules += _layer(f"blocks.0.multipathway_blocks.{number}", f"{path}.stem", ".conv", ".norm")
        for stage in _STAGES:
            theirs = f"blocks.{stage}.multipathway_blocks.{number}.res_blocks.{{j}}."
            ours = f"{path}.stages.{stage - 1}.blocks.{{j}}."
            for conv, letter in _CONVS:
                rules += _layer(f"{theirs}branch2.", ours + conv, f"conv_{letter}", f"norm_{letter}")
            rules += _layer(f"{theirs}branch1", f"{ours}downsample", "_conv", "_norm")
    for number in range(4):
        rules += _layer(f"blocks.{number}.multipathway_fusion", f"laterals.{number}", ".conv_fast_to_slow", ".norm")
    return tuple(rules)


def _image_resnet() -> tuple[Rule, ...]:
    rules = [*_layer("", "stem", "conv1", "bn1")]
    for stage in _STAGES:
        theirs, ours = f"layer{stage}.{{j}}.", f"stages.{stage - 1}.blocks.{{j}}."
        for number in (1, 2, 3):
            rules += _layer(theirs, f"{ours}conv{number}", f"conv{number}", f"bn{number}")
        rules += _layer(f"{theirs}downsample", f"{ours}downsample", ".0", ".1")
    return tuple(rules)


_PLAIN = {"first": "0.", "others": "{n+}."}
_REWIRED = {"first": "blocks.0.Fm.", "others": "blocks.{n+}.inv_block.Fm."}

MMACTION2 = Dialect(
    "mmaction2",
    "slowfast",
    "mmaction2's ResNet3dSlowFast",
    _mmaction2(**_PLAIN),
    _IGNORED,
    prefixes=("backbone.", ""),
    sizes=_fusion_kernel,
    note=_RATES,
    constants=_counts,
)
RE2TAL = Dialect(
    "re2tal",
    "slowfast",
    "OpenTAD's ResNet3dSlowFast_inv, Kinetics files of Re2TAL",
    _mmaction2(**_REWIRED),
    _IGNORED,
    prefixes=("backbone.", ""),
    sizes=_fusion_kernel,
    rewired=True,
    constants=_counts,
)
PYSLOWFAST = Dialect(
    "pyslowfast",
    "slowfast",
    "PySlowFast (facebookresearch/SlowFast)",
    _pyslowfast(),
    (_COUNT, head("head")),
    options={"lateral_norm": True},
    sizes=_fusion_kernel,
    note=_RATES,
    constants=_counts,
)
PYTORCHVIDEO = Dialect(
    "pytorchvideo",
    "slowfast",
    "pytorchvideo's create_slowfast",
    _pytorchvideo(),
    (_COUNT, head("blocks.6")),
    options={"lateral_norm": True},
    sizes=_fusion_kernel,
    note=_RATES,
    constants=_counts,
)
SLOWONLY = Dialect(
    "mmaction2",
    "slowonly",
    "mmaction2's ResNet3dSlowOnly",
    tuple(_pathway(**_PLAIN)),
    _IGNORED,
    prefixes=("backbone.", ""),
    constants=_counts,
)
IMAGE_RESNET = Dialect(
    "resnet2d",
    "slowonly",
    "a ResNet for images (torchvision), inflated",
    _image_resnet(),
    (_COUNT, head("fc")),
    inflate=True,
)
DIALECTS = (MMACTION2, RE2TAL, PYSLOWFAST, PYTORCHVIDEO, SLOWONLY, IMAGE_RESNET)
