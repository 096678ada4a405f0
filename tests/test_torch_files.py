"""Files that PyTorch writes, read without it: every tensor bit for bit, plain values, what torch itself saves."""

import collections
import pickle
import tracemalloc
import zipfile

import pytest

from re2tal_jax.errors import CheckpointError
from re2tal_jax.torch_files import read
from tests.pickles import (
    BYTES,
    EXPECTED,
    NUMBERS,
    SMALL,
    WEIGHTS,
    assert_same,
    call,
    glob,
    integer,
    pickled,
    small_zip,
    storage,
    tensor,
    text,
    torch_bytes,
    tup,
    write_legacy,
    write_zip,
)


@pytest.mark.parametrize("kind", SMALL)
def test_each_format_gives_every_tensor_bit_for_bit(kind, tmp_path):
    source = read(SMALL[kind](tmp_path / "file.of_no_known_suffix"))
    assert (source.format, source.placeholders, len(source.sha256)) == (kind, (), 64)
    assert set(source.tree) == set(EXPECTED)
    for key, wanted in EXPECTED.items():
        leaf = source.tree[key]
        assert (leaf.shape, leaf.dtype) == (wanted.shape, str(wanted.dtype))
        assert_same(leaf.array(), wanted)


def test_an_array_is_the_callers_own(tmp_path):
    leaf = read(small_zip(tmp_path / "a.pth")).tree["row"]
    leaf.array()[:] = -1
    assert_same(leaf.array(), EXPECTED["row"])


def test_a_zip_that_was_packed_again_is_read(tmp_path):
    source = read(small_zip(tmp_path / "a.pth", method=zipfile.ZIP_DEFLATED))
    assert_same(source.tree["column"].array(), EXPECTED["column"])


def test_a_zip_with_64_bit_sizes_is_read(tmp_path):
    path = write_zip(tmp_path / "a.pth", pickled(WEIGHTS["row"]), {})
    with zipfile.ZipFile(path, "a") as archive, archive.open("weights/data/0", "w", force_zip64=True) as member:
        member.write(BYTES["0"])
    assert_same(read(path).tree.array(), EXPECTED["row"])


def test_a_legacy_storage_may_be_a_part_of_another(tmp_path):
    view = tup(text("part"), integer(2), integer(3))
    data = pickled(tensor(storage("0", "FloatStorage", 6, view), (3,), (1,)))
    assert_same(read(write_legacy(tmp_path / "a.pth", data, {"0": (6, BYTES["0"])})).tree.array(), NUMBERS[2:5])


@pytest.mark.parametrize("wrapper", ["_rebuild_parameter", "_rebuild_parameter_with_state"])
def test_a_parameter_is_its_tensor(wrapper, tmp_path):
    data = call(glob("torch._utils", wrapper), WEIGHTS["row"], b"\x88", b"N")
    assert_same(read(write_zip(tmp_path / "a.pth", pickled(data), BYTES)).tree.array(), EXPECTED["row"])


@pytest.mark.parametrize("protocol", range(6))
def test_plain_python_values_come_back_of_every_protocol(protocol, tmp_path):
    shared = [1, 2]
    tree = {
        "epoch": 3,
        "large": -(10**30),
        "lr": 0.1,
        "flags": (True, False, None),
        "text": "é\n",
        "bytes": b"\xff\0",
        "bytearray": bytearray(b"abc"),
        "sets": ({1, 2}, frozenset({3})),
        "complex": 1 + 2j,
        "range": range(0, 6, 2),
        "slice": slice(1, None),
        "shared": [shared, shared],
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, x=[1]),
        4: "four",
    }
    source = read(write_zip(tmp_path / "a.pth", pickle.dumps(tree, protocol), {}))
    assert source.tree == tree
    assert list(source.tree["ordered"]) == ["b", "a"]
    assert source.placeholders == ()


def test_reading_holds_no_tensor_and_an_array_is_held_once(tmp_path):
    size = 64 << 20
    path = tmp_path / "a.pth"
    data = pickled(tensor(storage("0", "ByteStorage", size), (size,), (1,)))
    write_zip(path, data, {"0": bytes(size)})
    tracemalloc.start()
    leaf = read(path).tree
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    array = leaf.array()
    assert tracemalloc.get_traced_memory()[1] < size + (2 << 20)
    tracemalloc.stop()
    assert array.nbytes == size


# Against torch itself.


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_torch_saves_is_read_bit_for_bit(is_zip, protocol, torch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    attributed = torch.randn(3, generator=generator)
    attributed.note = "kept by torch, dropped by us"
    tensors = {
        "base": base,
        "view": base[1:, 2:5],
        "transposed": base.T,
        "expanded": base[:1].expand(3, 6),
        "attributed": attributed,
        "parameter": torch.nn.Parameter(torch.randn(2, 3, generator=generator)),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        **{
            str(dtype): torch.randint(0, 2, (5,), generator=generator).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.complex64, torch.complex128)
            + (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
            + ((torch.uint16, torch.uint32, torch.uint64) if is_zip else ())
        },
    }
    path = tmp_path / "a.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    source = read(path)
    assert source.format == ("torch zip" if is_zip else "torch legacy")
    assert source.placeholders == ()
    assert source.tree.keys() == tensors.keys()
    for key, wanted in tensors.items():
        array = source.tree[key].array()
        assert (array.shape, source.tree[key].dtype) == (tuple(wanted.shape), str(wanted.dtype).removeprefix("torch."))
        assert array.tobytes() == torch_bytes(wanted)


@pytest.mark.torch
def test_a_zip_that_torch_saved_without_checksums_is_read(torch, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read(tmp_path / "a.pth").tree["a"].array().tolist() == [1, 1]


@pytest.mark.torch
def test_a_traced_program_is_told_apart(torch, tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch announces the end of TorchScript
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read(tmp_path / "a.pt")
