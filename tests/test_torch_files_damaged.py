"""Files that are something else, cut or changed: each is an error that names the file and what was found."""

import pickle
import struct
import zipfile

import numpy as np
import pytest

from re2tal_jax.errors import CheckpointError
from re2tal_jax.torch_files import Tensor, read
from tests.pickles import EXPECTED, SMALL, assert_same, pickled, small_zip, write_legacy

BAD = {
    "empty": (b"", "the file is empty"),
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "git-LFS pointer.*git lfs pull",
    ),
    "HTML": (b"\n<!DOCTYPE html><html>Sign in</html>", "an HTML or XML page"),
    "XML": (b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", "an HTML or XML page"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "gzip archive"),
    "tar": (bytes(257) + b"ustar\0" + bytes(300), "tar archive.*torch before 0.1.10"),
    "text": (b"hello there", "not a checkpoint.*hello there"),
    "JSON": (b'{"weight_map": {}}', "not a checkpoint"),
    "zeros": (bytes(100), "not a checkpoint"),
    "plain pickle": (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    "zip": (b"PK\3\4" + bytes(60), "damaged or cut short"),
    "safetensors": (struct.pack("<Q", 20) + b'{"a": broken' + bytes(20), "a safetensors file, but damaged"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_checkpoint_is_told_apart(kind, tmp_path):
    content, message = BAD[kind]
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_missing_files_and_directories_are_named(tmp_path):
    (tmp_path / "epoch_3.pth").touch()
    with pytest.raises(CheckpointError, match=r"is a directory.*epoch_3\.pth"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        read(tmp_path / "absent.pth")


def test_other_zips_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match=r"TorchScript.*torch.jit.load"):
        read(small_zip(tmp_path / "script.pt", code____torch__="class"))
    with pytest.raises(CheckpointError, match=r"byte order.*big"):
        read(small_zip(tmp_path / "big.pt", byteorder=b"big"))
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("inside/model.pth", b"")
    with pytest.raises(CheckpointError, match=r"torch\.save did not write.*inside/model\.pth"):
        read(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="big-endian"):
        read(write_legacy(tmp_path / "big.pth", pickled(b"}"), {}, little=False))


@pytest.mark.parametrize("kind", SMALL)
def test_a_cut_file_is_an_error(kind, tmp_path):
    path = SMALL[kind](tmp_path / "a.pth")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read(path)


@pytest.mark.parametrize("kind", SMALL)
def test_any_changed_byte_is_an_error_or_harmless(kind, tmp_path):
    """A zip has checksums; the other formats have none, so that there a changed number is read as it is."""
    path = SMALL[kind](tmp_path / "a.pth")
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    survived = 0
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            tree = read(path).tree
            leaves = tree.items() if isinstance(tree, dict) else ()
            arrays = {key: leaf.array() for key, leaf in leaves if isinstance(leaf, Tensor)}
        except CheckpointError:
            continue
        survived += 1
        if kind == "torch zip":
            assert set(arrays) == set(EXPECTED)
            for key, wanted in EXPECTED.items():
                assert_same(arrays[key], wanted)
    assert 0 < survived < len(content)
