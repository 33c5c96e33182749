"""Training of the video network on prepared clips: the loss, what is trained and what is frozen, the optimiser.

Denoising diffusion (Ho et al. 2020) on latents (Rombach et al. 2022); the schedule is in `schedule`, the sampler in
`sampling`, the averaging of weights and the sample videos in `ldm.callbacks`. Neither the image autoencoder nor the
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
from ldm.diffusion.known_frames import KnownFrameMixture, KnownLatents, fill_unknown
from ldm.diffusion.noise import NoiseFamily, mix_seed
from ldm.diffusion.schedule import NoiseSchedule, checked_gamma
from ldm.errors import UserError
from ldm.modules.posterior import sample_posterior
from ldm.optim import build_optimizer, check_options, rate_schedule
from ldm.optim.parameter_groups import ParameterGroups
from ldm.optim.per_weight import WeightByWeight
from ldm.optim.skippable import ClipsByKnownNorm
from ldm.optim.stored_weights import MemorySwitches, StoredWeights
from ldm.sharding import is_sharded, mean_over_processes, num_processes, shard_trained

log = logging.getLogger(__name__)

NUM_BANDS = 4  # the held-out loss is taken apart by how much noise there is
# Streams of random draws, each with a second one, the next number, for held-out clips.
CLIP_STREAM, KNOWN_STREAM, STILL_STREAM = 0, 2, 4


class LatentVideoDiffusion(ClipsByKnownNorm, pl.LightningModule):
    """A UNet with time in it, trained to denoise latents of clips while chosen groups of its weights stay frozen.

    unet_config: target and params of the network.
    first_stage_config, cond_stage_config: of the autoencoder and the text encoder that prepared the clips. They are
        not built here; their weights are copied into each checkpoint, so that one file is enough to sample.
    learning_rate: of the groups that name none of their own.
    ckpt_path: image weights to start from, any file or folder that `ldm.checkpoint` reads; None: from scratch.
    trainable: group -> True, or a learning rate of its own, or False; a group that is not named is frozen. Groups are
        `temporal`, `spatial_attention`, `time_embed`, `convolutions`, or the beginning of a parameter's name.
    optimizer: name, weight_decay, betas, library and states_on of `build_optimizer`.
    memory: `MemorySwitches`, how weights are stored and when updated; None: in float32, after the backward pass.
    warmup_steps, cooldown_steps: optimiser steps over which the learning rate rises, and the last ones of the run, over
        which it falls to zero.
    timesteps, linear_start, linear_end, parameterization, zero_terminal_snr: of `NoiseSchedule`.
    noise: kind, share and offset of `NoiseFamily`; None: every frame has noise of its own.
    min_snr_gamma: of `NoiseSchedule.loss_weight`.
    known_frames: mixture, max_noise and fill of `KnownFrameMixture`, for a network that takes known frames; None:
        nothing is ever known.
    scale_factor: latents = scale_factor * sample of the posterior. None: the one measured with the autoencoder, from
        its checkpoint.
    seed: with a clip's position in the stream of samples it fixes every random draw made for that clip.
    config: the whole config of the run, kept in checkpoints; filled in by main.py.
    """

    has_static_graph = True  # clips take the same way through the network in every step
    shares_validation = True  # each process sees a part of what is held out

    def __init__(  # noqa: PLR0913, PLR0917 - the words of the config
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
        if self.optimizer_options.get("name", "adamw") != "adamw":  # blocks of states are neighbours in memory
            for weight in filter(lambda weight: weight.requires_grad, self.unet.parameters()):
                weight.data = weight.data.contiguous()
        self.stored_weights = StoredWeights(self.unet, self.memory.weights, self.memory.frozen, seed)
        self._optimizer: torch.optim.Optimizer | None = None
        self._encoder_tensors: dict[str, Tensor] = {}
        self._prepared_as: dict[str, Any] = {}  # goes into the config of checkpoints: what the sampler takes as default

    def parameter_summary(self) -> str:
        """One line: what is frozen, what is trained, how many parameters of each and at which learning rate."""
        return self.groups.summary(self.learning_rate)

    def setup(self, stage: str) -> None:
        """Check that the clips were prepared with this model's encoders, and find the encoders' weights."""
        if stage != "fit" or self._encoder_tensors:
            return
        trainer = self.trainer
        self.memory.check_run(
            trainer.precision, trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.world_size
        )
        data = trainer.datamodule
        if getattr(data, "image_share", 0) and self.groups.is_temporal_alone:
            raise UserError(
                "data.params.image_share: expected 0, since nothing but the temporal layers is trained and they do not "
                "take part in single frames; leave it out or train other groups too"
            )
        if data.frames == 1 and self.groups.is_temporal_alone:
            raise UserError(
                "data.params.frames: expected at least 2, since nothing but the temporal layers is trained and they do "
                "not take part in a clip of 1 frame; ask for more frames or train other groups too"
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
        known: KnownLatents | None = None,
    ) -> Tensor:
        """The network's prediction: `b t c h w`, `b`, `b n d`, `b` -> `b t c h w`; or of images, without t."""
        if not self.unet.takes_known_frames:
            return self.unet(noisy, timesteps, context, fps=fps)
        if known is None:
            known = KnownLatents.nothing(noisy)
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
        known: KnownLatents | None = None,
    ) -> Tensor:
        """Squared error of the prediction (DDPM eq. 14) where latents are to be made, its mean for each clip.

        `b t c h w`, `b t c h w`, `b`, `b n d`, `b` -> `b`; or of images, without t. Known latents, too, are shown with
        the noise of the step, as they will be when sampling.
        """
        shown = clean if known is None else torch.where(known.mask.bool(), clean, known.latents)
        noisy = self.schedule.add_noise(shown, noise, timesteps)
        target = self.schedule.target(clean, noise, timesteps)
        error = (self(noisy, timesteps, context, fps, known).float() - target).square()
        if known is None:
            return error.flatten(1).mean(dim=1)
        return (error * known.mask).flatten(1).sum(dim=1) / known.mask.expand_as(error).flatten(1).sum(dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch's samples, each a clip or as many single frames as a clip has."""
        errors, timesteps = self.batch_errors(batch)
        loss = (errors * self.schedule.loss_weight(timesteps, self.min_snr_gamma)).sum()
        self.log("train/loss", mean_over_processes(loss), prog_bar=True, batch_size=len(batch))
        return loss

    def batch_errors(
        self, batch: Batch, first: int = 0, after: int | None = None, held_out: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Errors of the clips and of the single frames, whose sum is the mean over samples, and their diffusion steps.

        Diffusion steps are drawn from `first` to `after` - 1, by streams of their own for clips that are `held_out`.
        """
        errors, timesteps = [], []
        if len(batch.moments):
            drawn = self.draw(batch, first, after, CLIP_STREAM + held_out)
            is_clip = drawn[0].shape[1] > 1  # of a single frame nothing is known, as of stills
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
        """Log the held-out loss in bands from little noise to much, at the same draws every time, and their mean.

        And the same as errors of the velocity, whatever is predicted and however errors are weighted, to compare runs.
        """
        edges = [self.schedule.num_timesteps * band // NUM_BANDS for band in range(NUM_BANDS + 1)]
        means = {"loss": [], "velocity_error": []}
        # Lightning takes the mean over processes of both sums, of which that of sizes is a whole number.
        words = {"sync_dist": num_processes() > 1, "batch_size": num_real(batch.positions) * num_processes()}
        for first, after in pairwise(edges):
            errors, timesteps = self.batch_errors(batch, first, after, held_out=True)
            means["loss"].append((errors * self.schedule.loss_weight(timesteps, self.min_snr_gamma)).sum())
            means["velocity_error"].append((errors * self.schedule.velocity_factor(timesteps)).sum())
            for name, values in means.items():
                self.log(f"val/{name}_t{first:03d}-{after - 1:03d}", values[-1], **words)
        self.log("val/loss", torch.stack(means["loss"]).mean(), prog_bar=True, **words)
        self.log("val/velocity_error", torch.stack(means["velocity_error"]).mean(), **words)

    def draw(
        self, batch: Batch, first: int = 0, after: int | None = None, stream: int = CLIP_STREAM
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled latents `b t c h w`, noise of that shape, and diffusion steps `b` in `first` to `after` - 1.

        Each clip's draws come from a generator of its own, seeded by the run's seed, the clip's position and the
        stream, so that they do not depend on how clips are batched, nor on any resume.
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

    def draw_known(self, batch: Batch, clean: Tensor, stream: int = KNOWN_STREAM) -> KnownLatents | None:
        """What of each clip is known, drawn from the mixture; None without a mixture. `clean`: `b t c h w`."""
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
        return KnownLatents(mask, self.schedule.with_level(clean, torch.stack(noise), level), level)

    def configure_model(self) -> None:
        """Divide the trained weights among the processes where the strategy is to; their groups are then of parts."""
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
        schedule = rate_schedule(optimizer, self.warmup_steps, self.cooldown_steps, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the weights under CompVis's names, and beside them the schedule, both encoders and the config.

        Split weights are written as the float32 values they stand for, others as they are stored.
        """
        ours = self.stored_weights.in_full(checkpoint["state_dict"], "unet.")
        checkpoint["state_dict"] = (
            self.schedule.compvis_buffers()
            | {re.sub(r"^unet\.", UNET_PREFIX, name): tensor for name, tensor in ours.items()}
            | self._encoder_tensors
        )
        model = {**self.config["model"]}
        model["params"] = {**model["params"], "scale_factor": self.scale_factor}
        checkpoint["config"] = {**self.config, "model": model, **self._prepared_as}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back the names Lightning knows; leave out what is not this module's."""
        ours = {
            "unet." + name.removeprefix(UNET_PREFIX) if name.startswith(UNET_PREFIX) else name: tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith((UNET_PREFIX, "model_ema."))
        }
        checkpoint["state_dict"] = self.stored_weights.taken_apart(ours, "unet.")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _normal_like(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device)
