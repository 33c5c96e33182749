"""Noise of the frames of a clip, independent or correlated, in training and at the start of sampling; seeds.

Mixed and progressive noise: Ge et al. 2023, "Preserve Your Own Correlation" (section 3.2). Offset noise, with which a
network can change the brightness of a whole image: Guttenberg 2023, "Diffusion with Offset Noise".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.errors import UserError

KINDS = ("independent", "mixed", "progressive")


class NoiseFamily:
    """Unit normal noise for clips.

    kind: "independent" frames; "mixed": all share one component; "progressive": each continues the one before.
    share: correlation of neighbouring frames, 0 to below 1. Frames n apart have the same correlation if mixed, its n-th
        power if progressive.
    offset: standard deviation of a constant added to each channel of a clip.
    """

    def __init__(self, kind: str = "independent", share: float = 0.0, offset: float = 0.0) -> None:
        if kind not in KINDS:
            raise UserError(f"noise.kind: expected one of {', '.join(KINDS)}, found {kind!r}")
        if not _is_number(share) or not 0 <= share < 1:
            raise UserError(f"noise.share: expected a correlation from 0 to below 1, found {share!r}")
        if (kind == "independent") != (share == 0):
            raise UserError(
                "noise: expected a share above 0 for mixed and progressive noise and none for independent, found "
                f"share {share:g} with kind {kind}"
            )
        if not _is_number(offset) or not 0 <= offset <= 1:
            raise UserError(f"noise.offset: expected a standard deviation from 0 to 1, found {offset!r}")
        self.kind, self.share, self.offset = kind, share, offset

    def draw(self, frames: int, channels: int, h: int, w: int, generator: torch.Generator) -> Tensor:
        """Noise of a clip, `t c h w`, on the generator's device; a longer clip starts with that of a shorter one."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=generator.device)

        offset = self.offset * normal(channels, 1, 1) if self.offset else 0.0
        shared = normal(channels, h, w) if self.kind == "mixed" else None
        noise = normal(frames, channels, h, w)
        if shared is not None:
            noise = self.share**0.5 * shared + (1 - self.share) ** 0.5 * noise
        if self.kind == "progressive":
            for frame in range(1, frames):
                noise[frame] = self.share * noise[frame - 1] + (1 - self.share**2) ** 0.5 * noise[frame]
        return noise + offset

    @classmethod
    def from_config(cls, options: object) -> NoiseFamily:
        """The family of `model.params.noise`; None: independent frames. Raises `UserError`."""
        options = {} if options is None else options
        known = ("kind", "share", "offset")
        if not hasattr(options, "items") or (unknown := [key for key in options if key not in known]):
            found = options if not hasattr(options, "items") else unknown[0]
            raise UserError(f"model.params.noise: expected the keys {', '.join(known)}, found {found!r}")
        return cls(**options)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mix_seed(seed: int, stream: int, position: int) -> int:
    """A 63-bit seed that depends on its three numbers alone (finaliser of splitmix64, Steele et al. 2014)."""
    mix = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + position) & 0xFFFFFFFFFFFFFFFF
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        mix = ((mix ^ (mix >> shift)) * multiplier) & 0xFFFFFFFFFFFFFFFF
    return (mix ^ (mix >> 31)) >> 1
