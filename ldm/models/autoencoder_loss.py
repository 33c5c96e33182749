"""The autoencoder's loss: distance per pixel and KL divergence, optionally a perceptual and an adversarial term.

Rombach et al. 2022, section 3.1 and appendix G; the discriminator is that of Isola et al. 2017, the hinge loss that of
Lim & Ye 2017, the adaptive weight that of Esser et al. 2021, eq. 7. `look_through` zooms and shifts latents and
pictures alike, for an autoencoder whose latents move as pictures move, which video models learn sooner (Kouzelis et
al. 2025, "EQ-VAE", section 3, here with a camera's zoom and shift).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import nearest
from ldm.config.schema import FLAG, is_trusted
from ldm.errors import UserError
from ldm.modules.posterior import kl

OPTIONS = {
    "": {"l1": 1.0, "kl_weight": 1e-6, "perceptual": None, "adversarial": None},
    "perceptual": {"path": None, "weight": 1.0},
    "adversarial": {"weight": 0.5, "start_step": 0, "width": 64, "layers": 3},
}


class PatchDiscriminator(nn.Sequential):
    """Scores every patch: images `b c h w` in [-1, 1] -> `b 1 h' w'`, high for real.

    width: channels of the first layer, a multiple of 8. layers: each halves the resolution.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        widths = [width * min(2**layer, 8) for layer in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if index < layers else 1
            blocks += [nn.Conv2d(before, after, 4, stride, padding=1, bias=False), nn.GroupNorm(8, after)]
            blocks.append(nn.LeakyReLU(0.2))
        super().__init__(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))


class AutoencoderLoss(nn.Module):
    """The terms of the loss and their weights.

    config: `l1` weight of the mean distance per pixel value; `kl_weight` weight of the divergence in nats per pixel
        value (the same number as in CompVis's configs); `perceptual: {path, weight}` a TorchScript file that is called
        with reconstruction and original, `b 3 h w` in [-1, 1], and returns distances; `adversarial: {weight,
        start_step, width, layers}`.

    Raises UserError for an unknown key and for a perceptual file that is missing or not TorchScript.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        options = _checked(config, "")
        self.l1, self.kl_weight = float(options["l1"]), float(options["kl_weight"])
        self.perceptual = self.discriminator = None
        if options["perceptual"]:
            perceptual = _checked(options["perceptual"], "perceptual")
            self.perceptual, self.perceptual_weight = _load_scripted(perceptual["path"]), perceptual["weight"]
        if options["adversarial"]:
            adversarial = _checked(options["adversarial"], "adversarial")
            self.adversarial_weight, self.start_step = adversarial["weight"], adversarial["start_step"]
            self.discriminator = PatchDiscriminator(width=adversarial["width"], layers=adversarial["layers"])

    def reconstruction(self, output: Tensor, pixels: Tensor, moments: Tensor) -> dict[str, Tensor]:
        """The other terms, and their weighted sum as `loss`: `b c h w`, `b c h w`, `b 2z h w` -> dict."""
        terms = {"l1": (output - pixels).abs().mean(), "kl": kl(moments).sum() / pixels.numel()}
        terms["loss"] = self.l1 * terms["l1"] + self.kl_weight * terms["kl"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output, pixels).mean()
            terms["loss"] = terms["loss"] + self.perceptual_weight * terms["perceptual"]
        return terms

    def is_adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part at this step."""
        return self.discriminator is not None and step >= self.start_step

    def generator_loss(self, output: Tensor, reconstruction_loss: Tensor, last_layer: Tensor) -> Tensor:
        """The adversarial loss; its gradient at `last_layer` is `weight` times that of the reconstruction loss."""
        loss = -self.discriminator(output).mean()
        (gradient,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
        (adversarial_gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        balance = (gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0, 1e4).detach()
        return self.adversarial_weight * balance * loss

    def discriminator_loss(self, output: Tensor, pixels: Tensor) -> Tensor:
        """The hinge loss of the discriminator."""
        real, fake = self.discriminator(pixels), self.discriminator(output.detach())
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def _checked(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    where = f"model.params.lossconfig.{part}".rstrip(".")
    if not isinstance(config, Mapping):
        raise UserError(f"{where}: expected a mapping with {', '.join(OPTIONS[part])}, found {config!r}")
    for key in config:
        if key not in OPTIONS[part]:
            raise UserError(f"{where}.{key}: nothing reads this key; {nearest(str(key), OPTIONS[part])}")
    return OPTIONS[part] | dict(config)


def _load_scripted(path: str | None) -> nn.Module:
    if path is None or not Path(path).is_file():
        raise UserError(
            f"model.params.lossconfig.perceptual.path: expected a TorchScript file that compares two batches of "
            f"images, found {path!r}; no weights are downloaded, leave `perceptual` out to train without it"
        )
    if not is_trusted():
        raise UserError(
            f"{path}: a TorchScript file for the perceptual term is a program, which runs when it is loaded; give "
            f"{FLAG} if you trust its source"
        )
    try:
        module = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: expected a TorchScript file for the perceptual term ({reason})") from error
    for parameter in module.parameters():  # scripted modules have no requires_grad_
        parameter.requires_grad = False
    return module.eval()


MOST_ZOOM = 1.5


def draw_windows(seed: int, positions: Sequence[int], share: float) -> Tensor:
    """One window for each position in the training stream -> affine matrices `b 2 3` for `look_through`.

    A `share` of them show a random part of the picture, 1 to 1.5 times enlarged; the others the whole picture. A draw
    depends on seed and position only.
    """
    windows = torch.zeros(len(positions), 2, 3)
    for window, position in zip(windows, positions, strict=True):
        random = np.random.default_rng((seed, position, 2))
        side = 1 / random.uniform(1, MOST_ZOOM) if random.random() < share else 1.0
        window[0, 0] = window[1, 1] = side
        window[:, 2] = torch.from_numpy(random.uniform(-(1 - side), 1 - side, 2))
    return windows


def look_through(images: Tensor, windows: Tensor) -> Tensor:
    """Each image or latent `b c h w` through its window `b 2 3`, at the same size, bilinear."""
    grid = F.affine_grid(windows.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
