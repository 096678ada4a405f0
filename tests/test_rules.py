"""Rules from PyTorch's names and layouts to ours."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert.rules import fill, flatten, map_state_dict, unmap_gradients
from re2tal_jax.errors import CheckpointError

RULES = (
    (r"fc(\d)\.(?:weight|bias)", r"layers.\1.{leaf}"),
    (r"norm\.(?:weight|bias)", r"norm.{leaf}"),
    (r"conv\.weight", r"conv.{leaf}"),
    (r"scale", r"scale_of.{leaf}"),
    (r"table", r"table"),
)


def count(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def test_a_linear_weight_is_transposed_and_its_bias_kept():
    source = {"fc1.weight": np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), "fc1.bias": np.array([7.0, 8.0, 9.0])}
    ours = map_state_dict(source, RULES, {"layers.1.kernel": (2, 3), "layers.1.bias": (3,)})
    np.testing.assert_array_equal(ours["layers.1.kernel"], [[1, 3, 5], [2, 4, 6]])
    np.testing.assert_array_equal(ours["layers.1.bias"], [7, 8, 9])


def test_the_weight_of_a_norm_is_its_scale():
    assert set(map_state_dict({"norm.weight": count(3)}, RULES, {"norm.scale": (3,)})) == {"norm.scale"}


def test_a_convolution_has_its_channels_last():
    ours = map_state_dict({"conv.weight": count(5, 4, 3)}, RULES, {"conv.kernel": (3, 4, 5)})["conv.kernel"]
    assert ours[2, 1, 4] == count(5, 4, 3)[4, 1, 2]


def test_a_convolution_whose_stride_is_its_kernel_becomes_a_linear_map():
    weight = count(5, 3, 2, 4, 4)
    kernel = map_state_dict({"conv.weight": weight}, RULES, {"conv.kernel": (2 * 4 * 4 * 3, 5)})["conv.kernel"]
    patch = np.random.default_rng(0).normal(size=(2, 4, 4, 3))  # channels last
    np.testing.assert_allclose(patch.ravel() @ kernel, np.einsum("thwc,octhw->o", patch, weight))


def test_other_parameters_keep_their_layout_and_lose_axes_of_length_one():
    ours = map_state_dict({"table": count(1, 4, 1)}, RULES, {"table": (4,)})
    np.testing.assert_array_equal(ours["table"], [0, 1, 2, 3])


def test_gradients_find_the_way_back():
    source = {
        "fc1.weight": count(3, 2),
        "fc1.bias": count(3),
        "norm.weight": count(4),
        "conv.weight": count(5, 3, 2, 4, 4),
        "table": count(1, 4, 1),
    }
    targets = {
        "layers.1.kernel": (2, 3),
        "layers.1.bias": (3,),
        "norm.scale": (4,),
        "conv.kernel": (96, 5),
        "table": (4,),
    }
    ours = map_state_dict(source, RULES, targets)
    back = unmap_gradients(ours, RULES, {key: value.shape for key, value in source.items()})
    assert set(back) == set(source)
    for key, value in source.items():
        np.testing.assert_array_equal(back[key], value)


def test_one_error_names_everything_that_is_wrong():
    rules = (*RULES, (r"fc2\.weight", r"elsewhere.{leaf}"))
    source = {
        "fc1.weight": count(3, 2),  # fits
        "fc2.weight": count(3, 2),  # two rules
        "fc3.weight": count(3, 2),  # no such parameter
        "fc4.weight": count(3, 2),  # another size
        "extra.weight": count(3),  # no rule
    }
    targets = {"layers.1.kernel": (2, 3), "layers.4.kernel": (2, 5), "norm.scale": (4,)}
    with pytest.raises(CheckpointError) as caught:
        map_state_dict(source, rules, targets)
    text = str(caught.value)
    for part in (
        "fc2.weight: 2 rules match",
        "fc3.weight: no parameter layers.3.kernel here; nearest: layers.",
        "fc4.weight: shape (3, 2) does not fit layers.4.kernel (2, 5)",
        "extra.weight: no rule matches",
        "norm.scale (4,): filled by no key",
    ):
        assert part in text
    assert "fc1" not in text


def test_a_transposed_square_is_no_wrong_shape_but_a_joined_one_is():
    with pytest.raises(CheckpointError, match="does not fit"):
        map_state_dict({"fc1.weight": count(2, 6)}, RULES, {"layers.1.kernel": (2, 6)})


def test_two_keys_may_not_fill_one_parameter():
    rules = ((r".*weight", r"layers.1.kernel"),)
    with pytest.raises(CheckpointError, match="filled by another key already"):
        map_state_dict({"a.weight": count(3, 2), "b.weight": count(3, 2)}, rules, {"layers.1.kernel": (2, 3)})


def test_ignored_keys_are_left_out():
    source = {"norm.weight": count(3), "a.index": np.zeros((2, 2), np.int64)}
    ours = map_state_dict(source, RULES, {"norm.scale": (3,)}, ignored=((r".*\.index", "a constant"),))
    assert set(ours) == {"norm.scale"}


def test_an_abstract_module_is_filled_without_drawing_parameters():
    module = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert {path: leaf.shape for path, leaf in flatten(module).items()} == {"kernel": (2, 3), "bias": (3,)}
    filled = fill(module, {"kernel": count(2, 3), "bias": count(3)})
    np.testing.assert_array_equal(filled(jnp.ones((1, 2))), [[3 + 0, 5 + 1, 7 + 2]])
