"""Workers of benchmarks that measure nothing (a plugin: `pytest_plugins = "tests.worker_stand_in"`)."""

import sys
from typing import Any

import pytest

from benchmarks import conductor
from benchmarks.conductor import Contestant

STAND_IN = """
import os, sys
from benchmarks.worker import host_memory, serve

state = {}

def hello():
    print("a library greets")  # must not be taken for an answer
    if "absent" in sys.argv:
        import a_package_that_is_not_there.part
    return {"versions": {"torch": "1"}, "gpu": None}

def build(**arguments):
    state.update(arguments)
    return host_memory()

def check(frames, out):
    import numpy as np
    value = state["value"]
    np.savez(out, **{"features": np.full(frames, 2.0), "gradient a": np.array([1.0, value]), **state.get("more", {})})
    return {}

def step():
    state["steps"] = state.get("steps", 0) + 1
    if state.get("fails") == state["steps"]:
        raise MemoryError("no room")
    if state.get("dies") == state["steps"]:
        print("some last words", file=sys.stderr, flush=True)
        os._exit(3)
    with open(state["log"], "a") as log:
        log.write(state["name"] + " ")
    return {"seconds": state["steps"] * 1.5, "from_cache": 1}

serve({f.__name__: f for f in (hello, build, check, step)} | {"memory": lambda: {**host_memory(), "device_peak": 7}})
"""


@pytest.fixture
def make_contestant(tmp_path, monkeypatch):
    """What makes a contestant whose worker is a stand-in; the conductor makes no pauses."""
    monkeypatch.setattr(conductor, "PAUSE", 0.0)
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    environment = {"PYTHONPATH": str(conductor.ROOT)}

    def make(title: str, *, ours: bool, rewired: bool = True, value: float = 1.0, **build: Any) -> Contestant:
        build = {"value": value, "name": title, "log": str(tmp_path / "order"), **build}
        return Contestant(title, ours, rewired, (sys.executable, str(script)), build, environment)

    return make
