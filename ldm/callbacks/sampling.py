"""Sampling in the middle of training: with the averaged weights, and a module that is left as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.callbacks.average import WeightAverage
from ldm.checkpoint import load_first_stage_of
from ldm.errors import UserError
from ldm.models.diffusion.known import KnownDenoiser, KnownLatents
from ldm.models.diffusion.sampling import GuidedDenoiser, build_scheduler, decode_video, sample, set_steps
from ldm.video import to_uint8


@dataclass(frozen=True)
class Recipe:
    """How a callback samples: sampler and steps of the loop, scale of guidance, as in scripts/txt2vid.py."""

    sampler: str
    steps: int
    scale: float

    def check(self, pl_module: pl.LightningModule, callback: str) -> None:
        """Raise UserError where a module makes no videos or the sampler cannot do what it should."""
        for name in ("unet", "schedule", "noise", "scale_factor"):
            if not hasattr(pl_module, name):
                raise UserError(
                    f"{callback}: {type(pl_module).__name__} makes no videos; take the callback out of its config"
                )
        set_steps(build_scheduler(self.sampler, pl_module.schedule), self.steps)


@contextmanager
def averaged(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """While this lasts the network is in evaluation mode and has its averaged weights, where they are kept."""
    averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)]
    was_training = pl_module.unet.training
    pl_module.unet.eval()
    try:
        with averages[0].applied(pl_module) if averages else nullcontext():
            yield
    finally:
        pl_module.unet.train(was_training)


@torch.no_grad()
def sample_latents(
    trainer: pl.Trainer, pl_module: pl.LightningModule, recipe: Recipe, noise: Tensor, context: Tensor, fps: float
) -> Tensor:
    """Scaled latents `b t c h w` from noise of that shape, captions `b n d` and frames a second; nothing is known."""
    place = {"device": pl_module.device, "dtype": next(pl_module.unet.parameters()).dtype}
    noise = noise.to(pl_module.device)
    uncond = torch.from_numpy(np.array(trainer.datamodule.prepared.empty_context))[None]
    rates = torch.full([len(noise)], fps)
    denoiser = GuidedDenoiser(pl_module.unet, context.to(**place), uncond.to(**place), recipe.scale, fps=rates)
    if pl_module.unet.takes_known_frames:
        denoiser = KnownDenoiser(denoiser, pl_module.schedule, KnownLatents.nothing(noise), noise)
    with trainer.precision_plugin.forward_context():
        return sample(denoiser, build_scheduler(recipe.sampler, pl_module.schedule), noise, recipe.steps)


def decode_clips(config: Mapping[str, Any], pl_module: pl.LightningModule, latents: Tensor) -> list[np.ndarray]:
    """Scaled latents `b t c h w` as clips, uint8 `t h w 3`; the image decoder is loaded for it and does not stay."""
    first_stage = load_first_stage_of(config).to(pl_module.device)
    videos = decode_video(first_stage, latents.to(pl_module.device), pl_module.scale_factor, chunk=1)
    del first_stage
    gc.collect()
    if pl_module.device.type == "cuda":
        torch.cuda.empty_cache()
    return [to_uint8(video) for video in videos]
