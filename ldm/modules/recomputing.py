"""What of the forward pass is kept for the backward pass: with checkpointing, no more than the inputs of each block.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", by torch's non-reentrant checkpoint: it works with
frozen parameters and under autocast, and gives every trained parameter its gradient. The inputs themselves may wait in
host memory, see `host_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError
from ldm.modules.host_inputs import HostMemory

Run = Callable[..., Tensor]  # (block, x, whatever else the block takes) -> what the block makes of them


def run_directly(block: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """Call the block: all that its backward pass needs is kept."""
    return block(x, *rest)


def run_again(
    block: Callable[..., Tensor], x: Tensor, *rest: Any, is_random: bool = False, memory: HostMemory | None = None
) -> Tensor:
    """Call the block, keep its inputs alone, and call it once more in the backward pass.

    is_random: the block draws random numbers, which have to be the same then.  memory: where `x` waits meanwhile; None:
        where it is.
    """
    if not torch.is_grad_enabled():
        return block(x, *rest)
    if memory is None:
        return checkpoint(block, x, *rest, use_reentrant=False, preserve_rng_state=is_random)
    waiting = memory.keep(x)

    def on_what_waits(*rest: Any) -> Tensor:
        return block(waiting.take(), *rest)

    return checkpoint(on_what_waits, *rest, use_reentrant=False, preserve_rng_state=is_random)


def check_memory_words(
    use_checkpoint: bool | int, feed_forward_frames: int | None, inputs_on_host: bool, num_blocks: int
) -> None:
    """Raise `UserError` for values that a network of so many blocks cannot have, alone or together."""
    is_number = isinstance(use_checkpoint, int) and not isinstance(use_checkpoint, bool)
    if not isinstance(use_checkpoint, int) or (is_number and not 1 <= use_checkpoint <= num_blocks):
        raise UserError(
            f"use_checkpoint: expected true (all blocks), false (none) or how many of the network's {num_blocks} "
            f"blocks, the first ones, found {use_checkpoint!r}"
        )
    if feed_forward_frames is not None and (
        isinstance(feed_forward_frames, bool) or not isinstance(feed_forward_frames, int) or feed_forward_frames < 1
    ):
        raise UserError(
            "feed_forward_frames: expected how many frames go through the feed-forward at a time, at least 1, or null "
            f"for all of them, found {feed_forward_frames!r}"
        )
    if not isinstance(inputs_on_host, bool):
        raise UserError(f"inputs_on_host: expected true or false, found {inputs_on_host!r}")
    if inputs_on_host and not use_checkpoint:
        raise UserError(
            "inputs_on_host: expected false with use_checkpoint: false, where blocks keep much more than their inputs, "
            "found true; set use_checkpoint: true, or leave inputs_on_host out"
        )


def chosen_runs(blocks: Sequence[nn.Module], use_checkpoint: bool | int, inputs_on_host: bool) -> dict[nn.Module, Run]:
    """For each block how to run it: all of them again in the backward pass, none, or that many from the start.

    On the host, what waits costs the card nothing: a block that can be run in parts then is, and called directly.
    """
    memory = HostMemory() if inputs_on_host else None
    num_chosen = len(blocks) * use_checkpoint if isinstance(use_checkpoint, bool) else use_checkpoint
    runs: dict[nn.Module, Run] = dict.fromkeys(blocks, run_directly)
    for block in blocks[:num_chosen]:
        is_random = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in block.modules())
        runs[block] = partial(run_again, is_random=is_random, memory=memory)
        if inputs_on_host and hasattr(block, "run_parts_by"):
            block.run_parts_by(runs[block])
            runs[block] = run_directly
    return runs
