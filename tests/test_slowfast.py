"""SlowFast and ResNet-3D: convolutions against 3-D ones, sizes of the published networks, ReLUs, precision, gradients.

Outputs and gradients of the published implementation are replayed by `tests/parity/slowfast.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from checkpoints_convert.rules import fill, flatten
from re2tal_jax.backbones import build_backbone
from re2tal_jax.backbones.convolutions import BatchNorm, convolve, max_pool
from re2tal_jax.backbones.resnet3d import ResNet3D
from re2tal_jax.backbones.slowfast import SlowFast
from re2tal_jax.diagnostics import diagnose
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.reversible import PLAIN, REWIRED, Wiring, rewire
from re2tal_jax.runs import Run, find_runs
from tests import quick

TINY: dict[str, Any] = {
    "depths": (3, 2),
    "base_channels": 8,
    "channel_ratio": 4,
    "slow_inflate": (0, 1),
    "fast_inflate": (1, 1),
}


def tiny(*, values: Any = np.float32, bias: float = 0.0, **changes: Any) -> SlowFast:
    """A network of two stages with every parameter drawn, statistics too; biases lie around `bias`."""
    return drawn(nnx.eval_shape(lambda: SlowFast(**{**TINY, "rngs": nnx.Rngs(0), **changes})), values, bias)


def drawn(model: Any, dtype: Any = np.float32, bias: float = 0.0) -> Any:
    generator = np.random.default_rng(0)
    offsets, values = {"scale": 0.6, "bias": bias, "var": 1.5}, {}
    for path, leaf in flatten(model).items():
        fan_in = np.prod(leaf.shape[:-1]) if path.endswith("kernel") else 12
        offset = offsets.get(path.rpartition(".")[2], 0.0)
        value = fan_in**-0.5 * generator.normal(size=leaf.shape)
        values[path] = (np.clip(value, -0.5, 0.5) + offset if offset else value).astype(dtype)
    return fill(model, values)


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.partial(jax.jit, static_argnums=0)
def apply(graph: nnx.GraphDef, state: nnx.State, video: jax.Array) -> Any:
    return nnx.merge(graph, state).intermediates(video)


def run(model: nnx.Module, video: jax.Array) -> Any:
    """Features and intermediates; compiled once for each structure and shape."""
    return apply(*nnx.split(model), video)


# ---- Parts


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((1, 1, 1), (1, 2, 2)),  # a projection
        ((3, 1, 1), (1, 1, 1)),  # an inflated bottleneck
        ((7, 1, 1), (4, 1, 1)),  # a lateral
        ((1, 3, 3), (1, 2, 2)),
        ((1, 7, 7), (1, 2, 2)),  # the slow stem
        ((5, 7, 7), (1, 2, 2)),  # the fast stem
        ((3, 3, 3), (2, 1, 2)),
    ],
)
@pytest.mark.parametrize("size", [(8, 6, 8), (5, 9, 7)], ids=["even", "odd"])
def test_convolution_is_that_in_three_dimensions(kernel, stride, size):
    """Values and both gradients, against the compiler's own 3-D convolution with half a kernel of zeros around."""
    with jax.enable_x64(True):
        x, weights = normal(0, 2, *size, 3, dtype=np.float64), normal(1, *kernel, 3, 4, dtype=np.float64)

        def reference(x, weights):
            padding = [(k // 2, k // 2) for k in kernel]
            layout = ("NDHWC", "DHWIO", "NDHWC")
            return lax.conv_general_dilated(x, weights, stride, padding, dimension_numbers=layout)

        def both(function):
            loss = lambda x, weights: jnp.sum(jnp.sin(function(x, weights)))  # noqa: E731
            return jax.jit(lambda *a: (function(*a), jax.grad(loss, (0, 1))(*a)))(x, weights)

        got, want = both(functools.partial(convolve, stride=stride)), both(reference)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-11), got, want)


def test_pooling_takes_the_largest_of_the_neighbours_of_every_second_position():
    rows = jnp.arange(12, dtype=jnp.float32).reshape(1, 1, 3, 4, 1)  # 0 1 2 3 / 4 5 6 7 / 8 9 10 11
    np.testing.assert_array_equal(max_pool(rows)[0, 0, ..., 0], [[5, 7], [9, 11]])
    np.testing.assert_array_equal(max_pool(-rows)[0, 0, ..., 0], [[0, -1], [-4, -5]])  # the border is no zero


def norm_with(scale: list[float], bias: list[float], mean: list[float], var: list[float], dtype: Any) -> BatchNorm:
    values = {"scale": scale, "bias": bias, "mean": mean, "var": var}
    return fill(BatchNorm(2, dtype=dtype), {name: np.float32(value) for name, value in values.items()})


def test_batch_norm_uses_what_is_stored_and_never_learns_it():
    norm = norm_with([2.0, 1.0], [0.5, 0.0], [1.0, -3.0], [4.0 - 1e-5, 1.0 - 1e-5], jnp.float32)
    x = jnp.float32([[5.0, -2.0], [100.0, 0.0]])  # no statistics of the batch: rows do not meet
    np.testing.assert_allclose(norm(x), [[4.5, 1.0], [99.5, 3.0]], rtol=1e-6)
    gradients = flatten(nnx.grad(lambda norm: jnp.sum(norm(x) ** 2))(norm))
    assert {name: bool(jnp.any(value != 0)) for name, value in gradients.items()} == {
        "scale": True,
        "bias": True,
        "mean": False,
        "var": False,
    }


def test_batch_norm_subtracts_its_mean_in_float32():
    """In bfloat16 a mean of 100.3 would be 100.5."""
    norm = norm_with([1.0, 1.0], [0.0, 0.0], [100.3, 0.0], [1.0, 1.0], jnp.bfloat16)
    got = norm(jnp.asarray([[101.0, 0.0]], jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got[0, 0].astype(jnp.float32), 0.7, rtol=1e-2)


# ---- Size


def convolution(inputs: int, outputs: int, taps: int) -> int:
    """Kernel and norm; stored statistics are not learned and do not count."""
    return inputs * outputs * taps + 2 * outputs


def count_pathway(depths: tuple[int, ...], base: int, inflate: tuple[int, ...], frames: int, lateral: int = 0) -> int:
    """A pathway by table 1 of the paper; with laterals a stage gets 2 / `lateral` more channels than the last gave."""
    total, given = convolution(3, base, frames * 7 * 7), base
    for stage, (depth, inflated) in enumerate(zip(depths, inflate, strict=True)):
        width = base * 2**stage
        inputs = given + (2 * given // lateral if lateral else 0)
        total += convolution(inputs, 4 * width, 1)  # the projection
        for block in range(depth):
            total += convolution(4 * width if block else inputs, width, 3 if inflated else 1)
            total += convolution(width, width, 9) + convolution(width, 4 * width, 1)
        given = 4 * width
    return total


def count_learned(model: nnx.Module) -> int:
    return sum(leaf.size for path, leaf in flatten(model).items() if not path.endswith((".mean", ".var")))


LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@pytest.mark.parametrize(
    ("layers", "parameters", "with_head", "fusion_5"),
    [  # millions with 400 classes: mmaction2's table (8x8x1), and with fusion over 5 frames mmaction2's (4x16x1) and
        # pytorchvideo's, whose laterals have a norm; nobody publishes a SlowFast of 152 layers without non-local blocks
        (50, 33_643_560, 34.6, 34.48),
        (101, 61_990_312, 62.9, 62.83),
        (152, 84_813_864, None, None),
    ],
)
def test_parameter_counts_of_slowfast_are_those_of_the_published_networks(layers, parameters, with_head, fusion_5):
    model = nnx.eval_shape(lambda: build_backbone(f"slowfast_r{layers}"))
    depths = LAYERS[layers]
    slow = count_pathway(depths, 64, (0, 0, 1, 1), 1, lateral=8)
    fast = count_pathway(depths, 8, (1, 1, 1, 1), 5)
    laterals = sum(7 * channels * 2 * channels for channels in (8, 32, 64, 128))
    assert slow + fast + laterals == parameters
    assert count_learned(model) == parameters
    assert model.out_channels == 2304
    if with_head is not None:
        assert round((parameters + 400 * 2305) / 1e6, 1) == with_head
        other = nnx.eval_shape(lambda: build_backbone(f"slowfast_r{layers}", fusion_kernel=5, lateral_norm=True))
        assert round((count_learned(other) + 400 * 2305) / 1e6, 2) == fusion_5


@pytest.mark.parametrize(
    ("layers", "parameters", "with_head"),
    [(50, 31_634_496, 32.45), (101, 59_539_520, 60.36), (152, 81_998_912, None)],  # mmaction2's table
)
def test_parameter_counts_of_the_slow_pathway_alone_are_the_published_ones(layers, parameters, with_head):
    model = nnx.eval_shape(lambda: build_backbone(f"slowonly_r{layers}"))
    assert count_pathway(LAYERS[layers], 64, (0, 0, 1, 1), 1) == parameters
    assert count_learned(model) == parameters
    assert with_head is None or round((parameters + 400 * 2049) / 1e6, 2) == with_head


def test_blocks_of_a_stage_are_scanned():
    model = nnx.eval_shape(lambda: build_backbone("slowfast_r101"))
    for pathway in (model.slow, model.fast):
        chains = [list(stage.blocks)[1:] for stage in pathway.stages]
        assert [find_runs(chain) for chain in chains] == [[Run(0, 1, n)] for n in (2, 3, 22, 2)]


def test_inflated_stages_see_three_frames():
    model = nnx.eval_shape(lambda: build_backbone("slowfast_r50"))
    taps = [
        [{block.conv1.conv.kernel.shape[0] for block in stage.blocks} for stage in pathway.stages]
        for pathway in (model.slow, model.fast)
    ]
    assert taps == [[{1}, {1}, {3}, {3}], [{3}, {3}, {3}, {3}]]


# ---- Structure


def test_slow_pathway_sees_every_fourth_frame_and_the_fast_one_all():
    model, video = tiny(), normal(0, 1, 8, 16, 16, 3)
    (slow, fast), named = run(model, video)
    _, altered = run(model, video.at[:, 5].add(1.0))  # no multiple of 4
    np.testing.assert_array_equal(altered["slow.stem"], named["slow.stem"])
    assert jnp.any(altered["fast.stem"] != named["fast.stem"])
    assert jnp.any(altered["slow.layer0"] != named["slow.layer0"])  # through the lateral
    assert slow.shape == (1, 2, 2, 2, 64)
    assert fast.shape == (1, 8, 2, 2, 16)
    assert model.temporal_stride == (4, 1)
    assert named["lateral1"].shape == (1, 2, 4, 4, 16)


def test_rewired_stage_has_the_relu_inside_the_branch_and_the_ordinary_one_after_the_sum():
    """Stage 0 of the fast pathway by hand from what both share."""
    model, video = tiny(), normal(0, 1, 4, 16, 16, 3)
    blocks = list(model.fast.stages[0].blocks)
    _, rewired = run(model, video)
    _, ordinary = run(rewire(model, PLAIN), video)
    x = rewired["fast.stem"]
    np.testing.assert_array_equal(x, ordinary["fast.stem"])

    start = blocks[0].downsample(x) + jax.nn.relu(blocks[0].residual(x))  # in no chain
    second = start + jax.nn.relu(blocks[1].residual(start))
    third = start + jax.nn.relu(blocks[2].residual(second))
    np.testing.assert_allclose(rewired["fast.layer0"], (second + third) / 2, atol=1e-5)
    assert rewired["fast.layer0"].min() < -0.01

    y = jax.nn.relu(blocks[0].downsample(x) + blocks[0].residual(x))
    for block in blocks[1:]:
        y = jax.nn.relu(y + block.residual(y))
    np.testing.assert_allclose(ordinary["fast.layer0"], y, atol=1e-5)
    assert ordinary["fast.layer0"].min() == 0


def test_alone_the_slow_pathway_keeps_every_frame():
    make = lambda: ResNet3D(depths=(1, 2), base_channels=4, inflate=(0, 1), rngs=nnx.Rngs(0))  # noqa: E731
    model = drawn(nnx.eval_shape(make))
    features, named = run(model, normal(0, 2, 3, 24, 17, 3))
    assert features.shape == (2, 3, 3, 3, 32)
    assert sorted(named) == ["layer0", "layer1", "stem"]
    assert {path.split(".")[0] for path in flatten(model)} == {"stem", "stages"}


def test_laterals_have_a_norm_and_a_relu_on_request():
    video = normal(0, 1, 4, 16, 16, 3)
    without, model = tiny(), tiny(lateral_norm=True)
    added = set(flatten(model)) - set(flatten(without))
    assert added == {f"laterals.{i}.norm.{leaf}" for i in (0, 1) for leaf in ("scale", "bias", "mean", "var")}
    assert run(model, video)[1]["lateral0"].min() == 0
    assert run(without, video)[1]["lateral0"].min() < 0


# ---- Precision and gradients


def test_rewired_gradient_equals_plain_autodiff():
    """Of every parameter and of the video, in float64."""
    with jax.enable_x64(True):
        model = tiny(values=np.float64, bias=0.4, dtype=jnp.float64, lateral_norm=True)  # no channel is dead
        video = normal(0, 1, 4, 16, 16, 3, dtype=np.float64)

        def gradients(wiring):
            graph, state = nnx.split(rewire(model, wiring))

            def loss(state, video):
                return sum(jnp.sum(jnp.sin(3 * feature)) for feature in nnx.merge(graph, state)(video))

            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, video)

        got, want = gradients(REWIRED), gradients(Wiring(0.0, 1.0, reversible=False))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(1.0, float(jnp.abs(b).max())))
        still = [path for path, value in flatten(want[1][0]).items() if not jnp.any(value != 0)]
        assert sorted(still) == sorted(path for path in flatten(model) if path.endswith((".mean", ".var")))


def test_bfloat16_branches_reconstruct_bit_exactly():
    model = tiny(dtype=jnp.bfloat16)
    run = jax.jit(lambda video: diagnose(model, video, wiring=REWIRED), compiler_options=quick.AS_USERS_DO)
    records = run(normal(0, 2, 8, 32, 32, 3))
    assert [record.reconstruction_error for record in records] == [0] * 3  # the slow first stage has nothing to undo
    assert all(0.1 < record.largest_state < 1024 for record in records)


@pytest.mark.parametrize("wiring", [PLAIN, REWIRED], ids=["ordinary", "rewired"])
def test_bfloat16_is_close_to_float32(wiring):
    video = normal(0, 1, 8, 32, 32, 3)
    want, _ = run(rewire(tiny(), wiring), video)
    got, named = run(rewire(tiny(dtype=jnp.bfloat16), wiring), video)
    assert named["fast.stem"].dtype == jnp.bfloat16
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        assert jnp.abs(a - b).max() < 0.03 * jnp.abs(b).max()  # bfloat16 has 8 bits, and some ten layers follow


def test_states_of_a_deep_random_network_stay_in_the_range_of_exact_sums():
    """They grow by a factor of e at most, where last norms of scale 1 give 1.6 a block (2,600 in R101's longest)."""
    model = ResNet3D(depths=(12,), base_channels=4, inflate=(0,), rngs=nnx.Rngs(0))
    features, named = run(model, normal(0, 1, 2, 32, 32, 3))
    assert 0.1 < jnp.abs(features).max() < 4 * jnp.abs(named["stem"]).max()


# ---- Errors


def test_videos_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"video of 6 frames .* multiples of resample_rate = 4"):
        tiny()(jnp.zeros((1, 6, 16, 16, 3)))
    with pytest.raises(DataError, match=r"expected \(batch, frames, height, width, 3\)"):
        tiny()(jnp.zeros((1, 3, 8, 16, 16)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, r"depths = \(\)"),
        ({"slow_inflate": (0, 2)}, r"inflate = \(0, 2\)"),
        ({"fast_inflate": (1,)}, r"inflate = \(1,\)"),
        ({"base_channels": 9}, "the ratio must divide the channels"),
        ({"resample_rate": 6}, "the ratio must divide the rate"),
        ({"fusion_kernel": 4}, r"fusion_kernel = 4: allowed is an odd number"),
        ({"fast_stem_frames": 2}, "stem over 2 frames"),
        ({"in_channels": 0}, "in_channels = 0"),
        ({"dtype": "int32"}, "dtype = 'int32'"),
    ],
)
def test_sizes_that_make_no_network_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        nnx.eval_shape(lambda: SlowFast(**{**TINY, "rngs": nnx.Rngs(0), **changes}))
