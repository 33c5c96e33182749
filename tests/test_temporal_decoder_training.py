"""Training of a temporal decoder: what it is shown, what its checkpoint holds, and that it goes on without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from ldm.checkpoint import first_stage_tensors, read_checkpoint
from ldm.checkpoint_decoder import load_temporal_decoder
from ldm.config import build, check, load_config
from ldm.data.drive_frames import DriveFrameDataModule
from ldm.data.frames import FrameBatch, FrameDataModule
from ldm.errors import UserError
from ldm.models.temporal_decoder import TemporalDecoderTraining, with_quick_norms
from ldm.modules.encoders import KLFirstStage
from tests.bars_footage import make_data, write_bars
from tests.test_txt2vid import training_config
from tests.tiny_checkpoint import DDCONFIG, video_state

DRIVE_CONFIG = Path(__file__).parents[1] / "configs" / "drive" / "temporal_decoder.yaml"
NODE = {
    "target": "ldm.modules.temporal_decoder.TemporalDecoder",
    "params": {"ch": DDCONFIG["ch"], "ch_mult": DDCONFIG["ch_mult"], "blocks": [1, 1]},
}
REMADE = {"share": 0.5, "steps": 4, "most": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "last.ckpt"
    torch.save({"state_dict": video_state(), "config": training_config()}, path)
    return path


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    return write_bars(tmp_path_factory.mktemp("footage"))


def rows_of(footage: Path, **words) -> FrameDataModule:
    return make_data(footage, **{"frames": 4, "strides": [1, 2]} | words)


def make_model(checkpoint: Path, **words) -> TemporalDecoderTraining:
    torch.manual_seed(0)
    config = {"model": {"target": "x", "params": {"temporal_decoder_config": NODE}}}
    defaults = {"temporal_decoder_config": NODE, "ckpt_path": str(checkpoint), "warmup_steps": 2, "config": config}
    return TemporalDecoderTraining(**defaults | words)


def make_trainer(folder: Path, max_steps: int, **words) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"logger": False, "num_sanity_val_steps": 0, "default_root_dir": folder}
    return pl.Trainer(accelerator="cpu", devices=1, max_steps=max_steps, **quiet | words)


def assert_same_layers(one: nn.Module, other: nn.Module) -> None:
    for (name, found), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def test_rows_of_frames_follow_each_other(footage):
    data = rows_of(footage)
    data.setup()
    every = [data.train_frames[position] for position in range(60)]
    assert all(row.pixels.shape == (4, 3, 32, 32) for row in every)
    assert {row.rates[0] for row in every} == {10, 5} and len(data.train_frames) == 18 - 3 * 2
    batch = next(iter(data.train_dataloader()))
    assert batch.pixels.shape == (8, 3, 32, 32) and len(batch) == 2 == len(batch.rates)
    speeds = {10: [], 5: []}
    for row in every:
        speeds[row.rates[0]].append(row.pixels.diff(dim=0).abs().mean().item())
    assert min(speeds[5]) > 1.2 * max(speeds[10])  # twice as far from frame to frame
    held_out = data.val_frames[0]
    assert held_out.rates == [10] and torch.equal(held_out.pixels[1], data.val_frames[1].pixels[0])


def test_footage_that_is_too_short_for_a_row_is_refused(footage):
    with pytest.raises(UserError, match=r"data.params.videos: expected a video of more than 18 frames .* found 18"):
        rows_of(footage, frames=10).setup()
    with pytest.raises(UserError, match=r"data.params.strides\[1\]: expected a whole number of at least 1, found 0"):
        rows_of(footage, strides=[1, 0])


def test_rows_of_the_drawn_world_move_at_their_rates():
    data = DriveFrameDataModule(looks="moving", size=32, batch_size=2, frames=3, rates=[12, 4], val_frames=2)
    assert data.summary.startswith("clips of 3 frames of 15 looks")
    rows = [data.train_frames[position] for position in range(8)]
    assert {row.rates[0] for row in rows} == {12, 4} and rows[0].pixels.shape == (3, 3, 32, 32)
    for words in ({"frames": 3}, {"rates": [12]}):
        with pytest.raises(UserError, match=r"data.params.rates: expected frames a second for clips of several frames"):
            DriveFrameDataModule(**words)


@pytest.mark.parametrize("remade", [None, REMADE])
def test_it_trains_and_its_file_is_a_temporal_decoder(checkpoint, footage, tmp_path, remade):
    model, trainer = make_model(checkpoint, remade=remade, learning_rate=3e-3), make_trainer(tmp_path, 3)
    trainer.fit(model, rows_of(footage))
    assert {"train/l1", "train/change"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "decoder.ckpt")
    first_stage = first_stage_tensors(read_checkpoint(checkpoint))
    layers = load_temporal_decoder(tmp_path / "decoder.ckpt", first_stage)
    assert_same_layers(layers, model.temporal_decoder)
    assert layers.places[0][0].put.weight.abs().max() > 0
    found = trainer.validate(model, rows_of(footage), verbose=False)[0]
    assert {"val/psnr", "val/alone_psnr", "val/change", "val/alone_change"} <= set(found)
    assert len(model.shown) == 2 and model.shown[0][0].shape == (2, 3, 32, 32)
    again = make_model(checkpoint, start_path=str(tmp_path / "decoder.ckpt"))
    assert_same_layers(again.temporal_decoder, model.temporal_decoder)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(checkpoint, footage, tmp_path):
    straight = make_model(checkpoint, remade=REMADE)
    make_trainer(tmp_path, 4).fit(straight, rows_of(footage))
    stopped, trainer = make_model(checkpoint, remade=REMADE), make_trainer(tmp_path, 2)
    trainer.fit(stopped, rows_of(footage))
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = make_model(checkpoint, remade=REMADE)
    make_trainer(tmp_path, 4).fit(resumed, rows_of(footage), ckpt_path=tmp_path / "stopped.ckpt")
    assert_same_layers(resumed.temporal_decoder, straight.temporal_decoder)


def test_clips_are_spoilt_as_seed_and_position_say(checkpoint, footage, tmp_path):
    model = make_model(checkpoint, remade=REMADE, noise=0.3)
    make_trainer(tmp_path, 1).fit(model, rows_of(footage))
    data = rows_of(footage)
    data.setup()
    row = data.train_frames[0]

    def spoilt(seed: int, *positions: int) -> torch.Tensor:
        batch = FrameBatch.cat([FrameBatch(row.pixels, [position], rates=row.rates) for position in positions])
        return model._pixels_and_latents(batch, seed)[1]

    many = spoilt(5, *range(40))
    clean = model._source.first_stage.encode(row.pixels).chunk(2, dim=1)[0] * model._source.scale_factor
    off = (many - clean).square().mean((1, 2, 3, 4)).sqrt()
    assert 1 <= (off < 1e-5).sum() <= 12  # an eighth of them is left alone
    assert torch.equal(spoilt(5, 7)[0], many[7]) and not torch.equal(spoilt(6, 7)[0], many[7])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"noise": 2}, "model.params.noise: expected a standard deviation, 0 to 1, found 2"),
        ({"changes": -1}, "model.params.changes: expected a weight, 0 to 100, found -1"),
        ({"remade": {"share": 0.5}}, "model.params.remade: expected the words share, steps, most, found share"),
        ({"remade": REMADE | {"share": 0}}, "remade.share: expected a share above 0 and up to 1, found 0"),
        ({"remade": REMADE | {"steps": 1.5}}, "remade.steps: expected a whole number, found 1.5"),
        ({"start_path": "nowhere.ckpt"}, "nowhere.ckpt: expected a checkpoint"),
    ],
)
def test_odd_words_are_refused(checkpoint, words, message):
    with pytest.raises(UserError, match=message):
        make_model(checkpoint, **words)


def test_more_steps_back_than_there_are_and_single_frames_are_refused(checkpoint, footage, tmp_path):
    with pytest.raises(UserError, match=r"model.params.remade: .* found steps 4, most 4"):
        make_trainer(tmp_path, 1).fit(make_model(checkpoint, remade=REMADE | {"most": 4}), rows_of(footage))
    with pytest.raises(UserError, match=r"data: expected rows of at least 2 frames .* set data.params.frames"):
        make_trainer(tmp_path, 1).fit(make_model(checkpoint), make_data(footage))


def test_quick_norms_change_nothing():
    torch.manual_seed(0)
    first_stage = KLFirstStage(DDCONFIG, 4).requires_grad_(False)
    latents = torch.randn(2, 4, 16, 16)
    before, names = first_stage.decode(latents), list(first_stage.state_dict())
    with_quick_norms(first_stage.network.decoder)
    assert (first_stage.decode(latents) - before).abs().max() < 1e-5 and list(first_stage.state_dict()) == names


def test_the_config_of_the_experiment_builds():
    config = load_config([DRIVE_CONFIG])
    check(config)
    layers = build(config.model.params.temporal_decoder_config, "model.params.temporal_decoder_config")
    assert sum(one.numel() for one in layers.parameters()) == 2_440_064
