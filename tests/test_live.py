"""Tiny random networks of transformers and pytorchvideo, converted: the same outputs and the same gradients."""

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert.__main__ import main
from checkpoints_convert.convert import plan_conversion
from checkpoints_convert.live import compare_live, pytorchvideo_slowfast
from checkpoints_convert.networks import Network, open_network
from checkpoints_convert.rules import fill, flatten, to_state_dict
from re2tal_jax.backbones import build_backbone

# pytorchvideo compiles functions with what newer PyTorch calls deprecated
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")]
torch = pytest.importorskip("torch")

TOLERANCE = 1e-9  # both sides in float64
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_frames": 4, "image_size": 24}
SLOWFAST = {"depths": (1, 1, 1, 1), "base_channels": 16, "channel_ratio": 8}


def network_of(name: str, options: dict[str, Any]) -> Network:
    return open_network(name, [(f"backbone.{key}", repr(value)) for key, value in options.items()])


def randomise(module: Any, seed: int = 0) -> None:
    """Give every parameter and statistic a generic value; a fresh batch norm would hide a wrong order."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if not value.is_floating_point():
            continue
        fan_in = value[0].numel() if value.ndim > 1 else 1
        noise = torch.randn(value.shape, generator=generator)
        positive = name.endswith(("running_var", "norm.weight"))
        value.data = 0.5 + torch.rand(value.shape, generator=generator) if positive else noise / fan_in**0.5


@pytest.fixture(scope="module")
def videomae(tmp_path_factory) -> tuple[Any, Path]:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=24,
        patch_size=8,
        num_frames=4,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        use_mean_pooling=True,
    )
    model = transformers.VideoMAEForVideoClassification(config).eval()
    randomise(model)
    folder = tmp_path_factory.mktemp("videomae")
    model.save_pretrained(folder)
    return model, folder / "model.safetensors"


@pytest.fixture(scope="module")
def slowfast(tmp_path_factory) -> tuple[Any, Path]:
    pytest.importorskip("pytorchvideo")
    model = pytorchvideo_slowfast()(model_depth=18, stem_dim_outs=(16, 2)).eval()
    randomise(model)
    path = tmp_path_factory.mktemp("slowfast") / "slowfast.pyth"
    torch.save({"model_state": model.state_dict()}, path)
    return model, path


def relative_error(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def our_gradients(network: Network, path: Path, loss: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """What `loss(backbone) -> (value, outputs)` gives on converted parameters, and its gradients by PyTorch's keys.

    In float64 on both sides: float32 leaves noise of 1e-5 in small gradients, whose norms nearly cancel them.
    """
    conversion = plan_conversion(path, network)
    options = {key: value for key, value in conversion.network.config["backbone"].items() if key != "name"}
    with jax.enable_x64(True):
        params = {path: value.astype(np.float64) for path, value in conversion.parameters().items()}
        backbone = nnx.eval_shape(lambda: build_backbone(network.backbone_name, **options, dtype=jnp.float64))
        (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(fill(backbone, params))
    computed = conversion.spoken.dialect.computed
    named = {path: gradient for path, gradient in flatten(gradients).items() if path not in computed}
    return outputs, to_state_dict(named, conversion.spoken.rules)


def compare_gradients(ours: dict[str, np.ndarray], model: Any, skipped: tuple[str, ...]) -> None:
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    compared = [name for name in theirs if not name.startswith(skipped)]
    assert len(compared) > 20
    for name in compared:
        assert relative_error(ours[name], theirs[name]) < TOLERANCE, name


def test_hugging_face_videomae_gives_the_same_tokens_and_gradients(videomae):
    model, path = videomae
    rng = np.random.default_rng(1)
    video = rng.normal(size=(2, 4, 24, 24, 3)).astype(np.float32)
    weights = rng.normal(size=(2, 2, 3, 3, 24))
    model = copy.deepcopy(model).double()
    theirs = model.videomae(torch.from_numpy(video).double().permute(0, 1, 4, 2, 3)).last_hidden_state
    (theirs * torch.from_numpy(weights.reshape(2, 18, 24))).sum().backward()

    def loss(backbone: Any) -> Any:
        tokens = backbone(jnp.asarray(video, jnp.float64))
        return jnp.sum(tokens * weights), tokens

    ours, gradients = our_gradients(network_of("vit_base", {**VIT, "rewired": False}), path, loss)
    assert relative_error(ours.reshape(2, 18, 24), theirs.detach().numpy()) < TOLERANCE
    in_memory = {"q_bias": "query.bias", "v_bias": "value.bias"}  # transformers 5 renames at loading
    gradients |= {
        key.replace(a, b): value for key, value in gradients.items() for a, b in in_memory.items() if a in key
    }
    compare_gradients(gradients, model, skipped=("fc_norm", "classifier"))


def test_pytorchvideo_slowfast_gives_the_same_pathways_and_gradients(slowfast):
    model, path = slowfast
    rng = np.random.default_rng(2)
    video = rng.normal(size=(1, 8, 40, 48, 3)).astype(np.float32)
    model = copy.deepcopy(model).double()
    clip = torch.from_numpy(np.ascontiguousarray(np.moveaxis(video, -1, 1))).double()
    pathways = [clip[:, :, ::4], clip]
    for block in model.blocks[:5]:
        pathways = block(pathways)
    weights = [rng.normal(size=tuple(p.shape)) for p in pathways]
    sum((p * torch.from_numpy(w)).sum() for p, w in zip(pathways, weights, strict=True)).backward()

    def loss(backbone: Any) -> Any:
        features = backbone(jnp.asarray(video, jnp.float64))
        terms = [jnp.sum(p * jnp.moveaxis(jnp.asarray(w), 1, -1)) for p, w in zip(features, weights, strict=True)]
        return terms[0] + terms[1], features

    ours, gradients = our_gradients(network_of("slowfast_r50", {**SLOWFAST, "rewired": False}), path, loss)
    for mine, its in zip(ours, pathways, strict=True):
        assert relative_error(np.moveaxis(np.asarray(mine), -1, 1), its.detach().numpy()) < TOLERANCE
    compare_gradients(gradients, model, skipped=("blocks.6",))


@pytest.mark.parametrize(
    ("source", "name", "options"), [("videomae", "vit_base", VIT), ("slowfast", "slowfast_r50", SLOWFAST)]
)
def test_check_compares_every_stage_on_the_command_line(request, tmp_path, capsys, source, name, options):
    _, path = request.getfixturevalue(source)
    overrides = [f"--config.backbone.{key}={value!r}" for key, value in options.items()]
    assert main([str(path), "--model", name, "--out", str(tmp_path / "ours"), "--check", *overrides]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("live ")]
    assert len(lines) >= 2
    assert all(line.endswith(" ok") for line in lines)


def command(path: Path, name: str, options: dict[str, Any], *more: str) -> list[str]:
    overrides = [f"--config.backbone.{key}={value!r}" for key, value in options.items()]
    return [str(path), "--model", name, *overrides, *more]


@pytest.mark.parametrize("wrong", [{"norm_epsilon": 1e-2}, {"num_heads": 2}])
def test_check_takes_from_the_config_beside_the_file_what_no_key_tells(videomae, capsys, wrong):
    """The weights have the same shapes; only the saved config knows that these options are wrong."""
    _, path = videomae
    assert main(command(path.parent, "vit_base", VIT | wrong, "--check", "--dry-run")) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAIL")]
    assert [line.split()[:2] for line in failed] == [["live", "features"]]


def test_check_says_what_it_took_from_our_options_where_there_is_no_config(videomae, tmp_path, capsys):
    _, path = videomae
    shutil.copy(path, tmp_path / "model.safetensors")
    assert main(command(tmp_path, "vit_base", VIT, "--check", "--dry-run")) == 0
    assert (
        "check    takes from our options, for the file does not tell them: layer_norm_eps = 1e-12, "
        "num_attention_heads = 4" in capsys.readouterr().out
    )


def test_check_refuses_a_network_of_other_clips(videomae, capsys):
    _, path = videomae
    assert main(command(path, "vit_base", VIT | {"num_frames": 8}, "--check", "--dry-run")) == 1
    assert "has num_frames = 4, ours is 8" in capsys.readouterr().err


def test_check_says_that_the_rates_of_slowfast_are_ours(slowfast, capsys):
    _, path = slowfast
    assert main(command(path, "slowfast_r50", SLOWFAST, "--check", "--dry-run")) == 0
    assert "resample_rate = 4, speed_ratio = 4" in capsys.readouterr().out


def test_the_stand_in_for_torchvision_does_not_stay(slowfast):
    del slowfast
    assert getattr(sys.modules.get("torchvision"), "__file__", "a real one") is not None


def test_from_pretrained_takes_what_is_written_for_hugging_face(videomae, tmp_path):
    """Names on disk are q_bias and v_bias; a strict load into transformers 5 in memory would want others."""
    transformers = pytest.importorskip("transformers")
    model, path = videomae
    options = VIT | {"final_norm": "pooled"}
    assert main(command(path, "vit_base", options, "--out", str(tmp_path / "ours"))) == 0
    folder = tmp_path / "theirs"
    folder.mkdir()
    shutil.copy(path.parent / "config.json", folder)
    back = ["--to", "torch", "--dialect", "huggingface", "--out", str(folder / "model.safetensors")]
    assert main([str(tmp_path / "ours"), *back]) == 0
    loaded = transformers.VideoMAEForVideoClassification.from_pretrained(folder).eval()
    video = torch.from_numpy(np.random.default_rng(4).normal(size=(1, 4, 3, 24, 24)).astype(np.float32))
    with torch.no_grad():
        tokens, wanted = (net.videomae(video).last_hidden_state for net in (loaded, model))
        assert torch.equal(tokens, wanted)
        assert torch.equal(loaded.fc_norm(tokens.mean(1)), model.fc_norm(wanted.mean(1)))


def test_check_fails_on_a_network_that_computes_something_else(videomae):
    _, path = videomae
    conversion = plan_conversion(path, network_of("vit_base", VIT))
    params = conversion.parameters()
    params["blocks.1.mlp.fc1.bias"] = params["blocks.1.mlp.fc1.bias"] + 0.1
    rows = compare_live(conversion, conversion.network.build(params))
    assert [row.passed for row in rows] == [True, False]
