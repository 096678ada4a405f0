"""Our backbones, run on command; started by `benchmarks.against_pytorch`."""

import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.worker import host_memory, serve
from checkpoints_convert.rules import fill, flatten
from re2tal_jax.backbones import build_backbone
from re2tal_jax.training.compile_cache import cache_hits
from re2tal_jax.training.host_memory import give_back


class Ours:
    """One backbone with its input; the public methods are commands, with answers as of `opentad_worker`."""

    def hello(self) -> dict[str, Any]:
        """Return versions, and the GPU's name or None."""
        device = jax.devices()[0]
        versions = {name: version(name) for name in ("jax", "jaxlib", "flax")}
        return {"versions": versions, "gpu": device.device_kind if device.platform == "gpu" else None}

    def build(
        self, mode: str, network: Mapping[str, Any], weights: str, video: str, device: str, threads: int
    ) -> dict[str, Any]:
        """Build a backbone with given weights; return the memory held before its first step.

        Args:
            mode: plain or rewired.
            network: name, and what `build_backbone` takes beside it.
            weights: .npz of its parameters by path.
            video: .npy of its input (B, F, H, W, C), float32.
            device: cpu, in float32; or gpu, where steps are in bfloat16.
            threads: not used; what the process may run on bounds XLA.
        """
        del threads
        self.rewired, self.network, self.dtype = mode == "rewired", network, jnp.bfloat16 if device == "gpu" else None
        with np.load(weights, allow_pickle=False) as arrays:
            model = fill(self._abstract(self.dtype or jnp.float32), {key: arrays[key] for key in arrays.files})
        graph, state = nnx.split(model)
        self.graph, self.state, self.video = graph, jax.device_put(state), jax.device_put(np.load(video))
        self.run = None
        return self.memory()

    def _abstract(self, dtype: Any) -> Any:
        return nnx.eval_shape(lambda: build_backbone(**self.network, rewired=self.rewired, dtype=dtype))

    def check(self, frames: int, out: str) -> dict[str, Any]:
        """Write features (B, T, h, w, D) and the gradient of every parameter, all float32, for the first frames."""
        graph, _ = nnx.split(self._abstract(jnp.float32))

        @jax.jit
        def run(state: Any, video: jax.Array) -> tuple[Any, jax.Array]:
            def loss(state: Any) -> tuple[jax.Array, jax.Array]:
                features = nnx.merge(graph, state)(video)
                return _loss(features), features

            return jax.grad(loss, has_aux=True)(state)

        with jax.default_matmul_precision("highest"):
            gradients, features = run(self.state, self.video[:, :frames])
        arrays = {f"gradient {path}": value for path, value in flatten(nnx.merge(graph, gradients)).items()}
        np.savez(out, features=features, **arrays)
        return {}

    def step(self) -> dict[str, Any]:
        """Run forward and backward of mean(features**2) once; return the seconds, and the programs read from disk.

        The first step compiles, and gives back what compiling took, as training does.
        """
        with cache_hits() as hits:
            start = time.perf_counter()
            if self.run is None:
                run = jax.jit(jax.value_and_grad(lambda state, video: _loss(nnx.merge(self.graph, state)(video))))
                self.run = run.lower(self.state, self.video).compile()
                give_back()
            jax.block_until_ready(self.run(self.state, self.video))
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "from_cache": len(hits)}

    def memory(self) -> dict[str, Any]:
        """Return the memory of the process, and the most of the GPU's that its arrays took."""
        stats = jax.devices()[0].memory_stats() if self.dtype is not None else None
        return {**host_memory(), **({"device_peak": stats["peak_bytes_in_use"]} if stats else {})}


def _loss(features: jax.Array) -> jax.Array:
    return jnp.mean(features**2)


if __name__ == "__main__":
    ours = Ours()
    serve({f.__name__: f for f in (ours.hello, ours.build, ours.check, ours.step, ours.memory)})
