"""Accelerators that are not there: devices to compile for, so that memory can be told on any Linux machine.

Needs the optional packages `aot` (pip install -e '.[aot]'). What is compiled for such devices cannot be run; its
`memory_analysis()` is that of the real ones, up to autotuning on GPUs.

A target is the name of a kind and, after a colon, how many there are: `h100`, `h100:4`, `v5e:2x4`.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from re2tal_jax.errors import ConfigError, did_you_mean

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class _Gpu:
    """Facts of a GPU, as XLA's target descriptions give them (openxla/xla, target_config/specs)."""

    title: str
    compute_capability: int
    memory: int
    bandwidth: int
    l2_cache: int
    cores: int
    fpus_per_core: int
    clock_ghz: float
    shared_memory_per_core: int
    shared_memory_per_block: int

    def target_config(self) -> str:
        """Return the text that XLA's compiler wants."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2_cache}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared_memory_per_block}
  cuda_compute_capability {{ major: {self.compute_capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.title}"
"""


def _hopper(title: str, memory: int, bandwidth: int) -> _Gpu:
    return _Gpu(
        title=title,
        compute_capability=9,
        memory=memory,
        bandwidth=bandwidth,
        l2_cache=52428800,
        cores=132,
        fpus_per_core=128,
        clock_ghz=1.98,
        shared_memory_per_core=233472,
        shared_memory_per_block=232448,
    )


def _ampere(title: str, memory: int, bandwidth: int) -> _Gpu:
    return _Gpu(
        title=title,
        compute_capability=8,
        memory=memory,
        bandwidth=bandwidth,
        l2_cache=41943040,
        cores=108,
        fpus_per_core=64,
        clock_ghz=1.41,
        shared_memory_per_core=167936,
        shared_memory_per_block=166912,
    )


_GPUS = {
    "h100": _hopper("NVIDIA H100 80GB HBM3", 84942979072, 3352320000000),
    "h200": _hopper("NVIDIA H200 141GB HBM3e", 151397597184, 4800000000000),
    "a100": _ampere("NVIDIA A100-SXM4-80GB", 85100068864, 2039040000000),
    "a100-40": _ampere("NVIDIA A100-SXM4-40GB", 42331013120, 1555200000000),
}
# What a program may fill of the 16, 95 and 32 GB of a chip, as the compiler itself says when one is too large.
_TPUS = {"v5e": int(15.75 * GIB), "v5p": int(95.74 * GIB), "v6e": int(31.25 * GIB)}

LOCAL = "local"
KINDS = (*_GPUS, *_TPUS)


@dataclass(frozen=True)
class Target:
    """A kind of accelerator and how many of them: the sizes of a grid of chips, (1,) for one device."""

    kind: str
    layout: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of devices."""
        return math.prod(self.layout)

    @property
    def memory(self) -> int:
        """Bytes of a device that programs may fill."""
        return _GPUS[self.kind].memory if self.kind in _GPUS else _TPUS[self.kind]

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU, of which JAX takes only a part by itself."""
        return self.kind in _GPUS


def read_target(text: str) -> Target:
    """Return what `h100`, `h100:4` or `v5e:2x4` names; without a colon it is one device.

    Raises:
        ConfigError: an unknown kind, or what follows the colon is no number or grid of chips.
    """
    kind, colon, layout = text.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"Unknown target {text!r}. {did_you_mean(kind, (*KINDS, LOCAL))}")
    if not colon:
        return Target(kind, (1,))
    if kind in _GPUS and re.fullmatch(r"[1-9]\d{0,3}", layout):
        return Target(kind, (int(layout),))
    if kind in _TPUS and re.fullmatch(r"[1-9]\d?(x[1-9]\d?){1,2}", layout):
        return Target(kind, tuple(map(int, layout.split("x"))))
    example = f"{kind}:4" if kind in _GPUS else f"{kind}:{'2x2x1' if kind == 'v5p' else '2x4'}"
    raise ConfigError(f"target {text!r}: {layout!r} does not say how many there are; write for example {example!r}.")


def is_available(target: str) -> bool:
    """Tell whether the packages that compile for a target are installed."""
    packages = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13") if read_target(target).is_gpu else ("libtpu",)
    return any(_is_installed(package) for package in packages)


def absent_devices(target: str) -> Sequence[jax.Device]:
    """Return the devices of a target, to make a mesh of and to lower programs for.

    Raises:
        ConfigError: an unknown target, a grid of chips that is not built, or packages that are not installed.
    """
    wanted = read_target(target)
    if not is_available(target):
        raise ConfigError(f"target {target!r} needs the compiler packages: pip install -e '.[aot]' in the checkout.")
    if wanted.is_gpu:
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no libraries whose versions matter
        try:
            return topologies.get_topology_desc(
                platform="cuda",
                topology_name=target,
                target_config=_GPUS[wanted.kind].target_config(),
                topology=f"1x1x{wanted.count}",
            ).devices
        except NotImplementedError as error:
            raise ConfigError(
                f"target {target!r}: JAX has started without its GPU compiler, as it found no CUDA libraries. Import "
                "re2tal_jax before any device is used, or start Python with JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1."
            ) from error
    # No metadata server is asked what machine this is, and libtpu is not told to look for chips of this one.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    one = wanted.count == 1  # hosts have four chips unless they are said to have one
    layout = (1,) * (3 if wanted.kind == "v5p" else 2) if one else wanted.layout
    name = f"{wanted.kind}:{'x'.join(map(str, layout))}"
    try:
        options = {"chips_per_host_bounds": [1, 1, 1]} if one else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"target {target!r} is no grid of chips that exists: {str(error).splitlines()[0]}") from error


def compile_options(device: jax.Device) -> dict[str, bool]:
    """Return what a program is to be compiled with for a device, beside what the compiler chooses by itself.

    Triton's products have tiles that a GPU tries out. Where there is none to try them on, the compiler works long and
    then may find no tile; cuBLAS, which a GPU that is there may choose too, takes the products instead.
    """
    is_gpu = device.platform in ("gpu", "cuda")
    return {"xla_gpu_enable_triton_gemm": False} if is_gpu and device not in jax.devices() else {}


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
