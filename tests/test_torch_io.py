"""The weights in a checkpoint: which are chosen, written and read again, in shards and by torch."""

import contextlib
import datetime
import json
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoints_convert.torch_io import choose_state_dict, read, state_dicts, write
from re2tal_jax.errors import CheckpointError
from re2tal_jax.torch_files import Placeholder, Tensor
from tests.pickles import EXPECTED, assert_same, torch_bytes


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


# Choosing the weights.


def leaf(value: float = 0.0) -> Tensor:
    return Tensor((1,), "float32", lambda: np.array([value], np.float32))


PLAIN, AVERAGED = {"a": leaf(), "b": leaf()}, {"a": leaf(), "b": leaf()}
ADAM = {"state": {0: {"exp_avg": leaf()}, "a": {"exp_avg": leaf(), "exp_avg_sq": leaf()}}, "param_groups": []}


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        (PLAIN, ""),
        ({"state_dict": PLAIN, "meta": Placeholder("x.Y")}, "state_dict"),
        ({"state_dict": PLAIN, "state_dict_ema": AVERAGED, "optimizer": ADAM}, "state_dict_ema"),
        ({"model": PLAIN, "optimizer": ADAM}, "model"),
        ({"model_state": PLAIN, "optimizer_state": ADAM}, "model_state"),
        ({"model": PLAIN, "ema": {"module": AVERAGED, "decay": 0.9}}, "ema.module"),
        ({"state_dict": PLAIN, "ema_state_dict": AVERAGED}, "ema_state_dict"),
        ({"state_dict": AVERAGED, "ema_state_dict": {"steps": leaf(), "module.a": leaf()}}, "state_dict"),
        ({"weights": PLAIN, "log": {"loss": Placeholder("numpy._core.multiarray.scalar")}}, "weights"),
        ({"weights": PLAIN, "momentum": {"a": {"momentum_buffer": leaf()}}}, "weights"),
    ],
)
def test_averaged_weights_are_preferred_and_optimizers_never_chosen(tree, wanted):
    path, _ = choose_state_dict(tree)
    assert path == wanted


def test_a_state_dict_can_be_named():
    tree = {"student": PLAIN, "teacher": AVERAGED, "optimizer": ADAM}
    assert choose_state_dict(tree, "teacher") == ("teacher", AVERAGED)
    with pytest.raises(CheckpointError, match=r"'student', 'teacher'. Say which one: --state-dict NAME"):
        choose_state_dict(tree)
    with pytest.raises(CheckpointError, match="Did you mean 'teacher'"):
        choose_state_dict(tree, "techer")
    with pytest.raises(CheckpointError, match=r"There is no state dict 'optimizer.state.a'"):
        choose_state_dict(tree, "optimizer.state.a")


def test_state_dicts_are_found_three_levels_deep_and_hold_tensors_alone():
    nested = {"a": {"b": {"c": {"w": leaf(), "v": leaf(), "step": 1}, "d": {"e": {"w": leaf()}}}}}
    assert {path: list(found) for path, found in state_dicts(nested).items()} == {"a.b.c": ["w", "v"]}


def test_a_file_without_weights_says_what_it_holds():
    with pytest.raises(CheckpointError, match="a dict of epoch, lr"):
        choose_state_dict({"epoch": 1, "lr": 0.1})
    with pytest.raises(CheckpointError, match=r"an object of lab\.Net"):
        choose_state_dict(Placeholder("lab.Net"))


def test_a_dict_that_holds_itself_is_looked_into_once():
    tree = {str(i): None for i in range(1000)}
    tree.update(dict.fromkeys(tree, tree), model=PLAIN)
    assert choose_state_dict(tree) == ("model", PLAIN)


@pytest.mark.parametrize("name", ["torch._utils._rebuild_qtensor", "numpy.core.multiarray._reconstruct"])
def test_a_tensor_that_is_not_read_is_not_lost_in_silence(name):
    with pytest.raises(CheckpointError, match="b is an array that is not read"):
        choose_state_dict({"a": leaf(), "b": Placeholder(name), "c": leaf()})


@pytest.mark.torch
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_trainers_checkpoint_gives_its_weights(is_zip, torch, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "meta": {"time": datetime.datetime(2020, 1, 1), "device": torch.device("cpu"), "dtype": torch.float32},
        "loss": np.float64(0.5),
        "size": torch.Size([1, 2]),
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    source = read(tmp_path / "a.pth")
    path, found = choose_state_dict(source.tree)
    assert path == "state_dict"
    assert {key: value.array().tobytes() for key, value in found.items()} == {
        key: torch_bytes(value) for key, value in model.state_dict().items()
    }
    moment = source.tree["optimizer"]["state"][0]["exp_avg"].array()
    assert moment.tobytes() == torch_bytes(optimizer.state_dict()["state"][0]["exp_avg"])
    assert "datetime.datetime" in source.placeholders
    assert (source.tree["size"], source.tree["meta"]["dtype"]) == ((1, 2), "torch.float32")


@pytest.mark.torch
def test_special_tensors_are_named_not_misread(torch, tmp_path):
    sparse = torch.eye(2).to_sparse()
    torch.save({"a": torch.ones(2), "b": sparse}, tmp_path / "sparse.pth")
    source = read(tmp_path / "sparse.pth")
    assert "torch._utils._rebuild_sparse_tensor" in source.placeholders
    with pytest.raises(CheckpointError, match="b is an array that is not read"):
        choose_state_dict(source.tree)
    torch.save({"a": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "conj.pth")
    with pytest.raises(CheckpointError, match=r"near .*conjugated"):
        read(tmp_path / "conj.pth")


# Writing.


def test_safetensors_are_written_and_read_bit_for_bit_with_the_same_bytes_every_time(tmp_path):
    write(tmp_path / "a.safetensors", EXPECTED)
    write(tmp_path / "b.safetensors", dict(reversed(EXPECTED.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    source = read(tmp_path / "a.safetensors")
    assert source.tree.keys() == EXPECTED.keys()
    for key, wanted in EXPECTED.items():
        assert_same(source.tree[key].array(), wanted)


def test_an_existing_file_stays_unless_it_may_be_overwritten(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        write(path, EXPECTED)
    assert path.read_text() == "mine"
    write(path, EXPECTED, overwrite=True)
    assert read(path).format == "safetensors"


@contextlib.contextmanager
def room_for(size: int):
    """The system refuses to make a file longer, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".pth", marks=pytest.mark.torch)])
def test_a_full_disk_leaves_no_file_and_the_old_one_as_it_was(suffix, tmp_path):
    if suffix == ".pth":
        pytest.importorskip("torch")
    large = {"a": np.ones(1 << 16, np.float32)}
    with room_for(1 << 12), pytest.raises(CheckpointError, match=rf"a{suffix} cannot be written .*nothing was left"):
        write(tmp_path / f"a{suffix}", large)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / f"b{suffix}").write_text("mine")
    with room_for(1 << 12), pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / f"b{suffix}", large, overwrite=True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(f"b{suffix}", "mine")]


def test_where_a_file_cannot_be_written_is_said(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"absent/a\.safetensors cannot be written"):
        write(tmp_path / "absent" / "a.safetensors", EXPECTED)
    with pytest.raises(CheckpointError, match=r"suffix '.npz': allowed are \.safetensors, \.pth, \.pt"):
        write(tmp_path / "a.npz", EXPECTED)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"needs torch \(pip install -e '.\[convert\]'"):
        write(tmp_path / "a.pth", EXPECTED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_torch_reads_what_is_written_for_it(suffix, torch, tmp_path):
    path = tmp_path / f"a{suffix}"
    write(path, EXPECTED)
    loaded = torch.load(path, weights_only=True)
    assert loaded.keys() == EXPECTED.keys()
    for key, wanted in EXPECTED.items():
        assert tuple(loaded[key].shape) == wanted.shape
        assert torch_bytes(loaded[key]) == wanted.tobytes()
        assert_same(read(path).tree[key].array(), wanted)


# Shards and folders.


def sharded(folder: Path, suffix: str) -> dict[str, dict[str, np.ndarray]]:
    """Two shards and their index, as Hugging Face writes them."""
    shards = {f"model-0000{i}-of-00002{suffix}": {f"w{i}": np.full(2, i, np.float32)} for i in (1, 2)}
    for name, tensors in shards.items():
        write(folder / name, tensors)
    places = {key: name for name, tensors in shards.items() for key in tensors}
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return shards


@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".bin", marks=pytest.mark.torch)])
def test_shards_are_read_as_one_by_their_folder_and_by_their_index(suffix, tmp_path):
    if suffix == ".bin":
        pytest.importorskip("torch")
    sharded(tmp_path, suffix)
    (index,) = tmp_path.glob("*.index.json")
    for path in (tmp_path, index):
        source = read(path)
        assert {key: tensor.array().tolist() for key, tensor in source.tree.items()} == {"w1": [1, 1], "w2": [2, 2]}
        assert source.format.startswith("2 shards, ")
        assert source.path == index
        assert not source.shard
    assert "one shard of 2" in read(tmp_path / f"model-00001-of-00002{suffix}").shard


def test_an_index_that_leads_elsewhere_or_disagrees_is_refused(tmp_path):
    shards = sharded(tmp_path, ".safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for content, text in (
        ("[]", "no index of shards"),
        ('{"weight_map": {}}', "names no file"),
        ('{"weight_map": {"w1": "../model.safetensors"}}', "files of its own folder"),
        (json.dumps({"weight_map": {"w1": next(iter(shards)), "w9": next(iter(shards))}}), "disagree about w9"),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=text):
            read(index)


def test_a_folder_of_hugging_face_is_its_weights(tmp_path):
    write(tmp_path / "model.safetensors", EXPECTED)
    (tmp_path / "config.json").write_text("{}")
    source = read(tmp_path)
    assert source.path == tmp_path / "model.safetensors"
    assert source.tree.keys() == EXPECTED.keys()
