"""A network small enough to train with every switch that saves memory, and what came of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from ldm.callbacks import WeightAverage
from ldm.data.clips import Batch
from ldm.models.diffusion.ddpm import LatentVideoDiffusion
from ldm.modules.unet import UNetModel
from tests.models.test_ddpm import NOT_BUILT

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1],
    "num_heads": 2,
    "context_dim": 16,
}
# Switch -> which of the four mappings of words it belongs to, and the words.
SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16 weights": ("memory", {"weights": "bfloat16"}),
    "split weights": ("memory", {"weights": "split"}),
    "frozen bfloat16": ("memory", {"frozen": "bfloat16"}),
    "step in backward": ("memory", {"step_in_backward": True}),
    "8 bits": ("optimizer", {"name": "adamw8bit"}),
    "4 bits": ("optimizer", {"name": "adamw4bit"}),
    "states on host": ("optimizer", {"states_on": "host"}),
    "checkpoints": ("unet", {"use_checkpoint": True}),
    "first checkpoints": ("unet", {"use_checkpoint": 2}),
    "chunks": ("unet", {"feed_forward_frames": 2}),
    "inputs on host": ("unet", {"inputs_on_host": True}),
    "average on cpu": ("average", {"device": "cpu"}),
    "average in bfloat16": ("average", {"dtype": "bfloat16"}),
}
NEEDS_BF16 = {"bfloat16 weights", "split weights", "frozen bfloat16"}


@dataclass
class Result:
    """What a few steps left: trained weights and their averages in float32, by name, and the losses."""

    weights: dict[str, torch.Tensor]
    averages: dict[str, torch.Tensor]
    losses: list[float]


def words_of(*switches: str) -> dict[str, dict[str, Any]]:
    """The four mappings of words that turn some switches on."""
    words: dict[str, dict[str, Any]] = {"memory": {}, "optimizer": {}, "unet": {}, "average": {}}
    for switch in switches:
        place, added = SWITCHES[switch]
        words[place] |= added
    return words


def make_model(
    words: Mapping[str, Mapping[str, Any]], trainable: Mapping[str, Any] | None = None
) -> LatentVideoDiffusion:
    """A model that has read its weights from a checkpoint, the same ones whatever the switches say."""
    unet = {"target": "ldm.modules.unet.UNetModel", "params": {**UNET, **words["unet"]}}
    model = LatentVideoDiffusion(
        unet,
        NOT_BUILT,
        NOT_BUILT,
        learning_rate=1e-3,
        trainable={"temporal": True} if trainable is None else trainable,
        optimizer=words["optimizer"],
        memory=words["memory"],
        warmup_steps=3,
    )
    checkpoint = {"state_dict": dict(_state())}
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model


@cache
def _state() -> dict[str, torch.Tensor]:
    """Weights away from their zero start, where some gradients are zero for a good reason, as a checkpoint has them."""
    torch.manual_seed(0)
    state, generator = UNetModel(**UNET).state_dict(), torch.Generator().manual_seed(0)
    for name, weight in state.items():
        spread = 0.5 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.02
        noise = spread * torch.randn(weight.shape, generator=generator)
        state[name] = noise if weight.ndim > 1 else weight + noise
    return {f"model.diffusion_model.{name}": weight for name, weight in state.items()}


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    moments = torch.randn(1, 3, 8, 4, 4, generator=generator).half()
    context = torch.randn(1, 3, 16, generator=generator).half()
    return Batch(moments, context, torch.full((1,), 10.0), [step], ["scene"])


def train(*switches: str, steps: int, bf16: bool) -> Result:
    """Train with some switches on; `bf16`: under autocast, which stored halves need."""
    words = words_of(*switches)
    model = make_model(words)
    model._trainer = SimpleNamespace(max_steps=steps)
    average, parts = WeightAverage(decay=0.9, **words["average"]), model.configure_optimizers()
    optimizer, schedule = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    average.update(model)
    losses = []
    for step in range(steps):
        batch = make_batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.batch_errors(batch)[0].sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update(model)
        losses.append(loss.item())
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return Result(
        {name: model.stored_weights.full(weight).clone() for name, weight in trained.items()},
        {name: copy.deepcopy(value).float() for name, value in average.averages.items()},
        losses,
    )
