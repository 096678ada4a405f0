"""Memory that was freed goes back to the operating system."""

import platform
import sys

import numpy as np

from benchmarks.worker import host_memory
from re2tal_jax.training.host_memory import give_back


def test_freed_memory_is_given_back(monkeypatch):
    pieces = [np.ones(2**13) for _ in range(2048)]  # 64 KiB each, 128 MiB: the library's own, none mapped by itself
    last = pieces[-1]  # holds the end, so that nothing behind it is given back by itself
    del pieces
    if platform.libc_ver()[0] == "glibc":
        held = host_memory()["rss"]
        give_back()
        assert held - host_memory()["rss"] > 64 * 2**20
    monkeypatch.setattr(sys, "platform", "another")
    give_back()
    assert last.sum() == 2**13
