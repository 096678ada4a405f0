"""The command line: one real run with all that it leaves, its exact continuation after a kill, and wrong arguments."""

import dataclasses
import importlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from re2tal_jax.activitynet_format import read_activitynet
from re2tal_jax.errors import ConfigError
from re2tal_jax.evaluation import detection_map
from re2tal_jax.experiment import draw_blueprint, resolved_config
from re2tal_jax.main import read_command, without_traceback
from re2tal_jax.settings import read_settings
from re2tal_jax.training.checkpoint import CheckpointConfig, Checkpoints
from re2tal_jax.training.sharding import make_mesh
from tests.system import (
    CLASSES,
    NUM_TRAIN,
    NUM_VALIDATION,
    changed,
    command,
    run_mode,
    run_process,
    tiny_config,
    write_config,
)
from tests.training_stand_in import Hooked, bits, read_jsonl

pytest_plugins = "tests.system_fixtures"

TIMES = ("sec_per_step", "data_sec_per_step", "peak_mib/host_RSS")


def deterministic(lines):
    """What `metrics.jsonl` holds beside times and memory."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def restore(workdir, data, step):
    settings = read_settings(tiny_config(data))
    mesh = make_mesh(settings.mesh, jax.devices()[:1])
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        return checkpoints.restore(draw_blueprint(settings, mesh).spec.abstract, step)


def test_one_command_trains_evaluates_and_leaves_everything(run_folder, finished, tiny_data):
    workdir = run_folder / "run"
    resolved = resolved_config(read_settings(tiny_config(tiny_data)))
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(resolved))
    lines = read_jsonl(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss/total" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "eval/average_mAP" in line] == [10, 20]
    assert next((workdir / "tensorboard").iterdir()).stat().st_size > 1000
    assert (workdir / "checkpoints" / "20").is_dir()
    assert (workdir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in workdir.rglob("*") if "tmp" in path.name or ".write-test" in path.name]

    found = read_activitynet(workdir / "predictions.json", classes=CLASSES)
    assert sorted(found) == [f"validation_{i}" for i in range(NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION)]
    scored = detection_map(
        tiny_data / "annotations.json",
        workdir / "predictions.json",
        subset="validation",
        tiou_thresholds=(0.3, 0.5),
    )
    assert scored.average == lines[-1]["eval/average_mAP"]
    assert str(scored) in finished.out
    assert finished.err == ""


def test_the_header_tells_what_is_run(finished, tiny_data):
    for line in (
        r"training data: 16 videos, 16 segments, 2 classes, 16 windows, 2 batches",
        r"evaluation data: 4 videos, 4 segments, 2 classes, 4 windows, 1 batches",
        r"parameters: 4,204 in 80 arrays, 4,204 of them trained",
        r"devices: 1 x cpu in 1 process\(es\), mesh data 1 x fsdp 1",
        r"train step: compiled in .* MiB per device",
    ):
        assert re.search(line, finished.out), line


@pytest.mark.parametrize("step", ["train_step", "eval_step"])
def test_a_step_is_compiled_once_in_a_run_with_several_evaluations(finished, step):
    assert finished.out.count(f"Finished XLA compilation of jit({step}) ") == 1


def test_ten_steps_then_kill_then_the_same_command_equal_twenty_steps(
    tmp_path, run_folder, finished, tiny_data, compiled
):
    workdir, config = tmp_path / "run", run_folder / "tiny.py"
    arguments = command("--config", config, "--workdir", workdir)
    killed = [sys.executable, "-c", "import tests.system; tests.system.main_killed_in_step(13, '10')", *arguments[3:]]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
    assert run_process(killed, **cache).code == -signal.SIGKILL
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()) == 10

    resumed = run_process(arguments, **cache)
    assert resumed.code == 0, resumed.err
    assert "start: resumed at step 10 of 20" in resumed.out
    straight = restore(shutil.copytree(run_folder / "run", tmp_path / "straight"), tiny_data, 20)
    continued = restore(workdir, tiny_data, 20)
    assert bits(continued.state) == bits(straight.state)  # parameters, average, optimizer, normaliser
    assert (continued.data, continued.metrics) == (straight.data, straight.metrics)
    lines, straight_lines = (read_jsonl(path / "metrics.jsonl") for path in (workdir, run_folder / "run"))
    assert deterministic(lines) == deterministic(straight_lines)  # every loss: the same videos, mirrored alike
    predictions = "predictions.json"
    assert (workdir / predictions).read_bytes() == (run_folder / "run" / predictions).read_bytes()

    assert resumed.err == ""
    unusual = [
        line for line in resumed.out.splitlines() if not re.match(r"\d\d(:\d\d){2} |tIoU |mAP |recall|writ", line)
    ]
    assert unusual == []
    assert "warn" not in resumed.out.lower()


@pytest.mark.usefixtures("compiled_once")
def test_a_stopped_run_names_the_step_of_its_table_and_calls_none_better_than_what_it_did_not_evaluate(
    tmp_path, config, monkeypatch, caplog
):
    """Evaluations at steps 2, 4 and 6, of which the earlier are better; a signal in step 4 comes before its own."""
    caplog.set_level("INFO")
    config = changed(config, loop__evaluate_every__steps=2)
    module = importlib.import_module("re2tal_jax.modes.train")  # the package's attribute is the function
    make = module.make_train_step

    class Falling(module.Evaluator):
        def __call__(self, params, step=None, *, final=False):
            table = super().__call__(params, step, final=final)
            return dataclasses.replace(table, per_class={name: np.full(2, 1 / step) for name in table.per_class})

    def signal_in_step_4(finished):
        if finished == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "Evaluator", Falling)
    with monkeypatch.context() as patch:
        patch.setattr(module, "make_train_step", lambda *args: Hooked(make(*args), signal_in_step_4))
        result = run_mode("train", config, tmp_path)
    assert (result.interrupted, result.step, result.metrics) == (True, 4, None)
    assert "step 2, validation: 4 ground-truth segments of 2 classes" in caplog.text
    assert "step 4 was not evaluated; of those that were, step 2 is the best: --mode eval takes it." in caplog.text
    assert "was better" not in caplog.text
    assert "report.html" not in caplog.text  # the last evaluation alone writes it

    caplog.clear()
    assert run_mode("train", config, tmp_path).step == 6
    assert "step 6, validation: 4 ground-truth segments of 2 classes" in caplog.text
    assert "step 2 was better: it is kept, and --mode eval takes it." in caplog.text
    assert "not evaluated" not in caplog.text
    assert f"{tmp_path / 'report.png'}, {tmp_path / 'report.html'}\n" in caplog.text
    evaluated = [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl") if "eval/average_mAP" in line]
    assert evaluated == [2, 4, 6]


def test_another_process_evaluates_the_run_on_other_devices(tmp_path, run_folder, finished, compiled):
    workdir = shutil.copytree(run_folder / "run", tmp_path / "run")
    arguments = command("--workdir", workdir, "--mode", "eval")  # with the run's own config
    devices = ["--config.mesh.cpu_devices=2", "--config.mesh.data=2"]
    done = run_process([*arguments, *devices], JAX_COMPILATION_CACHE_DIR=str(compiled))
    assert (done.code, done.err) == (0, "")
    best = max(line.get("eval/average_mAP", 0.0) for line in read_jsonl(workdir / "metrics.jsonl"))
    found = float(re.search(r"mAP \(%\) .* ([\d.]+)\n", done.out)[1])
    assert found == pytest.approx(100 * best, abs=1.0)  # other sums, other roundings of scores to 4 decimals


@pytest.mark.parametrize("name", ["jax._src.xla_bridge", "re2tal_jax.data", "jaxtyping"])
def test_a_traceback_of_jax_becomes_a_line_and_others_stay(name, caplog):
    with caplog.filtering(without_traceback):
        try:
            raise RuntimeError("no CUDA here")
        except RuntimeError:
            logging.getLogger(name).exception("plugin %s failed", "cuda12")
    of_jax = name.startswith("jax.")
    assert caplog.messages == ["plugin cuda12 failed" + (": no CUDA here" if of_jax else "")]
    assert ("Traceback" in caplog.text) is not of_jax


def test_both_ways_to_write_an_override_are_read_and_typed(tmp_path, tiny_data):
    config = write_config(tmp_path / "tiny.py", tiny_config(tiny_data))
    read = read_command(
        [
            *("--mode=inspect", "--config", str(config), "--config.seed=5", "--config.loop.stop", "{'epochs': 2}"),
            *("--config.backbone.depths=(1,)", "--config.backbone.rewired=false", "--config.mesh.data", "-1"),
            *("--config.backbone.checkpoint=/a/run", "--config.train.subset=2024", "--config.train.mirror=None"),
            *("--config.optimizer.clip_norm=None", "--config.backbone.mlp_ratio=2"),
        ]
    )
    assert (read.mode, str(read.workdir), read.options) == ("inspect", "runs/tiny", {})
    settings = read_settings(read.config)
    assert (settings.seed, settings.mesh.data, settings.optimizer.clip_norm) == (5, -1, None)
    assert (settings.loop.stop.epochs, settings.loop.stop.steps) == (2, None)
    assert settings.train.subset == "2024"
    assert settings.train.mirror is None
    wanted = {"depths": (1,), "rewired": False, "checkpoint": "/a/run", "mlp_ratio": 2}
    assert wanted.items() <= settings.backbone.items()


def test_a_mode_gets_the_arguments_that_are_its_own(tmp_path, tiny_data):
    config = write_config(tmp_path / "tiny.py", tiny_config(tiny_data))
    read = read_command(
        ["--config", str(config), "--mode", "inspect", "--target=v5e:2x2", "--fit", "frames", "--plain"]
    )
    assert read.options == {"target": "v5e:2x2", "fit": "frames", "plain": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "train"], "--config is missing, and {folder}/run is no folder of a run (it has no config.json)"),
        (["--config"], "expected one argument"),
        (["--config", "{folder}/tony.py"], "tony.py does not exist. Did you mean '{folder}/tiny.py'"),
        (["--config", "{config}", "--mode", "evl"], "Unknown mode 'evl'. Did you mean 'eval'?"),
        (["--config", "{config}", "--workdri", "x"], "Unknown argument '--workdri'. Did you mean '--workdir'"),
        (["--config", "{config}", "more"], "Unknown argument 'more'."),
        (["--config", "{config}", "--target", "h100"], "--target belongs to --mode inspect; the mode is 'train'."),
        (["--config", "{config}", "--mode", "inspect", "--target", "h10"], "Unknown target 'h10'. Did you mean 'h100'"),
        (["--config", "{config}", "--mode", "inspect", "--fit", "frame"], "'frame' is no quantity. Did you mean 'fra"),
        (["--config", "{config}", "--config.seed"], "--config.seed has no value"),
        (["--config", "{config}", "--config.sed=1"], "Unknown key config.sed. Did you mean 'seed'?"),
        (["--config", "{config}", "--config.bakbone.depths=1"], "Unknown key config.bakbone. Did you mean 'backbone'?"),
        (["--config", "{config}", "--config.backbone.deths=(1,)"], "Unknown key config.backbone.deths. Did you mean"),
        (["--config", "{config}", "--config.data.video=x"], "Unknown key config.data.video. Did you mean 'videos'"),
        (["--config", "{config}", "--config.seed.x=1"], "config.seed is 3, which has no keys"),
        (["--config", "{config}", "--config.seed=one"], "config.seed = 'one' has type str; expected int."),
        (["--config", "{config}", "--config.mesh.data=2.5"], "config.mesh.data = 2.5 has type float; expected int."),
    ],
)
def test_a_wrong_command_line_is_answered_by_one_message(tmp_path, tiny_data, run_main, arguments, message):
    config = write_config(tmp_path / "tiny.py", tiny_config(tiny_data, data_devices=8))
    places = {"folder": tmp_path, "config": config}
    done = run_main(*(word.format(**places) for word in arguments), "--workdir", tmp_path / "run")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("\nConfigError: ")
    assert message.format(**places) in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_an_interrupt_leaves_the_end_of_the_process_to_the_system(run_folder, finished, tmp_path):
    """XLA may still be compiling, and would crash in Python's own end, of which exit handlers are a part."""
    script = """
        import atexit, sys
        from re2tal_jax import main
        from re2tal_jax.inference import detect

        def interrupted(array):
            raise KeyboardInterrupt

        detect._whole = interrupted
        atexit.register(print, "Python ended")
        main.run()
    """
    arguments = ["--workdir", str(run_folder / "run"), "--mode", "predict", "--out", str(tmp_path)]
    done = run_process([sys.executable, "-c", textwrap.dedent(script), *arguments])
    assert (done.code, done.err) == (130, "\ninterrupted\n")
    assert "stopped: 0 of 4 videos are finished and kept; the same command goes on from there." in done.out
    assert "Python ended" not in done.out


@pytest.mark.parametrize("place", [["--workdir"], ["--mode", "predict", "--checkpoint"]])
def test_without_a_config_file_the_run_says_what_it_is(run_folder, finished, tiny_data, place):
    run = run_folder / "run"
    read = read_command([*place, str(run), "--config.eval.batch_size=4"])
    wanted = changed(tiny_config(tiny_data), eval__batch_size=4)
    assert resolved_config(read_settings(read.config)) == resolved_config(read_settings(wanted))
    assert read.workdir == (run if place[0] == "--workdir" else Path("runs/run"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "config.json cannot be read (Expecting"), ("[]", "config.json is no config of a run: name a config file")],
)
def test_a_damaged_config_of_a_run_is_told(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_command(["--workdir", str(tmp_path)])


def test_a_command_without_config_and_folder_is_told():
    with pytest.raises(ConfigError, match=r"--config is missing: name a config file.* or with --workdir the folder"):
        read_command(["--mode", "eval"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return 1 / 0\n", "fails at line 2: ZeroDivisionError: division by zero"),
        ("def get_config(:\n", "fails at line 1: SyntaxError"),
        ("import nowhere_to_be_found\n", "fails at line 1: ModuleNotFoundError"),
        ("CONFIG = {}\n", "has no function get_config that returns a ConfigDict"),
        ("def get_config():\n    pass\n", "has no function get_config that returns a ConfigDict, but None"),
        ("def get_config():\n    return {'seed': 1}\n", "config lacks compute_dtype, num_snippets,"),
        ("def get_config():\n    return {'seeed': 1}\n", "Unknown key config.seeed. Did you mean 'seed'?"),
        ("def get_config():\n    return {'seed': print}\n", "config.seed = <built-in function print> has type"),
    ],
)
def test_a_config_file_that_fails_is_answered_by_one_message(tmp_path, run_main, text, message):
    config = tmp_path / "broken.py"
    config.write_text(text)
    done = run_main("--config", config, "--workdir", tmp_path / "run")
    assert done.code == 1
    assert message in done.err
    assert "Traceback" not in done.err


def test_help_shows_how_to_call_it(run_main, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_main("--help")
    assert exit_.value.code == 0
    assert "--config.section.key" in capsys.readouterr().out
