"""The dialects that are known, by network.

To add one: a `Dialect` in the file of its network (a new file needs its line here), and a sample in its tests.
"""

from checkpoints_convert.dialects import actionformer, slowfast, video_swin, vit, vsgn
from checkpoints_convert.dialects.dialect import Dialect
from checkpoints_convert.rules import Ignored, Rules

DIALECTS: tuple[Dialect, ...] = (*video_swin.DIALECTS, *slowfast.DIALECTS, *vit.DIALECTS)
LOCALIZER = Ignored(
    r"(projection|neck|rpn_head|roi_head)\..*",
    "the localizer; name a config file as the model to convert the whole detector",
)
LOCALIZERS: tuple[Dialect, ...] = (actionformer.OPENTAD, vsgn.OPENTAD)
OURS = {"snippet_head.": "the head of the auxiliary loss, ours alone and not needed to detect"}
OPENTAD_BACKBONE = "backbone.model.backbone."  # how OpenTAD's detectors call the network inside wrapper and recogniser


def detector_rules(backbone: Dialect) -> Rules:
    """Return the names of a whole OpenTAD detector whose backbone speaks the given dialect, with any localizer."""
    parts = [backbone.inside(OPENTAD_BACKBONE, "backbone.")]
    parts += [localizer.inside("", "localizer.") for localizer in LOCALIZERS]
    return Rules(sum((part.rules for part in parts), ()), sum((part.ignored for part in parts), ()))


def backbone_of_detector(backbone: Dialect) -> Rules:
    """Return the names of the backbone alone in such a detector."""
    found = backbone.inside(OPENTAD_BACKBONE)
    return Rules(found.rules, (LOCALIZER, *found.ignored))
