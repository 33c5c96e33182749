"""AdamW with 32-bit or 8-bit states, and how the learning rate rises and falls (torch, and torchao for 8 bits)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ldm.config import nearest
from ldm.errors import UserError

OPTIMIZERS = ("adamw", "adamw8bit")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `UserError` unless `build_optimizer` takes these options here; quick, and before any training."""
    accepted = list(inspect.signature(build_optimizer).parameters)[1:]
    for option in options:
        if option not in accepted:
            raise UserError(
                f"model.params.optimizer.{option}: expected one of {', '.join(accepted)}; did you mean "
                f"'{nearest(option, accepted)}'?"
            )
    build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}], **options)


def build_optimizer(
    groups: Sequence[Mapping[str, Any]],
    name: str = "adamw",
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over parameter groups, each with `params` and `lr`.

    name: "adamw" keeps its two averages in float32, 8 bytes a parameter; "adamw8bit" in blocks of 8-bit numbers, 2.04
        bytes a parameter (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").
    """
    if not (isinstance(betas, Sequence) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise UserError(f"model.params.optimizer.betas: expected two numbers from 0 to below 1, found {betas!r}")
    if not (isinstance(weight_decay, int | float) and weight_decay >= 0):
        raise UserError(f"model.params.optimizer.weight_decay: expected a number from 0, found {weight_decay!r}")
    groups = [dict(group) for group in groups]
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=weight_decay, betas=tuple(betas))
    if name == "adamw8bit":
        return _adamw_8bit(groups, weight_decay, tuple(betas))
    raise UserError(f"model.params.optimizer.name: expected one of {', '.join(OPTIMIZERS)}, found '{name}'")


def rate_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, cooldown_steps: int = 0, total_steps: int = -1
) -> LambdaLR:
    """A schedule that raises the learning rate linearly over the first steps, keeps it, and lowers it over the last.

    The last of `total_steps` optimiser steps is made at 1 / cooldown_steps of the rate (Haegele et al. 2024, "Scaling
    Laws and Compute-Optimal Training Beyond Fixed Training Durations"): a run that is taken up again with more steps
    goes on at the full rate, and cools down later. Raises UserError where the run is shorter, or has no last step.
    """
    if cooldown_steps and total_steps < cooldown_steps:
        raise UserError(
            f"model.params.cooldown_steps: expected at most lightning.trainer.max_steps, found {cooldown_steps} with "
            f"max_steps {total_steps}; say how long the run is, or leave cooldown_steps out"
        )

    def share(step: int) -> float:
        rise = (step + 1) / max(1, warmup_steps)
        fall = (total_steps - step) / cooldown_steps if cooldown_steps else 1.0
        return max(0.0, min(1.0, rise, fall))

    return LambdaLR(optimizer, share)


def _adamw_8bit(groups: list[dict[str, Any]], weight_decay: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise UserError(
            f"model.params.optimizer.name: 'adamw8bit' needs the package torchao, which does not import here ({error});"
            " pip install torchao, or set the name to adamw"
        ) from error

    class AdamW8bitAnywhere(AdamW8bit):
        """torchao compiles its step with a C++ compiler where there is no GPU; here it runs there uncompiled."""

        def step(self, closure: Any = None) -> Any:
            on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
            with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                return super().step(closure)

    return AdamW8bitAnywhere(groups, lr=groups[0]["lr"], weight_decay=weight_decay, betas=betas)
