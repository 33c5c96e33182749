"""Known frames of a training clip: which ones the network is given, and how the unknown ones are filled in.

One network learns every task (text to video, first frame, in-betweening, continuation) from a mixture of masks. A mask
is `t 1 h w`: 1 where latents are generated, 0 where they are known, as the network takes it. Unknown positions hold the
blend of the nearest known frames, so the network only has to learn what differs from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError

WHERE = "model.params.known_frames"
FILLS = ("blend", "zeros")
SMALLEST_PATCH = 0.25  # of a side


def fill_of_config(options: Mapping[str, Any] | None) -> str:
    """The `fill` of `model.params.known_frames`, "blend" by default. Raises `UserError`.

    None: "zeros", for a network that was trained elsewhere, such as the public inpainting one.
    """
    fill = "zeros" if options is None else options.get("fill", "blend")
    if fill not in FILLS:
        raise UserError(f"{WHERE}.fill: expected one of {', '.join(FILLS)}, found {fill!r}")
    return fill


def fill_unknown(latents: Tensor, mask: Tensor, fill: str = "blend") -> Tensor:
    """Known latents, blended linearly in time between known frames and repeated beyond them: `b t c h w`.

    mask: 1 where latents are unknown, `b t 1 h w`; the values of `latents` there are not read. Images, without t, and
    pixels that are known in no frame are 0 there. fill: "zeros" sets every unknown position to 0.
    """
    is_known = mask == 0
    known = torch.where(is_known, latents, 0)
    if latents.ndim == 4 or fill == "zeros":
        return known
    before, since = _nearest(known, is_known, range(latents.shape[1]))
    after, until = _nearest(known, is_known, range(latents.shape[1] - 1, -1, -1))
    # Weights are inverse distances: a blend between two frames, the one frame beyond the last, 0 / tiny without any.
    weight_before, weight_after = (1 / distance.clamp_min(1e-3) for distance in (since, until))
    weights = (weight_before + weight_after).clamp_min(1e-20)
    blend = (before * weight_before + after * weight_after) / weights
    return torch.where(is_known, latents, blend)


def _nearest(known: Tensor, is_known: Tensor, order: range) -> tuple[Tensor, Tensor]:
    """For each frame the latest known latents in this order and their distance in frames, infinity without any."""
    last, ago = torch.zeros_like(known[:, 0]), torch.full_like(known[:, 0, :1], torch.inf)
    nearest, distances = [], []
    for frame in order:
        last = torch.where(is_known[:, frame], known[:, frame], last)
        ago = torch.where(is_known[:, frame], 0, ago + 1)
        nearest.append(last)
        distances.append(ago)
    if order.step < 0:
        nearest, distances = nearest[::-1], distances[::-1]
    return torch.stack(nearest, dim=1), torch.stack(distances, dim=1)


@dataclass(frozen=True)
class KnownFrames:
    """Known latents of a batch: mask `b t 1 h w`, latents `b t c h w` and the diffusion step of their noise.

    level: `b`, 0 for no noise. Images have no t.
    """

    mask: Tensor
    latents: Tensor
    level: Tensor

    @classmethod
    def nothing(cls, like: Tensor) -> KnownFrames:
        """All latents of the shape of `like` are unknown."""
        mask = torch.ones_like(like[..., :1, :, :])
        return cls(mask, torch.zeros_like(like), torch.zeros(len(like), dtype=torch.long, device=like.device))


class KnownFrameMixture:
    """The distribution of masks in training.

    mixture: kind -> relative weight; a kind that is left out does not occur.
        nothing      text to video
        first        the first frame
        ends         the first and the last
        every        every k-th from the first on, k drawn from 2 to t - 1
        previous     the first k, to continue a clip, k from 1 to t - 1
        random       any frames, from one to all but one
        pixels       a rectangle of every frame, or all but a rectangle
    max_noise: half of the clips get noise of a diffusion step from 1 to this one on their known latents.
    fill: values at unknown positions, see `fill_unknown`.
    """

    def __init__(self, mixture: Mapping[str, float], max_noise: int = 0, fill: str = "blend") -> None:
        for kind, weight in mixture.items():
            if kind not in KINDS:
                raise UserError(f"{WHERE}.mixture.{kind}: expected one of {', '.join(KINDS)}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise UserError(f"{WHERE}.mixture.{kind}: expected a weight from 0, found {weight!r}")
        if not sum(mixture.values()):
            raise UserError(f"{WHERE}.mixture: expected at least one kind with a weight above 0, found none")
        if isinstance(max_noise, bool) or not isinstance(max_noise, int) or max_noise < 0:
            raise UserError(f"{WHERE}.max_noise: expected a diffusion step from 0, found {max_noise!r}")
        self.kinds = [kind for kind, weight in mixture.items() if weight]
        self.weights = torch.tensor([mixture[kind] for kind in self.kinds], dtype=torch.float64)
        self.max_noise = max_noise
        self.fill = fill_of_config({"fill": fill})

    @classmethod
    def from_config(cls, options: Mapping[str, object] | None) -> KnownFrameMixture | None:
        """The mixture of `model.params.known_frames`, None for None. Raises `UserError`."""
        if options is None:
            return None
        known = {"mixture", "max_noise", "fill"}
        if not isinstance(options, Mapping) or set(options) - known or "mixture" not in options:
            raise UserError(f"{WHERE}: expected the keys mixture, max_noise and fill, found {options!r}")
        return cls(**options)

    def check_network(self, unet: torch.nn.Module, timesteps: int) -> None:
        """Raise `UserError` unless the network takes known frames with this noise; timesteps: of its schedule."""
        if not unet.takes_known_frames:
            raise UserError(
                f"{WHERE}: expected a network that takes known frames, unet_config.params.in_channels "
                f"{2 * unet.out_channels + 1} for out_channels {unet.out_channels}, found in_channels "
                f"{unet.in_channels}"
            )
        if self.max_noise and not unet.has_known_level:
            raise UserError(
                f"{WHERE}.max_noise: expected 0 for a network that is not conditioned on the noise, found "
                f"{self.max_noise}; set unet_config.params.known_level_embedding: true"
            )
        if self.max_noise >= timesteps:
            raise UserError(f"{WHERE}.max_noise: expected a diffusion step below {timesteps}, found {self.max_noise}")

    def draw(self, frames: int, h: int, w: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """A mask `t 1 h w` and the diffusion step of the noise on known latents, 0 for none.

        generator: on the CPU. At least one position is unknown; in a clip of one frame all are, except with "pixels".
        """
        kind = self.kinds[int(torch.multinomial(self.weights, 1, generator=generator))]
        mask = torch.ones(frames, 1, h, w)
        if kind == "pixels":
            mask[..., _rectangle(h, w, generator)] = 0
            mask = 1 - mask if _below(2, generator) else mask
        elif frames > 1:
            mask[KINDS[kind](frames, generator)] = 0
        is_noisy = self.max_noise > 0 and _below(2, generator)
        return mask, 1 + _below(self.max_noise, generator) if is_noisy else 0


def _below(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (), generator=generator))


def _rectangle(h: int, w: int, generator: torch.Generator) -> Tensor:
    """True inside a rectangle whose sides are a quarter of the frame's to all but a pixel: bool `h w`."""
    inside = torch.ones(h, w, dtype=torch.bool)
    for size, axis in ((h, 0), (w, 1)):
        least = max(1, int(SMALLEST_PATCH * size))
        length = least + _below(max(1, size - least), generator)
        start = _below(size - length + 1, generator)
        positions = torch.arange(size).view(-1, *[1] * (1 - axis))
        inside &= (positions >= start) & (positions < start + length)
    return inside


# Kind -> the known frames of t, drawn; t is 2 or more.
KINDS: dict[str, Callable[[int, torch.Generator], list[int]] | None] = {
    "nothing": lambda t, _: [],
    "first": lambda t, _: [0],
    "ends": lambda t, _: [0] if t == 2 else [0, t - 1],
    "every": lambda t, generator: [0] if t == 2 else list(range(0, t, 2 + _below(t - 2, generator))),
    "previous": lambda t, generator: list(range(1 + _below(t - 1, generator))),
    "random": lambda t, generator: torch.randperm(t, generator=generator)[: 1 + _below(t - 1, generator)].tolist(),
    "pixels": None,  # part of every frame
}
