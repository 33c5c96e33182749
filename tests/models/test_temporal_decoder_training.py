"""Training of a temporal decoder: its augmentation, its checkpoint, and exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.checkpoint import first_stage_tensors, read_checkpoint
from ldm.checkpoint.encoders import load_temporal_decoder
from ldm.checkpoint.names import UNET_PREFIX
from ldm.config import build, check, load_config
from ldm.data.frames import FrameBatch, FrameDataModule
from ldm.data.world.frames import DriveFrameDataModule
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.models import temporal_decoder as decoder_training
from ldm.models.temporal_decoder import Remaker, TemporalDecoderTraining, dissimilarity, recolour, use_fast_norms
from ldm.modules.encoders import KLFirstStage
from ldm.modules.unet import UNetModel
from ldm.sampling.generator import ClipGenerator
from tests.bars_footage import make_data, write_bars
from tests.models.training import make_trainer
from tests.scripts.test_txt2vid import training_config
from tests.tiny_checkpoint import DDCONFIG, video_state

DRIVE_CONFIG = Path(__file__).parents[2] / "configs" / "drive" / "temporal_decoder.yaml"
NODE = {
    "target": "ldm.modules.temporal_decoder.TemporalDecoder",
    "params": {"ch": DDCONFIG["ch"], "ch_mult": DDCONFIG["ch_mult"], "blocks": [1, 1]},
}


def of_sizes(ch: int, ch_mult: list[int]) -> dict:
    return {**NODE, "params": {"ch": ch, "ch_mult": ch_mult, "blocks": [1]}}


REMADE = {"share": 0.5, "steps": 4, "most": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "last.ckpt"
    torch.save({"state_dict": video_state(), "config": training_config()}, path)
    return path


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    return write_bars(tmp_path_factory.mktemp("footage"))


def rows_of(footage: Path, **options) -> FrameDataModule:
    return make_data(footage, **{"frames": 4, "strides": [1, 2]} | options)


def make_model(checkpoint: Path, **options) -> TemporalDecoderTraining:
    torch.manual_seed(0)
    config = {"model": {"target": "x", "params": {"temporal_decoder_config": NODE}}}
    defaults = {"temporal_decoder_config": NODE, "ckpt_path": str(checkpoint), "warmup_steps": 2, "config": config}
    return TemporalDecoderTraining(**defaults | options)


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


def test_footage_shorter_than_a_row_is_refused(footage):
    with pytest.raises(UserError, match=r"data.params.videos: expected a video of more than 18 frames .* found 18"):
        rows_of(footage, frames=10).setup()
    with pytest.raises(UserError, match=r"data.params.strides\[1\]: expected a whole number of at least 1, found 0"):
        rows_of(footage, strides=[1, 0])


def test_rows_of_the_procedural_world_move_at_their_rates():
    data = DriveFrameDataModule(looks="moving", size=32, batch_size=2, frames=3, rates=[12, 4], val_frames=2)
    assert data.summary.startswith("clips of 3 frames of 15 styles")
    rows = [data.train_frames[position] for position in range(8)]
    assert {row.rates[0] for row in rows} == {12, 4} and rows[0].pixels.shape == (3, 3, 32, 32)
    slow = next(position for position, row in enumerate(rows) if row.rates == [4])
    data.train_frames.rates = [12]  # the same scenes, all at 12 frames a second
    fast = data.train_frames[slow].pixels
    assert torch.equal(fast[0], rows[slow].pixels[0])
    assert rows[slow].pixels.diff(dim=0).abs().mean() > 1.2 * fast.diff(dim=0).abs().mean()
    for options in ({"frames": 3}, {"rates": [12]}):
        with pytest.raises(UserError, match=r"data.params.rates: expected frames per second for clips"):
            DriveFrameDataModule(**options)


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


@pytest.mark.slow
def test_a_resumed_run_equals_the_straight_one(checkpoint, footage, tmp_path):
    straight = make_model(checkpoint, remade=REMADE)
    make_trainer(tmp_path, 4).fit(straight, rows_of(footage))
    stopped, trainer = make_model(checkpoint, remade=REMADE), make_trainer(tmp_path, 2)
    trainer.fit(stopped, rows_of(footage))
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = make_model(checkpoint, remade=REMADE)
    make_trainer(tmp_path, 4).fit(resumed, rows_of(footage), ckpt_path=tmp_path / "stopped.ckpt")
    assert_same_layers(resumed.temporal_decoder, straight.temporal_decoder)


@pytest.mark.slow
def test_augmentation_depends_on_seed_and_position(checkpoint, footage, tmp_path):
    model = make_model(checkpoint, remade=REMADE, noise=0.3)
    make_trainer(tmp_path, 1).fit(model, rows_of(footage))
    data = rows_of(footage)
    data.setup()
    row = data.train_frames[0]

    def augmented(seed: int, *positions: int) -> torch.Tensor:
        batch = FrameBatch.cat([FrameBatch(row.pixels, [position], rates=row.rates) for position in positions])
        return model._pixels_and_latents(batch, seed)[1]

    many = augmented(5, *range(40))
    clean = model._source.first_stage.encode(row.pixels).chunk(2, dim=1)[0] * model._source.scale_factor
    off = (many - clean).square().mean((1, 2, 3, 4)).sqrt()
    assert 1 <= (off < 1e-5).sum() <= 12  # an eighth is unchanged
    assert torch.equal(augmented(5, 7)[0], many[7]) and not torch.equal(augmented(6, 7)[0], many[7])


@pytest.mark.slow
def test_only_training_clips_are_recoloured_and_their_latents_encode_the_new_colours(
    checkpoint, footage, tmp_path, monkeypatch
):
    model, data, seen = make_model(checkpoint, recoloured=1.0, noise=0), rows_of(footage, val_share=0.3), []
    monkeypatch.setattr(decoder_training, "recolour", lambda *arguments: seen.append(arguments) or recolour(*arguments))
    trainer = make_trainer(tmp_path, 2, precision="bf16-mixed")
    trainer.fit(model, data)
    row = data.train_frames[0]
    assert len(seen) == 2 * data.batch_size
    trainer.validate(model, data)
    assert len(seen) == 2 * data.batch_size
    batch = FrameBatch.cat([FrameBatch(row.pixels, [position], rates=row.rates) for position in range(30)])
    pixels, latents = model._pixels_and_latents(batch, 5, 0.5)
    is_other = (pixels - row.pixels).abs().amax((1, 2, 3, 4)) > 0
    assert 8 <= is_other.sum() <= 22 and pixels.dtype == torch.float32
    encoded = model._source.first_stage.encode(pixels.flatten(0, 1)).chunk(2, dim=1)[0] * model._source.scale_factor
    assert (latents.flatten(0, 1) - encoded).abs().max() < 1e-4
    chosen = int(is_other.nonzero()[0])
    again = model._pixels_and_latents(FrameBatch(row.pixels, [chosen], rates=row.rates), 5, 1.0)[0][0]
    assert torch.equal(again, pixels[chosen])


def test_recoloured_clips_are_remade_without_their_caption(checkpoint, footage, tmp_path):
    model, data = make_model(checkpoint, remade=REMADE | {"share": 1.0}), rows_of(footage)
    make_trainer(tmp_path, 1).fit(model, data)
    row, seen = data.train_frames[0], []
    batch = FrameBatch.cat([FrameBatch(row.pixels, [position], rates=row.rates) for position in range(12)])
    batch.captions = ["a road"] * 12
    model._remaker = lambda clip, captions, *_: seen.extend(captions) or clip
    pixels, _ = model._pixels_and_latents(batch, 5, 0.5)
    is_other = (pixels - row.pixels).abs().amax((1, 2, 3, 4)) > 0
    assert seen == ["" if other else "a road" for other in is_other] and 2 <= is_other.sum() <= 10


def test_recolour_rotates_hues_and_changes_contrast():
    def of(value: list[float], frames: int = 1) -> torch.Tensor:
        picture = torch.tensor(value).view(1, 3, 1, 1).expand(frames, 3, 2, 2)
        return torch.stack([recolour(picture, torch.Generator().manual_seed(seed)) for seed in range(60)])

    grey = of([0.5, 0.5, 0.5], frames=3)
    assert (grey - grey[:, :1, :1, :1, :1]).abs().max() < 1e-6  # no hue, all frames alike
    assert grey.min() < 0.2 and grey.max() > 0.6  # 0.5 times 0.6 to 1.2, and -0.3 to 0.3
    assert (of([1.0, 1.0, 1.0]).max(), of([-1.0, -1.0, -1.0]).min()) == (1, -1)
    red = of([0.3, -0.1, -0.1])[:, 0, :, 0, 0]
    brightest = red.argmax(dim=1).tolist()
    assert min(brightest.count(channel) for channel in range(3)) >= 10  # red becomes green and blue as often
    colour = (red - red.mean(dim=1, keepdim=True)).norm(dim=1) / torch.tensor([0.3, -0.1, -0.1]).sub(0.1 / 3).norm()
    assert 0.18 <= colour.min() < 0.5 and 1.1 < colour.max() <= 1.81  # saturation 0.3 to 1.5 times contrast


def test_dissimilarity_measures_structure_however_faint():
    generator = torch.Generator().manual_seed(4)
    texture = torch.randn(1, 2, 1, 24, 32, generator=generator).expand(1, 2, 3, 24, 32)
    strong, faint = 0.3 * texture, 0.05 * texture
    assert dissimilarity(strong, strong).abs().max() < 1e-5 and dissimilarity(strong, strong + 0.2).abs().max() < 1e-3
    assert dissimilarity(strong, -strong).mean() > 1.9 and dissimilarity(faint, -faint).mean() > 1.7
    assert dissimilarity(strong, strong.flip(-1)).mean() == pytest.approx(1, abs=0.1)  # nothing in common
    blurred = torch.nn.functional.avg_pool2d(texture.flatten(0, 1), 3, 1, 1).unflatten(0, (1, 2))
    assert 0.2 < dissimilarity(0.05 * blurred, faint).mean() < dissimilarity(torch.zeros_like(faint), faint).mean()
    # one window by hand
    frames, true = (torch.rand(1, 1, 3, 7, 7, generator=generator) for _ in range(2))
    one, other = (
        ((0.299 * clip[0, 0, 0] + 0.587 * clip[0, 0, 1] + 0.114 * clip[0, 0, 2] + 1) / 2).double().flatten()
        for clip in (frames, true)
    )
    c = (2 / 255) ** 2
    covariance = ((one - one.mean()) * (other - other.mean())).mean()
    expected = 1 - (2 * covariance + c) / (one.var(correction=0) + other.var(correction=0) + c)
    assert dissimilarity(frames, true).item() == pytest.approx(expected.item(), abs=1e-4)


def test_layers_of_another_image_decoder_are_not_resumed(checkpoint, footage, tmp_path):
    model, trainer = make_model(checkpoint), make_trainer(tmp_path, 1)
    trainer.fit(model, rows_of(footage))
    model.temporal_decoder.made_for += 1
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(
        UserError, match=r"last.ckpt: expected the image decoder that this run's layers were trained with"
    ):
        make_trainer(tmp_path, 2).fit(make_model(checkpoint), rows_of(footage), ckpt_path=tmp_path / "other.ckpt")


def test_structure_is_weighted(checkpoint, footage, tmp_path):
    model, data = make_model(checkpoint), rows_of(footage)
    make_trainer(tmp_path, 1).fit(model, data)
    batch, logged, losses = next(iter(data.train_dataloader())), {}, []
    model.log = lambda name, value, **_: logged.update({name: value})
    for model.structure in (0.0, 0.5):
        losses.append(model.training_step(batch, 0).item())
    unlikeness = logged["train/unlikeness"].item()
    assert losses[1] - losses[0] == pytest.approx(0.5 * unlikeness, rel=1e-3) and 0.01 < unlikeness < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 2}, "model.params.noise: expected a standard deviation, 0 to 1, found 2"),
        ({"changes": -1}, "model.params.changes: expected a weight, 0 to 100, found -1"),
        ({"recoloured": -0.1}, "model.params.recoloured: expected a share, 0 to 1, found -0.1"),
        ({"structure": 101}, "model.params.structure: expected a weight, 0 to 100, found 101"),
        ({"remade": {"share": 0.5}}, "model.params.remade: expected the keys share, steps, most, found share"),
        ({"remade": REMADE | {"share": 0}}, "remade.share: expected a share above 0 and up to 1, found 0"),
        ({"remade": REMADE | {"steps": 1.5}}, "remade.steps: expected a whole number, found 1.5"),
        ({"remade": REMADE | {"most": 4}}, "model.params.remade: .* from 2 on .* found steps 4, most 4"),
        ({"remade": REMADE | {"most": 1}}, "model.params.remade: .* from 2 on .* found steps 4, most 1"),
        ({"temporal_decoder_config": of_sizes(64, [1, 2])}, "params.ch: expected 32, as the autoencoder .*, found 64"),
        ({"temporal_decoder_config": of_sizes(32, [1])}, r"params.ch_mult: expected \[1, 2\], .* found \[1\]"),
        ({"start_path": "nowhere.ckpt"}, "nowhere.ckpt: expected a checkpoint"),
    ],
)
def test_impossible_options_are_refused(checkpoint, options, message):
    with pytest.raises(UserError, match=message):
        make_model(checkpoint, **options)


def test_single_frames_are_refused(checkpoint, footage, tmp_path):
    with pytest.raises(UserError, match=r"data: expected rows of at least 2 frames .* set data.params.frames"):
        make_trainer(tmp_path, 1).fit(make_model(checkpoint), make_data(footage))


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_an_exact_network_remakes_the_true_clip(checkpoint, parameterization):
    """A network that knows the true clip removes all noise; one that predicts zero does not."""
    true = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    source = ClipGenerator(checkpoint)
    schedule = source.schedule = NoiseSchedule(parameterization=parameterization)
    seen = []

    def exact(x, timesteps, context, *, fps=None, known_level=None):
        clip = true[len(seen) >= 2 : 2 if len(seen) >= 2 else 1]  # both clips go back two of four steps
        seen.append((float(fps), context, x[:, :, 4:]))
        signal, strength = (scale.view(-1, 1, 1, 1, 1) for scale in schedule.scales_at(timesteps))
        noise = (x[:, :, :4] - signal * clip) / strength
        return noise if parameterization == "eps" else signal * noise - strength * clip

    exact.has_fps_embedding, source._unet, source.takes_known_frames = True, exact, True
    remaker = Remaker(source, 4, 2)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    remade = remaker(true, ["a road", "snow"], [12, 4], generators)
    assert (remade - true).square().mean() < 0.04**2  # the way ends at the noise of diffusion step 0, 0.029
    assert [fps for fps, _, _ in seen] == [12, 12, 4, 4]
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][1], seen[2][1])
    assert all((mask == 1).all() for mask in (given[:, :, 0] for _, _, given in seen))  # nothing is known
    source._unet = lambda x, *_, **__: torch.zeros_like(x[:, :, :4])
    assert (remaker(true, ["a road", "snow"], [12, 4], generators) - true).abs().mean() > 0.1


def test_a_network_with_known_frames_remakes_procedural_rows(tmp_path):
    config = training_config()
    kwargs = config["model"]["params"]["unet_config"]["params"] = {
        **config["model"]["params"]["unet_config"]["params"], "in_channels": 9, "fps_embedding": True,
        "known_level_embedding": True,
    }  # fmt: skip
    state = {name: tensor for name, tensor in video_state().items() if not name.startswith(UNET_PREFIX)}
    state |= {UNET_PREFIX + name: tensor for name, tensor in UNetModel(**kwargs).state_dict().items()}
    torch.save({"state_dict": state, "config": config}, tmp_path / "known.ckpt")
    model = make_model(tmp_path / "known.ckpt", remade={**REMADE, "share": 1.0})
    data = DriveFrameDataModule(looks="moving", size=16, batch_size=2, frames=3, rates=[12, 4], val_frames=2)
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(model, data)
    assert trainer.callback_metrics["train/l1"] > 0


def test_fast_norms_change_nothing():
    torch.manual_seed(0)
    first_stage = KLFirstStage(DDCONFIG, 4).requires_grad_(False)
    latents = torch.randn(2, 4, 16, 16)
    before, names = first_stage.decode(latents), list(first_stage.state_dict())
    use_fast_norms(first_stage.network.decoder)
    assert (first_stage.decode(latents) - before).abs().max() < 1e-5 and list(first_stage.state_dict()) == names


def test_the_config_of_the_experiment_builds():
    config = load_config([DRIVE_CONFIG])
    check(config)
    layers = build(config.model.params.temporal_decoder_config, "model.params.temporal_decoder_config")
    assert sum(one.numel() for one in layers.parameters()) == 2_440_064
