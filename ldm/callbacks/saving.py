"""`last.ckpt`: written whole or not at all, every so many steps, on a signal, and when training ends for any reason."""

from __future__ import annotations

import importlib.util
import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.atomic import replacing
from ldm.checkpoint_files import check_header
from ldm.errors import UserError

log = logging.getLogger(__name__)


class StopRequested(Exception):  # noqa: N818 - nothing went wrong
    """Training was asked to stop, and what it had reached has been saved."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints under a temporary name first, so that a full disk or a kill leaves the old file as it was.

    They are read with `weights_only=True`, whatever Lightning asks for: a checkpoint never runs code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            writer = _RememberingWriter(file.write)
            try:
                torch.save(checkpoint, writer)
            except (OSError, RuntimeError) as error:
                raise (writer.error or error) from None
            file.flush()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        try:
            return self._load(path)
        except FileNotFoundError as error:
            raise UserError(f"{path}: there is no such checkpoint to resume from") from error
        except Exception as error:
            raise UserError(
                f"{path}: expected a checkpoint written by main.py, but it cannot be read ({_first_line(error)}). "
                "It may be half copied: resume from another file in the run's checkpoints folder"
            ) from error

    @staticmethod
    def _load(path: str | Path) -> dict[str, Any]:
        check_header(Path(path))
        # 8-bit optimiser states are a torchao class, known to torch.load only once torchao is imported.
        if importlib.util.find_spec("torchao") and any(
            name.startswith("torchao.") for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
        ):
            importlib.import_module("torchao.optim")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class _RememberingWriter:
    """torch.save turns a failed write into an error of its own; this keeps the first one, which says what happened."""

    def __init__(self, write: Callable[[Any], int]) -> None:
        self._write = write
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        pass


class LastCheckpoint(Checkpoint):
    """Writes `checkpoints/last.ckpt` in the run folder every `every_n_steps` optimiser steps and at the end.

    Ctrl-C finishes the step (or the validation) under way, saves and stops; a second Ctrl-C stops at once. SIGUSR1
    saves after the step and goes on. Any other end saves too, unless no step was taken. `config` goes into every
    checkpoint, so that the file alone is enough to sample from.
    """

    def __init__(self, folder: str, config: dict[str, Any], every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise UserError(f"LastCheckpoint: expected every_n_steps of at least 1, found {every_n_steps}")
        self.path = Path(folder) / "checkpoints" / "last.ckpt"
        self.config = config
        self.every_n_steps = every_n_steps
        self._saved_step: int | None = None
        self._step_seen = 0
        self._wants_stop = self._wants_save = False
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = self._step_seen = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number, handler in ((signal.SIGINT, self._on_interrupt), (signal.SIGUSR1, self._on_save_signal)):
                self._handlers[number] = signal.signal(number, handler)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step_seen:
            return  # between the micro-batches of an optimiser step
        before, step = self._step_seen, trainer.global_step
        self._step_seen = step
        is_due = step // self.every_n_steps > before // self.every_n_steps or 0 <= trainer.max_steps <= step
        if self._asked(trainer) or is_due:
            self._save(trainer)
        self._stop_if_asked()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit" and self._asked(trainer):
            self._save(trainer)
            self._stop_if_asked()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        if self._saved_step in (None, trainer.global_step) or isinstance(exception, (StopRequested, KeyboardInterrupt)):
            return
        try:
            self._save(trainer)
        except (OSError, RuntimeError) as error:
            log.warning("could not save %s: %s", self.path, error)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
        _forget_unfinished_step(trainer, checkpoint)

    def _save(self, trainer: pl.Trainer) -> None:
        self._wants_save = False
        self._saved_step = trainer.global_step
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path)
            log.info("saved %s at step %d", self.path, trainer.global_step)

    def _asked(self, trainer: pl.Trainer) -> bool:
        """Whether a signal has reached any of the processes; from then on all of them know."""
        if trainer.world_size > 1:
            self._wants_save = trainer.strategy.reduce_boolean_decision(self._wants_save, all=False)
            self._wants_stop = trainer.strategy.reduce_boolean_decision(self._wants_stop, all=False)
        return self._wants_save or self._wants_stop

    def _stop_if_asked(self) -> None:
        if self._wants_stop:
            raise StopRequested(f"stopped after step {self._saved_step}; saved {self.path}")

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._wants_stop:
            raise KeyboardInterrupt
        self._wants_stop = True
        log.warning("Ctrl-C: finishing this step, then saving. Once more stops at once, without saving")

    def _on_save_signal(self, number: int, frame: FrameType | None) -> None:
        self._wants_save = True

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def _forget_unfinished_step(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint written in the middle of an optimiser step say that its micro-batches are still to come.

    Their gradients are lost, and the data module repeats them. Lightning's own counters would go on after them; they
    are set to what they were when the last whole step had just ended, which Lightning resumes from exactly.
    """
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    current = progress["current"]
    unfinished = current["processed"] % trainer.accumulate_grad_batches
    if current["processed"] == trainer.num_training_batches:
        unfinished = 0  # Lightning steps on the last batch of an epoch
    if not unfinished and current["ready"] == current["processed"]:
        return
    at_step_end = int(current["processed"] > unfinished)  # else at the start of the epoch
    for counts in (progress["total"], current):
        counts["processed"] -= unfinished
        counts["ready"] = counts["started"] = counts["processed"]
        counts["completed"] = counts["processed"] - at_step_end
    progress["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= at_step_end


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
