"""`--golden`: recorded activations of the published networks, replayed by the command that converts their weights."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import torch_io
from checkpoints_convert.__main__ import main
from checkpoints_convert.verify import compare, replay
from re2tal_jax.errors import CheckpointError

VIT_OPTIONS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dims": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "num_frames": "num_frames",
    "tubelet_size": "tubelet_size",
}
SWIN_OPTIONS = ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio")


def options_of(name: str, cfg: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The registered network and its arguments for a golden file's."""
    if name.startswith("swin"):
        return "video_swin_tiny", {
            key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items() if key in SWIN_OPTIONS
        }
    if name.startswith("slowfast"):
        return f"slowfast_r{cfg['depth']}", {"base_channels": cfg["base"]}
    options = {ours: cfg[theirs] for theirs, ours in VIT_OPTIONS.items() if theirs in cfg}
    if "eps" in cfg.get("norm_cfg", {}):
        options["norm_epsilon"] = cfg["norm_cfg"]["eps"]
    return "vit_base", options | ({} if cfg["return_feat_map"] else {"final_norm": "pooled"})


def arguments(golden: Path, folder: Path, change: float = 0.0) -> list[str]:
    """The command for a golden file's weights, of which one may be changed."""
    with np.load(golden) as file:
        cfg = json.loads(str(file["meta"]))["cfg"]
        weights = {key[3:]: file[key] for key in file.files if key.startswith("sd/")}
    name, options = options_of(golden.name, cfg)
    if change:
        weights["layers.1.blocks.1.mlp.fc1.weight"] *= 1 + change
    torch_io.write(folder / f"source{change}.safetensors", weights)
    overrides = [f"--config.backbone.{key}={value!r}" for key, value in options.items()]
    command = [str(folder / f"source{change}.safetensors"), "--model", name, "--dry-run", "--golden", str(golden)]
    return [*command, *overrides]


@pytest.mark.parametrize("name", ["swin_plain", "swin_inv", "slowfast_inv", "vit_videomae", "vit_videomae_pooled"])
def test_published_weights_give_their_recorded_activations(name, parity_dir, tmp_path, capsys):
    """Ordinary or rewired as the file is, whatever our network would be by default."""
    assert main(arguments(parity_dir / f"{name}.npz", tmp_path)) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("c0/")]
    assert any(row.startswith(("c0/out/y ", "c0/out/slow ")) for row in rows)
    assert all(row.endswith(" ok") for row in rows)


def test_one_changed_weight_is_found(parity_dir, tmp_path, capsys):
    assert main(arguments(parity_dir / "swin_plain.npz", tmp_path, change=0.01)) == 1
    captured = capsys.readouterr()
    assert "FAIL" in captured.out
    assert "does not compute what the source did; nothing was written" in captured.err


@jax.tree_util.register_static
class Doubling:
    """A network of one channel that gives its input twice over, and what is half of it."""

    in_channels = 1

    def intermediates(self, video):
        return 2 * video, {"half": video / 2}


@pytest.fixture(scope="module")
def doubling() -> Any:
    return Doubling()


def video(shape: tuple[int, ...] = (1, 1, 2, 2, 2)) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_recorded_outputs_that_the_network_lacks_are_listed(doubling, tmp_path):
    x = video()
    np.savez(tmp_path / "a.npz", **{"c0/in/x": x, "c0/out/y": 2 * x, "c0/mid/half": x / 2, "c0/mid/third": x / 3})
    rows, left_out = replay(doubling, tmp_path / "a.npz")
    assert [(row.name, row.passed) for row in rows] == [("c0/mid/half", True), ("c0/out/y", True)]
    assert left_out == ["c0/mid/third"]


@pytest.mark.parametrize(
    ("recorded", "text"),
    [
        ({"c0/in/x": video((2, 2)), "c0/out/y": video()}, r"shape \(2, 2\): allowed are numbers of shape \(B, 1,"),
        ({"c0/in/x": video((1, 3, 2, 2, 2)), "c0/out/y": video()}, r"shape \(1, 3, 2, 2, 2\)"),
        ({"c0/in/x": np.array("x").reshape(1, 1, 1, 1, 1), "c0/out/y": video()}, "is <U1"),
        ({"c0/in/x": video(), "c0/out/z": video()}, "no output that this network gives"),
        ({"c0/out/y": video()}, "no recorded input"),
        ({"c0/in/x": np.array([None])}, "cannot be read"),
    ],
)
def test_an_odd_golden_file_is_told(doubling, tmp_path, recorded, text):
    np.savez(tmp_path / "a.npz", **recorded)
    with pytest.raises(CheckpointError, match=text):
        replay(doubling, tmp_path / "a.npz")


@pytest.mark.parametrize("content", ["array", "text", "cut", "nothing"])
def test_what_is_no_npz_is_told(doubling, tmp_path, content):
    path = tmp_path / "a.npz"
    if content == "array":
        with path.open("wb") as file:
            np.save(file, video())
    elif content == "cut":
        np.savez_compressed(path, **{"c0/in/x": video()})
        path.write_bytes(path.read_bytes()[:-40])
    elif content == "text":
        path.write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read"):
        replay(doubling, path)


def test_an_error_is_relative_to_the_largest_value_and_never_hidden():
    assert compare("a", [1.0, 2.0], [1.0, 4.0]).error == 0.5
    assert compare("a", [1.0, np.nan], [1.0, 4.0]).error == np.inf
    assert compare("a", [1.0, 4.0], [1.0, np.nan]).error == np.inf
    assert compare("a", [np.nan, 4.0], [np.nan, 4.0]).error == 0
    assert compare("a", np.zeros(0), np.zeros(0)).passed
    assert compare("a", np.zeros(1), np.zeros(2)).error == np.inf
    assert compare("a", jnp.asarray([1, 2, 3, 4]), np.asarray([1, 2, 3, 5])).error == 0.25
