"""Floating-point operations of training, summed over all sessions of a run; compilation of the network."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm.callbacks.steps import StepLogger, log_metrics
from ldm.errors import UserError
from ldm.modules.compiled import BACKENDS, compile_by_shape, undo_compile

log = logging.getLogger(__name__)

TERA = 1e12
RECOUNT = 1000  # batches after which every kind is counted again: the loss may compute more by then


class ComputeCount(StepLogger):
    """Logs the operations of all training steps so far, forward and backward, as `train/tflop`.

    Matrix products, convolutions and attention count, a multiply-add as two operations, recomputation included;
    validation, samples, the optimiser and kernels from outside PyTorch (flash-attn, xformers) do not. Only the first
    batch of each set of tensor shapes is counted, and again after `RECOUNT` batches. No device is synchronised.
    """

    def __init__(self) -> None:
        self._flop = 0
        self._costs: dict[tuple, int] = {}  # operations of a batch by its shapes
        self._kind: tuple = ()
        self._num_batches = 0
        self._counter: FlopCounterMode | None = None

    @property
    def tflop(self) -> float:
        """Of all processes since the run began."""
        return self._flop / TERA

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step and not self._flop:
            log.warning("train/tflop omits the first %d steps, which were not counted", trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._num_batches % RECOUNT == 0:
            self._costs.clear()
        self._num_batches += 1
        self._kind = _shapes(batch)
        if self._kind in self._costs:
            self._flop += self._costs[self._kind] * trainer.world_size
        else:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.automatic_optimization:  # otherwise there may be another pass
            self._take(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._take(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch_idx: int) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            log_metrics(trainer, {"train/tflop": self.tflop})

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        return {"flop": self._flop, "num_batches": self._num_batches, "costs": list(self._costs.items())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Costs, too: counting may change the rounding of a step, and a resumed run must count the same steps."""
        self._flop = state_dict["flop"]
        self._num_batches = state_dict.get("num_batches", 0)
        self._costs = dict(state_dict.get("costs", ()))

    def _take(self, trainer: pl.Trainer) -> None:
        counter = self._stop()
        if counter is not None:
            cost = counter.get_total_flops()
            if self._num_batches == 1:
                log.info("a batch is %.4g TFLOP on each of %d devices, counted", cost / TERA, trainer.world_size)
            self._costs[self._kind] = cost
            self._flop += cost * trainer.world_size

    def _stop(self) -> FlopCounterMode | None:
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.__exit__(None, None, None)
        return counter


def _shapes(value: Any) -> tuple:
    """The shapes of all tensors in a batch."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    elif not isinstance(value, Sequence) or isinstance(value, str):
        return ()
    return tuple(_shapes(part) for part in value if not isinstance(part, (str, int, float)))


class CompileNetwork(pl.Callback):
    """Compiles the UNet, one graph for every clip shape; see `ldm.modules.compiled`.

    backend: "inductor", or for debugging of graphs "aot_eager" or "eager", which generate no code.
    """

    def __init__(self, backend: str = "inductor") -> None:
        if backend not in BACKENDS:
            raise UserError(f"CompileNetwork: expected backend to be one of {', '.join(BACKENDS)}, found {backend!r}")
        self.backend = backend

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "unet"):
            raise UserError(
                f"CompileNetwork: {type(pl_module).__name__} has no UNet; remove the callback from its config"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        compile_by_shape(pl_module.unet, self.backend)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        undo_compile(pl_module.unet)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        undo_compile(pl_module.unet)
