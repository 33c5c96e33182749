"""Batches through shared memory: the same as without, none overwritten before it is taken, and what does not fit."""

from __future__ import annotations

import pickle

import pytest
import torch

from ldm.data.clips import Batch, ClipDataModule
from ldm.data.stream import Placed, SharedRing, StreamLoader, num_bytes
from tests.toy_run import make_prepared


def batch_of(value: float, clips: int = 2) -> Batch:
    moments = torch.full((clips, 3, 4, 2, 2), value, dtype=torch.float16)
    fps = torch.full((clips,), 10.0)
    return Batch(moments, torch.full((clips, 3, 5), value), fps, [7] * clips, ["scene"] * clips)


def test_a_batch_comes_back_as_it_was():
    ring = SharedRing(workers=2, places=2, size=4096)
    given = batch_of(3.5)
    placed = pickle.loads(pickle.dumps(ring.place(given, worker=1)))
    found = placed.take()
    assert found.positions == [7, 7] and found.keys == ["scene", "scene"] and found.stills is None
    for name in ("moments", "context", "fps"):
        assert torch.equal(getattr(found, name), getattr(given, name))
        assert getattr(found, name).dtype == getattr(given, name).dtype
    assert len(placed.content) < 1000, "the tensors went the long way"


def test_a_batch_without_clips_comes_back():
    ring = SharedRing(workers=1, places=1, size=4096)
    found = ring.place(batch_of(1.0, clips=0), 0).take()
    assert found.moments.shape == (0, 3, 4, 2, 2) and found.moments.dtype == torch.float16


def test_what_was_taken_stays_when_its_place_is_used_again():
    ring = SharedRing(workers=1, places=2, size=4096)
    placed = [ring.place(batch_of(value), 0) for value in (1.0, 2.0)]
    first = placed[0].take()
    ring.place(batch_of(3.0), 0)
    assert first.moments.unique().tolist() == [1.0]
    assert placed[1].take().moments.unique().tolist() == [2.0]  # the third went to the first's place
    assert placed[0].take().moments.unique().tolist() == [3.0]


def test_a_batch_that_does_not_fit_is_refused():
    size = num_bytes(batch_of(1.0))
    assert SharedRing(1, 2, size).place(batch_of(1.0), 0) is not None
    assert SharedRing(1, 2, size - 1).place(batch_of(1.0), 0) is None


@pytest.mark.parametrize("room", [4, 0])
def test_the_stream_is_the_same_with_and_without_processes(tmp_path, monkeypatch, room):
    """room 0: no batch fits, and all go the ordinary way."""
    monkeypatch.setattr("ldm.data.stream.ROOM", room)
    root = make_prepared(tmp_path / "prepared")
    taken = []
    take = Placed.take
    monkeypatch.setattr(Placed, "take", lambda placed: taken.append(placed.place) or take(placed))
    found = {}
    for workers in (0, 2):
        data = ClipDataModule(str(root), frames=3, batch_size=2, num_workers=workers, val_share=0.0)
        data.setup()
        loader = data.train_dataloader()
        assert isinstance(loader, StreamLoader)
        found[workers] = [batch for _ in range(2) for batch in loader]  # two epochs, kept all the while
        assert loader.waited > 0
    assert len(found[0]) == len(found[2]) > 12
    for plain, shared in zip(found[0], found[2], strict=True):
        assert plain.positions == shared.positions and plain.keys == shared.keys
        assert torch.equal(plain.moments, shared.moments) and torch.equal(plain.context, shared.context)
    assert set(taken) == ({0, 1, 2} if room else set())
