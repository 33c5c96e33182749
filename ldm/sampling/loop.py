"""From noise to video: samplers, one loop over diffusion steps, decoding in chunks.

Samplers are diffusers schedulers with our betas and parameterization and the settings of Stable Diffusion v1. Another
diffusers scheduler is one entry of `_SCHEDULERS`; any other sampler is a class with `set_timesteps`, `step`,
`scale_model_input` and `init_noise_sigma` beside that entry. Guidance, known frames and windows are in `denoisers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from torch import Tensor, nn

from ldm.config import nearest
from ldm.diffusion.noise import NoiseFamily
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.sampling.denoisers import Generators, KnownDenoiser, one_for_each

MAX_SIDE = 4096  # pixels of a clip, far above any training size

Denoiser = Callable[[Tensor, Tensor], Tensor]  # noisy latents b t c h w, timesteps b -> network output b t c h w
Progress = Callable[[int, int], None]  # called with (done, total)


class PLMSScheduler(PNDMScheduler):
    """Pseudo linear multistep sampling (Liu et al. 2022) for every parameterization.

    The method extrapolates predicted noise, so the network's output is converted to noise first; diffusers' class
    extrapolates the output itself, which is correct only for "eps".
    """

    schedule: NoiseSchedule  # on the device of the samples

    def step_plms(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """One step from the network's output at `timestep`, `b ...`; returns what diffusers' class returns."""
        noise = self.schedule.to_noise(model_output, sample, timestep.expand(len(sample)))
        return super().step_plms(noise, timestep, sample, return_dict)


class TrailingDDIMScheduler(DDIMScheduler):
    """DDIM for zero terminal SNR: from the last diffusion step of training down to clean latents (Lin et al. 2023).

    diffusers' class ends a step a fixed number of diffusion steps lower. On a trailing grid the next step begins
    there only if the number of steps divides that of training.
    """

    schedule: NoiseSchedule  # on the device of the samples

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: Generators | None = None,
        variance_noise: Tensor | None = None,
    ) -> DDIMSchedulerOutput:
        """One step from the network's output at `timestep`, `b ...` (Song et al. 2021, "DDIM", eq. 12 and 16)."""
        index = int((self.timesteps == timestep).nonzero())
        alpha, before = self.alphas_cumprod[timestep], self.final_alpha_cumprod
        if index + 1 < len(self.timesteps):
            before = self.alphas_cumprod[self.timesteps[index + 1]]
        clean = model_output
        if self.schedule.parameterization == "v":
            clean = alpha.sqrt() * sample - (1 - alpha).sqrt() * model_output
        noise = self.schedule.to_noise(model_output, sample, timestep.expand(len(sample)))
        sigma = eta * ((1 - before) / (1 - alpha) * (1 - alpha / before)).sqrt()
        sample = before.sqrt() * clean + (1 - before - sigma**2).sqrt() * noise
        if eta:
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            sample = sample + sigma * variance_noise
        return DDIMSchedulerOutput(sample, clean)


# As in Stable Diffusion v1, the last DDIM and PLMS step ends at alphas_cumprod[0], not at 1, and the grid starts at 1.
_COMPVIS_GRID = {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
_SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, **_COMPVIS_GRID}),
    "plms": (PLMSScheduler, {"skip_prk_steps": True, **_COMPVIS_GRID}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "timestep_spacing": "linspace"}),
    "unipc": (UniPCMultistepScheduler, {"timestep_spacing": "linspace"}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
}
SAMPLERS = tuple(_SCHEDULERS)
_PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def build_scheduler(name: str, schedule: NoiseSchedule) -> SchedulerMixin:
    """The diffusers scheduler `name` (one of `SAMPLERS`) with the betas and parameterization of `schedule`.

    `schedule` must be on the device of the samples. With zero terminal SNR the grid starts at its last step, which is
    pure noise. Raises UserError.
    """
    if name not in _SCHEDULERS:
        raise UserError(f"sampler: expected a sampler's name, found {name!r}; {nearest(name, SAMPLERS)}")
    cls, settings = _SCHEDULERS[name]
    if schedule.zero_terminal_snr:
        if cls is PLMSScheduler:
            others = ", ".join(sampler for sampler in SAMPLERS if sampler != name)
            raise UserError(
                f"sampler: expected one that can start from pure noise, as this checkpoint's schedule "
                f"(zero_terminal_snr) does, found {name}; use one of {others}"
            )
        settings = {**settings, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
        if cls is DDIMScheduler:
            cls, settings = TrailingDDIMScheduler, {**settings, "set_alpha_to_one": True}
    if cls is not PLMSScheduler:
        settings = {**settings, "prediction_type": _PREDICTION_TYPES[schedule.parameterization]}
    betas = schedule.betas64().tolist()
    scheduler = cls(num_train_timesteps=schedule.num_timesteps, trained_betas=betas, **settings)
    if isinstance(scheduler, PLMSScheduler | TrailingDDIMScheduler):
        scheduler.schedule = schedule
    return scheduler


def set_steps(scheduler: SchedulerMixin, steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Set the grid of exactly `steps` diffusion steps and return it, noisiest first.

    Equal to CompVis's grid where `steps` divides 1000; elsewhere CompVis adds steps. Raises UserError for fewer than
    one step and for as many as in training: that grid leaves the schedule (DDIM, PLMS) or repeats a step (DPM-Solver,
    UniPC).
    """
    limit = scheduler.config.num_train_timesteps - 1
    if not 1 <= steps <= limit:
        raise UserError(
            f"steps: expected 1 to {limit}, found {steps}; the grid does not fit into the {limit + 1} diffusion steps "
            "of training"
        )
    scheduler.set_timesteps(steps, device=device)
    if scheduler.config.timestep_spacing == "trailing":
        _set_trailing(scheduler, steps)
    return scheduler.timesteps


def _set_trailing(scheduler: SchedulerMixin, steps: int) -> None:
    """Exactly `steps` steps; diffusers counts down in floats, which for some numbers goes below step 0."""
    left = torch.arange(steps, 0, -1, dtype=torch.float64)
    grid = (scheduler.config.num_train_timesteps * left / steps).round().long() - 1
    scheduler.timesteps = grid.to(scheduler.timesteps)
    scheduler.num_inference_steps = steps
    if not isinstance(scheduler, DDIMScheduler):
        ratios = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
        scheduler.sigmas = torch.cat([ratios[grid].to(scheduler.sigmas), scheduler.sigmas[-1:]])


def initial_noise(
    num: int, frames: int, channels: int, h: int, w: int, generator: Generators, family: NoiseFamily | None = None
) -> Tensor:
    """Unit normal noise `num frames channels h w`, h and w in latent pixels; drawn on the CPU, equal on all devices.

    generator: one for all samples, or one per sample, which makes a sample independent of its batch. A longer clip
        from the same seed starts with the noise of the shorter one.
    family: correlation of the frames' noise, as in training; None: independent.
    """
    if frames < 1:
        raise UserError(f"frames: expected at least 1, found {frames}")
    family = NoiseFamily() if family is None else family
    return torch.stack([family.draw(frames, channels, h, w, one) for one in one_for_each(num, generator)])


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise UserError unless height and width are multiples of `multiple` pixels (SD: 64), `MAX_SIDE` at most."""
    for name, size in (("height", height), ("width", width)):
        if size > MAX_SIDE:
            raise UserError(f"{name}: expected at most {MAX_SIDE} pixels, found {size}")
        if size < multiple or size % multiple:
            near = max(multiple, round(size / multiple) * multiple)
            raise UserError(f"{name}: expected a multiple of {multiple} pixels, found {size}; the nearest is {near}")


def check_eta(scheduler: SchedulerMixin, eta: float) -> None:
    """Raise UserError unless eta is in 0 to 1, and 0 for every sampler but DDIM."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta: expected 0 to 1, found {eta:g}")
    if eta and not isinstance(scheduler, DDIMScheduler):
        raise UserError(f"eta: only the sampler ddim adds noise between steps, found eta {eta:g} with another sampler")


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    scheduler: SchedulerMixin,
    noise: Tensor,
    steps: int,
    generator: Generators | None = None,
    progress: Progress | None = None,
    eta: float = 0.0,
    family: NoiseFamily | None = None,
) -> Tensor:
    """Turn unit noise `b t c h w` into scaled latents of the same shape and device, float32.

    denoiser: the known latents of a `KnownDenoiser` are returned bit for bit.
    generator: for the noise that DDIM adds between steps when eta > 0; one, or one per sample.
    eta: 0 is deterministic, 1 adds as much noise as DDPM; DDIM only.
    family: correlation of the added noise, as at the start; None: independent.
    """
    check_eta(scheduler, eta)
    if generator is not None and not isinstance(generator, torch.Generator):
        generator = list(generator)  # the type that diffusers expects
    extra = {"eta": eta, "generator": generator} if isinstance(scheduler, DDIMScheduler) else {}
    timesteps = set_steps(scheduler, steps, noise.device)
    latents = noise.float() * scheduler.init_noise_sigma
    for index, timestep in enumerate(timesteps):
        noisy = scheduler.scale_model_input(latents, timestep)
        output = denoiser(noisy, timestep.expand(len(noise)))
        if eta and family is not None:
            extra = {"eta": eta, "variance_noise": initial_noise(*noise.shape, generator, family).to(output)}
        latents = scheduler.step(output, timestep, latents, **extra).prev_sample
        if progress:
            progress(index + 1, len(timesteps))
    return denoiser.known.restore(latents) if isinstance(denoiser, KnownDenoiser) else latents


def decode_video(
    first_stage: nn.Module, latents: Tensor, scale_factor: float, chunk: int = 4, progress: Progress | None = None
) -> Tensor:
    """Scaled latents `b t c h w` -> video `b t 3 H W` in [-1, 1], float32, on the CPU.

    chunk: frames decoded at a time; fewer need less memory.
    progress: called after every chunk.
    """
    frames = rearrange(latents, "b t c h w -> (b t) c h w")
    decoded = torch.cat(list(decode_chunks(first_stage, frames, scale_factor, chunk, progress)))
    return rearrange(decoded, "(b t) c h w -> b t c h w", b=len(latents))


def decode_chunks(
    first_stage: nn.Module,
    latents: Tensor,
    scale_factor: float,
    chunk: int = 4,
    progress: Progress | None = None,
    temporal_decoder: nn.Module | None = None,
) -> Iterator[Tensor]:
    """Scaled latents of frames `t c h w` -> chunks of `chunk` frames, `t' 3 H W` in [-1, 1], float32, on the CPU.

    Holds one chunk of pixels at a time. A `TemporalDecoder` needs the frames of one clip and yields chunks of other
    lengths. progress: called with (done, total) frames. Raises UserError for a chunk of no frames.
    """
    if chunk < 1:
        raise UserError(f"decode chunk: expected at least 1 frame, found {chunk}")
    return _decode_chunks(first_stage, latents, scale_factor, chunk, progress, temporal_decoder)


@torch.no_grad()
def _decode_chunks(
    first_stage: nn.Module,
    latents: Tensor,
    scale_factor: float,
    chunk: int,
    progress: Progress | None,
    temporal_decoder: nn.Module | None,
) -> Iterator[Tensor]:
    chunks = (part / scale_factor for part in latents.split(chunk))
    if temporal_decoder is None or len(latents) == 1:  # an image
        decoded = map(first_stage.decode, chunks)
    else:
        decoded = temporal_decoder.decode(first_stage.decoder_parts(), chunks)
    done = 0
    for pixels in decoded:
        yield pixels.float().clamp(-1, 1).cpu()
        done += len(pixels)
        if progress:
            progress(done, len(latents))
