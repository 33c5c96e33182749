"""Known frames when sampling: what is told to the network, and what comes back untouched.

The network is shown known latents twice: as further channels, with a guess between them (`filling`) and a mask that is
1 where latents are to be made, and in the noisy channels, where they are noised to the diffusion step at hand with the
clip's own noise. Training does the same, in `ddpm`. What the network answers at known places is not used. Known latents
may carry some noise, whose level the network is told: the conditioning augmentation of Ho et al. 2021, "Cascaded
Diffusion Models" (section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor

from ldm.diffusion.known_frames import fill_unknown
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class KnownLatents:
    """Latents of which some are known.

    latents: `b t c h w`, clean; what lies where the mask is 1 is not read.
    mask: `b t 1 h w`, 1 where latents are to be made, 0 where they are known. `1 t ...` holds for a whole batch.
    level: diffusion step of the noise that is put on known latents before the network sees them, 0 for none.
    """

    latents: Tensor
    mask: Tensor
    level: int = 0

    @classmethod
    def nothing(cls, like: Tensor) -> KnownLatents:
        """Nothing is known of a clip `b t c h w`."""
        return cls(torch.zeros_like(like), torch.ones_like(like[:, :, :1]))

    @classmethod
    def placed(cls, latents: Tensor, places: Sequence[int], frames: int, mask: Tensor | None = None) -> KnownLatents:
        """Latents `b k c h w` known as the frames `places` of a clip of `frames` frames.

        mask: 1 where they are to be made anew all the same, `b k 1 h w`; each size may be 1; None: nowhere.
        """
        b, _, c, h, w = latents.shape
        whole = cls.nothing(latents.new_zeros(b, frames, c, h, w))
        whole.latents[:, list(places)] = latents
        whole.mask[:, list(places)] = 0 if mask is None else mask.to(latents).expand(b, len(places), 1, h, w)
        return whole

    def whole_frames(self) -> list[int]:
        """Numbers of the frames of which every pixel is known, in every sample."""
        unknown = reduce(self.mask, "b t 1 h w -> t", "max")
        return (unknown == 0).nonzero().flatten().tolist()

    def known_part(self) -> Tensor:
        """The latents, 0 where they are to be made."""
        return torch.where(self.mask == 0, self.latents, 0)

    def restore(self, latents: Tensor) -> Tensor:
        """`b t c h w` with the known ones as they were given."""
        return torch.where(self.mask == 0, self.latents.to(latents), latents)


class KnownDenoiser:
    """A network that takes known frames, told them: noisy latents `b t c h w`, timesteps `b` -> output `b t c h w`.

    denoiser: called with `b t (2c + 1) h w`, timesteps and the level of the noise on known latents, `b`.
    noise: start noise of the clip, `b t c h w`, with which known latents are noised.
    generator: draws the noise of `known.level`, once; one, or one per sample. It is not needed at level 0.
    fill: what the network was trained to find where nothing is known, see `filling`.
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
        told = known.latents.to(self.noise).expand_as(noise)
        if known.level:
            if generator is None:
                raise TypeError("noise on known latents needs a generator")
            told = self._noised(told, generator)
        self.told = torch.where(self.is_known, told, 0)
        mask = (~self.is_known).to(self.noise).expand(len(noise), -1, -1, -1, -1)
        self.conditions = torch.cat([mask, fill_unknown(self.told, mask, fill)], dim=2)

    def __call__(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """One evaluation, with known latents noised to these timesteps, which may be fractional."""
        signal, noise = (rearrange(scale, "b -> b 1 1 1 1") for scale in self.schedule.scales_at(timesteps))
        latents = torch.where(self.is_known, signal * self.told + noise * self.noise, latents)
        level = torch.full_like(timesteps, self.known.level)
        return self.denoiser(torch.cat([latents, self.conditions], dim=2), timesteps, level)

    def _noised(self, latents: Tensor, generator: Generators) -> Tensor:
        drawn = [torch.randn(latents.shape[1:], generator=one) for one in one_for_each(len(latents), generator)]
        levels = torch.full((len(latents),), self.known.level, device=latents.device)
        return self.schedule.with_level(latents, torch.stack(drawn).to(latents), levels)


def one_for_each(num: int, generator: Generators) -> list[torch.Generator]:
    """A generator for each of `num` samples: one of them all, or one per sample, so that batches do not matter."""
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


def check_takes_known_frames(takes_known_frames: bool, what: str) -> None:
    """Raise UserError for a network that cannot be told `what`, and say which can."""
    if not takes_known_frames:
        raise UserError(
            f"{what}: expected a network that takes known frames, found one without channels for them; checkpoints "
            "that do were trained with model.params.known_frames and in_channels 9 in model.params.unet_config.params. "
            "Overlapping windows make long clips, from prompts alone, with any checkpoint"
        )


def check_overlap(window: int, overlap: int) -> None:
    """Raise UserError unless neighbouring windows of `window` frames can share `overlap` of them."""
    if window < 2:
        raise UserError(
            f"window: expected at least 2 frames, so that those made at a time belong together, found {window}"
        )
    if not 1 <= overlap < window:
        raise UserError(
            f"overlap: expected 1 to {window - 1} frames, fewer than the {window} of a window, found {overlap}"
        )


def overlapping_windows(frames: int, window: int, overlap: int) -> list[slice]:
    """Windows of `window` frames over a clip, each `window - overlap` after the last, the final one at the end.

    A clip that fits is one window. Raises UserError as `check_overlap` does.
    """
    if frames <= window:
        return [slice(0, frames)]
    check_overlap(window, overlap)
    starts = [*range(0, frames - window, window - overlap), frames - window]
    return [slice(start, start + window) for start in starts]


class WindowedDenoiser:
    """Denoises a clip window by window: noisy latents `b t c h w`, timesteps `b` -> output `b t c h w`.

    denoiser_of_window: the denoiser of some frames, as `GuidedDenoiser.of_frames`, which cuts captions to them.
    window, overlap: frames that the network sees at a time, and that neighbouring windows have in common.

    The network's memory is that of one window. Up to `window` frames it is the plain denoiser.
    """

    def __init__(self, denoiser_of_window: Callable[[slice], Callable[..., Tensor]], window: int, overlap: int) -> None:
        self.denoiser_of_window, self.window, self.overlap = denoiser_of_window, window, overlap

    def __call__(self, latents: Tensor, timesteps: Tensor, *conditions: Tensor) -> Tensor:
        """One evaluation of every window; `conditions`, such as the level of known latents, go to each as they are."""
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
