"""Single frames of the drawn world as training data."""

from __future__ import annotations

import pytest
import torch

from ldm.config import build
from ldm.data.world import LOOKS, MOVING_LOOKS, STILL_LOOKS
from ldm.data.world.frames import HELD_OUT_SEED, DriveFrameDataModule
from ldm.errors import UserError


def test_a_batch_holds_pixels_captions_and_looks_that_belong_together():
    data = DriveFrameDataModule(looks=["snow", "night"], size=32, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch.pixels.shape == (4, 3, 32, 32) and batch.pixels.min() >= -1 and batch.pixels.max() <= 1
    assert sorted(batch.looks.tolist()) == sorted([LOOKS.index("snow"), LOOKS.index("night")] * 2)
    snow, night = (batch.pixels[batch.looks == LOOKS.index(look)].mean() for look in ("snow", "night"))
    assert snow > night + 0.3
    for caption, look in zip(batch.captions, batch.looks.tolist(), strict=True):
        assert ("snow" in caption) == (LOOKS[look] == "snow")


def test_what_lies_at_a_position_depends_on_the_seed_and_the_position_alone():
    one, again, other = (DriveFrameDataModule(size=16, seed=seed).train_frames for seed in (1, 1, 2))
    assert torch.equal(one[7].pixels, again[7].pixels) and one[7].captions == again[7].captions
    assert not torch.equal(one[7].pixels, other[7].pixels)


def test_every_look_comes_equally_often_and_held_out_scenes_lie_elsewhere():
    data = DriveFrameDataModule(looks=["fog", "mars", "coast"], size=16, val_frames=6)
    looks = [int(data.train_frames[position].looks) for position in range(9)]
    assert all(looks.count(LOOKS.index(look)) == 3 for look in ("fog", "mars", "coast"))
    assert data.val_frames.first_seed == HELD_OUT_SEED and len(data.val_frames) == 6
    assert not torch.equal(data.val_frames[0].pixels, data.train_frames[0].pixels)


def test_half_of_the_looks_never_move():
    assert set(MOVING_LOOKS) | set(STILL_LOOKS) == set(LOOKS) and not set(MOVING_LOOKS) & set(STILL_LOOKS)
    assert "volcano fire" in STILL_LOOKS and {"cyberpunk", "summer dawn"} <= set(MOVING_LOOKS)


@pytest.mark.parametrize(
    ("words", "message"),
    [({"looks": ["snow", "moon"]}, "expected names among .* found moon"), ({"seed": -1}, "expected 0 to 1000")],
)
def test_an_unknown_look_and_a_seed_out_of_range_are_refused(words: dict, message: str):
    with pytest.raises(UserError, match=message):
        build({"target": "ldm.data.world.frames.DriveFrameDataModule", "params": words}, "data")
