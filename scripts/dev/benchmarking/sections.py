"""The sections `train`, `sample` and `memory`: training steps, sampling, and configs under a memory cap."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ldm.config import check, load_config, to_container
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError, is_lack_of_memory
from ldm.modules.compiled import use_cuda_graphs
from ldm.modules.nn import join_projections
from ldm.planning.count import count_step, shape_of
from ldm.planning.proposals import needed, propose
from ldm.sampling.denoisers import GuidedDenoiser
from ldm.sampling.loop import build_scheduler, sample
from scripts.dev.benchmarking.child import ask_child
from scripts.dev.benchmarking.contestants import (
    CONTESTANTS,
    CONTEXT_DIM,
    LATENT_CHANNELS,
    NUM_TOKENS,
    Case,
    why_missing,
)
from scripts.dev.benchmarking.rows import GIB, GOALS, BenchmarkRow
from scripts.dev.benchmarking.steps import TrainingStep, count_flop
from scripts.dev.benchmarking.timing import Budget, Seconds, ratios, take_turns

WARM_UPS = 2  # steps
CHILD_SECONDS = 240
REFERENCE = "configs/video-sd.yaml"
SCALE = 7.5  # of guidance
SIDE, STEPS = 64, 4  # latent and steps under a memory cap
PLAN_SECONDS = 150  # of a search for a config that fits


def compare_steps(
    case: Case, names: Sequence[str], device: torch.device, rounds: int, budget: Budget, peak: float
) -> Iterator[BenchmarkRow]:
    """A row per contestant: available ones, measured in turns; then the others with the reason.

    peak: measured operations per second of a matrix product of this precision.
    """
    label = f"{case}, {case.precision}"
    steps: dict[str, TrainingStep] = {}
    absent = []
    for name in names:
        reason = why_missing(name)
        if reason is None:
            reason = _begin(steps, name, case, device)
        if reason is not None:
            absent.append(BenchmarkRow("train", label, CONTESTANTS[name].title, note=reason))
    seconds = take_turns(steps, rounds, device, budget)
    found = ratios(seconds, "ours") if "ours" in steps else {}
    for name, step in steps.items():
        flop, taken = count_flop(name, case, step), Seconds.of(seconds[name])
        lacks = CONTESTANTS[name].lacks
        row = BenchmarkRow(
            "train", label, CONTESTANTS[name].title, taken, found.get(name), flop, flop / taken.median / peak
        )
        row.peak_bytes = step.gpu_peak()
        row.note = f"has no {lacks}" if lacks else ""
        key = f"{device.type} {name}"
        if key in GOALS and row.ratio is not None:
            row.found[key] = row.ratio
        yield row
    yield from absent
    steps.clear()
    gc.collect()


def _begin(steps: dict[str, TrainingStep], name: str, case: Case, device: torch.device) -> str | None:
    """Build a contestant beside the others and warm it up; returns None, or why it does not run."""
    try:
        step = TrainingStep(name, case, device)
        for _ in range(WARM_UPS):
            step()
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return "does not fit beside the others"
    steps[name] = step
    return None


def peak_memories(case: Case, names: Sequence[str], device: torch.device, budget: Budget) -> Iterator[BenchmarkRow]:
    """Peak memory of two steps of each contestant, each in a process of its own."""
    for name in names:
        row = BenchmarkRow("memory", f"{case}, {case.precision}", CONTESTANTS[name].title)
        row.note = why_missing(name) or ""
        if not row.note:
            request = {"contestant": name, "case": asdict(case), "device": str(device), "steps": WARM_UPS}
            found = ask_child(request, min(CHILD_SECONDS, budget.left))
            row.peak_bytes, row.note = found.get("peak_bytes"), found.get("error", "in its own process, two steps")
        yield row


def reference_step(frames: int, device: torch.device, peak: float, budget: Budget) -> Iterator[BenchmarkRow]:
    """Steps of the reference run as configured, without checkpointing: attention frozen, 8-bit states, average."""
    case = f"2 x {frames} frames, {REFERENCE}, no checkpointing"
    overrides = ["model.params.unet_config.params.use_checkpoint=false", f"data.params.frames={frames}"]
    request: dict[str, Any] = {
        "base": [REFERENCE], "overrides": overrides, "device": str(device), "side": 64, "steps": 15,
    }  # fmt: skip
    row = BenchmarkRow("train", case, "the reference run")
    found = ask_child(request, min(CHILD_SECONDS, budget.left))
    row.note, row.peak_bytes = found.get("error", ""), found.get("peak_bytes")
    if "seconds" in found:
        row.seconds, row.flop = Seconds.of(found["seconds"][5:]), found["flop"]
        row.share = row.flop / row.seconds.median / peak
        row.found = {f"cuda step {frames}": row.seconds.median, f"cuda share {frames}": row.share}
    yield row


def sample_clips(
    case: Case, steps: int, sampler: str, device: torch.device, rounds: int, budget: Budget
) -> Iterator[BenchmarkRow]:
    """Sampling with our network as in `txt2vid.py`, random weights of the precision, joined projections."""
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    torch.manual_seed(42)
    with torch.device(device):
        network = CONTESTANTS["ours"].build(case).to(dtype).eval().requires_grad_(False)
    join_projections(network)
    context, uncond = torch.randn(2, case.batch, NUM_TOKENS, CONTEXT_DIM, device=device).to(dtype)
    noise = torch.randn(case.batch, case.frames, LATENT_CHANNELS, case.side, case.side, device=device)
    denoiser = GuidedDenoiser(network, context, uncond, SCALE)
    schedule = NoiseSchedule().to(device)

    def clips(num: int = steps) -> torch.Tensor:
        return sample(denoiser, build_scheduler(sampler, schedule), noise, num)

    label = f"{case}, {steps} steps of {sampler}, guidance {SCALE:g}, {case.precision}"
    clips(2)
    row = BenchmarkRow("sample", label, "ours", Seconds.of(take_turns({"ours": clips}, rounds, device, budget)["ours"]))
    rows = [row]
    if device.type == "cuda":
        use_cuda_graphs(network)
        clips(2)
        taken = take_turns({"graph": clips}, rounds, device, budget)["graph"]
        rows.append(BenchmarkRow("sample", label, "ours, CUDA graph", Seconds.of(taken)))
    key = f"{device.type} sample {steps}"
    if key in GOALS:
        best = min(rows, key=lambda row: row.seconds.median)
        best.found = {key: best.seconds.median}
    yield from rows


@dataclass(frozen=True)
class Cap:
    """A config on a GPU of so many GB; `goal` is a key of `GOALS`."""

    gigabytes: float
    base: tuple[str, ...]
    overrides: tuple[str, ...]
    goal: str | None = None

    def __str__(self) -> str:
        names = [*(path.rpartition("/")[2] for path in self.base[-1:]), *self.overrides]
        return f"{' '.join(names)} in {self.gigabytes:g} GB"


def _preset(name: str, batch: int, frames: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (REFERENCE, f"configs/{name}.yaml"), (f"data.params.batch_size={batch}", f"data.params.frames={frames}")


CAPS = (
    Cap(8, *_preset("fit-8gb", 2, 5), "cuda fit 2x5"),
    Cap(12, *_preset("fit-12gb", 2, 25), "cuda fit 2x25"),
    Cap(24, *_preset("long-64", 2, 64), "cuda fit 2x64"),
    Cap(24, *_preset("long-181", 1, 181), "cuda fit 1x181"),
    Cap(12, *_preset("temporal-only", 2, 25), "cuda fit temporal"),
)


def try_to_fit(cap: Cap, device: torch.device, budget: Budget, side: int = SIDE) -> Iterator[BenchmarkRow]:
    """Some steps under the cap: does the config fit, and if not, which one would? Never a traceback."""
    if device.type != "cuda":
        raise UserError("memory: expected an NVIDIA GPU to cap, found none; leave out --vram")
    request = {
        "base": cap.base, "overrides": cap.overrides, "cap": cap.gigabytes, "device": str(device), "side": side,
        "steps": STEPS, "counted": False,
    }  # fmt: skip
    row = BenchmarkRow("memory", str(cap), "fits")
    found = ask_child(request, min(CHILD_SECONDS, budget.left))
    row.peak_bytes = found.get("peak_bytes")
    if found.get("is_out_of_memory"):
        row.name, row.note = "does not fit", plan_that_fits(cap, budget)
        value = float("inf")
    elif "error" in found:
        row.name, row.note, value = "not measured", found["error"], None
    else:
        row.seconds, value = Seconds.of(found["seconds"][2:]), cap.gigabytes
        row.note = f"{row.peak_bytes / GIB:.2f} GiB of tensors"
    if cap.goal is not None and value is not None:
        row.found = {cap.goal: value}
    yield row


def plan_that_fits(cap: Cap, budget: Budget) -> str:
    """Counted overrides that make a config fit; without time to count, the command that does."""
    command = f"python scripts/plan.py --base {' '.join(cap.base)} --vram {cap.gigabytes:g} {' '.join(cap.overrides)}"
    if not budget.has(PLAN_SECONDS):
        return f"to find what fits, run: {command}"
    try:
        config = load_config(list(cap.base), list(cap.overrides))
        check(config)
        tree = to_container(config)
        shape = shape_of(tree, (512, 512))
        proposal = propose(tree, cap.gigabytes, lambda changed: count_step(changed, shape))
    except UserError as error:
        return str(error)
    return f"fits with {_words(proposal.overrides)} ({needed(proposal.count):.1f} GB, counted)"


def _words(overrides: Sequence[tuple[str, object]]) -> str:
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides)
