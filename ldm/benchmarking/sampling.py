"""The section `sample`: clips of 16 frames with guidance, without text encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ldm.benchmarking.contestants import CONTESTANTS, CONTEXT_DIM, LATENT_CHANNELS, NUM_TOKENS, Case
from ldm.benchmarking.rows import GOALS, Row
from ldm.benchmarking.timing import Budget, Seconds, take_turns
from ldm.models.diffusion.sampling import GuidedDenoiser, build_scheduler, sample
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.modules.cuda_graphs import play_back
from ldm.modules.projections import join_projections

SCALE = 7.5


def sample_clips(
    case: Case, steps: int, sampler: str, device: torch.device, rounds: int, budget: Budget
) -> Iterator[Row]:
    """Clips by our network as `txt2vid.py` runs it, random weights: weights of the precision, projections joined."""
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

    words = f"{case}, {steps} steps of {sampler}, guidance {SCALE:g}, {case.precision}"
    clips(2)
    row = Row("sample", words, "ours", Seconds.of(take_turns({"ours": clips}, rounds, device, budget)["ours"]))
    rows = [row]
    if device.type == "cuda":
        play_back(network)
        clips(2)
        taken = take_turns({"played back": clips}, rounds, device, budget)["played back"]
        rows.append(Row("sample", words, "ours, played back", Seconds.of(taken)))
    key = f"{device.type} sample {steps}"
    if key in GOALS:
        best = min(rows, key=lambda row: row.seconds.median)
        best.found = {key: best.seconds.median}
    yield from rows
