"""A pickle machine that builds data and runs nothing.

A pickle is a program that names functions and has them called. Here `pickletools` decodes it and this file carries it
out; nothing is imported, and nothing is called but a short table of functions given by name. Every other class or
function becomes a `Placeholder` that takes whatever is done to it; names whose only use is to run code end the reading.
"""

import pickletools
from collections.abc import Callable, Mapping, Sized
from typing import Any, BinaryIO, NamedTuple, NoReturn

from re2tal_jax.errors import CheckpointError
from re2tal_jax.torch_files.pickle_names import (
    MODULES,
    NAME_LIMIT,
    PYTHON,
    PYTHON_2,
    BadValue,
    Builder,
    Placeholder,
    RunsCode,
    hashable,
    runs_code,
    to_dict,
)

# Constructors copy what the pickle spells out, perhaps twice; a short one could else copy one long list many times.
COPIES, COPY_SLACK = 4, 1 << 20


class RunsCodeError(CheckpointError):
    """A pickle that names something whose use in a pickle is to run code."""


class Unpickled(NamedTuple):
    """What a pickle holds, and the names of everything foreign in it."""

    value: Any
    placeholders: frozenset[str]


def unpickle(
    stream: BinaryIO,
    where: str,
    *,
    known: Mapping[str, Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Unpickled:
    """Read one pickle of any protocol and leave the stream behind it.

    Args:
        stream: what has `read` and `readline`.
        where: what error messages begin with: the file.
        known: dotted name -> what stands for it, beside Python's own types: a `Builder` or an inert value.
        persistent: gives the object of a persistent id; raises `BadValue`.

    Raises:
        RunsCodeError: it names a function to run code with.
        CheckpointError: it is no pickle, damaged, or holds what its builders refuse.
    """
    machine = _Machine({**PYTHON, **(known or {})}, persistent)
    try:
        return Unpickled(machine.run(stream), frozenset(machine.foreign))
    except RunsCode as error:
        raise RunsCodeError(
            f"{where}: the file tries to run code: it {error}, which weights have no use for. Nothing of it was "
            "executed. Do not load it elsewhere either; if you trust its author, ask for the state dict alone, as "
            "safetensors."
        ) from error
    except BadValue as error:
        raise CheckpointError(f"{where}: {machine.context()}{error}") from error
    except _DAMAGED as error:
        raise CheckpointError(
            f"{where}: {machine.context()}the pickle is damaged or cut short ({str(error)[:200]})."
        ) from error


# What Python raises where the program makes no sense. pickletools warns of odd escapes in texts.
_DAMAGED = (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError, DeprecationWarning)


class _Machine:
    """The state of one pickle's evaluation; what each opcode does is in `OPCODES`."""

    def __init__(self, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None):
        self.known, self.persistent = known, persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.foreign: set[str] = set()
        self.spelt = self.copied = 0  # opcodes and characters of the pickle, elements that constructors copied

    def run(self, stream: BinaryIO) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name not in OPCODES:
                raise BadValue(f"a torch checkpoint uses no {opcode.name}.")
            self.spelt += 1 + (len(argument) if isinstance(argument, str | bytes | bytearray) else 0)
            OPCODES[opcode.name](self, argument)
        return self.stack.pop()

    def context(self) -> str:
        """Name the last text on the stack: of a dict that is being filled, the key whose value is being built."""
        for stack in (self.stack, *reversed(self.marked)):
            for item in reversed(stack):
                if isinstance(item, str):
                    return f"near {item[:200]!r}: "
        return ""

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise BadValue("the pickle is damaged: it takes from an empty stack.")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def memoize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def find(self, module: Any, name: Any) -> Any:
        """Return what stands for a global; nothing is imported."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise BadValue("the pickle is damaged: the name of a global is no text.")
        module, name = PYTHON_2.get((module, name), (MODULES.get(module, module), name))
        full = f"{module}.{name}"
        if full in self.known:
            return self.known[full]
        if runs_code(module, name):
            raise RunsCode(f"names {full[:NAME_LIMIT]}")
        self.foreign.add(full)
        return Placeholder(full)

    def call(self, function: Any, arguments: Any, keywords: Any = None) -> Any:
        if not isinstance(arguments, tuple) or not isinstance(function, Placeholder):
            raise BadValue(f"the pickle is damaged: it calls a {type(function).__name__}.")
        if not isinstance(function, Builder):
            return Placeholder(function.name)
        if keywords:
            raise BadValue(f"{function.name} takes no keywords.")
        self.copied += sum(len(argument) for argument in arguments if isinstance(argument, Sized))
        if self.copied > COPIES * self.spelt + COPY_SLACK:
            raise BadValue("the pickle has far more copied than it holds: it is made to fill the memory.")
        return function.build(*arguments)

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(hashable, items))
        elif not isinstance(target, Placeholder):
            raise BadValue(f"the pickle is damaged: it appends to a {type(target).__name__}.")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(to_dict(items))
        elif not isinstance(target, Placeholder):
            raise BadValue(f"the pickle is damaged: it sets items of a {type(target).__name__}.")

    def build(self) -> None:
        """Drop the state of an object: a placeholder's, or the attributes of an OrderedDict, `_metadata` in torch."""
        target, _ = self.pop(2)
        if not isinstance(target, Placeholder | dict) or isinstance(target, Builder):
            raise BadValue(f"the pickle is damaged: it sets the state of a {type(target).__name__}.")
        self.stack.append(target)

    def persistent_id(self, pid: Any) -> Any:
        if self.persistent is None:
            raise BadValue("an object outside the pickle is referred to, which torch does for storages alone.")
        return self.persistent(pid)


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(tuple(machine.pop(count)))


def _reduce(machine: _Machine, _: Any) -> None:
    machine.stack.append(machine.call(*machine.pop(2)))


def _new_with_keywords(machine: _Machine, _: Any) -> None:
    machine.stack.append(machine.call(*machine.pop(3)))


def _instance(machine: _Machine, names: str) -> None:
    arguments = tuple(machine.pop_mark())
    machine.stack.append(machine.call(machine.find(*names.split(" ", 1)), arguments))


def _object(machine: _Machine, _: Any) -> None:
    function, *arguments = machine.pop_mark()
    machine.stack.append(machine.call(function, tuple(arguments)))


def _pop(machine: _Machine, _: Any) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _extension(machine: _Machine, code: Any) -> NoReturn:
    raise RunsCode(f"calls for extension {code} of the program that reads it")


_PUSHED = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES
    BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
"""
OPCODES: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(_PUSHED.split(), _push),
    "NONE": lambda machine, _: _push(machine, None),
    "NEWTRUE": lambda machine, _: _push(machine, True),
    "NEWFALSE": lambda machine, _: _push(machine, False),
    "EMPTY_LIST": lambda machine, _: _push(machine, []),
    "EMPTY_DICT": lambda machine, _: _push(machine, {}),
    "EMPTY_SET": lambda machine, _: _push(machine, set()),
    "EMPTY_TUPLE": lambda machine, _: _push(machine, ()),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.pop_mark())),
    "LIST": lambda machine, _: _push(machine, machine.pop_mark()),
    "DICT": lambda machine, _: _push(machine, to_dict(machine.pop_mark())),
    "FROZENSET": lambda machine, _: _push(machine, frozenset(map(hashable, machine.pop_mark()))),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "POP": _pop,
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "DUP": lambda machine, _: _push(machine, machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), lambda machine, index: machine.memoize(index)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: _push(machine, machine.memo[index])),
    "GLOBAL": lambda machine, names: _push(machine, machine.find(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda machine, _: _push(machine, machine.find(*machine.pop(2))),
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_keywords,
    "INST": _instance,
    "OBJ": _object,
    "BUILD": lambda machine, _: machine.build(),
    "PERSID": lambda machine, pid: _push(machine, machine.persistent_id(pid)),
    "BINPERSID": lambda machine, _: _push(machine, machine.persistent_id(machine.pop(1)[0])),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _extension),
}
