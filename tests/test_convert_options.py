"""What a conversion asks of its network and its values, and what the way back asks: told, or refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_convert import torch_io
from checkpoints_convert.convert import export, plan_conversion, recognise
from checkpoints_convert.dialects import DIALECTS
from checkpoints_convert.dialects.dialect import Dialect
from checkpoints_convert.networks import Network, open_network
from re2tal_jax.config import read_config_file
from re2tal_jax.errors import CheckpointError
from re2tal_jax.experiment import initial_parameters, make_detector
from re2tal_jax.settings import read_settings
from re2tal_jax.training.state import describe_model
from re2tal_jax.weights import load_weights
from tests.test_backbones import SMALL
from tests.test_convert import ROOT, as_arguments, convert, random_params, small_network, source_file, tiny_detector


def dialect_of(family: str, name: str) -> Dialect:
    return next(d for d in DIALECTS if (d.family, d.name) == (family, name))


@pytest.fixture(scope="module")
def mmaction2() -> Dialect:
    return dialect_of("video_swin", "mmaction2")


# ---- Options that the weights need


def test_the_options_that_the_weights_need_are_printed_to_be_typed(tmp_path, capsys):
    dialect = dialect_of("vit", "huggingface")
    network, _ = source_file(dialect, tmp_path / "source.safetensors")
    command = (tmp_path / "source.safetensors", "--model", network.name, *as_arguments(dialect))
    assert convert(*command, "--out", tmp_path / "ours") == 0
    (use,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("use ")]
    assert "--config.backbone.norm_epsilon=1e-12" in use
    assert f"--config.backbone.embed_dim={SMALL['vit']['embed_dim']}" in use
    assert "rewired" not in use
    assert "mlp_ratio" not in use  # as published


def test_a_value_of_the_users_stands_and_is_the_one_that_is_told(tmp_path, capsys):
    dialect = dialect_of("vit", "huggingface")
    network, _ = source_file(dialect, tmp_path / "source.safetensors")
    options = [*as_arguments(dialect), "--config.backbone.norm_epsilon=1e-5"]
    assert convert(tmp_path / "source.safetensors", "--model", network.name, "--dry-run", *options) == 0
    assert "built with norm_epsilon = 1e-05; such files have 1e-12" in capsys.readouterr().out


VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_frames": 4, "image_size": 16}


def vit_settings(directory: Path, **options: Any) -> Any:
    config = read_config_file(ROOT / "configs" / "demo.py")
    config["backbone"] = {"name": "vit_small", "checkpoint": str(directory), **VIT, **options}
    return read_settings(config)


def test_weights_made_with_other_options_are_refused_with_what_to_type(tmp_path):
    dialect = dialect_of("vit", "huggingface")
    network = Network("vit_base", {"backbone": {"name": "vit_base", **VIT, **dialect.options}}, whole=False)
    torch_io.write(tmp_path / "source.safetensors", export(network, random_params(network), dialect.name))
    overrides = [f"--config.backbone.{key}={value!r}" for key, value in VIT.items()]
    assert convert(tmp_path / "source.safetensors", "--model", "vit_base", "--out", tmp_path / "ours", *overrides) == 0
    good = vit_settings(tmp_path / "ours", norm_epsilon=1e-12, rewired=False, drop_path_rate=0.3)
    found = initial_parameters(good, describe_model(make_detector(good)))
    assert "backbone.pos_embed" in found
    for option, text in (({}, "norm_epsilon = 1e-12"), ({"norm_epsilon": 1e-12, "num_heads": 4}, "num_heads = 2")):
        settings = vit_settings(tmp_path / "ours", **option)
        with pytest.raises(CheckpointError, match=rf"made with {text}.*--config\.backbone\.{text.replace(' ', '')}"):
            initial_parameters(settings, describe_model(make_detector(settings)))


# ---- The norm behind the last block


@pytest.mark.parametrize("name", ["videomae", "mmaction2", "huggingface"])
@pytest.mark.parametrize("final_norm", ["none", "tokens", "pooled"])
def test_a_final_norm_is_filled_by_the_norm_of_its_kind_alone(name, final_norm):
    dialect = dialect_of("vit", name)
    options = {**SMALL["vit"], **dialect.options, "final_norm": final_norm}
    network = Network("vit_base", {"backbone": {"name": "vit_base", **options}}, whole=False)
    params = random_params(network)
    state_dict = export(network, params, name)
    tokens, pooled = {
        "videomae": ("norm", "fc_norm"),
        "mmaction2": ("backbone.norm", "backbone.fc_norm"),
        "huggingface": ("videomae.layernorm", "fc_norm"),
    }[name]
    written = {key.removesuffix(".weight") for key in state_dict if key.endswith(("norm.weight", "layernorm.weight"))}
    assert written & {tokens, pooled} == {"none": set(), "tokens": {tokens}, "pooled": {pooled}}[final_norm]
    both = state_dict | {f"{norm}.{leaf}": np.zeros(4) for norm in (tokens, pooled) for leaf in ("weight", "bias")}
    both |= state_dict
    shapes = {key: tuple(value.shape) for key, value in both.items()}
    rules = recognise(shapes, network).rules.for_network(network.backbone)
    reasons = {key: rules.reason_to_ignore(key) for key in both if not rules.targets_of(key)}
    other = {"none": (tokens, pooled), "tokens": (pooled,), "pooled": (tokens,)}[final_norm]
    assert {key.removesuffix(".weight") for key in reasons if key.endswith(".weight")} == set(other)
    assert all("only a network with final_norm=" in str(reason) for reason in reasons.values())


# ---- Values


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.float32(np.nan), "has 1 of 8 values that are NaN or infinite"),
        (np.float32(-np.inf), "has 1 of 8 values"),
        (np.float64(1e300), r"has 1 of 8 values that are NaN or infinite \(cast from float64\)"),
    ],
)
def test_values_that_are_no_weights_are_refused_with_their_key_in_a_dry_run_too(
    mmaction2, tmp_path, capsys, value, text
):
    network, state_dict = source_file(mmaction2, tmp_path / "whole.safetensors")
    spoilt = state_dict["backbone.norm3.bias"].astype(value.dtype)
    spoilt[3] = value
    torch_io.write(tmp_path / "source.safetensors", state_dict | {"backbone.norm3.bias": spoilt})
    command = (tmp_path / "source.safetensors", "--model", network.name, *as_arguments(mmaction2))
    for way in (("--dry-run",), ("--out", tmp_path / "ours")):
        assert convert(*command, *way) == 1
        assert re.search(rf"backbone\.norm3\.bias {text}", capsys.readouterr().err)
    assert not (tmp_path / "ours").exists()


def test_a_spoilt_value_that_is_not_needed_does_not_matter(mmaction2, tmp_path):
    network, state_dict = source_file(mmaction2, tmp_path / "whole.safetensors")
    spoilt = state_dict | {"cls_head.fc_cls.bias": np.full(4, np.nan, np.float32)}
    torch_io.write(tmp_path / "source.safetensors", spoilt)
    command = ("--model", network.name, "--dry-run", *as_arguments(mmaction2))
    assert convert(tmp_path / "source.safetensors", *command) == 0


@pytest.mark.torch
def test_complex_arrays_are_refused(mmaction2, tmp_path):
    torch = pytest.importorskip("torch")
    network, state_dict = source_file(mmaction2, tmp_path / "whole.safetensors")
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state_dict.items()}
    tensors["backbone.norm3.bias"] = tensors["backbone.norm3.bias"].to(torch.complex64)
    torch.save(tensors, tmp_path / "source.pth")
    with pytest.raises(CheckpointError, match=r"backbone\.norm3\.bias is of complex64"):
        plan_conversion(tmp_path / "source.pth", network)


# ---- Wrappers


@pytest.mark.parametrize(
    ("prefix", "counter"),
    [("module.", "n_averaged"), ("module.", "steps"), ("module.module.", "n_averaged"), ("model.", None)],
)
def test_what_wraps_a_whole_network_is_taken_off(mmaction2, tmp_path, capsys, prefix, counter):
    """torch's AveragedModel, mmengine's averages, the first of these around DataParallel, Lightning."""
    network, state_dict = source_file(mmaction2, tmp_path / "whole.safetensors")
    wrapped = {prefix + key: value for key, value in state_dict.items()}
    if counter:
        wrapped[counter] = np.asarray(7, np.int64)
    torch_io.write(tmp_path / "source.safetensors", wrapped)
    command = ("--model", network.name, "--out", tmp_path / "ours", *as_arguments(mmaction2))
    assert convert(tmp_path / "source.safetensors", *command) == 0
    out = capsys.readouterr().out
    assert "unmapped 0" in out
    assert (f"1 such as {counter}: the count of an averaging wrapper" in out) == (counter is not None)


def test_one_shard_is_told_as_such(mmaction2, tmp_path, capsys):
    network, state_dict = source_file(mmaction2, tmp_path / "whole.safetensors")
    half = dict(list(state_dict.items())[: len(state_dict) // 2])
    path = tmp_path / "model-00001-of-00002.safetensors"
    torch_io.write(path, half)
    assert convert(path, "--model", network.name, "--dry-run", *as_arguments(mmaction2)) == 1
    assert "is one shard of 2: name their folder" in capsys.readouterr().err


# ---- Which network a file is of


def test_a_detector_is_told_by_its_backbone_not_by_its_localizer(tmp_path, capsys):
    network = open_network(str(tiny_detector(tmp_path / "tiny.py")))
    torch_io.write(tmp_path / "source.safetensors", export(network, random_params(network), "re2tal"))
    config = ROOT / "configs" / "anet_slowfast101.py"
    assert convert(tmp_path / "source.safetensors", "--model", config, "--dry-run") == 1
    error = capsys.readouterr().err
    assert "those of video_swin: OpenTAD's SwinTransformer3D_inv" in error
    assert f"0 of {len(export(network, random_params(network), 're2tal'))} keys" in error


def test_only_the_localizers_sizes_are_told_where_only_they_differ(tmp_path, capsys):
    config = tiny_detector(tmp_path / "tiny.py")
    network = open_network(str(config))
    torch_io.write(tmp_path / "source.safetensors", export(network, random_params(network), "re2tal"))
    other = ("--model", config, "--config.localizer.channels=16", "--dry-run")
    assert convert(tmp_path / "source.safetensors", *other) == 1
    error = capsys.readouterr().err
    assert "Its backbone fits, its localizer is another: set --config.localizer.KEY=VALUE" in error
    assert "--model video_swin" not in error


@pytest.mark.parametrize("name", ["pyslowfast", "pytorchvideo"])
def test_a_fusion_kernel_that_shapes_tell_is_named(name, tmp_path, capsys):
    dialect = dialect_of("slowfast", name)
    options = {"name": "slowfast_r50", **dialect.options, "fusion_kernel": 5}
    network = Network("slowfast_r50", {"backbone": options}, whole=False)
    params = {path: np.zeros(shape, np.float16) for path, shape in network.shapes.items()}
    torch_io.write(tmp_path / "source.safetensors", export(network, params, name))
    assert convert(tmp_path / "source.safetensors", "--model", "slowfast_r50", "--dry-run") == 1
    captured = capsys.readouterr()
    assert "The file fits --model slowfast_r50 --config.backbone.fusion_kernel=5." in captured.err
    assert "note     no key tells resample_rate and speed_ratio" in captured.out


@pytest.mark.parametrize(
    ("family", "name", "key"),
    [
        ("video_swin", "mmaction2", "backbone.layers.0.head.weight"),
        ("video_swin", "torchvision", "features.0.head.weight"),
        ("slowfast", "mmaction2", "backbone.fc.weight"),
        ("slowfast", "pyslowfast", "head_fast.weight"),
        ("vit", "videomae", "blocks.0.head.weight"),
        ("vit", "videomae_pretrain", "encoder.mask_token"),
    ],
)
def test_only_the_heads_of_a_project_are_ignored(family, name, key):
    assert dialect_of(family, name).names.reason_to_ignore(key) is None


# ---- The way back


@pytest.fixture
def converted(mmaction2, tmp_path) -> Path:
    network, _ = source_file(mmaction2, tmp_path / "source.safetensors")
    command = ("--model", network.name, "--out", tmp_path / "ours", *as_arguments(mmaction2))
    assert convert(tmp_path / "source.safetensors", *command) == 0
    return tmp_path / "ours"


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (("--golden", "x.npz"), "no use for --golden"),
        (("--check",), "no use for --check"),
        (("--allow-missing", "x"), "no use for --allow-missing"),
        (("--state-dict", "x"), "no use for --state-dict"),
        (("--config.backbone.depths=(1,)",), "without --model"),
    ],
)
def test_the_way_back_refuses_options_that_it_would_not_heed(converted, capsys, extra, text):
    back = ("--to", "torch", "--dialect", "mmaction2", "--out", converted.parent / "back.safetensors")
    assert convert(converted, *back, *extra) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "text"),
    [("a.npz", "suffix '.npz'"), ("absent/a.safetensors", "there is no folder"), ("source.safetensors", "exists")],
)
def test_where_the_way_back_cannot_write_is_known_before_anything_is_read(tmp_path, capsys, out, text):
    (tmp_path / "source.safetensors").touch()
    back = ("--to", "torch", "--dialect", "mmaction2", "--out", tmp_path / out)
    assert convert(tmp_path / "absent_source", *back) == 1
    assert text in capsys.readouterr().err


def test_a_dry_run_of_the_way_back_says_what_it_would_write(converted, capsys):
    out = converted.parent / "back.safetensors"
    back = ("--to", "torch", "--dialect", "mmaction2", "--out", out, "--dry-run")
    assert convert(converted, *back) == 0
    assert f"would write {out}" in capsys.readouterr().out
    assert not out.exists()


def test_a_changed_folder_is_not_written_back(converted, capsys):
    about = json.loads((converted / "model.json").read_text())
    (converted / "model.json").write_text(json.dumps({**about, "sha256": "0" * 64}))
    back = ("--to", "torch", "--dialect", "mmaction2", "--out", converted.parent / "back.safetensors")
    assert convert(converted, *back) == 1
    assert "was changed" in capsys.readouterr().err
    assert load_weights(converted)  # whoever wants it can still have it


def test_a_network_without_the_norm_has_none_written(tmp_path):
    network = small_network(dialect_of("vit", "videomae"))
    assert "fc_norm.weight" not in export(network, random_params(network), "videomae")
