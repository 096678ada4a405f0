"""PyTorch's tensors without PyTorch: a window into a storage, read when it is asked for.

`KNOWN` is what the functions and classes that torch itself writes into a pickle stand for here.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from re2tal_jax.torch_files.pickle_names import BadValue, Builder, Placeholder

_DTYPES = """
    float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128
"""
DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in _DTYPES.split()
}
EXPANDED_LIMIT = 1 << 28  # bytes of a tensor that repeats a smaller storage; parameters that do are tables of a few MB


@dataclass(frozen=True, eq=False)
class Tensor:
    """An array of a checkpoint that is read by `array()`; `dtype` is a name such as "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray] = field(repr=False)

    def array(self) -> np.ndarray:
        """Return a contiguous array that is the caller's own; bfloat16 is that of ml_dtypes.

        Raises:
            CheckpointError: its bytes are damaged.
        """
        return self.load()


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of `numel` elements in the file; `read` gives its bytes."""

    name: str
    dtype: str
    numel: int
    read: Callable[[], Any] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPES[self.dtype].itemsize


class StorageType(Placeholder):
    """A storage class, by its dtype."""

    __slots__ = ("dtype",)

    def __init__(self, name: str, dtype: str):
        super().__init__(name)
        self.dtype = dtype


def storage_id(pid: Any) -> tuple[str, str, int, Any]:
    """Return key, dtype, number of elements and view (None, or key, offset and size) of a storage's persistent id."""
    if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
        kind = _name(pid[0] if isinstance(pid, tuple) and pid else pid)
        whole = " This is a whole pickled model: save its state_dict() instead." if kind == "'module'" else ""
        raise BadValue(f"an object outside the pickle of the kind {kind}: allowed is 'storage'.{whole}")
    _, kind, key, _, numel, *view = pid
    if not isinstance(kind, StorageType):
        raise BadValue(f"a storage of type {_name(kind)}: allowed are those of {', '.join(DTYPES)}.")
    if not isinstance(key, str) or not _is_size(numel):
        raise BadValue("the pickle is damaged: a storage without a key or a size.")
    return key, kind.dtype, numel, view[0] if view else None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 62


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> Tensor:
    """Return a tensor once its window is known to lie inside its storage."""
    if not isinstance(storage, Storage):
        raise BadValue(f"a tensor has a {_name(storage)} for a storage.")
    sizes = [offset, *_sizes(shape), *_sizes(strides)]
    if not all(map(_is_size, sizes)) or len(shape) != len(strides) or len(shape) > 64:
        raise BadValue(f"a tensor in storage {storage.name} has no valid shape, strides and offset.")
    dtype = dtype or storage.dtype
    itemsize = DTYPES[dtype].itemsize
    held = storage.nbytes // itemsize
    last = -1 if 0 in shape else offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= held:
        raise BadValue(f"a tensor reaches to element {last} of storage {storage.name}, which holds {held}.")
    nbytes = math.prod(size or 1 for size in shape) * itemsize
    if nbytes > max(EXPANDED_LIMIT, storage.nbytes):
        raise BadValue(f"a tensor of {nbytes} bytes in storage {storage.name} of {storage.nbytes}: no weights do that.")
    steps = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    return Tensor(tuple(shape), dtype, functools.partial(_read, storage, offset, tuple(shape), steps, dtype))


def _sizes(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise BadValue(f"a tensor has a {type(value).__name__} for a shape or strides.")
    return tuple(value)


def _read(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> np.ndarray:
    if 0 in shape:
        return np.empty(shape, DTYPES[dtype])
    flat = np.frombuffer(storage.read(), DTYPES[dtype])[offset:]
    window = np.lib.stride_tricks.as_strided(flat, shape, [stride * flat.itemsize for stride in strides])
    return np.array(window, order="C")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    return _tensor(storage, offset, shape, strides)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    _check_metadata(metadata)
    return _tensor(storage, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    """Rebuild a tensor of a dtype that has no storage class of its own; the storage is of bytes."""
    _check_metadata(metadata)
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else ""
    if name not in DTYPES:
        raise BadValue(f"a tensor of dtype {_name(dtype)}: allowed are {', '.join(DTYPES)}.")
    return _tensor(storage, offset, shape, strides, name)


def _check_metadata(metadata: Any) -> None:
    """Refuse a tensor that is to be conjugated or negated when it is read."""
    if isinstance(metadata, dict) and any(metadata.values()):
        raise BadValue("a tensor that is conjugated or negated lazily: save it after resolve_conj() and resolve_neg().")


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise BadValue(f"a parameter that is a {_name(data)}.")
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    """How a tensor with attributes is written; those of a subclass may mean anything, so it is refused."""
    if function not in _REBUILD.values() or kind not in _TENSOR_TYPES.values():
        raise BadValue(
            f"a tensor of the class {getattr(kind, 'name', type(kind).__name__)}: save it as a torch.Tensor."
        )
    return function.build(*arguments)


def _device(kind: Any, *_: Any) -> str:
    return kind if isinstance(kind, str) else "cpu"


def _name(value: Any) -> str:
    """Return a short name for an error; never the text of a container, which can be made without end."""
    if isinstance(value, str):
        return repr(value[:50])
    return value.name[:200] if isinstance(value, Placeholder) else type(value).__name__


_REBUILD = {
    name: Builder(name, build)
    for name, build in {
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
        "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
    }.items()
}
_TENSOR_TYPES = {
    name: Placeholder(name) for name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
KNOWN: Mapping[str, Any] = {
    **_REBUILD,
    **_TENSOR_TYPES,
    "torch._tensor._rebuild_from_type_v2": Builder("torch._tensor._rebuild_from_type_v2", _rebuild_from_type),
    **{
        f"{module}.{name}": StorageType(f"{module}.{name}", dtype)
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in _STORAGES.items()
    },
    **{f"torch.{name}": f"torch.{name}" for name in DTYPES},
    "torch.Size": Builder("torch.Size", lambda sizes=(): _sizes(sizes)),
    "torch.device": Builder("torch.device", _device),
}
