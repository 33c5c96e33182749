"""What a video model makes of true clips: their latents, noised a little and denoised again.

A decoder that has only ever seen what the encoder made is at a loss with what a diffusion model makes, whose frames
agree less with each other. Noise of the last few diffusion steps and the way back from there (Meng et al. 2022,
"SDEdit", section 3) give such latents with the picture that belongs to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ldm.checkpoint import load_text_encoder
from ldm.generation import ClipGenerator
from ldm.models.diffusion.known import KnownDenoiser, KnownLatents
from ldm.models.diffusion.sampling import GuidedDenoiser, build_scheduler, set_steps

SAMPLER = "ddim"
KEPT_CAPTIONS = 256


class Remaker:
    """The video model of a `ClipGenerator`, that remakes true clips.

    steps: of a whole way from noise to a clip. most: at most so many of them, the last ones, and at least two are gone
        back: how many is drawn for each clip.
    """

    def __init__(self, source: ClipGenerator, steps: int, most: int) -> None:
        self.source, self.most = source, most
        self.scheduler = build_scheduler(SAMPLER, source.schedule)
        self.timesteps = set_steps(self.scheduler, steps, source.device)
        encoder = load_text_encoder(source.checkpoint).to(source.device)
        self.context = lru_cache(KEPT_CAPTIONS)(lambda caption: encoder.encode([caption]))

    @torch.no_grad()
    def __call__(
        self, latents: Tensor, captions: Sequence[str], rates: Sequence[float], generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Scaled latents of true clips `b t c h w` -> remade ones; what is drawn comes from each clip's generator."""
        source = self.source
        noise = torch.stack([source.noise.draw(*latents.shape[1:], one) for one in generators]).to(latents)
        remade = []
        for clip, own, caption, rate, one in zip(
            latents[:, None], noise[:, None], captions, rates, generators, strict=True
        ):
            back = int(torch.randint(2, self.most + 1, (), generator=one))
            remade.append(self._remake(clip, own, self.context(caption), rate, self.timesteps[-back:]))
        return torch.cat(remade)

    def _remake(self, clip: Tensor, noise: Tensor, context: Tensor, rate: float, timesteps: Tensor) -> Tensor:
        source = self.source
        rates = torch.full((1,), float(rate), device=clip.device)
        denoiser = GuidedDenoiser(source.unet, context, None, fps=rates)
        if source.takes_known_frames:
            denoiser = KnownDenoiser(denoiser, source.schedule, KnownLatents.nothing(clip), noise, fill=source.fill)
        signal, strength = source.schedule.scales_at(timesteps[:1])
        clip = signal * clip + strength * noise
        for timestep in timesteps:
            output = denoiser(clip, timestep.expand(1)).float()
            clip = self.scheduler.step(output, timestep, clip).prev_sample
        return clip
