"""benchmarks.against_pytorch with stand-ins for the workers: contestants, figures, and what users are told."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import conductor
from benchmarks.against_pytorch import (
    choose_device,
    greet,
    main,
    make_contestants,
    random_parameters,
    ratios,
    rows,
    table,
    their_names,
)
from benchmarks.conductor import Contestant, Measured, started
from benchmarks.opentad_worker import BACKBONE
from benchmarks.rows import ROOT, append_rows, commit
from checkpoints_convert.networks import Network
from checkpoints_convert.rules import fill
from re2tal_jax.backbones import build_backbone
from re2tal_jax.errors import ConfigError
from re2tal_jax.reversible import REWIRED, rewire
from tests import quick

pytest_plugins = "tests.worker_stand_in"


def test_figures_of_every_contestant_and_the_ratios_that_matter(tmp_path):
    contestants = [
        Contestant("theirs", ours=False, rewired=True, command=()),
        Contestant("mine plain", ours=True, rewired=False, command=()),
        Contestant("mine", ours=True, rewired=True, command=()),
        Contestant("gone", ours=False, rewired=True, command=()),
    ]
    mib = 2**20
    measured = {
        "theirs": Measured([4.0, 6.0, 5.0], 100 * mib, 400 * mib),
        "mine plain": Measured([8.0], 50 * mib, 800 * mib),
        "mine": Measured([2.0, 4.5], 50 * mib, 200 * mib),
    }
    assert dict(ratios(contestants, measured)) == {
        "mine / theirs, fastest step": 0.5,
        "mine / theirs, lower quartile of rounds": 0.5625,
        "mine / theirs, median of rounds": 0.625,
        "mine / theirs, upper quartile of rounds": 0.6875,
        "mine / theirs, peak memory": 0.5,
        "mine / mine plain, fastest step": 0.25,
        "mine / mine plain, lower quartile of rounds": 0.25,
        "mine / mine plain, median of rounds": 0.25,
        "mine / mine plain, upper quartile of rounds": 0.25,
        "mine / mine plain, peak memory": 0.25,
    }
    assert [line.split() for line in table(measured).splitlines()][1] == ["theirs", "4.000", "5.000", "400", "300", "-"]
    path = tmp_path / "results.csv"
    append_rows(path, rows("here", contestants, measured), packages=("numpy",), others={"torch": "2.13.0"})
    text = path.read_text()
    versions = f"numpy {np.__version__}, torch 2.13.0, re2tal_jax {commit(ROOT)}"
    assert f'{versions}",against PyTorch,"here: theirs, fastest step",4,s\n' in text
    assert '"here: mine / theirs, peak memory",0.5,\n' in text


def test_figures_are_kept_without_git_and_outside_a_checkout(tmp_path, monkeypatch):
    assert commit(tmp_path) == "of unknown version"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(ROOT) == "of unknown version"


def test_a_missing_package_is_named_with_what_to_do(make_contestant, tmp_path, monkeypatch):
    command = (*make_contestant("", ours=False).command, "absent")
    monkeypatch.setenv("PYTHONPATH", str(conductor.ROOT))
    with pytest.raises(ConfigError, match=r"some-python has no module a_package_that_is_not_there.*--python"):
        greet({False: command}, "some-python", tmp_path)


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "OpenTAD" / BACKBONE).parent.mkdir(parents=True)
    (tmp_path / "OpenTAD" / BACKBONE).write_text("import a_package_that_is_not_there\n")
    return tmp_path / "OpenTAD"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--python", "no-such-python"], "--python no-such-python is no program"),
        (["--model", "video_swin_tinny"], "Did you mean 'video_swin_tiny'"),
        (["--model", "vit_base"], "has no counterpart"),
        (["--frames", "0"], "--frames 0: allowed is 1 or more"),
        (["--workspace", "5", "5"], "different numbers"),
        (["--threads", "100000"], "--threads 100000: allowed are up to"),
    ],
)
def test_options_that_cannot_be_run_are_told(checkout, capsys, arguments, told):
    assert main(["--opentad", str(checkout), *arguments]) == 1
    assert told in capsys.readouterr().err


def test_a_folder_that_is_no_checkout_is_told(tmp_path, capsys):
    assert main(["--opentad", str(tmp_path)]) == 1
    assert f"{tmp_path} has no {BACKBONE}: it is no checkout of OpenTAD" in capsys.readouterr().err


def test_a_gpu_is_used_where_both_sides_see_one(capsys):
    assert choose_device("auto", {False: "H100", True: "H100"}) == "gpu"
    assert choose_device("cpu", {False: "H100", True: "H100"}) == "cpu"
    assert choose_device("auto", {False: "H100", True: None}) == "cpu"
    assert "PyTorch sees H100, JAX sees none" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="PyTorch sees none, JAX sees H100"):
        choose_device("gpu", {False: None, True: "H100"})


TINY = {"embed_dim": 8, "depths": (1,), "num_heads": (1,), "window_size": (2, 2, 2)}


def test_our_worker_computes_the_network_and_its_gradients(tmp_path):
    """What it writes are features and gradients of exactly the network, weights and clip that it was given."""
    network = Network("video_swin_tiny", {"backbone": {"name": "video_swin_tiny", **TINY}}, whole=False)
    params = random_parameters(network.shapes)
    clip = np.random.default_rng(0).normal(size=(1, 6, 8, 8, 3)).astype(np.float32)
    np.savez(tmp_path / "weights.npz", **params)
    np.save(tmp_path / "clip.npy", clip)
    command = (sys.executable, "-m", "benchmarks.our_worker")
    environment = {"JAX_PLATFORMS": "cpu", **quick.environment(devices=1)}
    contestant = Contestant("mine", ours=True, rewired=True, command=command, environment=environment)
    files = {"weights": str(tmp_path / "weights.npz"), "video": str(tmp_path / "clip.npy")}
    with started(contestant, tmp_path) as worker:
        network_arguments = {"name": "video_swin_tiny", **TINY}
        worker.ask("build", mode="rewired", network=network_arguments, device="cpu", threads=1, **files)
        worker.ask("check", frames=4, out=str(tmp_path / "out.npz"))
        assert worker.ask("step")["seconds"] > 0
    model = fill(build_backbone("video_swin_tiny", **TINY), params)
    features = rewire(model, REWIRED.twin)(jnp.asarray(clip[:, :4]))
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["features"], features, rtol=1e-4, atol=1e-5)
        assert {f"gradient {path}" for path in params} == set(found.files) - {"features"}
        assert all(np.abs(found[name]).max() > 0 for name in found.files)


def test_contestants_have_the_same_weights_under_their_own_names(tmp_path):
    options = SimpleNamespace(
        frames=4, size=8, threads=1, workspace=[1024, 2048], stored_blocks=[0, 1], model="video_swin_tiny"
    )
    network = Network("video_swin_tiny", {"backbone": {"name": "video_swin_tiny", **TINY}}, whole=False)
    contestants = make_contestants(options, network, "cpu", {False: ("theirs",), True: ("mine",)}, tmp_path)
    assert [c.title for c in contestants] == [
        "OpenTAD plain",
        "OpenTAD checkpointed",
        "OpenTAD reversible",
        "ours plain",
        "ours rewired (workspace 1024, stored_blocks 0)",
        "ours rewired (workspace 1024, stored_blocks 1)",
        "ours rewired (workspace 2048, stored_blocks 0)",
        "ours rewired (workspace 2048, stored_blocks 1)",
    ]
    assert contestants[2].build["network"] == {
        "embed_dim": 8,
        "depths": [1],
        "num_heads": [1],
        "patch_size": [2, 4, 4],
        "window_size": [2, 2, 2],
        "mlp_ratio": 4.0,
    }
    with np.load(contestants[3].build["weights"]) as ours:
        params = dict(ours)
    for contestant, key in ((contestants[0], "attn.qkv"), (contestants[2], "inv_block.Fm.attn.qkv")):
        with np.load(contestant.build["weights"]) as theirs:
            name = f"layers.0.blocks.0.{key}.weight"
            np.testing.assert_array_equal(theirs[name], params["stages.0.blocks.0.attn.qkv.kernel"].T)
            assert their_names(network, contestant, params).keys() <= set(theirs.files)
