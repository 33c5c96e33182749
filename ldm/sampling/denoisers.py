"""Denoisers that wrap a network: guidance, known frames, overlapping windows.

Each maps noisy latents `b t c h w` and timesteps `b` to the network's output `b t c h w`. `GuidedDenoiser` calls the
network; `WindowedDenoiser` and `KnownDenoiser` call another denoiser. The loop over diffusion steps is in `loop`.

Known latents enter the network twice, as in training: as extra channels, with unknown frames filled in between
(`ldm.diffusion.known_frames`) and a mask that is 1 where latents are sampled; and in the noisy channels, noised to the
current diffusion step with the clip's own noise. The output at known positions is not used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from ldm.diffusion.known_frames import fill_unknown
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError

Generators = torch.Generator | Sequence[torch.Generator]


class GuidedDenoiser:
    """A network with its captions and classifier-free guidance (Ho & Salimans 2022).

    unet: called as unet(latents, timesteps, context), with `fps` and `known_level` if it has embeddings of them.
    context: captions `b n d`, or one per frame `b t n d`. The network runs in their dtype; the output is float32.
    uncond: the captions that guidance moves away from, `b n d`, `1 n d` or one per frame; None for no guidance.
    scale: 1 is no guidance, at half the cost.
    fps: frames a second of the clip, `b`; not used for a single frame.
    motion_scale: extrapolates from independent frames (`enable_time=False`) to the clip and beyond; 1 is the clip. The
        image part acts as the worse of two models that make the same mistakes (Karras et al. 2024, "Guiding a Diffusion
        Model with a Bad Version of Itself"), which amplifies the motion of briefly trained temporal layers.
    images_only: sample every frame as an independent image: without temporal layers and frame rate.
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
        images_only: bool = False,
    ) -> None:
        self.unet, self.scale, self.motion_scale = unet, scale, motion_scale
        self.is_guided = uncond is not None and scale != 1
        if self.is_guided:
            if context.ndim > uncond.ndim:
                uncond = rearrange(uncond, "b n d -> b 1 n d")
            context = torch.cat([uncond.to(context).expand_as(context), context])
        self.context = context  # with guidance [without caption, with caption]
        self.fps = fps if getattr(unet, "has_fps_embedding", False) and not images_only else None
        self.has_known_level = getattr(unet, "has_known_level", False)
        self.time = {"enable_time": False} if images_only else {}

    def __call__(self, latents: Tensor, timesteps: Tensor, known_level: Tensor | None = None) -> Tensor:
        """Evaluate the network once; with guidance on the batch [without caption, with caption].

        known_level: diffusion step of the noise on known latents, `b`.
        """
        times = 2 if self.is_guided else 1
        conditions = {}
        if self.fps is not None and latents.shape[1] > 1:
            conditions["fps"] = repeat(self.fps.to(timesteps.device), "b -> (times b)", times=times)
        if self.has_known_level and known_level is not None:
            conditions["known_level"] = repeat(known_level, "b -> (times b)", times=times)
        inputs, steps = latents.to(self.context.dtype), torch.cat([timesteps] * times)
        output = self.unet(torch.cat([inputs] * times), steps, self.context, **conditions, **self.time)
        *without, with_caption = output.float().chunk(times)
        guided = without[0] + self.scale * (with_caption - without[0]) if without else with_caption
        if self.motion_scale == 1 or latents.shape[1] == 1:
            return guided
        conditions = {} if known_level is None or not self.has_known_level else {"known_level": known_level}
        caption = self.context.chunk(times)[-1]
        of_images = self.unet(inputs, timesteps, caption, enable_time=False, **conditions).float()
        return guided + (self.motion_scale - 1) * (with_caption - of_images)

    def of_frames(self, frames: slice) -> GuidedDenoiser:
        """The same denoiser for some frames of the clip, with their captions."""
        if self.context.ndim == 3:
            return self
        part = copy.copy(self)
        part.context = self.context[:, frames]
        return part


@dataclass(frozen=True)
class KnownLatents:
    """Latents of which some are known.

    latents: `b t c h w`, clean; not read where the mask is 1.
    mask: `b t 1 h w`, 1 where latents are sampled, 0 where they are known. `1 t ...` applies to a whole batch.
    level: diffusion step of the noise added to known latents, 0 for none: conditioning augmentation (Ho et al. 2021,
        "Cascaded Diffusion Models", section 4).
    """

    latents: Tensor
    mask: Tensor
    level: int = 0

    @classmethod
    def nothing(cls, like: Tensor) -> KnownLatents:
        """No known latents in a clip `b t c h w`."""
        return cls(torch.zeros_like(like), torch.ones_like(like[:, :, :1]))

    @classmethod
    def placed(cls, latents: Tensor, places: Sequence[int], frames: int, mask: Tensor | None = None) -> KnownLatents:
        """Latents `b k c h w` known as the frames `places` of a clip of `frames` frames.

        mask: 1 where they are sampled again, `b k 1 h w`, each size may be 1; None: nowhere.
        """
        b, _, c, h, w = latents.shape
        whole = cls.nothing(latents.new_zeros(b, frames, c, h, w))
        whole.latents[:, list(places)] = latents
        whole.mask[:, list(places)] = 0 if mask is None else mask.to(latents).expand(b, len(places), 1, h, w)
        return whole

    def whole_frames(self) -> list[int]:
        """Indices of the frames that are known in every pixel of every sample."""
        unknown = reduce(self.mask, "b t 1 h w -> t", "max")
        return (unknown == 0).nonzero().flatten().tolist()

    def known_part(self) -> Tensor:
        """The latents, 0 where they are sampled."""
        return torch.where(self.mask == 0, self.latents, 0)

    def restore(self, latents: Tensor) -> Tensor:
        """`b t c h w` with the known latents put back, bit for bit."""
        return torch.where(self.mask == 0, self.latents.to(latents), latents)


class KnownDenoiser:
    """A network that is conditioned on known frames.

    denoiser: called with `b t (2c + 1) h w`, timesteps and the level of the noise on known latents, `b`.
    noise: start noise of the clip, `b t c h w`, with which known latents are noised.
    generator: draws the noise of `known.level` once; one, or one per sample. Not needed at level 0.
    fill: how unknown frames were filled in training, see `ldm.diffusion.known_frames`.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
        schedule: NoiseSchedule,
        known: KnownLatents,
        noise: Tensor,
        generator: Generators | None = None,
        fill: str = "blend",
    ) -> None:
        check_known_level(known.level, schedule)
        self.denoiser, self.schedule, self.known, self.noise = denoiser, schedule, known, noise.float()
        self.is_known = known.mask.to(noise.device) == 0
        latents = known.latents.to(self.noise).expand_as(noise)
        if known.level:
            if generator is None:
                raise TypeError("noise on known latents needs a generator")
            latents = self._noised(latents, generator)
        self.condition = torch.where(self.is_known, latents, 0)
        mask = (~self.is_known).to(self.noise).expand(len(noise), -1, -1, -1, -1)
        self.channels = torch.cat([mask, fill_unknown(self.condition, mask, fill)], dim=2)

    def __call__(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Evaluate with known latents noised to these timesteps, which may be fractional."""
        signal, noise = (rearrange(scale, "b -> b 1 1 1 1") for scale in self.schedule.scales_at(timesteps))
        latents = torch.where(self.is_known, signal * self.condition + noise * self.noise, latents)
        level = torch.full_like(timesteps, self.known.level)
        return self.denoiser(torch.cat([latents, self.channels], dim=2), timesteps, level)

    def _noised(self, latents: Tensor, generator: Generators) -> Tensor:
        drawn = [torch.randn(latents.shape[1:], generator=one) for one in one_for_each(len(latents), generator)]
        levels = torch.full((len(latents),), self.known.level, device=latents.device)
        return self.schedule.with_level(latents, torch.stack(drawn).to(latents), levels)


class WindowedDenoiser:
    """A clip of any length in overlapping windows, for networks without channels for known frames.

    Every diffusion step evaluates all windows and averages them where they overlap (Bar-Tal et al. 2023,
    "MultiDiffusion", over frames instead of pixels). Peak memory is that of one window.

    denoiser_of_window: the denoiser of some frames, such as `GuidedDenoiser.of_frames`, which selects their captions.
    window, overlap: frames per evaluation, and frames that neighbouring windows share.
    """

    def __init__(self, denoiser_of_window: Callable[[slice], Callable[..., Tensor]], window: int, overlap: int) -> None:
        self.denoiser_of_window, self.window, self.overlap = denoiser_of_window, window, overlap

    def __call__(self, latents: Tensor, timesteps: Tensor, *conditions: Tensor) -> Tensor:
        """Evaluate every window; `conditions`, such as the level of known latents, are passed to each unchanged."""
        windows = overlapping_windows(latents.shape[1], self.window, self.overlap)
        if len(windows) == 1:
            return self.denoiser_of_window(windows[0])(latents, timesteps, *conditions)
        total, num = None, torch.zeros(latents.shape[1], 1, 1, 1, device=latents.device)
        for frames in windows:
            output = self.denoiser_of_window(frames)(latents[:, frames], timesteps, *conditions)
            if total is None:
                total = output.new_zeros(latents.shape[0], latents.shape[1], *output.shape[2:])
            total[:, frames] += output
            num[frames] += 1
        return total / num


def overlapping_windows(frames: int, window: int, overlap: int) -> list[slice]:
    """Windows of `window` frames, each `window - overlap` after the last; the final one ends with the clip.

    A clip that fits is one window. Raises UserError as `check_overlap` does.
    """
    if frames <= window:
        return [slice(0, frames)]
    check_overlap(window, overlap)
    starts = [*range(0, frames - window, window - overlap), frames - window]
    return [slice(start, start + window) for start in starts]


def one_for_each(num: int, generator: Generators) -> list[torch.Generator]:
    """A generator for each of `num` samples: one shared by all, or one per sample, independent of the batch."""
    generators = [generator] * num if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != num:
        raise UserError(f"generator: expected one, or one for each of the {num} samples, found {len(generators)}")
    return generators


def check_known_level(level: int, schedule: NoiseSchedule) -> None:
    """Raise UserError unless `level` is a diffusion step, or 0 for no noise."""
    if not 0 <= level < schedule.num_timesteps:
        raise UserError(
            f"noise on known frames: expected a diffusion step from 0 (none) to {schedule.num_timesteps - 1}, found "
            f"{level}"
        )


def check_takes_known_frames(takes_known_frames: bool, option: str) -> None:
    """Raise UserError for a network that cannot be conditioned on what `option` gives."""
    if not takes_known_frames:
        raise UserError(
            f"{option}: expected a network that takes known frames, found one without channels for them; use a "
            "checkpoint trained with model.params.known_frames and in_channels 9 in model.params.unet_config.params. "
            "From prompts alone, every checkpoint makes long clips in overlapping windows"
        )


def check_overlap(window: int, overlap: int) -> None:
    """Raise UserError unless neighbouring windows of `window` frames can share `overlap` of them."""
    if window < 2:
        raise UserError(f"window: expected at least 2 frames to sample together, found {window}")
    if not 1 <= overlap < window:
        raise UserError(
            f"overlap: expected 1 to {window - 1} frames, fewer than the {window} of a window, found {overlap}"
        )
