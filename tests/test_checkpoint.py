"""Checkpoints: what comes back, on which mesh, which ones are kept, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from re2tal_jax.errors import CheckpointError, ConfigError
from re2tal_jax.training.checkpoint import CheckpointConfig, Checkpoints, load_config, load_params, prepare_workdir
from re2tal_jax.training.sharding import MeshConfig
from tests.training_stand_in import bits, make_spec

NAME = "backbone.proj.kernel"


@pytest.fixture(scope="module")
def spec():
    return make_spec()[0]


@pytest.fixture(scope="module")
def state(spec):
    state = spec.create()
    return dataclasses.replace(state, ema_params={path: value + 1.0 for path, value in state.ema_params.items()})


def at(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


def save(workdir, state, steps):
    """Save a state under several steps; `steps` maps them to their metric, None for no evaluation."""
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        for step, value in steps.items():
            metrics = None if value is None else {"average_mAP": value}
            checkpoints.save(at(state, step), data={"position": step}, config={"step": step}, metrics=metrics)


def test_everything_comes_back_bit_for_bit(tmp_path, spec, state):
    save(tmp_path, state, {7: 0.5})
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored = checkpoints.restore(spec.abstract)
    assert bits(restored.state) == bits(at(state, 7))
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert (restored.step, restored.data, restored.config) == (7, {"position": 7}, {"step": 7})
    assert restored.metrics == {"average_mAP": 0.5}


def test_saved_on_four_by_two_restores_on_two_by_four(tmp_path, state):
    first, _ = make_spec(MeshConfig(data=4, fsdp=2, fsdp_min_size=8), devices=8)
    second, _ = make_spec(MeshConfig(data=2, fsdp=4, fsdp_min_size=8), devices=8)
    saved = first.create()
    assert saved.params[NAME].sharding.shard_shape((3, 16)) == (3, 8)
    save(tmp_path, saved, {1: None})
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored = checkpoints.restore(second.abstract).state
    assert bits(restored) == bits(at(saved, 1))
    for array in (restored.params[NAME], restored.ema_params[NAME], restored.opt_state.mu[NAME]):
        assert array.sharding.spec == P(None, "fsdp")
        assert array.sharding.shard_shape((3, 16)) == (3, 4)


def test_latest_and_best_are_kept_also_by_a_resumed_run(tmp_path, state):
    save(tmp_path, state, {1: 0.3, 2: 0.9, 3: None, 4: 0.5})
    save(tmp_path, state, {5: float("nan"), 6: None})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "6"]
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (6, 2)
        assert checkpoints.metrics(6) is None
    save(tmp_path, state, {7: 0.95})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["7"]


def test_a_checkpoint_that_is_evaluated_later_is_as_one_saved_with_its_metrics(tmp_path, spec, state):
    later, at_once = (Checkpoints(tmp_path / name, CheckpointConfig()) for name in ("later", "at_once"))
    for step, value in ((1, 0.2), (2, None)):
        metrics = None if value is None else {"average_mAP": value}
        later.save(at(state, step), data=0, config={}, metrics=metrics)
        at_once.save(at(state, step), data=0, config={}, metrics=metrics or {"average_mAP": 0.3, "mAP@0.5": 0.4})
    later.wait()
    at_once.wait()
    with pytest.raises(ConfigError, match="average_mAP"):
        later.add_metrics(2, {"mAP@0.5": 0.4})
    assert later.best_step == 1
    later.add_metrics(2, {"average_mAP": 0.3, "mAP@0.5": 0.4})
    files = [tmp_path / name / "checkpoints" / "2" / "metrics" / "metrics" for name in ("later", "at_once")]
    assert files[0].read_text() == files[1].read_text()
    for checkpoints in (later, Checkpoints(tmp_path / "later", CheckpointConfig())):
        assert (checkpoints.best_step, checkpoints.metrics(2)) == (2, {"average_mAP": 0.3, "mAP@0.5": 0.4})
    assert bits(later.restore(spec.abstract).state) == bits(at(state, 2))


def test_without_an_evaluation_there_is_no_best(tmp_path, state, caplog):
    save(tmp_path, state, {1: None, 2: None})
    assert "tracked_metric" not in caplog.text  # orbax's word for a missing evaluation
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (2, None)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint 'best'\. Complete ones: 2\."):
        load_params(tmp_path, step="best")


def test_parameters_and_config_load_alone_averaged_or_raw_best_or_latest(tmp_path, state):
    save(tmp_path, state, {1: 0.9, 2: 0.1})
    averaged = load_params(tmp_path)
    assert sorted(averaged) == sorted(state.params)
    assert isinstance(averaged[NAME], np.ndarray)
    np.testing.assert_array_equal(averaged[NAME], state.ema_params[NAME])
    np.testing.assert_array_equal(load_params(tmp_path / "checkpoints", "raw", 1)[NAME], state.params[NAME])
    assert [load_config(tmp_path, step)["step"] for step in ("latest", "best", 1)] == [2, 1, 1]
    with pytest.raises(CheckpointError, match=r"holds no checkpoint 3\. Complete ones: 1, 2\."):
        load_params(tmp_path, step=3)
    with pytest.raises(CheckpointError, match="is no folder"):
        load_params(tmp_path / "nowhere")


def test_another_architecture_is_refused_with_its_differences_named(tmp_path, spec, state):
    other = dict(state.params)
    other["backbone.projection.kernel"] = other.pop(NAME)
    other["localizer.head.kernel"] = jnp.zeros((16, 3))
    other["localizer.head.bias"] = other["localizer.head.bias"].astype(jnp.bfloat16)
    save(tmp_path, dataclasses.replace(state, params=other), {1: None})
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(spec.abstract)
    text = str(error.value)
    assert "belongs to another architecture. Resume" in text
    assert " 4 differences:\n" in text
    assert f"params lacks {NAME} (3, 16). Did you mean 'backbone.projection.kernel'" in text
    assert "params has backbone.projection.kernel (3, 16), which the model lacks. Did you mean" in text
    assert "params: localizer.head.kernel has shape (16, 3), the model (16, 2)" in text
    assert "params: localizer.head.bias is bfloat16, the model float32" in text


def test_saving_a_step_again_is_refused(tmp_path, state):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(at(state, 1), data=None, config={})
        with pytest.raises(CheckpointError, match="holds step 1 already"):
            checkpoints.save(at(state, 1), data=None, config={})


def test_unfinished_saves_are_ignored_and_cleaned_up(tmp_path, spec, state):
    save(tmp_path, state, {1: None})
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "params").write_text("half")
    np.testing.assert_array_equal(load_params(tmp_path)[NAME], state.ema_params[NAME])
    assert unfinished.exists()  # a reader touches nothing
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore(spec.abstract).step == 1
        checkpoints.save(at(state, 2), data=None, config={})
    assert not unfinished.exists()
    assert load_config(tmp_path, 2) == {}


def test_a_damaged_checkpoint_is_named(tmp_path, spec, state):
    save(tmp_path, state, {1: None})
    for path in (tmp_path / "checkpoints" / "1" / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:5])
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(CheckpointError, match="checkpoints/1 cannot be read: "),
    ):
        checkpoints.restore(spec.abstract)
    with (
        Checkpoints(tmp_path / "empty", CheckpointConfig()) as checkpoints,
        pytest.raises(CheckpointError, match="holds no checkpoint"),
    ):
        checkpoints.restore(spec.abstract)


def test_data_position_of_another_number_of_processes_is_refused(tmp_path, spec, state):
    save(tmp_path, state, {1: None})
    file = tmp_path / "checkpoints" / "1" / "data" / "metadata"
    file.write_text(json.dumps({"processes": [{"position": 1}, {"position": 1}]}))
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(CheckpointError, match="saved by 2 processes and this run has 1"),
    ):
        checkpoints.restore(spec.abstract)


def test_unwritable_workdir_is_refused_before_training(tmp_path):
    assert prepare_workdir(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"workdir .*file/run cannot be written \(Not a directory\)"):
        prepare_workdir(tmp_path / "file" / "run")
