"""Memory of a rewired stage, by XLA's own accounting: it does not grow with depth. Nothing is run, only compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from re2tal_jax.accelerators import absent_devices, compile_options, is_available
from re2tal_jax.backbones.video_swin import VideoSwin

SHALLOW, DEEP = 4, 32
TARGETS = ("cpu", "h100", "v5e")
STATE = "1,384,56,56,96"  # of 768 frames


@functools.cache
def compiled_stage(device: jax.Device, depth: int, *, rewired: bool, frames: int = 768) -> jax.stages.Compiled:
    """The gradient of one stage, that of Swin-T's first with this depth, with drop path."""
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
    return jax.jit(jax.grad(loss)).lower(*arguments).compile(compiler_options(device))


def compiler_options(device: jax.Device) -> dict[str, int | bool]:
    """What is fused and where it lies is as in users' programs; code that is never run need not be optimised."""
    as_users_do = {"xla_cpu_use_fusion_emitters": True} if device.platform == "cpu" else compile_options(device)
    return {"xla_backend_optimization_level": 0} | as_users_do


def temp_bytes(device: jax.Device, depth: int, *, rewired: bool, frames: int = 768) -> int:
    """Bytes of temporaries of `compiled_stage`."""
    stats = compiled_stage(device, depth, rewired=rewired, frames=frames).memory_analysis()
    assert stats is not None
    return stats.temp_size_in_bytes


def copies_in_loops(program: str, shape: str) -> list[str]:
    """Lines of an optimised program that copy or transpose an array of this shape, outside its entry computation."""
    loops, _, entry = program.partition("\nENTRY ")
    rest = entry.partition("\n}\n")[2]
    copy = re.compile(rf"= f32\[{shape}\]\S* (?:copy|transpose)\(")
    return [line.strip() for line in (loops + rest).splitlines() if copy.search(line)]


@pytest.mark.parametrize("target", TARGETS)
def test_a_rewired_stage_neither_grows_with_depth_nor_copies_its_states(target):
    """At most 1 % from depth 4 to 32, with the recipe's frames: what grows is a copy of the parameters.

    One test, as both are told by one program. A TPU's compiler once held attention's and the MLP's states in two
    layouts, and copied them whole from one to the other.
    """
    device = device_of(target)
    shallow, deep = (temp_bytes(device, depth, rewired=True) for depth in (SHALLOW, DEEP))
    assert deep <= 1.01 * shallow
    program = compiled_stage(device, SHALLOW, rewired=True).as_text()
    assert f"f32[{STATE}]" in program.partition("\nENTRY ")[0]
    assert copies_in_loops(program, STATE) == []


def test_copies_in_loops_are_found():
    line = "  copy.1 = f32[1,2]{1,0:T(8,128)} copy(f32[1,2]{0,1} p)"
    body, entry = f"\nbody {{\n{line}\n}}\n", f"\nENTRY main {{\n{line}\n}}\n"
    assert copies_in_loops(f"HloModule m\n{body}{entry}", "1,2") == [line.strip()]
    assert copies_in_loops(f"HloModule m\n{entry}{body}", "1,2") == [line.strip()]
    assert copies_in_loops(f"HloModule m\n{entry}", "1,2") == []


def device_of(target: str) -> jax.Device:
    """A device to compile for; skips where there is no compiler."""
    if target == "cpu":
        return jax.devices("cpu")[0]
    if not is_available(target):
        pytest.skip(f"no compiler for {target}: pip install '.[aot]'")
    return absent_devices(target)[0]


def test_memory_of_an_ordinary_stage_grows_several_times():
    """The control: the same count on the same stage, without rewiring."""
    device = jax.devices("cpu")[0]
    shallow, deep = (temp_bytes(device, depth, rewired=False) for depth in (SHALLOW, DEEP))
    assert deep > 3 * shallow
