"""Rules between PyTorch's names and layouts and ours, in both directions."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert.rules import Ignored, Rule, Rules, fill, flatten, plan, to_state_dict
from re2tal_jax.errors import CheckpointError
from tests.parity.replay import convert_state_dict

NAMES = Rules(
    (
        Rule("fc{i}", "layers.{i}", "linear"),
        Rule("norm", "norm", "norm"),
        Rule("bn", "bn", "batch_norm"),
        Rule("conv", "conv", "conv"),
        Rule("path.scale", "path.scale", "channels"),
        Rule("table", "table"),
        Rule("query", "attn.qkv[0/3]", "linear"),
        Rule("key", "attn.qkv[1/3]", "linear"),
        Rule("value", "attn.qkv[2/3]", "linear"),
        Rule("extra", "extra", "norm", optional="only with extra=True"),
    ),
    (Ignored(r".*\.index", "a constant"), Ignored(r".*\.num_batches_tracked", "a count")),
)


def count(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def test_a_linear_weight_is_transposed_and_its_bias_kept():
    source = {"fc1.weight": np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), "fc1.bias": np.array([7.0, 8.0, 9.0])}
    ours = convert_state_dict(source, NAMES, {"layers.1.kernel": (2, 3), "layers.1.bias": (3,)})
    np.testing.assert_array_equal(ours["layers.1.kernel"], [[1, 3, 5], [2, 4, 6]])
    np.testing.assert_array_equal(ours["layers.1.bias"], [7, 8, 9])


def test_the_weight_of_a_norm_is_its_scale():
    assert set(convert_state_dict({"norm.weight": count(3)}, NAMES, {"norm.scale": (3,)})) == {"norm.scale"}


def test_a_batch_norm_keeps_its_statistics_and_not_its_count():
    source = {f"bn.{name}": count(2) + i for i, name in enumerate(("weight", "bias", "running_mean", "running_var"))}
    source["bn.num_batches_tracked"] = np.asarray(7)
    targets = {f"bn.{name}": (2,) for name in ("scale", "bias", "mean", "var")}
    ours = convert_state_dict(source, NAMES, targets)
    assert {path: value[0] for path, value in ours.items()} == {"bn.scale": 0, "bn.bias": 1, "bn.mean": 2, "bn.var": 3}


def test_a_convolution_has_its_channels_last():
    ours = convert_state_dict({"conv.weight": count(5, 4, 3)}, NAMES, {"conv.kernel": (3, 4, 5)})["conv.kernel"]
    assert ours[2, 1, 4] == count(5, 4, 3)[4, 1, 2]


def test_three_arrays_of_pytorch_become_one_of_ours():
    source = {"query.weight": count(2, 4), "key.weight": 10 + count(2, 4), "value.weight": 20 + count(2, 4)}
    kernel = convert_state_dict(source, NAMES, {"attn.qkv.kernel": (4, 6)})["attn.qkv.kernel"]
    np.testing.assert_array_equal(kernel[:, 2:4], source["key.weight"].T)
    np.testing.assert_array_equal(kernel[0], [0, 4, 10, 14, 20, 24])


def test_a_third_that_is_missing_leaves_the_whole_unfilled():
    source = {"query.weight": count(2, 4), "value.weight": count(2, 4)}
    report = plan({key: value.shape for key, value in source.items()}, NAMES, {"attn.qkv.kernel": (4, 6)}).report
    assert report.unfilled == {"attn.qkv.kernel": (4, 6)}


def test_the_way_back_gives_every_array_bit_for_bit():
    rng = np.random.default_rng(0)
    shapes = {
        "fc1.weight": (3, 2),
        "fc12.bias": (3,),
        "norm.weight": (4,),
        "bn.running_var": (4,),
        "conv.weight": (5, 3, 2, 4, 4),
        "path.scale": (1, 4, 1),
        "table": (1, 4, 1),
        "query.weight": (2, 4),
        "key.weight": (2, 4),
        "value.weight": (2, 4),
    }
    source = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    targets = {
        "layers.1.kernel": (2, 3),
        "layers.12.bias": (3,),
        "norm.scale": (4,),
        "bn.var": (4,),
        "conv.kernel": (2, 4, 4, 3, 5),
        "path.scale": (4,),
        "table": (1, 4, 1),
        "attn.qkv.kernel": (4, 6),
    }
    back = to_state_dict(convert_state_dict(source, NAMES, targets), NAMES)
    assert set(back) == set(source)
    for key, value in source.items():
        np.testing.assert_array_equal(back[key], value)


def test_a_hole_may_be_restricted_to_numbers_from_one_on():
    names = Rules((Rule("blocks.0.Fm.a", "blocks.0.a"), Rule("blocks.{n+}.inv.Fm.a", "blocks.{n+}.a")))
    assert [key for key, _, _ in names.keys_of("blocks.0.a")] == ["blocks.0.Fm.a"]
    assert [key for key, _, _ in names.keys_of("blocks.10.a")] == ["blocks.10.inv.Fm.a"]
    assert [target.path for target in names.targets_of("blocks.0.inv.Fm.a")] == []


def test_one_error_names_everything_that_is_wrong():
    names = Rules((*NAMES.rules, Rule("fc2", "norm", "norm"), Rule("fc2.weight", "layers.2.kernel")))
    source = {
        "fc1.weight": count(3, 2),  # fits
        "fc2.weight": count(3, 2),  # two rules
        "fc3.weight": count(3, 2),  # no such parameter
        "fc4.weight": count(3, 2),  # another size
        "stray.weight": count(3),  # no rule
    }
    targets = {"layers.1.kernel": (2, 3), "layers.2.kernel": (2, 3), "layers.4.kernel": (2, 5), "norm.scale": (4,)}
    with pytest.raises(CheckpointError) as caught:
        convert_state_dict(source, names, targets)
    text = str(caught.value)
    for part in (
        "mapped 1, ignored 0, unmapped 3, wrong shape 1, unfilled 2",
        "fc2.weight: 3 rules match",
        "fc3.weight: the network has no parameter layers.3.kernel; nearest: layers.",
        "fc4.weight (3, 2): layers.4.kernel needs (5, 2)",
        "stray.weight: no rule matches",
        "norm.scale (4,)",
    ):
        assert part in text
    assert "fc1" not in text


def test_an_image_kernel_does_not_fit_a_video_kernel():
    report = plan({"conv.weight": (5, 3, 4, 4)}, NAMES, {"conv.kernel": (2, 4, 4, 3, 5)}).report
    assert report.wrong_shape == {"conv.weight": ((5, 3, 4, 4), (5, 3, 2, 4, 4), "conv.kernel")}


def test_two_keys_may_not_fill_one_parameter():
    names = Rules((Rule("{i}.weight", "layers.kernel"),))
    report = plan({"1.weight": (3, 2), "2.weight": (3, 2)}, names, {"layers.kernel": (3, 2)}).report
    assert report.unmapped == {"2.weight": "layers.kernel is filled by 1.weight already"}


def test_what_becomes_no_parameter_is_reported_with_its_reason():
    report = plan({"a.index": (2, 2), "extra.weight": (3,)}, NAMES, {}).report
    assert report.ignored == {"a.index": "a constant", "extra.weight": "only with extra=True"}
    assert plan({"extra.weight": (3,)}, NAMES, {"extra.scale": (3,)}).report.mapped == {"extra.weight": "extra.scale"}


def test_a_parameter_without_a_name_has_no_way_back():
    with pytest.raises(CheckpointError, match="no name for 1 parameters: nowhere"):
        to_state_dict({"nowhere": count(2)}, NAMES)


def test_an_abstract_module_is_filled_without_drawing_parameters():
    module = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert {path: leaf.shape for path, leaf in flatten(module).items()} == {"kernel": (2, 3), "bias": (3,)}
    filled = fill(module, {"kernel": count(2, 3), "bias": count(3)})
    np.testing.assert_array_equal(filled(jnp.ones((1, 2))), [[3 + 0, 5 + 1, 7 + 2]])
