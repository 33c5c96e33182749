"""A clip of any length denoised at once, in overlapping windows, for networks that take no known frames.

In every diffusion step the network sees one window of the clip after the other; where windows overlap, the mean of what
they predict is taken (Bar-Tal et al. 2023, "MultiDiffusion", over frames instead of pixels).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.errors import UserError


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
