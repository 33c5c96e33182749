"""The step of torchao's AdamW, which may turn out to be none: what is computed is written back where it is to count.

The numbers are torchao's, operation by operation. Its own step has no way to be called off once it was asked for, and
asking for it only when the verdict is there would mean to wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.optim.per_weight import WeightByWeight, plain_parts

MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))  # and whether they have a sign


@torch.no_grad()
def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Update every weight that has a gradient, unless `skip` is 1: then weights and states stay as they are.

    optimizer: torchao's AdamW with 8 or 4 bits. The steps are counted on the device.
    """
    update = torch.compile(updated, fullgraph=True, dynamic=False)
    with torch._dynamo.utils.disable_cache_limit():
        for group in optimizer.param_groups:
            words = group["lr"], *group["betas"], group["weight_decay"], group["eps"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = optimizer.state[weight]
                if not state:
                    state["step"] = torch.zeros((), device=weight.device)
                    state.update({name: optimizer._new_buffer(weight, signed) for name, signed in MOMENTS})
                state["step"] = state["step"].to(weight.device)
                moments = [list(plain_parts(state[name])) for name, _ in MOMENTS]
                update(weight.detach(), weight.grad, state["step"], moments, skip, words)


def updated(
    weight: Tensor, gradient: Tensor, step: Tensor, moments: Sequence[list[Tensor]], skip: Tensor, words: Sequence[Any]
) -> None:
    """Update one weight, its count of steps and its moments, each a tensor or codes, scales and map, in their place."""
    rate, beta1, beta2, decay, eps = words
    is_kept = skip > 0
    count, gradient, value = step + 1, gradient.float(), weight.float()
    value = value - rate * decay * value
    mean = _values(moments[0], weight.shape).lerp(gradient, 1 - beta1)
    square = _values(moments[1], weight.shape).lerp(gradient.square(), 1 - beta2)
    root = square.sqrt() / (1 - beta2**count).sqrt() + eps
    value = value - rate * (mean / (1 - beta1**count)) / root
    for parts, moment in zip(moments, (mean, square), strict=True):
        for place, part in zip(parts, _stored(parts, moment), strict=False):  # the map stays
            place.copy_(torch.where(is_kept, place, part))
    step.copy_(torch.where(is_kept, step, count))
    weight.copy_(torch.where(is_kept, weight, value))


def _values(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """What a moment stands for, in float32."""
    from torchao.optim.quant_utils import dequant_with_qmap  # noqa: PLC0415 - where torchao is not, nobody gets here

    if len(parts) == 1:
        return parts[0].float()
    codes, scale, levels = parts
    if len(levels) == 16:
        codes = torch.stack([codes >> 4, codes & 0b1111], dim=-1)
    return dequant_with_qmap(codes, levels, scale).view(shape)


def _stored(parts: list[Tensor], values: Tensor) -> list[Tensor]:
    """The parts that stand for other values: the values, or codes and scales."""
    from torchao.optim.quant_utils import (  # noqa: PLC0415
        quantize_4bit_with_qmap,
        quantize_8bit_with_qmap,
        scale_tensor,
    )

    if len(parts) == 1:
        return [values]
    _, scale, levels = parts
    block = values.numel() // scale.numel()
    if len(levels) == 16:
        scaled, scale = scale_tensor(values.view(-1), block)
        codes = quantize_4bit_with_qmap(scaled, levels)
        return [(codes[::2] << 4) | codes[1::2], scale]
    scaled, scale = scale_tensor(values, block)
    return [quantize_8bit_with_qmap(scaled, levels), scale]


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
