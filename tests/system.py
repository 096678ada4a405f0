"""Whole runs small enough for tests: a config, videos of squares that move, and the command line.

What takes long is made once for a test session, whatever the number of test processes: `once` keeps it in a folder that
they share, behind a lock. Fixtures: `pytest_plugins = "tests.system_fixtures"`.
"""

import copy
import fcntl
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat
from typing import Any

import numpy as np
import pytest

from re2tal_jax.main import main
from re2tal_jax.modes import MODES
from re2tal_jax.settings import read_settings
from tests import quick
from tests.video_files import write_video

ROOT = Path(__file__).parent.parent
CLASSES = ("left", "right")
FRAMES, FPS = 24, 10
NUM_TRAIN, NUM_VALIDATION = 16, 4
STEPS = 6


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def write_data(folder: Path) -> Path:
    """Write videos of a square that moves left or right for a while, and their annotation."""
    rng, database = np.random.default_rng(0), {}
    (folder / "videos").mkdir(parents=True)
    for number in range(NUM_TRAIN + NUM_VALIDATION):
        subset = "training" if number < NUM_TRAIN else "validation"
        name, label = f"{subset}_{number}", CLASSES[number % 2]
        start = int(rng.integers(0, 12))
        end = start + int(rng.integers(6, 12))
        write_video(folder / "videos" / f"{name}.mp4", moving_square(rng, label, start, end), fps=FPS)
        annotation = {"segment": [start / FPS, end / FPS], "label": label}
        database[name] = {"subset": subset, "duration": FRAMES / FPS, "annotations": [annotation]}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    return folder


def moving_square(rng: np.random.Generator, label: str, start: int, end: int) -> np.ndarray:
    """Return noise with a square that moves during [start, end)."""
    frames = rng.integers(60, 120, (FRAMES, 32, 32, 3), dtype=np.uint8)
    sign = -1 if label == "left" else 1
    for i in range(FRAMES):
        x = 12 + sign * (min(max(i, start), end) - start)
        frames[i, 12:20, max(x, 0) : max(x, 0) + 8] = 240
    return frames


def tiny_config(data: Path, *, data_devices: int = 1, fsdp_devices: int = 1) -> dict[str, Any]:
    """A detector of some thousand parameters on 8 frames of 16 x 16 pixels: 20 steps, evaluated at 10 and 20."""
    loader = {"height": 16, "width": 16, "crop": "squeeze", "workers": 0, "threads": 2, "cache_mib": 8}
    augment = {"height": 16, "width": 16}
    split = {"batch_size": 8, "policy": {"name": "resize"}, "loader": {**loader, "on_error": "error"}}
    swap = {"left": "right", "right": "left"}
    return {
        "seed": 3,
        "compute_dtype": "float32",
        "num_snippets": 8,
        "frames_per_snippet": 1,
        "num_classes": 2,
        "data": {
            "name": "activitynet",
            "annotations": str(data / "annotations.json"),
            "videos": str(data / "videos"),
            "missing_videos": "error",
        },
        "train": {
            **split,
            "subset": "training",
            "augment": {**augment, "crop": 0.3, "dtype": "uint8"},
            "mirror": {"flip": 0.5, "reverse": 0.5, "flip_classes": swap, "reverse_classes": swap},
        },
        "eval": {**split, "subset": "validation", "augment": {**augment, "dtype": "float32"}, "mirror": None},
        "backbone": {
            "name": "video_swin_tiny",
            "rewired": True,
            "checkpoint": None,
            "patch_size": (1, 4, 4),
            "embed_dim": 8,
            "depths": (2,),
            "num_heads": (2,),
            "window_size": (4, 2, 2),
            "drop_path_rate": 0.3,
        },
        "localizer": {
            "name": "actionformer",
            "channels": 8,
            "arch": (1, 0, 1),
            "num_heads": 2,
            "window": -1,
            "use_abs_pos": True,
            "max_seq_len": 8,
            "path_drop_rate": 0.1,
            "head_convs": 1,
            "regression_range": ((0, 4), (4, 10000)),
            "loss_normalizer": 10.0,
        },
        "detector": {"pixel_mean": (127.5,) * 3, "pixel_std": (63.75,) * 3, "snippet_loss_weight": 1.0},
        "parameter_groups": {
            "localizer_lr": 1e-2,
            "backbone_lr": 1e-2,
            "weight_decay": 0.05,
            "freeze_backbone_norms": False,
        },
        "optimizer": {
            "schedule": {"decay": "cosine", "length": {"steps": 20}, "warmup": {"steps": 4}, "min_lr": 1e-6},
            "clip_norm": 1.0,
            "ema_decay": 0.9,
            "accumulate": 1,
        },
        "mesh": {"data": data_devices, "fsdp": fsdp_devices, "fsdp_min_size": 64},
        "distributed": None,
        "loop": {
            "stop": {"steps": 20},
            "evaluate_every": {"steps": 10},
            "checkpoint_every": {"steps": 5},
            "log_every_steps": 1,
        },
        "checkpoints": {"keep_latest": 1, "keep_best": 1, "best_metric": "average_mAP"},
        "postprocess": {
            "nms": {"method": "gaussian", "sigma": 0.5, "min_score": 0.001, "max_seg_num": 20, "multiclass": True},
            "suppress_in": "window",
        },
        "external_classifier": None,
        "evaluation": {"tiou_thresholds": (0.3, 0.5), "blocked": None},
    }


def changed(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Return a copy of a config with values set by their path: `train__batch_size=4`."""
    result = copy.deepcopy(dict(config))
    for path, value in values.items():
        *sections, name = path.split("__")
        section = result
        for key in sections:
            section = section[key]
        section[name] = value
    return result


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    """Write a config file."""
    path.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({pformat(dict(config), indent=4, sort_dicts=False)})\n"
    )
    return path


def run_mode(mode: str, config: Mapping[str, Any], workdir: Path) -> Any:
    """Run a mode in this process and return what it returns."""
    return MODES[mode](read_settings(config), config, workdir)


def command(*arguments: Any) -> list[str]:
    """The command line as users write it."""
    return [sys.executable, "-m", "re2tal_jax.main", *map(str, arguments)]


# What the compiler for GPUs that are not there (extra `aot`) says when it is loaded, whatever the platform.
_ABSENT_GPU = re.compile(r"^(WARNING: All log messages before absl::|I0000 .*cudart_stub).*\n", re.MULTILINE)


def run_process(arguments: list[str], **environment: str) -> Done:
    """Run a command on one CPU device; only compiling is quick."""
    quickly = os.environ | quick.environment(devices=1) | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=ROOT, env=quickly | environment, timeout=600, check=False
    )
    return Done(done.returncode, done.stdout, _ABSENT_GPU.sub("", done.stderr))


def main_killed_in_step(step: int, checkpoint: str) -> None:
    """Run `main`, and end by SIGKILL when `step` is about to be taken and the checkpoint of that number is complete."""
    from tests.training_stand_in import Hooked

    folder = Path(sys.argv[sys.argv.index("--workdir") + 1]) / "checkpoints" / checkpoint

    def hook(finished: int) -> None:
        if finished == step - 1:
            while not folder.is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    mode = importlib.import_module("re2tal_jax.modes.train")  # the package's attribute is the function
    make = mode.make_train_step
    mode.make_train_step = lambda *args: Hooked(make(*args), hook)
    main()


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Path:
    """Return a folder that `make` has filled, for all test processes of this session together."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, finished = base / name, base / f"{name}.finished"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            make(folder)
            finished.touch()
    return folder
