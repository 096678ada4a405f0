"""One step of training and one of evaluation, as pure functions that are compiled once for the mesh."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from re2tal_jax.training.optim import Params, ema_update
from re2tal_jax.training.sharding import batch_sharding, replicated
from re2tal_jax.training.state import Model, StateSpec, TrainState
from re2tal_jax.types import Batch

Scalars = dict[str, Float[Array, ""]]
Tree = TypeVar("Tree")

# The batch as the loader gives it -> the video as the model takes it, and the batch with targets that follow what was
# done to the video (a clip played backwards, say). The key is None in evaluation.
Preprocess = Callable[[Batch, PRNGKeyArray | None], tuple[Shaped[Array, "B F H W 3"], Batch]]
TrainStep = Callable[[TrainState, Batch, PRNGKeyArray], tuple[TrainState, Scalars]]
EvalStep = Callable[[Params, Batch], tuple[Array, Array, Array]]


def make_train_step(spec: StateSpec, preprocess: Preprocess, mesh: Mesh) -> Any:
    """Return the jitted step (state, batch, key) -> (state, metrics); the given state's memory is reused.

    `key` is the run's: the step number is folded in, so randomness differs from step to step and a resumed run draws
    what an uninterrupted one would. Metrics are scalars: loss/<name>, grad_norm, lr/<group>.
    """
    model, optimizer = spec.model, spec.optimizer

    def train_step(state: TrainState, batch: Batch, key: PRNGKeyArray) -> tuple[TrainState, Scalars]:
        trainable, frozen = optimizer.split(state.params)

        def gradients_of(trainable: Params, batch: Batch, localizer_state: Any, key: PRNGKeyArray) -> Any:
            preprocess_key, model_key = jax.random.split(key)
            video, batch = preprocess(batch, preprocess_key)

            def loss(trainable: Params) -> Any:
                detector = model.merge(trainable | frozen)
                losses, after = detector.loss(video, batch, localizer_state, key=model_key)
                return losses["total"], (losses, after)

            (_, (losses, localizer_state)), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
            return gradients, losses, localizer_state

        gradients, losses, localizer_state = accumulate(
            gradients_of,
            optimizer.config.accumulate,
            trainable,
            batch,
            state.localizer_state,
            jax.random.fold_in(key, state.step),
        )
        trainable, opt_state, metrics = optimizer.update(gradients, state.opt_state, trainable, state.step)
        params = trainable | frozen
        ema_params = ema_update(state.ema_params, params, optimizer.config.ema_decay)
        state = TrainState(
            step=state.step + 1,
            params=params,
            ema_params=ema_params,
            opt_state=opt_state,
            localizer_state=localizer_state,
        )
        return state, {f"loss/{name}": value for name, value in losses.items()} | metrics

    return jax.jit(
        train_step,
        in_shardings=(spec.shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(spec.shardings, replicated(mesh)),
        donate_argnums=0,
    )


def accumulate(
    gradients_of: Callable[..., Any],
    count: int,
    trainable: Params,
    batch: Batch,
    localizer_state: Any,
    key: PRNGKeyArray,
) -> Any:
    """Return mean gradients and mean losses over `count` micro-batches, and the localizer state after the last.

    `gradients_of(trainable, batch, localizer_state, key)` returns these three of one micro-batch.
    """
    if count == 1:
        return gradients_of(trainable, batch, localizer_state, key)
    # Micro-batch i takes every count-th sample, so that each device keeps the samples that it has.
    micro_batches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)

    def body(carry: Any, xs: Any) -> Any:
        total, localizer_state = carry
        gradients, losses, localizer_state = gradients_of(trainable, xs[0], localizer_state, xs[1])
        return (jax.tree.map(jnp.add, total, gradients), localizer_state), losses

    zeros = jax.tree.map(jnp.zeros_like, trainable)
    xs = (micro_batches, jax.random.split(key, count))
    (total, localizer_state), losses = jax.lax.scan(body, (zeros, localizer_state), xs)
    mean = jax.tree.map(lambda g: g / count, total)
    return mean, jax.tree.map(lambda x: x.mean(), losses), localizer_state


def make_eval_step(model: Model, preprocess: Preprocess, mesh: Mesh, params_shardings: Any) -> Any:
    """Return the jitted step (parameters, batch) -> (proposals (B, P, 2) in snippets, scores (B, P, K), valid (B, P)).

    Call it with the averaged parameters, `state.ema_params`, as the published results do.
    """

    def eval_step(params: Params, batch: Batch) -> tuple[Array, Array, Array]:
        video, batch = preprocess(batch, None)
        return model.merge(params).predict(video, batch.mask)

    return jax.jit(eval_step, in_shardings=(params_shardings, batch_sharding(mesh)), out_shardings=batch_sharding(mesh))
