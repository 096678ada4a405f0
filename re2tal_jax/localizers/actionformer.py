"""ActionFormer: a feature pyramid of transformer blocks, and at every point a class and the distances to start and end.

Source: Zhang, Wu, Li, "ActionFormer: Localizing Moments of Actions with Transformers" (arXiv 2202.07925), with the
details of the implementation that Re2TAL's results were published with.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from re2tal_jax.backbones.layers import LayerNorm
from re2tal_jax.errors import ConfigError
from re2tal_jax.localizers.checks import (
    check_architecture,
    check_inputs,
    check_positive,
    check_rates,
    check_targets,
    divisor_of_lengths,
    level_windows,
)
from re2tal_jax.localizers.layers import (
    CONV_NORM_EPSILON,
    TransformerBlock,
    dropout,
    sinusoid,
    split_key,
)
from re2tal_jax.localizers.pyramid import Head, Pyramid
from re2tal_jax.losses import diou_loss, moving_normalizer, sigmoid_focal_loss, smooth_labels
from re2tal_jax.targets import PointTargets, point_targets, pyramid_points


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ActionFormerOutputs:
    """One array per pyramid level, finest first; `features` (before the FPN norm) and `normed` serve golden tests.

    `logits` (B, T_l, K) and `offsets` (B, T_l, 2; in strides, >= 0) are float32 and also filled at masked positions;
    `masks` (B, T_l) says which count. `points` (T_l, 4): time, regression range, stride.
    """

    features: tuple[Array, ...]
    normed: tuple[Array, ...]
    masks: tuple[Array, ...]
    logits: tuple[Array, ...]
    offsets: tuple[Array, ...]
    points: tuple[Array, ...]


class ActionFormer(nnx.Module):
    """ActionFormer localizer; see `re2tal_jax.localizers` for what every localizer offers.

    Args:
        in_channels, num_classes: of the features; K.
        channels: width of pyramid and FPN.
        arch: number of embedding convolutions, stem blocks, and strided blocks; the last makes 1 + arch[2] levels.
        num_heads: attention heads of every block.
        window: -1 for global attention, an odd number for local; or one of these per level.
        use_abs_pos: add sine / cosine position codes (interpolated beyond max_seq_len in evaluation).
        max_seq_len: shorter inputs are padded to it, longer ones to a multiple of `max_div_factor`.
        input_drop: probability of dropping an input channel of a sample over all time.
        kernel_size: of the embedding convolutions.
        path_drop_rate: probability of dropping a sample in a block's branch; 0 also removes the branches' scales.
        proj_drop: dropout after attention's projection and in the MLP.
        regression_range: per level the shortest and longest distance (snippets) to start or end that it regresses.
        head_convs, head_channels: of the heads; width None is `channels`.
        prior_prob: initial probability of every class.
        center_sample_radius: in strides; infinity takes the whole segment.
        label_smoothing: see `losses.smooth_labels`.
        loss_normalizer, loss_normalizer_momentum: initial value and memory of the moving number of positives.
        reg_loss_weight: of the regression loss.
        scale_factor: stride between levels.
        dtype: compute dtype; the stream between blocks, logits, offsets and losses are float32 always.
        rngs: initialises parameters.

    Raises:
        ConfigError: at construction, for combinations that cannot run.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        arch: tuple[int, int, int] = (2, 2, 5),
        num_heads: int = 4,
        window: int | tuple[int, ...] = -1,
        use_abs_pos: bool = False,
        max_seq_len: int = 2304,
        input_drop: float = 0.0,
        kernel_size: int = 3,
        path_drop_rate: float = 0.1,
        proj_drop: float = 0.0,
        regression_range: tuple[tuple[float, float], ...] = ((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10000)),
        head_convs: int = 2,
        head_channels: int | None = None,
        prior_prob: float = 0.01,
        center_sample_radius: float = 1.5,
        label_smoothing: float = 0.0,
        loss_normalizer: float = 100.0,
        loss_normalizer_momentum: float = 0.9,
        reg_loss_weight: float = 1.0,
        scale_factor: int = 2,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        windows = level_windows(window, arch)
        check_architecture(in_channels, channels, arch, num_heads, kernel_size, scale_factor, head_convs, head_channels)
        check_targets(num_classes, regression_range, len(windows), prior_prob, center_sample_radius)
        check_rates(input_drop=input_drop, path_drop_rate=path_drop_rate, proj_drop=proj_drop)
        check_rates(label_smoothing=label_smoothing, loss_normalizer_momentum=loss_normalizer_momentum)
        check_positive(loss_normalizer=loss_normalizer, reg_loss_weight=reg_loss_weight, max_seq_len=max_seq_len)
        self.in_channels, self.num_classes, self.channels = in_channels, num_classes, channels
        self.strides = tuple(scale_factor**level for level in range(len(windows)))
        self.regression_range, self.center_sample_radius = regression_range, center_sample_radius
        self.use_abs_pos, self.max_seq_len, self.input_drop = use_abs_pos, max_seq_len, input_drop
        self.max_div_factor = divisor_of_lengths(self.strides, windows, max_seq_len)
        self.label_smoothing, self.reg_loss_weight = label_smoothing, reg_loss_weight
        self.loss_normalizer, self.loss_normalizer_momentum = loss_normalizer, loss_normalizer_momentum
        block = functools.partial(
            TransformerBlock,
            channels,
            num_heads,
            path_drop_rate=path_drop_rate,
            proj_drop=proj_drop,
            dtype=dtype,
            rngs=rngs,
        )
        self.pyramid = Pyramid(
            in_channels,
            channels,
            arch=arch,
            windows=windows,
            scale_factor=scale_factor,
            kernel_size=kernel_size,
            dtype=dtype,
            rngs=rngs,
            block=block,
        )
        norm = functools.partial(LayerNorm, channels, epsilon=CONV_NORM_EPSILON, dtype=dtype, rngs=rngs)
        self.fpn_norms = nnx.List([norm() for _ in windows])
        self.head = Head(
            channels,
            head_channels or channels,
            num_classes,
            num_convs=head_convs,
            num_levels=len(windows),
            prior_prob=prior_prob,
            dtype=dtype,
            rngs=rngs,
        )

    def initial_state(self) -> dict[str, Array]:
        """Return the state that training carries: the moving number of positives that losses are divided by."""
        return {"loss_normalizer": jnp.asarray(self.loss_normalizer, jnp.float32)}

    def padded_length(self, length: int) -> int:
        """Return the length that inputs of `length` snippets are padded to."""
        if length <= self.max_seq_len:
            return self.max_seq_len
        return -(-length // self.max_div_factor) * self.max_div_factor

    def __call__(
        self, features: Float[Array, "B T C"], mask: Bool[Array, "B T"], *, key: Key[Array, ""] | None = None
    ) -> ActionFormerOutputs:
        """Return logits and offsets at every point of the pyramid; `key` turns dropout and drop path on.

        More masked snippets at the end leave all valid outputs as they are, once every level has one. The first one can
        change them, kept from the published code: blocks' first norms and FPN norms are not masked, so that the
        convolutions after them see a norm's bias just behind the last valid position, but zero behind the end of the
        array. What masked snippets hold reaches half a kernel into the valid ones through the first convolution.

        Raises ConfigError for features of another width or a mask of another shape.
        """
        check_inputs(features, mask, self.in_channels)
        self._check_length(features.shape[1], training=key is not None)
        tail = self.padded_length(features.shape[1]) - features.shape[1]
        x = jnp.pad(features, [(0, 0), (0, tail), (0, 0)])
        mask = jnp.pad(mask, [(0, 0), (0, tail)])
        input_key, pyramid_key = split_key(key, 2)
        x = dropout(x, self.input_drop, input_key, (x.shape[0], 1, x.shape[2]))
        position = sinusoid(x.shape[1], self.channels, self.max_seq_len) if self.use_abs_pos else None
        levels, masks = self.pyramid(x, mask, None if position is None else jnp.asarray(position), key=pyramid_key)
        normed = tuple(norm(level) for norm, level in zip(self.fpn_norms, levels, strict=True))
        logits, offsets = self.head(normed, masks)
        points = pyramid_points([m.shape[1] for m in masks], self.strides, self.regression_range)
        return ActionFormerOutputs(
            features=levels,
            normed=normed,
            masks=masks,
            logits=logits,
            offsets=offsets,
            points=tuple(map(jnp.asarray, points)),
        )

    def targets(
        self,
        outputs: ActionFormerOutputs,
        gt_segments: Float[Array, "B N 2"],
        gt_labels: Int[Array, "B N"],
        gt_mask: Bool[Array, "B N"],
    ) -> PointTargets:
        """Return what each point of every sample is to predict, levels concatenated: (B, P, K) and (B, P, 2)."""
        assign = functools.partial(
            point_targets,
            jnp.concatenate(outputs.points),
            num_classes=self.num_classes,
            center_sample_radius=self.center_sample_radius,
        )
        return jax.vmap(assign)(gt_segments, gt_labels, gt_mask)

    def loss(
        self,
        outputs: ActionFormerOutputs,
        gt_segments: Float[Array, "B N 2"],
        gt_labels: Int[Array, "B N"],
        gt_mask: Bool[Array, "B N"],
        state: dict[str, Array],
        *,
        train: bool,
    ) -> tuple[dict[str, Float[Array, ""]], dict[str, Array]]:
        """Return cls_loss, reg_loss (weighted) and their sum "total", float32, and the new state.

        Sums over the whole batch are divided by the moving number of positives in training, by this batch's number in
        evaluation (at least 1). Segments are in snippets; a batch without any gives a regression loss of zero.
        The batch is the global one, where the published code counts and averages per GPU: `loss_normalizer` therefore
        scales with the number of its GPUs, though only the first tens of steps remember it.
        """
        targets = self.targets(outputs, gt_segments, gt_labels, gt_mask)
        valid, points = jnp.concatenate(outputs.masks, axis=1), jnp.concatenate(outputs.points)
        positive = valid & (targets.classes > 0).any(-1)
        num_positive = positive.sum(dtype=jnp.float32)
        if train:
            normalizer = moving_normalizer(state["loss_normalizer"], num_positive, self.loss_normalizer_momentum)
            state = {"loss_normalizer": normalizer}
        else:
            normalizer = jnp.maximum(num_positive, 1.0)
        focal = sigmoid_focal_loss(
            jnp.concatenate(outputs.logits, axis=1), smooth_labels(targets.classes, self.label_smoothing)
        )
        cls_loss = jnp.where(valid[..., None], focal, 0.0).sum() / normalizer
        predicted = _segments(points, jnp.concatenate(outputs.offsets, axis=1))
        diou = diou_loss(predicted, _segments(points, targets.offsets))
        reg_loss = jnp.where(positive, diou, 0.0).sum() / normalizer * self.reg_loss_weight
        return {"cls_loss": cls_loss, "reg_loss": reg_loss, "total": cls_loss + reg_loss}, state

    def decode(
        self, outputs: ActionFormerOutputs
    ) -> tuple[Float[Array, "B P 2"], Float[Array, "B P K"], Bool[Array, "B P"]]:
        """Return segments in snippets (not clipped to the video), class probabilities, and which points are real."""
        proposals = _segments(jnp.concatenate(outputs.points), jnp.concatenate(outputs.offsets, axis=1))
        scores = jax.nn.sigmoid(jnp.concatenate(outputs.logits, axis=1))
        return proposals, scores, jnp.concatenate(outputs.masks, axis=1)

    def _check_length(self, length: int, *, training: bool) -> None:
        if training and self.use_abs_pos and length > self.max_seq_len:
            raise ConfigError(
                f"{length} snippets are more than max_seq_len = {self.max_seq_len}, and position codes are"
                " interpolated in evaluation only. Raise max_seq_len or train on shorter windows."
            )


def _segments(points: Float[Array, "P 4"], offsets: Float[Array, "B P 2"]) -> Float[Array, "B P 2"]:
    time, stride = points[:, 0], points[:, 3]
    return jnp.stack([time - offsets[..., 0] * stride, time + offsets[..., 1] * stride], axis=-1)


VARIANTS = {"actionformer": ActionFormer}
