"""The Gaussian over latents given by the encoder of the image autoencoder (Kingma & Welling 2014).

Its moments are stored as the encoder returns them, mean and log-variance side by side in the channels, so each visit of
a prepared clip can draw a new sample. Any leading dimensions: `... 2c h w`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.errors import UserError

LOGVAR_BOUNDS = (-30.0, 20.0)  # those of CompVis


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, the latter clamped to [-30, 20]: `... 2c h w` -> `... c h w`, `... c h w`."""
    if moments.ndim < 3 or moments.shape[-3] % 2:
        raise UserError(
            f"moments: expected mean and log-variance in an even number of channels, ... 2c h w, found shape "
            f"{tuple(moments.shape)}"
        )
    mean, logvar = moments.chunk(2, dim=-3)
    return mean, logvar.clamp(*LOGVAR_BOUNDS)


def posterior_mean(moments: Tensor) -> Tensor:
    """The most likely latents, unscaled: `... 2c h w` -> `... c h w`."""
    return split_moments(moments)[0]


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """A sample of the latents, unscaled: moments `... 2c h w`, standard normal noise `... c h w` -> `... c h w`."""
    mean, logvar = split_moments(moments)
    return mean + (0.5 * logvar).exp() * noise


def kl(moments: Tensor) -> Tensor:
    """Divergence from the standard normal in nats, summed over channels and pixels: `... 2c h w` -> `...`."""
    mean, logvar = split_moments(moments)
    return 0.5 * torch.sum(mean.square() + logvar.exp() - 1 - logvar, dim=(-3, -2, -1))
