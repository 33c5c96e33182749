"""Lines about a run: where its memory goes, and how far it has got where there is no terminal for a progress bar."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar

from ldm.callbacks.average import WeightAverage
from ldm.callbacks.waiting import DataWait
from ldm.devices import peak_memory
from ldm.errors import UserError
from ldm.models.diffusion.weight_by_weight import WeightByWeight, state_bytes

log = logging.getLogger(__name__)
MIB = 2**20


class MemoryReport(pl.Callback):
    """Logs the bytes of weights, gradients, optimiser states and averages, and the peak, at the start and after the
    first optimiser step: one line each, and scalars `memory/*` in MiB. A resumed run only has the lines.

    Weights are as they are stored, the lower bits of split ones included. Of gradients that are dropped in the backward
    pass the largest counts. `in host memory` is what of the states and averages a card does not hold.
    """

    def __init__(self) -> None:
        self._gradients = 0
        self._first_step: int | None = None
        self._is_new_run = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = trainer.global_step + 1
        self._is_new_run = trainer.global_step == 0
        self._report(trainer, pl_module, "before the first step")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step + 1 == self._first_step:
            gradients = [weight.grad for weight in pl_module.parameters() if weight.grad is not None]
            in_backward = isinstance(optimizer, WeightByWeight) and optimizer.in_backward
            self._gradients = optimizer.largest_gradient if in_backward else sum(g.nbytes for g in gradients)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._first_step:
            self._first_step = None
            self._report(trainer, pl_module, "after the first step")

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str) -> None:
        weights = {True: 0, False: 0}
        for weight in pl_module.parameters():
            weights[weight.requires_grad] += weight.nbytes
        averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)]
        stored = getattr(pl_module, "stored_weights", None)
        sizes = {
            "weights_trained": weights[True] + (0 if stored is None else stored.num_bytes),
            "weights_frozen": weights[False],
            "gradients": self._gradients,
            "optimiser_states": sum(map(state_bytes, trainer.optimizers)),
            "average": sum(callback.num_bytes for callback in averages),
            "peak": peak_memory(pl_module.device),
        }
        if pl_module.device.type != "cpu":
            states = sum(state_bytes(o) for o in trainer.optimizers if isinstance(o, WeightByWeight) and o.on_host)
            sizes["in_host_memory"] = states + sum(c.num_bytes for c in averages if c.in_host_memory)
        kind = "on the card" if pl_module.device.type == "cuda" else "of the process"
        words = ", ".join(f"{name.replace('_', ' ')} {size / MIB:,.0f}" for name, size in sizes.items())
        log.info("memory %s, MiB: %s %s", when, words, kind)
        for logger in trainer.loggers if self._is_new_run else ():
            logger.log_metrics({f"memory/{name}": size / MIB for name, size in sizes.items()}, step=trainer.global_step)


class ProgressLines(pl.Callback):
    """Step, epoch, loss, rate and time left as a log line, at most every `every_seconds`: for logs, not terminals."""

    def __init__(self, every_seconds: float = 30.0) -> None:
        if every_seconds < 0:
            raise UserError(f"ProgressLines: expected every_seconds of at least 0, found {every_seconds}")
        self.every_seconds = every_seconds
        self._start_step = self._step_seen = 0
        self._start_time = self._last_line = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_step = self._step_seen = trainer.global_step
        self._start_time = time.monotonic()
        self._last_line = float("-inf")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        last = _last_step(trainer)
        if step == self._step_seen or (now - self._last_line < self.every_seconds and step != last):
            return
        self._step_seen, self._last_line = step, now
        seconds = (now - self._start_time) / (step - self._start_step)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        words = [f"step {step}/{last}" if last else f"step {step}", f"epoch {trainer.current_epoch}"]
        shown = trainer.progress_bar_metrics if loss is None else {"loss": float(loss)}
        words += [f"{name} {value:.4f}" for name, value in shown.items()]
        words += [f"{seconds:.2f} s/step" if seconds > 0.5 else f"{1 / seconds:.1f} steps/s"]
        waits = [callback.share for callback in trainer.callbacks if isinstance(callback, DataWait)]
        words += [f"{share:.1%} waiting for data" for share in waits if share is not None]
        words += [f"{timedelta(seconds=round(seconds * (last - step)))} left"] if last else []
        log.info("%s", ", ".join(words))


class ProgressBar(RichProgressBar):
    """Lightning's bar without the number of the last epoch, which steps limit, and the logger's version.

    Losses are read from the card at most every `seconds_between_readings`, since reading waits for it; in between the
    last ones are shown.
    """

    seconds_between_readings = 2.0

    def __init__(self) -> None:
        super().__init__()
        self._metrics: dict[str, Any] = {}
        self._read_at = float("-inf")

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        if time.monotonic() - self._read_at >= self.seconds_between_readings:
            metrics = super().get_metrics(trainer, pl_module)
            self._metrics = {name: metrics[name] for name in metrics if name != "v_num"}
            self._read_at = time.monotonic()
        return {"step": str(trainer.global_step), **self._metrics}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"


def _last_step(trainer: pl.Trainer) -> int | None:
    """The step at which training will end; None when nothing limits it."""
    if trainer.max_steps >= 0:
        return trainer.max_steps
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return None
    return trainer.max_epochs * -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
