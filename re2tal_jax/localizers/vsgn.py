"""VSGN: anchors on a feature pyramid, scored, moved twice, and weighed by how much they start and end at boundaries.

Source: Zhao, Thabet, Ghanem, "Video Self-Stitching Graph Network for Temporal Action Localization" (arXiv 2011.14598),
with the details of the implementation that Re2TAL's results were published with. The localizer is all of it but
stitching, which is a matter of the data.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from re2tal_jax.errors import ConfigError
from re2tal_jax.localizers.checks import check_inputs, check_positive, check_rates
from re2tal_jax.localizers.vsgn_heads import AnchorHead, BoundaryHead, CornerHead
from re2tal_jax.localizers.vsgn_losses import balanced_binary_cross_entropy, balanced_cross_entropy, giou_loss
from re2tal_jax.localizers.vsgn_pyramid import FeaturePyramid, Pyramid
from re2tal_jax.localizers.vsgn_targets import Matches, boundary_targets, boxes_of, match, pyramid_anchors
from re2tal_jax.losses import moving_normalizer, sigmoid_focal_loss

NORMALIZERS = ("cls_normalizer", "reg_normalizer", "corner_normalizer")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VSGNOutputs:
    """What the network says of a batch; `features`, `joined` and `masks` (one array a level) serve golden tests.

    `boundary_logits` (B, T, 3) of start, end and action; `logits` (B, P, K), or (B, P, 1 + K) with background first if
    there is more than one class; `boxes` (B, P, 2) of the anchors (P, 2), and `moved` (B, P, 2) by their corners, both
    in snippets and not clipped; `mask` (B, T), of padded length. All but the features are float32.
    """

    features: tuple[Array, ...]
    joined: tuple[Array, ...]
    masks: tuple[Array, ...]
    boundary_logits: Array
    logits: Array
    anchors: Array
    boxes: Array
    moved: Array
    mask: Array


class VSGN(nnx.Module):
    """VSGN localizer; see `re2tal_jax.localizers` for what every localizer offers. It has no dropout.

    Masked snippets are not told from real ones by group norms, the graph and the boundary head, as published: padding
    changes what is said of the real ones a little.

    Args:
        in_channels, num_classes: of the features; K. One class is scored alone, several against background.
        channels: width of pyramid, FPN and heads.
        strides: snippets to a position at each level, even and each twice the one before.
        num_neighbours: of a snippet in the graph that the levels' convolutions take in; 0 for no graph.
        anchor_scales: lengths of a position's anchors, in strides.
        head_convs: of the towers that score and move anchors.
        num_groups: of channels, in the towers' group norms.
        anchor_tiou: overlap from which an anchor, and after it its box, belongs to a segment.
        corner_tiou: the same for the boxes that are moved by their corners.
        corner_divisor: corners are looked at where they are and this part of the box's length to either side.
        focal_alpha, focal_gamma: of the loss of a single class; several have a balanced cross-entropy.
        loss_normalizer, loss_normalizer_momentum: initial value and memory of the three moving numbers of positives.
        dtype: compute dtype; logits, boxes and losses are float32 always.
        rngs: initialises parameters.

    Raises:
        ConfigError: at construction, for combinations that cannot run.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 256,
        strides: tuple[int, ...] = (2, 4, 8, 16, 32),
        num_neighbours: int = 0,
        anchor_scales: tuple[float, ...] = (3.0, 7.5),
        head_convs: int = 4,
        num_groups: int = 32,
        anchor_tiou: float = 0.6,
        corner_tiou: float = 0.7,
        corner_divisor: float = 8.0,
        focal_alpha: float = 0.35,
        focal_gamma: float = 2.0,
        loss_normalizer: float = 100.0,
        loss_normalizer_momentum: float = 0.9,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_architecture(in_channels, num_classes, channels, num_groups, head_convs, num_neighbours)
        _check_anchors(strides, anchor_scales)
        check_rates(anchor_tiou=anchor_tiou, corner_tiou=corner_tiou, focal_alpha=focal_alpha)
        check_rates(loss_normalizer_momentum=loss_normalizer_momentum)
        check_positive(loss_normalizer=loss_normalizer, corner_divisor=corner_divisor, focal_gamma=focal_gamma)
        self.in_channels, self.num_classes, self.strides = in_channels, num_classes, tuple(strides)
        self.anchor_scales, self.anchor_tiou, self.corner_tiou = tuple(anchor_scales), anchor_tiou, corner_tiou
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.loss_normalizer, self.loss_normalizer_momentum = loss_normalizer, loss_normalizer_momentum
        part = {"dtype": dtype, "rngs": rngs}
        self.pyramid = Pyramid(
            in_channels,
            channels,
            stem_stride=strides[0] // 2,
            num_levels=len(strides),
            num_neighbours=num_neighbours,
            **part,
        )
        self.fpn = FeaturePyramid(channels, num_levels=len(strides), **part)
        self.head = AnchorHead(
            channels,
            1 if num_classes == 1 else 1 + num_classes,
            len(anchor_scales),
            num_convs=head_convs,
            num_groups=num_groups,
            **part,
        )
        self.boundaries = BoundaryHead(channels, **part)
        self.corners = CornerHead(channels, divisor=corner_divisor, **part)

    def initial_state(self) -> dict[str, Array]:
        """Return the state that training carries: the moving numbers of positives that three losses are divided by."""
        return {name: jnp.asarray(self.loss_normalizer, jnp.float32) for name in NORMALIZERS}

    def padded_length(self, length: int) -> int:
        """Return the length that inputs of `length` snippets are padded to, a multiple of the coarsest stride."""
        return -(-length // self.strides[-1]) * self.strides[-1]

    def __call__(
        self, features: Float[Array, "B T C"], mask: Bool[Array, "B T"], *, key: Key[Array, ""] | None = None
    ) -> VSGNOutputs:
        """Return scores and boxes of all anchors and boundary scores of all snippets; `key` changes nothing.

        Raises ConfigError for features of another width or a mask of another shape.
        """
        check_inputs(features, mask, self.in_channels)
        num_snippets = self.padded_length(features.shape[1])
        tail = num_snippets - features.shape[1]
        x = jnp.pad(features, [(0, 0), (0, tail), (0, 0)])
        mask = jnp.pad(mask, [(0, 0), (0, tail)])
        levels, masks = self.pyramid(x, mask)
        joined = self.fpn(levels, masks)
        logits, coordinates = self.head(joined)
        anchors = jnp.asarray(np.concatenate(pyramid_anchors(num_snippets, self.strides, self.anchor_scales)))
        boxes = boxes_of(coordinates, anchors)
        return VSGNOutputs(
            features=levels,
            joined=joined,
            masks=masks,
            boundary_logits=self.boundaries(joined[0], num_snippets),
            logits=logits,
            anchors=anchors,
            boxes=boxes,
            moved=self.corners(joined[0], boxes, stride=self.strides[0], num_snippets=num_snippets),
            mask=mask,
        )

    def loss(
        self,
        outputs: VSGNOutputs,
        gt_segments: Float[Array, "B N 2"],
        gt_labels: Int[Array, "B N"],
        gt_mask: Bool[Array, "B N"],
        state: dict[str, Array],
        *,
        train: bool,
    ) -> tuple[dict[str, Float[Array, ""]], dict[str, Array]]:
        """Return boundary_loss, cls_loss, reg_loss, corner_loss and their sum "total", float32, and the new state.

        Anchors are matched with segments to be moved, the boxes made from them to be scored and to be moved again.
        Evaluation divides by the moving numbers too and moves them, as published: `train` changes nothing. The batch
        is the global one, where the published code counts per GPU.
        """
        gt = gt_segments, gt_labels, gt_mask
        of_anchors = self._match(jnp.broadcast_to(outputs.anchors, outputs.boxes.shape), self.anchor_tiou, *gt)
        of_boxes = self._match(outputs.boxes, self.anchor_tiou, *gt)
        of_corners = self._match(outputs.boxes, self.corner_tiou, *gt)
        counts = [(found.classes > 0).sum(dtype=jnp.float32) for found in (of_boxes, of_anchors, of_corners)]
        state = {
            name: moving_normalizer(state[name], count, self.loss_normalizer_momentum)
            for name, count in zip(NORMALIZERS, counts, strict=True)
        }
        boundaries = jax.vmap(functools.partial(boundary_targets, outputs.mask.shape[1]))(gt_segments, gt_mask)
        losses = {
            "boundary_loss": sum(
                (balanced_binary_cross_entropy(outputs.boundary_logits[..., i], boundaries[..., i]) for i in range(3)),
                start=jnp.zeros((), jnp.float32),
            ),
            "cls_loss": self._classification_loss(outputs.logits, of_boxes.classes, state["cls_normalizer"]),
            "reg_loss": _regression_loss(outputs.boxes, of_anchors) / state["reg_normalizer"],
            "corner_loss": _regression_loss(outputs.moved, of_corners) / state["corner_normalizer"],
        }
        return losses | {"total": sum(losses.values(), start=jnp.zeros((), jnp.float32))}, state

    def decode(self, outputs: VSGNOutputs) -> tuple[Float[Array, "B P 2"], Float[Array, "B P K"], Bool[Array, "B P"]]:
        """Return moved boxes clipped to the window, their scores, and which of them reach a real snippet.

        A score is the class probability times those of a start and an end at the box's two ends.
        """
        proposals, at_ends = weigh_by_boundaries(outputs.moved, outputs.boundary_logits)
        real = jnp.cumsum(jnp.pad(outputs.mask.astype(jnp.int32), [(0, 0), (1, 0)]), axis=1)
        first = jnp.floor(proposals[..., 0]).astype(jnp.int32)
        behind = jnp.floor(proposals[..., 1]).astype(jnp.int32) + 1
        valid = jnp.take_along_axis(real, behind, axis=1) > jnp.take_along_axis(real, first, axis=1)
        return proposals, self.class_scores(outputs) * at_ends[..., None], valid

    def class_scores(self, outputs: VSGNOutputs) -> Float[Array, "B P K"]:
        """Return the probability of each class, background left out."""
        if self.num_classes == 1:
            return jax.nn.sigmoid(outputs.logits)
        return jax.nn.softmax(outputs.logits)[..., 1:]

    def _match(self, boxes: Array, tiou: float, *gt: Array) -> Matches:
        return jax.vmap(functools.partial(match, threshold=tiou))(boxes, *gt)

    def _classification_loss(self, logits: Array, classes: Array, normalizer: Array) -> Float[Array, ""]:
        """Of several classes the balanced cross-entropy, which needs no normalizer; of one the focal loss."""
        if self.num_classes > 1:
            return balanced_cross_entropy(logits, classes)
        positive = (classes > 0).astype(jnp.float32)
        focal = sigmoid_focal_loss(logits[..., 0], positive, alpha=self.focal_alpha, gamma=self.focal_gamma)
        return focal.sum() / normalizer


def weigh_by_boundaries(
    boxes: Float[Array, "B P 2"], boundary_logits: Float[Array, "B T 3"]
) -> tuple[Float[Array, "B P 2"], Float[Array, "B P"]]:
    """Return boxes clipped to the window and in order, and how probable a start and an end at their two ends are.

    An end between two snippets has the mean of their probabilities, wherever between them it lies.
    """
    num_snippets = boundary_logits.shape[1]
    boxes = jnp.sort(jnp.clip(boxes, 0, num_snippets - 1), axis=-1)  # the loss, too, takes ends in either order
    probabilities = jax.nn.sigmoid(boundary_logits[..., :2])
    around = jnp.stack([jnp.floor(boxes), jnp.ceil(boxes)]).astype(jnp.int32)  # 2 B P 2
    before, after = (jnp.take_along_axis(probabilities, index, axis=1) for index in around)
    return boxes, ((before + after) / 2).prod(-1)


def _regression_loss(boxes: Float[Array, "B P 2"], matches: Matches) -> Float[Array, ""]:
    return jnp.where(matches.classes > 0, giou_loss(boxes, matches.segments), 0.0).sum()


def _check_architecture(
    in_channels: int, num_classes: int, channels: int, num_groups: int, head_convs: int, num_neighbours: int
) -> None:
    for name, value in {"in_channels": in_channels, "num_classes": num_classes, "channels": channels}.items():
        if value < 1:
            raise ConfigError(f"{name} = {value}: expected at least 1.")
    if num_groups < 1 or channels % num_groups:
        raise ConfigError(
            f"num_groups = {num_groups} does not divide channels = {channels}: expected a divisor, for example"
            f" {math.gcd(max(num_groups, 1), channels)}."
        )
    for name, value in {"head_convs": head_convs, "num_neighbours": num_neighbours}.items():
        if value < 0:
            raise ConfigError(f"{name} = {value}: expected 0 or more.")


def _check_anchors(strides: tuple[int, ...], anchor_scales: tuple[float, ...]) -> None:
    first = strides[0] if strides else 2
    doubled = tuple(first * 2**level for level in range(len(strides)))
    if not strides or first < 2 or first % 2 or tuple(strides) != doubled:
        raise ConfigError(
            f"strides = {strides!r}: expected an even number and its doubles, one for each level, for example"
            f" {tuple(2 * 2**level for level in range(max(len(strides), 1)))}."
        )
    if not anchor_scales or not all(0 < scale < math.inf for scale in anchor_scales):
        raise ConfigError(f"anchor_scales = {anchor_scales!r}: expected at least one, all of them positive.")


VARIANTS = {"vsgn": VSGN}
