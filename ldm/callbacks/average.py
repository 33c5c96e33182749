"""A running average of the trained weights, as CompVis' EMA computes and names it, without copying frozen ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.checkpoint_names import AVERAGE_PREFIX, average_name
from ldm.errors import UserError


def average_key(name: str) -> str:
    """The checkpoint key of the average of a module's parameter, by the name Lightning knows it under."""
    if name.startswith("unet."):
        name = "diffusion_model." + name.removeprefix("unet.")
    return average_name(name)


class WeightAverage(pl.Callback):
    """Keeps average += (1 - d) (weight - average), d = min(decay, (1 + n) / (10 + n)), after the n-th optimiser step.

    Only parameters that are trained are averaged, in float32. The averages travel in the checkpoint's `state_dict` as
    `model_ema.*`. Validation and sample videos see the averaged weights.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"WeightAverage: expected a decay of at least 0 and below 1, found {decay}")
        self.decay = decay
        self.num_updates = 0
        self.averages: dict[str, Tensor] = {}
        self._step_seen = 0
        self._set_aside: dict[str, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(average.nbytes for average in self.averages.values())

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Take the trained weights of `module` into the average; the first call starts it."""
        weights = _trained(module)
        if not self.averages:
            self.averages = {name: weight.detach().float().clone() for name, weight in weights.items()}
            return
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = [self.averages[name] for name in weights]
        torch._foreach_lerp_(averages, [weight.float() for weight in weights.values()], 1 - decay)

    @contextmanager
    def applied(self, module: torch.nn.Module) -> Iterator[None]:
        """Put the averages in the place of the trained weights of `module` while the context lasts."""
        self._apply(module)
        try:
            yield
        finally:
            self._restore(module)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not getattr(pl_module, "keeps_averages", True):
            raise UserError(
                f"WeightAverage: the checkpoints of {type(pl_module).__name__} hold no averages; take the callback out "
                "of its config"
            )
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            raise UserError(
                "lightning.modelcheckpoint.params.save_weights_only: such a file would lack the averages; leave it "
                "out, or the averages with lightning.callbacks.average=null"
            )
        pl_module.register_load_state_dict_pre_hook(_strip)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.averages:  # from a checkpoint, read before the module was moved to its device
            weights = _trained(pl_module)
            self.averages = {name: self.averages[name].to(weight.device) for name, weight in weights.items()}
        else:
            self.update(pl_module)
        self._step_seen = trainer.global_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step_seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step_seen:
            self._step_seen = trainer.global_step
            self.update(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.averages:
            tensors = {average_key(name): average for name, average in self.averages.items()}
            tensors[AVERAGE_PREFIX + "decay"] = torch.tensor(self.decay, dtype=torch.float32)
            tensors[AVERAGE_PREFIX + "num_updates"] = torch.tensor(self.num_updates, dtype=torch.int32)
            checkpoint["state_dict"].update(tensors)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        tensors = checkpoint["state_dict"]
        if AVERAGE_PREFIX + "num_updates" not in tensors:
            return  # that run kept no average: it starts here
        names = {name: average_key(name) for name in _trained(pl_module)}
        missing = [name for name, key in names.items() if key not in tensors]
        if missing:
            raise UserError(
                f"the checkpoint holds no average of {len(missing)} of the {len(names)} trained weights, such as "
                f"{missing[0]}: it was written by a run that trained others. Resume with its own config"
            )
        self.num_updates = int(tensors[AVERAGE_PREFIX + "num_updates"])
        self.averages = {name: tensors[key].float().clone() for name, key in names.items()}

    def _apply(self, module: torch.nn.Module) -> None:
        if not self._set_aside and self.averages:
            for name, weight in _trained(module).items():
                self._set_aside[name] = weight.data
                weight.data = self.averages[name].to(weight)

    def _restore(self, module: torch.nn.Module) -> None:
        for name, weight in _trained(module).items():
            if name in self._set_aside:
                weight.data = self._set_aside.pop(name)


def _trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def _strip(module: torch.nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    """Averages are no weights of the module: take them out before it compares names."""
    for key in [key for key in state_dict if key.startswith(AVERAGE_PREFIX)]:
        del state_dict[key]
