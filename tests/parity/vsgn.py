"""Replays VSGN: every level's features, scores, boxes, losses, normalizers and gradients, and its post-processing."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints_convert.dialects.vsgn import OPENTAD
from checkpoints_convert.rules import fill, flatten, to_state_dict
from re2tal_jax.localizers.vsgn import NORMALIZERS, VSGN, weigh_by_boundaries
from re2tal_jax.localizers.vsgn_targets import pyramid_anchors
from re2tal_jax.postprocess import PostprocessConfig
from tests.parity.actionformer import COMPILER_OPTIONS, padded_inputs
from tests.parity.nms import config_of
from tests.parity.postproc import external_classifier, run_postprocess, same_detections
from tests.parity.replay import Row, compare, compare_gradients, convert_state_dict

OUT, LOSS, GRADIENT = 1e-5, 1e-5, 3e-4  # MANIFEST (g): max-norm relative; masks are exact
INITIAL = 100.0  # of the three normalizers
LOSSES = {
    "loss_tem": "boundary_loss",
    "loss_stage1_cls": "cls_loss",
    "loss_stage1_reg": "reg_loss",
    "loss_stage2_loc": "corner_loss",
    "cost": "total",
}


def recognises(path: Path, content: Any) -> bool:
    """A golden file of a VSGN that starts from features, or of what becomes of a VSGN's results."""
    meta = content.get("meta") if isinstance(content, dict) else None
    return isinstance(meta, dict) and (_is_network(meta) or any(key.endswith("roi_proposals") for key in content))


def _is_network(meta: Mapping[str, Any]) -> bool:
    return meta.get("model_cfg", {}).get("type") == "VSGN"


def replay(path: Path, content: dict[str, Any]) -> Iterator[Row]:
    """Compare every array of every case."""
    yield from (_replay_network(content) if _is_network(content["meta"]) else _replay_postprocessing(path, content))


def _replay_network(content: dict[str, Any]) -> Iterator[Row]:
    model_cfg = content["meta"]["model_cfg"]
    localizer = reference_localizer(model_cfg)
    state_dict = {key[3:]: value for key, value in content.items() if key.startswith("sd/")}
    targets = {path: value.shape for path, value in flatten(localizer).items()}
    localizer = fill(localizer, convert_state_dict(state_dict, OPENTAD.names, targets))
    num_snippets = model_cfg["rpn_head"]["anchor_generator"]["tscale"]
    for level, anchors in enumerate(pyramid_anchors(num_snippets, localizer.strides, localizer.anchor_scales)):
        yield compare(f"buf/anchors{level}", anchors, content[f"buf/anchors{level}"], 0.0)
    graph, state = nnx.split(localizer)
    normalizers = dict.fromkeys(NORMALIZERS, jnp.float32(INITIAL))

    @jax.jit(compiler_options=COMPILER_OPTIONS)
    def run(state: nnx.State, features: jax.Array, mask: jax.Array, *gt: jax.Array) -> Any:
        def loss(state: nnx.State, features: jax.Array) -> Any:
            module = nnx.merge(graph, state)
            outputs = module(features, mask)
            losses, after = module.loss(outputs, *gt, normalizers, train=True)
            return losses["total"], (outputs, losses, after)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, features)

    for case in sorted({match[1] for key in content if (match := re.fullmatch(r"(c\d+)/in/x", key))}):
        golden = {key[len(case) + 1 :]: value for key, value in content.items() if key.startswith(f"{case}/")}
        batch, _, length = golden["in/x"].shape
        number = max(len(value) for key, value in golden.items() if key.startswith("in/gt_labels"))
        (_, results), (gradients, gradient_x) = run(state, *padded_inputs(golden, batch, length, number))
        named = named_results(localizer, *jax.device_get(results))
        for key in (key for key in golden if key.startswith(("out/", "loss/"))):
            tolerance = 0.0 if key.startswith("out/mask") else LOSS if key.startswith("loss/") else OUT
            yield compare(f"{case}/{key}", named.get(key, np.nan), golden[key], tolerance)
        yield compare(f"{case}/gin/x", np.asarray(gradient_x).transpose(0, 2, 1), golden["gin/x"], GRADIENT)
        ours = to_state_dict(jax.device_get(flatten(gradients)), OPENTAD.names)
        yield from compare_gradients(case, golden, ours, GRADIENT)


def reference_localizer(model_cfg: Mapping[str, Any]) -> VSGN:
    """Return the localizer, without weights (shapes alone), that a reference `model_cfg` describes."""
    projection, rpn, roi = model_cfg["projection"], model_cfg["rpn_head"], model_cfg["roi_head"]
    focal = {key: value for key, value in rpn["loss_cls"].items() if key != "type"}
    settings: dict[str, Any] = {
        "channels": projection["out_channels"],
        "strides": tuple(projection["pyramid_levels"]),
        "num_neighbours": projection.get("gcn_kwargs", {}).get("num_neigh", 10) if projection.get("use_gcn") else 0,
        "anchor_scales": tuple(rpn["anchor_generator"]["anchor_scale"]),
        "head_convs": rpn["num_layers"],
        "anchor_tiou": rpn["iou_thr"],
        "corner_tiou": roi["iou_thr"],
        "corner_divisor": roi["roi_extractor"]["beta"],
        "focal_alpha": focal.get("alpha", 0.25),
        "focal_gamma": focal.get("gamma", 2.0),
        "loss_normalizer": INITIAL,
    }
    num_classes = rpn["num_classes"]  # with the background, unless there is but one
    classes = 1 if num_classes == 1 else num_classes - 1
    return nnx.eval_shape(lambda: VSGN(projection["in_channels"], classes, **settings, rngs=nnx.Rngs(0)))


def named_results(localizer: VSGN, outputs: Any, losses: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the localizer computed under the golden file's names and in its layouts."""
    named: dict[str, Any] = {}
    for level, mask in enumerate(outputs.masks):
        named[f"out/proj{level}"] = outputs.features[level].transpose(0, 2, 1)
        named[f"out/neck{level}"] = outputs.joined[level].transpose(0, 2, 1)
        named[f"out/mask{level}"] = mask
    logits = outputs.logits
    scores = jax.nn.sigmoid(logits) if localizer.num_classes == 1 else jax.nn.softmax(logits)
    named |= {
        "out/tem_logits": outputs.boundary_logits.transpose(0, 2, 1),
        "out/rpn_scores": scores,
        "out/rpn_proposals": outputs.boxes,
        "out/roi_proposals": outputs.moved,
    }
    named |= {f"loss/{theirs}": losses[ours] for theirs, ours in LOSSES.items()}
    normalizers = (after[name] for name in NORMALIZERS)
    return named | dict(zip(("loss/ncls_after", "loss/nreg_after", "loss/nroi_after"), normalizers, strict=True))


def _replay_postprocessing(path: Path, content: dict[str, Any]) -> Iterator[Row]:
    """From boxes, scores and boundary logits to detections; where no classes are named a classifier names them."""
    for i, case in enumerate(content["meta"]["cases"]):
        logits, scores, boxes = (content[f"c{i}/{key}"] for key in ("tem_logits", "rpn_scores", "roi_proposals"))
        proposals, at_ends = jax.device_get(weigh_by_boundaries(jnp.asarray(boxes), jnp.asarray(logits.swapaxes(1, 2))))
        classes = case["class_map"]
        scores = (scores[..., 1:] if classes else scores) * at_ends[..., None]
        classifier = None if classes else external_classifier(path, {meta["video_name"] for meta in case["metas"]}, 2)
        config = PostprocessConfig(nms=config_of(case["nms"]))
        for meta, segments, probabilities in zip(case["metas"], proposals, scores, strict=True):
            got = run_postprocess(segments, probabilities, meta, config, classes, classifier)
            yield from same_detections(f"c{i}/{meta['video_name']}", got, case["results"][meta["video_name"]])
