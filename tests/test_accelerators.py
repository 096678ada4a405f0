"""Targets: what names them, how many devices they are, what is said of those that cannot be."""

import glob
import os
import subprocess
import sys

import jax
import pytest

import re2tal_jax
from re2tal_jax import accelerators
from re2tal_jax.accelerators import absent_devices, compile_options, is_available, read_target
from re2tal_jax.errors import ConfigError
from tests import quick

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "count", "gib"),
    [  # of 80, 80, 141, 80, 40, 16, 16, 95 and 32 GB
        ("h100", 1, 79),
        ("h100:8", 8, 79),
        ("h200", 1, 141),
        ("a100", 1, 79),
        ("a100-40:2", 2, 39.4),
        ("v5e", 1, 15.75),
        ("v5e:4x4", 16, 15.75),
        ("v5p:2x2x1", 4, 95.74),
        ("v6e:2x4", 8, 31.25),
    ],
)
def test_a_target_says_how_many_devices_it_is_and_what_each_holds(text, count, gib):
    target = read_target(text)
    assert target.count == count
    assert target.memory == pytest.approx(gib * GIB, rel=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h1000", r"Unknown target 'h1000'\. Did you mean 'h100'"),
        ("tpu", r"Unknown target 'tpu'\. Allowed: a100, a100-40, h100, h200, local, v5e, v5p, v6e"),
        ("h100:2x2", "'2x2' does not say how many there are; write for example 'h100:4'"),
        ("h100:0", "'0' does not say how many"),
        ("v5e:4", "'4' does not say how many there are; write for example 'v5e:2x4'"),
        ("v5p:", "'' does not say how many there are; write for example 'v5p:2x2x1'"),
    ],
)
def test_a_target_that_does_not_exist_is_answered_with_what_does(text, message):
    with pytest.raises(ConfigError, match=message):
        read_target(text)


@pytest.mark.parametrize("text", ["h100", "v5e:2x2"])
def test_without_the_compilers_a_message_says_what_to_install(text, monkeypatch):
    monkeypatch.setattr(accelerators, "_is_installed", lambda package: False)
    with pytest.raises(ConfigError, match=rf"target '{text}' needs .*: pip install -e '.\[aot\]'"):
        absent_devices(text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("h100:4", "NVIDIA H100 80GB HBM3"),
        ("h200", "NVIDIA H200 141GB HBM3e"),
        ("a100-40:2", "NVIDIA A100-SXM4-40GB"),
        ("v5e", "TPU v5 lite"),
        ("v5e:2x4", "TPU v5 lite"),
        ("v5p", "TPU v5"),
        ("v6e:2x2", "TPU v6 lite"),
    ],
)
def test_absent_devices_are_as_many_and_of_the_kind_that_was_asked_for(text, kind):
    if not is_available(text):
        pytest.skip(f"no compiler for {text}: pip install '.[aot]'")
    devices = absent_devices(text)
    assert len(devices) == read_target(text).count
    assert {device.device_kind for device in devices} == {kind}


def test_only_an_absent_gpu_does_without_what_it_would_try_out():
    assert compile_options(jax.devices()[0]) == {}
    if not (is_available("h100") and is_available("v5e")):
        pytest.skip("no compilers: pip install '.[aot]'")
    assert compile_options(absent_devices("h100")[0]) == {"xla_gpu_enable_triton_gemm": False}
    assert compile_options(absent_devices("v5e")[0]) == {}


def run_python(code):
    """Run code as users do: the tests' own JAX_PLATFORMS keeps jax from looking for CUDA."""
    own = ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", *quick.environment(devices=1))
    environment = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


JAX_FIRST = "import jax; jax.devices(); "


@pytest.mark.parametrize("first", ["", "import re2tal_jax, jax; jax.devices(); ", JAX_FIRST])
def test_a_gpu_is_compiled_for_where_jax_finds_no_cuda_libraries(first):
    if not is_available("h100"):
        pytest.skip("no compiler for h100: pip install '.[aot]'")
    result = run_python(
        f"{first}from re2tal_jax.accelerators import absent_devices; print(absent_devices('h100')[0].device_kind)"
    )
    if first == JAX_FIRST and result.returncode:  # where there are such libraries the order does not matter
        assert "JAX has started without its GPU compiler" in result.stderr
    else:
        assert result.stdout.strip() == "NVIDIA H100 80GB HBM3", result.stderr


def test_cuda_is_not_missed_where_there_is_no_driver():
    if not is_available("h100"):
        pytest.skip("no compiler for h100: pip install '.[aot]'")
    result = run_python("import re2tal_jax, jax; print(len(jax.devices()))")
    assert result.returncode == 0, result.stderr
    if not any(map(glob.glob, re2tal_jax._NVIDIA_DRIVER)):
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("found", "value"), [([], "1"), (["/dev/nvidia0"], None)])
def test_jax_looks_for_cuda_where_there_is_a_driver(found, value):
    result = run_python(
        f"import glob, os; glob.glob = lambda pattern: {found}; import re2tal_jax; "
        "print(os.environ.get('JAX_SKIP_CUDA_CONSTRAINTS_CHECK'))"
    )
    assert result.stdout.strip() == str(value)


def test_a_grid_of_chips_that_is_not_built_is_refused_in_one_sentence():
    if not is_available("v5e"):
        pytest.skip("no compiler for v5e: pip install '.[aot]'")
    with pytest.raises(ConfigError, match=r"target 'v5e:3x3' is no grid of chips that exists: .*not divisible"):
        absent_devices("v5e:3x3")
