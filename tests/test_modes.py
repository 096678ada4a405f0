"""Modes as functions on eight devices, parameters sharded: what they reproduce, survive, refuse, and leave alone."""

import dataclasses
import importlib
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert.__main__ import main as convert
from re2tal_jax.errors import CheckpointError, ConfigError
from re2tal_jax.experiment import draw_blueprint
from re2tal_jax.modes import MODES
from re2tal_jax.settings import read_settings
from re2tal_jax.training.checkpoint import best_or_latest, load_params
from re2tal_jax.training.loop import NonFiniteError
from re2tal_jax.training.sharding import make_mesh
from tests.system import ROOT, STEPS, changed, once
from tests.training_stand_in import Hooked, read_jsonl

pytest_plugins = "tests.system_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once")


def run_mode(mode, config, workdir):
    return MODES[mode](read_settings(config), config, workdir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config, compiled_once):
    """Workdir of the six steps; not to be changed."""
    return once(tmp_path_factory, "trained", lambda folder: run_mode("train", config, folder))


@pytest.fixture
def copied(trained, tmp_path):
    """That workdir, moved elsewhere."""
    return Path(shutil.copytree(trained, tmp_path / "elsewhere" / "run"))


def content(workdir):
    """Every file with what it holds."""
    return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def losses(workdir):
    lines = read_jsonl(workdir / "metrics.jsonl")
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


def test_losses_on_eight_devices_equal_those_on_one(run_folder, finished, trained, config):
    settings = read_settings(config)
    spec = draw_blueprint(settings, make_mesh(settings.mesh, jax.devices())).spec
    sharded = [path for path, where in spec.shardings.params.items() if not where.is_fully_replicated]
    assert len(sharded) == 20
    assert any("backbone.stages.0.blocks.0.attn" in path for path in sharded)
    one, eight = losses(run_folder / "run"), losses(trained)
    assert len(eight) == STEPS
    for step, loss in eight.items():
        np.testing.assert_allclose(loss, one[step], rtol=2e-5)


def test_eval_reproduces_what_training_printed_from_a_workdir_that_was_moved(copied, trained, config, caplog):
    for name in ("predictions.json", "report.png"):
        (copied / name).unlink()
    shutil.rmtree(copied / "tensorboard")
    caplog.set_level("INFO")
    run_mode("eval", config, copied)
    assert f"evaluating step {STEPS} of {copied}" in caplog.text
    assert (copied / "predictions.json").read_bytes() == (trained / "predictions.json").read_bytes()
    assert (copied / "report.png").is_file()
    mean = read_jsonl(trained / "metrics.jsonl")[-1]["eval/average_mAP"]
    assert re.search(rf"mAP \(%\) .* {100 * mean:.2f}\n", caplog.text)
    assert str(trained) not in (copied / "config.json").read_text()


def test_a_finished_run_says_so_and_changes_nothing(copied, config, caplog):
    caplog.set_level("INFO")
    before = content(copied)
    result = run_mode("train", config, copied)
    assert (result.step, result.interrupted) == (STEPS, False)
    assert f"this run was finished before, at step {STEPS}: average mAP 0." in caplog.text
    assert "train step" not in caplog.text
    after = content(copied)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_another_architecture_is_refused_and_changes_nothing(copied, config, mode):
    before = content(copied)
    with pytest.raises(CheckpointError, match=r"patch_embed\.proj\.kernel has .*1, 4, 4, 3, 8\).*1, 4, 4, 3, 16"):
        run_mode(mode, changed(config, backbone__embed_dim=16), copied)
    assert content(copied) == before


def test_evaluation_without_a_checkpoint_is_refused_and_makes_no_folder(tmp_path, config):
    with pytest.raises(CheckpointError, match="nowhere is no folder: give a run's workdir"):
        run_mode("eval", config, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run_mode("eval", config, tmp_path)


def test_a_workdir_that_cannot_be_written_is_refused_before_data_are_read(tmp_path, config):
    (tmp_path / "file").write_text("")
    without_data = changed(config, data__annotations=str(tmp_path / "missing.json"))
    with pytest.raises(ConfigError, match=r"workdir .*file/run cannot be written \(Not a directory\)"):
        run_mode("train", without_data, tmp_path / "file" / "run")


class Poisoned(Hooked):
    """A train step that finds a parameter NaN when so many steps are finished."""

    def __init__(self, step, finished):
        super().__init__(step, lambda _: None)
        self.finished = finished

    def __call__(self, state, *args):
        if int(state.step) == self.finished:
            name = "backbone.norm.bias"
            state = dataclasses.replace(state, params=state.params | {name: state.params[name] * jnp.nan})
        return super().__call__(state, *args)


@pytest.fixture
def train_module():
    return importlib.import_module("re2tal_jax.modes.train")  # the package's attribute is the function


def test_nan_names_step_and_videos_and_the_last_checkpoint_is_good(copied, config, train_module, monkeypatch):
    config = changed(config, loop__stop__steps=STEPS + 4)
    make = train_module.make_train_step
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "make_train_step", lambda *args: Poisoned(make(*args), STEPS + 2))
        with pytest.raises(NonFiniteError) as error:
            run_mode("train", config, copied)
    text = str(error.value)
    assert f"step {STEPS + 3} is not finite: " in text
    assert len(set(re.findall(r"training_\d+", text))) == 8
    assert f"the latest saved is step {STEPS + 2}" in text
    assert best_or_latest(copied) == STEPS  # the one that was evaluated
    good = load_params(copied, "raw", step=STEPS + 2)
    assert all(np.isfinite(value).all() for value in good.values())

    assert run_mode("train", config, copied).step == STEPS + 4
    assert np.isfinite(list(losses(copied).values())).all()


def test_ctrl_c_during_evaluation_saves_and_the_same_command_makes_up_for_it(copied, config, monkeypatch, caplog):
    config = changed(config, loop__stop__steps=STEPS + 1)
    module = importlib.import_module("re2tal_jax.inference.detect")
    postprocess = module.postprocess

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return postprocess(*args, **kwargs)

    before = (copied / "predictions.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "postprocess", interrupted)
        result = run_mode("train", config, copied)
    assert (result.interrupted, result.step, result.metrics) == (True, STEPS + 1, None)
    assert "run the same command again" in caplog.text
    assert (copied / "predictions.json").read_bytes() == before
    result = run_mode("train", config, copied)
    assert (result.interrupted, result.step) == (False, STEPS + 1)
    assert result.metrics["average_mAP"] == read_jsonl(copied / "metrics.jsonl")[-1]["eval/average_mAP"]


def test_training_starts_from_the_backbone_of_another_run(tmp_path, trained, config):
    """The first step of the warm-up has learning rate 0: after it parameters are those of the start."""
    config = changed(config, backbone__checkpoint=str(trained), loop__stop__steps=1)
    run_mode("train", config, tmp_path)
    given, started = load_params(trained, "ema"), load_params(tmp_path, "raw")
    differ = {path for path in given if not np.array_equal(started[path], given[path])}
    assert {path.split(".")[0] for path in differ} == {"localizer", "snippet_head"}


def test_a_converted_backbone_trains_and_a_converted_detector_is_evaluated(tmp_path, trained, config, caplog):
    """A run's parameters, written as PyTorch's and converted back, give what the run gave."""
    (tmp_path / "config.py").write_text(f"def get_config():\n    return {config!r}\n")
    export = [str(trained), "--to", "torch", "--dialect", "re2tal", "--out", str(tmp_path / "run.safetensors")]
    assert convert(export) == 0
    source, model = str(tmp_path / "run.safetensors"), str(tmp_path / "config.py")
    assert convert([source, "--model", model, "--out", str(tmp_path / "converted")]) == 0
    caplog.set_level("INFO")
    run_mode("eval", config, tmp_path / "converted")
    predictions = (tmp_path / "converted" / "predictions.json").read_bytes()
    assert predictions == (trained / "predictions.json").read_bytes()
    started = changed(config, backbone__checkpoint=str(tmp_path / "converted"), loop__stop__steps=1)
    run_mode("train", started, tmp_path / "run")
    given, after = load_params(trained, "ema"), load_params(tmp_path / "run", "raw")
    differ = {path for path in given if not np.array_equal(after[path], given[path])}
    assert {path.split(".")[0] for path in differ} == {"localizer", "snippet_head"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "{tmp}/nowhere"}, "nowhere' is no folder"),
        ({"checkpoint": "{trained}", "embed_dim": 16}, "holds another backbone.*qkv.kernel has shape"),
        ({"checkpoint": "{trained}", "depths": (4,)}, "holds another backbone.*It lacks 26 parameters"),
        (
            {"checkpoint": "{trained}", "depths": (1,)},
            r"holds another backbone.*blocks\.1.* is no parameter",
        ),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_before_data_are_read(tmp_path, trained, config, changes, message):
    changes = {k: v.format(tmp=tmp_path, trained=trained) if k == "checkpoint" else v for k, v in changes.items()}
    config = changed(config, data__annotations="missing.json", **{f"backbone__{k}": v for k, v in changes.items()})
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        run_mode("train", config, tmp_path / "run")


def test_inspect_reports_on_a_config_without_data(tmp_path, run_main, monkeypatch):
    """The demo's config, made small, on one device; nothing is written."""
    monkeypatch.chdir(tmp_path)
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    small = {
        "num_snippets": 8,
        "frames_per_snippet": 1,
        "train.batch_size": 2,
        "eval.batch_size": 2,
        "backbone.patch_size": (1, 8, 8),
        "backbone.embed_dim": 8,
        "backbone.depths": (1,),
        "backbone.num_heads": (2,),
        "backbone.window_size": (2, 2, 2),
        "localizer.channels": 8,
        "localizer.arch": (0, 0, 0),
        "localizer.head_convs": 1,
        "localizer.path_drop_rate": 0.0,
        "localizer.max_seq_len": 8,
        "localizer.regression_range": ((0, 10000),),
        "parameter_groups.freeze_backbone_norms": True,
        "parameter_groups.backbone_lr": 0.002,
        "mesh.cpu_devices": 1,
    }
    overrides = [f"--config.{key}={value}" for key, value in small.items()]
    done = run_main("--mode", "inspect", "--plain", "--config", ROOT / "configs" / "demo.py", *overrides)
    assert (done.code, done.err) == (0, "")
    for line in (
        r"  config\.backbone\.embed_dim = 8",
        r"devices: 1 x cpu in 1 process\(es\), mesh data 1 x fsdp 1",
        r"  backbone\.stages +[\d,]+",
        r"  backbone\.patch_embed\.norm\.scale +\(8,\) +backbone_norms +frozen",
        r"  backbone\.stages\.0\.blocks\.0\.mlp\.fc1\.kernel +\(8, 32\) +backbone +lr 0\.002, weight decay 0\.05",
        r"  layer0 +float32 +\(2, 8, 4, 4, 8\)",
        r"  snippet features +float32 +\(2, 8, 8\)",
        r"  proposals +float32 +\(2, 8, 2\)",
        r"  reversible +[\d.,]+ MiB per device \(arguments .*\); compiled in \d+ s",
        r"  plain +[\d.,]+ MiB per device",
        r"  +fits: \d+\.\d % of the [\d,]+\.\d MiB of a device",
        r"  +[\d.,]+ MiB  u8\[2,8,32,32,3\] +batch\.video",
    ):
        assert re.search(line, done.out), line
    table = re.match(r"(  .*\n)+", done.out.partition("shapes:\n")[2])[0]
    shapes = [line.split()[0] for line in table.splitlines()]
    assert shapes == ["video", "patch_embed", "layer0", "snippet", "proposals", "scores"]
    assert done.out.count(" group backbone ") == 1
    assert list(tmp_path.iterdir()) == []
