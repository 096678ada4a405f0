"""Replays SlowFast: ordinary (`slowfast_plain`) and rewired (`slowfast_inv*`), both pathways, loss and every gradient.

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

from checkpoints_convert.dialects.slowfast import MMACTION2, RE2TAL
from checkpoints_convert.rules import Rules, fill, flatten, to_state_dict
from re2tal_jax.backbones.resnet3d import DEPTHS
from re2tal_jax.backbones.slowfast import SlowFast
from tests.parity.replay import Row, compare, compare_gradients, compare_loss, convert_state_dict

OUT, GRADIENT_X, GRADIENT = 1e-5, 1e-5, 2e-4  # MANIFEST (c, d): max-norm relative; ReLU has kinks
PATHWAYS = ("slow", "fast")


def recognises(path: Path, content: Any) -> bool:
    """A golden file of the schema whose meta describes a SlowFast network alone."""
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict) or meta.get("kind") not in ("plain", "inv"):
        return False
    return {"depth", "base"} <= set(meta.get("cfg", ()))


def replay(path: Path, content: dict[str, Any]) -> Iterator[Row]:
    """Compare every array of every case."""
    cfg, rewired = content["meta"]["cfg"], content["meta"]["kind"] == "inv"
    state_dict = {key[3:]: value for key, value in content.items() if key.startswith("sd/")}
    rules = (RE2TAL if rewired else MMACTION2).names
    graph, state = nnx.split(load_backbone(cfg, state_dict, rules, rewired=rewired))

    # tiny shapes, run once: what the compiler saves by not optimising is half of the time
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(state: nnx.State, video: jax.Array, projections: tuple[jax.Array, ...]) -> Any:
        def loss(state: nnx.State, video: jax.Array) -> Any:
            features = nnx.merge(graph, state)(video)
            return sum(jnp.sum(f * p) for f, p in zip(features, projections, strict=True)), features

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, video)

    for case in sorted({key.split("/")[0] for key in content if "/in/" in key}):
        golden = {key[len(case) + 1 :]: value for key, value in content.items() if key.startswith(case + "/")}
        projections = tuple(jnp.asarray(_channels_last(golden[f"proj/{name}"])) for name in PATHWAYS)
        (loss, features), (gradients, gradient_x) = run(state, jnp.asarray(_channels_last(golden["in/x"])), projections)
        for name, feature in zip(PATHWAYS, features, strict=True):
            yield compare(f"{case}/out/{name}", _channels_first(feature), golden[f"out/{name}"], OUT)
        terms = np.concatenate([(golden[f"out/{name}"] * golden[f"proj/{name}"]).ravel() for name in PATHWAYS])
        yield compare_loss(f"{case}/loss", float(loss), float(golden["loss"]), terms, OUT)
        yield compare(f"{case}/gin/x", _channels_first(gradient_x), golden["gin/x"], GRADIENT_X)
        ours = to_state_dict(jax.device_get(flatten(gradients)), rules)
        yield from compare_gradients(case, golden, ours, GRADIENT)


def load_backbone(cfg: dict[str, Any], state_dict: dict[str, np.ndarray], rules: Rules, *, rewired: bool) -> SlowFast:
    """Build the network of a golden file with its weights; `cfg` holds the reference's arguments."""
    backbone = nnx.eval_shape(
        lambda: SlowFast(depths=DEPTHS[cfg["depth"]], base_channels=cfg["base"], rewired=rewired, rngs=nnx.Rngs(0))
    )
    targets = {path: leaf.shape for path, leaf in flatten(backbone).items()}
    return fill(backbone, convert_state_dict(state_dict, rules, targets))


def _channels_last(x: np.ndarray) -> np.ndarray:
    """Return B C T H W as B T H W C."""
    return np.moveaxis(x, 1, -1)


def _channels_first(x: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)
