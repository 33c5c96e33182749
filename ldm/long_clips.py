"""One network and clips of any length: which way they are made, and the making.

Networks that take known frames go stage by stage (`stages`), any other makes a clip that is longer than its window in
overlapping ones (`windows`). Nothing here knows files, prompts or pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.clip_settings import ClipSettings, Training
from ldm.models.diffusion.known import KnownDenoiser, KnownLatents
from ldm.models.diffusion.noise import NoiseFamily
from ldm.models.diffusion.sampling import GuidedDenoiser, build_scheduler, initial_noise, sample
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.models.diffusion.stages import Plan, WindowTask, count_levels, plan_interpolation, plan_stages, sample_plan
from ldm.models.diffusion.windows import WindowedDenoiser, overlapping_windows

Progress = Callable[[int, int], None] | None  # called with (done, total)


def plan_clip(
    settings: ClipSettings,
    training: Training,
    takes_known_frames: bool,
    is_told_fps: bool,
    given: Sequence[int] = (),
) -> Plan | None:
    """The stages in which a clip is made; None for one pass, or overlapping windows.

    is_told_fps: whether the network can know that keyframes lie further apart; if not, there are none.
    given: the frames that are wholly known. Raises UserError for what cannot be planned.
    """
    window = settings.window or settings.frames
    if not takes_known_frames:
        overlapping_windows(settings.frames, window, settings.overlap)
        return None
    if settings.interpolate > 1:
        return plan_interpolation(settings.frames, settings.interpolate, window, settings.overlap, given)
    levels = count_levels(settings.fps, training.rates[-1]) if training.rates and is_told_fps else 0
    return plan_stages(settings.frames, window, settings.overlap, levels, given)


def describe_plan(plan: Plan | None, settings: ClipSettings) -> list[str]:
    """The plan in words, a line for each stage."""
    if plan is not None:
        return plan.describe(settings.fps)
    num = len(overlapping_windows(settings.frames, settings.window or settings.frames, settings.overlap))
    windows = "one window" if num == 1 else f"{num} overlapping windows of {settings.window}"
    return [f"{settings.frames} frames at {settings.fps:.3g} fps in {windows}"]


def rates_of(plan: Plan | None, settings: ClipSettings) -> list[float]:
    """The frames a second of all windows, each once."""
    spacings = {1} if plan is None else {stage.spacing for stage in plan.stages}
    return [settings.fps / spacing for spacing in sorted(spacings)]


@dataclass(frozen=True)
class ClipSampler:
    """A network with everything that latents of clips are made from, but the noise.

    context: for numbers of frames, their captions `1 n d`, or one for each frame `1 t n d`, on the network's device.
    uncond: what guidance moves away from, `1 n d`; None for no guidance.
    family: of the noise. generators: one per sample. fill: as the network was trained, see `filling`.
    """

    unet: nn.Module
    schedule: NoiseSchedule
    family: NoiseFamily
    settings: ClipSettings
    context: Callable[[Sequence[int]], Tensor]
    uncond: Tensor | None
    generators: Sequence[torch.Generator]
    fill: str

    def make(self, plan: Plan | None, size: tuple[int, int, int], given: KnownLatents | None, show: Progress) -> Tensor:
        """Scaled latents `b t c h w` of a clip per generator, on the network's device.

        size: c h w of a frame. given: what is known. show: called with (done, total) diffusion steps of all windows.
        """
        device = self.schedule.alphas_cumprod.device

        def draw(frames: int) -> Tensor:
            return initial_noise(len(self.generators), frames, *size, self.generators, self.family)

        if plan is not None:
            return sample_plan(plan, self._make_window, draw, given, self.settings.known_noise, device, show)
        frames, window = self.settings.frames, self.settings.window or self.settings.frames
        if frames <= window:
            denoiser = self._denoiser(range(frames), self.settings.fps)
        else:
            denoiser = WindowedDenoiser(
                lambda part: self._denoiser(range(frames)[part], self.settings.fps), window, self.settings.overlap
            )
        return self._sample(denoiser, draw(frames).to(device), show)

    def _make_window(self, task: WindowTask) -> Tensor:
        denoiser = self._denoiser(task.frames, self.settings.fps / task.spacing)
        known = KnownDenoiser(denoiser, self.schedule, task.known, task.noise, self.generators, self.fill)
        return self._sample(known, task.noise, task.progress)

    def _denoiser(self, frames: Sequence[int], fps: float) -> GuidedDenoiser:
        num = len(self.generators)
        context = self.context(frames)
        context = context.expand(num, *context.shape[1:])
        rates = torch.full((num,), fps, device=context.device)
        scales = {"scale": self.settings.scale, "motion_scale": self.settings.motion_scale}
        return GuidedDenoiser(self.unet, context, self.uncond, fps=rates, **scales)

    def _sample(self, denoiser: Callable[[Tensor, Tensor], Tensor], noise: Tensor, show: Progress) -> Tensor:
        scheduler = build_scheduler(self.settings.sampler, self.schedule)
        return sample(
            denoiser, scheduler, noise, self.settings.steps, self.generators, show, self.settings.eta, self.family
        )
