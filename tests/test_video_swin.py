"""Video Swin: geometry that can be checked by hand, sizes of the published networks, drop path, precision, gradients.

Outputs and gradients of the published implementation are replayed by `tests/parity/swin.py`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert.dialects.video_swin import MMACTION2, RE2TAL
from checkpoints_convert.rules import fill, flatten
from re2tal_jax.backbones import build_backbone
from re2tal_jax.backbones.layers import DropPath, LayerNorm, Mlp, gelu, pad_to_multiple
from re2tal_jax.backbones.swin_block import AttentionBranch, Grid, WindowAttention
from re2tal_jax.backbones.video_swin import VARIANTS, VideoSwin
from re2tal_jax.backbones.windows import clamp_window, relative_position_index, shift_regions
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.reversible import Wiring, rewire
from re2tal_jax.runs import Run, find_runs
from tests.parity.replay import convert_state_dict

TINY = {"embed_dim": 4, "depths": (2, 1), "num_heads": (1, 2), "window_size": (2, 3, 3), "mlp_ratio": 2.0}


def tiny(**changes) -> VideoSwin:
    """A network with two stages and values of every parameter drawn, biases and norms too."""
    model = nnx.eval_shape(lambda: VideoSwin(**{**TINY, "rngs": nnx.Rngs(0), **changes}))
    generator = np.random.default_rng(0)
    values = {}
    for path, leaf in flatten(model).items():
        spread = leaf.shape[0] ** -0.5 if path.endswith("kernel") else 0.3
        values[path] = spread * generator.normal(size=leaf.shape) + path.endswith("scale")
    return fill(model, values)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---- Size


def count_by_hand(embed: int, depths: tuple[int, ...], heads: tuple[int, ...]) -> int:
    """Swin-T, S, B, L with windows (8, 7, 7), patches (2, 4, 4) and MLP ratio 4, without a classification head."""
    total = 2 * 4 * 4 * 3 * embed + embed + 2 * embed  # patches to tokens, norm
    for stage, (depth, h) in enumerate(zip(depths, heads, strict=True)):
        c = embed * 2**stage
        attention = 2 * c + (3 * c * c + 3 * c) + (c * c + c) + 15 * 13 * 13 * h
        mlp = 2 * c + (4 * c * c + 4 * c) + (4 * c * c + c)
        total += depth * (attention + mlp)
        if stage < len(depths) - 1:
            total += 2 * 4 * c + 4 * c * 2 * c
    return total + 2 * c


@pytest.mark.parametrize(
    ("name", "parameters", "with_head"),
    [  # 400 classes: the published 28.2, 49.8, 88.0 and 197.0 million
        ("video_swin_tiny", 27_850_470, 28.2),
        ("video_swin_small", 49_509_078, 49.8),
        ("video_swin_base", 87_638_984, 88.0),
        ("video_swin_large", 196_339_116, 197.0),
    ],
)
def test_parameter_counts_are_those_of_the_published_networks(name: str, parameters: int, with_head: float):
    model = nnx.eval_shape(lambda: VARIANTS[name](rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in flatten(model).values()]
    assert sum(sizes) == parameters
    arch = VARIANTS[name].keywords
    assert count_by_hand(arch["embed_dim"], model.depths, arch["num_heads"]) == parameters
    assert round((parameters + 400 * (model.out_channels + 1)) / 1e6, 1) == with_head


def test_every_key_of_the_published_tiny_backbone_has_its_place(parity_dir):
    file = parity_dir / "optim" / "re2tal__e2e_anet_re2tal_actionformer_swin_tiny.state_dict_keys.json"
    prefix = "backbone.model.backbone."
    keys = {k.removeprefix(prefix): v for k, v in json.loads(file.read_text()).items() if k.startswith(prefix)}
    source = {key: np.broadcast_to(np.float32(0), shape) for key, (shape, _) in keys.items()}
    model = nnx.eval_shape(lambda: build_backbone("video_swin_tiny"))
    targets = {path: leaf.shape for path, leaf in flatten(model).items()}
    assert set(convert_state_dict(source, RE2TAL.names, targets)) == set(targets)


def test_plain_and_rewired_checkpoints_have_the_same_places():
    (plain,) = MMACTION2.names.targets_of("layers.2.blocks.5.norm1.weight")
    (rewired,) = RE2TAL.names.targets_of("layers.2.blocks.5.inv_block.Fm.norm1.weight")
    assert plain == rewired
    assert plain.path == "stages.2.blocks.5.attn.norm.scale"


def test_sizes_that_make_no_network_are_refused():
    for changes, text in [
        ({"num_heads": (3, 2)}, "heads must divide"),
        ({"num_heads": (1,)}, "has 1 stages"),
        ({"depths": (2, 0)}, "at least one block"),
        ({"window_size": (2, 0, 3)}, "positive integers"),
        ({"drop_path_rate": 1.0}, "0 <= rate < 1"),
        ({"mlp_ratio": 0.1}, "no hidden channel"),
        ({"dtype": "bfloat17"}, "dtype = 'bfloat17': allowed are float32"),
        ({"dtype": "int32"}, "dtype = 'int32': allowed are float32"),
    ]:
        with pytest.raises(ConfigError, match=text):
            tiny(**changes)


def test_a_video_of_another_form_is_refused():
    with pytest.raises(DataError, match=r"\(1, 3, 4, 8, 8\).*expected \(batch, frames, height, width, 3\)"):
        tiny()(jnp.zeros((1, 3, 4, 8, 8)))


# ---- Geometry


def test_a_window_is_clamped_to_the_input_and_not_shifted_there():
    assert clamp_window((8, 7, 14), (8, 7, 7), True) == ((8, 7, 7), (0, 0, 3))
    assert clamp_window((9, 3, 5), (8, 7, 7), True) == ((8, 3, 5), (4, 0, 0))
    assert clamp_window((9, 3, 5), (8, 7, 7), False) == ((8, 3, 5), (0, 0, 0))


def test_relative_positions_count_from_the_key_to_the_query():
    np.testing.assert_array_equal(relative_position_index((1, 1, 3)), [[2, 1, 0], [3, 2, 1], [4, 3, 2]])
    # (2, 1, 2): rows of the table are 3 offsets in time x 3 in width
    np.testing.assert_array_equal(
        relative_position_index((2, 1, 2)), [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    )


def everywhere(*size: int) -> list[jax.Array]:
    return [jnp.arange(length) for length in size]


def test_a_shift_marks_what_came_from_the_other_end():
    np.testing.assert_array_equal(
        shift_regions(everywhere(1, 1, 6), (1, 1, 6), (1, 1, 3), (0, 0, 1)), [[0, 0, 0], [0, 0, 4]]
    )
    np.testing.assert_array_equal(
        shift_regions(everywhere(1, 4, 4), (1, 4, 4), (1, 2, 2), (0, 1, 1)),
        [[0, 0, 0, 0], [0, 4, 0, 4], [0, 0, 2, 2], [0, 4, 2, 6]],
    )


def average(window: tuple[int, int, int], shifted: bool) -> WindowAttention:
    """Attention with equal weights: each token becomes the mean of the normalised tokens it attends to."""
    branch = WindowAttention(2, 1, window, shifted, True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    branch.relative_position_bias[...] = jnp.zeros_like(branch.relative_position_bias[...])
    branch.qkv.kernel[...] = jnp.eye(2, 6, 4)  # values alone
    branch.proj.kernel[...] = jnp.eye(2)
    return branch


def attended(branch: WindowAttention, *size: int) -> np.ndarray:
    """Return the (N, N) weights of an `average` branch: how much of input token k is in output token q."""
    tokens = int(np.prod(size))
    x = jnp.asarray(normal(0, tokens, 2), jnp.float32)
    signs = jnp.sign(x[:, 0] - x[:, 1])  # two channels: the norm leaves +1 and -1
    window, _ = clamp_window(size, branch.window_size, False)
    padded = tuple(-(-n // w) * w for n, w in zip(size, window, strict=True))
    on_grid = AttentionBranch(branch, Grid(size, padded, workspace=1))

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        y = on_grid(pad_to_multiple(x.reshape(1, *size, 2), window))
        return y[:, : size[0], : size[1], : size[2]].reshape(tokens, 2)[:, 0]

    columns = [(run(x) - run(x.at[k].multiply(-1))) / (2 * signs[k]) for k in range(tokens)]
    return np.round(np.stack(columns, -1), 3) + 0.0  # no -0


def test_tokens_attend_inside_their_window():
    np.testing.assert_array_equal(
        attended(average((1, 1, 2), False), 1, 1, 4),
        [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]],
    )


def test_shifted_windows_join_neighbours_and_part_at_the_border():
    np.testing.assert_array_equal(
        attended(average((1, 1, 2), True), 1, 1, 4),
        [[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]],
    )


def test_padding_takes_part_in_attention():
    half = 0.5  # the other half goes to the padded token, whose value is the bias, here 0
    np.testing.assert_array_equal(
        attended(average((1, 1, 2), False), 1, 1, 3), [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, half]]
    )


def test_zeros_fill_up_to_the_multiple_at_the_end():
    padded = pad_to_multiple(jnp.ones((1, 3, 4, 5, 2)), (2, 4, 4))
    assert padded.shape == (1, 4, 4, 8, 2)
    assert padded.sum() == 3 * 4 * 5 * 2
    assert padded[:, :3, :, :5].all()


def test_odd_sizes_are_rounded_up():
    model = tiny()
    features, named = jax.eval_shape(model.intermediates, jax.ShapeDtypeStruct((2, 5, 18, 30, 3), jnp.float32))
    assert named["patch_embed"].shape == (2, 3, 5, 8, 4)
    assert named["downsample0"].shape == features.shape == (2, 3, 3, 4, 8)


def test_branches_of_a_stage_repeat_every_four():
    model = tiny(depths=(6, 1))
    branches = [DropPath(f, jnp.float32(i)) for i, b in enumerate(model.stages[0].blocks) for f in (b.attn, b.mlp)]
    assert find_runs(branches) == [Run(start=0, period=4, repeats=3)]


# ---- Drop path


class Identity:
    def __call__(self, x, *, key, aux):
        return x


def dropped(rate: float, key: jax.Array | None, samples: int = 20_000) -> np.ndarray:
    return np.asarray(DropPath(Identity(), jnp.float32(rate))(jnp.ones((samples, 2, 3)), key=key, aux=None))


def test_drop_path_keeps_the_expectation():
    y = dropped(0.3, jax.random.key(0))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-6)
    deviation = np.sqrt(0.3 / 0.7 / len(y))  # of the mean of samples that are 0 or 1 / 0.7
    assert abs(y[:, 0, 0].mean() - 1) < 4 * deviation


def test_drop_path_drops_whole_samples():
    y = dropped(0.5, jax.random.key(0))
    np.testing.assert_array_equal(y.min((1, 2)), y.max((1, 2)))


def test_drop_path_is_a_function_of_its_key():
    one, again, other = (dropped(0.5, jax.random.key(seed), 64) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_drop_path_without_key_or_rate_is_the_branch():
    assert (dropped(0.9, None) == 1).all()
    assert (dropped(0.0, jax.random.key(0)) == 1).all()


def test_drop_path_rates_grow_with_depth():
    rates = tiny(depths=(2, 3), drop_path_rate=0.2).drop_path_rates()
    np.testing.assert_allclose(np.concatenate(rates), [0, 0.05, 0.1, 0.15, 0.2], rtol=1e-6)
    assert [len(r) for r in rates] == [2, 3]


# ---- Precision and gradients


def test_gelu_is_the_exact_one():
    np.testing.assert_allclose(gelu(jnp.float32(1.0)), 0.8413447, rtol=1e-6)  # Phi(1); the tanh form gives 0.841192


def test_bfloat16_branches_return_bfloat16_from_float32_parameters():
    model = tiny(dtype=jnp.bfloat16)
    block = model.stages[0].blocks[1]
    x = jax.ShapeDtypeStruct((1, 4, 6, 6, 4), jnp.float32)
    attention = AttentionBranch(block.attn, Grid((3, 5, 5), (4, 6, 6), workspace=1))
    for branch in (attention, block.mlp, DropPath(block.mlp, jnp.float32(0.1))):
        assert jax.eval_shape(lambda x, f=branch: f(x, key=jax.random.key(0), aux=None), x).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in flatten(model).values()} == {jnp.dtype(jnp.float32)}


def test_bfloat16_features_are_float32_and_near_those_of_float32():
    video = jnp.asarray(normal(1, 1, 5, 18, 22, 3), jnp.float32)
    exact, rounded = (jax.jit(tiny(dtype=dtype, rewired=False))(video) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 1e-5 < error < 3e-2


def test_the_norm_of_a_state_far_from_zero_keeps_its_digits_in_bfloat16():
    norm = LayerNorm(2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = norm(jnp.array([1000.5, 1001.0], jnp.float32))  # one number in bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), [-1, 1])


def test_rewired_gradient_equals_plain_autodiff_in_float64():
    with jax.enable_x64(True):
        graph, state = nnx.split(tiny(drop_path_rate=0.3, dtype=jnp.float64))
        video = jnp.asarray(normal(1, 3, 5, 18, 22, 3))

        def gradients(reversible: bool):
            def loss(state, video):
                network = rewire(nnx.merge(graph, state), Wiring(alpha=0.0, beta=1.0, reversible=reversible))
                return (network(video, key=jax.random.key(7)) ** 3).sum()

            return jax.jit(jax.grad(loss, argnums=(0, 1)))(state, video)

        for ours, plain in zip(jax.tree.leaves(gradients(True)), jax.tree.leaves(gradients(False)), strict=True):
            assert ours.dtype == jnp.float64
            assert np.abs(ours - plain).max() <= 1e-10 * np.abs(plain).max()


def test_each_branch_draws_a_mask_of_its_own_from_the_key():
    model = tiny(depths=(1, 3), drop_path_rate=0.5)
    video = jnp.asarray(normal(1, 4, 4, 8, 8, 3), jnp.float32)
    run = jax.jit(lambda key: model(video, key=key))
    one, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2


def test_mlp_maps_each_token_alone():
    branch = Mlp(4, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(0, 2, 3, 4), jnp.float32)
    np.testing.assert_allclose(branch(x)[1, 2], branch(x[1, 2]), rtol=1e-5, atol=1e-6)
