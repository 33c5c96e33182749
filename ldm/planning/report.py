"""A count as lines of text, the same for `scripts/plan.py` and for the start of a training run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import OmegaConf

from ldm.planning.count import ALLOWANCE, AVERAGE, FROZEN, GIB, GPU, STATES, TRAINED, StepCount
from ldm.planning.proposals import Proposal, needed

TERA = 1e12


@dataclass(frozen=True)
class GPUModel:
    """A GPU's name, its memory in GB and its nominal peak in TFLOP/s."""

    name: str
    memory: int
    peak: float

    def floor_seconds(self, flop: int) -> float:
        """The time of so many operations at the nominal peak: no step is faster."""
        return flop / (self.peak * TERA)


# Dense matrix products in bfloat16, accumulated in float32, at boost clock, from NVIDIA's papers: "Ampere GA102 GPU
# Architecture" v2 (30 series), "Ada GPU Architecture" (40 series), "RTX Blackwell GPU Architecture" (5090), and the
# data sheets of A100, H100 SXM and H200. Figures "with sparsity" are twice these. No program reaches them: 790 were
# measured in large products on an H200.
GPUS = (
    GPUModel("RTX 3070", 8, 40.6),
    GPUModel("RTX 3080", 10, 59.5),
    GPUModel("RTX 3090", 24, 71.0),
    GPUModel("RTX 4080", 16, 97.5),
    GPUModel("RTX 4090", 24, 165.2),
    GPUModel("RTX 5090", 32, 209.5),
    GPUModel("A100", 80, 312.0),
    GPUModel("H100", 80, 989.4),
    GPUModel("H200", 141, 989.4),
)


def table(count: StepCount, machine: str) -> list[str]:
    """Sizes, the peak and its parts, work and least times."""
    return [*_memory(count, machine), "", *_work(count, machine)]


def proposal_lines(proposal: Proposal, bases: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """A proposal to paste: each switch and its cost, the command with all of them, and the same as YAML.

    bases, overrides: the configs and overrides of the counted run.
    """
    lines = [f"fits, with {needed(proposal.count):.1f} GB needed, if these are set (each with what it costs):", ""]
    for switch in proposal.switches:
        lines.append(f"  {' '.join(_override(*pair) for pair in switch.overrides):<62} {switch.cost}")
    arguments = shlex.join([*overrides, *(_override(*pair) for pair in proposal.overrides)])
    tree = OmegaConf.create()
    for key, value in proposal.overrides:
        OmegaConf.update(tree, key, value)
    written = yaml.safe_dump(OmegaConf.to_container(tree), sort_keys=False).splitlines()
    command = f"python main.py --base {shlex.join(bases)} -t --gpus 0, {arguments}"
    return [*lines, "", command, "", "or as a file to merge onto the config:", "", *(f"  {line}" for line in written)]


def gib(num_bytes: float) -> str:
    """Bytes in GiB, with two decimals, or three below a tenth."""
    value = num_bytes / GIB
    return f"{value:.3f}" if 0 < value < 0.1 else f"{value:.2f}"


def _memory(count: StepCount, machine: str) -> Iterator[str]:
    trained, peak = count.num_trained, count.peak
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
    module = peak.module.removeprefix("unet.")
    where = f"{peak.phase}, at {module}" if module else peak.phase
    yield f"  {'peak of live tensors':<28}{gib(peak.total):>8}   {where}"
    for kind, num_bytes in sorted(peak.kinds.items(), key=lambda item: -item[1]):
        if num_bytes >= peak.total / 1000:
            yield f"    {kind:<26}{gib(num_bytes):>8}"
    phases = ", ".join(f"{phase} {gib(peak.total)}" for phase, peak in count.peaks.items() if phase != "before")
    yield f"  {'peaks of the phases':<39}  {phases}"
    if count.on_host and machine == GPU:
        yield f"  {'in host memory':<28}{gib(count.on_host):>8}"
    if machine == GPU:
        least, most = ((peak.total + extra) / GIB for extra in ALLOWANCE)
        yield f"  {'the GPU needs':<28}{least:>8.1f}   to {most:.1f}, with context, workspaces and gaps"


def _work(count: StepCount, machine: str) -> Iterator[str]:
    again = f", {count.again / TERA:.3g} of them for recomputed blocks" if count.again else ""
    yield f"work: {count.flop / TERA:.4g} TFLOP a step{again}"
    if machine == GPU:
        times = (f"{gpu.name} {_milliseconds(gpu.floor_seconds(count.flop))}" for gpu in GPUS)
        yield f"no step can be faster than, ms: {', '.join(times)}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.01 else f"{1000 * seconds:.2g}"


def _override(key: str, value: Any) -> str:
    return f"{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
