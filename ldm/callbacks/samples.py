"""Sample videos while training: at step 0, where the image model alone is visible, and at regular steps."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from ldm.callbacks.average import WeightAverage
from ldm.callbacks.steps import StepLogger
from ldm.checkpoint import load_first_stage_of, load_text_encoder_of
from ldm.errors import UserError
from ldm.files import replacing
from ldm.sampling.denoisers import GuidedDenoiser, KnownDenoiser, KnownLatents
from ldm.sampling.loop import build_scheduler, decode_video, initial_noise, sample, set_steps
from ldm.sharding import is_sharded
from ldm.video import contact_sheet, to_uint8, write_gif


@dataclass(frozen=True)
class Recipe:
    """Sampler, steps and guidance scale of a callback, as in scripts/txt2vid.py."""

    sampler: str
    steps: int
    scale: float

    def check(self, pl_module: pl.LightningModule, callback: str) -> None:
        """Raise UserError for a module that generates no videos and for settings that the sampler does not support."""
        for name in ("unet", "schedule", "noise", "scale_factor"):
            if not hasattr(pl_module, name):
                raise UserError(
                    f"{callback}: {type(pl_module).__name__} generates no videos; remove the callback from its config"
                )
        set_steps(build_scheduler(self.sampler, pl_module.schedule), self.steps)


@contextmanager
def averaged(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Put the network into evaluation mode, with its averaged weights if there are any, within the context."""
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
    """Scaled latents `b t c h w` from noise of that shape, captions `b n d` and fps; no frames are known."""
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
    """Scaled latents `b t c h w` as clips, uint8 `t h w 3`; the image decoder is loaded and released."""
    first_stage = load_first_stage_of(config).to(pl_module.device)
    videos = decode_video(first_stage, latents.to(pl_module.device), pl_module.scale_factor, chunk=1)
    del first_stage
    gc.collect()
    if pl_module.device.type == "cuda":
        torch.cuda.empty_cache()
    return [to_uint8(video) for video in videos]


log = logging.getLogger(__name__)


class VideoLogger(StepLogger):
    """Samples one video per prompt with the averaged weights, if there are any, always from the same noise.

    Writes a GIF per prompt and a contact sheet into the run's `images/samples`, and the GIFs to TensorBoard. The text
    encoder is loaded once for the prompts, the image decoder for each set of samples; both are released.

    Args:
        config, folder: of the run; filled in by main.py.
        prompts: what to sample.
        every_n_steps: optimiser steps between samples.
        at_start: also before the first step.
        frames: frames per video; None: as in training.
        steps, sampler, scale: of the sampling loop, as in scripts/txt2vid.py.
        seed: of the noise.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the keys of the config
        self,
        config: Mapping[str, Any],
        folder: str,
        prompts: str | Sequence[str],
        every_n_steps: int = 1000,
        at_start: bool = True,
        frames: int | None = None,
        steps: int = 25,
        sampler: str = "ddim",
        scale: float = 7.5,
        seed: int = 23,
    ) -> None:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or every_n_steps < 1 or (frames is not None and frames < 1):
            raise UserError(
                "VideoLogger: expected at least one prompt, every_n_steps and frames of at least 1, found "
                f"{len(prompts)} prompts, every_n_steps {every_n_steps}, frames {frames}"
            )
        self.config, self.folder, self.prompts = config, Path(folder) / "images" / "samples", prompts
        self.every_n_steps, self.at_start, self.frames = every_n_steps, at_start, frames
        self.recipe, self.seed = Recipe(sampler, steps, scale), seed
        self._context: Tensor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Encode the prompts and check the sampler's settings, before the first step."""
        self.recipe.check(pl_module, "VideoLogger")
        if trainer.is_global_zero:
            text_encoder = load_text_encoder_of(self.config)
            for prompt in self.prompts:
                if lost := text_encoder.truncated(prompt):
                    log.warning("the prompt '%.40s...' is longer than the text encoder holds; cut: '%s'", prompt, lost)
            with torch.no_grad():
                self._context = text_encoder.encode(self.prompts).cpu()
        if is_sharded(pl_module.unet):
            self._context = trainer.strategy.broadcast(self._context)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.at_start and trainer.global_step == 0:
            self._log_videos(trainer, pl_module, batch_idx=0)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._log_videos(trainer, pl_module, batch_idx)

    def _log_videos(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            if is_sharded(pl_module.unet):
                self._sample_latents(trainer, pl_module)
            return
        videos, fps = self.sample(trainer, pl_module)
        name = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, frames in enumerate(videos):
            path = self.folder / f"{index:02}_{name}.gif"
            write_gif(path, frames, fps)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    _add_gif(logger, f"samples/{index:02}", path.read_bytes(), frames.shape[1:3], trainer.global_step)
        sheet = self.folder / f"sheet_{name}.png"
        with replacing(sheet) as partial:
            contact_sheet(videos, self.prompts).save(partial, format="PNG")
        log.info("sample videos at step %d: %s", trainer.global_step, sheet)

    def sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[list[np.ndarray], float]:
        """A video per prompt, uint8 `t h w 3`, and their frame rate; the module is left unchanged."""
        latents, fps = self._sample_latents(trainer, pl_module)
        return decode_clips(self.config, pl_module, latents), fps

    def _sample_latents(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[Tensor, float]:
        """`b t c h w` and their frame rate; all processes are needed where weights are divided among them."""
        clips = trainer.datamodule.train_clips
        info, fps = clips.prepared.info, clips.prepared.info.fps / min(clips.strides)
        shape = (1, self.frames or clips.frames, info.latent_channels, *info.moments_shape[1:])
        latents = []
        with averaged(trainer, pl_module):
            for index, context in enumerate(self._context.split(1)):
                noise = initial_noise(*shape, torch.Generator().manual_seed(self.seed + index), pl_module.noise)
                latents.append(sample_latents(trainer, pl_module, self.recipe, noise, context, fps))
        return torch.cat(latents), fps


def _add_gif(logger: TensorBoardLogger, tag: str, gif: bytes, size: tuple[int, int], step: int) -> None:
    """Log a GIF as an image summary, which TensorBoard plays; its `add_video` would encode it again."""
    image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=gif)
    writer = logger.experiment._get_file_writer()
    writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
