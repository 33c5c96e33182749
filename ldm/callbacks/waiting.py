"""How much of the time training waits for its data."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl

from ldm.data.stream import StreamLoader


class DataWait(pl.Callback):
    """Logs `train/data_wait`: the share, from 0 to 1, of the time of the last steps that went by before a batch was
    there; validation, samples and saving are no part of it.

    Only the clock of the training process is read: nothing waits for a device, and on a card, whose work is queued, the
    share is the most it can be. Start-up, up to the first batch, is left out. `share` is that of the run so far, None
    before the second batch and where a data module has a loader of its own kind.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._waited_before = self._step_seconds = self._wait_seconds = 0.0
        self._logged = (0.0, 0.0)  # seconds of waiting and of steps at the last line
        self._step_seen = 0

    @property
    def share(self) -> float | None:
        total = self._wait_seconds + self._step_seconds
        return self._wait_seconds / total if self._wait_seconds else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began, self._step_seen = None, trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        loader = trainer.train_dataloader
        if not isinstance(loader, StreamLoader):
            return
        if self._began is not None:
            self._wait_seconds += loader.waited - self._waited_before
        self._waited_before, self._began = loader.waited, time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._began is None:
            return
        self._step_seconds += time.perf_counter() - self._began
        if trainer.global_step == self._step_seen:
            return
        self._step_seen = trainer.global_step
        if trainer.global_step % trainer.log_every_n_steps == 0:
            waited, stepped = (now - then for now, then in zip(self._totals, self._logged, strict=True))
            self._logged = self._totals
            for logger in trainer.loggers:
                logger.log_metrics({"train/data_wait": waited / (waited + stepped)}, step=trainer.global_step)

    @property
    def _totals(self) -> tuple[float, float]:
        return self._wait_seconds, self._step_seconds
