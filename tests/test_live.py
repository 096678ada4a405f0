"""Tiny random networks of transformers and pytorchvideo, converted: the same outputs and the same gradients."""

import copy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert.__main__ import main
from checkpoints_convert.convert import plan_conversion
from checkpoints_convert.live import compare_live
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
def slowfast(tmp_path_factory) -> Iterator[tuple[Any, Path]]:
    """Its heads import torchvision for detection alone; a stand-in keeps the import going where that is absent."""
    stand_in = types.ModuleType("torchvision")
    stand_in.ops = types.ModuleType("torchvision.ops")  # pyright: ignore[reportAttributeAccessIssue]
    stand_in.ops.RoIAlign = object
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", stand_in)
        patch.setitem(sys.modules, "torchvision.ops", stand_in.ops)
        pytest.importorskip("pytorchvideo")
        from pytorchvideo.models.slowfast import create_slowfast

        model = create_slowfast(model_depth=18, stem_dim_outs=(16, 2)).eval()
        randomise(model)
        path = tmp_path_factory.mktemp("slowfast") / "slowfast.pyth"
        torch.save({"model_state": model.state_dict()}, path)
        yield model, path


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
        backbone = build_backbone(network.backbone_name, **options, dtype=jnp.float64)
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


def test_check_fails_on_a_network_that_computes_something_else(videomae):
    _, path = videomae
    conversion = plan_conversion(path, network_of("vit_base", VIT))
    params = conversion.parameters()
    params["blocks.1.mlp.fc1.bias"] = params["blocks.1.mlp.fc1.bias"] + 0.1
    rows = compare_live(conversion, conversion.network.build(params))
    assert [row.passed for row in rows] == [True, False]
