"""A small convolutional network over single frames: features for the style classifier and for the text model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

SIDE = 64  # pixels; frames of any size are resized to it
GROUPS = 8
WIDTHS = (32, 64, 96, 128)  # after the first convolution and after each block, which halves the size


class FrameTower(nn.Module):
    """One vector per frame: residual blocks at falling resolutions, then the mean over pixels.

    widths: channels, multiples of 8; the last is the width of the vector.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.widths, self.width = tuple(widths), widths[-1]
        self.first = nn.Conv2d(3, widths[0], 5, stride=2, padding=2)
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in itertools.pairwise(widths)))
        self.norm = nn.LayerNorm(self.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Frames in [-1, 1], resized to a square -> features: `b 3 h w` -> `b d`."""
        if pixels.shape[-2:] != (SIDE, SIDE):
            pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        return self.norm(reduce(self.blocks(self.first(pixels)), "b d h w -> b d", "mean"))


class FrameClassifier(nn.Module):
    """Frames in [-1, 1] -> a score for each class: `b 3 h w` -> `b classes`."""

    def __init__(self, num_classes: int, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.tower = FrameTower(widths)
        self.head = nn.Linear(self.tower.width, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.tower(pixels))


class _Block(nn.Module):
    """Residual block that halves the size: `b c h w` -> `b c' h/2 w/2`."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(GROUPS, before), nn.GroupNorm(GROUPS, after)])
        self.down = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.same = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.down(F.silu(self.norms[0](x)))
        out = self.same(F.silu(self.norms[1](out)))
        return out + self.shortcut(F.avg_pool2d(x, 2))
