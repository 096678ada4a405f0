"""One step: randomness, accumulation, freezing, the average, what evaluation sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from re2tal_jax.errors import CheckpointError, ConfigError
from re2tal_jax.training.sharding import MeshConfig, put_batch
from re2tal_jax.training.state import describe_model, flatten_params, initialiser
from re2tal_jax.training.step import accumulate, make_eval_step
from tests.training_stand_in import HW, Backbone, Loader, StandIn, bits, make_parts, preprocess

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def parts():
    return make_parts()


def steps(parts, state, batches, key=KEY):
    for batch in batches:
        state, metrics = parts.train_step(state, put_batch(batch, parts.mesh), key)
    return state, metrics


def test_randomness_differs_from_step_to_step_and_follows_the_key(parts):
    """The first step has lr 0: with the same batch, the loss of the second differs by its random numbers alone."""
    batch = put_batch(Loader().batch(0), parts.mesh)
    state, first = parts.train_step(parts.spec.create(), batch, KEY)
    _, second = parts.train_step(state, batch, KEY)
    assert first["lr/backbone"] == 0
    assert first["loss/total"] != second["loss/total"]
    _, again = parts.train_step(parts.spec.create(), batch, KEY)
    assert first["loss/total"] == again["loss/total"]
    _, other = parts.train_step(parts.spec.create(), batch, jax.random.key(4))
    assert first["loss/total"] != other["loss/total"]


def test_frozen_parameters_stay_bit_equal_and_others_move_after_the_first_step(parts):
    batches = Loader().batches(5)
    before = jax.tree.map(np.asarray, parts.spec.create().params)
    state, metrics = steps(parts, parts.spec.create(), batches[:1])
    assert bits(state.params) == bits(before)  # lr is 0
    state, metrics = steps(parts, state, batches[1:])
    changed = {path for path in before if (np.asarray(state.params[path]) != before[path]).any()}
    assert changed == {path for path in before if ".norm." not in path}
    averaged = {path for path in before if (np.asarray(state.ema_params[path]) != before[path]).any()}
    assert averaged == changed
    assert sorted(metrics) == ["grad_norm", "loss/normalizer", "loss/total", "lr/backbone", "lr/localizer"]
    assert int(state.step) == 5


def test_given_parameters_stand_in_the_place_of_drawn_ones_and_change_no_others(parts):
    drawn = parts.spec.create()
    given = {path: np.asarray(value) + 1 for path, value in drawn.params.items() if path.startswith("backbone.")}
    state = parts.spec.create(given)
    assert 0 < len(given) < len(drawn.params)
    for params in (state.params, state.ema_params):
        assert bits(params) == bits({**drawn.params, **given})


def test_given_parameters_are_not_drawn(parts):
    flops = []
    for given in (frozenset(), frozenset(parts.spec.model.parameters)):
        initialise = jax.jit(initialiser(parts.spec.model, parts.spec.optimizer, given))
        flops.append(initialise.lower().compile().cost_analysis().get("flops", 0))
    assert flops[0] > 0
    assert flops[1] == 0


def test_given_parameters_of_another_model_are_named_before_anything_is_drawn(parts, monkeypatch):
    monkeypatch.setattr(jax, "jit", None)
    with pytest.raises(CheckpointError, match=r"head\.kernal is no parameter of the model\. Did you mean"):
        parts.spec.create({"localizer.head.kernal": np.zeros(1, np.float32)})


def test_average_is_that_of_the_parameters_after_every_step(parts):
    state = parts.spec.create()
    name = "localizer.head.kernel"
    want = np.asarray(state.params[name], np.float64)
    for batch in Loader().batches(4):
        state, _ = steps(parts, state, [batch])
        want = 0.999 * want + 0.001 * np.asarray(state.params[name], np.float64)
    np.testing.assert_allclose(state.ema_params[name], want, rtol=1e-6)


def test_accumulated_gradients_equal_those_of_the_large_batch():
    """Without clipping, dropout and noise, four micro-batches of four are one batch of sixteen, on two devices too."""
    plain = make_parts(rate=0.0, clip_norm=None, noise=False)
    accumulating = make_parts(rate=0.0, clip_norm=None, noise=False, accumulate=4)
    sharded = make_parts(
        MeshConfig(fsdp_min_size=8, fsdp=2), devices=2, rate=0.0, clip_norm=None, noise=False, accumulate=4
    )
    batches = Loader(size=16).batches(4)
    want, metrics = steps(plain, plain.spec.create(), batches)
    for parts in (accumulating, sharded):
        got, accumulated = steps(parts, parts.spec.create(), batches)
        np.testing.assert_allclose(accumulated["loss/total"], metrics["loss/total"], rtol=1e-5)
        np.testing.assert_allclose(accumulated["grad_norm"], metrics["grad_norm"], rtol=1e-5)
        for path, value in want.params.items():
            np.testing.assert_allclose(got.params[path], value, atol=2e-5, err_msg=path)


def test_micro_batches_have_random_numbers_of_their_own_and_pass_the_state_on():
    def gradients_of(weight, batch, drawn, key):
        drawn = jnp.roll(drawn, 1).at[0].set(jax.random.uniform(key))
        return batch.sum() * weight, {"total": batch.sum()}, drawn

    batch = jnp.arange(6.0)  # micro-batches 0 3, 1 4 and 2 5
    mean, losses, drawn = accumulate(gradients_of, 3, jnp.float32(2), batch, jnp.zeros(3), KEY)
    assert (float(mean), float(losses["total"])) == (10.0, 5.0)
    assert len(set(np.asarray(drawn).tolist())) == 3


def test_evaluation_takes_given_parameters_and_no_randomness(parts):
    evaluate = make_eval_step(parts.spec.model, preprocess, parts.mesh, parts.spec.shardings.params)
    state, batch = parts.spec.create(), put_batch(Loader().batch(0), parts.mesh)
    proposals, scores, valid = evaluate(state.ema_params, batch)
    assert (proposals.shape, scores.shape, valid.shape) == ((8, 6, 2), (8, 6, 2), (8, 6))
    want = StandIn(rngs=nnx.Rngs(0)).predict(batch.video.astype(jnp.float32), batch.mask)[1]
    np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-6)


def test_pretrained_parameters_replace_drawn_ones_by_path(parts):
    kernel = np.full((3, 16), 0.5, np.float32)
    state = parts.spec.create({"backbone.proj.kernel": kernel})
    np.testing.assert_array_equal(state.params["backbone.proj.kernel"], kernel)
    np.testing.assert_array_equal(state.ema_params["backbone.proj.kernel"], kernel)
    state, _ = steps(parts, state, [Loader().batch(0)])  # donated buffers are not shared
    assert int(state.step) == 1
    wrong = {"backbone.proj.kernal": kernel, "backbone.proj.bias": kernel, "backbone.norm.scale": np.zeros(16)}
    with pytest.raises(CheckpointError) as error:
        parts.spec.create(wrong)
    assert "backbone.proj.kernal is no parameter of the model. Did you mean 'backbone.proj.kernel'" in str(error.value)
    assert "backbone.proj.bias has shape (3, 16), the model wants (16,)" in str(error.value)
    assert "backbone.norm.scale is float64, the model wants float32" in str(error.value)


def test_model_is_taken_apart_and_put_together_again(parts):
    module = StandIn(rngs=nnx.Rngs(5))
    again = parts.spec.model.merge(flatten_params(module))
    video = jnp.ones((1, 4, HW, HW, 3))
    np.testing.assert_array_equal(again.backbone(video), module.backbone(video))
    assert list(parts.spec.model.shapes) == sorted(flatten_params(module))


class Hoarder(Backbone):
    """Keeps arrays where they would be lost."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(4, rngs)
        self.mean = nnx.BatchStat(jnp.zeros(3))
        self.rate = jnp.float32(0.3)


def test_arrays_that_are_no_parameters_are_refused():
    with pytest.raises(ConfigError, match=r"no nnx\.Param: mean, \.rate\."):
        describe_model(lambda: Hoarder(nnx.Rngs(0)))


def test_initial_parameters_do_not_depend_on_the_mesh(parts):
    sharded = make_parts(MeshConfig(data=4, fsdp=2, fsdp_min_size=8), devices=8).spec
    assert bits(sharded.create().params) == bits(parts.spec.create().params)
