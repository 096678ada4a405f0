"""`python -m checkpoints_convert`: every dialect there and back, whole detectors, what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from checkpoints_convert import torch_io
from checkpoints_convert.__main__ import main
from checkpoints_convert.convert import dialects_of, export, plan_conversion, recognise
from checkpoints_convert.dialects import DIALECTS
from checkpoints_convert.dialects.dialect import Dialect
from checkpoints_convert.networks import Network, open_network
from checkpoints_convert.rules import flatten, plan
from re2tal_jax.backbones import list_backbones
from re2tal_jax.config import read_config_file
from re2tal_jax.errors import CheckpointError, ConfigError
from re2tal_jax.training.checkpoint import load_params
from re2tal_jax.weights import load_about, load_weights
from tests.test_backbones import SMALL

ROOT = Path(__file__).parents[1]
WRITABLE = [dialect for dialect in DIALECTS if not dialect.inflate]


def label(dialect: Dialect) -> str:
    return f"{dialect.family}-{dialect.name}"


def small_options(dialect: Dialect) -> dict[str, Any]:
    return {**SMALL[dialect.family], **dialect.options}


def small_network(dialect: Dialect) -> Network:
    name = next(name for name in list_backbones() if name.startswith(dialect.family))
    return Network(name, {"backbone": {"name": name, **small_options(dialect)}}, whole=False)


def as_arguments(dialect: Dialect) -> list[str]:
    """What the command line needs to be told of the small network; a dialect's own options it knows."""
    return [f"--config.backbone.{key}={value!r}" for key, value in SMALL[dialect.family].items()]


def random_params(network: Network, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in network.shapes.items()}


def source_file(dialect: Dialect, path: Path) -> tuple[Network, dict[str, np.ndarray]]:
    """A file as the dialect's project would write it, from a network with random parameters."""
    network = small_network(dialect)
    state_dict = export(network, random_params(network), dialect.name)
    torch_io.write(path, state_dict)
    return network, state_dict


def convert(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def mmaction2() -> Dialect:
    return next(d for d in DIALECTS if (d.family, d.name) == ("video_swin", "mmaction2"))


@pytest.mark.parametrize("dialect", WRITABLE, ids=label)
def test_every_dialect_goes_there_and_back_bit_for_bit(dialect, tmp_path, capsys):
    network, state_dict = source_file(dialect, tmp_path / "source.safetensors")
    options = as_arguments(dialect)
    assert convert(tmp_path / "source.safetensors", "--model", network.name, "--out", tmp_path / "ours", *options) == 0
    assert f"dialect  {dialect.name} (" in capsys.readouterr().out
    back = ("--to", "torch", "--dialect", dialect.name, "--out", tmp_path / "back.safetensors")
    assert convert(tmp_path / "ours", *back) == 0
    _, found = torch_io.choose_state_dict(torch_io.read(tmp_path / "back.safetensors").tree)
    assert set(found) == set(state_dict)
    for key, value in state_dict.items():
        assert found[key].dtype == str(value.dtype)
        np.testing.assert_array_equal(found[key].array(), value)
    expected = {path: value for path, value in random_params(network).items() if path not in dialect.computed}
    ours = load_params(tmp_path / "ours")
    for path, value in expected.items():
        np.testing.assert_array_equal(ours[f"backbone.{path}"], value)


@pytest.mark.parametrize("dialect", WRITABLE, ids=label)
def test_a_dialect_is_recognised_by_its_keys_also_inside_wrappers(dialect, tmp_path):
    network = small_network(dialect)
    shapes = {key: value.shape for key, value in export(network, random_params(network), dialect.name).items()}
    assert recognise(shapes, network).dialect is dialect
    bare = {key.removeprefix(dialect.prefixes[0]): shape for key, shape in shapes.items()}
    for prefix in dialect.prefixes:
        assert recognise({prefix + key: shape for key, shape in bare.items()}, network).dialect is dialect


@pytest.mark.parametrize("dialect", WRITABLE, ids=label)
def test_a_dialect_names_every_parameter_of_every_published_network(dialect):
    for name in (name for name in list_backbones() if name.startswith(dialect.family)):
        network = Network(name, {"backbone": {"name": name, **dialect.options}}, whole=False)
        names = dialect.names
        keys = [key for path in network.shapes for key, _, _ in names.keys_of(path)]
        assert len(keys) == len(set(keys))
        assert all(names.keys_of(path) or path in dialect.computed for path in network.shapes)
        assert all(len(names.targets_of(key)) == 1 for key in keys)


# One key of each kind as the project's own source names it, and where it goes.
SAMPLES = [
    ("video_swin", "mmaction2", "backbone.layers.2.blocks.5.mlp.fc1.weight", "stages.2.blocks.5.mlp.fc1.kernel"),
    ("video_swin", "mmaction2", "backbone.norm3.weight", "norm.scale"),
    ("video_swin", "swin_transformer", "backbone.norm.bias", "norm.bias"),
    ("video_swin", "re2tal", "backbone.layers.0.blocks.1.inv_block.Gm.norm2.bias", "stages.0.blocks.1.mlp.norm.bias"),
    ("video_swin", "torchvision", "features.0.1.mlp.3.weight", "stages.0.blocks.1.mlp.fc2.kernel"),
    ("video_swin", "torchvision", "features.3.reduction.weight", "stages.1.downsample.reduction.kernel"),
    ("slowfast", "mmaction2", "backbone.slow_path.conv1.bn.running_mean", "slow.stem.norm.mean"),
    ("slowfast", "mmaction2", "backbone.slow_path.layer3_lateral.conv.weight", "laterals.3.conv.kernel"),
    (
        "slowfast",
        "re2tal",
        "backbone.fast_path.layer3.blocks.22.inv_block.Fm.conv2.bn.weight",
        "fast.stages.2.blocks.22.conv2.norm.scale",
    ),
    (
        "slowfast",
        "re2tal",
        "backbone.slow_path.layer1.blocks.0.downsample.conv.weight",
        "slow.stages.0.blocks.0.downsample.conv.kernel",
    ),
    ("slowfast", "pyslowfast", "s1.pathway1_stem.conv.weight", "fast.stem.conv.kernel"),
    ("slowfast", "pyslowfast", "s2.pathway0_res0.branch1_bn.running_var", "slow.stages.0.blocks.0.downsample.norm.var"),
    ("slowfast", "pyslowfast", "s5.pathway1_res2.branch2.c.weight", "fast.stages.3.blocks.2.conv3.conv.kernel"),
    ("slowfast", "pyslowfast", "s4_fuse.conv_f2s.weight", "laterals.3.conv.kernel"),
    (
        "slowfast",
        "pytorchvideo",
        "blocks.4.multipathway_blocks.1.res_blocks.2.branch2.norm_c.running_var",
        "fast.stages.3.blocks.2.conv3.norm.var",
    ),
    ("slowfast", "pytorchvideo", "blocks.0.multipathway_fusion.norm.weight", "laterals.0.norm.scale"),
    ("slowonly", "mmaction2", "backbone.layer4.2.conv1.conv.weight", "stages.3.blocks.2.conv1.conv.kernel"),
    ("slowonly", "resnet2d", "layer2.0.downsample.1.running_mean", "stages.1.blocks.0.downsample.norm.mean"),
    ("vit", "videomae", "blocks.11.attn.q_bias", "blocks.11.attn.q_bias"),
    ("vit", "videomae_pretrain", "encoder.blocks.3.mlp.fc2.bias", "blocks.3.mlp.fc2.bias"),
    ("vit", "mmaction2", "backbone.blocks.3.mlp.layers.0.0.weight", "blocks.3.mlp.fc1.kernel"),
    (
        "vit",
        "huggingface",
        "videomae.encoder.layer.3.attention.attention.key.weight",
        "blocks.3.attn.qkv.kernel",
    ),
    ("vit", "huggingface", "videomae.encoder.layer.3.attention.attention.q_bias", "blocks.3.attn.q_bias"),
]


@pytest.mark.parametrize(("family", "name", "key", "path"), SAMPLES, ids=lambda value: value if "." in value else "")
def test_published_keys_go_where_they_belong(family, name, key, path):
    dialect = next(d for d in DIALECTS if (d.family, d.name) == (family, name))
    found = [t.path for prefix in dialect.prefixes for t in dialect.inside(prefix).targets_of(key)]
    assert found == [path]


def test_dialects_are_called_differently_in_a_family():
    assert len({(dialect.family, dialect.name) for dialect in DIALECTS}) == len(DIALECTS)


# ---- What is chosen in a file


def test_the_averaged_weights_of_a_training_file_are_taken(mmaction2, tmp_path):
    torch = pytest.importorskip("torch")
    network = small_network(mmaction2)
    average, last = random_params(network, 1), random_params(network, 2)

    def tensors(params: Any) -> dict[str, Any]:
        state_dict = export(network, params, "mmaction2")
        return {f"module.{key}": torch.from_numpy(np.array(value)) for key, value in state_dict.items()}

    content = {"epoch": 3, "state_dict": tensors(last), "state_dict_ema": tensors(average), "meta": {"a": Path("b")}}
    torch.save(content, tmp_path / "source.pth")
    options = ("--model", network.name, *as_arguments(mmaction2))
    for name, wanted in ((None, average), ("state_dict", last)):
        choice = () if name is None else ("--state-dict", name)
        assert convert(tmp_path / "source.pth", "--out", tmp_path / f"{name}", *options, *choice) == 0
        found = load_weights(tmp_path / f"{name}")
        np.testing.assert_array_equal(found["backbone.norm.scale"], wanted["norm.scale"])
    assert "pathlib" in (tmp_path / "None" / "report.txt").read_text()


def test_the_same_source_gives_the_same_bytes(mmaction2, tmp_path):
    network, _ = source_file(mmaction2, tmp_path / "source.safetensors")
    for out in ("a", "b"):
        assert (
            convert(
                tmp_path / "source.safetensors",
                "--model",
                network.name,
                "--out",
                tmp_path / out,
                *as_arguments(mmaction2),
            )
            == 0
        )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["model.json", "params.safetensors", "report.txt"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    about = load_about(tmp_path / "a")
    assert about["source"]["sha256"] == torch_io.read(tmp_path / "source.safetensors").sha256
    assert about["config"]["backbone"]["name"] == network.name


def test_other_dtypes_are_cast_and_told(mmaction2, tmp_path, capsys):
    network, state_dict = source_file(mmaction2, tmp_path / "full.safetensors")
    half = {key: value.astype(np.float16) if value.dtype == np.float32 else value for key, value in state_dict.items()}
    torch_io.write(tmp_path / "half.safetensors", half)
    assert (
        convert(
            tmp_path / "half.safetensors", "--model", network.name, "--out", tmp_path / "ours", *as_arguments(mmaction2)
        )
        == 0
    )
    assert f"{len(network.shapes)} keys from float16" in capsys.readouterr().out
    found = load_weights(tmp_path / "ours")["backbone.norm.scale"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, half["backbone.norm3.weight"])


def test_image_weights_are_spread_over_time(tmp_path):
    """A video of equal frames then gives what the image gave: kernels sum to the image's, tables repeat in time."""
    dialect = next(d for d in DIALECTS if d.name == "swin2d")
    network = small_network(dialect)
    params = random_params(network)
    names = {path: [key for key, _, _ in dialect.names.keys_of(path)] for path in network.shapes}
    image: dict[str, np.ndarray] = {}
    for path, (key,) in names.items():
        _, _, layout = dialect.names.keys_of(path)[0]
        image[key] = layout.to_torch(params[path])
    image["patch_embed.proj.weight"] = image["patch_embed.proj.weight"].sum(2)
    tables = [key for key in image if key.endswith("relative_position_bias_table")]
    for key in tables:
        image[key] = image[key][: image[key].shape[0] // (2 * network.backbone.window_size[0] - 1)]
    image["head.weight"] = np.zeros((1000, 8), np.float32)
    torch_io.write(tmp_path / "swin.safetensors", image)
    options = ("--model", network.name, *as_arguments(dialect))
    assert convert(tmp_path / "swin.safetensors", "--out", tmp_path / "ours", *options) == 0
    found = load_weights(tmp_path / "ours")
    kernel = found["backbone.patch_embed.proj.kernel"]
    np.testing.assert_array_equal(kernel[0], kernel[1])
    np.testing.assert_allclose(
        kernel.sum(0), np.moveaxis(image["patch_embed.proj.weight"], (0, 1), (-1, -2)), rtol=1e-6
    )
    for key in tables:
        (target,) = dialect.names.targets_of(key)
        table = found[f"backbone.{target.path}"]
        np.testing.assert_array_equal(table[: len(image[key])], image[key])
        np.testing.assert_array_equal(table[-len(image[key]) :], image[key])


# ---- Whole detectors


def test_every_key_of_the_published_detector_has_its_place(parity_dir):
    file = parity_dir / "optim" / "re2tal__e2e_anet_re2tal_actionformer_swin_tiny.state_dict_keys.json"
    shapes = {key: tuple(shape) for key, (shape, _) in json.loads(file.read_text()).items()}
    network = open_network(str(ROOT / "configs" / "anet.py"))
    spoken = recognise(shapes, network)
    assert spoken.dialect.name == "re2tal"
    report = plan(shapes, spoken.rules, network.shapes).report
    assert report.complete, str(report)
    assert len(report.mapped) + len(report.ignored) == len(shapes)
    assert all(report.ignored.values())
    backbone = open_network("video_swin_tiny")
    report = plan(shapes, recognise(shapes, backbone).rules, backbone.shapes).report
    assert report.complete, str(report)


def tiny_detector(path: Path) -> Path:
    """A config file whose detector is small."""
    path.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from configs.demo import get_config as demo\n"
        "def get_config():\n"
        "    config = demo()\n"
        "    config.detector.snippet_loss_weight = 0.0\n"
        "    config.backbone.update(embed_dim=4, depths=(1, 1), num_heads=(1, 2))\n"
        "    config.localizer.update(channels=8, arch=(1, 1, 1), regression_range=((0, 4), (4, 10000)))\n"
        "    return config\n"
    )
    return path


def test_a_whole_detector_goes_there_and_back(tmp_path):
    config = tiny_detector(tmp_path / "tiny.py")
    network = open_network(str(config))
    state_dict = export(network, random_params(network), "re2tal")
    assert any(key.startswith("backbone.model.backbone.layers.0.blocks.0.inv_block.Fm.") for key in state_dict)
    assert any(key.startswith("rpn_head.scale.") for key in state_dict)
    assert state_dict["rpn_head.loss_normalizer"].dtype == np.int64
    trained = {"rpn_head.loss_normalizer": np.asarray(93, np.int64)}
    torch_io.write(tmp_path / "source.safetensors", state_dict | trained)
    assert convert(tmp_path / "source.safetensors", "--model", config, "--out", tmp_path / "ours") == 0
    back = ("--to", "torch", "--dialect", "re2tal", "--out", tmp_path / "back.safetensors")
    assert convert(tmp_path / "ours", *back) == 0
    _, found = torch_io.choose_state_dict(torch_io.read(tmp_path / "back.safetensors").tree)
    assert set(found) == set(state_dict)
    for key, value in state_dict.items():
        np.testing.assert_array_equal(found[key].array(), value)


def test_the_backbone_of_a_detector_can_be_taken_alone(tmp_path, capsys):
    config = tiny_detector(tmp_path / "tiny.py")
    network = open_network(str(config))
    torch_io.write(tmp_path / "source.safetensors", export(network, random_params(network), "mmaction2"))
    options = {key: value for key, value in read_config_file(config)["backbone"].items() if key != "name"}
    overrides = [f"--config.backbone.{key}={value!r}" for key, value in options.items() if key != "checkpoint"]
    command = ("--model", "video_swin_tiny", "--out", tmp_path / "ours", *overrides)
    assert convert(tmp_path / "source.safetensors", *command) == 0
    assert "the localizer; name a config file" in capsys.readouterr().out
    assert all(path.startswith("backbone.") for path in load_weights(tmp_path / "ours"))


# ---- What is refused


def test_a_file_of_another_network_is_told_with_its_own(mmaction2, tmp_path, capsys):
    source_file(mmaction2, tmp_path / "source.safetensors")
    assert convert(tmp_path / "source.safetensors", "--model", "slowfast_r50", "--out", tmp_path / "ours") == 1
    error = capsys.readouterr().err
    assert "those of video_swin: mmaction2's SwinTransformer3D" in error
    assert "video_swin_tiny" in error
    assert not (tmp_path / "ours").exists()


def test_a_file_of_another_size_lists_both_shapes(mmaction2, tmp_path, capsys):
    network, _ = source_file(mmaction2, tmp_path / "source.safetensors")
    assert convert(tmp_path / "source.safetensors", "--model", network.name, "--out", tmp_path / "ours") == 1
    captured = capsys.readouterr()
    assert (
        "backbone.layers.0.blocks.0.attn.qkv.weight (12, 4): stages.0.blocks.0.attn.qkv.kernel needs (" in captured.out
    )
    assert "parameters that no key fills" in captured.out
    assert "nothing was written. The file fits no published network." in captured.err
    assert not (tmp_path / "ours").exists()


def test_a_file_of_another_published_size_names_the_one_that_fits(parity_dir, tmp_path, capsys):
    file = parity_dir / "optim" / "re2tal__e2e_anet_re2tal_actionformer_swin_tiny.state_dict_keys.json"
    shapes = {key: shape for key, (shape, _) in json.loads(file.read_text()).items() if key.startswith("backbone.")}
    torch_io.write(tmp_path / "tiny.safetensors", {key: np.zeros(shape, np.float16) for key, shape in shapes.items()})
    assert convert(tmp_path / "tiny.safetensors", "--model", "video_swin_base", "--dry-run") == 1
    assert "The file fits --model video_swin_tiny." in capsys.readouterr().err


def test_a_parameter_left_unfilled_is_an_error_unless_it_is_allowed(mmaction2, tmp_path, capsys):
    network, state_dict = source_file(mmaction2, tmp_path / "whole.safetensors")
    del state_dict["backbone.norm3.bias"]
    torch_io.write(tmp_path / "source.safetensors", state_dict)
    command = (tmp_path / "source.safetensors", "--model", network.name, *as_arguments(mmaction2))
    assert convert(*command, "--out", tmp_path / "ours") == 1
    assert "norm.bias (8,)" in capsys.readouterr().out
    assert convert(*command, "--out", tmp_path / "ours", "--allow-missing", r"^norm\.bias$") == 0
    np.testing.assert_array_equal(load_weights(tmp_path / "ours")["backbone.norm.bias"], np.zeros(8))
    assert convert(*command, "--out", tmp_path / "other", "--allow-missing", "(") == 1
    assert "no regular expression" in capsys.readouterr().err


def test_a_stray_key_is_an_error_with_the_nearest_parameter(mmaction2, tmp_path, capsys):
    network, state_dict = source_file(mmaction2, tmp_path / "whole.safetensors")
    torch_io.write(tmp_path / "source.safetensors", state_dict | {"backbone.norm4.weight": np.zeros(8, np.float32)})
    command = ("--model", network.name, "--out", tmp_path / "ours", *as_arguments(mmaction2))
    assert convert(tmp_path / "source.safetensors", *command) == 1
    assert "backbone.norm4.weight: no rule matches; nearest: " in capsys.readouterr().out


def test_an_existing_folder_is_not_replaced_unless_asked_and_never_a_strange_one(mmaction2, tmp_path, capsys):
    network, _ = source_file(mmaction2, tmp_path / "source.safetensors")
    command = (tmp_path / "source.safetensors", "--model", network.name, *as_arguments(mmaction2))
    assert convert(*command, "--out", tmp_path / "ours") == 0
    assert convert(*command, "--out", tmp_path / "ours") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert convert(*command, "--out", tmp_path / "ours", "--overwrite") == 0
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").write_text("mine")
    assert convert(*command, "--out", strange, "--overwrite") == 1
    assert (strange / "thesis.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing_that_looks_whole(mmaction2, tmp_path, monkeypatch, capsys):
    network, _ = source_file(mmaction2, tmp_path / "source.safetensors")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    command = ("--model", network.name, "--out", tmp_path / "ours", *as_arguments(mmaction2))
    assert convert(tmp_path / "source.safetensors", *command) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_a_dry_run_writes_nothing(mmaction2, tmp_path):
    network, _ = source_file(mmaction2, tmp_path / "source.safetensors")
    before = sorted(tmp_path.iterdir())
    assert convert(tmp_path / "source.safetensors", "--model", network.name, "--dry-run", *as_arguments(mmaction2)) == 0
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "--model is missing"),
        (("--model", "video_swin_tinny", "--dry-run"), "'video_swin_tiny'"),
        (("--model", "video_swin_tiny"), "--out is missing"),
        (("--model", "video_swin_tiny", "--config.localizer.channels=3", "--dry-run"), "a backbone alone"),
        (("--model", "video_swin_tiny", "--config.backbone.dephts=3", "--dry-run"), "'depths'"),
        (("--model", "video_swin_tiny", "--dialect", "mmaction", "--dry-run"), "'mmaction2'"),
        (("--to", "torch", "--out", "x.pth"), "--dialect"),
        (("--modle", "x"), "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_arguments_that_do_not_fit_are_answered(mmaction2, tmp_path, capsys, arguments, text):
    source_file(mmaction2, tmp_path / "source.safetensors")
    assert convert(tmp_path / "source.safetensors", *arguments) == 1
    assert text in capsys.readouterr().err


def test_image_weights_have_no_way_back():
    dialect = next(d for d in DIALECTS if d.name == "swin2d")
    network = small_network(dialect)
    with pytest.raises(ConfigError, match="No dialect 'swin2d' to write"):
        export(network, random_params(network), "swin2d")


def test_a_damaged_folder_of_ours_is_named(mmaction2, tmp_path):
    network, _ = source_file(mmaction2, tmp_path / "source.safetensors")
    command = ("--model", network.name, "--out", tmp_path / "ours", *as_arguments(mmaction2))
    assert convert(tmp_path / "source.safetensors", *command) == 0
    path = tmp_path / "ours" / "params.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"params\.safetensors cannot be read"):
        load_params(tmp_path / "ours")


# ---- What a network is built with


def test_the_plain_converted_network_rewires_without_a_change_of_parameters(mmaction2, tmp_path):
    network, _ = source_file(mmaction2, tmp_path / "source.safetensors")
    found = plan_conversion(tmp_path / "source.safetensors", network).parameters()
    rewired = network.with_options({"rewired": True})
    plain = network.with_options({"rewired": False})
    assert rewired.shapes == plain.shapes
    ours, theirs = flatten(rewired.build(found)), flatten(plain.build(found))
    for path, value in found.items():
        np.testing.assert_array_equal(ours[path], value)
        np.testing.assert_array_equal(theirs[path], value)


def test_only_wanted_initial_values_are_drawn(mmaction2):
    network = small_network(mmaction2)
    drawn = network.initial_values({"norm.scale"})
    assert set(drawn) == {"norm.scale"}
    np.testing.assert_array_equal(drawn["norm.scale"], flatten(network.make())["norm.scale"])
    assert isinstance(network.abstract, nnx.Module)


def test_dialects_of_a_network_are_those_of_its_family():
    assert set(dialects_of(open_network("vit_base"))) == {"videomae", "videomae_pretrain", "mmaction2", "huggingface"}
