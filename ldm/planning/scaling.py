"""What a run takes with many processes: bytes to read, to send and to save for each step, and memory for each card.

All of it is reckoned from the count of one process's step (`training_step`) and from the network's blocks; no such run
is taken. Rates of cards, links and disks are nominal, so that every time is the least that there can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm.config import build, to_container
from ldm.planning.count import ALLOWANCE, AVERAGE, FROZEN, GIB, GRADIENTS, NUM_TOKENS, STATES, TRAINED, Count, Shape
from ldm.planning.report import Card, floor_seconds

GB = 1e9
DIVIDED = (TRAINED, GRADIENTS, STATES, AVERAGE)  # what FSDP2 leaves each process a part of
# Weights of the block at work and of the next, which is gathered meanwhile, the block's gradients, and their copy that
# is sent.
WHOLE_AT_A_TIME = 4
FLOAT16 = 2


@dataclass(frozen=True)
class Machines:
    """What a run has: cards, and GB a second of each card's link to the others and of the disk for checkpoints."""

    card: Card
    link: float = 50.0  # 400 Gbit/s
    disk: float = 2.0


@dataclass(frozen=True)
class Scale:
    """What `processes` processes take in a micro-batch; without accumulation that is a step.

    loader: bytes a second for all together, if steps are as fast as the card's peak allows.  sent: bytes, by each, of
    DDP's sum in a ring, which with accumulation comes in the last micro-batch alone; sent_parts: of FSDP2, which
    gathers weights twice and hands out gradients once.  saving: seconds.  memory: bytes at the peak, with what is not
    tensors; memory_parts: with parts.
    """

    processes: int
    loader: float
    sent: float
    sent_parts: float
    saving: float
    memory: float
    memory_parts: float


def in_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what FSDP2 asks for: weights and states in float32, updated after the backward pass."""
    config = to_container(config)
    params = config["model"]["params"]
    params["optimizer"] = {**(params.get("optimizer") or {}), "name": "adamw", "states_on": "card"}
    params["optimizer"].pop("library", None)
    params["memory"] = {**(params.get("memory") or {}), "weights": "float32", "step_in_backward": False}
    return config


def clip_bytes(config: Mapping[str, Any], shape: Shape) -> int:
    """Of a prepared clip as it is read: moments of its latents, and a caption."""
    params = config["model"]["params"]
    network = params["unet_config"]["params"]
    moments = 2 * network["out_channels"] * shape.height * shape.width
    return FLOAT16 * (shape.frames * moments + NUM_TOKENS * network.get("context_dim", 768))


def largest_block(config: Mapping[str, Any]) -> int:
    """Trained numbers of the block that has most of them, or of what is in no block."""
    params = {**config["model"]["params"], "ckpt_path": None, "optimizer": None, "scale_factor": 1.0}
    with torch.device("meta"):
        model = build({**config["model"], "params": params}, "model", learning_rate=1.0)
    blocks = [*model.unet.input_blocks[1:], model.unet.middle_block, *model.unet.output_blocks]
    sizes = [sum(w.numel() for w in block.parameters() if w.requires_grad) for block in blocks]
    rest = sum(w.numel() for w in model.unet.parameters() if w.requires_grad) - sum(sizes)
    return max(*sizes, rest)


def checkpoint_bytes(count: Count) -> int:
    """Of the network in a checkpoint: weights, states of the optimiser, average. Both encoders come on top."""
    return sum(count.sizes[kind] for kind in (TRAINED, FROZEN, STATES, AVERAGE))


def scale(processes: int, machines: Machines, whole: Count, parts: Count, bytes_a_clip: int, block: int) -> Scale:
    """whole, parts: a micro-batch of one process by DDP, and with the config `in_parts`; block: of `largest_block`."""
    others = (processes - 1) / processes
    seconds = floor_seconds(machines.card, whole.flop)
    # DDP keeps its buffers, which the gradients are, all the time.
    kept = [peak.total - peak.kinds.get(GRADIENTS, 0) + whole.sizes[GRADIENTS] for peak in whole.peaks.values()]
    divided = [
        sum(num / processes if kind in DIVIDED else num for kind, num in peak.kinds.items())
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
    config: Mapping[str, Any], count: Callable[[dict[str, Any]], Count], numbers: Sequence[int], machines: Machines
) -> Iterator[str]:
    """A table of what so many processes take, and what it rests on. count: of a config's step."""
    config = to_container(config)
    whole, parts = count(config), count(in_parts(config))
    each, card = clip_bytes(config, whole.shape), machines.card
    rows = [scale(number, machines, whole, parts, each, largest_block(config)) for number in numbers]
    seconds = floor_seconds(card, whole.flop)
    yield "many processes, reckoned from the counted step of one; nothing was run"
    yield f"{card.name}: a step of {whole.shape} takes {1000 * seconds:.0f} ms at least, at {card.peak:g} TFLOP/s"
    yield f"a clip is {each / 1e3:.0f} kB to read; a checkpoint of the network {checkpoint_bytes(whole) / GB:.1f} GB"
    table = {
        "processes": [f"{row.processes}" for row in rows],
        "clips a step": [f"{row.processes * whole.shape.clips}" for row in rows],
        "read by all, GB a second at most": [f"{row.loader / GB:.2f}" for row in rows],
        "ddp: sent by each, GB a step": [f"{row.sent / GB:.2f}" for row in rows],
        f"  ms at {machines.link:g} GB a second": [f"{1000 * row.sent / GB / machines.link:.0f}" for row in rows],
        "fsdp: sent by each, GB a step": [f"{row.sent_parts / GB:.2f}" for row in rows],
        f"  ms at {machines.link:g} GB a second ": [
            f"{1000 * row.sent_parts / GB / machines.link:.0f}" for row in rows
        ],
        f"a checkpoint, s at {machines.disk:g} GB a second": [f"{row.saving:.1f}" for row in rows],
        "ddp: GiB a card must have": [f"{row.memory / GIB:.1f}" for row in rows],
        "fsdp: GiB a card must have": [f"{row.memory_parts / GIB:.1f}" for row in rows],
    }
    for title, cells in table.items():
        yield f"  {title:<38}" + "".join(f"{cell:>9}" for cell in cells)
