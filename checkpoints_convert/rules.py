"""Name rules: which parameter of ours a PyTorch key becomes, and how its layout changes.

A rule is (pattern of the whole key, path template); the rules of a network stand beside it as `TORCH_NAMES`. A template
takes the pattern's groups (`\\1`) and may end in `{leaf}`, our name for the key's `weight` or `bias`:

    weight (out, in) of a linear                   kernel (in, out)
    weight (out, in, *window) of a convolution     kernel (*window, in, out)
    weight (channels,) of a norm                   scale
    bias                                           bias

Other templates name a parameter that keeps its layout. Where ours has fewer axes (a patch embedding as a linear map, a
scale without axes of length 1), leading axes are joined or axes of length 1 dropped.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from re2tal_jax.errors import CheckpointError

Rules = Sequence[tuple[str, str]]
Shape = tuple[int, ...]
M = TypeVar("M", bound=nnx.Module)


def flatten(state: Any) -> dict[str, Any]:
    """Return what the parameters of a module or of a state like it hold (arrays, shapes), by dot-separated path."""
    if isinstance(state, nnx.Module):
        state = nnx.state(state, nnx.Param)
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def fill(module: M, values: Mapping[str, np.ndarray]) -> M:
    """Return the module with the parameters given by path. A module from `nnx.eval_shape` has none to lose."""
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    leaves = [
        (path, leaf.replace(jnp.asarray(values[".".join(map(str, path))]))) for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(leaves), rest)


def map_state_dict(
    state_dict: Mapping[str, np.ndarray], rules: Rules, targets: Mapping[str, Shape], *, ignored: Rules = ()
) -> dict[str, np.ndarray]:
    """Return our parameters by path, in our layouts, from a state dict in PyTorch's.

    Args:
        state_dict: arrays by PyTorch key, without prefixes that the rules do not know.
        rules: (pattern, template) pairs; exactly one has to match a key.
        targets: shape of every parameter to fill, by dot-separated path.
        ignored: (pattern, reason) pairs of keys that become no parameter.

    Raises:
        CheckpointError: one message that lists every key no rule (or more than one) matches, every target that is not
            filled or filled twice, and every shape that does not fit.
    """
    paths, problems = map_names({key: value.ndim for key, value in state_dict.items()}, rules, ignored=ignored)
    result: dict[str, np.ndarray] = {}
    for key, path in paths.items():
        if path not in targets:
            close = difflib.get_close_matches(path, targets, n=1, cutoff=0.0)
            problems.append(f"{key}: no parameter {path} here" + (f"; nearest: {close[0]}" if close else ""))
        elif path in result:
            problems.append(f"{key}: {path} is filled by another key already")
        else:
            result[path] = value = to_ours(state_dict[key], path, targets[path])
            if value.shape != tuple(targets[path]):
                given = tuple(state_dict[key].shape)
                problems.append(f"{key}: shape {given} does not fit {path} {tuple(targets[path])}")
    problems += [f"{path} {tuple(targets[path])}: filled by no key" for path in sorted(set(targets) - set(result))]
    if problems:
        raise CheckpointError(f"{len(problems)} names or shapes do not match:\n  " + "\n  ".join(problems))
    return result


def unmap_gradients(
    gradients: Mapping[str, np.ndarray], rules: Rules, sources: Mapping[str, Shape], *, ignored: Rules = ()
) -> dict[str, np.ndarray]:
    """Return arrays by path in our layouts (gradients, parameters) by PyTorch key in PyTorch's: the way back.

    `sources` gives the PyTorch shape of every key of the state dict.

    Raises:
        CheckpointError: a key that no rule matches, or whose parameter has no array.
    """
    paths, problems = map_names({key: len(shape) for key, shape in sources.items()}, rules, ignored=ignored)
    problems += [f"{key}: nothing for {path}" for key, path in paths.items() if path not in gradients]
    if problems:
        raise CheckpointError(f"{len(problems)} names do not match:\n  " + "\n  ".join(problems))
    return {key: to_torch(gradients[path], path, sources[key]) for key, path in paths.items()}


def map_names(ranks: Mapping[str, int], rules: Rules, *, ignored: Rules = ()) -> tuple[dict[str, str], list[str]]:
    """Return the path of every key that is not ignored, given the keys' numbers of axes, and what went wrong."""
    paths: dict[str, str] = {}
    problems: list[str] = []
    for key, rank in ranks.items():
        if any(re.fullmatch(pattern, key) for pattern, _ in ignored):
            continue
        matches = [(m, template) for pattern, template in rules if (m := re.fullmatch(pattern, key))]
        if len(matches) != 1:
            found = "no rule matches" if not matches else f"{len(matches)} rules match"
            problems.append(f"{key}: {found}")
            continue
        match, template = matches[0]
        paths[key] = match.expand(template).replace("{leaf}", _leaf(key, rank))
    return paths, problems


def _leaf(key: str, rank: int) -> str:
    """Return flax's name of a parameter that PyTorch calls `weight` or `bias`."""
    if key.endswith("bias"):
        return "bias"
    return "scale" if rank == 1 else "kernel"


def to_ours(value: np.ndarray, path: str, shape: Shape) -> np.ndarray:
    """Return a PyTorch array in the layout of our parameter; of another shape than `shape` if it cannot fit."""
    value = np.asarray(value)
    if _is_kernel(path) and value.ndim >= 2:
        value = np.moveaxis(value, (0, 1), (-1, -2))
    return value.reshape(shape) if _joins(value.shape, tuple(shape)) else value


def to_torch(value: np.ndarray, path: str, shape: Shape) -> np.ndarray:
    """Return an array in the layout of our parameter in PyTorch's layout, of shape `shape`."""
    value = np.asarray(value)
    if _is_kernel(path) and len(shape) >= 2:
        out, features, *window = shape
        return np.moveaxis(value.reshape(*window, features, out), (-1, -2), (0, 1))
    return value.reshape(shape)


def _is_kernel(path: str) -> bool:
    return path.rpartition(".")[2] == "kernel"


def _joins(given: Shape, wanted: Shape) -> bool:
    """Tell whether `given` becomes `wanted` by joining leading axes or by axes of length 1 alone."""
    if np.prod(given) != np.prod(wanted):
        return False
    if [n for n in given if n != 1] == [n for n in wanted if n != 1]:
        return True
    kept = len(wanted) - 1
    return 0 < kept < len(given) and given[-kept:] == wanted[1:]
