"""Rehearse the reference run at full size with random weights: prepare, one training step, one clip.

    python scripts/dev/rehearse.py [--video PATH] [--workdir DIR] [--report FILE] [key=value ...]
    python scripts/dev/rehearse.py --step-only --base configs/video-sd.yaml configs/fit-8gb.yaml --most 9

Writes a file with the exact format and size of the public Stable Diffusion v1 checkpoint and random weights, prepares
two short clips, takes one training step on the CPU, samples a clip, and compares the weights before and after. Each
stage is a process of its own; the report has its time and memory. The files (about 15 GB for `configs/video-sd.yaml`)
are always deleted at the end unless --keep is given. With --step-only the clips are random, nothing is sampled, and the
report gets a row with the measured and the counted memory of the step.
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
from ldm.data.preparing.footage import FootageError, probe, read_frames
from ldm.data.world import draw_clip
from ldm.errors import Parser, UserError, run_command
from ldm.experiments.tables import markdown_table
from ldm.files import write_atomically
from ldm.video import read_video, write_mp4
from scripts.dev.measuring import Measured, describe_machine, run_measured
from scripts.dev.rehearsal import (
    MALLOC_TRIM,
    RehearsalFiles,
    RehearsalSizes,
    WeightComparison,
    check_disk,
    compare,
    count_sizes,
    failures_of,
    image_tensors,
    measure_step,
    num_bytes_in,
    step_name,
    with_rows_of,
    write_public_checkpoint,
    write_random_clips,
    write_row,
)

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "summer dawn scenic byway road drive"
NUM_CLIPS, SAMPLED_FRAMES, SAMPLED_STEPS = 2, 6, 2
TRAINING = 2  # index of the stage
# Overrides of the config beside paths and length, with reasons. The user's own overrides take precedence.
DEPARTURES = {
    "model.params.warmup_steps=0": "the first warm-up step is smaller than the spacing of float32 numbers near 1",
    "data.params.val_share=0": "both clips are trained on",
    "data.params.num_workers=0": "DataLoader workers share the weights' memory pages and keep a copy when they change",
    "lightning.callbacks.samples.params.at_start=false": "two sample videos take most of an hour on a CPU",
}
NO_PLAN = "lightning.callbacks.plan=null"  # of a single step: the planner's own memory would be measured too
PUBLIC_FILE_KEYS = {
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
    """A stage: its command, and a function that finds the file or folder it leaves."""

    name: str
    command: list[str | Path]
    result: Callable[[], Path]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("outputs/rehearsal"), help="default: %(default)s")
    parser.add_argument("--video", type=Path, help="footage to take two clips from (default: a procedural drive)")
    parser.add_argument(
        "-b", "--base", nargs="+", metavar="YAML", default=["configs/video-sd.yaml"], help="configs, merged in order"
    )
    parser.add_argument(
        "--report", type=Path, default=Path("docs/experiments/rehearsal.md"), help="default: %(default)s"
    )
    parser.add_argument("--keep", action="store_true", help="do not delete the files at the end")
    parser.add_argument("--write", type=Path, metavar="FILE", help="only write the image checkpoint, to FILE")
    parser.add_argument("--step-only", action="store_true", help="only the training step, on random clips")
    parser.add_argument("--ckpt", type=Path, metavar="FILE", help="with --step-only: an existing image checkpoint")
    parser.add_argument("--most", type=float, metavar="GB", help="with --step-only: fail if more memory is resident")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config")
    options = parser.parse_intermixed_args(arguments)
    options.overrides += [word for word in options.base if "=" in word]
    options.base = [word for word in options.base if "=" not in word]
    for flag, given in (("--ckpt", options.ckpt), ("--most", options.most)):
        if given is not None and not options.step_only:
            raise UserError(f"{flag}: expected --step-only with it; add it, or leave out {flag}")
    return options


def read_config(bases: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    """The checked config."""
    config = load_config(bases, overrides)
    check(config)
    return config


@contextmanager
def work_folder(parent: Path, keep: bool) -> Iterator[Path]:
    """A new folder in `parent` that is always deleted at the end; `parent` too if it did not exist."""
    existed = parent.is_dir()
    parent.mkdir(parents=True, exist_ok=True)
    stop_signals = (signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in stop_signals}
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-", dir=parent))
    try:
        yield folder
    finally:
        if keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            if not existed and not any(parent.iterdir()):
                parent.rmdir()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def cut_footage(video: Path | None, folder: Path, config: DictConfig) -> list[Path]:
    """Write the frames of two clips, from the start of a video or from a procedural drive."""
    prepare = config.get("prepare") or {}
    fps, size = float(prepare.get("fps", 10)), prepare.get("size", 512)
    data = config.data.params
    length = (data.frames - 1) * min(data.get("strides") or [1]) + 1
    folder.mkdir()
    if video is None:
        video = folder.parent / "drive.mp4"
        side = size if isinstance(size, int) else 512
        write_mp4(video, draw_clip("summer dawn", 0, ceil(25 / fps * NUM_CLIPS * length), side, 25).frames, fps=25)
    info = probe(video)
    native = (info.height // 2 * 2, info.width // 2 * 2)
    frames = list(islice(read_frames(video, fps, native), NUM_CLIPS * length))
    if len(frames) < NUM_CLIPS * length:
        raise FootageError(
            f"{video}: expected at least {NUM_CLIPS * length} frames at {fps:g} per second, for {NUM_CLIPS} clips of "
            f"{length}, found {len(frames)}; give longer footage"
        )
    paths = [folder / f"clip{number}.mp4" for number in range(NUM_CLIPS)]
    for number, path in enumerate(paths):
        write_mp4(path, np.stack(frames[number * length : (number + 1) * length]), fps)
    return paths


def stages_of(files: RehearsalFiles, options: argparse.Namespace, overrides: list[str]) -> Iterator[Stage]:
    """The stages in order; each needs the files of those before it."""
    yield writing(files, options)
    prepare = [sys.executable, ROOT / "scripts/prepare.py", files.footage, "--out", files.prepared, "--prompt", PROMPT]
    yield Stage("prepare two clips", [*prepare, "--config", options.base[0], *overrides], lambda: files.prepared)
    yield training(files, options, overrides)
    sample = [sys.executable, ROOT / "scripts/txt2vid.py", "--prompt", PROMPT, "--frames", str(SAMPLED_FRAMES)]
    sample += ["--steps", str(SAMPLED_STEPS), "--ckpt", files.video_file, "--outdir", files.samples, "--device", "cpu"]
    yield Stage("sample a clip", sample, lambda: files.samples)


def writing(files: RehearsalFiles, options: argparse.Namespace) -> Stage:
    """The stage that writes a stand-in for the public image checkpoint."""
    command = [sys.executable, ROOT / "scripts/dev/rehearse.py", "--base", *options.base, "--write", files.image_file]
    return Stage("write the image checkpoint", [*command, *options.overrides], lambda: files.image_file)


def training(files: RehearsalFiles, options: argparse.Namespace, overrides: list[str]) -> Stage:
    """The stage that takes one training step."""
    command = [sys.executable, ROOT / "main.py", "--base", *options.base, "-t", "--accelerator", "cpu"]
    command += ["--max_steps", "1", "--logdir", files.folder / "logs", "--name", "rehearsal"]
    return Stage("train one step", [*command, *overrides], lambda: files.video_file)


def run_stage(stage: Stage, console: Console) -> Measured:
    """Run one stage and show its output; raises UserError if it fails."""
    console.print(f"\n== {stage.name}")
    columns = (TextColumn("   {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(stage.name, total=None)
        measured = run_measured(stage.command, lambda line: console.print(f"   {line}", markup=False))
    console.print(f"   {measured.seconds:.1f} s, peak {measured.peak_memory / 2**30:.2f} GiB")
    if measured.status != 0:
        why = f"exit status {measured.status}"
        if measured.status == -signal.SIGKILL:
            why = "killed, most likely out of memory"
        command = shlex.join(map(str, stage.command))
        raise UserError(f"the stage '{stage.name}' failed ({why}); see its output above. Its command: {command}")
    return measured


def checks(files: RehearsalFiles, training: Measured, weights: WeightComparison) -> list[tuple[bool, str]]:
    """The checks at the end: whether each passed, and what it found."""
    found = re.findall(r"\bloss (-?[\w.]+)", training.output)
    loss = float(found[-1]) if found else float("nan")
    frames, fps = read_video(files.only("samples/*.mp4"))
    height, width = frames.shape[1:3]
    sheet = files.only("samples/*.png")
    return [
        (isfinite(loss), f"the loss is finite: {loss:.4f}"),
        (
            weights.num_equal > 0 and not weights.changed,
            f"frozen: {weights.num_equal} tensors equal the image checkpoint bit for bit; changed: "
            f"{', '.join(weights.changed) or 'none'}",
        ),
        (
            weights.num_updated > 0 and not weights.unchanged,
            f"trained: {weights.num_updated} tensors were updated; {len(weights.idle)} more have no gradient while the "
            "layer after them is zero; unchanged without this reason: "
            f"{', '.join(weights.unchanged) or 'none'}",
        ),
        (
            len(frames) == SAMPLED_FRAMES,
            f"the MP4 has {len(frames)} frames of {width}x{height} at {fps:g} per second, with a contact sheet "
            f"({sheet.stat().st_size / 1e6:.1f} MB): coloured noise, as the weights are random",
        ),
    ]


def report(
    rows: Sequence[tuple[Stage, Measured, int]],
    found: Sequence[tuple[bool, str]],
    sizes: RehearsalSizes,
    files: RehearsalFiles,
) -> str:
    """The report in Markdown."""

    def gib(num_bytes: int | None) -> str:
        return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f}"

    cells = [
        [stage.name, f"{measured.seconds:.1f}", gib(measured.peak_memory), gib(measured.peak_own_memory),
         f"{num_bytes / 1e6:,.2f}"]
        for stage, measured, num_bytes in rows
    ]  # fmt: skip
    lines = [
        "# Rehearsal", "",
        "Written by `python scripts/dev/rehearse.py`: the reference run at full size with random weights, each stage "
        "in its own process.", "",
        f"{date.today().isoformat()}. {describe_machine()}.", "",
        f"The network has {sizes.num_parameters:,} parameters, {sizes.num_trained:,} of them trained.", "",
        markdown_table(["stage", "seconds", "peak resident GiB", "without mapped files", "left on disk MB"], cells),
        "The peak is the kernel's count for the largest process of the stage. It includes mapped pages of checkpoints, "
        "which the kernel drops when it needs memory; the next column leaves them out and adds up all processes of the "
        "stage.",
        "", "## Checks", "",
        *(f"* {'' if passed else '**FAILED** '}{text}" for passed, text in found),
        "", "## Overrides of the config, beside paths and the number of steps", "",
        *(f"* `{departure}`: {why}" for departure, why in DEPARTURES.items()),
        "", "## Commands", "", "```", *(shown(stage, files) for stage, _, _ in rows), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def shown(stage: Stage, files: RehearsalFiles) -> str:
    """A stage's command as typed, with WORK for the folder of the rehearsal."""
    command = [str(part).replace(str(files.folder), "WORK").replace(f"{ROOT}/", "") for part in stage.command]
    return shlex.join(["python", *command[1:]])


def rehearse(options: argparse.Namespace) -> None:
    """Run all stages, check and report; raises UserError if a check fails."""
    console = Console(highlight=False, soft_wrap=True)
    overrides = [*DEPARTURES, *options.overrides]
    config = read_config(options.base, overrides)
    sizes = count_sizes(config)
    if options.video is not None:
        probe(options.video)
    with work_folder(options.workdir, options.keep) as folder:
        check_disk(folder, sizes)
        files = RehearsalFiles(folder)
        cut_footage(options.video, files.footage, config)
        paths = [f"model.params.ckpt_path={files.image_file}", f"data.params.root={files.prepared}"]
        rows = []
        for stage in stages_of(files, options, [*overrides, *paths]):
            measured = run_stage(stage, console)
            rows.append((stage, measured, num_bytes_in(stage.result())))
        with console.status("comparing the weights"):
            weights = compare(files.image_file, files.video_file, config)
        found = checks(files, rows[TRAINING][1], weights)
        text = report(rows, found, sizes, files)
    text = with_rows_of(options.report, text)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.report, text)
    console.print(f"\n{text}\nreport: {options.report}", markup=False)
    if failed := [text for passed, text in found if not passed]:
        raise UserError(f"expected all checks to pass, found: {'; '.join(failed)}. See {options.report}")


def rehearse_step(options: argparse.Namespace) -> None:
    """Run the training step alone and write its row; raises UserError if it failed or used too much memory."""
    console = Console(highlight=False, soft_wrap=True)
    overrides = [*DEPARTURES, NO_PLAN, *options.overrides]
    config = read_config(options.base, overrides)
    with work_folder(options.workdir, options.keep) as folder:
        check_disk(folder, count_sizes(config))
        files = RehearsalFiles(folder)
        if options.ckpt is not None:
            files.image_file = options.ckpt.resolve()
        else:
            run_stage(writing(files, options), console)
        write_random_clips(files.prepared, config, files.image_file)
        paths = [f"model.params.ckpt_path={files.image_file}", f"data.params.root={files.prepared}"]
        stage = training(files, options, [*overrides, *paths])
        os.environ.setdefault(*MALLOC_TRIM)
        measured = run_stage(stage, console)
        with console.status("counting the memory of the step"):
            step = measure_step(step_name(options.base, options.overrides), config, measured)
    write_row(options.report, step)
    console.print(f"\n{step.row()}\nreport: {options.report}", markup=False)
    if found := failures_of(step, options.most):
        raise UserError(f"expected a finite loss and at most --most GB, found: {'; '.join(found)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Rehearse, or only write the checkpoint."""
    options = parse_arguments(arguments)
    if options.write is None:
        (rehearse_step if options.step_only else rehearse)(options)
        return
    tensors, generator = image_tensors(read_config(options.base, options.overrides)), torch.Generator().manual_seed(0)
    write_public_checkpoint(options.write, tensors, PUBLIC_FILE_KEYS, generator)
    print(f"{options.write}: {len(tensors)} tensors, {options.write.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(run_command(main))
