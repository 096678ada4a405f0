"""VideoMAE's vision transformer: sizes of the published encoders, clips, positions, drop path, precision, gradients.

Outputs and gradients of the published implementation are replayed by `tests/parity/vit.py`.
"""

import functools
import importlib
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert.rules import fill, flatten
from re2tal_jax.backbones.positions import bicubic_weights, resize_positions, sinusoidal_positions
from re2tal_jax.backbones.vit import VARIANTS, VisionTransformer
from re2tal_jax.backbones.vit_block import Attention
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.experiment import check_shapes, draw_blueprint
from re2tal_jax.reversible import Wiring, rewire
from re2tal_jax.runs import Run, find_runs
from re2tal_jax.settings import read_settings
from re2tal_jax.training.sharding import make_mesh

TINY = {"patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2, "num_frames": 4, "image_size": 8}


def tiny(**changes: Any) -> VisionTransformer:
    """A network whose parameters are all drawn, biases and norms too; the table of positions is the fixed one."""
    model = VisionTransformer(**{**TINY, "rngs": nnx.Rngs(0), **changes})
    values = {}
    for path, leaf in flatten(model).items():
        generator = np.random.default_rng(zlib.crc32(path.encode()))  # the same for a path, whatever else there is
        spread = math.prod(leaf.shape[:-1]) ** -0.5 if path.endswith("kernel") else 0.3
        drawn = (spread * generator.normal(size=leaf.shape) + path.endswith("scale")).astype(leaf.dtype)
        values[path] = leaf if path == "pos_embed" else drawn
    return fill(model, values)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def apply(graph: nnx.GraphDef, state: nnx.State, video: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(video)


def run(model: nnx.Module, video: jax.Array) -> jax.Array:
    """Features; compiled once for each structure and shape."""
    return apply(*nnx.split(model), video)


# ---- Size


def count_by_hand(patch: int, dim: int, hidden: int, depth: int) -> int:
    """The encoder alone, from the layers of `modeling_finetune.py` in VideoMAE: no head, no norm after the blocks."""
    patches = 2 * patch * patch * 3 * dim + dim
    attention = (3 * dim * dim + 2 * dim) + (dim * dim + dim)  # queries, keys, values: keys have no bias; projection
    mlp = (dim * hidden + hidden) + (hidden * dim + dim)
    norms = 2 * (2 * dim)
    return patches + depth * (attention + mlp + norms)


def encoder_size(name: str) -> int:
    """What our registered network has, without its table of positions, which is a constant."""
    model = nnx.eval_shape(lambda: VARIANTS[name](rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for path, leaf in flatten(model).items() if path != "pos_embed")


SIZES = {  # patch, channels, hidden channels, depth, heads: VideoMAE's and VideoMAE V2's modeling_finetune.py
    "vit_small": (16, 384, 1536, 12, 6),
    "vit_base": (16, 768, 3072, 12, 12),
    "vit_large": (16, 1024, 4096, 24, 16),
    "vit_huge": (16, 1280, 5120, 32, 16),
    "vit_giant": (14, 1408, 6144, 40, 16),
}


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("vit_small", 21_879_168),
        ("vit_base", 86_225_664),
        ("vit_large", 303_858_688),
        ("vit_huge", 631_604_480),
        ("vit_giant", 1_011_607_936),
    ],
)
def test_parameter_counts_are_those_of_the_published_encoders(name: str, encoder: int):
    patch, dim, hidden, depth, heads = SIZES[name]
    model = nnx.eval_shape(lambda: VARIANTS[name](rngs=nnx.Rngs(0)))
    shapes = {path: leaf.shape for path, leaf in flatten(model).items()}
    positions = shapes.pop("pos_embed")
    assert positions == (8 * (224 // patch) ** 2, dim)  # 16 frames of 224 x 224; a constant, which files may leave out
    assert sum(map(math.prod, shapes.values())) == count_by_hand(patch, dim, hidden, depth) == encoder
    assert {block.attn.num_heads for block in model.blocks} == {heads}


@pytest.mark.parametrize(
    ("name", "millions", "digits"),
    [  # mmaction2's model zoo; Hugging Face's videomae-base-finetuned-kinetics
        ("vit_small", 22, 0),
        ("vit_base", 87, 0),
        ("vit_base", 86.5, 1),
    ],
)
def test_classifiers_of_400_classes_have_the_published_size(name: str, millions: float, digits: int):
    patch, dim, hidden, depth, _ = SIZES[name]
    assert encoder_size(name) == count_by_hand(patch, dim, hidden, depth)
    classifier = encoder_size(name) + 2 * dim + 400 * (dim + 1)
    assert round(classifier / 1e6, digits) == millions


@pytest.mark.torch
@pytest.mark.parametrize("name", SIZES)
def test_hugging_face_builds_encoders_of_the_same_size(name: str):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    patch, dim, hidden, depth, heads = SIZES[name]
    config = transformers.VideoMAEConfig(
        image_size=patch,  # its table of positions, slow to compute, is no parameter
        patch_size=patch,
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=hidden,
    )
    with torch.device("meta"):
        theirs = transformers.VideoMAEModel(config)
    assert sum(p.numel() for p in theirs.parameters()) == encoder_size(name)


def test_sizes_that_make_no_network_are_refused():
    for changes, text in [
        ({"num_heads": 3}, "heads must divide"),
        ({"depth": 0}, "at least one block"),
        ({"num_frames": 5}, "multiples of tubelet_size = 2"),
        ({"image_size": 3}, "at least one patch"),
        ({"patch_size": 0}, "patch_size = 0: allowed is 1 or more"),
        ({"mlp_ratio": 0.1}, "no hidden channels"),
        ({"norm_epsilon": 0.0}, "norm_epsilon = 0.0: allowed is a positive"),
        ({"drop_path_rate": 1.0}, "0 <= rate < 1"),
        ({"final_norm": "token"}, "final_norm = 'token'. Did you mean 'tokens'"),
        ({"dtype": "int32"}, "dtype = 'int32': allowed are float32"),
    ]:
        with pytest.raises(ConfigError, match=text):
            VisionTransformer(**{**TINY, "rngs": nnx.Rngs(0), **changes})


def test_a_video_that_does_not_fit_is_refused():
    model = tiny()
    for shape, text in [
        ((1, 3, 4, 8, 8), r"\(1, 3, 4, 8, 8\).*expected \(batch, frames, height, width, 3\)"),
        ((1, 6, 8, 8, 3), "6 frames .*multiples of num_frames = 4, the nearest are 4 and 8"),
        ((1, 2, 8, 8, 3), "2 frames .*the nearest are 4"),
        ((1, 0, 8, 8, 3), "0 frames .*the nearest are 4"),
        ((1, 4, 8, 3, 3), "8 x 3 pixels is smaller than a patch: at least 4 x 4"),
    ]:
        with pytest.raises(DataError, match=text):
            model(jnp.zeros(shape))


@pytest.mark.parametrize("name", ["anet_videomae_b", "thumos_videomae_b"])
def test_a_recipe_is_ready_for_its_data_and_freezes_the_positions_alone(name: str):
    settings = read_settings(importlib.import_module(f"configs.{name}").get_config().to_dict())
    blueprint = draw_blueprint(settings, make_mesh(settings.mesh, jax.devices()[:1]))
    check_shapes(settings, blueprint)
    rows = {row.path: row for row in blueprint.optimizer.table() if row.path.startswith("backbone.")}
    assert sum(math.prod(row.shape) for row in rows.values()) == 86_225_664 + 8 * 14 * 14 * 768
    assert {path for path, row in rows.items() if row.frozen} == {"backbone.pos_embed"}


# ---- Attention and clips


def test_queries_and_values_have_a_bias_and_keys_have_none():
    branch = Attention(2, 1, True, 1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    branch.qkv.kernel[...] = jnp.zeros((2, 6))
    branch.proj.kernel[...] = jnp.eye(2)
    branch.q_bias[...], branch.v_bias[...] = jnp.array([7.0, 9.0]), jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(branch(normal(0, 1, 1, 3, 2)), np.broadcast_to([1, 2], (1, 1, 3, 2)))
    assert "q_bias" not in flatten(Attention(2, 1, False, 1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0)))


def test_clips_do_not_see_each_other_and_stay_in_order():
    model, video = tiny(), normal(1, 2, 12, 8, 8, 3)
    features = run(model, video)
    assert features.shape == (2, 6, 2, 2, 8)
    alone = jnp.concatenate([run(model, video[:, i : i + 4]) for i in (0, 4, 8)], 1)
    np.testing.assert_allclose(features, alone, rtol=1e-5, atol=1e-5)
    changed = run(model, video.at[:, 4:8].multiply(-1))
    np.testing.assert_array_equal(changed[:, [0, 1, 4, 5]], features[:, [0, 1, 4, 5]])
    assert jnp.abs(changed[:, 2:4] - features[:, 2:4]).max() > 1e-2


def test_every_token_of_a_clip_sees_every_other():
    model, video = tiny(depth=1), normal(1, 1, 4, 8, 8, 3)
    last = run(model, video.at[0, 3, 7, 7].add(5.0)) - run(model, video)
    assert (jnp.abs(last).max(-1) > 1e-4).all()


def test_pixels_beyond_the_last_whole_patch_are_not_seen():
    model, video = tiny(), normal(1, 1, 4, 11, 10, 3)
    np.testing.assert_array_equal(run(model, video), run(model, video[:, :, :8, :8]))


def test_blocks_are_scanned_as_one_repeating_pair():
    assert find_runs(tiny(depth=5, drop_path_rate=0.3)._branches()) == [Run(start=0, period=2, repeats=5)]


# ---- Positions


def test_sinusoidal_positions_are_sines_and_cosines():
    table = sinusoidal_positions(3, 4)
    assert table.dtype == np.float32
    rows = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(3)]
    np.testing.assert_allclose(table, rows, rtol=1e-6)


def test_bicubic_weights_are_those_worked_out_by_hand():
    np.testing.assert_array_equal(bicubic_weights(3, 3), np.eye(3))
    # Halving: centres lie between two samples; the kernel is 0.59375 at 1/2 and -0.09375 at 3/2. Ends are repeated.
    near, far = 0.59375, -0.09375
    np.testing.assert_allclose(
        bicubic_weights(4, 2).T, [[near + far, near, far, 0], [0, far, near, near + far]], atol=1e-15
    )
    # Doubling: the first centre lies a quarter before the first sample, the second a quarter after it.
    at = {1: 225 / 256, 3: 67 / 256, 5: -27 / 256, 7: -9 / 256}  # the kernel, by distance in quarters
    doubled = bicubic_weights(3, 6)
    np.testing.assert_allclose(doubled[:, 0], [at[7] + at[3] + at[1], at[5], 0], atol=1e-15)
    np.testing.assert_allclose(doubled[:, 1], [at[5] + at[1], at[3], at[7]], atol=1e-15)
    np.testing.assert_allclose(doubled[::-1, ::-1], doubled, atol=1e-15)


@pytest.mark.parametrize(("length", "new_length"), [(14, 10), (3, 7), (1, 5), (6, 1)])
def test_bicubic_weights_of_a_new_sample_add_up_to_one(length: int, new_length: int):
    np.testing.assert_allclose(bicubic_weights(length, new_length).sum(0), 1, atol=1e-14)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("size", "new_size"),
    [((14, 14), (10, 10)), ((14, 14), (16, 24)), ((2, 2), (3, 4)), ((5, 3), (2, 7)), ((16, 16), (1, 5))],
)
def test_positions_are_resized_as_pytorch_does(size: tuple[int, int], new_size: tuple[int, int]):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3))
    channels_first = torch.from_numpy(table).permute(0, 3, 1, 2)  # float64: in float32 its sample centres are rounded
    theirs = torch.nn.functional.interpolate(channels_first, size=new_size, mode="bicubic", align_corners=False)
    ours = resize_positions(jnp.asarray(table, jnp.float32), new_size)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-6)


def test_positions_are_resized_in_height_and_width_and_kept_in_time():
    model = tiny(image_size=16)  # 2 x 4 x 4 positions
    table = model.pos_embed[...]
    np.testing.assert_array_equal(model.positions(4, 4), table)
    rows, columns = bicubic_weights(4, 2), bicubic_weights(4, 3)
    by_hand = np.einsum("tijd,ih,jw->thwd", np.asarray(table).reshape(2, 4, 4, 8), rows, columns)
    np.testing.assert_allclose(model.positions(2, 3), by_hand.reshape(12, 8), atol=1e-6)


def test_positions_are_never_learned():
    graph, state = nnx.split(tiny(depth=1))
    video = normal(1, 1, 4, 8, 12, 3)
    gradients = jax.jit(jax.grad(lambda state: nnx.merge(graph, state)(video).sum()))(state)
    assert not jnp.any(gradients["pos_embed"][...])
    assert jnp.any(gradients["patch_embed"]["proj"]["kernel"][...])


# ---- The final norm


def test_the_final_norm_is_of_tokens_or_of_their_mean():
    video = normal(1, 2, 8, 8, 8, 3)
    none, tokens, pooled = (tiny(final_norm=norm) for norm in ("none", "tokens", "pooled"))
    plain = run(none, video)
    np.testing.assert_allclose(run(tokens, video), tokens.norm(plain), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run(pooled, video), plain)
    np.testing.assert_allclose(pooled.pooled(video), pooled.norm(plain.mean((1, 2, 3))), rtol=1e-4, atol=1e-5)
    assert "norm.scale" not in flatten(none)
    with pytest.raises(ConfigError, match="final_norm = 'tokens' has no norm of the mean"):
        tokens.pooled(video)


# ---- Drop path, precision, gradients


def test_drop_path_rates_grow_with_depth():
    np.testing.assert_allclose(tiny(drop_path_rate=0.2).drop_path_rates(), [0, 0.1, 0.2])
    assert tiny(depth=1, drop_path_rate=0.2).drop_path_rates() == [0]


def test_a_branch_is_dropped_for_a_whole_video():
    model, clip = tiny(drop_path_rate=0.5), normal(1, 1, 4, 8, 8, 3)
    video = jnp.tile(clip, (8, 2, 1, 1, 1))  # eight times one video of two times one clip
    features = jax.jit(lambda key: model(video, key=key))(jax.random.key(0))
    np.testing.assert_array_equal(features[:, :2], features[:, 2:])
    assert jnp.abs(features[1:] - features[0]).max() > 1e-2


def test_bfloat16_features_are_float32_and_near_those_of_float32():
    video = normal(1, 2, 8, 8, 12, 3)
    exact, rounded = (run(tiny(dtype=dtype, rewired=False), video) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 1e-5 < error < 3e-2


def test_rewired_gradient_equals_plain_autodiff_in_float64():
    with jax.enable_x64(True):
        graph, state = nnx.split(tiny(drop_path_rate=0.3, dtype=jnp.float64))
        video = normal(1, 3, 8, 8, 12, 3).astype(jnp.float64)

        def gradients(reversible: bool):
            def loss(state, video):
                network = rewire(nnx.merge(graph, state), Wiring(alpha=0.0, beta=1.0, reversible=reversible))
                return (network(video, key=jax.random.key(7)) ** 3).sum()

            return jax.jit(jax.grad(loss, argnums=(0, 1)))(state, video)

        pairs = list(zip(jax.tree.leaves(gradients(True)), jax.tree.leaves(gradients(False)), strict=True))
        assert sum(bool(np.any(plain)) for _, plain in pairs) == len(pairs) - 1  # all but the table of positions
        for ours, plain in pairs:
            assert np.abs(ours - plain).max() <= 1e-10 * np.abs(plain).max()
