"""The stream of training samples and the position that a run has reached: a resumed run continues with the next one.

Every sample of a run has a position 0, 1, 2, ... What lies at a position depends on the seed and the position alone;
this module counts the positions whose gradients have reached the weights and saves that one number.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ldm.errors import UserError

AHEAD = 2  # batches that each thread reads ahead
LINGER = 3600  # seconds that a DataLoader worker stays after SIGTERM: the step under way may be long


class StreamOrder:
    """The order of each pass over `length` samples: a function of the seed and the pass; the last two are kept."""

    def __init__(self, seed: int, length: int) -> None:
        self.seed, self.length = seed, length
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __call__(self, turn: int) -> np.ndarray:
        return self._order(turn)

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamOrder, (self.seed, self.length)

    def _permutation(self, turn: int) -> np.ndarray:
        return np.random.default_rng((self.seed, turn, 1)).permutation(self.length)


class StreamSampler(DistributedSampler):
    """The positions of one epoch for one process: `num_batches` batches, from wherever the run has got to.

    `start()` is called each time an epoch begins or is resumed. It derives from DistributedSampler because it
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
    which does not count.
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
    """torch's loader, with `num_threads` threads that read batches ahead, in order.

    Reading a clip is `pread`, a checksum and copies by NumPy, all of which release Python's lock, so threads read as
    fast as worker processes do, without processes to start or memory to share.

    waited: seconds that the caller has waited for batches since the loader was made.
    """

    num_threads = 0
    waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        batches = self._read_ahead() if self.num_threads else super().__iter__()
        begin = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - begin
            yield batch
            begin = time.perf_counter()

    def _read_ahead(self) -> Iterator[Any]:
        pool, waiting = ThreadPoolExecutor(self.num_threads, "reading"), deque()
        try:
            for indices in self.batch_sampler:
                waiting.append(pool.submit(self._read, indices))
                if len(waiting) > AHEAD * self.num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, indices: Sequence[int]) -> Any:
        batch = self.collate_fn([self.dataset[index] for index in indices])
        return batch.pin_memory() if self.pin_memory else batch


class StreamDataModule(pl.LightningDataModule):
    """A data module whose training samples are taken by position, and whose state is the position to continue from.

    batch_size: samples per process and micro-batch.
    num_workers: threads that read ahead; 0 reads in the training thread. Where `loads_in_processes`, DataLoader worker
        processes instead, for samples that are computed in Python.
    collate: joins samples to a batch, which has a length.
    """

    loads_in_processes = False

    def __init__(self, batch_size: int, num_workers: int, collate: Callable[[list[Any]], Sized]) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.collate = batch_size, num_workers, collate
        self._consumed = self._fetched = 0
        self._step_seen: int | None = None

    @property
    def consumed(self) -> int:
        """Samples, over all processes, whose gradients have reached the weights: the position to continue from."""
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
        num_processes = self.num_workers if self.loads_in_processes else 0
        loader = StreamLoader(
            samples,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=num_processes,
            collate_fn=self.collate,
            persistent_workers=num_processes > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_to_training,
            generator=torch.Generator(),  # otherwise each epoch would draw from the training's generator
        )
        loader.num_threads = self.num_workers - num_processes
        return loader


def leave_signals_to_training(worker: int) -> None:
    """A DataLoader worker outlives the signals that ask a run to save and stop: the step under way still needs it.

    Terminals and clusters send them to all processes of a run. It ends when training ends, or a while after SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LINGER))
