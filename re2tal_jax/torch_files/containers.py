"""The files that PyTorch checkpoints come in: torch's zip, torch's legacy stream of pickles, safetensors.

Each reader returns what the file holds and the names of the foreign objects in it. Storages stay where they are: the
file is mapped, and a tensor's bytes are copied when it is asked for them.
"""

import functools
import io
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from re2tal_jax.errors import CheckpointError
from re2tal_jax.torch_files.pickle_names import BadValue
from re2tal_jax.torch_files.tensors import DTYPES, KNOWN, Storage, Tensor, storage_id
from re2tal_jax.torch_files.unpickle import RunsCodeError, Unpickled, unpickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
PICKLE_LIMIT = 1 << 30  # bytes of an unpacked data.pkl; tensors are not in it

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
DAMAGED_ZIP = (
    zipfile.BadZipFile,
    NotImplementedError,
    OverflowError,
    IndexError,
    ValueError,
    OSError,
    EOFError,
    struct.error,
)


def read_zip(path: Path) -> Unpickled:
    """Read what torch.save writes since 1.6: a zip with one folder that holds data.pkl and data/<storage>.

    Raises:
        CheckpointError: another kind of zip, or a damaged one.
    """
    archive = _Zip(path)
    if archive.has("byteorder") and (order := bytes(archive.read("byteorder"))) != b"little":
        raise CheckpointError(
            f"{path}: saved with byte order {order[:20]!r}: allowed is little-endian. Load it with torch and save it "
            "again on an ordinary machine."
        )
    pickled = io.BytesIO(archive.read("data.pkl", PICKLE_LIMIT))
    return unpickle(pickled, str(path), known=KNOWN, persistent=archive.storage)


class _Zip:
    """The members of torch's one folder in a zip; its name differs between files."""

    def __init__(self, path: Path):
        self.path, self.data = path, mapped(path)
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except DAMAGED_ZIP as error:
            raise CheckpointError(
                f"{path}: a zip file, as torch.save writes, but damaged or cut short ({error}): copy it again."
            ) from error
        self.members = {info.filename: info for info in infos}
        if len(self.members) < len(infos):
            raise CheckpointError(f"{path}: a zip file with two members of one name: which is meant is not known.")
        self.folder = self._folder()
        self.storages: dict[tuple[str, str], Storage] = {}

    def _folder(self) -> str:
        pickles = [name for name in self.members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{self.path}: a zip file that torch.save did not write. It has no FOLDER/data.pkl but "
                f"{', '.join(sorted(self.members)[:5]) or 'nothing'}. If it is an archive of a checkpoint, unpack it."
            )
        folder = pickles[0].removesuffix("data.pkl")
        for name in sorted(self.members):
            if name.startswith(f"{folder}code/") or name == f"{folder}constants.pkl":
                raise CheckpointError(
                    f"{self.path}: a TorchScript archive, a program with weights (it holds {name}). Save its weights "
                    "alone: torch.save(torch.jit.load(FILE).state_dict(), OTHER)."
                )
        return folder

    def has(self, name: str) -> bool:
        return self.folder + name in self.members

    def read(self, name: str, limit: int | None = None) -> Any:
        """Return a member's bytes: a view of the mapped file where it is stored as it is, else unpacked."""
        info = self.members[self.folder + name]
        where = f"{self.path}: {info.filename}"
        signature, *lengths = LOCAL_HEADER.unpack(bytes(self.data[info.header_offset :][:30]).ljust(30, b"\0"))
        packed = self.data[info.header_offset + 30 + sum(lengths) :][: info.compress_size]
        if signature != b"PK\3\4" or len(packed) < info.compress_size or info.flag_bits & 1:
            raise CheckpointError(f"{where} is damaged, cut short or encrypted: copy the file again.")
        if limit is not None and info.file_size > limit:
            raise CheckpointError(f"{where} unpacks to {info.file_size} bytes: allowed are {limit}.")
        if info.compress_type == zipfile.ZIP_STORED:
            content = packed
        elif info.compress_type == zipfile.ZIP_DEFLATED:
            content = _inflate(packed, info.file_size, where)
        else:
            raise CheckpointError(f"{where} is packed by method {info.compress_type}: allowed are stored and deflated.")
        # torch writes 0 where it was told to leave the checksum out
        if len(content) != info.file_size or (info.CRC and zlib.crc32(content) != info.CRC):
            raise CheckpointError(f"{where} is damaged, its size or checksum is wrong: copy the file again.")
        return content

    def storage(self, pid: Any) -> Storage:
        """Return the storage of a persistent id."""
        key, dtype, numel, view = storage_id(pid)
        if view is not None:
            raise BadValue(f"storage {key[:200]} is a view of another, which no zip checkpoint has.")
        name, nbytes = f"{self.folder}data/{key}", numel * DTYPES[dtype].itemsize
        info = self.members.get(name)
        if nbytes != (info.file_size if info else 0):
            has = f"has {info.file_size} bytes" if info else "is missing"
            raise BadValue(f"storage {name[:200]} {has}; {nbytes} are needed for {numel} elements of {dtype}.")
        if (key, dtype) not in self.storages:
            read = functools.partial(self.read, f"data/{key}") if info else bytes
            if info and info.compress_type == zipfile.ZIP_STORED:
                read = functools.cache(read)  # a view that costs no memory, whose checksum is verified once
            self.storages[key, dtype] = Storage(name, dtype, numel, read)
        return self.storages[key, dtype]


def _inflate(packed: memoryview, size: int, where: str) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size or 1)  # 0 would mean without limit
    except (zlib.error, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{where} cannot be unpacked ({error}): copy the file again.") from error


def read_legacy(path: Path) -> Unpickled:
    """Read what torch.save wrote before 1.6: pickles of magic number, protocol, system, object and keys, then storages.

    Raises:
        RunsCodeError: one of the pickles tries to run code, whether torch wrote it or not.
        CheckpointError: another kind of pickle, or a damaged one.
    """
    return _Legacy(path).read()


class _Legacy:
    """A stream of pickles, and the storages behind them, whose places are known at the end."""

    def __init__(self, path: Path):
        self.path, self.data = path, mapped(path)
        self.stream: Any = self.data.obj  # the mapping itself reads like a file
        self.storages: dict[str, Storage] = {}
        self.starts: dict[str, int] = {}

    def read(self) -> Unpickled:
        where = str(self.path)
        try:
            magic = unpickle(self.stream, where).value
        except RunsCodeError:
            raise
        except CheckpointError as error:
            raise CheckpointError(
                f"{where}: not a checkpoint, or cut short: it begins with {bytes(self.data[:16])!r}. Allowed are "
                "safetensors and what torch.save writes."
            ) from error
        if magic != LEGACY_MAGIC:
            raise CheckpointError(
                f"{where}: a pickle that torch.save did not write. Where you trust it, load it and save its tensors "
                "with torch.save or as safetensors."
            )
        protocol = unpickle(self.stream, where).value
        system = unpickle(self.stream, where).value
        if protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
            raise CheckpointError(f"{where}: a torch file of a protocol other than {LEGACY_PROTOCOL}, or damaged.")
        if system.get("little_endian") is not True:
            raise CheckpointError(
                f"{where}: saved on a big-endian machine: allowed is little-endian. Load it with torch and save it "
                "again on an ordinary machine."
            )
        found = unpickle(self.stream, where, known=KNOWN, persistent=self.storage)
        self._locate(unpickle(self.stream, where).value)
        return found

    def storage(self, pid: Any) -> Storage:
        """Return the storage of a persistent id, or the part of it that is meant."""
        key, dtype, numel, view = storage_id(pid)
        known = self.storages.setdefault(
            key, Storage(f"{key[:200]!r}", dtype, numel, functools.partial(self._bytes, key, numel, dtype))
        )
        if (known.dtype, known.numel) != (dtype, numel):
            raise BadValue(f"storage {known.name} is declared twice, with {known.numel} and with {numel} elements.")
        if view is None:
            return known
        if not (isinstance(view, tuple) and len(view) == 3 and all(isinstance(v, int) and v >= 0 for v in view[1:])):
            raise BadValue(f"storage {known.name} has a damaged view.")
        _, offset, size = view
        if offset + size > numel:
            raise BadValue(f"a view of storage {known.name} reaches to element {offset + size} of {numel}.")
        start, end = (count * DTYPES[dtype].itemsize for count in (offset, offset + size))
        return Storage(known.name, dtype, size, lambda: known.read()[start:end])

    def _bytes(self, key: str, numel: int, dtype: str) -> memoryview:
        return self.data[self.starts[key] :][: numel * DTYPES[dtype].itemsize]

    def _locate(self, keys: Any) -> None:
        """Find where the bytes of every storage begin: behind their number of elements, in the order of `keys`."""
        position = self.stream.tell()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise CheckpointError(f"{self.path}: damaged: it has no list of storages.")
        if sorted(keys) != sorted(self.storages):
            raise CheckpointError(f"{self.path}: damaged: its list of storages differs from those that tensors use.")
        for key in keys:
            storage = self.storages[key]
            count, end = self.data[position : position + 8], position + 8 + storage.nbytes
            if end > len(self.data):
                raise CheckpointError(
                    f"{self.path}: cut short: storage {storage.name} ends at byte {end}, the file at {len(self.data)}. "
                    "Copy it again."
                )
            if int.from_bytes(count, "little") != storage.numel:
                raise CheckpointError(
                    f"{self.path}: damaged: storage {storage.name} should hold {storage.numel} elements."
                )
            self.starts[key] = position + 8
            position = end


# safetensors' names of dtypes
SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"} | {
    f"{sign}{bits}": f"{kind}{bits}" for sign, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


def read_safetensors(path: Path) -> Unpickled:
    """Read a safetensors file: names and tensors, nothing else.

    Raises:
        CheckpointError: it is damaged, or a tensor's dtype is none that weights have.
    """
    try:
        opened = safe_open(path, framework="numpy")
        tensors = {}
        for key in opened.keys():  # noqa: SIM118  it is no dict
            window = opened.get_slice(key)
            dtype = SAFETENSORS.get(window.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{path}: {key} is of dtype {window.get_dtype()}: allowed are {', '.join(SAFETENSORS)}. Cast it."
                )
            tensors[key] = Tensor(tuple(window.get_shape()), dtype, functools.partial(opened.get_tensor, key))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: a safetensors file, but damaged or cut short ({error}): copy it again."
        ) from error
    return Unpickled(tensors, frozenset())


def mapped(path: Path) -> memoryview:
    """Return a read-only view of a file that is not empty; it holds the mapping, which is its `obj`."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
