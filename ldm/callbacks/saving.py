"""`last.ckpt`, written between two steps: a run resumed from it is bit for bit the run that was never stopped."""

from __future__ import annotations

import importlib.util
import logging
import signal
import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.callbacks.bad_steps import BadStepsError
from ldm.callbacks.resuming import (
    cut_logs,
    flushed_logs,
    forget_unfinished_step,
    generators,
    of_all_processes,
    set_generators,
)
from ldm.checkpoint.files import check_header
from ldm.errors import UserError
from ldm.files import replacing
from ldm.optim.per_weight import WeightByWeight
from ldm.runs.last_checkpoints import LAST, check_room, publish

log = logging.getLogger(__name__)

FRESH = ".fresh.ckpt"  # until it is whole and renamed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Moment(Enum):
    """Where training is, as far as saving cares."""

    BETWEEN_STEPS = "the last optimiser step is over, with its logs, samples and validation"
    IN_STEP = "gradients of the next step are computed; weights and states are those of the last step"
    CHANGING = "weights or states may be half updated"
    VALIDATING = "weights may be the averages"


class StopRequested(Exception):  # noqa: N818 - not an error
    """Training stopped after a signal (`signal`), and its last step has been saved."""

    def __init__(self, message: str, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = number


class LastCheckpoint(Checkpoint):
    """Writes `checkpoints/last.ckpt` in the run folder every `every_n_steps` optimiser steps and at the end.

    It is written after the logs, samples and validation of a step: a resumed run repeats nothing and omits nothing. On
    resume, later entries of the logs are cut off. `keep_last` files are kept in all, the earlier ones as `last-1.ckpt`
    and so on. A failed save is logged as an error and the next one is tried; only the last save of a run raises.

    Ctrl-C, SIGTERM and SIGUSR1 finish the step (or the validation), save and stop; a second Ctrl-C stops at once. After
    an error the last whole step is saved, unless weights may have changed since.

    saved_config: goes into every checkpoint, which is then enough to sample from.
    """

    changes_training = False

    def __init__(self, folder: str, saved_config: dict[str, Any], every_n_steps: int = 500, keep_last: int = 2) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep_last", keep_last)):
            if value < 1:
                raise UserError(f"LastCheckpoint: expected {name} of at least 1, found {value}")
        self.folder = Path(folder)
        self.path = self.folder / "checkpoints" / LAST
        self.config = saved_config
        self.every_n_steps, self.keep_last = every_n_steps, keep_last
        self._began = time.time()
        self._saved_step: int | None = None
        self._step_seen = 0
        self._is_due = self._has_ended = False
        self._moment = self._before_validation = Moment.BETWEEN_STEPS
        self._to_restore: dict[str, Any] | None = None
        self._before: dict[str, Any] = {}  # generators and logs between the last two steps
        self._stop_signal: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not any(isinstance(callback, _BetweenSteps) for callback in trainer.callbacks):
            trainer.callbacks.insert(0, _BetweenSteps(self))  # before the next step logs anything

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._to_restore = checkpoint.get("between_steps")  # absent in files of earlier versions
        if self._to_restore is not None and trainer.is_global_zero and not trainer.fast_dev_run:
            if num_bytes := cut_logs(self.folder, self._to_restore["logs"], self._began):
                step = checkpoint["global_step"]
                log.info("removed %d bytes of logs after step %d, which are written again", num_bytes, step)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None and trainer.is_global_zero and not trainer.fast_dev_run:
            cut_logs(self.folder, {}, self._began)  # of a run killed before it saved
        if hasattr(pl_module, "config") and "model" in self.config:  # not the one that reads from a checkpoint
            pl_module.config = self.config

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = self._step_seen = trainer.global_step
        self._moment = Moment.BETWEEN_STEPS
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, self._on_signal)

    def between_steps(self, trainer: pl.Trainer) -> None:
        """Save if it is due, stop if asked, and keep the generators for a save within the next step."""
        if self._moment is not Moment.BETWEEN_STEPS:
            return  # between the micro-batches of an optimiser step
        if self._to_restore is not None:
            self._restore(trainer, self._to_restore)
        if self._asked(trainer) or self._is_due:
            if self._saved_step != trainer.global_step:
                self._save(trainer)
            self._stop_if_asked()
        self._before = {"generators": generators()}
        if trainer.log_every_n_steps and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            self._before["logs"] = flushed_logs(trainer, self.folder, fsync=False)  # more follow in this step
        self._moment = Moment.IN_STEP

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if any(isinstance(optimizer, WeightByWeight) and optimizer.in_backward for optimizer in trainer.optimizers):
            self._moment = Moment.CHANGING

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._moment = Moment.CHANGING

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step_seen:
            return
        before, step = self._step_seen, trainer.global_step
        self._step_seen = step
        self._moment = Moment.BETWEEN_STEPS
        self._is_due = self._is_due or step // self.every_n_steps > before // self.every_n_steps

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before_validation, self._moment = self._moment, Moment.VALIDATING

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._moment = self._before_validation

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_ended = True
        if self._saved_step != trainer.global_step:
            self._save(trainer, is_last=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        is_not_to_save = isinstance(exception, (StopRequested, KeyboardInterrupt, BadStepsError))
        if is_not_to_save or self._saved_step in (None, trainer.global_step):
            return
        is_whole = self._moment in (Moment.BETWEEN_STEPS, Moment.IN_STEP)
        if not is_whole or trainer.world_size > 1:  # other processes may never join a save
            log.warning("step %d is not saved: it was not complete. %s", trainer.global_step, self._last_good())
            return
        self._save(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
        num_steps = forget_unfinished_step(trainer, checkpoint, self._has_ended)
        moment = self._before_validation if self._moment is Moment.VALIDATING else self._moment
        before = {} if moment is Moment.BETWEEN_STEPS else self._before
        checkpoint["between_steps"] = {
            "logged_steps": num_steps,
            "generators": of_all_processes(trainer, before["generators"] if before else generators()),
            "logs": before["logs"] if "logs" in before else flushed_logs(trainer, self.folder),
        }

    def _restore(self, trainer: pl.Trainer, state: dict[str, Any]) -> None:
        self._to_restore = None
        if len(state["generators"]) == trainer.world_size:
            set_generators(state["generators"][trainer.global_rank])
        # Lightning's own count is one too high on resume at the start of an epoch, just after a validation.
        trainer.fit_loop.epoch_loop._batches_that_stepped = state["logged_steps"]

    def _save(self, trainer: pl.Trainer, is_last: bool = False) -> None:
        """Save, or log the error; raise it where no later save follows. The last good file stays in any case."""
        self._is_due = False
        if trainer.fast_dev_run:
            return
        problem = self._write(trainer)
        if trainer.world_size > 1 and not trainer.strategy.reduce_boolean_decision(problem is None) and problem is None:
            return  # the first process logs the error
        if problem is not None:
            if is_last or self._stop_signal is not None:
                raise problem
            log.error("step %d is not saved: %s. %s", trainer.global_step, problem, self._last_good())
            return
        self._saved_step = trainer.global_step
        log.info("saved %s at step %d", self.path, trainer.global_step)

    def _write(self, trainer: pl.Trainer) -> Exception | None:
        """Write and publish; returns the error, if any."""
        fresh = self.path.with_name(FRESH)
        try:
            trainer.save_checkpoint(fresh)
        except (OSError, RuntimeError, UserError) as error:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # the other processes wait here
            return error
        try:
            if trainer.is_global_zero:
                publish(fresh, self.path.parent, self.keep_last)
        except OSError as error:
            return error
        return None

    def _last_good(self) -> str:
        return f"The last good one is of step {self._saved_step}" if self._saved_step else "There is no earlier one"

    def _asked(self, trainer: pl.Trainer) -> bool:
        """Whether a signal has reached any process; all of them then have it."""
        if trainer.world_size > 1:
            if not trainer.strategy.reduce_boolean_decision(self._stop_signal is not None, all=False):
                return False
            self._stop_signal = signal.Signals(max(of_all_processes(trainer, int(self._stop_signal or 0))))
        return self._stop_signal is not None

    def _stop_if_asked(self) -> None:
        if self._stop_signal is not None:
            by = "" if self._stop_signal == signal.SIGINT else f" by {self._stop_signal.name}"
            message = f"stopped{by} after step {self._saved_step}; saved {self.path}"
            raise StopRequested(message, self._stop_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._stop_signal is not None:
                raise KeyboardInterrupt
            log.warning("Ctrl-C: finishing this step, then saving. A second Ctrl-C stops at once, without saving")
        self._stop_signal = signal.Signals(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


class _BetweenSteps(Callback):
    """Runs before all other callbacks: a step is saved before the next one logs anything."""

    def __init__(self, saving: LastCheckpoint) -> None:
        self._saving = saving

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._saving.between_steps(trainer)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints under a temporary name first: a full disk or a kill leaves the old file unchanged.

    Free space is checked before writing; the file is flushed and its header checked before it is renamed. Files are
    read with `weights_only=True`, whatever Lightning asks for: a checkpoint never runs code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path, checkpoint)
        with replacing(path) as partial:
            with partial.open("wb") as file:
                writer = _RememberingWriter(file.write)
                try:
                    torch.save(checkpoint, writer)
                except (OSError, RuntimeError) as error:
                    raise (writer.error or error) from None
                file.flush()
            check_header(partial)

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
        # torch.load knows torchao's class of 8-bit states only after torchao is imported.
        if importlib.util.find_spec("torchao") and any(
            name.startswith("torchao.") for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
        ):
            importlib.import_module("torchao.optim")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class _RememberingWriter:
    """torch.save replaces the error of a failed write by its own; this keeps the first one."""

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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
