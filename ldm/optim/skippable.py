"""Whether an optimiser step is taken, decided on the device: nothing here reads a number from it.

A step is skipped when its loss or gradients are not finite, or when its loss is far above the recent ones. The verdict
is a tensor, `found_inf` as torch calls it: an optimiser that finds 1 leaves weights, states and counters unchanged.

torchao's optimisers have no such argument. Calling their step only after the host has read the verdict would wait for
the GPU, and restoring weights and states afterwards would read and write all of them again; so their step is repeated
here, operation by operation, with the choice fused into the same kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.optim.per_weight import WeightByWeight, plain_parts

MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))  # and whether they are signed
LEAST_LOSSES = 20  # before a loss can be called a spike


@torch.no_grad()
def skippable_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """torchao's AdamW step with `found_inf`: the update is discarded when `skip` is 1.

    optimizer: torchao's AdamW with 8 or 4 bits. Steps are counted on the device.
    """
    update = torch.compile(update_weight, fullgraph=True, dynamic=False)
    with torch._dynamo.utils.disable_cache_limit():
        for group in optimizer.param_groups:
            options = group["lr"], *group["betas"], group["weight_decay"], group["eps"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = optimizer.state[weight]
                if not state:
                    state["step"] = torch.zeros((), device=weight.device)
                    state.update({name: optimizer._new_buffer(weight, signed) for name, signed in MOMENTS})
                state["step"] = state["step"].to(weight.device)
                moments = [list(plain_parts(state[name])) for name, _ in MOMENTS]
                update(weight.detach(), weight.grad, state["step"], moments, skip, options)


def update_weight(
    weight: Tensor,
    gradient: Tensor,
    step: Tensor,
    moments: Sequence[list[Tensor]],
    skip: Tensor,
    options: Sequence[Any],
) -> None:
    """Update a weight, its step counter and its moments in place; a moment is a tensor, or codes, scales and map."""
    rate, beta1, beta2, decay, eps = options
    is_kept = skip > 0
    count, gradient, value = step + 1, gradient.float(), weight.float()
    value = value - rate * decay * value
    mean = _dequantized(moments[0], weight.shape).lerp(gradient, 1 - beta1)
    square = _dequantized(moments[1], weight.shape).lerp(gradient.square(), 1 - beta2)
    root = square.sqrt() / (1 - beta2**count).sqrt() + eps
    value = value - rate * (mean / (1 - beta1**count)) / root
    for parts, moment in zip(moments, (mean, square), strict=True):
        for old, new in zip(parts, _quantized(parts, moment), strict=False):  # the map stays
            old.copy_(torch.where(is_kept, old, new))
    step.copy_(torch.where(is_kept, step, count))
    weight.copy_(torch.where(is_kept, weight, value))


def _dequantized(parts: list[Tensor], shape: torch.Size) -> Tensor:
    from torchao.optim import quant_utils  # noqa: PLC0415 - only where torchao is installed

    if len(parts) == 1:
        return parts[0].float()
    codes, scale, levels = parts
    if len(levels) == 16:
        codes = torch.stack([codes >> 4, codes & 0b1111], dim=-1)
    return quant_utils.dequant_with_qmap(codes, levels, scale).view(shape)


def _quantized(parts: list[Tensor], values: Tensor) -> list[Tensor]:
    """The values, or their codes and scales where `parts` are quantised."""
    from torchao.optim import quant_utils  # noqa: PLC0415

    if len(parts) == 1:
        return [values]
    _, scale, levels = parts
    is_4bit = len(levels) == 16
    scaled, scale = quant_utils.scale_tensor(values.view(-1) if is_4bit else values, values.numel() // scale.numel())
    if is_4bit:
        codes = quant_utils.quantize_4bit_with_qmap(scaled, levels)
        return [(codes[::2] << 4) | codes[1::2], scale]
    return [quant_utils.quantize_8bit_with_qmap(scaled, levels), scale]


class StepGuard:
    """Compares the loss of each step with the mean of the recent losses of steps that were taken.

    factor: a loss above so many times that mean is a spike; None: only losses and gradients that are not finite count.
    window: number of losses in the mean; with fewer than `LEAST_LOSSES`, or than the window, no loss is a spike.

    `losses`: `window`, float32, the newest last, NaN where there is none yet. It is the whole state.
    """

    def __init__(self, factor: float | None, window: int, device: torch.device | str) -> None:
        self.factor, self.least = factor, min(LEAST_LOSSES, window)
        self.losses = torch.full((window,), float("nan"), device=device)

    @torch.no_grad()
    def verdict(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Loss and norm of a step -> `4`: 1 to skip it or 0; the loss; the norm; the mean, NaN with too few losses."""
        loss, gradient_norm = loss.detach().float().reshape(()), gradient_norm.detach().float().reshape(())
        is_known = ~self.losses.isnan()
        count = is_known.sum()
        mean = torch.where(is_known, self.losses, 0).sum() / torch.where(count >= self.least, count, float("nan"))
        is_bad = ~(loss.isfinite() & gradient_norm.isfinite())
        if self.factor is not None:
            is_bad = is_bad | (loss > self.factor * mean)  # never above NaN
        self.losses = torch.where(is_bad, self.losses, torch.cat([self.losses[1:], loss[None]]))
        return torch.stack([is_bad.float(), loss, gradient_norm, mean])


class ClipsByKnownNorm:
    """Mixin of a LightningModule: clips gradients as Lightning does, with a norm that was already computed.

    `gradient_norm`: of the current step before clipping, set by the step guard; None: Lightning computes it.
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


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser leaves weights, states and counters unchanged where its `found_inf` is 1.

    True for torch's fused AdamW and for torchao's optimisers from `build_optimizer`; False for sharded weights.
    """
    if isinstance(optimizer, WeightByWeight):
        return skips_by_itself(optimizer.inner)
    if any(hasattr(weight, "full_tensor") for group in optimizer.param_groups for weight in group["params"]):
        return False
    is_fused = isinstance(optimizer, torch.optim.Adam) and all(group.get("fused") for group in optimizer.param_groups)
    return is_fused or hasattr(type(optimizer), "found_inf")
