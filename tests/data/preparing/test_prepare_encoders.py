"""`scripts/prepare.py` with real encoders on real footage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm import checkpoint
from ldm.config import load_config
from ldm.data.preparing.footage import read_frames
from ldm.data.shards import DatasetError, PreparedSet
from ldm.modules.encoders import KLFirstStage
from ldm.video import from_uint8
from tests.data.preparing.test_prepare import ROOT, contents, prepare


def test_real_encoders_on_real_footage(highway, tmp_path, monkeypatch, capsys):
    """The tiny video model's own config, with random weights in its autoencoder."""
    monkeypatch.setenv("COLUMNS", "400")
    video_config = ROOT / "configs" / "tiny" / "video.yaml"
    node = load_config([video_config]).model.params.first_stage_config
    torch.manual_seed(0)
    first_stage = KLFirstStage(node.params.ddconfig, node.params.embed_dim)
    tensors = {f"first_stage_model.{name}": tensor for name, tensor in first_stage.compvis_state_dict().items()}
    torch.save({"state_dict": tensors, "scale_factor": 0.25}, tmp_path / "ae.ckpt")
    path = "model.params.first_stage_config.params.ckpt_path="
    arguments = [str(highway), "--out", str(tmp_path / "out"), "--config", str(video_config), "--size", "64",
                 "--prompt", "driving on a highway " * 40, f"{path}{tmp_path / 'ae.ckpt'}"]  # fmt: skip
    prepare.main([*arguments, "--preview"])
    prepared = PreparedSet(tmp_path / "out", verify=True)
    assert [(scene.source, scene.num_frames) for scene in prepared.scenes] == [("highway.mp4", 89)]
    frames = list(read_frames(highway, 10, 64))[40:44]
    with torch.no_grad():
        expected = first_stage.eval().encode(from_uint8(frames)).numpy()
    assert np.abs(prepared.read_moments(prepared.scenes[0], 40, 4) - expected).max() < 0.01
    assert prepared.info.moments_shape == [8, 8, 8]
    assert prepared.info.context_shape == [77, 64]
    prepared.check_encoders(
        checkpoint.identity(first_stage.compvis_state_dict()), prepared.info.text_encoder, scale_factor=0.25
    )
    assert "this was cut: 'highway driving on a" in capsys.readouterr().out
    before = contents(tmp_path / "out")
    monkeypatch.setattr(checkpoint, "load_encoders", None)
    prepare.main(arguments)
    assert contents(tmp_path / "out") == before
    with torch.no_grad():
        next(first_stage.parameters()).add_(1e-3)
    tensors = {f"first_stage_model.{name}": tensor for name, tensor in first_stage.compvis_state_dict().items()}
    torch.save({"state_dict": tensors, "scale_factor": 0.25}, tmp_path / "other.ckpt")
    with pytest.raises(DatasetError, match=r"other settings \(first_stage was"):
        prepare.main([*arguments[:-1], f"{path}{tmp_path / 'other.ckpt'}"])
