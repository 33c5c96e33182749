"""What happens to frames on the way through an autoencoder, a video file or a bad model, drawn at random: blur, a
coarser grid, coarse cosine coefficients as in JPEG, noise, other colours. What learns from such frames judges them by
what they show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

BLOCK = 8  # pixels of a side of what is quantised together
SHARE = 0.5  # of the damaged frames that each kind of damage meets


def damage_frames(pixels: Tensor, seeds: Sequence[tuple[int, int]], share: float = 1.0) -> Tensor:
    """Frames in [-1, 1], `b c h w` -> a `share` of them damaged, `b c h w` in [-1, 1]; h and w multiples of 8.

    seeds: of each frame, so that the same frame with the same seed is damaged alike. Half of them meet each kind.
    """
    damaged = []
    for frame, seed in zip(pixels, seeds, strict=True):
        random = np.random.default_rng(seed)
        image = frame[None]
        is_damaged = random.random() < share
        for kind in KINDS:
            if is_damaged and random.random() < SHARE:
                image = kind(image, random)
        damaged.append(image.clamp(-1, 1))
    return torch.cat(damaged)


def zoom_in(image: Tensor, random: np.random.Generator) -> Tensor:
    """A part of the frame, 70 to 100 % of its sides, in its place; half of the time mirrored."""
    height, width = image.shape[-2:]
    share = random.uniform(0.7, 1)
    h, w = round(share * height), round(share * width)
    y, x = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
    part = _resized(image[..., y : y + h, x : x + w], (height, width))
    return part.flip(-1) if random.random() < 0.5 else part


def blur(image: Tensor, random: np.random.Generator) -> Tensor:
    """A Gaussian of 0.4 to 2.5 pixels."""
    sigma = math.exp(random.uniform(math.log(0.4), math.log(2.5)))
    reach = min(math.ceil(2.5 * sigma), min(image.shape[-2:]) - 1)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=image.device) / sigma) ** 2)
    weights = (weights / weights.sum()).to(image.dtype).expand(image.shape[1], 1, 1, -1)
    padded = F.pad(image, (reach,) * 4, mode="reflect")
    across = F.conv2d(padded, weights, groups=image.shape[1])
    return F.conv2d(across, rearrange(weights, "c one h w -> c one w h"), groups=image.shape[1])


def coarsen(image: Tensor, random: np.random.Generator) -> Tensor:
    """A grid of a quarter of the sides up to the whole, and back."""
    height, width = image.shape[-2:]
    share = random.uniform(0.25, 1)
    return _resized(_resized(image, (round(share * height), round(share * width))), (height, width))


def quantise(image: Tensor, random: np.random.Generator) -> Tensor:
    """Cosine coefficients of blocks of 8 pixels, rounded to steps that grow with their frequency, as JPEG does it."""
    number = torch.arange(BLOCK, dtype=torch.float32, device=image.device)
    cosines = torch.cos(math.pi / BLOCK * (number + 0.5) * number[:, None]) * math.sqrt(2 / BLOCK)
    cosines[0] *= math.sqrt(0.5)  # the rows are orthonormal now
    step = random.uniform(0.02, 0.25) * (1 + number[:, None] + number)
    blocks = rearrange(image.float(), "b c (i h) (j w) -> b c i j h w", h=BLOCK, w=BLOCK)
    rounded = torch.round(cosines @ blocks @ cosines.T / step) * step
    return rearrange(cosines.T @ rounded @ cosines, "b c i j h w -> b c (i h) (j w)").to(image.dtype)


def add_noise(image: Tensor, random: np.random.Generator) -> Tensor:
    """Gaussian noise of up to 0.2, fine or in spots of 4 pixels."""
    size = 4 if random.random() < 0.5 else 1
    shape = [image.shape[1], *(math.ceil(side / size) for side in image.shape[-2:])]
    noise = torch.from_numpy(random.standard_normal(shape, np.float32)).to(image.device)[None]
    return image + random.uniform(0, 0.2) * _resized(noise, image.shape[-2:])


def recolour(image: Tensor, random: np.random.Generator) -> Tensor:
    """Brighter or darker by up to 0.15, contrast and saturation 0.75 to 1.25 times as high."""
    contrast, saturation = random.uniform(0.75, 1.25, 2)
    grey = image.mean(1, keepdim=True)
    image = grey + saturation * (image - grey)
    return contrast * image + random.uniform(-0.15, 0.15)


KINDS: tuple[Callable[[Tensor, np.random.Generator], Tensor], ...] = (
    zoom_in, recolour, blur, coarsen, add_noise, quantise,
)  # fmt: skip


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(image, tuple(size), mode="bilinear", align_corners=False, antialias=True)
