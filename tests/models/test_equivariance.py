"""Windows through which latents and pictures are seen alike."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange

from ldm.data.frames import FrameBatch
from ldm.errors import UserError
from ldm.models import autoencoder
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.autoencoder_loss import draw_windows, look_through

pytestmark = pytest.mark.numeric


def test_the_whole_picture_is_left_as_it_is():
    pictures = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    windows = draw_windows(1, [4, 5, 6], share=0.0)
    assert torch.allclose(look_through(pictures, windows), pictures, atol=1e-5)


def test_windows_lie_inside_and_depend_on_seed_and_position_alone():
    windows = draw_windows(1, list(range(200)), share=1.0)
    side, shift = windows[:, 0, 0], windows[:, :, 2]
    assert side.min() > 1 / 1.5 - 1e-6 and side.max() <= 1 and side.std() > 0.05
    assert (shift.abs().amax(1) <= 1 - side + 1e-6).all() and shift.abs().max() > 0.2
    assert torch.equal(draw_windows(1, [7, 150], 1.0), windows[[7, 150]])
    shown = (draw_windows(1, list(range(400)), share=0.25)[:, 0, 0] < 1).float().mean()
    assert 0.17 < shown < 0.33


def test_latents_and_pictures_are_seen_through_the_same_window():
    ramp = torch.linspace(-1, 1, 64)
    picture = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64)])[None]
    latents = torch.nn.functional.avg_pool2d(picture, 8)
    window = torch.tensor([[[0.7, 0.0, 0.2], [0.0, 0.7, -0.1]]])
    seen = torch.nn.functional.avg_pool2d(look_through(picture, window), 8)
    assert torch.allclose(look_through(latents, window), seen, atol=1e-2)
    middle = rearrange(look_through(picture, window), "1 c h w -> c (h w)").mean(1)
    assert torch.allclose(middle, torch.tensor([0.2, -0.1]), atol=5e-3)  # right and up


def test_a_share_out_of_range_is_refused():
    ddconfig = {"double_z": True, "z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1],
                "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    with pytest.raises(UserError, match=r"model\.params\.equivariance: expected a share, 0 to 1, found 2"):
        AutoencoderKL(ddconfig, 4, {}, equivariance=2)


def test_a_step_compares_what_the_windows_show(monkeypatch: pytest.MonkeyPatch):
    ddconfig = {"double_z": True, "z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
                "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    module = AutoencoderKL(ddconfig, 4, {}, equivariance=1.0)
    seen = []

    def remember(images: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        seen.append((images.shape, windows))
        return look_through(images, windows)

    monkeypatch.setattr(autoencoder, "look_through", remember)
    monkeypatch.setattr(module, "_step", lambda optimizer, loss, network: None)
    monkeypatch.setattr(module, "optimizers", lambda: [None])
    scheduler = type("Scheduler", (), {"step": lambda self: None})()
    monkeypatch.setattr(module, "lr_schedulers", lambda: scheduler)
    monkeypatch.setattr(module, "log", lambda *words, **more: None)
    monkeypatch.setattr(AutoencoderKL, "global_step", 0)
    module.training_step(FrameBatch(torch.zeros(2, 3, 16, 16), [3, 4], rates=[1, 1]), 0)
    (latents, first), (pixels, second) = seen
    assert latents == (2, 4, 8, 8) and pixels == (2, 3, 16, 16) and torch.equal(first, second)
