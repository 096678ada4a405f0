"""Memory of a rewired stage, by XLA's own accounting: it does not grow with depth. Nothing is run, only compiled."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from re2tal_jax.accelerators import absent_devices, is_available
from re2tal_jax.backbones.video_swin import VideoSwin

SHALLOW, DEEP = 4, 32
TARGETS = ("cpu", "h100", "v5e")
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}  # the code is never run; buffers are assigned before


def temp_bytes(device: jax.Device, depth: int, *, rewired: bool, frames: int = 768) -> int:
    """Temporaries of the gradient of one stage, that of Swin-T's first with this depth, with drop path."""
    make = lambda: VideoSwin(  # noqa: E731
        patch_size=(2, 4, 4),
        embed_dim=96,
        depths=(depth,),
        num_heads=(3,),
        window_size=(8, 7, 7),
        drop_path_rate=0.2,
        rewired=rewired,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(nnx.eval_shape(make))

    def loss(state, video, key):
        return jnp.mean(nnx.merge(graph, state)(video, key=key) ** 2)

    place = SingleDeviceSharding(device)
    video = jax.ShapeDtypeStruct((1, frames, 224, 224, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), (state, video, key))
    compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile(COMPILER_OPTIONS)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("target", TARGETS)
def test_memory_of_a_rewired_stage_does_not_grow_with_depth(target):
    """At most 3 % from depth 4 to 32, with the recipe's frames: what grows is a copy of the parameters."""
    if target != "cpu" and not is_available(target):
        pytest.skip(f"no compiler for {target}: pip install '.[aot]'")
    device = jax.devices("cpu")[0] if target == "cpu" else absent_devices(target)[0]
    shallow, deep = (temp_bytes(device, depth, rewired=True) for depth in (SHALLOW, DEEP))
    assert deep <= 1.03 * shallow


def test_memory_of_an_ordinary_stage_grows_several_times():
    """The control: the same count on the same stage, without rewiring."""
    device = jax.devices("cpu")[0]
    shallow, deep = (temp_bytes(device, depth, rewired=False) for depth in (SHALLOW, DEEP))
    assert deep > 3 * shallow
