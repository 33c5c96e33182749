"""Random corruptions of frames, as an autoencoder, a video file or a bad model causes them: blur, lower resolution,
quantised cosine coefficients as in JPEG, noise, other colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

BLOCK = 8  # pixels along a side of a quantised block
SHARE = 0.5  # probability of each kind of corruption in a corrupted frame


def corrupt_frames(pixels: Tensor, seeds: Sequence[tuple[int, int]], share: float = 1.0) -> Tensor:
    """Frames in [-1, 1], `b c h w` -> a `share` of them corrupted, `b c h w` in [-1, 1]; h and w multiples of 8.

    seeds: one for each frame; the corruption depends on nothing else.
    """
    corrupted = []
    for frame, seed in zip(pixels, seeds, strict=True):
        random = np.random.default_rng(seed)
        image = frame[None]
        is_corrupted = random.random() < share
        for kind in KINDS:
            if is_corrupted and random.random() < SHARE:
                image = kind(image, random)
        corrupted.append(image.clamp(-1, 1))
    return torch.cat(corrupted)


def zoom_in(image: Tensor, random: np.random.Generator) -> Tensor:
    """A crop of 70 to 100 % of the sides, resized to the frame; half of the time mirrored."""
    height, width = image.shape[-2:]
    share = random.uniform(0.7, 1)
    h, w = round(share * height), round(share * width)
    y, x = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
    part = _resized(image[..., y : y + h, x : x + w], (height, width))
    return part.flip(-1) if random.random() < 0.5 else part


def blur(image: Tensor, random: np.random.Generator) -> Tensor:
    """A Gaussian with a standard deviation of 0.4 to 2.5 pixels."""
    sigma = math.exp(random.uniform(math.log(0.4), math.log(2.5)))
    reach = min(math.ceil(2.5 * sigma), min(image.shape[-2:]) - 1)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=image.device) / sigma) ** 2)
    weights = (weights / weights.sum()).to(image.dtype).expand(image.shape[1], 1, 1, -1)
    padded = F.pad(image, (reach,) * 4, mode="reflect")
    across = F.conv2d(padded, weights, groups=image.shape[1])
    return F.conv2d(across, rearrange(weights, "c one h w -> c one w h"), groups=image.shape[1])


def coarsen(image: Tensor, random: np.random.Generator) -> Tensor:
    """Down to a quarter or more of the sides, and back."""
    height, width = image.shape[-2:]
    share = random.uniform(0.25, 1)
    return _resized(_resized(image, (round(share * height), round(share * width))), (height, width))


def quantise(image: Tensor, random: np.random.Generator) -> Tensor:
    """Cosine coefficients of 8x8 blocks, rounded to steps that grow with their frequency, as in JPEG."""
    number = torch.arange(BLOCK, dtype=torch.float32, device=image.device)
    cosines = torch.cos(math.pi / BLOCK * (number + 0.5) * number[:, None]) * math.sqrt(2 / BLOCK)
    cosines[0] *= math.sqrt(0.5)  # makes the rows orthonormal
    step = random.uniform(0.02, 0.25) * (1 + number[:, None] + number)
    blocks = rearrange(image.float(), "b c (i h) (j w) -> b c i j h w", h=BLOCK, w=BLOCK)
    rounded = torch.round(cosines @ blocks @ cosines.T / step) * step
    return rearrange(cosines.T @ rounded @ cosines, "b c i j h w -> b c (i h) (j w)").to(image.dtype)


def add_noise(image: Tensor, random: np.random.Generator) -> Tensor:
    """Gaussian noise with a standard deviation of up to 0.2, per pixel or in spots of 4 pixels."""
    size = 4 if random.random() < 0.5 else 1
    shape = [image.shape[1], *(math.ceil(side / size) for side in image.shape[-2:])]
    noise = torch.from_numpy(random.standard_normal(shape, np.float32)).to(image.device)[None]
    return image + random.uniform(0, 0.2) * _resized(noise, image.shape[-2:])


def recolour(image: Tensor, random: np.random.Generator) -> Tensor:
    """Brightness changed by up to 0.15, contrast and saturation scaled by 0.75 to 1.25."""
    contrast, saturation = random.uniform(0.75, 1.25, 2)
    grey = image.mean(1, keepdim=True)
    image = grey + saturation * (image - grey)
    return contrast * image + random.uniform(-0.15, 0.15)


KINDS: tuple[Callable[[Tensor, np.random.Generator], Tensor], ...] = (
    zoom_in, recolour, blur, coarsen, add_noise, quantise,
)  # fmt: skip


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(image, tuple(size), mode="bilinear", align_corners=False, antialias=True)
