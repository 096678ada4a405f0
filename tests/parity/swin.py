"""Replays Video Swin: ordinary (`swin_plain`) and rewired (`swin_inv*`), outputs, stages, loss and every gradient.

Gradients of the rewired network come through the reversible backward pass.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints_convert.dialects.video_swin import MMACTION2, RE2TAL
from checkpoints_convert.rules import fill, flatten, to_state_dict
from re2tal_jax.backbones import video_swin
from tests.parity.replay import Row, compare, compare_gradients, compare_loss, convert_state_dict

OUT, GRADIENT = 1e-5, 5e-5  # MANIFEST (a, b): max-norm relative


def recognises(path: Path, content: Any) -> bool:
    """A golden file of the schema whose meta describes a Swin network alone."""
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict) or meta.get("kind") not in ("plain", "inv"):
        return False
    return {"window_size", "num_heads", "depths"} <= set(meta.get("cfg", ()))


def replay(path: Path, content: dict[str, Any]) -> Iterator[Row]:
    """Compare every array of every case."""
    cfg, rewired = content["meta"]["cfg"], content["meta"]["kind"] == "inv"
    state_dict = {key[3:]: value for key, value in content.items() if key.startswith("sd/")}
    names = (RE2TAL if rewired else MMACTION2).names
    graph, state = nnx.split(load_backbone(cfg, state_dict, rewired=rewired))

    # tiny shapes, run once: what the compiler saves by not optimising is half of the time
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(state: nnx.State, video: jax.Array, projection: jax.Array) -> Any:
        def loss(state: nnx.State, video: jax.Array) -> Any:
            features, named = nnx.merge(graph, state).intermediates(video)
            return jnp.sum(features * projection), (features, named)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, video)

    for case in sorted({key.split("/")[0] for key in content if "/in/" in key}):
        golden = {key[len(case) + 1 :]: value for key, value in content.items() if key.startswith(case + "/")}
        video = jnp.asarray(golden["in/x"].transpose(0, 2, 3, 4, 1))
        projection = jnp.asarray(golden["proj"].transpose(0, 2, 3, 4, 1))
        (loss, (features, named)), (gradients, gradient_x) = run(state, video, projection)
        yield compare(f"{case}/out/y", _nct(features), golden["out/y"], OUT)
        yield from _stages(case, golden, named, rewired=rewired)
        terms = golden["out/y"] * golden["proj"]
        yield compare_loss(f"{case}/loss", float(loss), float(golden["loss"]), terms, OUT)
        yield compare(f"{case}/gin/x", _nct(gradient_x), golden["gin/x"], GRADIENT)
        ours = to_state_dict(flatten(gradients), names)
        yield from compare_gradients(case, golden, ours, GRADIENT)


def load_backbone(cfg: dict[str, Any], state_dict: dict[str, np.ndarray], *, rewired: bool) -> video_swin.VideoSwin:
    """Build the network of a golden file with its weights; `cfg` holds the reference's arguments."""
    known = ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias")
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items() if k in known}
    backbone = nnx.eval_shape(lambda: video_swin.VideoSwin(**arguments, rewired=rewired, rngs=nnx.Rngs(0)))
    targets = {path: leaf.shape for path, leaf in flatten(backbone).items()}
    return fill(backbone, convert_state_dict(state_dict, (RE2TAL if rewired else MMACTION2).names, targets))


def _nct(x: jax.Array) -> np.ndarray:
    """Return B T H W C as B C T H W."""
    return np.moveaxis(np.asarray(x), -1, 1)


def _stages(case: str, golden: dict[str, np.ndarray], named: dict[str, jax.Array], *, rewired: bool) -> Iterator[Row]:
    """The reference records a rewired stage after its down-sampling, an ordinary one before it and channels last."""
    for key in (key for key in golden if key.startswith("mid/")):
        name = key.removeprefix("mid/")
        if rewired and name.startswith("layer"):
            name = name.replace("layer", "downsample") if name.replace("layer", "downsample") in named else name
        ours = np.asarray(named[name])
        channels_last = name.startswith("layer") and not rewired
        yield compare(f"{case}/{key}", ours if channels_last else _nct(ours), golden[key], OUT)
