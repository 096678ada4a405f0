"""What the compiler plans for a program, read from what it dumps: sizes, shapes and origins that can be checked."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from re2tal_jax.accelerators import absent_devices, is_available, read_target
from re2tal_jax.training.memory import buffers_at_peak, plan, sizes_of_refusal

TARGETS = ("cpu", "h100", "v5e")


def lowered(target, rows):
    """A program that holds sorted (rows, 512) arrays beside its argument of the same shape."""
    if target != "cpu" and not is_available(target):
        pytest.skip(f"no compiler for {target}: pip install '.[aot]'")
    device = jax.devices("cpu")[0] if target == "cpu" else absent_devices(target)[0]

    def products(x):
        one = jnp.sort(x @ x[:512])
        return one.T @ jnp.sort(one @ x[:512])

    x = jax.ShapeDtypeStruct((rows, 512), jnp.float32, sharding=SingleDeviceSharding(device))
    return jax.jit(products).lower(x)


@pytest.mark.parametrize("target", TARGETS)
def test_the_largest_buffers_have_the_shapes_and_the_lines_of_the_program(target):
    rows = 2**17  # 256 MiB an array, more than a chip holds as scratch
    planned = plan(lowered(target, rows))
    assert planned.memory is not None
    assert planned.needed == planned.memory.peak
    big = [buffers for buffers in planned.largest if buffers.shape == f"f32[{rows},512]"]
    assert sum(buffers.count for buffers in big) >= 2  # the TPU fuses the second product
    assert all(buffers.size == buffers.count * rows * 512 * 4 for buffers in big)
    assert planned.largest[0] in big
    assert any(buffers.source == "x" for buffers in big)  # the argument by its name
    assert any(buffers.source.startswith("tests/test_plan.py:") for buffers in planned.largest)


def test_what_is_held_at_the_peak_adds_up_to_the_peak():
    planned = plan(lowered("cpu", 2**12))
    held = sum(buffers.size for buffers in planned.largest)
    result = 512 * 512 * 4  # has its place from the start, and is held at the end only
    assert held + result == pytest.approx(planned.needed, rel=1e-3)


def test_a_program_too_large_for_a_tpu_tells_both_sizes():
    planned = plan(lowered("v5e", 2**24))
    assert planned.memory is None
    assert planned.available == read_target("v5e").memory
    assert planned.needed > planned.available


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("memory required for HLO temporaries (310.25G) exceeds available HBM (15.75G).", (310.25, 15.75)),
        ("Ran out of memory in memory space hbm. Used 2048.00M of 1.50G hbm. Exceeded", (2.0, 1.5)),
        ("INTERNAL: something else (3.00G)", None),
    ],
)
def test_sizes_are_read_from_the_messages_of_a_refusal(message, gib):
    assert sizes_of_refusal(message) == (gib and tuple(math.floor(size * 2**30) for size in gib))


def test_a_compiler_that_dumps_nothing_or_another_text_tells_no_buffers(tmp_path):
    assert buffers_at_peak(tmp_path) == ()
    Path(tmp_path / "module_1.jit_f-buffer-assignment.txt").write_text("another form\n")
    assert buffers_at_peak(tmp_path) == ()
