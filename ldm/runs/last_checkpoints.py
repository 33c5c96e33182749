"""The last checkpoints of a run: `last.ckpt`, before it `last-1.ckpt` and so on; integrity, rotation and disk space."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ldm.checkpoint.files import check_header
from ldm.errors import UserError

LAST = "last.ckpt"
SLACK = 4 * 2**20  # bytes of a file beside its tensors, at most
_EARLIER = re.compile(r"last-([1-9][0-9]{0,8})\.ckpt")


class NoRoomError(UserError):
    """The disk has less room than the next checkpoint takes; nothing was written."""


def kept(folder: Path) -> list[Path]:
    """The last checkpoints in a run's checkpoints folder, newest first, corrupt ones included."""
    earlier = {int(found[1]): path for path in folder.glob("last-*.ckpt") if (found := _EARLIER.fullmatch(path.name))}
    newest = [folder / LAST] if (folder / LAST).is_file() else []
    return [*newest, *(earlier[number] for number in sorted(earlier))]


def corruption(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if it is whole.

    Compares the header with the file's size and every record with its checksum: the file is read once.
    """
    try:
        if check_header(path):
            with zipfile.ZipFile(path) as file:
                record = file.testzip()
            return None if record is None else f"{record} does not match its checksum"
    except UserError as error:
        return (str(error).splitlines() or ["corrupt"])[0].removeprefix(f"{path}: ")
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        return f"cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


def publish(fresh: Path, folder: Path, keep: int) -> None:
    """Make a whole new file the run's `last.ckpt` and keep the last `keep` - 1 files before it.

    A kill at any moment leaves a whole `last.ckpt`, or, on a file system without hard links, at least `last-1.ckpt`. A
    corrupt `last.ckpt` is replaced and displaces no whole one.
    """
    names = [folder / LAST, *(folder / f"last-{number}.ckpt" for number in range(1, keep))]
    if keep > 1 and _has_sound_header(names[0]) and not _is_same(*names[:2]):
        for newer, older in reversed(list(pairwise(names[1:]))):
            if newer.is_file():
                os.replace(newer, older)
        _second_name(names[0], names[1])
    os.replace(fresh, names[0])
    for path in kept(folder):
        if path not in names:
            path.unlink()
    _settle(folder)


def check_room(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Raise NoRoomError unless there is room for a checkpoint beside those that are there."""
    needed = num_bytes(checkpoint) + SLACK
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise NoRoomError(
            f"{path.parent}: expected {_size(needed)} of free space for the next checkpoint, found {_size(free)}: the "
            "disk is full. Nothing was written, and the existing checkpoints are unchanged; free some space, "
            "or keep fewer with lightning.callbacks.last_checkpoint.params.keep_last=1"
        )


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers as saved: whole storages, shared ones once."""
    return sum({pointer: size for pointer, size in _storages(value)}.values())


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _storages(getattr(value, name))
        else:
            storage = value.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _storages(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _storages(part)


def _has_sound_header(path: Path) -> bool:
    try:
        check_header(path)
    except (UserError, OSError):
        return False
    return True


def _is_same(path: Path, other: Path) -> bool:
    """Whether both names are one file, as after a kill between the two steps of `publish`."""
    return path.exists() and other.exists() and path.samefile(other)


def _second_name(path: Path, name: Path) -> None:
    between = name.with_name(f".{name.name}.partial")
    between.unlink(missing_ok=True)
    try:
        os.link(path, between)
    except OSError:  # no hard links here
        os.replace(path, name)
    else:
        os.replace(between, name)


def _settle(folder: Path) -> None:
    """Flush the folder: file names survive a power cut, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems do not support this
        pass
    finally:
        os.close(handle)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
