"""Pickles of other programs become names, and those that mean harm are refused before anything runs."""

import contextlib
import datetime
import os
import pathlib
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest

from re2tal_jax.errors import CheckpointError
from re2tal_jax.torch_files import Placeholder, RunsCodeError, read
from tests.pickles import (
    BYTES,
    WEIGHTS,
    call,
    glob,
    integer,
    mapping,
    pickled,
    storage,
    tensor,
    text,
    tup,
    write_legacy,
    write_zip,
)

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


@pytest.mark.parametrize("seed", range(3))
def test_pickles_of_random_opcodes_end_in_an_error_or_a_value(seed, tmp_path):
    rng = np.random.default_rng(seed)
    pieces = [*WEIGHTS.values(), b"(", b"t", b"R", b"b", b"}", b"]", b"e", b"u", b"0", b"1", b"2", b"q\0", b"h\0", b"Q"]
    pieces += [glob("lab", "Config"), glob("builtins", "getattr"), text("a"), b"\x81", b"\x92", b"\x90", b"\x91", b"o"]
    for _ in range(300):
        data = pickled(b"".join(pieces[i] for i in rng.integers(len(pieces), size=12)))
        with contextlib.suppress(CheckpointError):
            read(write_zip(tmp_path / "a.pth", data, BYTES))
