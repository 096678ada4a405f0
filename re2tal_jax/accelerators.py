"""Accelerators that are not there: devices to compile for, so that memory can be told on any Linux machine.

Needs the optional packages `aot` (pip install 're2tal-jax[aot]'). What is compiled for such devices cannot be run; its
`memory_analysis()` is that of the real ones, up to autotuning on GPUs.
"""

import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from re2tal_jax.errors import ConfigError, did_you_mean

# Facts of an NVIDIA H100 80 GB SXM, as XLA's target description wants them.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

TARGETS = ("h100", "v5e")
_PACKAGES = {"h100": "jax_plugins.xla_cuda12", "v5e": "libtpu"}


def is_available(target: str) -> bool:
    """Tell whether the packages that compile for a target are installed."""
    package = _PACKAGES[_checked(target)]
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def absent_devices(target: str) -> Sequence[jax.Device]:
    """Return one device of a kind, to make a mesh of and to lower programs for.

    Raises:
        ConfigError: an unknown target, or packages that are not installed.
    """
    if not is_available(target):
        raise ConfigError(f"target {target!r} needs the compiler packages: pip install 're2tal-jax[aot]'.")
    if target == "h100":
        return topologies.get_topology_desc(
            platform="cuda", topology_name=target, target_config=_H100, topology="1x1x1"
        ).devices
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked what machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1]
    ).devices


def _checked(target: str) -> str:
    if target not in TARGETS:
        raise ConfigError(f"Unknown target {target!r}. {did_you_mean(target, TARGETS)}")
    return target
