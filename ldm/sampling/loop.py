"""From noise to video: guidance round the network, one loop over a diffusers scheduler, decoding in pieces.

The schedulers are diffusers'; here they get our betas and parameterization and the settings with which Stable
Diffusion v1 is sampled. Classifier-free guidance is that of Ho & Salimans 2022. Known frames are in `known.py`, clips
longer than the network makes in `stages.py` and `windows.py`. Loading and saving are not here.
"""

from __future__ import annotations

import copy
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
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm.config import nearest
from ldm.diffusion.noise import NoiseFamily
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.sampling.denoisers import Generators, KnownDenoiser, one_for_each

MAX_SIDE = 4096  # pixels of a clip; far beyond what any network here was trained on

Denoiser = Callable[[Tensor, Tensor], Tensor]  # noisy latents b t c h w, timesteps b -> network output b t c h w
Progress = Callable[[int, int], None]  # called with (done, total)


class PLMSScheduler(PNDMScheduler):
    """Pseudo linear multistep sampling (Liu et al. 2022) for every parameterization.

    The method extrapolates predicted noise, so what the network returns is turned into noise first. diffusers' own
    class extrapolates it as it is, which is right for "eps" alone.
    """

    schedule: NoiseSchedule  # on the device of the samples

    def step_plms(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """One step from the network's output at `timestep`, `b ...`; returns what diffusers' class returns."""
        noise = self.schedule.to_noise(model_output, sample, timestep.expand(len(sample)))
        return super().step_plms(noise, timestep, sample, return_dict)


class TrailingDDIMScheduler(DDIMScheduler):
    """DDIM for zero terminal SNR: from the last diffusion step of training down to clean latents (Lin et al. 2023).

    diffusers' own class ends each step a whole number of diffusion steps below, which on a grid that reaches the last
    one is not where the next step begins, unless their number divides that of training.
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
        place = int((self.timesteps == timestep).nonzero())
        alpha, before = self.alphas_cumprod[timestep], self.final_alpha_cumprod
        if place + 1 < len(self.timesteps):
            before = self.alphas_cumprod[self.timesteps[place + 1]]
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


# The last DDIM and PLMS step ends at alphas_cumprod[0], not at 1, and their grid starts at 1: as Stable Diffusion v1.
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


class GuidedDenoiser:
    """A network with its captions and guidance: noisy latents `b t c h w`, timesteps `b` -> output `b t c h w`.

    unet: called as unet(latents, timesteps, context), with `fps` and `known_level` too if it has embeddings of them.
    context: the captions, `b n d`, or one for each frame, `b t n d`. Latents are given to the network in its dtype and
        device; what comes back is float32.
    uncond: what guidance moves away from, `b n d` or `1 n d`, or one for each frame; None for no guidance.
    scale: 1 asks for no guidance either, and costs half as much.
    fps: frames a second of the clip, `b`; a single frame has no rate.
    motion_scale: how far to go from what the network makes of each frame by itself, with `enable_time=False`, to what
        it makes of the clip, and beyond: 1 is the clip. The image part is the worse one of two that make the same
        mistakes, as in Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself"; layers over time
        that have not been trained long move things as if they had been.
    """

    def __init__(
        self,
        unet: Callable[..., Tensor],
        context: Tensor,
        uncond: Tensor | None = None,
        scale: float = 1.0,
        *,
        fps: Tensor | None = None,
        motion_scale: float = 1.0,
    ) -> None:
        self.unet = unet
        self.scale, self.motion_scale = scale, motion_scale
        self.is_guided = uncond is not None and scale != 1
        if self.is_guided:
            if context.ndim > uncond.ndim:
                uncond = rearrange(uncond, "b n d -> b 1 n d")
            context = torch.cat([uncond.to(context).expand_as(context), context])
        self.context = context  # with guidance [without caption, with caption]
        self.fps = fps if getattr(unet, "has_fps_embedding", False) else None
        self.has_known_level = getattr(unet, "has_known_level", False)

    def __call__(self, latents: Tensor, timesteps: Tensor, known_level: Tensor | None = None) -> Tensor:
        """One evaluation; with guidance the batch is [without caption, with caption].

        known_level: diffusion step of the noise on known latents, `b`.
        """
        times = 2 if self.is_guided else 1
        numbers = {}
        if self.fps is not None and latents.shape[1] > 1:
            numbers["fps"] = repeat(self.fps.to(timesteps.device), "b -> (times b)", times=times)
        if self.has_known_level and known_level is not None:
            numbers["known_level"] = repeat(known_level, "b -> (times b)", times=times)
        inputs = latents.to(self.context.dtype)
        output = self.unet(torch.cat([inputs] * times), torch.cat([timesteps] * times), self.context, **numbers)
        *without, with_caption = output.float().chunk(times)
        guided = without[0] + self.scale * (with_caption - without[0]) if without else with_caption
        if self.motion_scale == 1 or latents.shape[1] == 1:
            return guided
        numbers = {} if known_level is None or not self.has_known_level else {"known_level": known_level}
        caption = self.context.chunk(times)[-1]
        of_images = self.unet(inputs, timesteps, caption, enable_time=False, **numbers).float()
        return guided + (self.motion_scale - 1) * (with_caption - of_images)

    def of_frames(self, frames: slice) -> GuidedDenoiser:
        """The same for some frames of the clip, with their captions."""
        if self.context.ndim == 3:
            return self
        part = copy.copy(self)
        part.context = self.context[:, frames]
        return part


def build_scheduler(name: str, schedule: NoiseSchedule) -> SchedulerMixin:
    """The diffusers scheduler called `name` (one of `SAMPLERS`) for the betas and parameterization of `schedule`.

    `schedule` must be on the device where sampling will be. If its last step is noise alone (zero terminal SNR), so is
    the first one of sampling, and the grid goes down from there to clean latents. Raises UserError.
    """
    if name not in _SCHEDULERS:
        raise UserError(f"sampler: expected the name of one, found {name!r}; {nearest(name, SAMPLERS)}")
    cls, settings = _SCHEDULERS[name]
    if schedule.zero_terminal_snr:
        if cls is PLMSScheduler:
            others = ", ".join(sampler for sampler in SAMPLERS if sampler != name)
            raise UserError(
                f"sampler: {name} cannot begin where there is nothing but noise, as this checkpoint's schedule "
                f"(zero_terminal_snr) does; those that can: {others}"
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
    """Lay out the grid of `steps` diffusion steps and return it, noisiest first.

    As many steps as asked for, on the grid of diffusers; where `steps` divides 1000 that is CompVis's grid too, which
    elsewhere has extra steps. Raises UserError for fewer than one step and for as many as training had or more: with
    those the grid leaves the schedule (DDIM, PLMS) or visits a step twice (DPM-Solver, UniPC).
    """
    limit = scheduler.config.num_train_timesteps - 1
    if not 1 <= steps <= limit:
        raise UserError(
            f"steps: expected 1 to {limit}, found {steps}; the grid does not fit into the {limit + 1} diffusion steps "
            "of training"
        )
    scheduler.set_timesteps(steps, device=device)
    if scheduler.config.timestep_spacing == "trailing":
        _lay_out_trailing(scheduler, steps)
    return scheduler.timesteps


def _lay_out_trailing(scheduler: SchedulerMixin, steps: int) -> None:
    """Put exactly `steps` steps where diffusers counts down in floats, which goes below step 0 for some numbers."""
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
    """Unit normal noise `num frames channels h w`, h and w in latent pixels; drawn on the CPU, the same everywhere.

    generator: one for all samples, or one per sample, so that a sample does not depend on the batch it is made in.
        A longer clip from the same seed starts with the noise of the shorter one.
    family: what the noise of frames has in common, as in training; None: nothing.
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
    """Raise UserError unless eta lies in 0 to 1, and is 0 for every sampler but DDIM."""
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

    denoiser: known latents of a `KnownDenoiser` come back as they were given, bit for bit.
    generator: for the noise that DDIM adds between steps when eta > 0; one, or one per sample.
    eta: 0 is deterministic, 1 adds as much noise as DDPM; DDIM only.
    family: what the added noise of frames has in common, as at the start; None: nothing.
    """
    check_eta(scheduler, eta)
    if generator is not None and not isinstance(generator, torch.Generator):
        generator = list(generator)  # diffusers tests for this very type
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
    """Scaled latents of frames `t c h w` -> the frames `chunk` by `chunk`, `t' 3 H W` in [-1, 1], float32, on the CPU.

    Only one chunk of pixels is there at a time, however long the clip. With a `TemporalDecoder` the frames must be
    those of one clip, and come in chunks of other lengths. progress: called with (done, total) frames. Raises UserError
    for a chunk of no frames.
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
    if temporal_decoder is None or len(latents) == 1:  # a picture is no clip
        decoded = map(first_stage.decode, chunks)
    else:
        decoded = temporal_decoder.decode(first_stage.decoder_parts(), chunks)
    done = 0
    for pixels in decoded:
        yield pixels.float().clamp(-1, 1).cpu()
        done += len(pixels)
        if progress:
            progress(done, len(latents))
