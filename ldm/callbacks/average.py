"""Exponential moving average of the trained weights, computed and named as CompVis' EMA; no copy of frozen ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.callbacks.bad_steps import SkipBadSteps
from ldm.callbacks.steps import StepCallback
from ldm.checkpoint.names import AVERAGE_PREFIX, average_name
from ldm.diffusion.noise import mix_seed
from ldm.errors import UserError
from ldm.optim.stored_weights import round_stochastically
from ldm.sharding import from_local_shard, gather_full, is_shard, local_shard, shard_like

AVERAGE_STREAM = 500  # of random draws
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def average_key(name: str) -> str:
    """The checkpoint key of the average of a parameter with this name in the Lightning module."""
    if name.startswith("unet."):
        name = "diffusion_model." + name.removeprefix("unet.")
    return average_name(name)


class WeightAverage(StepCallback):
    """Keeps average += (1 - d) (weight - average), d = min(decay, (1 + n) / (10 + n)), after the n-th optimiser step.

    Only trained parameters are averaged, in float32 however they are stored. Checkpoints hold the averages in
    `state_dict` as `model_ema.*`. Validation and sample videos use them. With sharded weights each process averages its
    shard.

    device: "cpu": averages are in host memory and updated on the GPU, on a stream of their own, during the next forward
        pass; None: with the weights.
    dtype: "float32", or "bfloat16", 2 bytes per weight. An update is far below the precision of bfloat16 and is rounded
        stochastically: unbiased, with a noise of 0.9% of the weights' size after a simulated run of 40,000 steps at a
        decay of 0.9999 (storing weights in bfloat16 once costs 0.2%). Averages of vectors stay float32.
    """

    def __init__(self, decay: float = 0.9999, device: str | None = None, dtype: str = "float32") -> None:
        if not 0 <= decay < 1:
            raise UserError(f"WeightAverage: expected a decay of at least 0 and below 1, found {decay}")
        if device not in (None, "cpu"):
            raise UserError(
                f"WeightAverage: expected the device cpu, or null for that of the weights, found {device!r}"
            )
        if dtype not in DTYPES:
            raise UserError(f"WeightAverage: expected the dtype {' or '.join(DTYPES)}, found {dtype!r}")
        self.decay = decay
        self.in_host_memory = device == "cpu"
        self.dtype = DTYPES[dtype]
        self.num_updates = 0
        self.averages: dict[str, Tensor] = {}
        self._skipped: Tensor | None = None  # of `num_updates`, those of skipped steps
        self._set_aside: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    @property
    def num_bytes(self) -> int:
        return sum(average.nbytes for average in self.averages.values())

    @torch.no_grad()
    def update(self, module: torch.nn.Module, taken: bool | Tensor = True) -> None:
        """Update the average with the trained weights of `module`; the first call initialises it.

        taken: False, or a tensor of 0, for a skipped step: the average does not change.
        """
        weights = _trained(module)
        if not self.averages:
            self.averages = {
                name: self._placed(_full(module, weight), weight, copy=True) for name, weight in weights.items()
            }
            return
        if taken is False:
            return
        self.num_updates += 1
        share = self._share(taken)
        in_one = (
            [] if self.in_host_memory else [name for name, weight in weights.items() if self._is_full(name, weight)]
        )
        if in_one:
            parts = [local_shard(weights[n]) for n in in_one]
            shares = [share] * len(in_one) if isinstance(share, Tensor) else share
            torch._foreach_lerp_([self.averages[n] for n in in_one], parts, shares)
        with self._beside(next(iter(weights.values())).device, share):
            for place, (name, weight) in enumerate(weights.items()):
                if name not in in_one:
                    self._update_one(self.averages[name], _full(module, weight), share, place)

    def _share(self, taken: bool | Tensor) -> float | Tensor:
        """1 - d after this step; for a tensor `taken` a tensor, 0 for a skipped step."""
        if not isinstance(taken, Tensor):
            return 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self._skipped = (1 - taken).double() if self._skipped is None else self._skipped + (1 - taken)
        updates = self.num_updates - self._skipped
        return (taken * (1 - torch.clamp((1 + updates) / (10 + updates), max=self.decay))).float()

    def _update_one(self, average: Tensor, weight: Tensor, share: float | Tensor, place: int) -> None:
        kept = average.to(weight.device, non_blocking=True)
        mean = kept.float().lerp_(weight, share)
        if average.dtype == torch.bfloat16:
            generator = torch.Generator(weight.device).manual_seed(mix_seed(self.num_updates, AVERAGE_STREAM, place))
            mean = round_stochastically(mean, generator)
        average.copy_(mean, non_blocking=True)

    def _is_full(self, name: str, weight: Tensor) -> bool:
        return weight.dtype == self.averages[name].dtype == torch.float32

    def _placed(self, average: Tensor, weight: Tensor, copy: bool = False) -> Tensor:
        """An average in its dtype and memory."""
        dtype = torch.float32 if average.ndim < 2 else self.dtype
        placed = average.to("cpu" if self.in_host_memory else weight.device, dtype, copy=copy)
        return placed.pin_memory() if self.in_host_memory and weight.device.type == "cuda" else placed

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream on which averages in host memory are updated; None without a GPU."""
        if self._stream is None and self.in_host_memory and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        return self._stream

    @contextmanager
    def _beside(self, device: torch.device, share: float | Tensor) -> Iterator[None]:
        """Run the block, which reads `share`, on the side stream, after all work queued so far."""
        stream = self._side_stream(device)
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(device))
        if isinstance(share, Tensor):
            share.record_stream(stream)  # its memory is not reused before the block is done
        with torch.cuda.stream(stream):
            yield

    def _join(self) -> None:
        """Let the device finish the averages before further work."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    @contextmanager
    def applied(self, module: torch.nn.Module) -> Iterator[None]:
        """Replace the trained weights of `module` by their averages within the context."""
        self._apply(module)
        try:
            yield
        finally:
            self._restore(module)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not getattr(pl_module, "keeps_averages", True):
            raise UserError(
                f"WeightAverage: the checkpoints of {type(pl_module).__name__} hold no averages; remove the callback "
                "from its config"
            )
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            raise UserError(
                "lightning.modelcheckpoint.params.save_weights_only: such a file would lack the averages; leave it "
                "out, or set lightning.callbacks.average=null"
            )
        pl_module.register_load_state_dict_pre_hook(_strip)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.averages:  # from a checkpoint, read before the module was moved to its device
            weights = _trained(pl_module)
            self.averages = {name: self._placed(self.averages[name], weight) for name, weight in weights.items()}
        else:
            self.update(pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._join()  # weights are updated after this, or in it

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch_idx: int) -> None:
        guards = [callback for callback in trainer.callbacks if isinstance(callback, SkipBadSteps)]
        self.update(pl_module, guards[0].taken if guards else True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        if self._skipped is not None:
            self.num_updates, self._skipped = self.num_updates - int(self._skipped), None
        if self.averages:
            weights = _trained(pl_module)
            tensors = {
                average_key(n): gather_full(from_local_shard(part, weights[n])) for n, part in self.averages.items()
            }
            tensors[AVERAGE_PREFIX + "decay"] = torch.tensor(self.decay, dtype=torch.float32)
            tensors[AVERAGE_PREFIX + "num_updates"] = torch.tensor(self.num_updates, dtype=torch.int32)
            checkpoint["state_dict"].update(tensors)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        tensors = checkpoint["state_dict"]
        if AVERAGE_PREFIX + "num_updates" not in tensors:
            return  # that run had no average: it starts here
        weights = _trained(pl_module)
        names = {name: average_key(name) for name in weights}
        missing = [name for name, key in names.items() if key not in tensors]
        if missing:
            raise UserError(
                f"the checkpoint holds no average of {len(missing)} of the {len(names)} trained weights, such as "
                f"{missing[0]}: it was written by a run that trained others. Resume with that run's config"
            )
        self.num_updates = int(tensors[AVERAGE_PREFIX + "num_updates"])
        self.averages = {n: local_shard(shard_like(tensors[key], weights[n])).clone() for n, key in names.items()}

    def _apply(self, module: torch.nn.Module) -> None:
        if not self._set_aside and self.averages:
            self._join()
            for name, weight in _trained(module).items():
                if is_shard(weight):  # its memory is what other processes are sent
                    self._set_aside[name] = local_shard(weight.data).clone()
                    local_shard(weight.data).copy_(self.averages[name])
                else:
                    self._set_aside[name] = weight.data
                    weight.data = self.averages[name].to(weight)

    def _restore(self, module: torch.nn.Module) -> None:
        for name, weight in _trained(module).items():
            if name not in self._set_aside:
                continue
            if is_shard(weight):
                local_shard(weight.data).copy_(self._set_aside.pop(name))
            else:
                weight.data = self._set_aside.pop(name)


def _trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def _full(module: torch.nn.Module, weight: torch.nn.Parameter) -> Tensor:
    """A trained weight in float32, also where the module shards it or stores it in fewer bits."""
    stored = getattr(module, "stored_weights", None)
    return local_shard(weight.detach()).float() if stored is None else local_shard(stored.full(weight))


def _strip(module: torch.nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    """Remove the averages, which are no weights of the module, before names are compared."""
    for key in [key for key in state_dict if key.startswith(AVERAGE_PREFIX)]:
        del state_dict[key]
