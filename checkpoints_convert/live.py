"""`--check`: the source's own network and ours on one random clip, stage by stage.

Needs PyTorch and the package that the file comes from. A source builder takes the state dict as tensors, our backbone
and the file's folder, and returns what maps a clip (B, F, H, W, C) to arrays by the names of `intermediates`. What
neither keys nor shapes nor a config beside the file tell, it takes from our backbone and says so: that is not checked.
"""

import importlib
import json
import logging
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.convert import Conversion
from checkpoints_convert.verify import Row, compare
from re2tal_jax.backbones.resnet3d import DEPTHS
from re2tal_jax.errors import CheckpointError, ConfigError
from re2tal_jax.reversible import PLAIN, rewire

log = logging.getLogger(__name__)


class Theirs(NamedTuple):
    """The source's network: what runs it, and what of it was taken from our options."""

    run: Callable[[np.ndarray], dict[str, np.ndarray]]
    assumed: Mapping[str, Any]


Builder = Callable[[Mapping[str, Any], Any, Path], Theirs]


def compare_live(conversion: Conversion, backbone: Any) -> list[Row]:
    """Return the error of every stage and of the features, ordinary network against ordinary network.

    Raises:
        ConfigError: a dialect whose network cannot be run here, or a package that is not installed.
        CheckpointError: the source's network is another than ours.
    """
    dialect = conversion.spoken.dialect
    builder = BUILDERS.get((dialect.family, dialect.name))
    if builder is None:
        known = ", ".join(f"{name} ({family})" for family, name in BUILDERS)
        raise ConfigError(f"--check cannot run the source of {dialect.name}; it can for {known}. Use --golden FILE.")
    torch = _import("torch")
    prefix = conversion.spoken.prefix
    state_dict = {
        key.removeprefix(prefix): torch.from_numpy(np.array(tensor.array(), np.float32))
        for key, tensor in conversion.tensors.items()
        if key in conversion.report.mapped
    }
    theirs = builder(state_dict, backbone, conversion.source.path.parent)
    if theirs.assumed:
        told = ", ".join(f"{key} = {value!r}" for key, value in theirs.assumed.items())
        log.info("check    takes from our options, for the file does not tell them: %s", told)
    clip = np.random.default_rng(0).normal(size=_clip_shape(backbone)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs.run(clip)
    features, named = jax.jit(lambda network, video: network.intermediates(video))(
        rewire(backbone, PLAIN), jnp.asarray(clip)
    )
    ours = {**named, "features": features}
    return [compare(f"live {name}", ours[name], value) for name, value in wanted.items()]


def _clip_shape(backbone: Any) -> tuple[int, ...]:
    """Return a small clip that the backbone takes."""
    if hasattr(backbone, "num_frames"):  # a ViT takes whole clips of the size of its table
        side = backbone.grid[1] * backbone.patch_embed.proj.patch_size[1]
        return (1, backbone.num_frames, side, side, backbone.in_channels)
    return (1, 16, 64, 64, backbone.in_channels)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConfigError(
            f"--check runs the source's own network and needs {package}, which cannot be imported ({error}): install "
            "it (pip install '.[crosscheck]' has torch, transformers and pytorchvideo), or use --golden FILE."
        ) from error


def _load(module: Any, state_dict: Mapping[str, Any]) -> Any:
    """Load all that the file has; what it lacks are heads and constants."""
    try:
        unexpected = module.load_state_dict(state_dict, strict=False).unexpected_keys
    except RuntimeError as error:  # torch's for shapes that differ
        raise CheckpointError(f"--check: the source's network does not take the file's weights: {error}") from error
    if unexpected:
        raise CheckpointError(f"--check: the source's network has no {', '.join(unexpected[:3])}.")
    return module.eval()


def _channels_first(clip: np.ndarray) -> Any:
    return _import("torch").from_numpy(np.ascontiguousarray(np.moveaxis(clip, -1, 1)))


def _channels_last(value: Any) -> np.ndarray:
    return np.moveaxis(value.detach().numpy(), 1, -1)


def _hugging_face(state_dict: Mapping[str, Any], ours: Any, folder: Path) -> Theirs:
    transformers = _import("transformers")
    proj, block = ours.patch_embed.proj, ours.blocks[0]
    clip = {
        "image_size": ours.grid[1] * proj.patch_size[1],
        "patch_size": proj.patch_size[1],
        "num_channels": ours.in_channels,
        "num_frames": ours.num_frames,
        "tubelet_size": proj.patch_size[0],
    }
    untold = {"layer_norm_eps": block.attn.norm.epsilon, "num_attention_heads": block.attn.num_heads}
    saved = _hugging_face_config(folder)
    if saved is None:
        config = transformers.VideoMAEConfig(
            **clip,
            **untold,
            hidden_size=ours.out_channels,
            num_hidden_layers=ours.depth,
            intermediate_size=block.mlp.fc1.kernel.shape[-1],
            qkv_bias=block.attn.qkv_bias,
        )
    else:
        config, untold = transformers.VideoMAEConfig.from_dict(saved), {}
        for key, value in clip.items():
            if getattr(config, key) != value:
                raise CheckpointError(
                    f"--check: {folder / CONFIG} has {key} = {getattr(config, key)}, ours is {value}: give the same "
                    "with --config.backbone.KEY=VALUE."
                )
    keeps_norm = ours.final_norm == "tokens"  # otherwise features are taken before it
    config.use_mean_pooling = not keeps_norm
    model = transformers.VideoMAEModel(config)
    if any(key.endswith("query.bias") for key in model.state_dict()):  # in memory from transformers 5 on
        names = {"q_bias": "query.bias", "v_bias": "value.bias"}
        state_dict = {re.sub(r"[qv]_bias$", lambda m: names[m[0]], key): value for key, value in state_dict.items()}
    model = _load(model, {key: value for key, value in state_dict.items() if not key.startswith("fc_norm.")})

    def run(clip: np.ndarray) -> dict[str, np.ndarray]:
        video = _import("torch").from_numpy(clip).permute(0, 1, 4, 2, 3)  # (B, F, C, H, W)
        patches = model.embeddings(video, None)  # with their positions
        tokens = model(video).last_hidden_state
        shape = (len(clip), *ours.grid, ours.out_channels)
        return {"patch_embed": patches.numpy().reshape(shape), "features": tokens.numpy().reshape(shape)}

    return Theirs(run, untold)


CONFIG = "config.json"


def _hugging_face_config(folder: Path) -> dict[str, Any] | None:
    """Return the arguments of the network that transformers saved beside the weights; None where there are none."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--check: {path} cannot be read ({error}).") from error
    is_videomae = isinstance(saved, dict) and saved.pop("model_type", None) == "videomae"
    return saved if is_videomae else None


@contextmanager
def _detection_not_needed() -> Iterator[None]:
    """Let pytorchvideo be imported without torchvision, of which it takes the pooling of detection heads alone."""
    try:
        importlib.import_module("torchvision.ops")
    except ImportError:
        pooling = types.ModuleType("torchvision.ops")
        pooling.__dict__["RoIAlign"] = object
        stand_in = types.ModuleType("torchvision")
        stand_in.__dict__["ops"] = pooling
        names = {stand_in.__name__: stand_in, pooling.__name__: pooling}
    else:
        names = {}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def pytorchvideo_slowfast() -> Callable[..., Any]:
    """Return pytorchvideo's `create_slowfast`.

    Raises:
        ConfigError: it is not installed.
    """
    with _detection_not_needed():
        return _import("pytorchvideo.models.slowfast").create_slowfast


def _pytorchvideo(state_dict: Mapping[str, Any], ours: Any, folder: Path) -> Theirs:
    del folder
    create = pytorchvideo_slowfast()
    depths = tuple(len(stage.blocks) for stage in ours.slow.stages)
    by_depths: dict[tuple[int, ...], int] = {
        (1, 1, 1, 1): 18,
        **{depths: layers for layers, depths in DEPTHS.items()},
    }  # it calls the first R18
    if depths not in by_depths:
        raise ConfigError(f"--check: pytorchvideo has no SlowFast of depths {depths}; allowed are {list(by_depths)}.")
    slow, fast = (path.stem.conv.kernel.shape[-1] for path in (ours.slow, ours.fast))
    slow_stride, fast_stride = ours.temporal_stride
    model = create(
        model_depth=by_depths[depths],
        slowfast_channel_reduction_ratio=(slow // fast,),
        slowfast_fusion_conv_kernel_size=(ours.laterals[0].conv.kernel.shape[0], 1, 1),
        slowfast_fusion_conv_stride=(slow_stride // fast_stride, 1, 1),
        input_channels=(ours.in_channels, ours.in_channels),
        stem_dim_outs=(slow, fast),
    )
    model = _load(model, state_dict)

    def run(clip: np.ndarray) -> dict[str, np.ndarray]:
        video = _channels_first(clip)
        pathways = [video[:, :, ::slow_stride], video[:, :, ::fast_stride]]
        result = {}
        for number, block in enumerate(model.blocks[:5]):
            pathways = block(pathways)
            if number:
                # what pytorchvideo joins to the slow features belongs to the next stage here
                slow_channels = ours.slow.stages[number - 1].blocks[0].conv3.conv.kernel.shape[-1]
                result[f"slow.layer{number - 1}"] = _channels_last(pathways[0][:, :slow_channels])
                result[f"fast.layer{number - 1}"] = _channels_last(pathways[1])
        return result

    return Theirs(run, {"resample_rate": slow_stride, "speed_ratio": slow_stride // fast_stride})


def _torchvision(state_dict: Mapping[str, Any], ours: Any, folder: Path) -> Theirs:
    del folder
    swin = _import("torchvision.models.video.swin_transformer").SwinTransformer3d
    model = swin(
        patch_size=list(ours.patch_embed.proj.patch_size),
        embed_dim=ours.patch_embed.norm.scale.shape[0],
        depths=list(ours.depths),
        num_heads=[stage.blocks[0].attn.num_heads for stage in ours.stages],
        window_size=list(ours.window_size),
        mlp_ratio=ours.stages[0].blocks[0].mlp.fc1.kernel.shape[1] / ours.stages[0].blocks[0].mlp.fc1.kernel.shape[0],
    )
    model = _load(model, state_dict)

    def run(clip: np.ndarray) -> dict[str, np.ndarray]:
        x = model.patch_embed(_channels_first(clip))
        result = {"patch_embed": x.numpy()}
        for number, part in enumerate(model.features):
            x = part(x)
            result[f"downsample{number // 2}" if number % 2 else f"layer{number // 2}"] = x.numpy()
        return {**result, "features": model.norm(x).numpy()}

    return Theirs(run, {"window_size": ours.window_size})


BUILDERS: Mapping[tuple[str, str], Builder] = {
    ("vit", "huggingface"): _hugging_face,
    ("slowfast", "pytorchvideo"): _pytorchvideo,
    ("video_swin", "torchvision"): _torchvision,
}
