"""Latents that move as pictures move: an autoencoder is asked to decode zoomed and shifted latents into the picture
zoomed and shifted in the same way (Kouzelis et al. 2025, "EQ-VAE", section 3, here with a camera's zoom and shift).

An f8 autoencoder trained on reconstruction alone gives the same tree other latents when it stands three pixels further
left; a video model then has to learn the autoencoder's habits before it can learn motion.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ZOOM = 1.5


def draw_windows(seed: int, positions: Sequence[int], share: float) -> Tensor:
    """One window per position of the training stream -> affine matrices `b 2 3` for `look_through`.

    A `share` of them show a window inside the picture, 1 to 1.5 times enlarged and anywhere in it; the others the whole
    picture. A draw depends on seed and position alone.
    """
    windows = torch.zeros(len(positions), 2, 3)
    for window, position in zip(windows, positions, strict=True):
        random = np.random.default_rng((seed, position, 2))
        side = 1 / random.uniform(1, MOST_ZOOM) if random.random() < share else 1.0
        window[0, 0] = window[1, 1] = side
        window[:, 2] = torch.from_numpy(random.uniform(-(1 - side), 1 - side, 2))
    return windows


def look_through(images: Tensor, windows: Tensor) -> Tensor:
    """What each window `b 2 3` shows of each image or latent `b c h w`, at the same size, read bilinearly."""
    grid = F.affine_grid(windows.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
