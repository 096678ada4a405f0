"""Whole key lists with shapes, as the original sources build their networks: every key has its place, and back."""

import json
from collections.abc import Iterator

import numpy as np
import pytest

from checkpoints_convert.convert import export, recognise
from checkpoints_convert.networks import Network, open_network
from checkpoints_convert.rules import plan
from tests.test_convert import ROOT

Shapes = dict[str, tuple[int, ...]]


def affine(name: str, *shape: int, bias: bool = True) -> Shapes:
    """A layer's weight, and its bias of the first axis."""
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def batch_norm(name: str, channels: int) -> Shapes:
    statistics = {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)}
    return affine(name, channels) | statistics | {f"{name}.num_batches_tracked": ()}


def pyslowfast_r50(kernel: int) -> Shapes:
    """video_model_builder.py: SlowFast with ALPHA 4, BETA_INV 8, FUSION_CONV_CHANNEL_RATIO 2, the given kernel."""
    shapes: Shapes = {}
    widths, times = (64, 8), (((1,), (1,), (3,), (3,)), ((3,), (3,), (3,), (3,)))
    for path, (width, frames) in enumerate(zip(widths, (1, 5), strict=True)):
        shapes |= affine(f"s1.pathway{path}_stem.conv", width, 3, frames, 7, 7, bias=False)
        shapes |= batch_norm(f"s1.pathway{path}_stem.bn", width)
    incoming = [8, 32, 64, 128]  # of the fast pathway, behind s1 to s4
    for number, channels in enumerate(incoming):
        shapes |= affine(f"s{number + 1}_fuse.conv_f2s", 2 * channels, channels, kernel, 1, 1, bias=False)
        shapes |= batch_norm(f"s{number + 1}_fuse.bn", 2 * channels)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for path, width in enumerate(widths):
            inner, out = width * 2**stage, 4 * width * 2**stage
            entering = width if stage == 0 else out // 2
            entering += 2 * incoming[stage] if path == 0 else 0
            for block in range(blocks):
                name = f"s{stage + 2}.pathway{path}_res{block}"
                given = entering if block == 0 else out
                if block == 0:
                    shapes |= affine(f"{name}.branch1", out, given, 1, 1, 1, bias=False)
                    shapes |= batch_norm(f"{name}.branch1_bn", out)
                shapes |= affine(f"{name}.branch2.a", inner, given, *times[path][stage], 1, 1, bias=False)
                shapes |= affine(f"{name}.branch2.b", inner, inner, 1, 3, 3, bias=False)
                shapes |= affine(f"{name}.branch2.c", out, inner, 1, 1, 1, bias=False)
                for letter, channels in (("a", inner), ("b", inner), ("c", out)):
                    shapes |= batch_norm(f"{name}.branch2.{letter}_bn", channels)
    return shapes | affine("head.projection", 400, 2304)


def torchvision_swin3d_t() -> Shapes:
    """models/video/swin_transformer.py and models/swin_transformer.py: features alternate blocks and merging."""
    shapes = affine("patch_embed.proj", 96, 3, 2, 4, 4) | affine("patch_embed.norm", 96)
    for stage, (blocks, heads) in enumerate(zip((2, 2, 6, 2), (3, 6, 12, 24), strict=True)):
        dim = 96 * 2**stage
        for block in range(blocks):
            name = f"features.{2 * stage}.{block}"
            shapes |= affine(f"{name}.norm1", dim) | affine(f"{name}.norm2", dim)
            shapes |= affine(f"{name}.attn.qkv", 3 * dim, dim) | affine(f"{name}.attn.proj", dim, dim)
            shapes[f"{name}.attn.relative_position_bias_table"] = (15 * 13 * 13, heads)
            shapes[f"{name}.attn.relative_position_index"] = (8 * 7 * 7, 8 * 7 * 7)
            shapes |= affine(f"{name}.mlp.0", 4 * dim, dim) | affine(f"{name}.mlp.3", dim, 4 * dim)
        if stage < 3:
            shapes |= affine(f"features.{2 * stage + 1}.reduction", 2 * dim, 4 * dim, bias=False)
            shapes |= affine(f"features.{2 * stage + 1}.norm", 4 * dim)
    return shapes | affine("norm", 768) | affine("head", 400, 768)


def videomae_blocks(dim: int, depth: int, prefix: str = "") -> Iterator[Shapes]:
    for block in range(depth):
        name = f"{prefix}blocks.{block}"
        yield affine(f"{name}.norm1", dim) | affine(f"{name}.norm2", dim)
        yield affine(f"{name}.attn.qkv", 3 * dim, dim, bias=False) | affine(f"{name}.attn.proj", dim, dim)
        yield {f"{name}.attn.q_bias": (dim,), f"{name}.attn.v_bias": (dim,)}
        yield affine(f"{name}.mlp.fc1", 4 * dim, dim) | affine(f"{name}.mlp.fc2", dim, 4 * dim)


def merged(*parts: Shapes) -> Shapes:
    return {key: shape for part in parts for key, shape in part.items()}


def videomae_s_finetuned() -> Shapes:
    """modeling_finetune.py: VisionTransformer with use_mean_pooling, whose table of positions is no parameter."""
    patches = affine("patch_embed.proj", 384, 3, 2, 16, 16)
    return merged(patches, *videomae_blocks(384, 12), affine("fc_norm", 384), affine("head", 400, 384))


def videomae_s_pretrained() -> Shapes:
    """modeling_pretrain.py: PretrainVisionTransformer, a decoder of 192 channels and 4 blocks."""
    return merged(
        affine("encoder.patch_embed.proj", 384, 3, 2, 16, 16),
        *videomae_blocks(384, 12, "encoder."),
        affine("encoder.norm", 384),
        *videomae_blocks(192, 4, "decoder."),
        affine("decoder.norm", 192),
        affine("decoder.head", 1536, 192),
        affine("encoder_to_decoder", 192, 384, bias=False),
        {"mask_token": (1, 1, 192)},
    )


@pytest.mark.parametrize(
    ("shapes", "name", "options", "dialect", "left_out"),
    [
        (pyslowfast_r50(7), "slowfast_r50", {}, "pyslowfast", ("head.",)),
        (pyslowfast_r50(5), "slowfast_r50", {"fusion_kernel": 5}, "pyslowfast", ("head.",)),
        (torchvision_swin3d_t(), "video_swin_tiny", {}, "torchvision", ("head.",)),
        (videomae_s_finetuned(), "vit_small", {"final_norm": "pooled"}, "videomae", ("head.",)),
        (
            videomae_s_pretrained(),
            "vit_small",
            {"final_norm": "tokens"},
            "videomae_pretrain",
            ("decoder.", "encoder_to_decoder.", "mask_token"),
        ),
    ],
    ids=["pyslowfast 8x8", "pyslowfast 4x16", "torchvision", "VideoMAE fine-tuned", "VideoMAE pre-trained"],
)
def test_every_key_of_an_original_source_has_its_place_and_is_written_back(shapes, name, options, dialect, left_out):
    network = Network(name, {"backbone": {"name": name, **options}}, whole=False)
    spoken = recognise(shapes, network)
    assert spoken.dialect.name == dialect
    network = network.with_options(spoken.dialect.options)
    report = plan(shapes, spoken.rules.for_network(network.backbone), network.shapes).report
    assert {**report.unmapped, **report.wrong_shape} == {}
    assert report.unfilled.keys() <= spoken.dialect.computed.keys(), str(report)
    params = {path: np.zeros(shape, np.float16) for path, shape in network.shapes.items()}
    back = {key: value.shape for key, value in export(network, params, dialect).items()}
    assert back == {key: shape for key, shape in shapes.items() if not key.startswith(left_out)}


def test_a_detector_is_written_with_exactly_the_published_keys(parity_dir):
    """Normaliser and indices with them, so that a strict load takes the file."""
    file = parity_dir / "optim" / "re2tal__e2e_anet_re2tal_actionformer_swin_tiny.state_dict_keys.json"
    listed = {
        key: (tuple(shape), dtype.removeprefix("torch."))
        for key, (shape, dtype) in json.loads(file.read_text()).items()
    }
    network = open_network(str(ROOT / "configs" / "anet.py"))
    params = {path: np.zeros(shape, np.float32) for path, shape in network.shapes.items()}
    written = export(network, params, "re2tal")
    assert {key: (value.shape, str(value.dtype)) for key, value in written.items()} == listed
    assert written["rpn_head.loss_normalizer"] == 200  # that of the recipe for ActivityNet
