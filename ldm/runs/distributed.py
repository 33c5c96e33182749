"""Training strategies of several processes: each has the whole network (DDP) or a part of it (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from ldm.errors import UserError
from ldm.optim.stored_weights import MemorySwitches
from ldm.runs.launch import find_launch
from ldm.sharding import gather_full, shard_like

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")


class Replicas(DDPStrategy):
    """DDP without a broadcast of buffers, which are the same in all processes.

    NCCL cannot send the lower bits of split weights, which are 16-bit integers.
    """

    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        names = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return super()._setup_model(model)


class Parts(ModelParallelStrategy):
    """FSDP2 over all processes, for a module that shards its weights in `configure_model`.

    A checkpoint is one file with whole tensors, as in any other run, written by the first process through the trainer's
    checkpoint plugin; a run may be resumed with DDP or on one device.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # weights are sharded by then, and callbacks expect it before on_fit_start

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on the first process; the others take part in gathering and keep none."""
        return self._on_first(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole states on the first process, numbered as every optimiser numbers them."""
        return self._on_first(getattr(optimizer, "_optimizer", optimizer).state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        divided = {
            name: shard_like(tensor, own[name]) if name in own else tensor
            for name, tensor in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(divided, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            indices = [index for group in saved["param_groups"] for index in group["params"]]
            states = {}
            for index, weight in zip(indices, weights, strict=True):
                state = saved["state"].get(index)
                if state is not None:
                    states[index] = {name: _sharded(value, weight) for name, value in state.items()}
            optimizer.load_state_dict({**saved, "state": states})

    def _on_first(self, tree: dict[str, Any]) -> dict[str, Any]:
        is_first = self.is_global_zero

        def gathered(value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            full = gather_full(value)
            return full if is_first else None

        return tree_map(gathered, tree)


def _sharded(value: Any, weight: torch.Tensor) -> Any:
    """An optimiser state sharded like its weight; counters unchanged."""
    is_of_weight = isinstance(value, torch.Tensor) and value.shape == weight.shape and value.ndim > 0
    return shard_like(value, weight) if is_of_weight else value


def strategy_options(
    arguments: Mapping[str, Any], world_size: int, model: pl.LightningModule, data: pl.LightningDataModule
) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for the strategy in `arguments` and the number of processes.

    "auto" is DDP with more than one process. Gradients are views of the reduction buckets. The graph is static for a
    module with `has_static_graph`, without single frames beside clips and without accumulation. Raises `UserError` for
    combinations that are not supported.
    """
    strategy = arguments.get("strategy", "auto")
    if strategy not in STRATEGIES:
        raise UserError(
            f"lightning.trainer.strategy: expected one of {', '.join(STRATEGIES)}, found {strategy!r}; auto is ddp "
            "with more than one device"
        )
    if world_size == 1:
        return {"strategy": "auto"}
    if strategy == "fsdp":
        _check_parts(arguments, model, data)
        # Parameters that FSDP2 gathers in inference mode cannot be used in training.
        return {"strategy": Parts(), "inference_mode": False}
    has_stills = getattr(data, "image_share", 0) > 0
    some_unused = has_stills or strategy == "ddp_find_unused_parameters_true"
    # With accumulation DDP would record the first micro-batch, which it does not reduce, as the static graph.
    accumulates = arguments.get("accumulate_grad_batches", 1) != 1
    is_static = getattr(model, "has_static_graph", False) and not some_unused and not accumulates
    unused = some_unused or (not is_static and getattr(data, "frames", 2) == 1)
    return {"strategy": Replicas(static_graph=is_static, find_unused_parameters=unused, gradient_as_bucket_view=True)}


def launch_plugins() -> list[Any]:
    """Lightning's plugins for the launch: under SLURM, without Lightning's own signal handlers."""
    launch = find_launch()
    return [SLURMEnvironment(auto_requeue=False)] if launch is not None and launch.starter == "srun" else []


def _check_parts(arguments: Mapping[str, Any], model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Raise `UserError` for options that FSDP does not support."""
    where = "lightning.trainer.strategy: fsdp"
    memory = getattr(model, "memory", None)
    if not isinstance(memory, MemorySwitches):
        raise UserError(f"{where}: {type(model).__name__} cannot be sharded; use ddp")
    if arguments.get("precision") == "16-mixed":
        raise UserError(
            f"{where} needs lightning.trainer.precision bf16-mixed or 32-true, found 16-mixed, whose gradient "
            "scale would differ between processes; set another precision, or ddp"
        )
    if getattr(data, "image_share", 0) > 0:
        raise UserError(
            f"{where} needs data.params.image_share: 0, found {data.image_share:g}: a process whose batch has no clip "
            "would have no gradients of the temporal layers; set one of them, or ddp"
        )
    memory.check_parts(where, model.optimizer_options)
