"""Checkpoint files -> their contents, without running anything that a file names.

A file of N bytes takes at most N + 64 MB of memory: before `torch.load(weights_only=True, mmap=True)`, the zip
directory is compared with the file's size and the pickle is scanned without being executed. Harmless classes that
public checkpoints name become stand-ins; any other class is refused by name.
"""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ldm.errors import CheckpointError
from ldm.modules.state_dicts import few

MAX_DIRECTORY = 2**22  # bytes of a zip directory, enough for 30,000 records
OBJECTS = 24 * 2**20  # bytes of Python objects that any pickle may create, plus six times the file size
# Allowed by `weights_only`, but allocate as many bytes as their argument says.
ALLOCATORS = re.compile(r"(builtins|__builtin__) bytearray|torch(\.\w+)? \w*Tensor|torch.storage TypedStorage")
# Approximate bytes that an operation of torch's restricted unpickler creates.
COSTS = {
    **dict.fromkeys(
        "PROTO STOP GLOBAL APPEND APPENDS SETITEMS NONE NEWFALSE NEWTRUE EMPTY_TUPLE BININT BININT1 BININT2 BINFLOAT "
        "BINUNICODE SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG1 BUILD".split(),
        40,
    ),
    **dict.fromkeys("MARK TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT".split(), 72),
    **dict.fromkeys("LONG_BINPUT SETITEM".split(), 110),
    **{"EMPTY_SET": 224, "REDUCE": 500, "NEWOBJ": 500},
}
GROWING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")


class HeaderError(ValueError):
    """A file that claims more than its size allows."""


def check_header(path: Path) -> bool:
    """Raise `CheckpointError` unless a PyTorch file has the records and storages it claims; whether it is a zip."""
    try:
        with path.open("rb") as file:
            is_zip = file.read(1) == b"P"
            (_check_zip if is_zip else _check_legacy)(file, path.stat().st_size)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, OverflowError) as error:
        reason = error if isinstance(error, HeaderError) else f"{type(error).__name__}: {str(error)[:80]}"
        raise _corrupt(path, "PyTorch", reason) from None
    except (OSError, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise _corrupt(path, "PyTorch", error) from None
    return is_zip


def _check_zip(file: BinaryIO, size: int) -> None:
    directory = _directory_size(file, size)
    with zipfile.ZipFile(file) as archive:
        records = _record_sizes(archive, size - directory - 22)
        folders = {name.partition("/")[0] for name in records}
        if len(folders) != 1:
            raise HeaderError(f"expected one folder in the zip, found {len(folders)}")
        folder = folders.pop()
        if f"{folder}/constants.pkl" in records:
            raise HeaderError("a TorchScript program, not weights")
        if f"{folder}/data.pkl" not in records:
            raise HeaderError(f"no {folder[:80]}/data.pkl in the zip")
        scan = _Scan(OBJECTS + 6 * size)
        scan.read(io.BytesIO(archive.read(f"{folder}/data.pkl")))
    for key, claimed in scan.storages.items():
        found = records.get(f"{folder}/data/{key}")
        if found is None or claimed > found:
            there = "no such record" if found is None else f"{found:,} bytes"
            raise HeaderError(f"storage {key[:80]} claims {claimed:,} bytes, found {there}")


def _directory_size(file: BinaryIO, size: int) -> int:
    file.seek(max(0, size - 98))
    tail = file.read()
    if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise HeaderError("no zip directory at its end")
    has_64 = tail[-42:-38] == b"PK\x06\x07" and tail[-98:-94] == b"PK\x06\x06"
    directory = struct.unpack("<Q", tail[-58:-50])[0] if has_64 else struct.unpack("<L", tail[-10:-6])[0]
    if directory > min(size, MAX_DIRECTORY):
        raise HeaderError(f"a zip directory of {directory:,} bytes")
    return directory


def _record_sizes(archive: zipfile.ZipFile, stop: int) -> dict[str, int]:
    """Names and bytes of the records, which must be stored one after the other, uncompressed, before `stop`."""
    found = sorted(archive.infolist(), key=lambda record: record.header_offset)
    for record in found:
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise HeaderError(f"the record {record.filename[:80]!r} is compressed")
        if record.compress_size != record.file_size:
            raise HeaderError(f"the record {record.filename[:80]!r} has two sizes")
    records = {record.filename: record.file_size for record in found}
    starts = [*(record.header_offset for record in found), stop]
    ends = [record.header_offset + 30 + record.file_size for record in found]
    overlap = any(end > start for end, start in zip(ends, starts[1:], strict=True))
    if len(records) < len(found) or starts[0] != 0 or overlap:
        raise HeaderError("the records of the zip overlap")
    return records


def _check_legacy(opened: BinaryIO, size: int) -> None:
    """A file from before PyTorch 1.6: five pickles (magic, protocol, system, contents, keys), then the storages."""
    with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        claimed, scan = 0, _Scan(OBJECTS + 6 * size)
        for _ in range(5):
            scan.read(file)
            claimed += sum(scan.storages.values())
        if claimed > size - file.tell():
            raise HeaderError(f"its storages claim {claimed:,} bytes, found {size - file.tell():,}")


class _Value:
    """A value of a scanned pickle. weight: bytes of a copy of it. content: a scalar, or the values in a tuple."""

    __slots__ = ("content", "is_inside", "weight")

    def __init__(self, weight: int, content: Any = None) -> None:
        self.weight, self.content, self.is_inside = min(weight, 2**62), content, False


class _Scan:
    """Reads pickles without executing them: `storages` are the bytes that each storage of the last one claims.

    room: bytes of objects that all of them may create. Calls and dict keys are charged the size of their argument, with
    shared parts counted each time: a short pickle can copy or hash the same list again and again.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.storages: dict[str, int] = {}

    def read(self, file: Any) -> None:
        """Scan one pickle; raises `HeaderError`, or what `pickletools` raises for a malformed one."""
        self.stack: list[_Value | None] = []
        self.memo: dict[int, _Value] = {}
        self.storages = {}
        for code, argument, _ in pickletools.genops(file):
            name = code.name
            if name not in COSTS:
                raise HeaderError(f"a pickle with the operation {name}")
            self.charge(COSTS[name])
            if name == "MARK":
                self.stack.append(None)
            elif name.endswith("BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name.endswith("BINGET"):
                self.stack.append(self.memo[argument])
            elif name in GROWING:
                self.grow(name, self.pop(code))
            elif name not in ("PROTO", "STOP"):
                self.stack.append(self.create(name, argument, self.pop(code)))

    def charge(self, num_bytes: int) -> None:
        self.room -= num_bytes
        if self.room < 0:
            raise HeaderError("a pickle that creates more objects than a checkpoint of this size holds")

    def pop(self, code: pickletools.OpcodeInfo) -> list[_Value]:
        """What an operation takes off the stack, the top first."""
        parts: list[_Value] = []
        takes = [kind for kind in code.stack_before if kind not in (pickletools.markobject, pickletools.stackslice)]
        if len(takes) < len(code.stack_before):
            while (top := self.stack.pop()) is not None:
                parts.append(top)
        parts += [self.stack.pop() for _ in takes]
        for part in parts if code.name not in GROWING else parts[:-1]:
            part.is_inside = True
        return parts

    def grow(self, name: str, parts: list[_Value]) -> None:
        target = parts.pop()
        if target.is_inside:
            raise HeaderError("a pickle that changes a container inside another")
        weight = sum(part.weight for part in parts)
        if name == "BUILD":
            self.charge(weight)
        elif name.startswith("SETITEM"):
            self.charge(sum(key.weight for key in parts[1::2]) + len(parts) // 2 * COSTS["SETITEM"])
        target.weight = min(target.weight + weight, 2**62)
        self.stack.append(target)

    def create(self, name: str, argument: Any, parts: list[_Value]) -> _Value:
        weight = 8 + sum(part.weight for part in parts) + (len(argument) if isinstance(argument, str) else 0)
        if name in ("REDUCE", "NEWOBJ"):
            if str(parts[1].content).endswith("Storage"):
                raise HeaderError(f"a call of {parts[1].content[:80]}, which allocates memory")
            self.charge(weight)
        elif name == "BINPERSID":
            self.claim(parts[0].content)
        elif name == "GLOBAL":
            if ALLOCATORS.fullmatch(argument):
                raise HeaderError(f"the name {argument[:80]}, which allocates memory")
            return _Value(8, argument.replace(" ", "."))
        elif name.startswith("TUPLE"):
            return _Value(weight, parts[::-1] if len(parts) < 7 else None)
        return _Value(weight, argument)

    def claim(self, content: Any) -> None:
        """Record the bytes of a storage: "storage", its type, key, device and number of values."""
        tag, kind, key, _, count = [part.content for part in content[:5]] if isinstance(content, list) else [None] * 5
        if tag != "storage":
            raise HeaderError("a reference to something that is no storage")
        itemsize = VALUE_BYTES.get(str(kind).rpartition(".")[2].removesuffix("Storage"))
        if itemsize is None:
            raise HeaderError(f"a storage of the type {str(kind)[:80]}")
        if type(count) is not int or count < 0:
            raise HeaderError(f"a storage of {str(count)[:40]} values")
        self.storages[str(key)] = max(self.storages.get(str(key), 0), count * itemsize)


# Bytes of a value in torch's storage classes, whose own dtypes are deprecated to read.
VALUE_BYTES = {
    **dict.fromkeys(("Untyped", "Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
MAX_SHARING = 4  # all tensors together may have so many times the size of the file


class _Nothing:
    """Stand-in for a foreign class in a pickle: ignores its arguments and state."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _OptimizerState(torch.Tensor):
    """Stand-in for the quantised optimiser states of torchao in our training checkpoints."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError("a stand-in for an optimiser state has no values")

    def __setstate__(self, state: Any) -> None:
        pass


# What a checkpoint may name besides what `weights_only` allows: the public Stable Diffusion files name the Lightning
# class, and some hold numpy scalars (`numpy._core` is numpy 2's name of `numpy.core`).
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
    """The dict in a PyTorch or safetensors file, recognised by content; raises `CheckpointError`.

    A safetensors file gives its tensors at `state_dict` and its strings at `metadata`.
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
        "that it holds the weights and is not, for example, a web page or a Git LFS pointer."
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise _corrupt(path, "safetensors", error) from None
    return {"state_dict": _plain_tensors(tensors, path), "metadata": metadata}


def _read_pickle(path: Path) -> Mapping[str, Any]:
    is_zip = check_header(path)
    with torch.serialization.safe_globals(list(STAND_INS)):
        try:
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
            if not refused:
                contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            # Files from before PyTorch 1.6 name their classes only while they are read.
            named = re.search(r"GLOBAL (\S+)", str(error))
            if named is None:
                raise _corrupt(path, "PyTorch", error) from None
            refused = [named.group(1)]
        except Exception as error:  # calls in an untrusted pickle may fail in any way
            raise _corrupt(path, "PyTorch", error) from None
    if refused:
        raise CheckpointError(
            f"{path}: expected weights only, found a pickle that names {few(sorted(refused))}, which may run foreign "
            "code. Nothing in it was run. Take the .safetensors file of the same model instead."
        )
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(contents).__name__}")
    contents = dict(dict.items(contents))  # without attributes
    if isinstance(state := contents.get("state_dict"), dict):
        return contents | {"state_dict": _plain_tensors(dict(dict.items(state)), path)}
    return _plain_tensors(contents, path)


def _plain_tensors(state: dict[Any, Any], path: Path) -> dict[str, Any]:
    """The state dict with plain tensors; raises `CheckpointError` for others. Other values stay as they are."""
    total, found = 0, {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            problem = _oddness(name, value)
            total += value.numel() * value.element_size()
            if problem is None and total > MAX_SHARING * path.stat().st_size:
                problem = f"tensors of {total:,} bytes and more, which share their values,"
            if problem is not None:
                raise CheckpointError(
                    f"{path}: expected plain tensors with names, found {problem} at {str(name)[:80]!r} (the file has "
                    f"{path.stat().st_size:,} bytes). Take another file of the same model."
                )
            value = torch.Tensor.detach(value)  # noqa: PLW2901 - without attributes
        found[name] = value
    return found


def _oddness(name: Any, tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be a weight; None if it can."""
    if not isinstance(name, str):
        return f"a name that is a {type(name).__name__}"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return "one that is sparse, quantised or without values"
    if not tensor.numel():
        return f"an empty one of shape {list(tensor.shape)[:8]}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"one of shape {list(tensor.shape)[:8]} that repeats fewer values"
    return None


def _corrupt(path: Path, form: str, error: object) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return CheckpointError(
        f"{path}: expected a complete {form} checkpoint, found one that is corrupt or truncated ({reason}; "
        f"{path.stat().st_size:,} bytes). Download or copy it again."
    )
