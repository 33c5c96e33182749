"""Lines about a run: waiting for data, memory, progress where there is no terminal, and the computed cost of a step."""

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
from ldm.callbacks.steps import StepLogger, log_metrics
from ldm.data.stream import StreamLoader
from ldm.devices import peak_memory
from ldm.errors import UserError, is_lack_of_memory
from ldm.optim.per_weight import WeightByWeight, state_bytes
from ldm.planning.count import CPU, GPU, MODEL, StepCount, StepShape, count_step, shape_of
from ldm.planning.proposals import propose
from ldm.planning.report import gib, proposal_lines, table

log = logging.getLogger(__name__)
MIB = 2**20
LEAST_PARAMETERS = 50_000_000


class DataWait(StepLogger):
    """Logs `train/data_wait`: the share of step time, from 0 to 1, spent waiting for a batch.

    Validation, samples, saving and start-up do not count. No device is synchronised; on a GPU, whose work is queued,
    the share is an upper bound. `share`: of the run so far; None before the second batch and with another loader.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._waited_before = self._step_seconds = self._wait_seconds = 0.0
        self._logged = (0.0, 0.0)  # seconds of waiting and of steps at the last entry

    @property
    def share(self) -> float | None:
        total = self._wait_seconds + self._step_seconds
        return self._wait_seconds / total if self._wait_seconds else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = None

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
        if self._began is not None:
            self._step_seconds += time.perf_counter() - self._began
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch_idx: int) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            totals = self._wait_seconds, self._step_seconds
            waited, stepped = (now - then for now, then in zip(totals, self._logged, strict=True))
            self._logged = totals
            log_metrics(trainer, {"train/data_wait": waited / (waited + stepped)})


class MemoryReport(StepLogger):
    """Logs the bytes of weights, gradients, optimiser states and averages, and the peak, before and after the first
    optimiser step: as a line, and in a new run as scalars `memory/*` in MiB.

    Weights as stored, with the lower bits of split ones. Where gradients are dropped in the backward pass, the largest
    counts. `in host memory`: states and averages that are not on the GPU.
    """

    def __init__(self) -> None:
        self._gradients = 0
        self._first_step: int | None = None
        self._is_new_run = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
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

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch_idx: int) -> None:
        if trainer.global_step == self._first_step:
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
        where = "on the GPU" if pl_module.device.type == "cuda" else "of the process"
        shown = ", ".join(f"{name.replace('_', ' ')} {size / MIB:,.0f}" for name, size in sizes.items())
        log.info("memory %s, MiB: %s %s", when, shown, where)
        if self._is_new_run:
            log_metrics(trainer, {f"memory/{name}": size / MIB for name, size in sizes.items()})


class ProgressLines(StepLogger):
    """Logs step, epoch, loss, speed and remaining time as a line, at most every `every_seconds`."""

    def __init__(self, every_seconds: float = 30.0) -> None:
        if every_seconds < 0:
            raise UserError(f"ProgressLines: expected every_seconds of at least 0, found {every_seconds}")
        self.every_seconds = every_seconds
        self._start_step = 0
        self._start_time = self._last_line = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start_step = trainer.global_step
        self._start_time = time.monotonic()
        self._last_line = float("-inf")

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch_idx: int) -> None:
        now, step, last = time.monotonic(), trainer.global_step, _last_step(trainer)
        if now - self._last_line < self.every_seconds and step != last:
            return
        self._last_line = now
        seconds = (now - self._start_time) / (step - self._start_step)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        parts = [f"step {step}/{last}" if last else f"step {step}", f"epoch {trainer.current_epoch}"]
        shown = trainer.progress_bar_metrics if loss is None else {"loss": float(loss)}
        parts += [f"{name} {value:.4f}" for name, value in shown.items()]
        parts += [f"{seconds:.2f} s/step" if seconds > 0.5 else f"{1 / seconds:.1f} steps/s"]
        waits = [callback.share for callback in trainer.callbacks if isinstance(callback, DataWait)]
        parts += [f"{share:.1%} waiting for data" for share in waits if share is not None]
        parts += [f"{timedelta(seconds=round(seconds * (last - step)))} left"] if last else []
        log.info("%s", ", ".join(parts))


class ProgressBar(RichProgressBar):
    """Lightning's bar without the last epoch's number and the logger's version.

    Reading a loss synchronises the GPU: it is read at most every `seconds_between_readings`.
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
    """The step at which training ends; None without a limit."""
    if trainer.max_steps >= 0:
        return trainer.max_steps
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return None
    return trainer.max_epochs * -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)


class PlanReport(StepLogger):
    """Logs the computed memory and work of a training step before the first one, and the measured peak after it.

    Only video networks are counted, at the size of Stable Diffusion in about 15 s of one core;
    `lightning.callbacks.plan=null` leaves it out. When a GPU runs out of memory, options that make the step fit are
    searched and logged.

    least_parameters: of a network that is counted. config: of the run, filled in by main.py.
    """

    def __init__(self, config: Mapping[str, Any], least_parameters: int = LEAST_PARAMETERS) -> None:
        self.config = dict(config)
        self.least_parameters = least_parameters
        self.count: StepCount | None = None
        self._first_step: int | None = None
        self._machine = GPU

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_video = (self.config.get("model") or {}).get("target") == MODEL
        num_parameters = sum(weight.numel() for weight in pl_module.parameters())
        if not trainer.is_global_zero or not is_video or num_parameters < self.least_parameters:
            return
        self._machine = CPU if pl_module.device.type == "cpu" else GPU
        start = time.process_time()
        try:
            shape = shape_of(self.config)
            self.count = count_step(self.config, shape, self._machine)
        except Exception as error:  # training does not depend on it
            log.warning("the training step could not be counted: %s", str(error).split("\n")[0])
            return
        log.info("counted in %.1f s of one core, before the first step of %s:", time.process_time() - start, shape)
        for line in table(self.count, self._machine):
            log.info("%s", line)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step + 1

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch_idx: int) -> None:
        if self.count is None or trainer.global_step != self._first_step:
            return
        kind = "on the GPU" if self._machine == GPU else "of the whole process, libraries included"
        measured = peak_memory(pl_module.device)
        log.info("peak: counted %s GiB, measured %s GiB %s", gib(self.count.peak.total), gib(measured), kind)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.count is None or pl_module.device.type != "cuda" or not is_lack_of_memory(exception):
            return
        shape, vram = self.count.shape, gpu_memory(pl_module.device)
        log.info("out of memory: searching for options with which a step of %s fits into %.1f GB", shape, vram)
        for line in advice(self.config, shape, vram):
            log.info("%s", line)


def gpu_memory(device: torch.device) -> float:
    """GiB of GPU memory that this process may use."""
    total = torch.cuda.get_device_properties(device).total_memory
    return total * torch.cuda.get_per_process_memory_fraction(device) / 2**30


def advice(config: Mapping[str, Any], shape: StepShape, vram: float) -> list[str]:
    """Lines with options that make a step fit, or that none does."""
    try:
        proposal = propose(config, vram, lambda changed: count_step(changed, shape))
    except UserError as error:
        return [str(error)]
    return proposal_lines(proposal, ["CONFIG"], [])
