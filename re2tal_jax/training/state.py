"""Everything that a training step changes, and how it is created on the mesh without any device holding all of it.

A model is taken apart once: its structure is kept aside, its parameters become a flat dict from '.'-joined path to
array, which groups, shardings, checkpoints and reports all speak of.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Int

from re2tal_jax.errors import CheckpointError, ConfigError, did_you_mean
from re2tal_jax.training.optim import Optimizer, Params
from re2tal_jax.training.sharding import MeshConfig, parameter_shardings, state_shardings

# Hundreds of random arrays are drawn once: compiling that takes most of the time, on CPU half of it to optimise.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a step takes and returns. `step` counts finished steps; `localizer_state` is e.g. the loss normaliser."""

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: Any
    localizer_state: Any


@dataclass(frozen=True)
class Model:
    """The structure of a module apart from its parameters, whose paths and abstract values `parameters` lists."""

    make: Callable[[], Any]
    structure: Any
    treedef: jax.tree_util.PyTreeDef
    parameters: Mapping[str, jax.ShapeDtypeStruct]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path and shape of every parameter."""
        return {path: value.shape for path, value in self.parameters.items()}

    def merge(self, params: Params) -> Any:
        """Return the module with these parameters."""
        leaves = [params[path] for path in self.parameters]
        return nnx.merge(self.structure, jax.tree.unflatten(self.treedef, leaves))


def describe_model(make: Callable[[], Any]) -> Model:
    """Trace the construction of a module without computing or allocating anything.

    Raises:
        ConfigError: a module that holds arrays which are no nnx.Param; they would be lost between steps.
    """
    parts: list[Any] = []

    def build() -> Any:
        structure, params, rest = nnx.split(make(), nnx.Param, ...)
        parts[:] = [structure, [".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]]
        return params

    params = jax.eval_shape(build)
    structure, others = parts
    # An array built inside the constructor and kept as a plain attribute is found here as a tracer.
    others += [f".{name}" for name, value in structure.attributes if _holds_tracer(value)]
    if others:
        raise ConfigError(
            f"the model keeps arrays that are no nnx.Param: {', '.join(others)}. Make them nnx.Param (with a frozen "
            "rule if they are not learned), or numpy constants computed where they are used."
        )
    return Model(make, structure, jax.tree.structure(params), _flatten(params))


def _holds_tracer(attribute: Any) -> bool:
    return hasattr(attribute, "value") and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(attribute.value))


def flatten_params(module: nnx.Module) -> Params:
    """Return the parameters of a module by path, as a train state holds them."""
    return _flatten(nnx.state(module, nnx.Param))


def _flatten(state: nnx.State) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)  # the last key of a path is the Variable's value
    return {jax.tree_util.keystr(path[:-1], simple=True, separator="."): leaf for path, leaf in leaves}


@dataclass(frozen=True)
class StateSpec:
    """How a run's train state looks and lies: `abstract` has shape, dtype and sharding of every leaf."""

    model: Model
    optimizer: Optimizer
    abstract: TrainState

    @property
    def shardings(self) -> TrainState:
        """Where every leaf lies."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def create(self, initial: Mapping[str, np.ndarray] | None = None) -> TrainState:
        """Return the state before the first step; every device computes only its part.

        `initial` replaces freshly drawn parameters, by path, with given values (a pretrained backbone, say).

        Raises:
            CheckpointError: given values that are not exactly parameters of the model.
        """
        initial = initial or {}
        check_parameters({path: (value.shape, value.dtype) for path, value in initial.items()}, self.model.parameters)
        platform = next(iter(self.abstract.step.sharding.device_set)).platform
        options = QUICK_COMPILE if platform == "cpu" else None
        initialise = initialiser(self.model, self.optimizer, frozenset(initial))
        draw = jax.jit(initialise, out_shardings=self.shardings, compiler_options=options)
        return self._with_parameters(draw(), initial) if initial else draw()

    def _with_parameters(self, state: TrainState, initial: Mapping[str, np.ndarray]) -> TrainState:
        given = {path: jax.device_put(value, state.params[path].sharding) for path, value in initial.items()}
        copies = {path: jax.device_put(value, state.params[path].sharding) for path, value in initial.items()}
        return TrainState(
            step=state.step,
            params=state.params | given,
            ema_params=state.ema_params | copies,
            opt_state=state.opt_state,
            localizer_state=state.localizer_state,
        )


def describe_state(model: Model, optimizer: Optimizer, mesh: Mesh, config: MeshConfig) -> StateSpec:
    """Work out shape, dtype and place of everything a run keeps, without allocating it."""
    shapes = jax.eval_shape(initialiser(model, optimizer))
    shardings = state_shardings(shapes, parameter_shardings(model.shapes, mesh, config), mesh)
    abstract = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    return StateSpec(model, optimizer, abstract)


def initialiser(model: Model, optimizer: Optimizer, given: Set[str] = frozenset()) -> Callable[[], TrainState]:
    """Return what draws a state; parameters that are `given` are 0 in it, as drawing them takes long to compile."""

    def initialise() -> TrainState:
        module = model.make()
        # A weakly typed leaf would compile the step twice: its output is strongly typed.
        drawn = jax.tree.map(_strong, flatten_params(module))
        params = {path: jnp.zeros_like(value) if path in given else value for path, value in drawn.items()}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params),
            opt_state=jax.tree.map(_strong, optimizer.init(params)),
            localizer_state=jax.tree.map(_strong, module.initial_state()),
        )

    return initialise


def _strong(value: Any) -> Array:
    value = jnp.asarray(value)
    return jnp.asarray(value, value.dtype)


def check_parameters(
    given: Mapping[str, tuple[tuple[int, ...], Any]], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    """Raise CheckpointError unless every given (shape, dtype) is a parameter of the model, exactly alike."""
    problems = []
    for path, (shape, dtype) in given.items():
        if path not in wanted:
            problems.append(f"{path} is no parameter of the model. {did_you_mean(path, wanted)}")
        elif tuple(shape) != wanted[path].shape:
            problems.append(f"{path} has shape {tuple(shape)}, the model wants {wanted[path].shape}")
        elif np.dtype(dtype) != wanted[path].dtype:
            problems.append(f"{path} is {np.dtype(dtype).name}, the model wants {wanted[path].dtype.name}")
    if problems:
        raise CheckpointError("The given parameters do not fit the model:\n  " + "\n  ".join(problems))
