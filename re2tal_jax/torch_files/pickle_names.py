"""What the names of classes and functions in a pickle stand for: a builder of ours, a placeholder, or an attack."""

from collections.abc import Callable, Mapping
from typing import Any


class Placeholder:
    """What a foreign class or function, and everything it would have made, is read as: its dotted name alone."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


class Builder(Placeholder):
    """A function that a pickle may call, ours under its original name."""

    __slots__ = ("build",)

    def __init__(self, name: str, build: Callable[..., Any]):
        super().__init__(name)
        self.build = build


class BadValue(Exception):  # noqa: N818  it never leaves this package's readers
    """What a builder or a persistent id cannot accept; `unpickle` adds the file and the key near it."""


class RunsCode(BadValue):
    """What has no use in a pickle but to run code; `unpickle` says so."""


def runs_code(module: str, name: str) -> bool:
    """Return whether a global is one that a pickle names in order to run code."""
    full = f"{module}.{name}"
    if _within(full, HOLDS_DATA):
        return False
    return (
        module.split(".")[0] in RUN_CODE_MODULES
        or _within(full, RUN_CODE)
        or any(part in RUN_CODE_MODULES for part in name.split(".")[:-1])  # numpy's `os.system`
    )


def _within(full: str, names: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of some, or inside one."""
    return any(full == name or full.startswith(f"{name}.") for name in names)


# Nothing of these would run, for nothing runs; who names them in a checkpoint means harm, and the user should know.
# Modules whose names research code has for its own packages too (code, profile …) are in RUN_CODE by function.
_MODULES = """
    builtins os posix nt subprocess _posixsubprocess sys shutil runpy importlib _frozen_importlib imp zipimport pkgutil
    pty socket ctypes _ctypes cffi codeop pickle _pickle cPickle dill cloudpickle joblib marshal shelve webbrowser
    multiprocessing threading _thread asyncio concurrent timeit pdb bdb pydoc doctest cProfile inspect gc
    signal atexit pip ensurepip venv distutils setuptools urllib urllib2 http ftplib smtplib telnetlib ssl xmlrpc
    sqlite3 popen2 operator linecache fileinput tempfile
"""
RUN_CODE_MODULES = frozenset(_MODULES.split())
_FUNCTIONS = {
    "code": "interact InteractiveInterpreter InteractiveConsole compile_command",
    "profile": "run runctx Profile",
    "trace": "Trace main",
    "site": "main addsitedir execsitecustomize execusercustomize",
    "platform": "popen os sys subprocess",
    "requests": "request get options head post put patch delete Session session api sessions",
}
RUN_CODE = (
    *(f"{module}.{name}" for module, names in _FUNCTIONS.items() for name in names.split()),
    "torch.load",
    "torch.hub",
    "torch.jit",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "torch.utils.collect_env",
    "torch.utils.bottleneck",
    "torch.utils.checkpoint",
    "torch.utils._freeze",
    "torch.package",
    "torch.ops",
    "torch.classes",
    "torch.compile",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.rpc",
    "torch.serialization.load",
    "functools.reduce",
    "types.FunctionType",
    "types.CodeType",
    "io.open",
    "io.FileIO",
    "codecs.open",
    "copyreg.add_extension",
    "copyreg.pickle",
    "numpy.load",
    "numpy.testing",
    "numpy.f2py",
    "numpy.distutils",
)
# Classes of the modules above that hold data alone, and that objects in checkpoints are of.
HOLDS_DATA = (
    "inspect.Parameter",
    "inspect.Signature",
    "inspect._ParameterKind",
    "inspect._empty",
    "http.HTTPStatus",
    "http.cookies",
    "http.cookiejar",
    "urllib.parse.ParseResult",
    "urllib.parse.SplitResult",
    "signal.Signals",
    "distutils.version",
    "setuptools._distutils.version",
)
NAME_LIMIT = 200  # characters; attributes of attributes without end would fill the memory
# Other names of the same modules and types.
MODULES = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "_operator": "operator",
    "_io": "io",
    "commands": "subprocess",  # Python 2's; a package of this name has modules
}
PYTHON_2 = {
    ("__builtin__", "unicode"): ("builtins", "str"),
    ("__builtin__", "long"): ("builtins", "int"),
    ("__builtin__", "xrange"): ("builtins", "range"),
}


def hashable(key: Any) -> Any:
    """Return a key of plain values; the hash of a deeply nested tuple would overflow the C stack."""
    for item in key if isinstance(key, tuple | frozenset) else (key,):
        plain = item is None or isinstance(item, str | bytes | int | float | complex)
        if not plain and type(item).__hash__ is not object.__hash__:
            raise BadValue(f"a key holds a {type(item).__name__}: allowed are texts, numbers and flat tuples of them.")
    return key


def to_dict(items: list[Any]) -> dict[Any, Any]:
    """Return the dict of keys and values in turn."""
    return dict(zip(map(hashable, items[::2]), items[1::2], strict=True))


def _mapping(items: Any = ()) -> dict[Any, Any]:
    """Return what OrderedDict(items) holds, Python 2's list of pairs too."""
    if isinstance(items, dict):
        return dict(items)
    _check(items, list | tuple)
    return to_dict([part for key, value in items for part in (key, value)])


def _collection(kind: type) -> Callable[..., Any]:
    def build(values: Any = ()) -> Any:
        _check(values, list | tuple | set | frozenset)
        return kind(map(hashable, values)) if kind in (set, frozenset) else kind(values)

    return build


def _scalar(kind: type) -> Callable[..., Any]:
    def build(*arguments: Any) -> Any:
        single = str | bytes | int | float | complex
        for argument in arguments:  # a second one is an imaginary part, never a text's encoding or a number's base
            _check(argument, single if len(arguments) == 1 else float)
        return kind(*arguments)

    return build


def _bytes(kind: type) -> Callable[..., Any]:
    def build(value: Any = b"", encoding: str = "utf-8") -> Any:
        _check(value, str | bytes | bytearray | list | tuple)  # of an integer it would be that many zeros
        return kind(_encode(value, encoding) if isinstance(value, str) else value)

    return build


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    """How pickle protocol 2 writes bytes."""
    _check(text, str)
    if encoding not in ("latin1", "latin-1", "ascii", "utf-8", "utf8"):
        raise BadValue("bytes in an unusual encoding: allowed are latin1, ascii and utf-8.")
    return text.encode(encoding)


def _range(*arguments: Any) -> range:
    return range(*arguments)


def _slice(*arguments: Any) -> slice:
    for argument in arguments:
        _check(argument, int | None)
    return slice(*arguments)


def _attribute(target: Any, name: Any) -> Placeholder:
    """Name an attribute of a placeholder: protocol 2 writes methods so, and mmengine's HistoryBuffer keeps some."""
    if type(target) is not Placeholder or not isinstance(name, str):
        raise RunsCode(f"takes an attribute of {getattr(target, 'name', type(target).__name__)}")
    return Placeholder(f"{target.name}.{name}"[:NAME_LIMIT])


def _item(target: Any, *_: Any) -> Placeholder:
    """How `typing.Optional[int]` is written, which typed config objects keep."""
    _check(target, Placeholder)
    return Placeholder(target.name)


def _type_of(value: Any) -> Placeholder:
    """How the type of None is written."""
    if value is not None and value is not Ellipsis:
        raise BadValue("type() of something other than None or Ellipsis.")
    return Placeholder(type(value).__name__)


def _check(value: Any, allowed: Any) -> None:
    if not isinstance(value, allowed):
        raise BadValue(f"a constructor is given a {type(value).__name__}.")


# Python's own types by their dotted names; what is not here of builtins is refused.
PYTHON: Mapping[str, Any] = {
    name: Builder(name, build)
    for name, build in {
        "collections.OrderedDict": _mapping,
        "collections.defaultdict": lambda factory=None, items=(): _mapping(items),
        "builtins.dict": _mapping,
        **{f"builtins.{kind.__name__}": _collection(kind) for kind in (list, tuple, set, frozenset)},
        **{f"builtins.{kind.__name__}": _scalar(kind) for kind in (bool, int, float, complex, str)},
        **{f"builtins.{kind.__name__}": _bytes(kind) for kind in (bytes, bytearray)},
        "builtins.range": _range,
        "builtins.slice": _slice,
        "_codecs.encode": _encode,
        "builtins.getattr": _attribute,
        "operator.getitem": _item,
        "builtins.type": _type_of,
    }.items()
} | {"builtins.object": Placeholder("builtins.object"), "builtins.Ellipsis": ...}
