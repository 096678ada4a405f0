"""Checkpoint files assembled by hand, byte by byte, for the tests of reading them."""

import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

# Each function gives the opcodes that push one value.


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


def torch_bytes(value) -> bytes:
    """The elements of torch's tensor in order, as torch has them."""
    import torch

    return bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if value.numel() else b""
