"""Replays ActionFormer: every level's features, logits and offsets, targets, losses, proposals and every gradient.

`reference_localizer` and `load_parameters` also serve the end-to-end files.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints_convert.dialects.actionformer import OPENTAD
from checkpoints_convert.rules import fill, flatten, to_state_dict
from re2tal_jax.localizers.actionformer import ActionFormer
from re2tal_jax.localizers.layers import sinusoid
from tests.parity.replay import Row, compare, convert_state_dict

OUT, LOSS, GRADIENT = 1e-5, 1e-5, 1e-4  # MANIFEST (f): max-norm relative; masks and targets are exact
# Softmax ignores a shift of all keys: these gradients are zero, what the reference recorded is rounding (item 24).
ZERO_GRADIENT = re.compile(r"(.*\.attn\.)key(_norm)?\.bias")
# The programs run once for microseconds: compile them without LLVM's optimisations, four times faster.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}

Golden = Mapping[str, np.ndarray]


def recognises(path: Path, content: Any) -> bool:
    """A golden file whose meta describes an ActionFormer and whose cases start from features, not frames."""
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict) or not {"arch", "n_head", "max_seq_len"} <= set(meta.get("cfg", ())):
        return False
    names = {key.rpartition("in/")[2] for key in content if "in/" in key}
    return "mask" in names and "frames" not in names


def replay(path: Path, content: dict[str, Any]) -> Iterator[Row]:
    """Compare every array of every case."""
    state_dict = {key[3:]: value for key, value in content.items() if key.startswith("sd/")}
    localizer = load_parameters(reference_localizer(content["meta"]["model_cfg"]), state_dict)
    if "buf/projection.pos_embed" in content:
        codes = sinusoid(localizer.max_seq_len, localizer.channels, localizer.max_seq_len)
        yield compare("buf/projection.pos_embed", codes.T[None], content["buf/projection.pos_embed"], OUT)
    graph, state = nnx.split(localizer)
    normalizer = jnp.float32(content["meta"]["loss_normalizer_init"])

    @jax.jit(compiler_options=COMPILER_OPTIONS)
    def run(state: nnx.State, features: jax.Array, mask: jax.Array, *gt: jax.Array) -> Any:
        def loss(state: nnx.State, features: jax.Array) -> Any:
            module = nnx.merge(graph, state)
            outputs = module(features, mask)
            train = module.loss(outputs, *gt, {"loss_normalizer": normalizer}, train=True)
            evaluation = module.loss(outputs, *gt, {"loss_normalizer": normalizer}, train=False)
            rest = {"outputs": outputs, "targets": module.targets(outputs, *gt), "decoded": module.decode(outputs)}
            return train[0]["total"], rest | {"loss_train": train, "loss_eval": evaluation}

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, features)

    cases = {
        match[1]: {key[match.end(1) :]: value for key, value in content.items() if key.startswith(match[1])}
        for name in content
        if (match := re.fullmatch(r"((?:.*/)?)in/mask", name))
    }
    shapes = shared_shapes(localizer, cases)
    for prefix, golden in sorted(cases.items()):
        (_, results), (gradients, gradient_x) = run(state, *padded_inputs(golden, *shapes[prefix]))
        yield from compare_named(prefix, golden, named_results(results))
        batch, _, length = golden["in/x"].shape
        ours_x = np.asarray(gradient_x)[:batch, :length].transpose(0, 2, 1)
        yield compare(f"{prefix}gin/x", ours_x, golden["gin/x"], GRADIENT)
        yield from compare_gradients(prefix, golden, torch_gradients(gradients))


def shared_shapes(localizer: ActionFormer, cases: Mapping[str, Golden]) -> dict[str, tuple[int, int, int]]:
    """Return batch size, length and number of segments that each case is padded to, so that few programs are compiled.

    Cases that the localizer pads to one length anyway come to the longest among them; added samples are masked, and the
    comparison leaves them out.
    """
    padded = {prefix: localizer.padded_length(golden["in/x"].shape[2]) for prefix, golden in cases.items()}
    batch = max(len(golden["in/mask"]) for golden in cases.values())
    number = max(len(value) for golden in cases.values() for key, value in golden.items() if "in/gt_labels" in key)
    length = {p: max(g["in/x"].shape[2] for prefix, g in cases.items() if padded[prefix] == p) for p in padded.values()}
    return {prefix: (batch, length[padded[prefix]], number) for prefix in cases}


def reference_localizer(model_cfg: Mapping[str, Any], **changes: Any) -> ActionFormer:
    """Return the localizer, without weights (shapes alone), that a reference `model_cfg` describes.

    `changes` override settings.
    """
    projection, head = model_cfg["projection"], model_cfg["rpn_head"]
    window, points = projection["attn_cfg"]["n_mha_win_size"], head["prior_generator"]
    settings: dict[str, Any] = {
        "channels": projection["out_channels"],
        "arch": tuple(projection["arch"]),
        "num_heads": projection["attn_cfg"]["n_head"],
        "window": window if isinstance(window, int) else tuple(window),
        "use_abs_pos": projection["use_abs_pe"],
        "max_seq_len": projection["max_seq_len"],
        "kernel_size": projection["conv_cfg"]["kernel_size"],
        "proj_drop": projection["conv_cfg"]["proj_pdrop"],
        "path_drop_rate": projection["path_pdrop"],
        "input_drop": projection.get("input_pdrop", 0.0),
        "regression_range": tuple(tuple(limits) for limits in points["regression_range"]),
        "head_convs": head["num_convs"],
        "head_channels": head["feat_channels"],
        "prior_prob": head["cls_prior_prob"],
        "center_sample_radius": head["center_sample_radius"] if head["center_sample"] == "radius" else np.inf,
        "label_smoothing": head["label_smoothing"],
        "loss_normalizer": head["loss_normalizer"],
        "loss_normalizer_momentum": head["loss_normalizer_momentum"],
        "reg_loss_weight": head["loss_weight"],
    }
    localizer = nnx.eval_shape(
        lambda: ActionFormer(projection["in_channels"], head["num_classes"], **settings | changes, rngs=nnx.Rngs(0))
    )
    if list(localizer.strides) != list(points["strides"]):
        raise ValueError(f"the file's strides are {points['strides']}, ours {localizer.strides}")
    return localizer


def load_parameters(localizer: ActionFormer, state_dict: Golden) -> ActionFormer:
    """Return the localizer with the weights of a reference state dict, whose backbone keys are left aside."""
    targets = {path: value.shape for path, value in flatten(localizer).items()}
    return fill(localizer, convert_state_dict(_localizer_keys(state_dict), OPENTAD.names, targets))


def _localizer_keys(state_dict: Golden) -> dict[str, np.ndarray]:
    """Return what belongs to the localizer in a detector's state dict."""
    return {key: value for key, value in state_dict.items() if not key.startswith("backbone.")}


def torch_gradients(gradients: nnx.State) -> dict[str, np.ndarray]:
    """Return a localizer's gradients under the reference's names and in its layouts."""
    return to_state_dict(jax.device_get(flatten(gradients)), OPENTAD.names)


def padded_inputs(golden: Golden, batch: int, length: int, number: int) -> tuple[jax.Array, ...]:
    """Return features (B, T, C), mask (B, T), segments (B, N, 2), labels (B, N) and their mask (B, N) of a case."""
    samples, channels, snippets = golden["in/x"].shape
    features, mask = np.zeros((batch, length, channels), np.float32), np.zeros((batch, length), bool)
    features[:samples, :snippets], mask[:samples, :snippets] = golden["in/x"].transpose(0, 2, 1), golden["in/mask"]
    segments, labels = np.zeros((batch, number, 2), np.float32), np.zeros((batch, number), np.int32)
    gt_mask = np.zeros((batch, number), bool)
    for b in range(samples):
        n = len(golden[f"in/gt_labels{b}"])
        segments[b, :n], labels[b, :n], gt_mask[b, :n] = golden[f"in/gt_segments{b}"], golden[f"in/gt_labels{b}"], True
    return tuple(map(jnp.asarray, (features, mask, segments, labels, gt_mask)))


def named_results(results: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return what the localizer computed under the golden file's names and in its layouts."""
    outputs = results["outputs"]
    named: dict[str, Any] = {}
    for level in range(len(outputs.masks)):
        for name, arrays in {"proj": "features", "neck": "normed", "cls": "logits", "reg": "offsets"}.items():
            named[f"out/{name}{level}"] = np.asarray(getattr(outputs, arrays)[level]).transpose(0, 2, 1)
        named[f"out/mask{level}"] = outputs.masks[level]
        named[f"out/points{level}"] = outputs.points[level]
    proposals, scores, valid = map(np.asarray, results["decoded"])
    for b, real in enumerate(valid):
        named |= {f"out/proposals{b}": proposals[b][real], f"out/scores{b}": scores[b][real]}
    named |= {"tgt/gt_cls": results["targets"].classes, "tgt/gt_reg": results["targets"].offsets}
    for mode in ("loss_train", "loss_eval"):
        losses, state = results[mode]
        named |= {f"{mode}/{name}": losses[name] for name in ("cls_loss", "reg_loss")}
        named |= {f"{mode}/cost": losses["total"], f"{mode}/normalizer_after": state["loss_normalizer"]}
    return named


def compare_named(prefix: str, golden: Golden, named: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Compare everything a case records of outputs, targets and losses; what we lack is an infinite error."""
    for key in (key for key in golden if key.split("/")[0] in ("out", "tgt", "loss_train", "loss_eval")):
        exact = key.startswith(("out/mask", "tgt/"))
        tolerance = 0.0 if exact else LOSS if key.startswith("loss") else OUT
        got = np.asarray(named[key]) if key in named else np.full(golden[key].shape, np.nan)
        if got.ndim == 3 or key.startswith("out/mask"):  # a batch, to which samples may have been added
            got = got[: len(golden["in/mask"])]
        yield compare(f"{prefix}{key}", got, golden[key], tolerance)


def compare_gradients(
    prefix: str, golden: Golden, ours: Mapping[str, np.ndarray], tolerance: float = GRADIENT
) -> Iterator[Row]:
    """Compare full gradients, and norm and signature of every parameter; those the reference lacks are to be zero.

    A signature is a sum that may cancel: its error is relative to the gradient's norm. Analytically zero gradients are
    measured by the norm of the gradient of the weight beside them, and none by less than 1e-4 of the file's largest
    norm: what differs by 1e-8 of that is float32 rounding (in a gradient so small the reference's reaches 1e-3).
    """
    names = [str(name) for name in golden["gnames"]]
    norms = dict(zip(names, golden["gnorm"], strict=True))
    least = max(1e-4 * float(golden["gnorm"].max()), 1e-30)

    def row(kind: str, name: str, error: float, size: float) -> Row:
        if match := ZERO_GRADIENT.fullmatch(name):
            size = norms[f"{match[1]}key.weight"]
        return Row(f"{prefix}{kind}/{name}", float(error / max(size, least)), tolerance)

    for name, signature in zip(names, golden["gsig"], strict=True):
        if name not in ours:
            yield Row(f"{prefix}gnorm/{name} is missing", np.inf, tolerance)
            continue
        flat = ours[name].astype(np.float64).ravel()
        if f"g/{name}" in golden:
            want = golden[f"g/{name}"].ravel()
            yield row("g", name, np.abs(flat - want).max(initial=0), np.abs(want).max(initial=0))
        yield row("gnorm", name, abs(np.linalg.norm(flat) - norms[name]), norms[name])
        wave = np.cos(0.7 * np.arange(flat.size) + 0.3)
        yield row("gsig", name, abs(flat @ wave - signature), norms[name])
    for name in sorted(set(ours) - set(names)):
        yield Row(f"{prefix}no gradient/{name}", float(np.abs(ours[name]).max(initial=0)), 0.0)
