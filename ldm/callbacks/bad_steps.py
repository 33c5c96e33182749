"""Bad optimiser steps are skipped, counted and recorded with their clips; too many end the run."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.callbacks.steps import StepCallback, log_metrics
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.optim.per_weight import WeightByWeight
from ldm.optim.skippable import StepGuard, skips_by_itself

log = logging.getLogger(__name__)
FILE = "skipped_steps.jsonl"


class BadStepsError(UserError):
    """Too many bad steps. The weights are those of the last good step; no checkpoint is written."""


@dataclass
class _Step:
    """A step whose verdict is not on the host yet. number: of optimiser steps, this one included."""

    number: int
    verdict: Tensor  # is bad, loss, norm of the gradients, mean of recent losses
    is_copied: torch.cuda.Event | None
    batches: list[Any]  # the micro-batches, without their tensors
    rates: list[float]

    def read(self) -> list[float]:
        if self.is_copied is not None:
            self.is_copied.synchronize()
        return self.verdict.tolist()


class SkipBadSteps(StepCallback):
    """Skips optimiser steps whose loss or gradients are not finite, or whose loss is far above the recent ones.

    A skipped step changes no weight, average or optimiser state. Step counter, learning rate, data position and the
    draws of stochastic rounding advance: checkpoints, validation and the end of the run keep their steps. With several
    micro-batches or processes the mean of their losses counts, and all skip together.

    Logs `train/skipped_steps` (so far) and `train/gradient_norm` (before clipping). Each skipped step is a line of
    `skipped_steps.jsonl` in the run folder: clips (source, frames, caption), loss, mean of recent losses, gradient
    norm, largest weight, learning rates. Too many raise `BadStepsError`, and no checkpoint is written.

    On a GPU the optimiser reads the verdict there (`skips_by_itself`) and the host a step later. With other optimisers,
    such as bitsandbytes', and with sharded weights the host waits for the verdict. With updates in the backward pass
    the loss is checked before it and each gradient in it: weights updated before the first bad gradient stay updated.
    With float16, Lightning's gradient scaling skips steps whose gradients are not finite. Models with manual
    optimisation are not guarded.

    folder: of the run; filled in by main.py.
    factor: a loss above this multiple of the mean of recent ones is a spike; None: no loss is.
    window: number of recent losses, of steps that were taken.
    most_in_row, most_in_all: numbers of skipped steps that end the run.
    """

    def __init__(
        self,
        folder: str,
        factor: float | None = 20.0,
        window: int = 100,
        most_in_row: int = 10,
        most_in_all: int = 1000,
    ) -> None:
        if factor is not None and not (isinstance(factor, int | float) and factor > 1):
            raise UserError(f"SkipBadSteps: expected a factor above 1, or null for none, found {factor!r}")
        for name, value in (("window", window), ("most_in_row", most_in_row), ("most_in_all", most_in_all)):
            if type(value) is not int or value < 1:
                raise UserError(f"SkipBadSteps: expected {name} to be a whole number of at least 1, found {value!r}")
        self.folder, self.path, self.factor, self.window = Path(folder), Path(folder) / FILE, factor, window
        self.most_in_row, self.most_in_all = most_in_row, most_in_all
        self.in_row = self.in_all = 0
        self.taken: bool | Tensor = True  # the last step; on a GPU a tensor, 1 or 0
        self._losses: Tensor | None = None
        self._judge: StepGuard | None = None
        self._waits = True
        self._loss: Tensor | None = None
        self._early: Tensor | None = None  # the verdict before a backward pass that updates weights
        self._batches: list[Any] = []
        self._unread: deque[_Step] = deque()
        self._stop: BadStepsError | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not pl_module.automatic_optimization:
            return
        self._judge = StepGuard(self.factor, self.window, pl_module.device)
        if self._losses is not None:
            kept = self._losses[-self.window :].to(pl_module.device)
            self._judge.losses[len(self._judge.losses) - len(kept) :] = kept
        self._waits = must_wait(trainer.optimizers[0])
        if self._waits and pl_module.device.type != "cpu":
            log.info(
                "each step waits for its verdict: %s cannot skip steps on the GPU", type(trainer.optimizers[0]).__name__
            )
        if trainer.is_global_zero and self.path.exists():  # lines that this run writes again
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept_lines = [line for line in lines if json.loads(line)["step"] <= trainer.global_step]
            write_atomically(self.path, "".join(kept_lines))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append(batch.outline() if hasattr(batch, "outline") else None)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._judge is None:
            return
        scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None)
        loss = loss.detach() if scale is None else loss.detach() / scale
        self._loss = loss if self._loss is None else self._loss + loss
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, WeightByWeight) and optimizer.in_backward:
            self._early = self._judge.verdict(self._loss, torch.zeros_like(self._loss))
            optimizer.found_inf, optimizer.squared_norm, optimizer.reads_found_inf = self._early[0], None, self._waits

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._judge is None:
            return
        if self._early is not None:
            norm = torch.zeros_like(self._loss) if optimizer.squared_norm is None else optimizer.squared_norm.sqrt()
            verdict = torch.stack([optimizer.found_inf, self._early[1], norm, self._early[3]])
            optimizer.found_inf = optimizer.squared_norm = self._early = None
        else:
            verdict = self._judge.verdict(self._mean_loss(trainer), self._norm(trainer, pl_module, optimizer))
            if not self._waits:
                optimizer.found_inf = verdict[0]
        self._apply(pl_module, verdict)
        groups = optimizer.param_groups
        self._unread.append(
            _Step(
                trainer.global_step + 1, *_async_copy_to_host(verdict), self._batches, [float(g["lr"]) for g in groups]
            )
        )
        self._batches, self._loss = [], None

    def _mean_loss(self, trainer: pl.Trainer) -> Tensor:
        if trainer.world_size == 1:
            return self._loss
        return trainer.strategy.reduce(self._loss.clone(), reduce_op="mean")

    @staticmethod
    def _norm(trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> Tensor:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if not gradients or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return torch.zeros((), device=pl_module.device)
        norm = torch.nn.utils.get_total_norm(gradients)
        if hasattr(pl_module, "gradient_norm"):
            pl_module.gradient_norm = norm  # which clipping wants too
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _apply(self, pl_module: pl.LightningModule, verdict: Tensor) -> None:
        if not self._waits:
            self.taken = 1 - verdict[0]
            return
        self.taken = not bool(verdict[0])
        if not self.taken:
            for weight in pl_module.parameters():
                weight.grad = None  # optimisers pass over such weights

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch_idx: int) -> None:
        while len(self._unread) > (0 if self._waits else 1):
            self._read(trainer, pl_module)
        if self._stop is not None:
            raise self._stop

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read_all(trainer, pl_module)
        if self._stop is not None:
            raise self._stop

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._read_all(trainer, pl_module)
        if self._judge is not None:
            losses = self._judge.losses.cpu()
            checkpoint["skipped_steps"] = {"losses": losses, "in_row": self.in_row, "in_all": self.in_all}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kept = checkpoint.get("skipped_steps")
        if kept is not None:
            self._losses, self.in_row, self.in_all = kept["losses"], kept["in_row"], kept["in_all"]

    def _read_all(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        while self._unread:
            self._read(trainer, pl_module)

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the oldest unread step; a skipped one is recorded."""
        step = self._unread.popleft()
        is_bad, loss, norm, mean = step.read()
        self.in_row = self.in_row + 1 if is_bad else 0
        self.in_all += int(is_bad)
        if step.number % trainer.log_every_n_steps == 0:
            metrics = {"train/skipped_steps": self.in_all, "train/gradient_norm": norm}
            log_metrics(trainer, metrics, step=step.number)
        if not is_bad:
            return
        reason = self._reason(loss, norm, mean)
        clips = _of_all_processes(_described(trainer, step.batches))
        if trainer.is_global_zero:
            record = {
                "step": step.number, "reason": reason, "loss": loss, "mean_of_recent": mean, "factor": self.factor,
                "gradient_norm": norm, "largest_weight": _largest(pl_module), "learning_rates": step.rates,
                "in_row": self.in_row, "in_all": self.in_all, "clips": clips,
            }  # fmt: skip
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(record)) + "\n")
            log.warning("step %d was skipped: %s; %d in all, see %s", step.number, reason, self.in_all, self.path)
        for name, found, most in (
            ("most_in_row", self.in_row, self.most_in_row), ("most_in_all", self.in_all, self.most_in_all)
        ):  # fmt: skip
            if found >= most:
                self._stop = BadStepsError(
                    f"step {step.number}: expected fewer than {most} skipped steps "
                    f"{'in a row' if name == 'most_in_row' else 'in all'}, found {found}, the last because "
                    f"{reason}. {self.path} names their clips; the last good checkpoint was not overwritten. "
                    f"Lower model.base_learning_rate, remove those clips or raise "
                    f"lightning.callbacks.skip_bad_steps.params.{name}, and resume with -r {self.folder}"
                )

    def _reason(self, loss: float, norm: float, mean: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.factor is not None and loss > self.factor * mean:
            return f"the loss is {loss:.4g}, above {self.factor:g} times {mean:.4g}, the mean of the recent ones"
        return f"the norm of the gradients is {norm}, at a loss of {loss:.4g}"


def must_wait(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the host reads the verdict before the optimiser's step; on a CPU it always does."""
    weight = optimizer.param_groups[0]["params"][0]
    return weight.device.type == "cpu" or not skips_by_itself(optimizer)


def _async_copy_to_host(verdict: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in host memory and the event that marks its end; None on a CPU."""
    if verdict.device.type != "cuda":
        return verdict, None
    copy = verdict.to("cpu", non_blocking=True)
    return copy, torch.cuda.current_stream(verdict.device).record_event()


def _described(trainer: pl.Trainer, batches: list[Any]) -> list[dict[str, Any]]:
    """The clips of some batches, as the data describes them."""
    describe = getattr(getattr(trainer.datamodule, "train_clips", None), "describe", None)
    if describe is None:
        return []
    return [clip for batch in batches if batch is not None for clip in describe(batch)]


def _of_all_processes(clips: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return clips
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, clips)
    return [clip for part in found for clip in part]


def _largest(module: pl.LightningModule) -> dict[str, Any]:
    """The largest of the trained weights in magnitude."""
    largest = {"name": None, "value": -1.0}
    for name, weight in module.named_parameters():
        if weight.requires_grad and weight.numel():
            part = weight.detach().to_local() if hasattr(weight, "to_local") else weight.detach()
            value = float(part.abs().max()) if part.numel() else 0.0
            if not value <= largest["value"]:
                largest = {"name": name, "value": value}
    return largest


def _plain(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
