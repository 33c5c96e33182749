"""Lines about a run: where its memory goes, and how far it has got where there is no terminal for a progress bar."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar

from ldm.callbacks.average import WeightAverage
from ldm.data.stream import StreamLoader
from ldm.devices import peak_memory
from ldm.errors import UserError, is_lack_of_memory
from ldm.optim.per_weight import WeightByWeight, state_bytes
from ldm.planning.count import CARD, MODEL, PROCESSOR, Count, Shape, count_step, shape_of
from ldm.planning.proposals import propose
from ldm.planning.report import gib, proposal_lines, table


class DataWait(pl.Callback):
    """Logs `train/data_wait`: the share, from 0 to 1, of the time of the last steps that went by before a batch was
    there; validation, samples and saving are no part of it.

    Only the clock of the training process is read: nothing waits for a device, and on a card, whose work is queued, the
    share is the most it can be. Start-up, up to the first batch, is left out. `share` is that of the run so far, None
    before the second batch and where a data module has a loader of its own kind.
    """

    changes_training = False

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


log = logging.getLogger(__name__)
MIB = 2**20


class MemoryReport(pl.Callback):
    """Logs the bytes of weights, gradients, optimiser states and averages, and the peak, at the start and after the
    first optimiser step: one line each, and scalars `memory/*` in MiB. A resumed run only has the lines.

    Weights are as they are stored, the lower bits of split ones included. Of gradients that are dropped in the backward
    pass the largest counts. `in host memory` is what of the states and averages a card does not hold.
    """

    changes_training = False

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

    changes_training = False

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


LEAST_PARAMETERS = 50_000_000


class PlanReport(pl.Callback):
    """Logs what a training step will take, counted before it, and after the first one the measured peak beside it.

    At the size of Stable Diffusion counting takes a quarter of a minute of one core; `lightning.callbacks.plan=null`
    leaves it out. Where a card's memory runs out, the switches that make the step fit are looked for and logged. Models
    other than video networks are passed over.

    least_parameters: smaller networks are passed over as well: they fit anywhere, and start at once.
    config: the whole config of the run, filled in by main.py.
    """

    changes_training = False

    def __init__(self, config: Mapping[str, Any], least_parameters: int = LEAST_PARAMETERS) -> None:
        self.config = dict(config)
        self.least_parameters = least_parameters
        self.count: Count | None = None
        self._first_step: int | None = None
        self._machine = CARD

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_video = (self.config.get("model") or {}).get("target") == MODEL
        num_parameters = sum(weight.numel() for weight in pl_module.parameters())
        if not trainer.is_global_zero or not is_video or num_parameters < self.least_parameters:
            return
        self._machine = PROCESSOR if pl_module.device.type == "cpu" else CARD
        start = time.process_time()
        try:
            shape = shape_of(self.config)
            self.count = count_step(self.config, shape, self._machine)
        except Exception as error:  # a count that fails is no reason not to train
            log.warning("a step could not be counted before it is taken: %s", str(error).split("\n")[0])
            return
        log.info("counted in %.1f s of one core, before the first step of %s:", time.process_time() - start, shape)
        for line in table(self.count, self._machine):
            log.info("%s", line)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.count is None or trainer.global_step != self._first_step:
            return
        self._first_step = None
        kind = "on the card" if self._machine == CARD else "of the whole process, with all that was loaded"
        measured = peak_memory(pl_module.device)
        log.info("peak: counted %s GiB, measured %s GiB %s", gib(self.count.peak.total), gib(measured), kind)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.count is None or pl_module.device.type != "cuda" or not is_lack_of_memory(exception):
            return
        shape, vram = self.count.shape, card_memory(pl_module.device)
        log.info("out of memory: looking for switches with which a step of %s fits into %.1f GB", shape, vram)
        for line in advice(self.config, shape, vram):
            log.info("%s", line)


def card_memory(device: torch.device) -> float:
    """GiB that this process may take of the card."""
    total = torch.cuda.get_device_properties(device).total_memory
    return total * torch.cuda.get_per_process_memory_fraction(device) / 2**30


def advice(config: Mapping[str, Any], shape: Shape, vram: float) -> list[str]:
    """What makes a step fit, or that nothing does."""
    try:
        proposal = propose(config, vram, lambda changed: count_step(changed, shape))
    except UserError as error:
        return [str(error)]
    return proposal_lines(proposal, ["CONFIG"], [])
