"""A run with many processes: bytes to read, send and save for each step, and memory of each GPU.

Everything is computed from the count of one process's step (`count`) and from the network's blocks; no such run is
made. Rates of GPUs, links and disks are nominal, so every time is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm.config import build, to_container
from ldm.planning.count import (
    ALLOWANCE,
    AVERAGE,
    FROZEN,
    GIB,
    GRADIENTS,
    NUM_TOKENS,
    STATES,
    TRAINED,
    StepCount,
    StepShape,
)
from ldm.planning.report import GPUModel

GB = 1e9
SHARDED = (TRAINED, GRADIENTS, STATES, AVERAGE)  # by FSDP2
# Weights of the running block and of the next, which is gathered meanwhile, the block's gradients, and their copy to
# send.
WHOLE_AT_A_TIME = 4
FLOAT16 = 2


@dataclass(frozen=True)
class Machines:
    """The GPUs of a run; GB a second of each GPU's link to the others, and of the disk for checkpoints."""

    gpu: GPUModel
    link: float = 50.0  # 400 Gbit/s
    disk: float = 2.0


@dataclass(frozen=True)
class Scale:
    """What a micro-batch takes with so many processes; without accumulation it is a step.

    loader: bytes a second for all processes, if steps are as fast as the GPU's peak allows.
    sent: bytes by each process for DDP's ring all-reduce, with accumulation only in the last micro-batch.
    sent_parts: with FSDP2, which gathers weights twice and scatters gradients once.
    saving: seconds of a checkpoint.
    memory, memory_parts: bytes at the peak with `ALLOWANCE`, for DDP and FSDP2.
    """

    processes: int
    loader: float
    sent: float
    sent_parts: float
    saving: float
    memory: float
    memory_parts: float


def in_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as FSDP2 requires it: weights and states in float32, updated after the backward pass."""
    config = to_container(config)
    params = config["model"]["params"]
    params["optimizer"] = {**(params.get("optimizer") or {}), "name": "adamw", "states_on": "gpu"}
    params["optimizer"].pop("library", None)
    params["memory"] = {**(params.get("memory") or {}), "weights": "float32", "step_in_backward": False}
    return config


def clip_bytes(config: Mapping[str, Any], shape: StepShape) -> int:
    """Bytes to read for a prepared clip: moments of its latents, and a caption."""
    params = config["model"]["params"]
    network = params["unet_config"]["params"]
    moments = 2 * network["out_channels"] * shape.height * shape.width
    return FLOAT16 * (shape.frames * moments + NUM_TOKENS * network.get("context_dim", 768))


def largest_block(config: Mapping[str, Any]) -> int:
    """Trained numbers of the largest block, or of everything outside the blocks."""
    params = {**config["model"]["params"], "ckpt_path": None, "optimizer": None, "scale_factor": 1.0}
    with torch.device("meta"):
        model = build({**config["model"], "params": params}, "model", learning_rate=1.0)
    blocks = [*model.unet.input_blocks[1:], model.unet.middle_block, *model.unet.output_blocks]
    sizes = [sum(w.numel() for w in block.parameters() if w.requires_grad) for block in blocks]
    rest = sum(w.numel() for w in model.unet.parameters() if w.requires_grad) - sum(sizes)
    return max(*sizes, rest)


def checkpoint_bytes(count: StepCount) -> int:
    """Of the network in a checkpoint: weights, optimiser states, average; without both encoders."""
    return sum(count.sizes[kind] for kind in (TRAINED, FROZEN, STATES, AVERAGE))


def scale(
    processes: int, machines: Machines, whole: StepCount, parts: StepCount, bytes_a_clip: int, block: int
) -> Scale:
    """whole, parts: a micro-batch of one process with DDP, and of the config `in_parts`; block: `largest_block`."""
    others = (processes - 1) / processes
    seconds = machines.gpu.floor_seconds(whole.flop)
    # DDP keeps its buffers, which hold the gradients, all the time.
    kept = [peak.total - peak.kinds.get(GRADIENTS, 0) + whole.sizes[GRADIENTS] for peak in whole.peaks.values()]
    divided = [
        sum(num / processes if kind in SHARDED else num for kind, num in peak.kinds.items())
        for peak in parts.peaks.values()
    ]
    is_alone = processes == 1
    return Scale(
        processes,
        loader=processes * whole.shape.clips * bytes_a_clip / seconds,
        sent=2 * others * whole.sizes[GRADIENTS],
        sent_parts=3 * others * 4 * parts.num_trained,
        saving=checkpoint_bytes(whole) / (machines.disk * GB),
        memory=(whole.peak.total if is_alone else max(kept)) + ALLOWANCE[1],
        memory_parts=max(divided) + (0 if is_alone else WHOLE_AT_A_TIME * 4 * block) + ALLOWANCE[1],
    )


def scaling_lines(
    config: Mapping[str, Any], count: Callable[[dict[str, Any]], StepCount], numbers: Sequence[int], machines: Machines
) -> Iterator[str]:
    """A table for these numbers of processes, and its assumptions. count: counts a config's step."""
    config = to_container(config)
    whole, parts = count(config), count(in_parts(config))
    each, gpu = clip_bytes(config, whole.shape), machines.gpu
    rows = [scale(number, machines, whole, parts, each, largest_block(config)) for number in numbers]
    seconds = gpu.floor_seconds(whole.flop)
    yield "many processes, computed from the counted step of one; nothing was run"
    yield f"{gpu.name}: a step of {whole.shape} takes {1000 * seconds:.0f} ms at least, at {gpu.peak:g} TFLOP/s"
    yield f"a clip is {each / 1e3:.0f} kB to read; a checkpoint of the network {checkpoint_bytes(whole) / GB:.1f} GB"
    at_link = f"  ms at {machines.link:g} GB a second"
    table = (
        ("processes", "d", lambda row: row.processes),
        ("clips a step", "d", lambda row: row.processes * whole.shape.clips),
        ("read by all, GB a second at most", ".2f", lambda row: row.loader / GB),
        ("ddp: sent by each, GB a step", ".2f", lambda row: row.sent / GB),
        (at_link, ".0f", lambda row: 1000 * row.sent / GB / machines.link),
        ("fsdp: sent by each, GB a step", ".2f", lambda row: row.sent_parts / GB),
        (at_link, ".0f", lambda row: 1000 * row.sent_parts / GB / machines.link),
        (f"a checkpoint, s at {machines.disk:g} GB a second", ".1f", lambda row: row.saving),
        ("ddp: GiB per GPU", ".1f", lambda row: row.memory / GIB),
        ("fsdp: GiB per GPU", ".1f", lambda row: row.memory_parts / GIB),
    )
    for title, style, value in table:
        yield f"  {title:<38}" + "".join(f"{format(value(row), style):>9}" for row in rows)
