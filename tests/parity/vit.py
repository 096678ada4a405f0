"""Replays the VideoMAE vision transformer (`vit_videomae*`): feature map or pooled, loss and every gradient."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from checkpoints_convert.dialects.vit import MMACTION2
from checkpoints_convert.rules import fill, flatten, to_state_dict
from re2tal_jax.backbones.vit import VisionTransformer
from tests.parity.replay import Row, compare, compare_gradients, compare_loss, convert_state_dict

OUT, GRADIENT = 1e-5, 5e-5  # MANIFEST (e): max-norm relative


def recognises(path: Path, content: Any) -> bool:
    """A golden file of the schema whose meta describes a vision transformer alone."""
    meta = content.get("meta") if isinstance(content, dict) else None
    return isinstance(meta, dict) and {"embed_dims", "num_heads", "return_feat_map"} <= set(meta.get("cfg", ()))


def replay(path: Path, content: dict[str, Any]) -> Iterator[Row]:
    """Compare every array of every case."""
    cfg = content["meta"]["cfg"]
    state_dict = {key[3:]: value for key, value in content.items() if key.startswith("sd/")}
    graph, state = nnx.split(load_backbone(cfg, state_dict))

    # tiny shapes, run once: what the compiler saves by not optimising is half of the time
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(state: nnx.State, video: jax.Array, projection: jax.Array) -> Any:
        def loss(state: nnx.State, video: jax.Array) -> Any:
            backbone = nnx.merge(graph, state)
            output = backbone(video) if cfg["return_feat_map"] else backbone.pooled(video)
            return jnp.sum(output * projection), output

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, video)

    for case in sorted({key.split("/")[0] for key in content if "/in/" in key}):
        golden = {key[len(case) + 1 :]: value for key, value in content.items() if key.startswith(case + "/")}
        video, projection = (jnp.asarray(np.moveaxis(golden[key], 1, -1)) for key in ("in/x", "proj"))
        (loss, output), (gradients, gradient_x) = run(state, video, projection)
        yield compare(f"{case}/out/y", _channels_first(output), golden["out/y"], OUT)
        if "out/hf_last_hidden_state" in golden:
            tokens = rearrange(np.asarray(output), "b t h w d -> b (t h w) d")
            yield compare(f"{case}/out/hf_last_hidden_state", tokens, golden["out/hf_last_hidden_state"], OUT)
        terms = golden["out/y"] * golden["proj"]
        yield compare_loss(f"{case}/loss", float(loss), float(golden["loss"]), terms, OUT)
        yield compare(f"{case}/gin/x", _channels_first(gradient_x), golden["gin/x"], GRADIENT)
        yield from compare_gradients(case, golden, to_state_dict(flatten(gradients), MMACTION2.names), GRADIENT)


def load_backbone(cfg: dict[str, Any], state_dict: dict[str, np.ndarray]) -> VisionTransformer:
    """Build the ordinary network of a golden file with its weights; `cfg` holds the reference's arguments."""
    known = {
        "img_size": "image_size",
        "patch_size": "patch_size",
        "in_channels": "in_channels",
        "embed_dims": "embed_dim",
        "depth": "depth",
        "num_heads": "num_heads",
        "mlp_ratio": "mlp_ratio",
        "qkv_bias": "qkv_bias",
        "num_frames": "num_frames",
        "tubelet_size": "tubelet_size",
    }
    arguments: dict[str, Any] = {known[key]: value for key, value in cfg.items() if key in known}
    if "eps" in cfg.get("norm_cfg", ()):
        arguments["norm_epsilon"] = cfg["norm_cfg"]["eps"]
    if not cfg["return_feat_map"]:
        arguments["final_norm"] = "pooled"
    backbone = nnx.eval_shape(lambda: VisionTransformer(**arguments, rewired=False, rngs=nnx.Rngs(0)))
    targets = {path: leaf.shape for path, leaf in flatten(backbone).items()}
    return fill(backbone, convert_state_dict(state_dict, MMACTION2.names, targets))


def _channels_first(x: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)
