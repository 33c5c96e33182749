"""Frames of footage as the autoencoder sees them: drawn by seed and position, cropped, held out, thinned out."""

from __future__ import annotations

import pickle
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ldm.data.frames import FrameBatch, FrameDataModule
from ldm.errors import UserError
from ldm.modules.encoders import KLFirstStage
from tests.bars_footage import make_data, moving_bars, write_bars

DDCONFIG = {"z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1}


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    return write_bars(tmp_path_factory.mktemp("footage"))


def test_frames_depend_on_seed_and_position_alone(footage):
    data, again, other = make_data(footage), make_data(footage), make_data(footage, seed=5)
    for module in (data, again, other):
        module.setup()
    assert len(data.train_frames) == 18 and len(data.val_frames) == 6
    stream = [data.train_frames[position].pixels for position in range(40)]
    assert all(crop.shape == (1, 3, 32, 32) and crop.abs().max() <= 1 for crop in stream)
    for position in (39, 3, 17):
        assert torch.equal(again.train_frames[position].pixels, stream[position])
    assert not all(torch.equal(other.train_frames[position].pixels, stream[position]) for position in range(5))
    visited = sorted(data.train_frames._order(1).tolist())
    assert visited == list(range(18))  # one pass shows every frame once


def test_crops_move_and_flip(footage):
    data = make_data(footage)
    data.setup()
    frame = data.train_frames.frames[0][0]
    offsets, flips = set(), set()
    for position in range(400):
        turn, index = divmod(position, 18)
        if data.train_frames._order(turn)[index] != 0:
            continue
        crop = ((data.train_frames[position].pixels[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
        for x in range(frame.shape[1] - 31):
            for flip, view in enumerate((frame[:, x : x + 32], frame[:, x : x + 32][:, ::-1])):
                if np.array_equal(view, crop):
                    offsets.add(x)
                    flips.add(flip)
    assert flips == {0, 1} and len(offsets) > 5


def test_held_out_frames_are_the_end_cropped_in_the_middle(footage):
    data = make_data(footage)
    data.setup()
    # The last quarter is held out.
    held_out = data.val_frames.rows
    assert np.abs(held_out[0][0].astype(int) - moving_bars()[18]).mean() < 12
    red = torch.from_numpy(held_out[0][0][:, 12:44, 0].astype(np.float32))
    assert torch.equal(data.val_frames[0].pixels[0, 0] * 127.5 + 127.5, red)
    with pytest.raises(IndexError):
        data.val_frames[6]


def test_more_frames_than_memory_allows_are_thinned_out(footage, caplog):
    data = make_data(footage, max_frames=12)
    with caplog.at_level("INFO", logger="ldm"):
        data.setup()
    assert len(data.train_frames) + len(data.val_frames) == 12
    assert "more than max_frames = 12: taking 5 a second instead" in data.summary
    assert caplog.messages == [], "the first line of a run is the model's"


def test_crops_can_be_pickled_and_pinned(footage, monkeypatch):
    data = make_data(footage)
    data.setup()
    crops = pickle.loads(pickle.dumps(data.train_frames))
    for position in (39, 3, 17):
        assert torch.equal(crops[position].pixels, data.train_frames[position].pixels)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    batch = data.train_frames[3]
    pinned = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert torch.equal(pinned.pixels, batch.pixels + 1) and pinned.positions == [3]


def test_damaged_files_are_left_out_and_named(footage, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(footage.read_bytes())
    (tmp_path / "b.mp4").write_text("not a video")
    data = make_data(tmp_path)
    data.setup()
    assert len(data.train_frames) == 18
    assert "\nleft out: " in data.summary and "b.mp4" in data.summary
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(UserError, match=r"b\.mp4: expected a video"):
        make_data(tmp_path).setup()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"size": 0}, r"data.params.size: expected a whole number of at least 8, found 0"),
        ({"batch_size": 0}, r"data.params.batch_size: expected a whole number of at least 1"),
        ({"fps": 0}, r"expected frames a second above 0"),
        ({"val_share": 0.9}, r"data.params.val_share: expected 0 to 0.5, found 0.9"),
        ({"videos": "nowhere.mp4"}, r"nowhere.mp4: there is no such file"),
    ],
)
def test_bad_data_words_are_refused(footage, words, message):
    with pytest.raises(UserError, match=message):
        make_data(footage, **words).setup()


def test_frames_of_real_footage_are_seen(highway):
    data = FrameDataModule(str(highway), size=128, fps=10)
    data.setup()
    with av.open(str(highway)) as container:
        assert container.streams.video[0].height == 540
    batch = FrameBatch.cat([data.train_frames[0], data.train_frames[1]])
    assert batch.pixels.shape == (2, 3, 128, 128) and len(data.train_frames) == 80
    assert KLFirstStage(DDCONFIG, 4).encode(batch.pixels).shape == (2, 8, 64, 64)
