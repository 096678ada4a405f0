"""How tests compile: quickly, in a third to a half of the time that users wait.

Nearly all of what small arrays cost is compiling, and most of that is optimising machine code that runs once. Buffers
are, to within bytes, those of users' programs; sums may be rounded otherwise. What a test claims to the last bit, or
counts, it compiles `AS_USERS_DO`. A whole run does so with

    XLA_FLAGS=--xla_cpu_use_fusion_emitters=true JAX_DISABLE_MOST_OPTIMIZATIONS=false make test
"""

import os

FLAG = "--xla_cpu_use_fusion_emitters=false"
"""Chooses the quicker of the CPU's two code generators; jaxlib 0.10 and 0.11 know it."""

AS_USERS_DO = {
    "xla_cpu_use_fusion_emitters": True,
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
"""`compiler_options` of `jax.jit` that undo it all for one program."""


def environment(devices: int) -> dict[str, str]:
    """Return the variables of a process that compiles quickly and sees so many CPU devices.

    Of a flag that is given several times XLA takes the last: a user's own wins over ours, this number of devices over
    that of the process around it.
    """
    given = os.environ
    return {
        "XLA_FLAGS": f"{FLAG} {given.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": given.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "true"),
        # of what tests keep in a folder; small programs compile sooner than they are read
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
