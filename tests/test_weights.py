"""A folder of converted parameters: written whole or not at all, and never over what is somebody else's."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from re2tal_jax import weights
from re2tal_jax.errors import CheckpointError
from re2tal_jax.weights import check_writable, load_about, load_weights, save_weights, verify_weights

ABOUT = {"config": {"backbone": {"name": "video_swin_tiny"}}, "whole": False}


def save(directory: Path, value: float = 0.0, **options) -> str:
    return save_weights(directory, {"a.kernel": np.full(3, value, np.float32)}, ABOUT, **options)


def value(directory: Path) -> float:
    return float(load_weights(directory)["a.kernel"][0])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("foreign", ["predictions.json", "checkpoints/step", "report.txt/inner"])
def test_what_else_lies_in_a_folder_is_never_deleted(foreign, tmp_path):
    directory = tmp_path / "ours"
    save(directory)
    if foreign.startswith("report.txt"):
        (directory / "report.txt").unlink()
    (directory / foreign).parent.mkdir(exist_ok=True)
    (directory / foreign).write_text("mine")
    with pytest.raises(CheckpointError, match=foreign.split("/")[0]):
        save(directory, 1.0, overwrite=True)
    assert (directory / foreign).read_text() == "mine"
    assert value(directory) == 0.0


def test_only_what_a_conversion_wrote_is_replaced_and_only_when_asked(tmp_path):
    save(tmp_path / "ours")
    assert names(tmp_path / "ours") == ["model.json", "params.safetensors", "report.txt"]
    with pytest.raises(CheckpointError, match="--overwrite"):
        save(tmp_path / "ours", 1.0)
    save(tmp_path / "ours", 1.0, overwrite=True)
    assert value(tmp_path / "ours") == 1.0
    assert names(tmp_path) == ["ours"]


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "ours").write_text("mine")
    with pytest.raises(CheckpointError, match="no folder"):
        check_writable(tmp_path / "ours", overwrite=True)


def test_a_link_stays_and_the_folder_that_it_names_is_written(tmp_path):
    save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "ahead").symlink_to(tmp_path / "later")
    save(tmp_path / "link", 1.0, overwrite=True)
    save(tmp_path / "ahead", 2.0)
    assert (tmp_path / "link").is_symlink()
    assert (value(tmp_path / "real"), value(tmp_path / "later")) == (1.0, 2.0)
    assert names(tmp_path) == ["ahead", "later", "link", "real"]


def test_old_content_that_cannot_be_removed_is_no_failure_of_the_new(tmp_path, monkeypatch, caplog):
    save(tmp_path / "ours")
    remove = shutil.rmtree

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")
        remove(path, ignore_errors=True)

    monkeypatch.setattr(weights.shutil, "rmtree", refuse)
    save(tmp_path / "ours", 1.0, overwrite=True)
    assert value(tmp_path / "ours") == 1.0
    assert "old content is still in" in caplog.text


@pytest.mark.parametrize("place", ["fsync", "rename"])
@pytest.mark.parametrize("there", [False, True])
def test_an_interruption_leaves_what_was_there(place, there, tmp_path, monkeypatch):
    if there:
        save(tmp_path / "ours")
    rename, renamed = Path.rename, []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupt_second(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        renamed.append(target)
        return rename(self, target)

    if place == "fsync":
        monkeypatch.setattr(os, "fsync", interrupt)
    else:
        monkeypatch.setattr(Path, "rename", interrupt_second)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "ours", 1.0, overwrite=True)
    assert names(tmp_path) == (["ours"] if there else [])
    assert not there or value(tmp_path / "ours") == 0.0


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ("[]", "does not say config, whole, sha256"),
        ('{"config": {}, "whole": "yes", "sha256": "0"}', "does not say whole"),
        ('{"config": {"backbone": 3}, "whole": true, "sha256": "0"}', "names no network"),
        ("{", "cannot be read"),
    ],
)
def test_a_damaged_description_is_told(about, text, tmp_path):
    save(tmp_path / "ours")
    (tmp_path / "ours" / "model.json").write_text(about)
    with pytest.raises(CheckpointError, match=text):
        load_about(tmp_path / "ours")


def test_parameters_that_were_changed_are_not_those_described(tmp_path):
    digest = save(tmp_path / "ours")
    verify_weights(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "model.json").read_text())["sha256"] == digest
    save(tmp_path / "other", 1.0)
    shutil.copy(tmp_path / "other" / "params.safetensors", tmp_path / "ours")
    with pytest.raises(CheckpointError, match="was changed"):
        verify_weights(tmp_path / "ours")
