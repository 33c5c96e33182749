"""Training of a small KL autoencoder from scratch, in place of Stable Diffusion's (Rombach et al. 2022, section 3.1).

The network is `ldm.modules.encoders.KLFirstStage`, the terms of the loss are in `autoencoder_loss`. A checkpoint holds
the network under CompVis's names, the config, and the scale factor that gives its latents unit variance.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.checkpoint.encoders import fill_encoder
from ldm.data.frames import FrameBatch
from ldm.errors import UserError
from ldm.models.autoencoder_loss import AutoencoderLoss, draw_windows, look_through
from ldm.models.small import SmallModelTraining, check_share
from ldm.modules.encoders import KLFirstStage
from ldm.modules.posterior import posterior_mean, sample_posterior
from ldm.optim import RateSchedule
from ldm.video import contact_sheet, to_uint8

log = logging.getLogger(__name__)

START_LOGVAR = -5.0  # of the posterior; starting from 0, the decoder first learns to ignore the latents
STD_MEMORY = 0.95  # decay of the running latent statistics


class AutoencoderKL(SmallModelTraining):
    """A KL autoencoder in training: `FrameBatch` in, weights and a scale factor out.

    ddconfig, embed_dim: the network, see `KLFirstStage`.
    lossconfig: see `AutoencoderLoss`.
    learning_rate: highest rate; it rises over `warmup_steps` steps and falls along a cosine to a fiftieth at the end.
    ckpt_path: weights to start from; None starts from random ones.
    gradient_clip: bound on the norm of the gradient.
    equivariance: share of the frames whose latents are zoomed and shifted before they are decoded, and compared with
        the frame zoomed and shifted (`look_through`); 0 for none.
    decoder_only: train only the decoder. Latents and scale factor remain those of `ckpt_path`, so a video model that
        was trained on them gets sharper pictures without further training.
    seed, config: of `SmallModelTraining`.

    Optimisation is manual because the adversarial term needs two optimisers, so Lightning's accumulation and clipping
    are refused: use `gradient_clip` and a larger batch.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the keys of the config
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        lossconfig: Mapping[str, Any],
        learning_rate: float = 1e-3,
        ckpt_path: str | None = None,
        warmup_steps: int = 50,
        gradient_clip: float = 1.0,
        seed: int = 23,
        equivariance: float = 0.0,
        decoder_only: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, 0, seed, config)
        _refuse_trainer_options(config or {})
        check_share("equivariance", equivariance)
        if decoder_only and ckpt_path is None:
            raise UserError(
                "model.params.decoder_only: expected model.params.ckpt_path, the autoencoder to start from, found none"
            )
        self.automatic_optimization = False
        self.first_stage = KLFirstStage(ddconfig, embed_dim)
        self.loss = AutoencoderLoss(lossconfig)
        self.gradient_clip, self.equivariance, self.decoder_only = gradient_clip, equivariance, decoder_only
        source = None if ckpt_path is None else fill_encoder(self.first_stage, ckpt_path)
        self.kept_scale = source.scale_factor if decoder_only else None
        self.latent_moments: Tensor | None = None  # running mean and mean square of the latents
        if ckpt_path is None:
            _reduce_posterior_variance(self.first_stage)
        if decoder_only:
            self.first_stage.network.encoder.requires_grad_(requires_grad=False)
            self.first_stage.network.quant_conv.requires_grad_(requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Images `b c h w` in [-1, 1] -> their reconstruction from the posterior mean."""
        return self.first_stage.decode(posterior_mean(self.first_stage.encode(pixels)))

    def parameter_summary(self) -> str:
        """One line: what is trained, and the number of parameters."""
        parts = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}
        network = self.first_stage.network
        counts = {part: sum(_count(getattr(network, name)) for name in names) for part, names in parts.items()}
        frozen = counts.pop("encoder") if self.decoder_only else 0
        if self.loss.discriminator is not None:
            counts["discriminator"] = _count(self.loss.discriminator)
        listed = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        return f"trained: {sum(counts.values()):,} parameters ({listed}); frozen: {frozen:,}"

    @property
    def scale_factor(self) -> float | None:
        """Latents times this have unit variance; None before the first step."""
        if self.decoder_only:
            return self.kept_scale
        if self.latent_moments is None:
            return None
        mean, square = self.latent_moments.tolist()
        return (square - mean**2) ** -0.5

    def training_step(self, batch: FrameBatch, batch_idx: int) -> None:
        """One step of the autoencoder and, from `start_step` on, one of the discriminator."""
        with torch.set_grad_enabled(not self.decoder_only):
            moments = self.first_stage.encode(batch.pixels)
        latents = sample_posterior(moments.float(), self._noise(batch, moments.shape))
        shown, pixels = latents, batch.pixels
        if self.equivariance:
            windows = draw_windows(self.seed, batch.positions, self.equivariance)
            shown, pixels = look_through(latents, windows), look_through(pixels, windows)
        output = self.first_stage.decode(shown).float()
        terms = self.loss.reconstruction(output, pixels, moments.float())
        optimizer, *others = _listed(self.optimizers())
        scheduler, *other_schedulers = _listed(self.lr_schedulers())
        is_adversarial = self.loss.is_adversarial(self.global_step)
        total = terms["loss"]
        if is_adversarial:
            terms["deception"] = self.loss.generator_loss(
                output, total, self.first_stage.network.decoder.conv_out.weight
            )
            total = total + terms["deception"]
        self._step(optimizer, total, self.first_stage)
        scheduler.step()
        if is_adversarial:
            terms["discrimination"] = self.loss.discriminator_loss(output, pixels)
            # The bare optimiser: Lightning would count its step as a step of the run.
            self._step(others[0].optimizer, terms["discrimination"], self.loss.discriminator)
            other_schedulers[0].step()
        self._remember(latents.detach())
        for name, value in terms.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "l1", batch_size=len(batch))

    def validation_step(self, batch: FrameBatch, batch_idx: int) -> None:
        """Log distance per pixel value and PSNR on held-out frames, means over frames."""
        output = self(batch.pixels).float()
        sizes = {"batch_size": len(batch), "on_epoch": True}
        self.log("val/l1", (output - batch.pixels).abs().mean(), **sizes)
        self.log("val/psnr", psnr(output, batch.pixels).mean(), prog_bar=True, **sizes)
        self.keep_shown(batch_idx, batch.pixels, output)

    def on_validation_epoch_end(self) -> None:
        """Log the scale factor."""
        if self.scale_factor is not None:
            self.log("val/scale_factor", self.scale_factor)

    def on_train_end(self) -> None:
        """Log the scale factor, which the video model's config needs."""
        if self.scale_factor is not None:
            log.info("scale factor of these latents (1 / standard deviation): %.5f", self.scale_factor)

    def configure_optimizers(self) -> tuple[list, list]:
        """AdamW for the network and for the discriminator, whose schedule begins at `start_step`."""
        if "16" in str(self.trainer.precision) and "bf16" not in str(self.trainer.precision):
            raise UserError(
                f"lightning.trainer.precision: the autoencoder trains in 32-true or bf16-mixed, found "
                f"{self.trainer.precision}"
            )
        networks = [self.first_stage]
        if self.loss.discriminator is not None:
            networks.append(self.loss.discriminator)
        optimizers = [
            torch.optim.AdamW(_trained(network), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
            for network in networks
        ]
        total = self.trainer.max_steps if self.trainer.max_steps > 0 else self.trainer.estimated_stepping_batches
        share = _rise_and_fall(self.warmup_steps, total)
        return optimizers, [RateSchedule(optimizer, share) for optimizer in optimizers]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the network under CompVis's names, and the rest beside it."""
        checkpoint["state_dict"] = self.first_stage.compvis_state_dict()
        if self.loss.discriminator is not None:
            checkpoint["discriminator"] = self.loss.discriminator.state_dict()
        if self.latent_moments is not None:
            checkpoint["latent_moments"] = self.latent_moments
        if self.scale_factor is not None:
            checkpoint["scale_factor"] = self.scale_factor
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load everything, and restore the names that Lightning expects."""
        self.first_stage.load_compvis_state_dict(checkpoint["state_dict"], where="autoencoder checkpoint")
        if self.loss.discriminator is not None and "discriminator" in checkpoint:
            self.loss.discriminator.load_state_dict(checkpoint["discriminator"])
        self.latent_moments = checkpoint.get("latent_moments")
        checkpoint["state_dict"] = self.state_dict()

    def _noise(self, batch: FrameBatch, moments_shape: torch.Size) -> Tensor:
        """Noise that depends on the seed and each frame's position only, so a resumed run repeats it."""
        _, channels, h, w = moments_shape
        noise = []
        for position in batch.positions:
            state = int(np.random.SeedSequence((self.seed, position)).generate_state(1, np.uint64)[0] >> np.uint64(1))
            noise.append(torch.randn(channels // 2, h, w, generator=torch.Generator().manual_seed(state)))
        return torch.stack(noise).to(batch.pixels.device)

    def _step(self, optimizer: Any, loss: Tensor, network: torch.nn.Module) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(_trained(network), self.gradient_clip)
        optimizer.step()

    def _remember(self, latents: Tensor) -> None:
        now = torch.stack([latents.mean(), latents.square().mean()]).float().cpu()
        if self.latent_moments is None:
            self.latent_moments = now
        else:
            self.latent_moments = STD_MEMORY * self.latent_moments + (1 - STD_MEMORY) * now


class ReconstructionLogger(pl.Callback):
    """After every validation, write held-out frames above their reconstructions to a PNG file and to TensorBoard.

    folder: the run folder; pictures go to its `images/val`. num_images: columns.
    """

    changes_training = False

    def __init__(self, folder: str | Path, num_images: int = 6) -> None:
        super().__init__()
        self.folder, self.num_images = Path(folder) / "images" / "val", num_images

    def on_validation_end(self, trainer: pl.Trainer, pl_module: AutoencoderKL) -> None:
        """Draw, write and log the sheet."""
        if not pl_module.shown or not trainer.is_global_zero or trainer.sanity_checking:
            return
        originals, outputs = (torch.cat(images)[: self.num_images] for images in zip(*pl_module.shown, strict=True))
        pl_module.shown = []
        labels = ["held-out frames", f"reconstructed, {psnr(outputs, originals).mean():.1f} dB"]
        sheet = contact_sheet([to_uint8(originals), to_uint8(outputs)], labels)
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet.save(self.folder / f"reconstructions_gs-{trainer.global_step:06}.png")
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                picture = np.asarray(sheet)
                logger.experiment.add_image("val/reconstructions", picture, trainer.global_step, dataformats="HWC")


def psnr(output: Tensor, pixels: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], outputs clipped to it: `b c h w`, `b c h w` -> `b`."""
    error = (output.float().clamp(-1, 1) - pixels.float()) / 2
    return -10 * error.square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def _refuse_trainer_options(config: Mapping[str, Any]) -> None:
    trainer = (config.get("lightning") or {}).get("trainer") or {}
    for name, idle, instead in (
        ("gradient_clip_val", (None, 0), "set model.params.gradient_clip, which bounds the norm of its gradient"),
        ("accumulate_grad_batches", (None, 1), "make data.params.batch_size larger"),
    ):
        if trainer.get(name) not in idle:
            raise UserError(
                f"lightning.trainer.{name}: the autoencoder cannot use it, found {trainer[name]}; {instead} instead"
            )


def _reduce_posterior_variance(first_stage: KLFirstStage) -> None:
    """Give a fresh encoder a narrow posterior, so its latents are informative from the first step."""
    last = first_stage.network.quant_conv
    logvar = slice(last.out_channels // 2, None)
    with torch.no_grad():
        last.weight[logvar] *= 0.1
        last.bias[logvar] = START_LOGVAR


def _rise_and_fall(warmup_steps: int, total: float) -> Any:
    def share(step: int) -> float:
        cosine = 0.5 + 0.5 * np.cos(np.pi * min(1.0, step / max(1.0, total)))
        return float(min(1.0, (step + 1) / max(1, warmup_steps)) * (0.02 + 0.98 * cosine))

    return share


def _trained(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
