"""The stream of training samples and how far a run has got in it, so that a stopped run goes on with the next one.

Every sample of a run has a position 0, 1, 2, ... What lies at a position depends on the seed and the position alone;
this module counts the positions whose gradients have reached the weights and saves that one number.
"""

from __future__ import annotations

import io
import math
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from ldm.errors import UserError

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


ROOM = 4  # places for batches so many times as large as the first: they may be of different kinds
LINGER = 3600  # seconds that a reading process stays after SIGTERM: what is under way may be long


class StreamOrder:
    """The order of each pass over `length` samples: a function of the seed and the pass, the last two kept."""

    def __init__(self, seed: int, length: int) -> None:
        self.seed, self.length = seed, length
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, turn: int) -> np.ndarray:
        if turn not in self._orders:
            self._orders = dict(list(self._orders.items())[-1:])
            self._orders[turn] = np.random.default_rng((self.seed, turn, 1)).permutation(self.length)
        return self._orders[turn]


class StreamSampler(DistributedSampler):
    """The positions of one epoch for one process: `num_batches` batches, from wherever the run has got to.

    `start()` is asked each time an epoch begins or is taken up again. It derives from DistributedSampler because it
    divides the stream among processes itself, and Lightning then leaves it alone.
    """

    def __init__(
        self,
        dataset: Dataset,
        start: Callable[[], int],
        num_batches: int,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.start, self.num_batches, self.batch_size = start, num_batches, batch_size

    def __iter__(self) -> Iterator[int]:
        begin = self.start()
        for batch in range(self.num_batches):
            first = begin + (batch * self.num_replicas + self.rank) * self.batch_size
            yield from range(first, first + self.batch_size)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size


class HeldOutSampler(DistributedSampler):
    """Every `num_replicas`-th sample, each once over all processes; with 1, all of them in every process.

    All processes have as many batches: one that would have a batch less gets one of a stand-in, whose index is -1 and
    which counts for nothing.
    """

    def __init__(self, dataset: Sized, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.indices = list(range(rank, len(dataset), num_replicas))
        most = -(-len(dataset) // num_replicas)
        if -(-most // batch_size) > -(-len(self.indices) // batch_size):
            self.indices.append(-1)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def num_real(positions: Sequence[int]) -> int:
    """How many of these are samples, not stand-ins."""
    return sum(position >= 0 for position in positions)


class StreamLoader(DataLoader):
    """torch's loader, whose reading processes hand over batches in a `SharedRing`.

    waited: seconds that whoever iterates has waited for batches so far, since the loader was made.
    """

    waited = 0.0
    _ring: SharedRing | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.num_workers and self._ring is None and len(self):
            # One place for each batch that a process may have ready, and one for that which is being taken out.
            first = self.batch_size * num_bytes(self.collate_fn([self.dataset[0]]))
            self._ring = SharedRing(self.num_workers, self.prefetch_factor + 1, ROOM * first)
            self.collate_fn = PlacingCollate(self.collate_fn, self._ring)
        return self._timed(super().__iter__())

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        begin = time.perf_counter()
        for batch in batches:
            taken = batch.take() if isinstance(batch, Placed) else batch
            self.waited += time.perf_counter() - begin
            yield taken
            begin = time.perf_counter()


class StreamDataModule(pl.LightningDataModule):
    """A data module whose training samples are taken by position, and whose state is the position to go on from.

    batch_size: samples per process and micro-batch.
    num_workers: reading processes; 0 reads in the training process.
    collate: joins samples to a batch, which has a length.
    """

    def __init__(self, batch_size: int, num_workers: int, collate: Callable[[list[Any]], Sized]) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.collate = batch_size, num_workers, collate
        self._consumed = self._fetched = 0
        self._step_seen: int | None = None

    @property
    def consumed(self) -> int:
        """Samples, over all processes, whose gradients have reached the weights: the position to go on from."""
        step = self.trainer.global_step if self.trainer is not None else None
        if step != self._step_seen:
            self._step_seen, self._consumed = step, self._fetched
        return self._consumed

    def on_after_batch_transfer(self, batch: Sized, dataloader_idx: int) -> Sized:
        """Count training samples as they go into a step; they are consumed once the step counter has moved on."""
        if self.trainer is not None and self.trainer.training:
            _ = self.consumed
            self._fetched += len(batch) * self.trainer.world_size
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        consumed = state_dict.get("consumed")
        if type(consumed) is not int or consumed < 0:
            raise UserError(f"the checkpoint's position in the data: expected a number from 0, found {consumed!r}")
        self._consumed = self._fetched = consumed
        self._step_seen = None

    def stream_loader(self, samples: Dataset) -> StreamLoader:
        """Batches of one epoch of the stream: whole optimiser steps only, what is left over opens the next epoch."""
        accumulate, world, rank = 1, 1, 0
        if self.trainer is not None:
            accumulate = self.trainer.accumulate_grad_batches
            world, rank = self.trainer.world_size, self.trainer.global_rank
        steps = max(1, len(samples) // (self.batch_size * accumulate * world))
        sampler = StreamSampler(
            samples, lambda: self.consumed, steps * accumulate, self.batch_size, num_replicas=world, rank=rank
        )
        return self.loader(samples, sampler)

    def loader(self, samples: Dataset, sampler: DistributedSampler | None = None) -> StreamLoader:
        """Batches in the sampler's order; None: in their own, held out.

        Those are divided among processes for a module that `shares_validation`: it adds up what they find.
        """
        if sampler is None and self.trainer is not None and self.trainer.world_size > 1:
            is_shared = getattr(self.trainer.lightning_module, "shares_validation", False)
            own = (self.trainer.world_size, self.trainer.global_rank) if is_shared else (1, 0)
            sampler = HeldOutSampler(samples, self.batch_size, *own)
        return StreamLoader(
            samples,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_to_training,
            generator=torch.Generator(),  # else each epoch would draw from the one that training has
        )


def leave_signals_to_training(worker: int) -> None:
    """A reading process outlives the signals that ask a run to save and stop: the step under way still needs it.

    Terminals and clusters send them to all processes of a run. It ends when training does, or a while after SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LINGER))
