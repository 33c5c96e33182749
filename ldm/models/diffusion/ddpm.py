"""Training of the video network on prepared clips: the loss, trained and frozen weights, the optimiser.

Denoising diffusion (Ho et al. 2020) on latents (Rombach et al. 2022); the noise schedule is in `ldm.diffusion`, the
sampler in `ldm.sampling`, weight averages and sample videos in `ldm.callbacks`. Neither the image autoencoder nor the
text encoder is built: clips come as latents and text embeddings.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.checkpoint import encoder_tensors, fill_unet, identity, latent_scale, read_checkpoint
from ldm.checkpoint.names import FIRST_STAGE_PREFIX, TEXT_PREFIX, UNET_PREFIX
from ldm.config import build
from ldm.data.clips import Batch, check_prepared
from ldm.data.stream import num_real
from ldm.diffusion.known_frames import KnownFrameMixture, KnownFrames, fill_unknown
from ldm.diffusion.noise import NoiseFamily, mix_seed
from ldm.diffusion.schedule import NoiseSchedule, checked_gamma
from ldm.errors import UserError
from ldm.modules.posterior import sample_posterior
from ldm.optim import build_optimizer, check_options, with_schedule
from ldm.optim.parameter_groups import ParameterGroups
from ldm.optim.per_weight import WeightByWeight
from ldm.optim.skippable import ClipsByKnownNorm
from ldm.optim.stored_weights import MemorySwitches, StoredWeights
from ldm.sharding import is_sharded, mean_over_processes, num_processes, shard_trained

log = logging.getLogger(__name__)

NUM_BANDS = 4  # of diffusion steps, in which the held-out loss is logged
# Streams of random draws; the next number is the same stream for held-out clips.
CLIP_STREAM, KNOWN_STREAM, STILL_STREAM = 0, 2, 4


class LatentVideoDiffusion(ClipsByKnownNorm, pl.LightningModule):
    """A UNet with temporal layers, trained to denoise latents of clips; groups of its weights are trained or frozen.

    unet_config: target and params of the network.
    first_stage_config, cond_stage_config: of the autoencoder and the text encoder that prepared the clips. They are
        not built; their weights are copied into each checkpoint, so one file is enough to sample.
    learning_rate: of the groups without their own.
    ckpt_path: image weights to start from, any file or folder that `ldm.checkpoint` reads; None: from scratch.
    trainable: group -> True, a learning rate of its own, or False, see `ParameterGroups`; other groups are frozen.
    optimizer: name, weight_decay, betas, library and states_on of `build_optimizer`.
    memory: keys of `MemorySwitches`; None: weights in float32, updated after the backward pass.
    warmup_steps, cooldown_steps: optimiser steps over which the learning rate rises, and the last ones of the run, over
        which it falls to zero.
    timesteps, linear_start, linear_end, parameterization, zero_terminal_snr: of `NoiseSchedule`.
    noise: kind, share and offset of `NoiseFamily`; None: independent noise for each frame.
    min_snr_gamma: of `NoiseSchedule.loss_weight`.
    known_frames: mixture, max_noise and fill of `KnownFrameMixture`, for a network that takes known frames; None: no
        known frames.
    scale_factor: latents = scale_factor * sample of the posterior. None: read from the autoencoder's checkpoint.
    seed: with a clip's position in the stream of samples it fixes every random draw made for that clip.
    config: of the run, saved in checkpoints; filled in by main.py.
    """

    has_static_graph = True  # every step uses the same part of the network for clips
    shares_validation = True  # each process validates a part of the held-out clips

    def __init__(  # noqa: PLR0913, PLR0917 - the keys of the config
        self,
        unet_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        learning_rate: float,
        ckpt_path: str | None = None,
        trainable: Mapping[str, bool | float] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        memory: Mapping[str, Any] | None = None,
        warmup_steps: int = 0,
        cooldown_steps: int = 0,
        timesteps: int = 1000,
        linear_start: float = 0.00085,
        linear_end: float = 0.012,
        parameterization: str = "eps",
        zero_terminal_snr: bool = False,
        noise: Mapping[str, Any] | None = None,
        min_snr_gamma: float | None = None,
        known_frames: Mapping[str, Any] | None = None,
        scale_factor: float | None = 0.18215,
        seed: int = 23,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.unet = build(unet_config, "model.params.unet_config")
        self.schedule = NoiseSchedule(timesteps, linear_start, linear_end, parameterization, zero_terminal_snr)
        self.noise = NoiseFamily.from_config(noise)
        self.min_snr_gamma = checked_gamma(min_snr_gamma, zero_terminal_snr)
        self.mixture = KnownFrameMixture.from_config(known_frames)
        if self.mixture is not None:
            self.mixture.check_network(self.unet, timesteps)
        self.learning_rate = learning_rate
        self.optimizer_options = dict(optimizer or {})
        check_options(self.optimizer_options)
        self.memory = MemorySwitches.of_config(memory)
        self.warmup_steps, self.cooldown_steps = warmup_steps, cooldown_steps
        self.seed = seed
        own_config = {
            "ckpt_path": ckpt_path,
            "unet_config": unet_config,
            "first_stage_config": first_stage_config,
            "cond_stage_config": cond_stage_config,
            "scale_factor": scale_factor,
        }
        self.scale_factor = latent_scale({"model": {"params": own_config}})
        self.config = {"model": {"params": own_config}} if config is None else dict(config)
        self.trainable = {"temporal": True} if trainable is None else trainable
        self.groups = ParameterGroups(self.unet, self.trainable)
        self.groups.freeze_the_rest()
        if ckpt_path is not None:
            fill_unet(self.unet, read_checkpoint(ckpt_path))
        if self.optimizer_options.get("name", "adamw") != "adamw":  # a block of states is contiguous in memory
            for weight in filter(lambda weight: weight.requires_grad, self.unet.parameters()):
                weight.data = weight.data.contiguous()
        self.stored_weights = StoredWeights(self.unet, self.memory.weights, self.memory.frozen, seed)
        self._optimizer: torch.optim.Optimizer | None = None
        self._encoder_tensors: dict[str, Tensor] = {}
        self._prepared_as: dict[str, Any] = {}  # saved in the config of checkpoints: the sampler's defaults

    def parameter_summary(self) -> str:
        """One line: frozen and trained groups, their sizes and learning rates."""
        return self.groups.summary(self.learning_rate)

    def setup(self, stage: str) -> None:
        """Check that the clips were prepared with this model's encoders, and load the encoders' weights."""
        if stage != "fit" or self._encoder_tensors:
            return
        trainer = self.trainer
        self.memory.check_run(
            trainer.precision, trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.world_size
        )
        data = trainer.datamodule
        refused = {"image_share: expected 0": bool(getattr(data, "image_share", 0)),
                   "frames: expected at least 2": data.frames == 1}  # fmt: skip
        for expected, is_found in refused.items():
            if is_found and self.groups.is_temporal_only:
                raise UserError(
                    f"data.params.{expected}, since only temporal layers are trained and single frames do not pass "
                    "through them; change it or train other groups too"
                )
        self._encoder_tensors = encoder_tensors(self.config)
        prepared = data.prepared
        self._prepared_as = {"prepare": {"fps": prepared.info.fps, "size": list(prepared.info.size)}}
        check_prepared(
            prepared,
            first_stage=identity(_part(self._encoder_tensors, FIRST_STAGE_PREFIX)),
            text_encoder=identity(_part(self._encoder_tensors, TEXT_PREFIX)),
            scale_factor=self.scale_factor,
            latent_channels=self.unet.out_channels,
            context_dim=self.unet.context_dim,
        )

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        context: Tensor,
        fps: Tensor | None = None,
        known: KnownFrames | None = None,
    ) -> Tensor:
        """The network's prediction: `b t c h w`, `b`, `b n d`, `b` -> `b t c h w`; for images without t."""
        if not self.unet.takes_known_frames:
            return self.unet(noisy, timesteps, context, fps=fps)
        if known is None:
            known = KnownFrames.nothing(noisy)
        fill = "zeros" if self.mixture is None else self.mixture.fill
        inputs = torch.cat([noisy, known.mask, fill_unknown(known.latents, known.mask, fill)], dim=-3)
        return self.unet(inputs, timesteps, context, fps=fps, known_level=known.level)

    def error(
        self,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        context: Tensor,
        fps: Tensor | None = None,
        known: KnownFrames | None = None,
    ) -> Tensor:
        """Mean squared error of each clip's prediction (DDPM eq. 14) where latents are not known.

        `b t c h w`, `b t c h w`, `b`, `b n d`, `b` -> `b`; for images without t. Known latents have the noise of the
        step in the network's input, as in sampling.
        """
        shown = clean if known is None else torch.where(known.mask.bool(), clean, known.latents)
        noisy = self.schedule.add_noise(shown, noise, timesteps)
        target = self.schedule.target(clean, noise, timesteps)
        error = (self(noisy, timesteps, context, fps, known).float() - target).square()
        if known is None:
            return error.flatten(1).mean(dim=1)
        return (error * known.mask).flatten(1).sum(dim=1) / known.mask.expand_as(error).flatten(1).sum(dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the batch's samples: clips, or as many single frames as a clip has."""
        errors, timesteps = self.batch_errors(batch)
        loss = self.weighted_sum(errors, timesteps)
        self.log("train/loss", mean_over_processes(loss), prog_bar=True, batch_size=len(batch))
        return loss

    def weighted_sum(self, errors: Tensor, timesteps: Tensor) -> Tensor:
        """The loss of errors `b` at diffusion steps `b`, with the weights of `min_snr_gamma`."""
        return (errors * self.schedule.loss_weight(timesteps, self.min_snr_gamma)).sum()

    def batch_errors(
        self, batch: Batch, first: int = 0, after: int | None = None, held_out: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Errors of the clips and of the single frames, whose sum is the mean over samples, and their diffusion steps.

        Diffusion steps are drawn from `first` to `after` - 1, with separate streams for `held_out` clips.
        """
        errors, timesteps = [], []
        if len(batch.moments):
            drawn = self.draw(batch, first, after, CLIP_STREAM + held_out)
            is_clip = drawn[0].shape[1] > 1  # single frames have no known frames
            known = self.draw_known(batch, drawn[0], KNOWN_STREAM + held_out) if is_clip else None
            errors.append(self.error(*drawn, batch.context.float(), batch.fps, known) / len(batch))
            timesteps.append(drawn[2])
        if batch.stills is not None:
            clean, noise, steps = self.draw(batch.stills, first, after, STILL_STREAM + held_out)
            num_samples = len(batch) - len(batch.moments)
            weight = num_samples / len(steps) / len(batch)
            errors.append(weight * self.error(clean[:, 0], noise[:, 0], steps, batch.stills.context.float()))
            timesteps.append(steps)
        return torch.cat(errors), torch.cat(timesteps)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the held-out loss in bands of diffusion steps and its mean, with the same draws every time.

        Also as velocity errors, which compare runs with different predictions and loss weights.
        """
        edges = [self.schedule.num_timesteps * band // NUM_BANDS for band in range(NUM_BANDS + 1)]
        means = {"loss": [], "velocity_error": []}
        # Lightning averages both sums over processes; the sum of sizes is a whole number.
        options = {"sync_dist": num_processes() > 1, "batch_size": num_real(batch.positions) * num_processes()}
        for first, after in pairwise(edges):
            errors, timesteps = self.batch_errors(batch, first, after, held_out=True)
            means["loss"].append(self.weighted_sum(errors, timesteps))
            means["velocity_error"].append((errors * self.schedule.velocity_factor(timesteps)).sum())
            for name, values in means.items():
                self.log(f"val/{name}_t{first:03d}-{after - 1:03d}", values[-1], **options)
        self.log("val/loss", torch.stack(means["loss"]).mean(), prog_bar=True, **options)
        self.log("val/velocity_error", torch.stack(means["velocity_error"]).mean(), **options)

    def draw(
        self, batch: Batch, first: int = 0, after: int | None = None, stream: int = CLIP_STREAM
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled latents `b t c h w`, noise of that shape, and diffusion steps `b` in `first` to `after` - 1.

        Each clip has its own generator, seeded by the run's seed, the clip's position and the stream, so its draws
        depend neither on batching nor on resuming.
        """
        device = batch.moments.device
        after = self.schedule.num_timesteps if after is None else after
        generator = torch.Generator(device)
        clean, noise, timesteps = [], [], []
        for moments, position in zip(batch.moments.float(), batch.positions, strict=True):
            generator.manual_seed(mix_seed(self.seed, stream, position))
            mean = moments.chunk(2, dim=-3)[0]
            sampled = sample_posterior(moments, _normal_like(mean, generator))
            clean.append(self.scale_factor * sampled)
            noise.append(self.noise.draw(*mean.shape, generator))
            timesteps.append(torch.randint(first, after, (), generator=generator, device=device))
        return torch.stack(clean), torch.stack(noise), torch.stack(timesteps)

    def draw_known(self, batch: Batch, clean: Tensor, stream: int = KNOWN_STREAM) -> KnownFrames | None:
        """The known frames of each clip, drawn from the mixture; None without a mixture. `clean`: `b t c h w`."""
        if self.mixture is None:
            return None
        frames, _, h, w = clean.shape[1:]
        on_cpu, on_device = torch.Generator(), torch.Generator(clean.device)
        masks, levels, noise = [], [], []
        for latents, position in zip(clean, batch.positions, strict=True):
            seed = mix_seed(self.seed, stream, position)
            mask, level = self.mixture.draw(frames, h, w, on_cpu.manual_seed(seed))
            masks.append(mask)
            levels.append(level)
            noise.append(_normal_like(latents, on_device.manual_seed(seed)))
        mask = torch.stack(masks).to(clean.device, non_blocking=True)
        level = torch.tensor(levels).to(clean.device, non_blocking=True)
        return KnownFrames(mask, self.schedule.with_level(clean, torch.stack(noise), level), level)

    def configure_model(self) -> None:
        """Shard the trained weights over the processes where the strategy does; the groups then hold the shards."""
        if self.device_mesh is not None and not is_sharded(self.unet):
            blocks = [*self.unet.input_blocks[1:], self.unet.middle_block, *self.unet.output_blocks]
            shard_trained(self.unet, blocks, self.device_mesh["data_parallel"])
            self.groups = ParameterGroups(self.unet, self.trainable)

    def configure_optimizers(self) -> dict[str, Any]:
        if isinstance(self._optimizer, WeightByWeight):
            self._optimizer.close()
        weights = None if self.memory.weights == "float32" else self.stored_weights
        optimizer = self._optimizer = build_optimizer(
            self.groups.for_optimizer(self.learning_rate),
            **self.optimizer_options,
            weights=weights,
            in_backward=self.memory.step_in_backward,
        )
        total = self.trainer.max_steps if self.cooldown_steps else -1
        return with_schedule(optimizer, self.warmup_steps, self.cooldown_steps, total)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the weights under CompVis's names, and beside them the schedule, both encoders and the config.

        Split weights are written as float32 values, others as they are stored.
        """
        ours = self.stored_weights.join_state(checkpoint["state_dict"], "unet.")
        checkpoint["state_dict"] = (
            self.schedule.compvis_buffers()
            | {re.sub(r"^unet\.", UNET_PREFIX, name): tensor for name, tensor in ours.items()}
            | self._encoder_tensors
        )
        model = {**self.config["model"]}
        model["params"] = {**model["params"], "scale_factor": self.scale_factor}
        checkpoint["config"] = {**self.config, "model": model, **self._prepared_as}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the names that Lightning expects; drop the tensors of other modules."""
        ours = {
            "unet." + name.removeprefix(UNET_PREFIX) if name.startswith(UNET_PREFIX) else name: tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith((UNET_PREFIX, "model_ema."))
        }
        checkpoint["state_dict"] = self.stored_weights.split_state(ours, "unet.")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _normal_like(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device)
