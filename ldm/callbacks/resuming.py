"""What an exact resume needs beside weights and optimiser states: loop counters, random generators, log sizes."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed

log = logging.getLogger(__name__)

LOGS = ("events.out.tfevents.*", "metrics.csv")  # of Lightning's loggers, anywhere in a run folder


def forget_unfinished_step(trainer: pl.Trainer, checkpoint: dict[str, Any], has_ended: bool = False) -> int:
    """Set a checkpoint's loop counters to the end of its last whole step, from where Lightning resumes exactly.

    Micro-batches after it are dropped, and the data module repeats them. has_ended: training and its last epoch are
    over. Returns the number of steps that were logged.
    """
    loop = checkpoint["loops"]["fit_loop"]
    progress, state = loop["epoch_loop.batch_progress"], loop["epoch_loop.state_dict"]
    current = progress["current"]
    is_epoch_over = current["processed"] == trainer.num_training_batches
    # Lightning steps on the last batch of an epoch.
    unfinished = 0 if is_epoch_over else current["processed"] % trainer.accumulate_grad_batches
    is_ending = current["ready"] == current["processed"] and not unfinished  # otherwise a later batch has begun
    num_steps = state["_batches_that_stepped"]
    if is_ending and (current["completed"] < current["processed"] or trainer.validating):
        num_steps += 1  # Lightning counts it last
    if has_ended and is_epoch_over and trainer.max_steps < 0:
        return num_steps  # more epochs would begin with the next one
    at_step_end = int(current["processed"] > unfinished)  # otherwise at the start of the epoch
    for counts in (progress["total"], current):
        counts["processed"] -= unfinished
        counts["ready"] = counts["started"] = counts["processed"]
        counts["completed"] = counts["processed"] - at_step_end
    if not is_ending:
        progress["is_last_batch"] = False
    for tracker in loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values():
        for counts in tracker.values():
            counts.update(dict.fromkeys(counts, counts["completed"]))
    validation = loop["epoch_loop.val_loop.batch_progress"]
    validation["is_last_batch"] = False
    for counts in (validation["total"], validation["current"]):  # over, or not begun
        counts.update(dict.fromkeys(counts, 0))
    for counts in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
        counts["processed"] -= int(has_ended or counts["processed"] > counts["completed"])
        counts["completed"] = counts["processed"]
        counts["ready"] = counts["started"] = counts["processed"] + 1
    checkpoint["epoch"] = loop["epoch_progress"]["current"]["processed"]
    state["_batches_that_stepped"] = num_steps - at_step_end
    return num_steps


def generators() -> dict[str, Any]:
    """The states of the global random generators, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(numbers, dtype=torch.int64), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_generators(states: dict[str, Any]) -> None:
    """Restore the global random generators; those of GPUs where there are as many."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_initialized() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def of_all_processes(trainer: pl.Trainer, value: Any) -> list[Any]:
    """The value that each process has, by rank."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return [value]
    values = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def flushed_logs(trainer: pl.Trainer, folder: Path, fsync: bool = True) -> dict[str, int]:
    """Flush everything logged so far; the log files of a run folder and their bytes. fsync: to the disk, too."""
    if not trainer.is_global_zero:
        return {}
    for logger in trainer.loggers:
        logger.save()
    sizes = {}
    for path in _log_files(folder):
        with path.open("rb") as file:
            if fsync:
                os.fsync(file.fileno())
            sizes[path.relative_to(folder).as_posix()] = os.fstat(file.fileno()).st_size
    return sizes


def cut_logs(folder: Path, sizes: dict[str, int], began: float) -> int:
    """Cut off the logs of steps that are about to be repeated; returns the number of bytes.

    sizes: of `flushed_logs`. began: Unix time of this session's start; files written later are its own. TensorBoard's
    `purge_step` cannot do this: entries of one step number are written before and after the checkpoint of that step.
    """
    num_bytes = 0
    for path in _log_files(folder):
        name, found = path.relative_to(folder).as_posix(), path.stat()
        wanted = sizes.get(name, 0)
        if found.st_mtime >= began or found.st_size == wanted:
            continue
        if found.st_size < wanted:
            log.warning("%s: expected %d bytes of logs, found %d: some steps are missing", path, wanted, found.st_size)
        elif wanted:
            os.truncate(path, wanted)
        else:
            path.unlink()
        num_bytes += max(0, found.st_size - wanted)
    return num_bytes


def _log_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in LOGS for path in folder.rglob(pattern) if path.is_file())
