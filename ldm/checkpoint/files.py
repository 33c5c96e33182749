"""Checkpoint files of every kind -> their contents, without running anything that a file names.

Headers are compared with the file's size first (`checkpoint_header`). Pickles are opened with `weights_only=True`, the
few harmless classes that public checkpoints mention are replaced by stand-ins that do nothing, and anything else is
refused by its name. Tensors stay mapped to the file until they are used, so that opening 4 GB costs neither time nor
memory.
"""

from __future__ import annotations

import _compat_pickle
import io
import mmap
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ldm.errors import CheckpointError
from ldm.modules.state_dicts import few

MAX_RECORDS = 200_000
SLACK = 2**20
OBJECTS = 24 * 2**20  # bytes of Python objects that any file may unpickle to, and six times its size more
END, DIRECTORY, LOCAL = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
END64_LOCATOR, END64 = b"PK\x06\x07", b"PK\x06\x06"
WORD = 0xFFFFFFFF

# Bytes of one value of each kind of storage.
STORAGES = {
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8), **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2), "ComplexDouble": 16,
    **dict.fromkeys(("Char", "Byte", "Bool", "Untyped", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1),
}  # fmt: skip
# What `weights_only` would call though it allocates as many bytes as it is told to.
ALLOCATORS = ("builtins.bytearray", "torch.Tensor")
# The operations that PyTorch's own reader knows.
OPERATIONS = (
    pickle.PROTO, pickle.STOP, pickle.GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD, pickle.APPEND, pickle.APPENDS,
    pickle.SETITEM, pickle.SETITEMS, pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.NONE, pickle.NEWFALSE, pickle.NEWTRUE, pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_DICT,
    pickle.EMPTY_SET, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.BINFLOAT, pickle.BINUNICODE,
    pickle.SHORT_BINSTRING, pickle.BINPERSID, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT,
    pickle.LONG1,
)  # fmt: skip
# About the bytes that an operation takes, here or when the pickle is loaded: an object and its place in a list.
COSTS = {
    **dict.fromkeys(OPERATIONS, 40), pickle.EMPTY_SET: 224, pickle.EMPTY_DICT: 72, pickle.EMPTY_LIST: 64,
    pickle.MARK: 72, pickle.TUPLE: 64, pickle.TUPLE1: 64, pickle.TUPLE2: 64, pickle.TUPLE3: 72, pickle.LONG_BINPUT: 110,
    pickle.SETITEM: 110, pickle.REDUCE: 500, pickle.NEWOBJ: 500,
}  # fmt: skip


class HeaderError(ValueError):
    """A file that claims what its size does not bear out."""


def check_zip(path: Path) -> set[str]:
    """The foreign names in the pickle of a zip that may be loaded. Raises HeaderError."""
    with path.open("rb") as file:
        records = _records(file)
        folders = {name.partition("/")[0] for name in records}
        if len(folders) != 1:
            raise HeaderError(f"expected one folder in the zip, found {len(folders)}")
        folder = folders.pop()
        if f"{folder}/constants.pkl" in records:
            raise HeaderError("a TorchScript program, not weights")
        if f"{folder}/data.pkl" not in records:
            raise HeaderError(f"no {folder[:80]}/data.pkl in the zip")
        content = _content(file, *records[f"{folder}/data.pkl"])
    machine = _Machine(io.BytesIO(content), len(content), OBJECTS + 6 * path.stat().st_size)
    machine.run()
    for key, size in machine.storages.items():
        place = records.get(f"{folder}/data/{key}")
        if place is None or size > place[1]:
            found = "no such record" if place is None else f"{place[1]:,} bytes"
            raise HeaderError(f"storage {key[:80]} is said to have {size:,} bytes, found {found}")
    return machine.names


def check_old(path: Path) -> set[str]:
    """As `check_zip`, for a file from before PyTorch 1.6."""
    names: set[str] = set()
    size = path.stat().st_size
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        needed, room = 0, OBJECTS + 6 * size
        for _ in range(5):  # a number, the protocol, the machine, the contents, the names of the storages
            machine = _Machine(file, size, room)
            machine.run()
            room = machine.room
            names |= machine.names
            needed += sum(machine.storages.values())
        if needed > size - file.tell():
            raise HeaderError(f"its storages are said to have {needed:,} bytes, found {size - file.tell():,}")
    return names


def _records(file: io.BufferedReader) -> dict[str, tuple[int, int]]:
    """Name -> where its local header is and how many bytes it has; all of it laid out as PyTorch writes it."""
    total = file.seek(0, io.SEEK_END)
    first, length, count = _directory_place(file, total)
    if first + length > total or count > min(MAX_RECORDS, length // 46):
        raise HeaderError("the directory of the zip does not fit into the file")
    file.seek(first)
    directory = file.read(length)
    records: dict[str, tuple[int, int]] = {}
    position = 0
    for _ in range(count):
        name, record, position = _record(directory, position)
        if name in records:
            raise HeaderError(f"the record {name[:80]!r} is there twice")
        records[name] = record
    if position != length:
        raise HeaderError("the directory of the zip has an end of its own")
    end = 0
    for name, (offset, size) in sorted(records.items(), key=lambda item: item[1]):
        if offset < end or offset + size + 30 > first:
            raise HeaderError(f"the record {name[:80]!r} lies over another or beyond the file")
        end = offset + size + 30
    return records


def _directory_place(file: io.BufferedReader, total: int) -> tuple[int, int, int]:
    """Where the directory is, its bytes and records."""
    if total < 22:
        raise HeaderError("no end of a zip")
    file.seek(total - 22)
    tail = file.read(22)
    if tail[:4] != END or tail[20:] != b"\0\0":
        raise HeaderError("no end of a zip")
    disks, count, length, first = tail[4:8], *struct.unpack("<HLL", tail[10:20])
    if disks not in (b"\0\0\0\0", b"\xff\xff\xff\xff"):
        raise HeaderError("a zip of several parts")
    stop = total - 22
    if total >= 22 + 20 + 56:
        file.seek(total - 22 - 20)
        locator = file.read(20)
        if locator[:4] == END64_LOCATOR:
            stop = struct.unpack("<Q", locator[8:16])[0]
            if stop != total - 22 - 20 - 56:
                raise HeaderError("the end of the zip does not fit together")
            file.seek(stop)
            wide = file.read(56)
            if wide[:4] != END64:
                raise HeaderError("the end of the zip does not fit together")
            count, length, first = struct.unpack("<QQQ", wide[32:56])
    if first + length != stop:
        raise HeaderError("something lies between the directory of the zip and its end")
    return first, length, count


def _record(directory: bytes, position: int) -> tuple[str, tuple[int, int], int]:
    """An entry of the directory: name, where and how long the record is; and where the next entry begins."""
    entry = directory[position : position + 46]
    if len(entry) < 46 or entry[:4] != DIRECTORY:
        raise HeaderError("the directory of the zip is damaged")
    flags, method = struct.unpack("<HH", entry[8:12])
    packed, size, len_name, len_extra, len_comment = struct.unpack("<LLHHH", entry[20:34])
    offset = struct.unpack("<L", entry[42:46])[0]
    raw = directory[position + 46 : position + 46 + len_name]
    extra = directory[position + 46 + len_name : position + 46 + len_name + len_extra]
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise HeaderError("a record whose name is no text") from None
    if method != 0 or flags & 1:
        raise HeaderError(f"the record {name[:80]!r} is packed, so that nobody knows what it grows to")
    size, packed, offset = _wide(extra, size, packed, offset)
    if packed != size:
        raise HeaderError(f"the record {name[:80]!r} is said to have {size:,} bytes and {packed:,} at once")
    return name, (offset, size), position + 46 + len_name + len_extra + len_comment


def _wide(extra: bytes, *values: int) -> list[int]:
    """The numbers of an entry, those that do not fit there from its field of 64-bit numbers."""
    found, position = list(values), 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[position : position + 4])
        field = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind == 1:
            wide = [number for (number,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            found = [wide.pop(0) if value == WORD and wide else value for value in found]
    return found


def _content(file: io.BufferedReader, offset: int, size: int) -> bytes:
    file.seek(offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != LOCAL:
        raise HeaderError("a record without its header")
    len_name, len_extra = struct.unpack("<HH", header[26:30])
    file.seek(len_name + len_extra, io.SEEK_CUR)
    return file.read(size)


class _Stand(dict):
    """What a call or a new object would have given; takes items, as an OrderedDict does."""

    __slots__ = ()


class _Machine(pickle._Unpickler):  # the one in Python: the one in C allocates before it looks
    """Reads one pickle; `names` are those it wants to call, `storages` the bytes of each of its storages.

    room: bytes of objects that it may make; a pickle is a program, and one byte of it makes a set of 200.
    """

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in OPERATIONS}  # noqa: RUF012 - as its parent's

    def __init__(self, file: Any, size: int, room: int) -> None:
        super().__init__(file, encoding="bytes")
        self.room = room
        self.names: set[str] = set()
        self.storages: dict[str, int] = {}
        self._budget = 16 * size + SLACK  # values that calls may copy, all together

    def run(self) -> None:
        try:
            self.load()
        except HeaderError:
            raise
        except (pickle.UnpicklingError, struct.error, RecursionError) as error:
            raise HeaderError(f"a damaged pickle ({error})") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, OverflowError) as error:
            raise HeaderError(f"a damaged pickle ({type(error).__name__}: {str(error)[:80]})") from None

    def find_class(self, module: str, name: str) -> str:
        if (module, name) in _compat_pickle.NAME_MAPPING:
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        full = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        if full in ALLOCATORS or (full.startswith("torch.") and full.endswith("Tensor") and full.count(".") < 4):
            raise HeaderError(f"{full[:80]}, which allocates whatever it is told to")
        self.names.add(full)
        return full

    def persistent_load(self, pid: Any) -> _Stand:
        """A storage: "storage", its kind, name, device and number of values."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
            raise HeaderError("a reference to something that is no storage")
        kind, key, count = pid[1], pid[2], pid[4]
        each = STORAGES.get(kind.rpartition(".")[2].removesuffix("Storage")) if isinstance(kind, str) else None
        if each is None:
            raise HeaderError(f"a storage of the kind {str(kind)[:80]}")
        if not isinstance(key, str | bytes) or type(count) is not int or count < 0:
            raise HeaderError(f"a storage of {str(count)[:40]} values")
        key = key if isinstance(key, str) else key.decode("latin-1")
        self.storages[key] = max(self.storages.get(key, 0), count * each)
        return _Stand()

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self._call(self.stack[-1], arguments)
        self.stack[-1] = _Stand()

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self._call(self.stack.pop(), arguments)
        self.append(_Stand())

    def load_build(self) -> None:
        self._spend(self.stack.pop())

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        self.take(len(self.stack) // 2 * COSTS[pickle.SETITEM])
        super().load_setitems()

    def take(self, num_bytes: int) -> None:
        """Count the bytes of objects that are about to be made."""
        self.room -= num_bytes
        if self.room < 0:
            raise HeaderError("a pickle of more objects than a file of this size has any use for")

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, str | _Stand) or not isinstance(arguments, tuple):
            raise HeaderError("a call of something that is no function")
        self._spend(arguments)
        if isinstance(function, _Stand):  # of what a call gave, as foreign code does; its names will be refused
            return
        if function.endswith("Storage"):
            raise HeaderError(f"a call of {function[:80]}, which allocates whatever it is told to")
        if function in ("builtins.set", "collections.OrderedDict", "collections.Counter") and arguments:
            self._check_keys(arguments[0] if isinstance(arguments[0], list | tuple) else ())
            if function != "builtins.set":
                raise HeaderError(f"{function} made of a list, which only copies")

    def _spend(self, value: Any, depth: int = 3) -> None:
        """Count what a call may copy: its arguments and what is inside them."""
        if not isinstance(value, str | bytes | list | tuple | dict):
            return
        self._budget -= 1 + len(value)
        if self._budget < 0:
            raise HeaderError("a pickle that copies the same things again and again")
        if depth and not isinstance(value, str | bytes):
            for part in value.values() if isinstance(value, dict) else value:
                self._spend(part, depth - 1)

    @staticmethod
    def _check_keys(keys: Any) -> None:
        """Only what is quick to hash: of tuples in tuples that takes for ever."""
        for key in keys:
            if not isinstance(key, str | bytes | int | float | None):
                raise HeaderError(f"a key that is a {type(key).__name__}")


for _code, _own in (
    (pickle.REDUCE, _Machine.load_reduce), (pickle.NEWOBJ, _Machine.load_newobj), (pickle.BUILD, _Machine.load_build),
    (pickle.SETITEM, _Machine.load_setitem), (pickle.SETITEMS, _Machine.load_setitems),
):  # fmt: skip
    _Machine.dispatch[_code[0]] = _own


def _counted(operation: Callable[[_Machine], None], cost: int) -> Callable[[_Machine], None]:
    def run(machine: _Machine) -> None:
        machine.take(cost)
        operation(machine)

    return run


for _code, _cost in COSTS.items():
    if _code != pickle.STOP:
        _Machine.dispatch[_code[0]] = _counted(_Machine.dispatch[_code[0]], _cost)


MAX_SHARING = 4  # times the size of the file that all its tensors may have


class _Nothing:
    """Stands for a foreign class in a pickle: takes whatever it is given and keeps none of it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _OptimizerState(torch.Tensor):
    """Stands for the quantised tensors of torchao's optimisers, which lie in our own training checkpoints."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError("this tensor stands for an optimiser state that was left on the disk")

    def __setstate__(self, state: Any) -> None:
        pass


# All that a checkpoint may name besides what `weights_only` itself allows (tensors, containers, `_codecs.encode`): the
# public Stable Diffusion files name the Lightning class and some hold numpy scalars, `numpy._core` being numpy 2's
# name of `numpy.core`.
STAND_INS = (
    (_Nothing, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Nothing, "numpy.core.multiarray.scalar"),
    (_Nothing, "numpy._core.multiarray.scalar"),
    (_Nothing, "numpy.dtype"),
    (_OptimizerState, "torchao.optim.subclass_8bit.OptimState8bit"),
    (_OptimizerState, "torchao.optim.subclass_4bit.OptimState4bit"),
    (_OptimizerState, "torchao.optim.subclass_fp8.OptimStateFp8"),
)


def read_file(path: Path) -> Mapping[str, Any]:
    """The dict in a PyTorch or safetensors file, told apart by content; raises `CheckpointError`.

    That of a safetensors file has the tensors at `state_dict`, and its strings at `metadata`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, found {'none' if not path.exists() else 'something else'}.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from None
    if not start:
        raise CheckpointError(f"{path}: expected a checkpoint, found an empty file. Download or copy it again.")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _read_pickle(path)
    raise CheckpointError(
        f"{path}: expected a PyTorch or safetensors checkpoint, found a file that begins with {start[:24]!r}. Check "
        "that it is the weights and not, for example, a web page or a Git LFS pointer in their place."
    )


def check_header(path: Path) -> bool:
    """Raise `CheckpointError` unless a PyTorch file has what it says of itself; whether it is a zip."""
    try:
        with path.open("rb") as file:
            is_zip = file.read(1) == b"P"
        (check_zip if is_zip else check_old)(path)
    except (HeaderError, OSError) as error:
        raise _damaged(path, "PyTorch", error) from None
    return is_zip


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(path, "safetensors", error) from None
    return {"state_dict": _plain_tensors(tensors, path), "metadata": metadata}


def _read_pickle(path: Path) -> Mapping[str, Any]:
    is_zip = check_header(path)
    with torch.serialization.safe_globals(list(STAND_INS)):
        try:
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
            if not refused:
                contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            # Files from before PyTorch 1.6 tell their names only while they are read.
            named = re.search(r"GLOBAL (\S+)", str(error))
            if named is None:
                raise _damaged(path, "PyTorch", error) from None
            refused = [named.group(1)]
        except Exception as error:  # what a stranger's pickle calls may fail in any way
            raise _damaged(path, "PyTorch", error) from None
    if refused:
        raise CheckpointError(
            f"{path}: expected weights only, found a pickle that names {few(sorted(refused))}, which may run foreign "
            "code. Nothing in it was run. Take the .safetensors file of the same model instead."
        )
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(contents).__name__}")
    contents = dict(dict.items(contents))  # whatever attributes it came with
    if isinstance(state := contents.get("state_dict"), dict):
        return contents | {"state_dict": _plain_tensors(dict(dict.items(state)), path)}
    return _plain_tensors(contents, path)


def _plain_tensors(state: dict[Any, Any], path: Path) -> dict[str, Any]:
    """The same with tensors that are no more than numbers in the file; what else is there is left as it is."""
    total, found = 0, {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            problem = _oddness(name, value)
            total += value.numel() * value.element_size()
            if problem is None and total > MAX_SHARING * path.stat().st_size:
                problem = f"tensors of {total:,} bytes and more, which share their numbers,"
            if problem is not None:
                raise CheckpointError(
                    f"{path}: expected plain tensors with names, found {problem} at {str(name)[:80]!r} (the file has "
                    f"{path.stat().st_size:,} bytes). Take another file of the same model."
                )
            value = torch.Tensor.detach(value)  # noqa: PLW2901 - without attributes
        found[name] = value
    return found


def _oddness(name: Any, tensor: torch.Tensor) -> str | None:
    """What keeps a tensor from being taken for weights, in words."""
    if not isinstance(name, str):
        return f"a name that is a {type(name).__name__}"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return "one that is sparse, quantised or without numbers"
    if not tensor.numel():
        return f"an empty one of shape {list(tensor.shape)[:8]}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"one of shape {list(tensor.shape)[:8]} that repeats fewer numbers"
    return None


def _damaged(path: Path, form: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return CheckpointError(
        f"{path}: expected a complete {form} checkpoint, found one that is damaged or half written ({reason}; "
        f"{path.stat().st_size:,} bytes). Download or copy it again."
    )
