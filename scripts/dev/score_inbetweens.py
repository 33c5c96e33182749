"""Error of the frames that a checkpoint makes between known frames, beside that of blending the known frames.

    python scripts/dev/score_inbetweens.py --ckpt CKPT --prepared DIR

The clips are those of DIR that the config in the checkpoint holds out from training. The first and the last frame of
each clip are given and the others are made. Errors are root mean squares of scaled latents over the frames made. A
sample has a larger error than the mean of all samples, which blending is close to; --sampler dpm++ --steps 1 makes the
network's own mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ldm.checkpoint import first_stage_tensors, identity, text_tensors
from ldm.config import build
from ldm.config.schema import mapping_at
from ldm.data.clips import ClipDataModule
from ldm.errors import Parser, UserError, run_command
from ldm.experiments.tables import markdown_table
from ldm.files import write_atomically
from ldm.modules.posterior import posterior_mean
from ldm.sampling.denoisers import GuidedDenoiser, KnownDenoiser, KnownLatents
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.loop import build_scheduler, initial_noise, sample

DATA = "ldm.data.clips.ClipDataModule"
BATCH = 8


def held_out(generator: ClipGenerator, prepared: Path) -> ClipDataModule:
    """The data module of the checkpoint's config, on the folder `prepared`; raises UserError."""
    config = generator.checkpoint.config or {}
    params = dict(mapping_at("data.params", mapping_at("data", config.get("data")).get("params")))
    kwargs = {key: params[key] for key in ("frames", "strides", "val_share", "seed") if key in params}
    if "frames" not in kwargs:
        raise UserError(f"{generator.checkpoint.path}: expected the checkpoint of a training run, found no data config")
    data = build({"target": DATA, "params": {**kwargs, "root": str(prepared), "num_workers": 0}}, "data")
    data.setup()
    first_stage, text_encoder = first_stage_tensors(generator.checkpoint), text_tensors(generator.checkpoint)
    data.prepared.check_encoders(identity(first_stage), identity(text_encoder), generator.scale_factor)
    if not len(data.val_clips) or data.frames < 3:
        raise UserError(
            f"{prepared}: expected held-out clips of at least 3 frames, found {len(data.val_clips)} of {data.frames}; "
            "train with data.params.val_share above 0 on more scenes"
        )
    return data


def windows(data: ClipDataModule, num: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of posterior means `b t c h w`, captions `b n d` and rates `b` of up to `num` clips per rate."""
    by_rate: dict[int, list[int]] = {}
    for index, (_, _, stride) in enumerate(data.val_clips.windows):
        by_rate.setdefault(stride, []).append(index)
    for indices in by_rate.values():
        spread = np.unique(np.linspace(0, len(indices) - 1, min(num, len(indices))).round().astype(int))
        chosen = [indices[number] for number in spread]
        for start in range(0, len(chosen), BATCH):
            clips = [data.val_clips[index] for index in chosen[start : start + BATCH]]
            moments = torch.cat([clip.moments for clip in clips]).float()
            means = torch.stack([posterior_mean(moment) for moment in moments])
            yield means, torch.cat([clip.context for clip in clips]).float(), torch.cat([clip.fps for clip in clips])


def blend(first: Tensor, last: Tensor, frames: int) -> Tensor:
    """Linear interpolation from the first to the last latents: `b c h w`, `b c h w` -> `b t c h w`."""
    return torch.stack([torch.lerp(first, last, frame / (frames - 1)) for frame in range(frames)], dim=1)


@torch.no_grad()
def score(generator: ClipGenerator, data: ClipDataModule, num: int, steps: int, sampler: str, seed: int) -> list[dict]:
    """One row per clip: its rate and the mean squared errors of the model and of the blend.

    Fails unless the known latents are returned bit for bit.
    """
    rows, batches = [], list(windows(data, num))
    for index, (means, context, fps) in enumerate(track(batches, "frames between", console=Console(stderr=True))):
        clean = (generator.scale_factor * means).to(generator.device)
        frames = clean.shape[1]
        generators = [torch.Generator().manual_seed(seed + BATCH * index + number) for number in range(len(clean))]
        noise = initial_noise(*clean.shape, generators, generator.noise).to(clean)
        known = KnownLatents.placed(clean[:, [0, -1]], [0, frames - 1], frames)
        network = GuidedDenoiser(generator.unet, context.to(generator.device, generator.dtype), fps=fps)
        denoiser = KnownDenoiser(network, generator.schedule, known, noise, fill=generator.fill)
        made = sample(denoiser, build_scheduler(sampler, generator.schedule), noise, steps)
        if not torch.equal(made[:, [0, -1]], clean[:, [0, -1]]):
            raise AssertionError("the sampler changed known latents")
        blended = blend(clean[:, 0], clean[:, -1], frames)
        errors = [(guess - clean)[:, 1:-1].square().flatten(1).mean(1) for guess in (made, blended)]
        rows += [
            {"fps": rate, "model": ours, "blend": theirs}
            for rate, ours, theirs in zip(fps.tolist(), *(error.tolist() for error in errors), strict=True)
        ]
    return rows


def summary(rows: Sequence[dict]) -> str:
    """A Markdown table per rate and in total: root mean squared errors, and the model's relative improvement."""
    lines = []
    rates = sorted({row["fps"] for row in rows}, reverse=True)
    parts = [(f"{rate:g}", [row for row in rows if row["fps"] == rate]) for rate in rates]
    for name, chosen in [*parts, ("all", rows)]:
        model, blended = (float(np.mean([row[kind] for row in chosen])) for kind in ("model", "blend"))
        below = [f"{1 - (model / blended) ** power:.1%}" if blended else "-" for power in (0.5, 1)]
        lines.append([name, f"{len(chosen)}", f"{blended**0.5:.4f}", f"{model**0.5:.4f}", *below])
    headings = ["frames per second", "clips", "blend", "model", "model below blend", "the same squared"]
    return markdown_table(headings, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Score a checkpoint and print the table."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="network with known frames")
    parser.add_argument("--prepared", type=Path, required=True, metavar="DIR", help="the set it was trained on")
    parser.add_argument("--clips", type=int, default=64, metavar="N", help="clips per rate (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="diffusion steps (default: %(default)s)")
    parser.add_argument("--sampler", default="ddim", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file with a row per clip")
    given = parser.parse_args(arguments)
    if given.clips < 1:
        raise UserError(f"--clips: expected at least 1, found {given.clips}")
    generator = ClipGenerator(given.ckpt)
    generator.check_given("frames between")
    rows = score(generator, held_out(generator, given.prepared), given.clips, given.steps, given.sampler, given.seed)
    if given.out:
        write_atomically(given.out, json.dumps(rows, indent=1) + "\n")
    print(summary(rows), end="")


if __name__ == "__main__":
    sys.exit(run_command(main))
