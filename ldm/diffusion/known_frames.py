"""Which frames of a training clip are known to the network, so that one network learns every way to make frames.

A mask is `t 1 h w`: 1 where latents are to be made, 0 where they are known, as the network takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError

FILLS = ("blend", "zeros")


def fill_of_config(words: Mapping[str, Any] | None) -> str:
    """How a network trained with these `model.params.known_frames` has it, "blend" unless they say otherwise.

    None: "zeros", for a network that was trained elsewhere, such as the public inpainting one. Raises `UserError`.
    """
    fill = "zeros" if words is None else words.get("fill", "blend")
    if fill not in FILLS:
        raise UserError(f"model.params.known_frames.fill: expected one of {', '.join(FILLS)}, found {fill!r}")
    return fill


def fill_unknown(latents: Tensor, mask: Tensor, fill: str = "blend") -> Tensor:
    """Known latents, and between them the blend of those nearest in time, beyond them the nearest: `b t c h w`.

    mask: 1 where latents are not known, `b t 1 h w`; what `latents` holds there is not read. Images, without t, and
    places that no frame knows are 0 there. fill: "zeros" makes all places 0 that are not known.
    """
    is_known = mask == 0
    known = torch.where(is_known, latents, 0)
    if latents.ndim == 4 or fill == "zeros":
        return known
    before, since = _nearest(known, is_known, range(latents.shape[1]))
    after, until = _nearest(known, is_known, range(latents.shape[1] - 1, -1, -1))
    # Inverse distances as weights: the blend between two, the one there is beyond the last, 0 / tiny where none is.
    weight_before, weight_after = (1 / distance.clamp_min(1e-3) for distance in (since, until))
    weights = (weight_before + weight_after).clamp_min(1e-20)
    blend = (before * weight_before + after * weight_after) / weights
    return torch.where(is_known, latents, blend)


def _nearest(known: Tensor, is_known: Tensor, order: range) -> tuple[Tensor, Tensor]:
    """For each frame the last known latents in this order of frames and how many frames ago, infinity for never."""
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


SMALLEST_PATCH = 0.25  # of a side
WORDS = {"mixture", "max_noise", "fill"}


@dataclass(frozen=True)
class KnownLatents:
    """What the network is told of a clip's latents: mask `b t 1 h w`, 1 where they are to be made; latents `b t c h w`
    with the noise of `level`, `b`, a diffusion step or 0 for none; of images without t."""

    mask: Tensor
    latents: Tensor
    level: Tensor

    @classmethod
    def nothing(cls, like: Tensor) -> KnownLatents:
        """All latents of the shape of `like` are to be made."""
        mask = torch.ones_like(like[..., :1, :, :])
        return cls(mask, torch.zeros_like(like), torch.zeros(len(like), dtype=torch.long, device=like.device))


class KnownFrameMixture:
    """The mixture of what is known.

    mixture: kind -> its weight against the others; a kind that is left out does not happen.
        nothing      text to video
        first        the first frame
        ends         the first and the last
        every        every k-th from the first on, k drawn from 2 to t - 1
        previous     the first k, as the last of a stretch that is continued, k from 1 to t - 1
        random       any frames, from one to all but one
        pixels       a rectangle of every frame, or all but a rectangle
    max_noise: known latents get the noise of a diffusion step up to this one, half of the clips none.
    fill: what the network is handed where nothing is known, see `filling`.
    """

    def __init__(self, mixture: Mapping[str, float], max_noise: int = 0, fill: str = "blend") -> None:
        where = "model.params.known_frames"
        for kind, weight in mixture.items():
            if kind not in KINDS:
                raise UserError(f"{where}.mixture.{kind}: expected one of {', '.join(KINDS)}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise UserError(f"{where}.mixture.{kind}: expected a weight from 0, found {weight!r}")
        if not sum(mixture.values()):
            raise UserError(f"{where}.mixture: expected at least one kind with a weight above 0, found none")
        if isinstance(max_noise, bool) or not isinstance(max_noise, int) or max_noise < 0:
            raise UserError(f"{where}.max_noise: expected a diffusion step from 0, found {max_noise!r}")
        self.kinds = [kind for kind, weight in mixture.items() if weight]
        self.weights = torch.tensor([mixture[kind] for kind in self.kinds], dtype=torch.float64)
        self.max_noise = max_noise
        self.fill = fill_of_config({"fill": fill})

    @classmethod
    def from_config(cls, words: Mapping[str, object] | None) -> KnownFrameMixture | None:
        """What `model.params.known_frames` describes, None for None; raises `UserError`."""
        if words is None:
            return None
        if not isinstance(words, Mapping) or set(words) - WORDS or "mixture" not in words:
            raise UserError(
                f"model.params.known_frames: expected the words mixture, max_noise and fill, found {words!r}"
            )
        return cls(**words)

    def check_network(self, unet: torch.nn.Module, timesteps: int) -> None:
        """Raise `UserError` unless a network of so many diffusion steps takes known frames as they are drawn here."""
        where = "model.params.known_frames"
        if not unet.takes_known_frames:
            raise UserError(
                f"{where}: expected a network that takes known frames, unet_config.params.in_channels "
                f"{2 * unet.out_channels + 1} for out_channels {unet.out_channels}, found in_channels "
                f"{unet.in_channels}"
            )
        if self.max_noise and not unet.has_known_level:
            raise UserError(
                f"{where}.max_noise: expected 0 for a network that is not told of the noise, found {self.max_noise}; "
                "set unet_config.params.known_level_embedding: true"
            )
        if self.max_noise >= timesteps:
            raise UserError(f"{where}.max_noise: expected a diffusion step below {timesteps}, found {self.max_noise}")

    def draw(self, frames: int, h: int, w: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """A mask `t 1 h w` and the diffusion step of the noise on what is known, 0 for none.

        generator: on the CPU. Something is always left to be made; in a clip of one frame everything but "pixels".
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


def _nothing(frames: int, generator: torch.Generator) -> list[int]:
    return []


def _first(frames: int, generator: torch.Generator) -> list[int]:
    return [0]


def _ends(frames: int, generator: torch.Generator) -> list[int]:
    return [0] if frames == 2 else [0, frames - 1]


def _every(frames: int, generator: torch.Generator) -> list[int]:
    return [0] if frames == 2 else list(range(0, frames, 2 + _below(frames - 2, generator)))


def _previous(frames: int, generator: torch.Generator) -> list[int]:
    return list(range(1 + _below(frames - 1, generator)))


def _random(frames: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(frames, generator=generator)[: 1 + _below(frames - 1, generator)].tolist()


def _rectangle(h: int, w: int, generator: torch.Generator) -> Tensor:
    """True inside a rectangle of a quarter to all but a pixel of each side, `h w`."""
    inside = torch.ones(h, w, dtype=torch.bool)
    for size, axis in ((h, 0), (w, 1)):
        least = max(1, int(SMALLEST_PATCH * size))
        length = least + _below(max(1, size - least), generator)
        start = _below(size - length + 1, generator)
        places = torch.arange(size).view(-1, *[1] * (1 - axis))
        inside &= (places >= start) & (places < start + length)
    return inside


KINDS: dict[str, Callable[[int, torch.Generator], list[int]] | None] = {
    "nothing": _nothing,
    "first": _first,
    "ends": _ends,
    "every": _every,
    "previous": _previous,
    "random": _random,
    "pixels": None,  # not whole frames
}
