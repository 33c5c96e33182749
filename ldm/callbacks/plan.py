"""The count of `scripts/plan.py` at the start of a run, the measured peak beside it, and help where it was too much."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.devices import peak_memory
from ldm.errors import UserError, is_lack_of_memory
from ldm.planning.ladder import propose
from ldm.planning.report import gib, proposal_lines, table
from ldm.planning.training_step import CARD, MODEL, PROCESSOR, Count, Shape, count_step, shape_of

log = logging.getLogger(__name__)
LEAST_PARAMETERS = 50_000_000


class PlanReport(pl.Callback):
    """Logs what a training step will take, counted before it, and after the first one the measured peak beside it.

    At the size of Stable Diffusion counting takes a quarter of a minute of one core; `lightning.callbacks.plan=null`
    leaves it out. Where a card's memory runs out, the switches that make the step fit are looked for and logged. Models
    other than video networks are passed over.

    least_parameters: smaller networks are passed over as well: they fit anywhere, and start at once.
    config: the whole config of the run, filled in by main.py.
    """

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
