"""Reading PyTorch's checkpoint files without PyTorch, and refusing what is none or means harm."""

import collections
import contextlib
import datetime
import json
import os
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_convert.pickle_names import Placeholder
from checkpoints_convert.torch_io import choose_state_dict, read, state_dicts, write
from checkpoints_convert.torch_tensors import Tensor
from checkpoints_convert.unpickle import RunsCodeError
from re2tal_jax.errors import CheckpointError

# A pickle assembled by hand: each function gives the opcodes that push one value.


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    return f"L{value}L\n".encode()


def tup(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tup(*arguments) + b"R"


def mapping(entries: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def storage(key: str, kind: str, numel: int, *view: bytes) -> bytes:
    return tup(text("storage"), glob("torch", kind), text(key), text("cpu"), integer(numel), *view) + b"Q"


def tensor(stored: bytes, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    sizes = (tup(*map(integer, numbers)) for numbers in (shape, strides))
    hooks = call(glob("collections", "OrderedDict"))
    return call(glob("torch._utils", "_rebuild_tensor_v2"), stored, integer(offset), *sizes, b"\x89", hooks)


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def write_zip(
    path: Path, data: bytes, storages: dict[str, bytes], method: int = zipfile.ZIP_STORED, **more: bytes
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("weights/data.pkl", data)
        for name, content in {"byteorder": b"little", **more}.items():
            archive.writestr(f"weights/{name.replace('__', '/')}", content)
        for key, content in storages.items():
            archive.writestr(f"weights/data/{key}", content)
    return path


def write_legacy(path: Path, data: bytes, storages: dict[str, tuple[int, bytes]], *, little: bool = True) -> Path:
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": little})]
    parts += [data, pickle.dumps(list(storages), 2)]
    parts += [struct.pack("<q", numel) + content for numel, content in storages.values()]
    path.write_bytes(b"".join(parts))
    return path


NUMBERS = np.arange(6, dtype=np.float32)
WEIGHTS = {
    "row": tensor(storage("0", "FloatStorage", 6), (2, 3), (3, 1)),
    "column": tensor(storage("0", "FloatStorage", 6), (3, 2), (1, 3)),
    "tail": tensor(storage("0", "FloatStorage", 6), (2,), (1,), offset=4),
    "repeated": tensor(storage("0", "FloatStorage", 6), (2, 2), (0, 1)),
    "count": tensor(storage("1", "LongStorage", 1), (), ()),
    "empty": tensor(storage("2", "HalfStorage", 0), (0, 3), (3, 1)),
    "half": tensor(storage("3", "BFloat16Storage", 2), (2,), (1,)),
}
EXPECTED = {
    "row": NUMBERS.reshape(2, 3),
    "column": NUMBERS.reshape(2, 3).T,
    "tail": np.array([4, 5], np.float32),
    "repeated": np.array([[0, 1], [0, 1]], np.float32),
    "count": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
    "half": np.array([1.5, -2], ml_dtypes.bfloat16),
}
BYTES = {"0": NUMBERS.tobytes(), "1": EXPECTED["count"].tobytes(), "2": b"", "3": EXPECTED["half"].tobytes()}
COUNTS = {"0": 6, "1": 1, "2": 0, "3": 2}


def small_zip(path: Path, **kwargs) -> Path:
    return write_zip(path, pickled(mapping(WEIGHTS)), BYTES, **kwargs)


def small_legacy(path: Path) -> Path:
    return write_legacy(path, pickled(mapping(WEIGHTS)), {key: (COUNTS[key], BYTES[key]) for key in BYTES})


def small_safetensors(path: Path) -> Path:
    safetensors.numpy.save_file({key: np.asarray(value, order="C") for key, value in EXPECTED.items()}, path)
    return path


SMALL = {"torch zip": small_zip, "torch legacy": small_legacy, "safetensors": small_safetensors}


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tobytes() == wanted.tobytes()


# Files that are what they should be.


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


# Objects of other programs.


@pytest.fixture
def foreign(monkeypatch):
    """Pickle what `make(module)` gives, of a module that is importable then and an error to import later."""

    def dump(name: str, make, protocol: int) -> bytes:
        module = types.ModuleType(name)
        with monkeypatch.context() as patch:
            parts = name.split(".")
            for i in range(1, len(parts)):
                patch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
            patch.setitem(sys.modules, name, module)
            return pickle.dumps({"meta": make(module), "epoch": 1}, protocol)

    return dump


def declare(module: types.ModuleType, name: str, *bases: type, **body) -> type:
    """Make a class that seems to stand in a module."""
    kind = type(name, bases, {"__module__": module.__name__, **body})
    for function in body.values():
        if isinstance(function, types.FunctionType):
            function.__module__, function.__qualname__ = module.__name__, f"{name}.{function.__name__}"
    setattr(module, name, kind)
    return kind


def history_buffer(module):
    """As mmengine's, whose state holds its own methods; protocol 2 writes those with getattr."""

    def mean(self): ...

    kind = declare(module, "HistoryBuffer", mean=mean)
    buffer = kind()
    buffer.statistics_methods = {"mean": kind.mean}
    buffer.values = np.arange(3.0)
    return [buffer, np.float32(2)]


def dict_subclass(module):
    return declare(module, "CfgNode", dict)({"LR": 0.1, "NESTED": {"a": [1]}})


def list_and_set_subclasses(module):
    return [declare(module, "ListConfig", list)([1, 2]), declare(module, "Names", set)({"a"})]


def with_arguments(module):
    """`__new__` with positional and keyword arguments."""

    def __new__(cls, *_, **__):  # noqa: N807
        return object.__new__(cls)

    def __getnewargs_ex__(self):  # noqa: N807
        return (1,), {"a": 2}

    return declare(module, "Node", __new__=__new__, __getnewargs_ex__=__getnewargs_ex__)(1, a=2)


def standard_library(module):
    return [pathlib.PurePosixPath("/a"), datetime.datetime(2020, 1, 2), types.SimpleNamespace(a=1), type(None)]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (history_buffer, "HistoryBuffer"),
        (dict_subclass, "CfgNode"),
        (list_and_set_subclasses, "ListConfig"),
        (with_arguments, "Node"),
        (standard_library, "datetime.datetime"),
    ],
)
def test_foreign_objects_become_placeholders_and_are_named(make, name, protocol, foreign, tmp_path):
    source = read(write_zip(tmp_path / "a.pth", foreign("some_lab.logging.things", make, protocol), {}))
    wanted = name if "." in name else f"some_lab.logging.things.{name}"
    assert wanted in source.placeholders
    assert list(source.placeholders) == sorted(source.placeholders)
    assert source.tree["epoch"] == 1
    assert "some_lab" not in sys.modules


def test_a_foreign_module_is_not_imported(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    (tmp_path / "imported_module.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = pickled(mapping({"a": call(glob("imported_module", "Config"))}))
    for path in (write_zip(tmp_path / "a.pth", data, {}), write_legacy(tmp_path / "b.pth", data, {})):
        source = read(path)
        assert source.placeholders == ("imported_module.Config",)
        assert isinstance(source.tree["a"], Placeholder)
    assert not marker.exists()
    assert "imported_module" not in sys.modules


# Files that mean harm.


class Reduced:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


ATTACKS = {
    "os.system": lambda marker: Reduced(os.system, f"touch {marker}"),
    "subprocess.Popen": lambda marker: Reduced(subprocess.Popen, ["touch", str(marker)]),
    "builtins.eval": lambda marker: Reduced(eval, f"open({str(marker)!r}, 'w')"),
    "builtins.exec": lambda marker: Reduced(exec, f"open({str(marker)!r}, 'w')"),
    "io.open": lambda marker: Reduced(open, str(marker), "w"),
    "shutil.copy": lambda marker: Reduced(__import__("shutil").copy, __file__, str(marker)),
    "getattr of a builder": lambda marker: Reduced(getattr, dict, "__subclasses__"),
    "operator.methodcaller": lambda marker: __import__("operator").methodcaller("touch"),
    "nested pickle": lambda marker: Reduced(pickle.loads, pickle.dumps(Reduced(os.system, f"touch {marker}"))),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(attack, protocol, tmp_path):
    marker = tmp_path / "marker"
    data = pickle.dumps({"state_dict": {"a": ATTACKS[attack](marker)}}, protocol)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(data)
    for path in (write_zip(tmp_path / "a.pth", data, {}), write_legacy(tmp_path / "b.pth", data, {}), plain):
        with pytest.raises(RunsCodeError, match=r"tries to run code.*Nothing of it was executed") as error:
            read(path)
        assert str(path) in str(error.value)
    assert not marker.exists()


def test_a_chain_of_lookups_that_ends_in_a_call_is_refused(tmp_path):
    marker = tmp_path / "marker"
    lookup = glob("builtins", "getattr")
    imported = call(glob("builtins", "__import__"), text("os"))
    through_a_class = call(lookup, call(lookup, glob("builtins", "list"), text("__base__")), text("__subclasses__"))
    for chain in (call(lookup, imported, text("system")), through_a_class):
        data = pickled(call(chain, text(f"touch {marker}")))
        with pytest.raises(RunsCodeError):
            read(write_zip(tmp_path / "a.pth", data, {}))
    assert not marker.exists()


RUN_CODE = """
    posix.system nt.system sys.exit runpy.run_path importlib.import_module pty.spawn socket.socket ctypes.CDLL
    code.InteractiveInterpreter profile.run platform.popen requests.get inspect.getattr_static
    _pickle.loads dill.loads cloudpickle.loads webbrowser.open multiprocessing.Process
    threading.Thread asyncio.run timeit.timeit builtins.compile builtins.globals __builtin__.apply builtins.__import__
    torch.load torch.hub.load torch.jit.load torch.utils.cpp_extension.load operator.attrgetter functools.reduce
    numpy.testing.runstring
"""


@pytest.mark.parametrize("name", RUN_CODE.split())
def test_names_that_only_run_code_are_refused_with_their_name(name, tmp_path):
    module, _, function = name.rpartition(".")
    with pytest.raises(RunsCodeError, match=name.replace("__builtin__", "builtins")):
        read(write_zip(tmp_path / "a.pth", pickled(call(glob(module, function))), {}))


HOLD_DATA = """
    torch.utils.data.sampler.RandomSampler torch.utils.data.dataloader.DataLoader platform.uname_result
    requests.structures.CaseInsensitiveDict inspect.Parameter inspect._ParameterKind http.HTTPStatus signal.Signals
    urllib.parse.ParseResult distutils.version.LooseVersion code.models.Net code.Net profile.meters.Meter site.Place
    trace.History commands.options.Options
"""


@pytest.mark.parametrize("name", HOLD_DATA.split())
def test_classes_that_hold_data_are_placeholders_like_others(name, tmp_path):
    module, _, kind = name.rpartition(".")
    source = read(write_zip(tmp_path / "a.pth", pickled(mapping({"a": call(glob(module, kind))})), {}))
    assert source.placeholders == (name,)


def test_a_module_behind_a_dotted_name_is_refused(tmp_path):
    data = pickled(text("numpy") + text("os.system") + b"\x93")
    with pytest.raises(RunsCodeError, match=r"numpy\.os\.system"):
        read(write_zip(tmp_path / "a.pth", data, {}))


@pytest.mark.parametrize("opcode", [b"\x82\x01", b"\x83\x01\0", b"\x84\x01\0\0\0"])
def test_extension_codes_are_refused(opcode, tmp_path):
    with pytest.raises(RunsCodeError, match="extension 1"):
        read(write_zip(tmp_path / "a.pth", pickled(opcode), {}))


def test_our_builders_cannot_be_changed_from_a_pickle(tmp_path):
    attack = glob("torch._utils", "_rebuild_tensor_v2") + mapping({"build": b"N"}) + b"b"
    with pytest.raises(CheckpointError, match="sets the state of a Builder"):
        read(write_zip(tmp_path / "a.pth", pickled(attack), {}))


def test_a_whole_pickled_model_is_told_how_to_become_a_state_dict(tmp_path):
    module = tup(text("module"), glob("lab.models", "Net"), b"N", b"N") + b"Q"
    with pytest.raises(CheckpointError, match=r"'module'.*state_dict\(\)"):
        read(write_legacy(tmp_path / "a.pth", pickled(module), {}))


SIX = storage("0", "FloatStorage", 6)
BOMBS = {
    "beyond the storage": (tensor(SIX, (7,), (1,)), "element 6 of storage .*holds 6"),
    "offset beyond the storage": (tensor(SIX, (1,), (1,), offset=10**15), "element 1000000000000000"),
    "strides beyond the storage": (tensor(SIX, (2, 2), (6, 1)), "element 7"),
    "negative stride": (tensor(SIX, (2,), (-1,)), "no valid shape"),
    "negative size": (tensor(SIX, (-1,), (1,)), "no valid shape"),
    "repeated without end": (tensor(SIX, (10**6, 10**6), (0, 0)), "no weights do that"),
    "empty and absurd": (tensor(SIX, (0, 10**17), (1, 1)), "no weights do that"),
    "too many axes": (tensor(SIX, (1,) * 65, (1,) * 65), "no valid shape"),
    "size that is none": (tensor(SIX, (10**30,), (0,)), "no valid shape"),
    "absurd storage": (tensor(storage("0", "FloatStorage", 10**15), (1,), (1,)), "has 24 bytes; 4000000000000000"),
    "missing storage": (tensor(storage("9", "FloatStorage", 6), (1,), (1,)), "data/9 is missing"),
    "foreign storage": (tensor(storage("0", "QInt8Storage", 6), (1,), (1,)), "QInt8Storage"),
    "zeros of bytes": (call(glob("builtins", "bytearray"), integer(10**15)), "given a int"),
    "list of a range": (
        call(glob("builtins", "list"), call(glob("builtins", "range"), integer(10**5))),
        "given a range",
    ),
    "copies of copies": (
        b"](" + b"K\0" * 1000 + b"eq\0" + b"(" + call(glob("builtins", "tuple"), b"h\0") * 70_000 + b"t",
        "made to fill the memory",
    ),
    "key of nested tuples": (b"}" + b")" + b"\x85" * 100_000 + b"Ns", "a key holds a tuple"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_absurd_sizes_are_an_error_that_names_the_key(bomb, tmp_path):
    data, message = BOMBS[bomb]
    with pytest.raises(CheckpointError, match=message) as error:
        read(write_zip(tmp_path / "a.pth", pickled(mapping({"stem.weight": data})), BYTES))
    assert "near 'stem.weight'" in str(error.value)


# Files that are something else, or damaged.

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


@pytest.mark.parametrize("seed", range(3))
def test_pickles_of_random_opcodes_end_in_an_error_or_a_value(seed, tmp_path):
    rng = np.random.default_rng(seed)
    pieces = [*WEIGHTS.values(), b"(", b"t", b"R", b"b", b"}", b"]", b"e", b"u", b"0", b"1", b"2", b"q\0", b"h\0", b"Q"]
    pieces += [glob("lab", "Config"), glob("builtins", "getattr"), text("a"), b"\x81", b"\x92", b"\x90", b"\x91", b"o"]
    for _ in range(300):
        data = pickled(b"".join(pieces[i] for i in rng.integers(len(pieces), size=12)))
        with contextlib.suppress(CheckpointError):
            read(write_zip(tmp_path / "a.pth", data, BYTES))


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
    with pytest.raises(CheckpointError, match=r"re2tal-jax\[convert\]"):
        write(tmp_path / "a.pth", EXPECTED)
    assert list(tmp_path.iterdir()) == []


# Against torch itself.


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def torch_bytes(value) -> bytes:
    """The tensor's elements in order, as torch has them."""
    import torch

    return bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if value.numel() else b""


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
def test_a_zip_that_torch_saved_without_checksums_is_read(torch, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read(tmp_path / "a.pth").tree["a"].array().tolist() == [1, 1]


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


@pytest.mark.torch
def test_a_traced_program_is_told_apart(torch, tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch announces the end of TorchScript
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read(tmp_path / "a.pt")


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
