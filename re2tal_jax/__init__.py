"""End-to-end temporal action localization on long videos, through reversible backbones, in JAX.

    list_backbones() list_localizers() list_datasets()      what there is, by name
    build_backbone(name, *, rewired=True, …)                a video backbone, plain or rewired
    rewire(module, wiring)                                  the same parameters, wired otherwise; PLAIN, REWIRED, Wiring
    load(checkpoint_dir)                                    a trained detector, ready to use
    localize(model, "video.mp4")                            its Detections in a video of your own
    evaluation.detection_map(ground_truth, predictions, …)  ActivityNet mAP

Training, evaluation, prediction and inspection: `python -m re2tal_jax.main --help`.
"""

import glob
import importlib
import os
from typing import Any

_NVIDIA_DRIVER = ("/dev/nvidia*", "/dev/nvhost*", "/dev/dxg")
"""Files of NVIDIA's driver, on PCs, on Jetson and under WSL."""

if not any(map(glob.glob, _NVIDIA_DRIVER)):
    # JAX's plugin for GPUs, installed to compile for some that are not here, would look for CUDA and print that it
    # found none. With a driver it is to look: then its complaint is the reason why a GPU is not used.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

_HOMES = {
    "build_backbone": "backbones",
    "list_backbones": "backbones",
    "build_localizer": "localizers",
    "list_localizers": "localizers",
    "build_dataset": "data",
    "list_datasets": "data",
    "PLAIN": "reversible",
    "REWIRED": "reversible",
    "Wiring": "reversible",
    "rewire": "reversible",
    "load": "trained",
    "localize": "inference.localize",
}
_MODULES = ("evaluation", "reversible")

__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    """Import on first use: a decoding process needs no network, an evaluation no video reader."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"re2tal_jax.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"re2tal_jax.{name}")
    raise AttributeError(f"module 're2tal_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
