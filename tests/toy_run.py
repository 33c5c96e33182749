"""A prepared folder and modules small enough to train for real, in seconds, in the tests of the training command."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import yaml

from ldm.callbacks import AtomicCheckpointIO, LastCheckpoint
from ldm.data.clips import Batch, ClipDataModule
from ldm.data.shards import DATASET_FILE, EMPTY_FILE, INDEX_FILE, SCHEMA_VERSION, DatasetInfo
from ldm.data.shards.writer import ShardWriter, npy_bytes
from ldm.diffusion.noise import NoiseFamily
from ldm.diffusion.schedule import NoiseSchedule

MOMENTS_SHAPE = [4, 2, 2]
CONTEXT_SHAPE = [3, 5]
IDENTITIES = {"first_stage": "a" * 64, "text_encoder": "b" * 64}


def make_prepared(root: Path, lengths: Sequence[int] = (12, 9, 30, 7), num_captions: int = 2, **changes: Any) -> Path:
    """Write a prepared folder with a scene of each length; frame f of scene s holds the value 100 s + f.

    `changes` are fields of `DatasetInfo`, such as `moments_shape`.
    """
    shapes = {"moments_shape": MOMENTS_SHAPE, "context_shape": CONTEXT_SHAPE, **changes}
    moments_shape, context_shape = shapes["moments_shape"], shapes["context_shape"]
    root.mkdir(parents=True)
    with ShardWriter(root / "00000.tar", "00000.tar") as shard:
        entries = [
            shard.add(
                f"scene{index}",
                {"source": "toy.mp4", "start": 0, "fps": 10.0, "captions": ["a road"] * num_captions},
                np.broadcast_to(
                    (100 * index + np.arange(length, dtype=np.float16))[:, None, None, None], [length, *moments_shape]
                ).copy(),
                [np.full(context_shape, 1 + caption, dtype=np.float16) for caption in range(num_captions)],
            )
            for index, length in enumerate(lengths)
        ]
    index = "".join(entry.to_line() for entry in entries).encode()
    empty = npy_bytes(np.zeros(context_shape, dtype=np.float16))
    values = {
        "schema_version": SCHEMA_VERSION,
        **IDENTITIES,
        "scale_factor": 0.18215,
        "fps": 10.0,
        "size": [16, 16],
        "num_tokens": context_shape[0],
        "empty_context_crc32": zlib.crc32(empty),
        "num_videos": 1,
        "num_scenes": len(lengths),
        "num_frames": sum(lengths),
        "index_crc32": zlib.crc32(index),
        **shapes,
    }
    (root / INDEX_FILE).write_bytes(index)
    (root / EMPTY_FILE).write_bytes(empty)
    (root / DATASET_FILE).write_text(DatasetInfo(**values).to_json())
    return root


class ToyModel(pl.LightningModule):
    """A linear layer, half of it frozen, that remembers what it was trained on."""

    def __init__(self, learning_rate: float, width: int = 4, momentum: float = 0.9) -> None:
        super().__init__()
        self.learning_rate, self.momentum = learning_rate, momentum
        self.frozen = torch.nn.Linear(width, width).requires_grad_(False)
        self.head = torch.nn.Linear(width, 1)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
        self.seen: list[tuple[int, list[int], list[str]]] = []  # optimiser steps before, positions, keys
        self.losses: list[float] = []
        self.validated: list[int] = []
        self.at_batch: dict[int, object] = {}  # micro-batches seen -> something to do then

    def loss(self, batch: Batch) -> torch.Tensor:
        features = (batch.moments.float() / 100).mean(dim=(1, 3, 4))
        return (self.head(self.frozen(features)) - batch.context.float().mean(dim=(1, 2))[:, None]).pow(2).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        action = self.at_batch.pop(len(self.seen), None)
        if action:
            action()
        loss = self.loss(batch)
        self.seen.append((self.global_step, batch.positions, batch.keys))
        self.losses.append(loss.item())
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        action = self.at_batch.pop(("validation", self.global_step), None)
        if action:
            action()
        self.validated.append(self.global_step)
        self.log("val/loss", self.loss(batch), batch_size=len(batch))

    def configure_optimizers(self) -> dict:
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=self.learning_rate, momentum=self.momentum)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ToyVideoModel(ToyModel):
    """The toy with a network that denoises: to it, all noise is the head's bias times the caption."""

    def __init__(self):
        super().__init__(learning_rate=0.05)
        self.schedule, self.noise, self.scale_factor = NoiseSchedule(), NoiseFamily(), 0.5
        self.unet = torch.nn.Module()
        self.unet.takes_known_frames = False
        self.unet.scale = torch.nn.Parameter(torch.zeros(()))
        self.unet.forward = self.denoise
        self.modes = []

    def denoise(self, noisy, timesteps, context):
        self.modes.append((self.unet.training, torch.is_grad_enabled()))
        assert noisy.ndim == 5 and context.shape[1:] == tuple(CONTEXT_SHAPE)
        return noisy * 0.5 + self.unet.scale + 0.01 * context.mean()


def fit(root, folder, callbacks, *, model=None, steps=4, resume=None, logger=False, **trainer):
    """Train a toy model for a few steps, with checkpoints in `folder`; returns the model."""
    model = model or ToyModel(learning_rate=0.05)
    data = ClipDataModule(str(root), frames=3, batch_size=2, num_workers=0, val_share=0.2)
    lightning = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*callbacks, LastCheckpoint(str(folder), {"name": "toy"}, every_n_steps=1000)],
        **trainer,
    )
    lightning.fit(model, data, ckpt_path=resume, weights_only=True)
    return model


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def read(path):
    return torch.load(path, weights_only=True)


def toy_config(folder):
    """A config that trains the toy model on a prepared folder, written into `folder`; both lie there."""
    make_prepared(folder / "set")
    params = {"root": str(folder / "set"), "frames": 3, "batch_size": 2, "num_workers": 0, "val_share": 0.2}
    config = {
        "model": {"base_learning_rate": 0.001, "target": "tests.toy_run.ToyModel"},
        "data": {"target": "ldm.data.clips.ClipDataModule", "params": params},
        "lightning": {
            "trainer": {"max_steps": 4, "num_sanity_val_steps": 0, "accelerator": "cpu"},
            "callbacks": {"average": {"params": {"decay": 0.9}}, "progress": {"params": {"every_seconds": 0}}},
        },
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
