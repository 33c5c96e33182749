"""The small autoencoder: it learns, resumes exactly, its file is a first stage; windows of EQ-VAE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from ldm.checkpoint import latent_scale, load_first_stage
from ldm.config import build, check, load_config, to_container
from ldm.config.schema import trusting
from ldm.data.frames import FrameBatch
from ldm.errors import UserError
from ldm.models import autoencoder
from ldm.models.autoencoder import AutoencoderKL, ReconstructionLogger, psnr
from ldm.models.autoencoder_loss import AutoencoderLoss, PatchDiscriminator, draw_windows, look_through
from ldm.modules.posterior import split_moments
from tests.bars_footage import make_data, moving_bars, write_bars
from tests.models.training import SaveAt, make_trainer

TINY_CONFIG = Path(__file__).parents[2] / "configs" / "tiny" / "autoencoder.yaml"
DDCONFIG = {"z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1}
ADVERSARIAL = {"weight": 0.5, "start_step": 2, "width": 8, "layers": 2}


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    return write_bars(tmp_path_factory.mktemp("footage"))


def make_model(**options) -> AutoencoderKL:
    torch.manual_seed(0)
    loss = options.pop("lossconfig", {"l1": 1.0, "kl_weight": 1e-6})
    return AutoencoderKL(**{"ddconfig": DDCONFIG, "embed_dim": 4, "lossconfig": loss, "warmup_steps": 2} | options)


# ---- learning


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_improves_reconstruction(footage, tmp_path, precision):
    model, data = make_model(learning_rate=2e-3), make_data(footage)
    trainer = make_trainer(tmp_path, 50, precision=precision)
    before = trainer.validate(model, data, verbose=False)[0]["val/psnr"]
    trainer.fit(model, data)
    after = trainer.validate(model, data, verbose=False)[0]["val/psnr"]
    assert after > before + 4
    latents = torch.cat([model.first_stage.encode(data.train_frames[i].pixels) for i in range(8)]).chunk(2, 1)[0]
    assert model.scale_factor == pytest.approx(1 / latents.std().item(), rel=0.3)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    loss = AutoencoderLoss({"l1": 2.0, "kl_weight": 0.1})
    output, pixels = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.25)
    moments = torch.cat([torch.full((2, 4, 4, 4), 2.0), torch.zeros(2, 4, 4, 4)], dim=1)  # each latent: 0.5 * 2**2 nats
    terms = loss.reconstruction(output, pixels, moments)
    nats_per_value = 2.0 * (4 * 4 * 4) / (3 * 8 * 8)
    assert terms["loss"].item() == pytest.approx(2.0 * 0.25 + 0.1 * nats_per_value)


def test_psnr_of_known_errors():
    pixels = torch.zeros(2, 3, 4, 4)
    output = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 3.0)])  # the second is clipped to 1
    assert psnr(output, pixels).tolist() == pytest.approx([20.0, -10 * np.log10(0.25)])


def test_a_fresh_posterior_is_narrow():
    mean, logvar = split_moments(make_model().first_stage.encode(torch.rand(2, 3, 16, 16) * 2 - 1))
    assert logvar.exp().sqrt().mean() < 0.15 < mean.std()


def test_the_discriminator_starts_at_its_step_and_learns(footage, tmp_path):
    model, data = make_model(lossconfig={"adversarial": ADVERSARIAL}), make_data(footage)
    fresh = {name: value.clone() for name, value in model.loss.discriminator.named_parameters()}
    trainer = make_trainer(tmp_path, 2)
    trainer.fit(model, data)
    assert trainer.global_step == 2
    assert all(torch.equal(value, fresh[name]) for name, value in model.loss.discriminator.named_parameters())
    trainer.save_checkpoint(tmp_path / "ae.ckpt")
    trainer = make_trainer(tmp_path, 6)
    trainer.fit(model, data, ckpt_path=tmp_path / "ae.ckpt")
    assert trainer.global_step == 6 and data.consumed == 12  # its own steps are not counted
    assert not any(torch.equal(value, fresh[name]) for name, value in model.loss.discriminator.named_parameters())
    assert {"train/deception", "train/discrimination"} <= set(trainer.logged_metrics)
    assert "discriminator" in model.parameter_summary()


def test_the_discriminator_separates_real_from_blurred():
    torch.manual_seed(0)
    loss = AutoencoderLoss({"adversarial": {**ADVERSARIAL, "start_step": 0}})
    optimizer = torch.optim.Adam(loss.discriminator.parameters(), lr=5e-3)
    pixels = torch.from_numpy(moving_bars(8)).permute(0, 3, 1, 2).float() / 127.5 - 1
    blurred = torch.nn.functional.avg_pool2d(pixels, 5, stride=1, padding=2)
    first = loss.discriminator_loss(blurred, pixels).item()
    for _ in range(30):
        optimizer.zero_grad()
        last = loss.discriminator_loss(blurred, pixels)
        last.backward()
        optimizer.step()
    assert last.item() < 0.5 * first
    assert loss.discriminator(pixels).mean() > loss.discriminator(blurred).mean() + 0.5
    assert PatchDiscriminator(width=16, layers=3)(pixels).shape[1] == 1


def test_the_adversarial_gradient_is_weighted_by_the_reconstruction_gradient():
    torch.manual_seed(0)
    loss = AutoencoderLoss({"adversarial": ADVERSARIAL})
    last_layer = torch.randn(3, 3, 1, 1, requires_grad=True)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    output = torch.nn.functional.conv2d(pixels, last_layer)
    reconstruction = (output - pixels).abs().mean()
    adversarial = loss.generator_loss(output, reconstruction, last_layer)
    norms = [
        torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm() for term in (adversarial, reconstruction)
    ]
    assert (norms[0] / norms[1]).item() == pytest.approx(0.5, rel=0.02)


class SquaredDistance(torch.nn.Module):
    def forward(self, output: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return (output - pixels).square().mean(dim=(1, 2, 3))


def test_a_torchscript_file_is_the_perceptual_term(tmp_path):
    path = tmp_path / "distance.pt"
    torch.jit.script(SquaredDistance()).save(str(path))
    options = {"l1": 0.0, "kl_weight": 0.0, "perceptual": {"path": str(path), "weight": 3.0}}
    with pytest.raises(UserError, match=r"distance.pt: a TorchScript file .* is a program, .* give --trust-config"):
        AutoencoderLoss(options)
    with trusting():
        loss = AutoencoderLoss(options)
    output = torch.full((2, 3, 8, 8), 0.5, requires_grad=True)
    terms = loss.reconstruction(output, torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 4, 4))
    assert terms["loss"].item() == pytest.approx(3.0 * 0.25)
    terms["loss"].backward()
    assert output.grad.abs().min() > 0


# ---- checkpoints


def test_the_file_is_a_first_stage_with_its_scale_factor(footage, tmp_path):
    config = {"model": {"target": "ldm.models.autoencoder.AutoencoderKL"}}
    model, trainer = make_model(config=config), make_trainer(tmp_path, 2)
    trainer.fit(model, make_data(footage))
    path = tmp_path / "ae.ckpt"
    trainer.save_checkpoint(path)
    contents = torch.load(path, weights_only=True)
    assert {name.split(".")[0] for name in contents["state_dict"]} == {
        "encoder", "decoder", "quant_conv", "post_quant_conv"
    }  # fmt: skip
    assert contents["config"] == config
    node = {"target": "ldm.modules.encoders.KLFirstStage", "params": {"ddconfig": DDCONFIG, "embed_dim": 4}}
    first_stage = load_first_stage(path, node)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(first_stage.encode(pixels), model.first_stage.eval().encode(pixels))
    node["params"]["ckpt_path"] = str(path)
    params = {"scale_factor": None, "first_stage_config": node}
    assert latent_scale({"model": {"params": params}}) == pytest.approx(model.scale_factor)


def test_starting_from_a_checkpoint_keeps_its_weights(footage, tmp_path):
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(trained := make_model(), make_data(footage))
    trainer.save_checkpoint(tmp_path / "ae.ckpt")
    again = make_model(ckpt_path=str(tmp_path / "ae.ckpt"))
    for name, tensor in trained.first_stage.compvis_state_dict().items():
        assert torch.equal(again.first_stage.compvis_state_dict()[name], tensor)


def test_decoder_only_keeps_the_latents(footage, tmp_path):
    trainer = make_trainer(tmp_path, 2)
    trainer.fit(make_model(), make_data(footage))
    trainer.save_checkpoint(tmp_path / "ae.ckpt")
    again = make_model(ckpt_path=str(tmp_path / "ae.ckpt"), decoder_only=True, equivariance=1.0)
    network = again.first_stage.network
    kept = sum(weight.numel() for part in (network.encoder, network.quant_conv) for weight in part.parameters())
    assert again.parameter_summary().endswith(f"frozen: {kept:,}")
    trainer = make_trainer(tmp_path, 2)
    trainer.fit(again, make_data(footage))
    trainer.save_checkpoint(tmp_path / "sharper.ckpt")
    before, after = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("ae", "sharper"))
    assert after["scale_factor"] == before["scale_factor"]
    for name, tensor in before["state_dict"].items():
        is_kept = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(after["state_dict"][name], tensor) == is_kept, name
    with pytest.raises(UserError, match=r"decoder_only: expected model\.params\.ckpt_path, the autoenc"):
        make_model(decoder_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("lossconfig", [{}, {"adversarial": {**ADVERSARIAL, "start_step": 1}}])
def test_stop_and_resume_equals_straight(footage, tmp_path, lossconfig):
    def fit(ckpt_path: Path | None = None):
        trainer = make_trainer(tmp_path, 13, callbacks=[SaveAt(5, tmp_path / "half.ckpt")])
        trainer.fit(make_model(lossconfig=lossconfig), make_data(footage, num_workers=1), ckpt_path=ckpt_path)
        return trainer

    straight = fit()
    resumed = fit(tmp_path / "half.ckpt")
    first, second = straight.lightning_module, resumed.lightning_module
    assert resumed.global_step == 13
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert second.scale_factor == first.scale_factor


# ---- pictures


def test_reconstructions_are_drawn_after_validation(footage, tmp_path):
    logger = ReconstructionLogger(tmp_path / "run", num_images=3)
    trainer = make_trainer(tmp_path, 2, callbacks=[logger], check_val_every_n_epoch=1, limit_train_batches=2)
    trainer.fit(make_model(), make_data(footage))
    (path,) = (tmp_path / "run").rglob("*.png")
    assert path.name == "reconstructions_gs-000002.png"
    sheet = Image.open(path)
    assert sheet.width == 3 * 36 + 4 and sheet.height > 2 * 36


# ---- the config, and bad input


def test_the_tiny_config_builds_and_every_key_is_read():
    config = load_config([TINY_CONFIG], ["data.params.videos=x.mp4"])
    check(config)
    model = to_container(config)["model"]
    del model["base_learning_rate"]
    built = build(model, "model", learning_rate=1e-3, config={})
    assert 1e6 < sum(p.numel() for p in built.parameters()) < 3e6
    assert built.first_stage.downsampling == 8
    assert built.parameter_summary() == (
        "trained: 2,776,455 parameters (encoder 1,048,656, decoder 1,727,799); frozen: 0"
    )
    assert build(config.data, "data").videos == ["x.mp4"]


@pytest.mark.parametrize(
    ("lossconfig", "message"),
    [
        ({"kl": 1.0}, r"model.params.lossconfig.kl: nothing reads this key"),
        ({"adversarial": {"start": 3}}, r"adversarial.start: nothing reads this key; did you mean 'start_step'"),
        ({"adversarial": 0.5}, r"lossconfig.adversarial: expected a mapping"),
        ({"perceptual": {"path": "nowhere.pt"}}, r"perceptual.path: expected a TorchScript file .* found 'nowhere.pt'"),
        ({"perceptual": {"path": __file__}}, r"autoencoder.py: expected a TorchScript file for the perceptual term"),
    ],
)  # fmt: skip
def test_bad_losses_are_refused(lossconfig, message):
    with pytest.raises(UserError, match=message), trusting():
        make_model(lossconfig=lossconfig)


@pytest.mark.parametrize(
    ("flag", "instead"),
    [({"gradient_clip_val": 0.5}, "model.params.gradient_clip"), ({"accumulate_grad_batches": 4}, "make .* larger")],
)
def test_trainer_options_that_manual_optimisation_ignores_are_refused(flag, instead):
    (name,) = flag
    with pytest.raises(UserError, match=rf"lightning.trainer.{name}: the autoencoder cannot use it, .*{instead}"):
        make_model(config={"lightning": {"trainer": flag}})
    make_model(config={"lightning": {"trainer": {"gradient_clip_val": None, "accumulate_grad_batches": 1}}})


def test_float16_is_refused(footage, tmp_path):
    trainer = make_trainer(tmp_path, 1)
    model = make_model()
    model.trainer = trainer
    trainer.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(UserError, match="32-true or bf16-mixed, found 16-mixed"):
        model.configure_optimizers()


# ---- windows of latents and pictures


def test_the_whole_picture_is_unchanged():
    pictures = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    windows = draw_windows(1, [4, 5, 6], share=0.0)
    assert torch.allclose(look_through(pictures, windows), pictures, atol=1e-5)


def test_windows_lie_inside_and_depend_on_seed_and_position_only():
    windows = draw_windows(1, list(range(200)), share=1.0)
    side, shift = windows[:, 0, 0], windows[:, :, 2]
    assert side.min() > 1 / 1.5 - 1e-6 and side.max() <= 1 and side.std() > 0.05
    assert (shift.abs().amax(1) <= 1 - side + 1e-6).all() and shift.abs().max() > 0.2
    assert torch.equal(draw_windows(1, [7, 150], 1.0), windows[[7, 150]])
    shown = (draw_windows(1, list(range(400)), share=0.25)[:, 0, 0] < 1).float().mean()
    assert 0.17 < shown < 0.33


def test_a_window_shows_the_same_part_of_latents_and_pictures():
    ramp = torch.linspace(-1, 1, 64)
    picture = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64)])[None]
    latents = torch.nn.functional.avg_pool2d(picture, 8)
    window = torch.tensor([[[0.7, 0.0, 0.2], [0.0, 0.7, -0.1]]])
    seen = torch.nn.functional.avg_pool2d(look_through(picture, window), 8)
    assert torch.allclose(look_through(latents, window), seen, atol=1e-2)
    middle = rearrange(look_through(picture, window), "1 c h w -> c (h w)").mean(1)
    assert torch.allclose(middle, torch.tensor([0.2, -0.1]), atol=5e-3)  # right and up


def test_a_share_out_of_range_is_refused():
    with pytest.raises(UserError, match=r"model\.params\.equivariance: expected a share, 0 to 1, found 2"):
        make_model(equivariance=2)


def test_a_step_compares_windows_of_latents_and_pictures(monkeypatch: pytest.MonkeyPatch):
    module = make_model(equivariance=1.0)
    seen = []

    def remember(images: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        seen.append((images.shape, windows))
        return look_through(images, windows)

    monkeypatch.setattr(autoencoder, "look_through", remember)
    monkeypatch.setattr(module, "_step", lambda optimizer, loss, network: None)
    monkeypatch.setattr(module, "optimizers", lambda: [None])
    scheduler = type("Scheduler", (), {"step": lambda self: None})()
    monkeypatch.setattr(module, "lr_schedulers", lambda: scheduler)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(AutoencoderKL, "global_step", 0)
    module.training_step(FrameBatch(torch.zeros(2, 3, 16, 16), [3, 4], rates=[1, 1]), 0)
    (latents, first), (pixels, second) = seen
    assert latents == (2, 4, 8, 8) and pixels == (2, 3, 16, 16) and torch.equal(first, second)
