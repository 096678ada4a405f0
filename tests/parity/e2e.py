"""Replays a whole detector, from frames to losses: pixels, rewired backbone, pooling, localizer, frozen norms."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints_convert.dialects import detector_rules
from checkpoints_convert.dialects.video_swin import MMACTION2, RE2TAL
from checkpoints_convert.rules import Rules, fill, flatten, to_state_dict
from re2tal_jax.backbones import video_swin
from re2tal_jax.detector import Detector
from re2tal_jax.training.optim import assign_rules, recipe_rules
from re2tal_jax.types import Batch
from tests.parity.actionformer import (
    COMPILER_OPTIONS,
    compare_gradients,
    reference_localizer,
)
from tests.parity.replay import Row, compare, convert_state_dict

OUT, GRADIENT = 2e-5, 3e-4  # MANIFEST (n)


def recognises(path: Path, content: Any) -> bool:
    """A golden file that starts from frames and whose backbone is a Swin network."""
    if not isinstance(content, dict) or "in/frames" not in content:
        return False
    return "SwinTransformer3D" in content["meta"]["model_cfg"]["backbone"]["backbone"]["type"]


def replay(path: Path, content: dict[str, Any]) -> Iterator[Row]:
    """Compare features, losses, proposals, scores and every gradient, in training mode of the localizer's loss."""
    meta = content["meta"]
    state_dict = {key[3:]: value for key, value in content.items() if key.startswith("sd/")}
    rewired = meta["model_cfg"]["backbone"]["backbone"]["type"].endswith("_inv")
    names = detector_rules(RE2TAL if rewired else MMACTION2)
    detector = _detector(meta, rewired=rewired, num_snippets=content["in/mask"].shape[1])
    targets = {path: leaf.shape for path, leaf in flatten(detector).items()}
    detector = fill(detector, convert_state_dict(state_dict, names, targets))
    params = flatten(detector)
    rules = recipe_rules(localizer_lr=1e-3, backbone_lr=1e-5, weight_decay=0.05)
    frozen = {p for p, rule in assign_rules({p: v.shape for p, v in params.items()}, rules).items() if rule.frozen}
    graph, state = nnx.split(detector)
    trainable = {path: value for path, value in params.items() if path not in frozen}

    @jax.jit(compiler_options=COMPILER_OPTIONS)
    def run(trainable: dict[str, jax.Array], video: jax.Array, batch: Batch) -> Any:
        def loss(trainable: dict[str, jax.Array]) -> Any:
            leaves = [
                (p, v.replace(trainable.get(".".join(map(str, p)), v.get_value()))) for p, v in nnx.to_flat_state(state)
            ]
            module = nnx.merge(graph, nnx.from_flat_state(leaves))
            outputs, features = module(video, batch.mask)
            losses, after = module.localizer.loss(
                outputs, batch.gt_segments, batch.gt_labels, batch.gt_mask, module.initial_state(), train=True
            )
            return losses["total"], (features, losses, after, module.localizer.decode(outputs))

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    video = jnp.asarray(content["in/frames"][:, 0].transpose(0, 2, 3, 4, 1), jnp.float32)
    (_, (features, losses, after, decoded)), gradients = run(trainable, video, _batch(content))
    yield compare("out/feats", np.asarray(features).transpose(0, 2, 1), content["out/feats"], OUT)
    for name, ours in {"cls_loss": "cls_loss", "reg_loss": "reg_loss", "cost": "total"}.items():
        yield compare(f"loss/{name}", losses[ours], content[f"loss/{name}"], OUT)
    yield compare("loss/normalizer_after", after["loss_normalizer"], content["loss/normalizer_after"], OUT)
    proposals, scores, valid = map(np.asarray, decoded)
    for b, real in enumerate(valid):
        yield compare(f"out/proposals{b}", proposals[b][real], content[f"out/proposals{b}"], OUT)
        yield compare(f"out/scores{b}", scores[b][real], content[f"out/scores{b}"], OUT)
    everything = {path: gradients.get(path, np.zeros_like(value)) for path, value in params.items()}
    yield from compare_gradients("", content, to_state_dict(everything, names), GRADIENT)
    yield _frozen_row(frozen, params, names, set(meta["params_without_grad"]))


def _detector(meta: Mapping[str, Any], *, rewired: bool, num_snippets: int) -> Detector:
    cfg = meta["model_cfg"]["backbone"]
    network, pixels = cfg["backbone"], cfg["data_preprocessor"]
    names = ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias")
    settings = {name: tuple(v) if isinstance(v := network[name], list) else v for name in names}
    return Detector(
        nnx.eval_shape(lambda: video_swin.VideoSwin(**settings, rewired=rewired, rngs=nnx.Rngs(0))),
        reference_localizer(meta["model_cfg"]),
        num_snippets=num_snippets,
        num_classes=meta["model_cfg"]["rpn_head"]["num_classes"],
        pixel_mean=tuple(pixels["mean"]),
        pixel_std=tuple(pixels["std"]),
        rngs=nnx.Rngs(0),
    )


def _batch(content: Mapping[str, np.ndarray]) -> Batch:
    size = len(content["in/mask"])
    counts = [len(content[f"in/gt_labels{b}"]) for b in range(size)]
    segments = np.zeros((size, max(counts), 2), np.float32)
    labels = np.zeros((size, max(counts)), np.int32)
    for b, count in enumerate(counts):
        segments[b, :count], labels[b, :count] = content[f"in/gt_segments{b}"], content[f"in/gt_labels{b}"]
    return Batch(
        video=jnp.zeros((size, 1, 1, 1, 3), jnp.uint8),
        frame_size=jnp.ones((size, 2)),
        mask=jnp.asarray(content["in/mask"]),
        gt_segments=jnp.asarray(segments),
        gt_labels=jnp.asarray(labels),
        gt_mask=jnp.arange(max(counts)) < jnp.asarray(counts)[:, None],
        window=jnp.arange(size),
    )


def _frozen_row(frozen: set[str], params: Mapping[str, Any], names: Rules, wanted: set[str]) -> Row:
    """Tell whether the recipe freezes just the parameters that the reference leaves without a gradient."""
    marks = {path: np.full(np.shape(value), float(path in frozen)) for path, value in params.items()}
    ours = {key for key, mark in to_state_dict(marks, names).items() if mark.all()}
    return Row("params_without_grad", float(len(ours ^ wanted)), 0.0)
