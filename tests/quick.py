"""How tests compile: quickly, in a third to a half of the time that users wait.

Nearly all of what small arrays cost is compiling, and most of that is optimising machine code that runs once. Buffers
are what users' programs have; sums may be rounded in another way.
"""

import os

FLAG = "--xla_cpu_use_fusion_emitters=false"
"""Chooses the quicker of the CPU's two code generators; jaxlib 0.10 and 0.11 know it."""


def environment(devices: int) -> dict[str, str]:
    """Return the variables of a process that compiles quickly and sees so many CPU devices."""
    return {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAG} --xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        # of what tests keep in a folder; small programs compile sooner than they are read
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
