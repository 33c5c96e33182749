"""The base of callbacks that act once per optimiser step, however many micro-batches it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl


class StepCallback(pl.Callback):
    """Calls `on_step_end` after the last micro-batch of each optimiser step.

    changes_training: whether a resumed run with another such callback, or without it, is another training.
    """

    changes_training = True
    _step_seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step_seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step_seen:
            self._step_seen = trainer.global_step
            self.on_step_end(trainer, pl_module, outputs, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch_idx: int) -> None:
        """The step `trainer.global_step` is over; `outputs` and `batch_idx` are those of its last micro-batch."""


class StepLogger(StepCallback):
    """A `StepCallback` that only observes: it may be changed or left out when a run is resumed."""

    changes_training = False


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float], step: int | None = None) -> None:
    """Give scalars to all loggers; step: None: the last one."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step if step is None else step)
