"""What was counted, as lines of text: the same for `scripts/plan.py` and for the start of a training run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import OmegaConf

from ldm.planning.count import ALLOWANCE, AVERAGE, CARD, FROZEN, GIB, STATES, TRAINED, Count
from ldm.planning.proposals import Proposal, needed


@dataclass(frozen=True)
class Card:
    """A card's name, its memory in GB and its nominal peak in TFLOP/s."""

    name: str
    memory: int
    peak: float


# Dense matrix products in bfloat16, summed in float32, at boost clock, from NVIDIA's papers: "Ampere GA102 GPU
# Architecture" v2 (30 series), "Ada GPU Architecture" (40 series), "RTX Blackwell GPU Architecture" (5090), and the
# data sheets of A100, H100 SXM and H200. Figures "with sparsity" are twice these. No program reaches them: on an H200
# 790 have been measured in large products.
CARDS = (
    Card("RTX 3070", 8, 40.6),
    Card("RTX 3080", 10, 59.5),
    Card("RTX 3090", 24, 71.0),
    Card("RTX 4080", 16, 97.5),
    Card("RTX 4090", 24, 165.2),
    Card("RTX 5090", 32, 209.5),
    Card("A100", 80, 312.0),
    Card("H100", 80, 989.4),
    Card("H200", 141, 989.4),
)


def floor_seconds(card: Card, flop: int) -> float:
    """The time of so many operations at the card's nominal peak: no step is faster."""
    return flop / (card.peak * 1e12)


TERA = 1e12


def table(count: Count, machine: str) -> list[str]:
    """The table of a count: sizes, the peak and what it is made of, work and floors."""
    return [*_memory(count, machine), "", *_work(count, machine)]


def proposal_lines(proposal: Proposal, bases: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """A proposal to paste: each switch and its cost, the command with all of them, and the same as YAML.

    bases, overrides: the configs and the words that were there before.
    """
    lines = [
        f"fits, with {needed(proposal.count):.1f} GB needed, if these are set (each with what it costs):", "",
        *(f"  {' '.join(_override(*pair) for pair in rung.overrides):<62} {rung.cost}" for rung in proposal.rungs),
    ]  # fmt: skip
    words = shlex.join([*overrides, *(_override(*pair) for pair in proposal.overrides)])
    tree = OmegaConf.create()
    for key, value in proposal.overrides:
        OmegaConf.update(tree, key, value)
    written = yaml.safe_dump(OmegaConf.to_container(tree), sort_keys=False).splitlines()
    command = f"python main.py --base {shlex.join(bases)} -t --gpus 0, {words}"
    return [*lines, "", command, "", "or as a file to merge over the config:", "", *(f"  {line}" for line in written)]


def gib(num_bytes: float) -> str:
    """Bytes in GiB, with two places, or three below a tenth."""
    value = num_bytes / GIB
    return f"{value:.3f}" if 0 < value < 0.1 else f"{value:.2f}"


def place(count: Count) -> str:
    """Where and when most is in use."""
    peak = count.peak
    module = peak.module.removeprefix("unet.")
    return f"{peak.phase}, at {module}" if module else peak.phase


def _memory(count: Count, machine: str) -> Iterator[str]:
    trained = count.num_trained
    beside = {
        TRAINED: f"{trained / 1e6:,.1f} M parameters",
        FROZEN: f"{(count.num_parameters - trained) / 1e6:,.1f} M parameters",
        STATES: f"{count.sizes[STATES] / trained:.2f} bytes a trained parameter",
        AVERAGE: f"{count.sizes[AVERAGE] / trained:.2f} bytes a trained parameter" if count.sizes[AVERAGE] else "none",
    }
    yield "memory, GiB"
    for kind, num_bytes in count.sizes.items():
        yield f"  {kind:<28}{gib(num_bytes):>8}   {beside.get(kind, '')}".rstrip()
    yield f"  {'activations held':<28}{gib(count.held):>8}   from the forward to the backward pass"
    yield f"  {'peak of live tensors':<28}{gib(count.peak.total):>8}   {place(count)}"
    for kind, num_bytes in sorted(count.peak.kinds.items(), key=lambda item: -item[1]):
        if num_bytes >= count.peak.total / 1000:
            yield f"    {kind:<26}{gib(num_bytes):>8}"
    phases = ", ".join(f"{phase} {gib(peak.total)}" for phase, peak in count.peaks.items() if phase != "before")
    yield f"  {'peaks of the phases':<39}  {phases}"
    if count.on_host and machine == CARD:
        yield f"  {'in host memory':<28}{gib(count.on_host):>8}"
    if machine == CARD:
        least, most = ((count.peak.total + beside) / GIB for beside in ALLOWANCE)
        yield f"  {'the card needs':<28}{least:>8.1f}   to {most:.1f}, with context, workspaces and gaps"


def _work(count: Count, machine: str) -> Iterator[str]:
    again = f", {count.again / TERA:.3g} of them for blocks that are computed again" if count.again else ""
    yield f"work: {count.flop / TERA:.4g} TFLOP a step{again}"
    if machine == CARD:
        times = (f"{card.name} {_milliseconds(floor_seconds(card, count.flop))}" for card in CARDS)
        yield f"no step can be faster than, ms: {', '.join(times)}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.01 else f"{1000 * seconds:.2g}"


def _override(key: str, value: Any) -> str:
    return f"{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
