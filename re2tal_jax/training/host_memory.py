"""The host's memory beside the devices'."""

import ctypes
import sys


def give_back() -> None:
    """Give memory that was freed back to the operating system, where the C library can (glibc).

    Compiling a step frees hundreds of MiB on the host, in pieces that the library else holds for a next time.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))
