"""Training steps: of a contestant (forward, backward, AdamW) with counted operations, and of a config by Lightning."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from ldm.callbacks import ComputeCount
from ldm.config import build, load_config, to_container
from ldm.data.batch import Batch
from ldm.devices import keep_freed_memory, set_up_gpu
from ldm.models.diffusion.ddpm import LatentVideoDiffusion
from scripts.dev.benchmarking.contestants import CONTESTANTS, PRECISIONS, Case, Inputs
from scripts.dev.benchmarking.timing import wait_for

LEARNING_RATE = 1e-5
TRAINER_KEYS = ("precision", "gradient_clip_val", "accumulate_grad_batches")


class TrainingStep:
    """A step with all weights trained: float32 weights, autocast for bf16, torch's fused AdamW."""

    def __init__(self, name: str, case: Case, device: torch.device) -> None:
        self.contestant, self.device = CONTESTANTS[name], device
        torch.manual_seed(42)
        with torch.device(device):
            self.network = self.contestant.build(case).train()
        self.inputs = Inputs.draw(case, device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, fused=True)
        self.dtype = PRECISIONS[case.precision]

    def __call__(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def forward_backward(self) -> None:
        """The loss and its gradients."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out = self.contestant.predict(self.network, self.inputs)
        F.mse_loss(out.float(), self.inputs.target).backward()

    def own_bytes(self) -> int:
        """Bytes of weights and optimiser states."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.network.parameters(), *self.network.buffers(), *filter(torch.is_tensor, states)]
        return sum(tensor.nbytes for tensor in tensors)

    def gpu_peak(self) -> int | None:
        """Peak bytes of a step on a GPU, without other contestants'; None on a CPU."""
        if self.device.type != "cuda":
            return None
        wait_for(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        others = torch.cuda.memory_allocated(self.device) - self.own_bytes()
        self()
        wait_for(self.device)
        return torch.cuda.max_memory_allocated(self.device) - others


def count_flop(name: str, case: Case, step: TrainingStep) -> int:
    """Operations of the forward and backward pass, counted on meta tensors; without AdamW.

    step: counted in place of meta tensors if the network reads values.
    """
    contestant = CONTESTANTS[name]
    with torch.device("meta"):
        network = contestant.build(case)
    inputs = Inputs.draw(case, "meta")
    with FlopCounterMode(display=False) as counter:
        try:
            F.mse_loss(contestant.predict(network, inputs), inputs.target).backward()
            return counter.get_total_flops()
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
    with FlopCounterMode(display=False) as counter:
        step.forward_backward()
    step.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops()


class UnpreparedDiffusion(LatentVideoDiffusion):
    """The model of a config for random latents, without checks against a prepared set."""

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        self.memory.check_run(
            trainer.precision, trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.world_size
        )


class RandomClips(Dataset):
    """`length` batches of the same random numbers at consecutive positions of the stream."""

    def __init__(self, num: int, frames: int, channels: int, side: int, width: int, length: int) -> None:
        self.length = length
        self.moments = torch.randn(num, frames, 2 * channels, side, side).half()
        self.context = torch.randn(num, 77, width).half()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Batch:
        if number >= self.length:
            raise IndexError(number)
        num = len(self.moments)
        positions = list(range(number * num, (number + 1) * num))
        return Batch(self.moments, self.context, torch.full((num,), 10.0), positions, ["random"] * num)


class StepClock(pl.Callback):
    """Seconds of each step, from the end of the previous one, synchronised with the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, []
        self._begin = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wait_for(self.device)
        self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        wait_for(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self._begin)
        self._begin = now


def take_steps(request: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds of each training step of the configs `base` with `overrides`, operations per step, and the last loss."""
    set_up_gpu(exact=False, repeatable=False)
    keep_freed_memory()
    without_files = ["model.params.ckpt_path=null", "model.params.scale_factor=1.0"]
    config = to_container(load_config(request["base"], [*request["overrides"], *without_files]))
    model_node, data, lightning = config["model"], config["data"]["params"], config.get("lightning") or {}
    torch.manual_seed(23)
    model = UnpreparedDiffusion(**model_node["params"], learning_rate=model_node["base_learning_rate"], config=config)
    clips = RandomClips(
        data["batch_size"], data["frames"], model.unet.out_channels, request["side"], model.unet.context_dim,
        request["steps"],
    )  # fmt: skip
    clock, compute = StepClock(device), ComputeCount()
    average = (lightning.get("callbacks") or {}).get("average")
    callbacks = [clock, compute] if request.get("counted", True) else [clock]
    if average:
        callbacks.append(build({"target": "ldm.callbacks.WeightAverage", **average}, "lightning.callbacks.average"))
    kwargs = {name: value for name, value in (lightning.get("trainer") or {}).items() if name in TRAINER_KEYS}
    trainer = pl.Trainer(
        **kwargs, max_steps=request["steps"], accelerator="gpu" if device.type == "cuda" else "cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(model, DataLoader(clips, batch_size=None))
    loss = float(trainer.callback_metrics["train/loss"])
    return {"seconds": clock.seconds, "flop": compute.tflop * 1e12 / len(clock.seconds), "loss": loss}
