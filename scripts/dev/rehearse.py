"""Rehearse the reference run at full size, without its weights: one file to another, one training step, one clip.

    python scripts/dev/rehearse.py [--video PATH] [--workdir DIR] [--report docs/experiments/rehearsal.md] [key=value ...]
    python scripts/dev/rehearse.py --step-only --base configs/video-sd.yaml configs/fit-8gb.yaml --most 9

Writes a file of the exact form and size of the public Stable Diffusion v1 checkpoint with random weights in it,
prepares two short clips, takes one step of training on the processor, samples a clip, and compares the weights before
and after. Each stage is a process of its own, whose time and memory go into the report. The files (about 15 GB for
`configs/video-sd.yaml`) are deleted at the end, however it ends, unless `--keep` is given. With --step-only clips are
made up, nothing is sampled, and the report gets a row with the memory that the step took beside what is counted for it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import islice
from math import ceil, isfinite
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import ModelCheckpoint
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from ldm.config import check, load_config
from ldm.data.example_drive import write_example
from ldm.data.preparing.footage import FootageError, probe, read_frames
from ldm.errors import Parser, UserError, run_command
from ldm.files import write_atomically
from ldm.video import read_video, write_mp4
from scripts.dev.measuring import Measured, describe_machine, run_measured
from scripts.dev.rehearsal import (
    GIVE_BACK,
    Comparison,
    Place,
    Sizes,
    check_disk,
    compare,
    count_sizes,
    image_tensors,
    mistakes,
    name_of,
    num_bytes_in,
    step_taken,
    with_rows_of,
    write_made_up_clips,
    write_public_checkpoint,
    write_row,
)

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "summer dawn scenic byway road drive"
NUM_CLIPS, SAMPLED_FRAMES, SAMPLED_STEPS = 2, 6, 2
TRAINING = 2  # its place among the stages
# Where the rehearsal departs from its config, beside paths and length, and why. The user's own overrides win.
DEPARTURES = {
    "model.params.warmup_steps=0": "the first step of a warm-up is smaller than the gap between float32 numbers near 1",
    "data.params.val_share=0": "both clips are trained on",
    "data.params.num_workers=0": "reading processes share the weights' memory and keep the old values when they change",
    "lightning.callbacks.samples.params.at_start=false": "two sample videos would take most of an hour on a processor",
}
NO_PLAN = "lightning.callbacks.plan=null"  # of a lone step: what counts would be measured with what is counted
WORDS_OF_THE_PUBLIC_FILE = {
    "epoch": 12,
    "global_step": 470000,
    "pytorch-lightning_version": "1.4.2",
    "callbacks": {
        ModelCheckpoint: {
            "monitor": "val/loss_simple_ema",
            "best_model_score": 0.25,
            "best_model_path": "checkpoints/epoch=000012.ckpt",
            "current_score": 0.25,
            "dirpath": "checkpoints",
        }
    },
    "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": 470000, "_step_count": 470001, "last_lr": [1e-4]}],
}


@dataclass(frozen=True)
class Stage:
    """A step of the road, the command line that takes it and a function that finds the file or folder it leaves."""

    name: str
    command: list[str | Path]
    result: Callable[[], Path]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("outputs/rehearsal"), help="default: %(default)s")
    parser.add_argument("--video", type=Path, help="footage to take two clips from (default: a drawn drive)")
    parser.add_argument(
        "-b", "--base", nargs="+", metavar="YAML", default=["configs/video-sd.yaml"], help="configs, merged in turn"
    )
    parser.add_argument("--report", type=Path, default=Path("docs/experiments/rehearsal.md"), help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="do not delete the files at the end")
    parser.add_argument("--write", type=Path, metavar="FILE", help="only write the image checkpoint, there")
    parser.add_argument("--step-only", action="store_true", help="only the training step, on made-up clips")
    parser.add_argument("--ckpt", type=Path, metavar="FILE", help="with --step-only: an image checkpoint that is there")
    parser.add_argument("--most", type=float, metavar="GB", help="with --step-only: it is an error if more is resident")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config")
    options = parser.parse_intermixed_args(arguments)
    options.overrides += [word for word in options.base if "=" in word]
    options.base = [word for word in options.base if "=" not in word]
    for flag, given in (("--ckpt", options.ckpt), ("--most", options.most)):
        if given is not None and not options.step_only:
            raise UserError(f"{flag}: expected --step-only with it; give that too, or leave {flag} out")
    return options


def read_config(bases: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    """The checked config."""
    config = load_config(bases, overrides)
    check(config)
    return config


@contextmanager
def work_folder(parent: Path, keep: bool) -> Iterator[Path]:
    """A fresh folder in `parent` that is deleted at the end, whatever the end; `parent` too if it was not there."""
    was_there = parent.is_dir()
    parent.mkdir(parents=True, exist_ok=True)
    asked_to_end = (signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in asked_to_end}
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-", dir=parent))
    try:
        yield folder
    finally:
        if keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            if not was_there and not any(parent.iterdir()):
                parent.rmdir()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def cut_footage(video: Path | None, folder: Path, config: DictConfig) -> list[Path]:
    """Write as many frames as two clips need, clip by clip, from the start of a video or from a drawn drive."""
    prepare = config.get("prepare") or {}
    fps, size = float(prepare.get("fps", 10)), prepare.get("size", 512)
    data = config.data.params
    length = (data.frames - 1) * min(data.get("strides") or [1]) + 1
    folder.mkdir()
    if video is None:
        video = folder.parent / "drive.mp4"
        side = size if isinstance(size, int) else 512
        write_example(video, num_frames=ceil(25 / fps * NUM_CLIPS * length), size=side)
    info = probe(video)
    native = (info.height // 2 * 2, info.width // 2 * 2)
    frames = list(islice(read_frames(video, fps, native), NUM_CLIPS * length))
    if len(frames) < NUM_CLIPS * length:
        raise FootageError(
            f"{video}: expected at least {NUM_CLIPS * length} frames at {fps:g} a second, for {NUM_CLIPS} clips of "
            f"{length}, found {len(frames)}; give longer footage"
        )
    paths = [folder / f"clip{number}.mp4" for number in range(NUM_CLIPS)]
    for number, path in enumerate(paths):
        write_mp4(path, np.stack(frames[number * length : (number + 1) * length]), fps)
    return paths


def road(place: Place, options: argparse.Namespace, overrides: list[str]) -> Iterator[Stage]:
    """The stages, each to be run before the next is asked for."""
    yield writing(place, options)
    prepare = [sys.executable, ROOT / "scripts/prepare.py", place.footage, "--out", place.prepared, "--prompt", PROMPT]
    yield Stage("prepare two clips", [*prepare, "--config", options.base[0], *overrides], lambda: place.prepared)
    yield training(place, options, overrides)
    sample = [sys.executable, ROOT / "scripts/txt2vid.py", "--prompt", PROMPT, "--frames", str(SAMPLED_FRAMES)]
    sample += ["--steps", str(SAMPLED_STEPS), "--ckpt", place.video_file, "--outdir", place.samples, "--device", "cpu"]
    yield Stage("sample a clip", sample, lambda: place.samples)


def writing(place: Place, options: argparse.Namespace) -> Stage:
    """The stage that makes a stand-in for the public image checkpoint."""
    command = [sys.executable, ROOT / "scripts/dev/rehearse.py", "--base", *options.base, "--write", place.image_file]
    return Stage("write the image checkpoint", [*command, *options.overrides], lambda: place.image_file)


def training(place: Place, options: argparse.Namespace, overrides: list[str]) -> Stage:
    """The stage that takes the step."""
    command = [sys.executable, ROOT / "main.py", "--base", *options.base, "-t", "--accelerator", "cpu"]
    command += ["--max_steps", "1", "--logdir", place.folder / "logs", "--name", "rehearsal"]
    return Stage("train one step", [*command, *overrides], lambda: place.video_file)


def run_stage(stage: Stage, console: Console) -> Measured:
    """Run one stage in sight; raises UserError if it fails."""
    console.print(f"\n== {stage.name}")
    columns = (TextColumn("   {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(stage.name, total=None)
        measured = run_measured(stage.command, lambda line: console.print(f"   {line}", markup=False))
    console.print(f"   {measured.seconds:.1f} s, peak {measured.peak_memory / 2**30:.2f} GiB")
    if measured.status != 0:
        why = f"exit status {measured.status}"
        if measured.status == -signal.SIGKILL:
            why = "it was killed, most likely because memory ran out"
        command = shlex.join(map(str, stage.command))
        raise UserError(f"the stage '{stage.name}' failed ({why}); what it said is above. Its command: {command}")
    return measured


def checks(place: Place, training: Measured, weights: Comparison) -> list[tuple[bool, str]]:
    """What has to be true at the end."""
    found = re.findall(r"\bloss (-?[\w.]+)", training.output)
    loss = float(found[-1]) if found else float("nan")
    frames, fps = read_video(place.only("samples/*.mp4"))
    height, width = frames.shape[1:3]
    sheet = place.only("samples/*.png")
    return [
        (isfinite(loss), f"the loss is a finite number: {loss:.4f}"),
        (
            weights.num_equal > 0 and not weights.changed,
            f"frozen: {weights.num_equal} tensors are what they were in the image checkpoint, bit for bit; changed: "
            f"{', '.join(weights.changed) or 'none'}",
        ),
        (
            weights.num_moved > 0 and not weights.still,
            f"trained: {weights.num_moved} tensors have moved; {len(weights.idle)} more could not yet, because their "
            "gradient is zero as long as the layer after them is; still without such a reason: "
            f"{', '.join(weights.still) or 'none'}",
        ),
        (
            len(frames) == SAMPLED_FRAMES,
            f"the MP4 has {len(frames)} frames of {width}x{height} at {fps:g} a second, and a contact sheet "
            f"({sheet.stat().st_size / 1e6:.1f} MB) lies beside it: colourful noise, for the weights are random",
        ),
    ]


def report(
    rows: Sequence[tuple[Stage, Measured, int]], found: Sequence[tuple[bool, str]], sizes: Sizes, place: Place
) -> str:
    """The report, Markdown."""

    def gib(num_bytes: int | None) -> str:
        return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f}"

    lines = [
        "# Rehearsal", "",
        "Written by `python scripts/dev/rehearse.py`: the reference run at full size with random weights, each stage a "
        "process of its own.", "",
        f"{date.today().isoformat()}. {describe_machine()}.", "",
        f"The network has {sizes.num_parameters:,} parameters, {sizes.num_trained:,} of them trained.", "",
        "| stage | seconds | peak resident GiB | without mapped files | left on disk MB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for stage, measured, num_bytes in rows:
        memory = f"{gib(measured.peak_memory)} | {gib(measured.peak_own_memory)}"
        lines.append(f"| {stage.name} | {measured.seconds:.1f} | {memory} | {num_bytes / 1e6:,.2f} |")
    lines += [
        "",
        "The peak is the kernel's own count for the largest process of the stage. It includes pages of checkpoints "
        "that are mapped rather than read, which the kernel drops when it needs room; the next column leaves them out "
        "and adds up all processes of the stage.",
        "", "## Found", "",
        *(f"* {'' if is_well else '**FAILED** '}{what}" for is_well, what in found),
        "", "## Departures from the config, beside paths and the number of steps", "",
        *(f"* `{departure}`: {why}" for departure, why in DEPARTURES.items()),
        "", "## Commands", "", "```", *(shown(stage, place) for stage, _, _ in rows), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def shown(stage: Stage, place: Place) -> str:
    """A stage's command as one would type it, with WORK for the folder of the rehearsal."""
    words = [str(word).replace(str(place.folder), "WORK").replace(f"{ROOT}/", "") for word in stage.command]
    return shlex.join(["python", *words[1:]])


def rehearse(options: argparse.Namespace) -> None:
    """All stages, the checks and the report; raises UserError when something is not as it should be."""
    console = Console(highlight=False, soft_wrap=True)
    overrides = [*DEPARTURES, *options.overrides]
    config = read_config(options.base, overrides)
    sizes = count_sizes(config)
    if options.video is not None:
        probe(options.video)
    with work_folder(options.workdir, options.keep) as folder:
        check_disk(folder, sizes)
        place = Place(folder)
        cut_footage(options.video, place.footage, config)
        paths = [f"model.params.ckpt_path={place.image_file}", f"data.params.root={place.prepared}"]
        rows = []
        for stage in road(place, options, [*overrides, *paths]):
            measured = run_stage(stage, console)
            rows.append((stage, measured, num_bytes_in(stage.result())))
        with console.status("comparing the weights"):
            weights = compare(place.image_file, place.video_file, config)
        found = checks(place, rows[TRAINING][1], weights)
        text = report(rows, found, sizes, place)
    text = with_rows_of(options.report, text)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.report, text)
    console.print(f"\n{text}\nreport: {options.report}", markup=False)
    failed = [what for is_well, what in found if not is_well]
    if failed:
        raise UserError(f"expected all to be well, found: {'; '.join(failed)}. See {options.report}")


def rehearse_step(options: argparse.Namespace) -> None:
    """The training step alone, and its row of the report; raises UserError when it took too much, or went wrong."""
    console = Console(highlight=False, soft_wrap=True)
    overrides = [*DEPARTURES, NO_PLAN, *options.overrides]
    config = read_config(options.base, overrides)
    with work_folder(options.workdir, options.keep) as folder:
        check_disk(folder, count_sizes(config))
        place = Place(folder)
        if options.ckpt is not None:
            place.image_file = options.ckpt.resolve()
        else:
            run_stage(writing(place, options), console)
        write_made_up_clips(place.prepared, config, place.image_file)
        paths = [f"model.params.ckpt_path={place.image_file}", f"data.params.root={place.prepared}"]
        stage = training(place, options, [*overrides, *paths])
        os.environ.setdefault(*GIVE_BACK)
        measured = run_stage(stage, console)
        with console.status("counting the same step"):
            step = step_taken(name_of(options.base, options.overrides), config, measured)
    write_row(options.report, step)
    console.print(f"\n{step.row()}\nreport: {options.report}", markup=False)
    if found := mistakes(step, options.most):
        raise UserError(f"expected a step that goes well, found: {'; '.join(found)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Rehearse, or only write the checkpoint."""
    options = parse_arguments(arguments)
    if options.write is None:
        (rehearse_step if options.step_only else rehearse)(options)
        return
    tensors, generator = image_tensors(read_config(options.base, options.overrides)), torch.Generator().manual_seed(0)
    write_public_checkpoint(options.write, tensors, WORDS_OF_THE_PUBLIC_FILE, generator)
    print(f"{options.write}: {len(tensors)} tensors, {options.write.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(run_command(main))
