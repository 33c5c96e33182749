"""Whether a step of training is taken, decided where the weights are: nothing here asks a device for a number.

A step whose loss or gradients are not finite is not, nor one whose loss lies far above those before it. The verdict is
a tensor that optimisers respect: `found_inf`, as torch calls it, 1 for a step that is to leave everything as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.weight_by_weight import WeightByWeight

LEAST = 20  # losses before one of them can be far above the others


class StepJudge:
    """Compares the loss of each step with the mean of the last ones that were taken.

    factor: how many times that mean is too much; None: only what is not finite is.
    window: how many losses the mean is of; before there are `LEAST`, or all of a smaller window, none is too much.

    `losses`: `window`, float32, the newest last, NaN where there is none yet. It is all that a run that is taken up
    again needs.
    """

    def __init__(self, factor: float | None, window: int, device: torch.device | str) -> None:
        self.factor, self.least = factor, min(LEAST, window)
        self.losses = torch.full((window,), float("nan"), device=device)

    @torch.no_grad()
    def verdict(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Loss and norm of a step -> `4`: 1 if it is to be skipped, else 0; the loss; the norm; the mean so far.

        The mean is NaN where there are too few losses to compare with.
        """
        loss, gradient_norm = loss.detach().float().reshape(()), gradient_norm.detach().float().reshape(())
        is_there = ~self.losses.isnan()
        count = is_there.sum()
        mean = torch.where(is_there, self.losses, 0).sum() / torch.where(count >= self.least, count, float("nan"))
        is_bad = ~(loss.isfinite() & gradient_norm.isfinite())
        if self.factor is not None:
            is_bad = is_bad | (loss > self.factor * mean)  # never above NaN
        self.losses = torch.where(is_bad, self.losses, torch.cat([self.losses[1:], loss[None]]))
        return torch.stack([is_bad.float(), loss, gradient_norm, mean])


class ClipsByKnownNorm:
    """For a LightningModule: clips gradients as Lightning does, but does not take their norm again where it is known.

    `gradient_norm`: of the step under way, before clipping; whoever takes it sets it here.
    """

    gradient_norm: Tensor | None = None

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: Any = None
    ) -> None:
        norm, self.gradient_norm = self.gradient_norm, None
        if norm is None or not gradient_clip_val or (gradient_clip_algorithm or "norm") != "norm":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(weights, gradient_clip_val, norm)


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, a number on their device; of gradients in parts, a number in parts."""
    return torch.nn.utils.get_total_norm(list(gradients))


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser leaves weights, states and counters as they are where its `found_inf` is 1.

    torch's own does that in its fused form, and torchao's as `optimizers` has them; where weights lie in parts on
    several devices, nobody does.
    """
    if isinstance(optimizer, WeightByWeight):
        return skips_by_itself(optimizer.inner)
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    if any(hasattr(weight, "full_tensor") for weight in weights):
        return False
    is_fused = isinstance(optimizer, torch.optim.Adam) and all(group.get("fused") for group in optimizer.param_groups)
    return is_fused or hasattr(type(optimizer), "found_inf")
