"""Callbacks that report: memory and progress lines, sample videos."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.callbacks import MemoryReport, ProgressLines, VideoLogger, WeightAverage
from ldm.callbacks import samples as sampling
from ldm.callbacks import samples as videos
from ldm.errors import UserError
from tests.toy_run import CONTEXT_SHAPE, ToyModel, ToyVideoModel, fit, last, read

# ---- reports


def test_memory_by_kind(root, tmp_path, caplog):
    model = ToyModel(learning_rate=0.05)
    with caplog.at_level(logging.INFO, logger="ldm"):
        logger = TensorBoardLogger(tmp_path, name="", version="tensorboard")
        fit(root, tmp_path, [MemoryReport(), WeightAverage()], model=model, logger=logger, accumulate_grad_batches=2)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("memory")]
    assert [line.split(",")[0] for line in lines] == ["memory before the first step", "memory after the first step"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    trained = sum(weight.nbytes for weight in model.head.parameters()) / 2**20
    frozen = sum(weight.nbytes for weight in model.frozen.parameters()) / 2**20
    values = {name: [event.value for event in events.Scalars(f"memory/{name}")] for name in (
        "weights_trained", "weights_frozen", "gradients", "optimiser_states", "average", "peak"
    )}  # fmt: skip
    assert values["weights_trained"] == pytest.approx([trained, trained])
    assert values["weights_frozen"] == pytest.approx([frozen, frozen])
    assert values["average"] == pytest.approx([trained, trained])
    for name in ("gradients", "optimiser_states"):
        assert values[name] == pytest.approx([0, trained]), name
    assert 50 < values["peak"][1] < 100_000


def test_progress_of_a_model_that_returns_no_loss(root, tmp_path, caplog):
    class Quiet(ToyModel):
        def __init__(self):
            super().__init__(learning_rate=0.01)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.log("train/l1", 0.25, prog_bar=True, batch_size=len(batch))
            self.optimizers().step(lambda: self.loss(batch))

    with caplog.at_level(logging.INFO, logger="ldm"):
        fit(root, tmp_path, [ProgressLines(every_seconds=0)], model=Quiet(), steps=3)
    assert any(message.startswith("step 2/3, epoch 0, train/l1 0.2500, ") for message in caplog.messages)
    assert read(last(tmp_path))["global_step"] == 3


def test_progress_in_lines(root, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="ldm"):
        fit(root, tmp_path, [ProgressLines(every_seconds=0)], steps=3, accumulate_grad_batches=2)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step")]
    assert len(lines) == 3 and lines[0].startswith("step 1/3, epoch 0, loss ")
    assert "left" in lines[0] and "/s" in lines[0]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ldm"):
        fit(root, tmp_path, [ProgressLines(every_seconds=1000)], steps=5)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step")]
    assert [line.split(",")[0] for line in lines] == ["step 1/5", "step 5/5"], "the first and the last at least"
    with pytest.raises(UserError, match="every_seconds of at least 0"):
        ProgressLines(every_seconds=-1)


# ---- sample videos


@pytest.fixture
def encoders(monkeypatch):
    """Stand-ins for the two encoders, and how often each was loaded."""
    loaded = []

    class Text(torch.nn.Module):
        def encode(self, prompts):
            return torch.stack([torch.full(CONTEXT_SHAPE, float(len(prompt))) for prompt in prompts])

        def truncated(self, prompt):
            return prompt[9:] or None

    class FirstStage(torch.nn.Module):
        def decode(self, latents):
            return torch.nn.functional.interpolate(latents, scale_factor=8).repeat(1, 2, 1, 1)[:, :3].tanh()

    monkeypatch.setattr(videos, "load_text_encoder_of", lambda config: loaded.append("text") or Text())
    monkeypatch.setattr(sampling, "load_first_stage_of", lambda config: loaded.append("first stage") or FirstStage())
    return loaded


CONFIG = {"model": {"params": {"first_stage_config": {"params": {}}, "ckpt_path": "sd.ckpt"}}}


def test_sample_videos_at_the_start_and_every_so_many_steps(root, tmp_path, encoders):
    callback = VideoLogger(
        CONFIG, str(tmp_path), ["a road", "fog"], every_n_steps=3, frames=6, steps=2, scale=2.0, sampler="ddim"
    )
    model, logger = ToyVideoModel(), TensorBoardLogger(tmp_path, name="", version="tensorboard")
    average = WeightAverage(decay=0.9)
    fit(root, tmp_path, [average, callback], model=model, logger=logger, accumulate_grad_batches=2)
    names = sorted(path.name for path in (tmp_path / "images" / "samples").iterdir())
    assert names == [
        "00_gs-000000_e-000000_b-000000.gif", "00_gs-000003_e-000000_b-000005.gif",
        "01_gs-000000_e-000000_b-000000.gif", "01_gs-000003_e-000000_b-000005.gif",
        "sheet_gs-000000_e-000000_b-000000.png", "sheet_gs-000003_e-000000_b-000005.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "images" / "samples" / names[0]) as gif:
        assert (gif.n_frames, gif.size) == (6, (16, 16))
    assert encoders == ["text", "first stage", "first stage"], "the text encoder once, the decoder each time"
    assert set(model.modes) == {(False, False)} and model.unet.training
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    images = events.Images("samples/00")
    assert [image.step for image in images] == [0, 3]
    assert images[0].encoded_image_string == (tmp_path / "images" / "samples" / names[0]).read_bytes()
    assert (images[0].width, images[0].height) == (16, 16)


def test_sample_videos_repeat_and_are_not_shown_at_resume(root, tmp_path, encoders):
    def callback(folder):
        return VideoLogger(CONFIG, str(folder), ["a road"], every_n_steps=4, steps=2, scale=1.0)

    for name in ("one", "two"):
        fit(root, tmp_path / name, [callback(tmp_path / name)], model=ToyVideoModel(), steps=5)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.gif")} for name in ("one", "two"))
    assert one == two and len(one) == 2
    again, checkpoint = callback(tmp_path / "one"), last(tmp_path / "one")
    fit(root, tmp_path / "one", [again], model=ToyVideoModel(), steps=6, resume=checkpoint)
    assert len(list((tmp_path / "one" / "images").rglob("*.gif"))) == 2


def test_network_with_known_frames_gets_none_and_the_rate(root, tmp_path, encoders):
    model, told = ToyVideoModel(), []

    def denoise(inputs, timesteps, context, fps):
        noisy, mask, known = inputs.split([2, 1, 2], dim=2)
        told.append((mask.min().item(), known.abs().max().item(), fps.tolist()))
        return noisy * 0.5 + model.unet.scale

    model.unet.takes_known_frames = model.unet.has_fps_embedding = True
    model.unet.forward = denoise
    fit(root, tmp_path, [VideoLogger(CONFIG, str(tmp_path), ["a road"], steps=2, scale=2.0)], model=model, steps=1)
    assert told == [(1, 0, [10.0, 10.0])] * 2


def test_invalid_video_settings_are_errors(root, tmp_path, encoders):
    with pytest.raises(UserError, match=r"at least one prompt.*found 0 prompts"):
        VideoLogger(CONFIG, str(tmp_path), [])
    with pytest.raises(UserError, match="every_n_steps 0"):
        VideoLogger(CONFIG, str(tmp_path), ["x"], every_n_steps=0)
    with pytest.raises(UserError, match="frames 0"):
        VideoLogger(CONFIG, str(tmp_path), ["x"], frames=0)
    with pytest.raises(UserError, match=r"did you mean 'ddim'\?"):
        fit(root, tmp_path, [VideoLogger(CONFIG, str(tmp_path), ["x"], sampler="dim")], model=ToyVideoModel())
    with pytest.raises(UserError, match="steps: expected 1 to 999, found 0"):
        fit(root, tmp_path, [VideoLogger(CONFIG, str(tmp_path), ["x"], steps=0)], model=ToyVideoModel())
    with pytest.raises(UserError, match="ToyModel generates no videos"):
        fit(root, tmp_path, [VideoLogger(CONFIG, str(tmp_path), ["x"])])


def test_cut_prompts_are_logged_and_only_the_first_process_samples(root, tmp_path, encoders, caplog):
    callback = VideoLogger(CONFIG, str(tmp_path), ["a road", "a road in fog"], at_start=False, steps=2)
    with caplog.at_level(logging.WARNING, logger="ldm"):
        fit(root, tmp_path, [callback], model=ToyVideoModel(), steps=1)
    assert caplog.messages == ["the prompt 'a road in fog...' is longer than the text encoder holds; cut: ' fog'"]
    encoders.clear()
    callback.on_fit_start(SimpleNamespace(is_global_zero=False), ToyVideoModel())
    assert encoders == [], "only the first process shows videos"
