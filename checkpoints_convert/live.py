"""`--check`: the source's own network and ours on one random clip, stage by stage.

Needs PyTorch and the package that the file comes from. A source builder takes the state dict as tensors and our
backbone, whose sizes it has, and returns what maps a clip (B, F, H, W, C) to arrays by the names of `intermediates`.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.convert import Conversion
from checkpoints_convert.verify import TOLERANCE, Row, compare
from re2tal_jax.errors import ConfigError
from re2tal_jax.reversible import PLAIN, rewire

Run = Callable[[np.ndarray], dict[str, np.ndarray]]
Builder = Callable[[Mapping[str, Any], Any], Run]

LIVE_TOLERANCE = 10 * TOLERANCE  # deep networks in float32 on unscaled random input: convolutions sum in other orders


def compare_live(conversion: Conversion, backbone: Any) -> list[Row]:
    """Return the error of every stage and of the features, ordinary network against ordinary network.

    Raises:
        ConfigError: a dialect whose network cannot be run here, or a package that is not installed.
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
    theirs = builder(state_dict, backbone)
    clip = np.random.default_rng(0).normal(size=_clip_shape(backbone)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(clip)
    features, named = jax.jit(lambda network, video: network.intermediates(video))(
        rewire(backbone, PLAIN), jnp.asarray(clip)
    )
    ours = {**named, "features": features}
    return [Row(f"live {row.name}", row.error, LIVE_TOLERANCE) for row in _rows(ours, wanted)]


def _rows(ours: Mapping[str, Any], wanted: Mapping[str, np.ndarray]) -> list[Row]:
    return [compare(name, ours[name], value) for name, value in wanted.items()]


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
    unexpected = module.load_state_dict(state_dict, strict=False).unexpected_keys
    if unexpected:
        raise ConfigError(f"--check: the source's network has no {', '.join(unexpected[:3])}.")
    return module.eval()


def _channels_first(clip: np.ndarray) -> Any:
    return _import("torch").from_numpy(np.ascontiguousarray(np.moveaxis(clip, -1, 1)))


def _channels_last(value: Any) -> np.ndarray:
    return np.moveaxis(value.detach().numpy(), 1, -1)


def _hugging_face(state_dict: Mapping[str, Any], ours: Any) -> Run:
    transformers = _import("transformers")
    proj, block = ours.patch_embed.proj, ours.blocks[0]
    config = transformers.VideoMAEConfig(
        image_size=ours.grid[1] * proj.patch_size[1],
        patch_size=proj.patch_size[1],
        num_channels=ours.in_channels,
        num_frames=ours.num_frames,
        tubelet_size=proj.patch_size[0],
        hidden_size=ours.out_channels,
        num_hidden_layers=ours.depth,
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.kernel.shape[-1],
        qkv_bias=block.attn.qkv_bias,
        layer_norm_eps=block.attn.norm.epsilon,
        use_mean_pooling="layernorm.weight" not in state_dict,
    )
    model = transformers.VideoMAEModel(config)
    if any(key.endswith("query.bias") for key in model.state_dict()):  # in memory from transformers 5 on
        names = {"q_bias": "query.bias", "v_bias": "value.bias"}
        state_dict = {re.sub(r"[qv]_bias$", lambda m: names[m[0]], key): value for key, value in state_dict.items()}
    model = _load(model, state_dict)
    model.layernorm = None  # features are taken before it

    def run(clip: np.ndarray) -> dict[str, np.ndarray]:
        video = _import("torch").from_numpy(clip).permute(0, 1, 4, 2, 3)  # (B, F, C, H, W)
        patches = model.embeddings.patch_embeddings(video)
        tokens = model(video).last_hidden_state
        shape = (len(clip), *ours.grid, ours.out_channels)
        return {"patch_embed": patches.numpy().reshape(shape), "features": tokens.numpy().reshape(shape)}

    return run


def _pytorchvideo(state_dict: Mapping[str, Any], ours: Any) -> Run:
    create = _import("pytorchvideo.models.slowfast").create_slowfast
    by_depths = _import("pytorchvideo.models.slowfast")._MODEL_STAGE_DEPTH
    depths = tuple(len(stage.blocks) for stage in ours.slow.stages)
    depth = next((name for name, theirs in by_depths.items() if tuple(theirs) == depths), None)
    if depth is None:
        raise ConfigError(f"--check: pytorchvideo has no SlowFast of depths {depths}; allowed are {by_depths}.")
    slow, fast = (path.stem.conv.kernel.shape[-1] for path in (ours.slow, ours.fast))
    model = create(
        model_depth=depth,
        slowfast_channel_reduction_ratio=(slow // fast,),
        slowfast_fusion_conv_kernel_size=(ours.laterals[0].conv.kernel.shape[0], 1, 1),
        slowfast_fusion_conv_stride=(ours.temporal_stride[0] // ours.temporal_stride[1], 1, 1),
        input_channels=(ours.in_channels, ours.in_channels),
        stem_dim_outs=(slow, fast),
    )
    model = _load(model, state_dict)

    def run(clip: np.ndarray) -> dict[str, np.ndarray]:
        video = _channels_first(clip)
        pathways = [video[:, :, :: ours.temporal_stride[0]], video[:, :, :: ours.temporal_stride[1]]]
        result = {}
        for number, block in enumerate(model.blocks[:5]):
            pathways = block(pathways)
            if number:
                # what pytorchvideo joins to the slow features belongs to the next stage here
                slow_channels = ours.slow.stages[number - 1].blocks[0].conv3.conv.kernel.shape[-1]
                result[f"slow.layer{number - 1}"] = _channels_last(pathways[0][:, :slow_channels])
                result[f"fast.layer{number - 1}"] = _channels_last(pathways[1])
        return result

    return run


def _torchvision(state_dict: Mapping[str, Any], ours: Any) -> Run:
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

    return run


BUILDERS: Mapping[tuple[str, str], Builder] = {
    ("vit", "huggingface"): _hugging_face,
    ("slowfast", "pytorchvideo"): _pytorchvideo,
    ("video_swin", "torchvision"): _torchvision,
}
