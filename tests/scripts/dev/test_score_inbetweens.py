"""Scores of frames between known frames: held-out clips only, errors beside the blend, known latents bit for bit."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from ldm.checkpoint import first_stage_tensors, identity, read_checkpoint, text_tensors
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentVideoDiffusion
from ldm.sampling.generator import ClipGenerator
from scripts.dev import score_inbetweens
from tests.tiny_checkpoint import CONFIG, video_state
from tests.toy_run import make_prepared

DATA = {"root": "elsewhere", "frames": 5, "strides": [1, 2], "val_share": 0.4, "batch_size": 3, "num_workers": 0}


@pytest.fixture
def prepared(tmp_path, checkpoint):
    """Scenes whose latents change linearly from frame to frame, which a blend reproduces exactly."""
    contents = read_checkpoint(checkpoint)
    return make_prepared(
        tmp_path / "set", [20] * 8, moments_shape=[8, 4, 4], context_shape=[3, 16], scale_factor=0.01,
        first_stage=identity(first_stage_tensors(contents)), text_encoder=identity(text_tensors(contents)),
    )  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    config = copy.deepcopy(CONFIG)
    config["model"]["params"]["unet_config"]["params"] |= {
        "in_channels": 9,
        "fps_embedding": True,
        "known_level_embedding": True,
    }
    config["data"] = {"target": "ldm.data.clips.ClipDataModule", "params": DATA}
    config["model"]["params"]["scale_factor"] = 0.01
    params = {key: config["model"]["params"][key] for key in ("unet_config", "first_stage_config", "cond_stage_config")}
    unet = LatentVideoDiffusion(**params, learning_rate=1e-3).unet
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.state_dict().items()}
    path = tmp_path / "conditioned.ckpt"
    torch.save({"state_dict": {**weights, **video_state()}, "config": config}, path)
    return path


class Blender(torch.nn.Module):
    """Stands for the network: predicts the blend of both known frames."""

    has_fps_embedding = has_known_level = True

    def __init__(self, schedule) -> None:
        super().__init__()
        self.schedule, self.rates = schedule, set()

    def forward(self, x, timesteps, context, fps, known_level):
        self.rates |= set(fps.tolist())
        blended = score_inbetweens.blend(x[:, 0, 5:], x[:, -1, 5:], x.shape[1])
        signal, noise = (scale.view(-1, 1, 1, 1, 1) for scale in self.schedule.scales_at(timesteps))
        return (x[:, :, :4] - signal * blended) / noise


def test_a_network_that_blends_has_the_error_of_the_blend(checkpoint, prepared):
    generator = ClipGenerator(checkpoint)
    generator._unet = Blender(generator.schedule)
    data = score_inbetweens.held_out(generator, prepared)
    rows = score_inbetweens.score(generator, data, num=4, steps=10, sampler="ddim", seed=0)
    assert {row["fps"] for row in rows} == generator._unet.rates == {10.0, 5.0}
    assert all(row["blend"] < 1e-9 for row in rows)  # these scenes change linearly
    left = 1 - generator.schedule.alphas_cumprod[0].item()  # variance of the noise where DDIM ends
    assert all(row["model"] < 3 * left for row in rows)


def test_errors_are_those_of_the_frames_made(checkpoint, prepared, monkeypatch):
    frames = torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0]).view(1, 5, 1, 1, 1)
    blended = score_inbetweens.blend(frames[:, 0], frames[:, -1], 5)
    assert (blended - frames).flatten().tolist() == [0, 3, 4, 3, 0]
    squares = 100 * frames.expand(1, 5, 4, 4, 4), torch.zeros(1, 3, 16), torch.tensor([10.0])  # scaled by 0.01
    monkeypatch.setattr(score_inbetweens, "windows", lambda data, num: iter([squares]))
    generator = ClipGenerator(checkpoint)
    generator._unet = Blender(generator.schedule)
    (row,) = score_inbetweens.score(generator, None, num=1, steps=50, sampler="ddim", seed=0)
    assert row["blend"] == pytest.approx((9 + 16 + 9) / 3)
    assert row["model"] == pytest.approx(row["blend"], rel=0.05)
    assert "| 10 | 1 | 3.3665 |" in score_inbetweens.summary([row])
    half = {"fps": 10.0, "model": 1.0, "blend": 4.0}
    assert "| 10 | 1 | 2.0000 | 1.0000 | 50.0% | 75.0% |" in score_inbetweens.summary([half])


def test_clips_of_other_encoders_are_an_error(checkpoint, tmp_path):
    other = make_prepared(tmp_path / "other", [20] * 8, moments_shape=[8, 4, 4], context_shape=[3, 16])
    with pytest.raises(UserError, match="other"):
        score_inbetweens.held_out(ClipGenerator(checkpoint), other)


def test_the_command_scores_held_out_clips(checkpoint, prepared, tmp_path, capsys):
    out = tmp_path / "rows.json"
    common = ["--ckpt", str(checkpoint), "--prepared", str(prepared)]
    score_inbetweens.main([*common, "--clips", "2", "--steps", "2", "--out", str(out)])
    table = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert len(rows) == 4 and all(np.isfinite(row["model"]) for row in rows)
    root = math.sqrt(np.mean([row["model"] for row in rows]))
    assert f"| all | 4 | 0.0000 | {root:.4f} |" in table
    data = score_inbetweens.held_out(ClipGenerator(checkpoint), prepared)
    trained = {part.scene.key for part in data.train_clips.slots}
    assert not trained & {part.scene.key for part, _, _ in data.val_clips.windows}


def test_checkpoints_that_cannot_be_scored_are_errors(checkpoint, prepared, tmp_path):
    plain = tmp_path / "plain.ckpt"
    torch.save({"state_dict": video_state(), "config": CONFIG}, plain)
    with pytest.raises(UserError, match="frames between: expected a network that takes known frames"):
        score_inbetweens.main(["--ckpt", str(plain), "--prepared", str(prepared)])
    with pytest.raises(UserError, match="--clips: expected at least 1, found 0"):
        score_inbetweens.main(["--ckpt", str(checkpoint), "--prepared", str(prepared), "--clips", "0"])
    contents = torch.load(checkpoint, weights_only=True)
    contents["config"].pop("data")
    torch.save(contents, plain)
    with pytest.raises(UserError, match=r"plain\.ckpt: expected the checkpoint of a training run"):
        score_inbetweens.main(["--ckpt", str(plain), "--prepared", str(prepared)])
