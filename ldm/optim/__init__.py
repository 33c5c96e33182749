"""AdamW with states of 32, 8 or 4 bits, and the schedule of the learning rate.

torch's own AdamW, torchao's for 8 and 4 bits, or bitsandbytes' for 8. Where weights are stored in fewer bits, states
lie in host memory or steps are taken in the backward pass, it is given one weight at a time: `per_weight`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ldm.config import nearest
from ldm.errors import UserError
from ldm.optim.per_weight import HYPERPARAMETERS, MakeOptimizer, WeightByWeight, with_strides_of
from ldm.optim.skippable import skippable_step
from ldm.optim.stored_weights import StoredWeights

OPTIMIZERS = {"adamw": (), "adamw8bit": ("torchao", "bitsandbytes"), "adamw4bit": ("torchao",)}  # name -> libraries
STATES_ON = ("gpu", "host", "card")  # card: gpu in older configs
FUSED = ("cuda", "cpu")  # devices for which torch has a fused AdamW
OPTIONS = ("name", "weight_decay", "betas", "library", "states_on")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `UserError` unless `build_optimizer` takes these options here; quick, and before any training."""
    for option in options:
        if option not in OPTIONS:
            raise UserError(
                f"model.params.optimizer.{option}: expected one of {', '.join(OPTIONS)}; {nearest(option, OPTIONS)}"
            )
    build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}], **options)


def build_optimizer(
    groups: Sequence[Mapping[str, Any]],
    name: str = "adamw",
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    library: str | None = None,
    states_on: str = "gpu",
    weights: StoredWeights | None = None,
    in_backward: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over parameter groups, each with `params` and `lr`.

    name: "adamw" keeps its two averages in float32, 8 bytes a parameter; "adamw8bit" in blocks of 8-bit numbers, 2.04
        bytes a parameter (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"); "adamw4bit" in blocks
        of 4-bit numbers, 1.06 (Li et al. 2023, "Memory Efficient Optimizers with 4-bit States").
    library: "torchao" or "bitsandbytes" for quantised states; None: the first of them that is installed.
    states_on: "gpu": beside the weights; "host": in host memory, copied to the GPU for their weight's update.
    weights, in_backward: of `WeightByWeight`.
    """
    if not (isinstance(betas, Sequence) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise UserError(f"model.params.optimizer.betas: expected two numbers from 0 to below 1, found {betas!r}")
    if not (isinstance(weight_decay, int | float) and weight_decay >= 0):
        raise UserError(f"model.params.optimizer.weight_decay: expected a number from 0, found {weight_decay!r}")
    if states_on not in STATES_ON:
        raise UserError(f"model.params.optimizer.states_on: expected gpu or host, found {states_on!r}")
    groups = [dict(group) for group in groups]
    make = _maker(name, library, weight_decay, tuple(betas))
    if weights is None and not in_backward and states_on != "host":
        optimizer = make(groups)
        options = {key: optimizer.defaults[key] for key in HYPERPARAMETERS}
        optimizer.register_load_state_dict_post_hook(partial(_restore_hyperparameters, options=options))
        return optimizer
    return WeightByWeight(groups, make, weights, in_backward, on_host=states_on == "host")


class RateSchedule(LambdaLR):
    """A schedule that takes the step from a checkpoint, and the learning rates from the config."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        shares = [share(self.last_epoch) for share in self.lr_lambdas]
        self._last_lr = [float(rate) * share for rate, share in zip(self.base_lrs, shares, strict=True)]
        for group, base, rate in zip(self.optimizer.param_groups, self.base_lrs, self._last_lr, strict=True):
            group["initial_lr"] = base
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def with_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, cooldown_steps: int = 0, total_steps: int = -1
) -> dict[str, Any]:
    """The optimiser with linear warm-up, constant rate and linear cool-down, as `configure_optimizers` returns it.

    The last of `total_steps` optimiser steps is made at 1 / cooldown_steps of the rate (Haegele et al. 2024, "Scaling
    Laws and Compute-Optimal Training Beyond Fixed Training Durations"): a run that is resumed with more steps continues
    at the full rate, and cools down later. Raises UserError where the run is shorter, or has no last step.
    """
    if cooldown_steps and total_steps < cooldown_steps:
        raise UserError(
            f"model.params.cooldown_steps: expected at most lightning.trainer.max_steps, found {cooldown_steps} with "
            f"max_steps {total_steps}; set how long the run is, or leave cooldown_steps out"
        )

    def share(step: int) -> float:
        rise = (step + 1) / max(1, warmup_steps)
        fall = (total_steps - step) / cooldown_steps if cooldown_steps else 1.0
        return max(0.0, min(1.0, rise, fall))

    schedule = RateSchedule(optimizer, share)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _maker(name: str, library: str | None, weight_decay: float, betas: tuple[float, float]) -> MakeOptimizer:
    """A function that builds the optimiser over groups; raises `UserError` for an unknown name or missing library."""
    if name not in OPTIMIZERS:
        raise UserError(f"model.params.optimizer.name: expected one of {', '.join(OPTIMIZERS)}, found '{name}'")
    libraries = OPTIMIZERS[name]
    if library is not None and library not in libraries:
        raise UserError(
            f"model.params.optimizer.library: expected {' or '.join(libraries) or 'none'} for {name}, found '{library}'"
        )
    options = {"weight_decay": weight_decay, "betas": betas}
    if not libraries:
        return lambda groups: _adamw(groups, options)
    failures = []
    for candidate in libraries if library is None else [library]:
        try:
            module = importlib.import_module(f"{candidate}.optim")
        except (ImportError, OSError) as error:
            failures.append(f"{candidate}, which does not import here ({error})")
            continue
        kind = getattr(module, {"adamw8bit": "AdamW8bit", "adamw4bit": "AdamW4bit"}[name])
        kind = _skippable(kind) if candidate == "torchao" else kind
        return lambda groups: kind(groups, lr=groups[0]["lr"], **options)
    raise UserError(
        f"model.params.optimizer.name: '{name}' needs the package {', or '.join(failures)}; pip install "
        f"{library or libraries[0]}, or set the name to adamw"
    )


def _adamw(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.AdamW:
    """Fused AdamW: the step over lists of tensors copies all weights, and takes four times as long on a CPU."""
    is_fusible = groups[0]["params"][0].device.type in FUSED
    optimizer = torch.optim.AdamW(groups, fused=is_fusible, **options)
    optimizer.register_load_state_dict_post_hook(_match_strides)
    optimizer._step_supports_amp_scaling = False  # otherwise Lightning refuses to clip, even without a gradient scaler
    return optimizer


def _restore_hyperparameters(optimizer: torch.optim.Optimizer, options: Mapping[str, Any]) -> None:
    """`load_state_dict` overwrites weight decay and betas with the checkpoint's; restore the config's."""
    for group in optimizer.param_groups:
        group.update(options)


def _match_strides(optimizer: torch.optim.Optimizer) -> None:
    """Fused AdamW requires states with the parameter's strides."""
    for weight, state in optimizer.state.items():
        state.update({name: with_strides_of(weight, value) for name, value in state.items()})


def _skippable(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of torchao's optimiser that takes `found_inf` as torch's fused ones do, and runs uncompiled on CPUs.

    torchao compiles its step, which on a CPU needs a C++ compiler.
    """

    class SkippableCPUOptimizer(kind):
        found_inf: torch.Tensor | None = None  # where it is 1, a step changes nothing

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
            with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                if self.found_inf is None:
                    super().step()
                else:
                    skippable_step(self, self.found_inf)
            return loss

        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            for group in self.param_groups:  # `WeightByWeight` writes numbers
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)

    SkippableCPUOptimizer.__name__ = SkippableCPUOptimizer.__qualname__ = kind.__name__
    return SkippableCPUOptimizer
