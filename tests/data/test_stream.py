"""Reading ahead: threads give the order of the positions, their errors arrive, and abandoned iterations end."""

from __future__ import annotations

import threading
import time

import pytest
from torch.utils.data import Dataset

from ldm.data.stream import AHEAD, StreamDataModule

SAMPLES = 23


class Slow(Dataset):
    """Samples that take longer the earlier they come; remembers which threads read."""

    def __init__(self, broken: int = -1) -> None:
        self.broken, self.threads, self.read = broken, set(), []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, position: int) -> int:
        self.threads.add(threading.get_ident())
        self.read.append(position)
        time.sleep(0.004 if position % 4 == 0 else 0)
        if position == self.broken:
            raise ValueError(f"sample {position}")
        return position


def loader_of(samples: Slow, threads: int):
    return StreamDataModule(batch_size=3, num_workers=threads, collate=list).loader(samples)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_come_in_order(threads):
    samples = Slow()
    loader = loader_of(samples, threads)
    for _ in range(2):
        assert [position for batch in loader for position in batch] == list(range(SAMPLES))
    assert len(loader) == 8 and loader.waited > 0
    assert (threading.get_ident() in samples.threads) == (threads == 0) and len(samples.threads) >= threads


def test_no_more_is_read_ahead_than_said():
    samples = Slow()
    batches = iter(loader_of(samples, 2))
    next(batches)
    time.sleep(0.1)
    assert max(samples.read) < 3 * (2 * AHEAD + 1)
    batches.close()
    running = threading.active_count()
    time.sleep(0.05)
    assert threading.active_count() <= running and max(samples.read) < 3 * (2 * AHEAD + 1)


def test_an_error_arrives_as_it_was_raised_and_in_its_turn():
    found = []
    with pytest.raises(ValueError, match=r"^sample 7$"):
        list(loader_of(Slow(broken=7), 2))
    with pytest.raises(ValueError, match=r"^sample 7$"):
        for batch in loader_of(Slow(broken=7), 2):
            found += batch
    assert found == list(range(6))
