"""Batches on their way from reading processes to the training process, through memory that is shared once for all.

torch shares each tensor in memory of its own, whose pages the system has to find, clear and give back for every batch:
that takes longer than reading them. Here each reading process has a few places that it uses in turn.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

ALIGNMENT = 64  # bytes
_RINGS: WeakValueDictionary[int, SharedRing] = WeakValueDictionary()


class SharedRing:
    """`places` pieces of shared memory of `size` bytes for each of `workers` reading processes.

    To be made before the processes are started. A batch must be taken out before as many more as there are places
    have been asked of its process.
    """

    def __init__(self, workers: int, places: int, size: int) -> None:
        self._room = torch.empty(workers, places, size, dtype=torch.uint8).share_memory_()
        self._turn = 0
        self.number = max(_RINGS, default=0) + 1
        _RINGS[self.number] = self

    def place(self, batch: Any, worker: int) -> Placed | None:
        """Put the tensors of a batch into the worker's next place; None if they do not fit."""
        place = self._turn % self._room.shape[1]
        content = io.BytesIO()
        pickler = _TensorsAside(content, self._room[worker, place])
        try:
            pickler.dump(batch)
        except _NoRoomError:
            return None
        self._turn += 1
        return Placed(self.number, worker, place, content.getvalue())

    def take(self, placed: Placed, pinned: bool = False) -> Any:
        """A copy of the batch, for the caller to keep; in pinned memory if wanted."""
        room = self._room[placed.worker, placed.place]
        return _TensorsBack(io.BytesIO(placed.content), room, Tensor.pin_memory if pinned else _copied).load()


@dataclass(frozen=True)
class Placed:
    """Where a batch lies in a ring, and what of it is no tensor."""

    ring: int
    worker: int
    place: int
    content: bytes

    def take(self) -> Any:
        """The batch, in memory of its own."""
        return _RINGS[self.ring].take(self)

    def pin_memory(self) -> Any:
        """The batch in pinned memory; the name by which torch's loader asks for it."""
        return _RINGS[self.ring].take(self, pinned=True)


@dataclass
class PlacingCollate:
    """`collate`, and what it returns goes into the ring where there is room; for reading processes."""

    collate: Callable[[list[Any]], Any]
    ring: SharedRing

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collate(samples)
        placed = self.ring.place(batch, get_worker_info().id)
        return batch if placed is None else placed


def num_bytes(batch: Any) -> int:
    """Room that the tensors of a batch take in a ring."""
    counter = _TensorsAside(io.BytesIO(), None)
    counter.dump(batch)
    return counter.end


class _NoRoomError(Exception):
    """The batch is larger than a place."""


class _TensorsAside(pickle.Pickler):
    """Puts tensors into `room`, one after the other, and the rest into a file; without a room it only counts."""

    def __init__(self, file: io.BytesIO, room: Tensor | None) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.room, self.end = room, 0

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        begin = self.end
        self.end += math.ceil(obj.nbytes / ALIGNMENT) * ALIGNMENT
        if self.room is None:
            return begin, obj.dtype, obj.shape
        if self.end > len(self.room):
            raise _NoRoomError
        self.room[begin : begin + obj.nbytes].view(obj.dtype).view(obj.shape).copy_(obj)
        return begin, obj.dtype, tuple(obj.shape)


class _TensorsBack(pickle.Unpickler):
    """Reads what `_TensorsAside` wrote; the file comes from a process of our own."""

    def __init__(self, file: io.BytesIO, room: Tensor, copy: Callable[[Tensor], Tensor]) -> None:
        super().__init__(file)
        self._room, self._copy = room, copy

    def persistent_load(self, pid: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
        begin, dtype, shape = pid
        end = begin + math.prod(shape) * dtype.itemsize
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        return self._copy(self._room[begin:end]).view(dtype).view(shape)


def _copied(content: Tensor) -> Tensor:
    """By one thread: several would wait for each other while reading processes have the other cores."""
    return torch.from_numpy(content.numpy().copy())
