"""Teams of processes that train together on one CPU, over the loopback device, for tests."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import socket
import time
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch

import main as command
from ldm.callbacks import AtomicCheckpointIO, LastCheckpoint, SkipBadSteps, VideoLogger, WeightAverage
from ldm.callbacks import samples as videos
from ldm.checkpoint.names import UNET_PREFIX
from ldm.config.schema import trusting
from ldm.data.batch import Batch
from ldm.data.clips import ClipDataModule
from ldm.models.diffusion import ddpm
from ldm.runs.distributed import strategy_options
from ldm.sharding import local_shard
from ldm.video import to_uint8
from tests.models.test_ddpm import NOT_BUILT, REFERENCE, UNET
from tests.toy_run import ToyModel

PATIENCE = 3000  # seconds; a team that takes longer is stopped
SET = {"moments_shape": [8, 8, 8], "context_shape": [7, 16]}
SMALL = {"channel_mult": [1], "attention_resolutions": [1], "use_checkpoint": False}


@dataclass(frozen=True)
class Job:
    """One training run. model: kwargs of the model; None: the toy. trainer: options of `lightning.trainer`."""

    root: str
    folder: str
    steps: int
    batch_size: int = 1
    resume: str | None = None
    model: dict[str, Any] | None = field(default_factory=dict)
    unet: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    average: bool = True
    videos: bool = False


@dataclass(frozen=True)
class Command:
    """A call of main.py in each process; environment: what each process finds in its own, by rank."""

    arguments: list[str]
    environment: list[dict[str, str]]


@dataclass
class Result:
    """What a process saw: the loss of each step, the positions of its clips, held-out losses; and the bytes of what it
    keeps of weights, optimiser states and averages."""

    losses: list[float]
    positions: list[int]
    held_out: dict[str, float]
    kept: tuple[int, int, int]


class ProcessDiedError(RuntimeError):
    """A process of a team died without a Python exception."""


class Team:
    """`size` processes that carry out one job after the other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.process_runs"])
        self.ends, self.processes, self.is_stopped = [], [], False
        port = free_port()
        for rank in range(self.size):
            own, other = context.Pipe()
            process = context.Process(target=work, args=(rank, self.size, port, other), daemon=True)
            process.start()
            other.close()
            self.ends.append(own)
            self.processes.append(process)

    def run(self, job: Job | Command) -> list[Any]:
        """The results of all processes; an error of one ends the team.

        A process that dies of a signal, as happens with collectives on a CPU, is not what these tests check: new
        processes repeat the job once, with a warning that names the signal.
        """
        try:
            return self._carry_out(job)
        except ProcessDiedError as error:
            if isinstance(job, Command):
                raise
            warnings.warn(f"{error}; repeated with new processes", stacklevel=2)
            self._start()
            return self._carry_out(job)

    def _carry_out(self, job: Job | Command) -> list[Any]:
        results: list[Any] = [None] * self.size
        for end in self.ends:
            end.send(job)
        deadline = time.monotonic() + PATIENCE
        while any(result is None for result in results):
            waiting = [end for end, result in zip(self.ends, results, strict=True) if result is None]
            ready = multiprocessing.connection.wait(waiting, max(0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                raise TimeoutError(f"{self.size} processes took more than {PATIENCE} s")
            for end in ready:
                results[self.ends.index(end)] = found = self._from(end)
                if isinstance(found, str):
                    codes = self._exit_codes()
                    self.stop()
                    if min(codes) < 0:
                        raise ProcessDiedError(f"one of {self.size} processes has died; exit codes: {codes}\n{found}")
                    raise RuntimeError(found)
        return results

    def _from(self, end: Connection) -> Any:
        try:
            return end.recv()
        except (EOFError, OSError):
            return "a process died without an exception"

    def _exit_codes(self) -> list[int]:
        """Negative: the signal that a process died of; 0: it is there."""
        time.sleep(1)  # others may report first that one is dying
        return [process.exitcode or 0 for process in self.processes]

    def stop(self) -> None:
        self.is_stopped = True
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def work(rank: int, size: int, port: int, end: Connection) -> None:
    """Carry out what comes, as process `rank` of `size`."""
    faulthandler.enable()  # traceback of a process that dies
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for name, value in {
        "LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
    }.items():  # fmt: skip
        os.environ[name] = str(value)
    ddpm.encoder_tensors = lambda config: {}
    ddpm.check_prepared = lambda *_, **__: None
    text_encoder = SimpleNamespace(truncated=lambda prompt: "", encode=lambda prompts: torch.ones(len(prompts), 7, 16))
    videos.load_text_encoder_of = lambda config: text_encoder
    videos.decode_clips = lambda config, module, latents: [to_uint8(latents[0, :, :3].clamp(-1, 1))]
    while True:
        try:
            job = end.recv()
        except EOFError:
            return
        try:
            end.send(carry_out(job, size) if isinstance(job, Job) else call(job, rank))
        except BaseException:
            end.send(traceback.format_exc())


class TameClips(ClipDataModule):
    """Clips whose moments are those of latents: small."""

    def __init__(self, root: str, batch_size: int) -> None:
        super().__init__(root, frames=3, batch_size=batch_size, num_workers=0, val_share=0.3)
        self.collate = tamed


def tamed(batches: list[Batch]) -> Batch:
    batch = Batch.cat(batches)
    batch.moments = batch.moments / 1000
    return batch


class Watch(pl.Callback):
    """Remembers losses, positions and held-out losses."""

    def __init__(self) -> None:
        self.losses, self.positions, self.held_out, self.states = [], [], {}, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.positions += batch.positions
        self.states = list(trainer.optimizers[0].state.values())

    def on_validation_end(self, trainer, pl_module):
        self.held_out = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}


def build(job: Job) -> pl.LightningModule:
    if job.model is None:
        return ToyModel(learning_rate=0.05, width=8)
    torch.manual_seed(0)
    unet = {**UNET, "params": {**UNET["params"], **SMALL, **job.unet}}
    words = {"trainable": REFERENCE, "learning_rate": 1e-4, **job.model}
    model = ddpm.LatentVideoDiffusion(unet, NOT_BUILT, NOT_BUILT, **words)
    generator = torch.Generator().manual_seed(0)
    state = {name: weight.float() for name, weight in model.unet.state_dict().items()}
    away = {  # away from the zero initialisation, where some gradients are zero
        f"{UNET_PREFIX}{name}": weight + 0.02 * torch.randn(weight.shape, generator=generator)
        for name, weight in state.items()
    }
    checkpoint = {"state_dict": away}
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=False)
    return model


def carry_out(job: Job, size: int) -> Result:
    model, data, watch, average = build(job), TameClips(job.root, job.batch_size), Watch(), WeightAverage(decay=0.9)
    words = {"precision": "32-true", "num_sanity_val_steps": 0, **job.trainer}
    words |= strategy_options(words, size, model, data)
    beside = [average] if job.average else []
    beside += [VideoLogger({}, job.folder, ["a road"], 2, steps=2, scale=1.0)] if job.videos else []
    saving = LastCheckpoint(job.folder, {"model": {"params": {}}}, 1000)
    trainer = pl.Trainer(
        accelerator="cpu", devices=size, max_steps=job.steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[AtomicCheckpointIO()],
        callbacks=[SkipBadSteps(job.folder), *beside, watch, saving],
        **words,
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=job.resume, weights_only=True)
    weights = [local_shard(weight.data) for weight in model.parameters() if weight.requires_grad]
    states = [local_shard(value) for state in watch.states for value in state.values() if value.ndim]
    kept = (sum(weight.nbytes for weight in weights), sum(state.nbytes for state in states), average.num_bytes)
    return Result(watch.losses, watch.positions, watch.held_out, kept)


def call(job: Command, rank: int) -> int:
    """Train by the command, every process in another second; returns the level of our log."""
    time.sleep(1.1 * rank)
    with mock.patch.dict(os.environ, job.environment[rank]), trusting():
        for name in {"LOCAL_RANK", "NODE_RANK"} - set(job.environment[rank]):
            del os.environ[name]
        command.main(job.arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return logging.getLogger("ldm").level


def last(folder: Path | str) -> dict[str, Any]:
    return torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)
