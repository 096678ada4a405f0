"""A run: exact continuation after any end, one compilation, NaN, signals, log, evaluation."""

import logging
import os
import re
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.training.checkpoint import best_or_latest
from re2tal_jax.training.header import START_LEFT, decay_that_forgets, warn_of_start_in_average
from re2tal_jax.training.loop import LoopConfig, NonFiniteError
from re2tal_jax.training.optim import Duration
from re2tal_jax.training.sharding import MeshConfig
from tests.training_stand_in import VIDEOS, Loader, bits, make_parts, make_run, read_jsonl


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def straight(tmp_path_factory, parts):
    """Twenty steps without interruption, and the backend compilations after the first step."""
    workdir, compilations = tmp_path_factory.mktemp("straight"), []
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **kw: compilations.append(event))

    def forget(finished: int) -> None:
        if finished == 1:
            compilations.clear()

    run = make_run(workdir, parts, hook=forget, checkpoint_every=100)
    result = run.run()
    counted = [event for event in compilations if "backend_compile" in event]
    return result, read_jsonl(workdir / "metrics.jsonl"), run, counted


def losses(lines):
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


def signal_in_step(step: int, number: int):
    def hook(finished: int) -> None:
        if finished == step - 1:
            os.kill(os.getpid(), number)

    return hook


def test_step_is_compiled_once_in_a_run(straight):
    _, _, run, compilations_after_first_step = straight
    assert run.train_step.step._cache_size() == 1
    assert compilations_after_first_step == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_equals_the_straight_one_bit_for_bit(
    tmp_path, parts, straight, number, caplog
):
    first = make_run(tmp_path, parts=parts, hook=signal_in_step(10, number), checkpoint_every=100)
    stopped = first.run()
    assert stopped.interrupted
    assert stopped.step == 10
    assert stopped.metrics is None
    assert "same command again" in caplog.text
    resumed = make_run(tmp_path, parts)
    result = resumed.run()
    assert not result.interrupted
    assert bits(result.state) == bits(straight[0].state)
    assert resumed.position == {"position": 20}
    assert losses(read_jsonl(tmp_path / "metrics.jsonl")) == losses(straight[1])


def test_kill_in_mid_save_leaves_a_run_that_goes_on_exactly(tmp_path, parts, straight):
    script = """
        import os, pathlib, signal, sys
        import jax
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        from tests.training_stand_in import make_parts, make_run

        def hook(finished):
            if finished == 14:
                run.saved_config = {"ballast": "x" * 200_000_000}  # the save of step 15 takes a while
            if finished == 15:  # that save has just been started
                os.kill(os.getpid(), signal.SIGKILL)

        run = make_run(pathlib.Path(sys.argv[1]), make_parts(), hook=hook, checkpoint_every=5)
        run.run()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders[0] == "10"
    assert folders[1].startswith("15.")  # unfinished, under another name
    resumed = make_run(tmp_path, parts)
    assert resumed.checkpoints.latest_step == 10
    assert bits(resumed.run().state) == bits(straight[0].state)
    assert losses(read_jsonl(tmp_path / "metrics.jsonl")) == losses(straight[1])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["20"]


def test_losses_on_eight_devices_equal_those_on_one(tmp_path, straight):
    parts = make_parts(MeshConfig(data=4, fsdp=2, fsdp_min_size=8), devices=8)
    assert make_run(tmp_path, parts).run().step == 20
    eight, one = losses(read_jsonl(tmp_path / "metrics.jsonl")), losses(straight[1])
    assert sorted(eight) == list(range(1, 21))
    np.testing.assert_allclose([eight[k] for k in one], list(one.values()), rtol=2e-6)


def test_nan_stops_and_names_step_and_videos_and_is_never_saved(tmp_path, parts):
    run = make_run(tmp_path, parts, loader=Loader(poison=12), checkpoint_every=13)
    names = ", ".join(VIDEOS[i] for i in Loader().batch(12)["window"])
    with pytest.raises(NonFiniteError, match=rf"step 13 is not finite: .*loss/total = nan.*Its videos: {names}\."):
        run.run()
    assert run.checkpoints.latest_step is None
    assert max(losses(read_jsonl(tmp_path / "metrics.jsonl"))) == 12


def test_a_loader_that_fails_does_not_lose_training(tmp_path, parts, straight):
    run = make_run(tmp_path, parts, loader=Loader(fails=7))
    with pytest.raises(DataError, match="video_3"):
        run.run()
    resumed = make_run(tmp_path, parts)
    assert resumed.checkpoints.latest_step == 7
    assert bits(resumed.run().state) == bits(straight[0].state)


def test_a_signal_during_evaluation_saves_and_the_evaluation_is_made_up_for(tmp_path, parts):
    def interrupted(params, step):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal leaves the evaluation")

    durations = {"stop": 3, "evaluate_every": 3}
    result = make_run(tmp_path, parts, evaluate=interrupted, **durations).run()
    assert result.interrupted
    assert result.step == 3
    seen = []

    def evaluate(params, step):
        seen.append(step)
        return {"average_mAP": 0.25}

    result = make_run(tmp_path, parts, evaluate=evaluate, **durations).run()
    assert (result.interrupted, result.metrics, seen) == (False, {"average_mAP": 0.25}, [3])
    assert {"step": 3, "eval/average_mAP": 0.25} in read_jsonl(tmp_path / "metrics.jsonl")


def evaluations(lines):
    return [(line["step"], line["eval/average_mAP"]) for line in lines if "eval/average_mAP" in line]


def cut_short_at(step: int):
    """An evaluation that is left by a signal at that step, and is the step's share of a hundred at others."""

    def evaluate(params, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal leaves the evaluation")
        return {"average_mAP": now / 100}

    return evaluate


@pytest.mark.parametrize(
    "first", [{"hook": signal_in_step(10, signal.SIGTERM)}, {"evaluate": cut_short_at(10)}], ids=["step", "evaluation"]
)
def test_a_signal_where_an_evaluation_is_due_postpones_it_to_the_start_of_the_resumed_run(
    tmp_path, parts, straight, first
):
    durations = {"evaluate_every": 5, "checkpoint_every": 100}
    events, hundredth = [], cut_short_at(-1)
    stopped = make_run(tmp_path, parts, **{"evaluate": hundredth} | first, **durations)
    result = stopped.run()
    assert (result.interrupted, result.step, result.metrics) == (True, 10, None)
    assert evaluations(read_jsonl(tmp_path / "metrics.jsonl")) == [(5, 0.05)]
    assert stopped.checkpoints.best_step == 5

    def evaluate(params, step):
        events.append(f"evaluation of {step}")
        return hundredth(params, step)

    def hook(finished):
        events.append(f"step {finished + 1}")
        if finished == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    resumed = make_run(tmp_path, parts, evaluate=evaluate, hook=hook, **durations)
    assert resumed.run().step == 12
    assert events == ["evaluation of 10", "step 11", "step 12"]
    assert (resumed.checkpoints.best_step, resumed.checkpoints.metrics(10)) == (10, {"average_mAP": 0.1})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "12"]  # best and latest
    assert best_or_latest(tmp_path) == 10

    result = make_run(tmp_path, parts, evaluate=hundredth, **durations).run()
    assert bits(result.state) == bits(straight[0].state)
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert evaluations(lines) == [(5, 0.05), (10, 0.1), (15, 0.15), (20, 0.2)]
    assert losses(lines) == losses(straight[1])


def test_an_evaluation_that_is_made_up_for_can_be_cut_short_again(tmp_path, parts):
    for _ in range(2):
        result = make_run(tmp_path, parts, evaluate=cut_short_at(2), evaluate_every=2, stop=4).run()
        assert (result.interrupted, result.step, result.metrics) == (True, 2, None)
    assert make_run(tmp_path, parts, evaluate=cut_short_at(-1), evaluate_every=2, stop=4).run().step == 4
    assert evaluations(read_jsonl(tmp_path / "metrics.jsonl")) == [(2, 0.02), (4, 0.04)]


@pytest.mark.parametrize("first", [{}, {"evaluate": cut_short_at(4)}], ids=["in time", "made up for"])
def test_what_was_evaluated_is_not_evaluated_again(tmp_path, parts, first):
    def never(params, step):
        raise AssertionError(f"step {step} was evaluated before")

    durations = {"evaluate_every": 2, "stop": 4}
    make_run(tmp_path, parts, **first, **durations).run()
    made = make_run(tmp_path, parts, **durations).run().metrics
    again = make_run(tmp_path, parts, evaluate=never, **durations).run()
    assert (again.interrupted, again.step, again.metrics) == (False, 4, made)
    stop_5 = durations | {"evaluate_every": 4, "stop": 5}  # goes on behind a step that was evaluated
    with pytest.raises(AssertionError, match="step 5 was evaluated before"):
        make_run(tmp_path, parts, evaluate=never, **stop_5).run()


def test_a_resumed_run_evaluates_no_step_where_none_is_due(tmp_path, parts):
    make_run(tmp_path, parts, hook=signal_in_step(3, signal.SIGTERM), evaluate_every=2, stop=5).run()
    make_run(tmp_path, parts, evaluate_every=2, stop=5).run()
    assert [step for step, _ in evaluations(read_jsonl(tmp_path / "metrics.jsonl"))] == [2, 4, 5]


def test_a_failing_evaluation_does_not_lose_training(tmp_path, parts):
    run = make_run(tmp_path, parts, evaluate=lambda params, step: {"mAP": 0.5}, stop=2)
    with pytest.raises(ConfigError, match=r"'average_mAP' is none of the evaluation's\. Allowed: mAP"):
        run.run()
    assert run.checkpoints.latest_step == 2


def test_evaluation_sees_averaged_parameters_and_the_best_checkpoint_is_kept(tmp_path, parts):
    seen = {}

    def evaluate(params, step):
        seen[step] = np.asarray(params["localizer.head.kernel"])
        return {"average_mAP": 1.0 / (1 + abs(step - 4))}

    run = make_run(tmp_path, parts, evaluate=evaluate, evaluate_every=2, stop=9)
    result = run.run()
    assert list(seen) == [2, 4, 6, 8, 9]
    np.testing.assert_array_equal(seen[9], np.asarray(result.state.ema_params["localizer.head.kernel"]))
    assert (seen[9] != np.asarray(result.state.params["localizer.head.kernel"])).any()
    assert (run.checkpoints.best_step, run.checkpoints.latest_step) == (4, 9)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "9"]


def test_console_has_a_header_a_line_per_step_and_compile_time_apart(tmp_path, parts, caplog):
    caplog.set_level(logging.INFO)
    run = make_run(tmp_path, parts, stop=2)
    run.about = {"data": "40 videos, 2 clipped segments"}
    run.run()
    text = caplog.text
    assert re.search(r"versions: python 3\.\d+\.\d+, jax \d", text)
    assert "devices: 1 x cpu in 1 process(es), mesh data 1 x fsdp 1" in text
    assert "data: 40 videos, 2 clipped segments" in text
    assert "parameters: 130 in 6 arrays, 98 of them trained" in text
    assert f"workdir: {tmp_path}" in text
    assert re.search(r"train step: compiled in \d+\.\d s, plans .* MiB per device", text)
    assert re.search(
        r"step 1/2 \| ETA 00:\d\d:\d\d \| \d+\.\d{3} s/step \| normalizer .* total .* \| grad norm .* \| peak", text
    )


def test_a_new_run_warns_of_an_average_that_is_still_its_start(tmp_path, parts, caplog):
    """The stand-in averages by 0.999: two steps leave 0.998 of the start, and 0.22 ** 2 = 0.048."""
    make_run(tmp_path, parts, stop=2).run()
    said = "still holds 99.8 % of its start after 2 steps (config.optimizer.ema_decay = 0.999): lower it, 0.22 leaves 4"
    assert caplog.text.count(said) == 1
    caplog.clear()
    make_run(tmp_path, parts, stop=3).run()
    assert "of its start" not in caplog.text  # said when the run was new


@pytest.mark.parametrize(
    ("decay", "steps", "advice"),
    [
        (0.999, 300, "74.1 % of its start after 300 steps (config.optimizer.ema_decay = 0.999): lower it, 0.99 leaves"),
        (0.999, 2900, "5.5 % of its start after 2900 steps (config.optimizer.ema_decay = 0.999): lower it, 0.9989 lea"),
        (0.99, 1, "99.0 % of its start after 1 steps (config.optimizer.ema_decay = 0.99): lower it, 0.05 leaves"),
        (0.999, 3500, ""),  # THUMOS-14 as ActionFormer's authors train it
        (0.99, 300, ""),
        (0.0, 1, ""),
    ],
)
def test_the_advice_for_an_average_leaves_a_twentieth_of_its_start(caplog, decay, steps, advice):
    warn_of_start_in_average(decay, steps)
    assert bool(caplog.messages) == bool(advice)
    assert advice in caplog.text


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 100, 299, 300, 1000, 2995, 3000, 123_456, 10_000_000])
def test_the_decay_advised_is_hardly_lower_than_it_need_be(steps):
    assert START_LEFT / 1.4 < decay_that_forgets(steps) ** steps <= START_LEFT


def test_a_second_ctrl_c_leaves_at_once():
    script = """
        import os, signal
        from re2tal_jax.training.interrupt import StopSignals
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself
            print(stop.requested, flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("still here")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "SIGTERM\n")


def test_durations_must_be_possible():
    half = Duration(epochs=0.01)
    config = LoopConfig(stop=Duration(steps=5), evaluate_every=half, checkpoint_every=Duration(epochs=1))
    with pytest.raises(ConfigError, match="are 5, 0 and 5 steps; each must be at least 1"):
        config.in_steps(5)
