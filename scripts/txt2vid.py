"""Make video clips from prompts with one checkpoint file.

    python scripts/txt2vid.py --prompt "a drive along a forest road" --frames 6

Every clip becomes NNNNN.mp4, NNNNN.gif, NNNNN.png (its frames side by side) and NNNNN.json (everything it was made
from, also inside the MP4). `--replay` takes such a JSON or MP4 and makes the same bytes again on the same machine.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ldm.checkpoint import latent_scale
from ldm.checkpoint_config import confined
from ldm.command_line import Parser
from ldm.config import check, load_config, to_container
from ldm.errors import UserError, run_command
from ldm.generation import DEFAULT_FPS, DEFAULT_FRAMES, PRECISIONS, SD_V1_SIZE, ClipGenerator, ClipSettings
from ldm.models.diffusion.sampling import SAMPLERS
from ldm.provenance import (
    check_same_checkpoint,
    device_and_threads,
    hash_checkpoint,
    next_number,
    open_folder,
    read_record,
    replay_notes,
    versions,
    write_clip,
)

LOGS = Path("logs")
DECODE_CHUNK = 4
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Job:
    """Clips that are made as one batch; `wanted` are the places in it that are written out."""

    settings: ClipSettings
    seeds: list[int]
    wanted: list[int]


def clip_parser() -> Parser:
    """The options that a line of a prompt file may set too."""
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    clip = parser.add_argument_group("the clip")
    clip.add_argument("--negative-prompt", metavar="TEXT", help="what guidance moves away from (default: nothing)")
    clip.add_argument("--frames", type=int, metavar="N", help="length (default: as in training)")
    clip.add_argument("--H", type=int, metavar="PIXELS", help="height (default: as in training; SD v1: 512)")
    clip.add_argument("--W", type=int, metavar="PIXELS", help="width (default: as in training; SD v1: 512)")
    clip.add_argument("--fps", type=float, help="playback rate (default: as in training)")
    clip.add_argument("--seed", type=int, metavar="N", help="of the first clip; the next ones count on (default: 42)")
    clip.add_argument("--n_samples", type=int, metavar="N", help="clips made at a time, for one prompt (default: 1)")
    clip.add_argument("--n_iter", type=int, metavar="N", help="how often that is done (default: 1)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: ddim)")
    sampling.add_argument("--steps", type=int, metavar="N", help="diffusion steps (default: 50)")
    sampling.add_argument("--scale", type=float, help="guidance; 1 is none and twice as fast (default: 7.5)")
    sampling.add_argument("--eta", type=float, help="noise between DDIM steps, 0 to 1 (default: 0)")
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; options of the clip that were not given are absent."""
    parser = Parser(
        parents=[clip_parser()], allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s (--prompt TEXT | --from-file FILE | --replay FILE) [options]", description=__doc__,
        epilog="Seeds belong to clips: clip i of a run has seed + i, whatever --n_samples is; making several at a\n"
        "time changes rounding, not content. --precision is that of the UNet; text and pictures are always exact.",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="what to show")
    what.add_argument(
        "--from-file", type=Path, metavar="FILE",
        help="one prompt a line, options after it: a snowy pass --seed 3 --frames 8; lines with # are skipped",
    )  # fmt: skip
    what.add_argument("--replay", type=Path, metavar="FILE", help="a JSON or MP4 written here: make it again")
    files = parser.add_argument_group("files")
    files.add_argument("--ckpt", type=Path, metavar="FILE", help="default: the newest logs/*/checkpoints/last.ckpt")
    files.add_argument("--config", type=Path, metavar="YAML", help="for checkpoints that have no config inside")
    files.add_argument("--outdir", type=Path, default=Path("outputs/txt2vid-samples"), help="default: %(default)s")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    machine.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on CUDA cards that have it, else full")
    machine.add_argument(
        "--decode-chunk", type=int, metavar="N", help=f"frames decoded at a time (default: {DECODE_CHUNK})"
    )
    return parser.parse_args(arguments)


def read_prompt_file(path: Path) -> list[argparse.Namespace]:
    """A namespace per line with `prompt` and the options that follow it; raises UserError with the line's number."""
    if not path.is_file():
        raise UserError(f"{path}: expected a text file with one prompt a line, found no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a text file in UTF-8, found other bytes ({error.reason})") from error
    parser, jobs = clip_parser(), []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        prompt, options = re.fullmatch(r"(.*?)((?:^|\s)--[A-Za-z].*)?", line.strip()).groups()
        parser.where = f"{path}, line {number}: "
        if not prompt:
            raise UserError(f"{parser.where}expected a prompt before the options, found {line.strip()!r}")
        try:
            words = shlex.split(options or "")
        except ValueError as error:
            raise UserError(f"{parser.where}the options do not parse ({error}): {options.strip()!r}") from error
        jobs.append(parser.parse_args(words, argparse.Namespace(prompt=prompt)))
    if not jobs:
        raise UserError(f"{path}: expected one prompt a line, found none")
    return jobs


def plan(arguments: argparse.Namespace, generator: ClipGenerator) -> list[Job]:
    """The batches that the command line asks for, with every setting checked."""
    lines = read_prompt_file(arguments.from_file) if arguments.from_file else [arguments]
    jobs = []
    for line in lines:
        options = {**vars(arguments), **vars(line)}
        height, width = generator.training.size or (SD_V1_SIZE, SD_V1_SIZE)
        names = {field.name for field in fields(ClipSettings)} & set(options)
        given = {
            "frames": generator.training.frames or DEFAULT_FRAMES,
            "fps": generator.training.fps or DEFAULT_FPS,
            "height": options.get("H", height),
            "width": options.get("W", width),
            **{name: options[name] for name in names},
        }
        settings = ClipSettings(**given)
        num_samples, num_iterations = options.get("n_samples", 1), options.get("n_iter", 1)
        seed = options.get("seed", 42)
        for name, value in (("--n_samples", num_samples), ("--n_iter", num_iterations)):
            if value < 1:
                raise UserError(f"{name}: expected at least 1, found {value}")
        num = num_samples * num_iterations
        if not 0 <= seed <= MAX_SEED - num:
            raise UserError(f"--seed: expected a whole number from 0 to 2^63, found {seed}")
        generator.check(settings)
        for first in range(seed, seed + num, num_samples):
            jobs.append(Job(settings, list(range(first, first + num_samples)), list(range(num_samples))))
    return jobs


def find_checkpoint(given: Path | None) -> Path:
    """The checkpoint that was given, or the newest of any run."""
    if given is not None:
        return given
    found = sorted(LOGS.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"--ckpt: expected a checkpoint; none was given, and there is no {LOGS}/*/checkpoints/last.ckpt of a "
            "training run below this folder. Give --ckpt FILE"
        )
    return found[-1]


def choose_device(name: str) -> torch.device:
    """The device called `name`, which must be there; "auto" takes the best."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):  # torch knows others, such as "meta"
            raise RuntimeError("there is no such device")
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: expected cpu or a device this machine has, found {name!r} ({reason})") from error
    return device


def choose_precision(given: str | None, device: torch.device) -> str:
    """What was given, or what suits the device."""
    if given is not None:
        return given
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "full"


@contextmanager
def progress_bar(console: Console) -> Iterator[Any]:
    """A function `show(label, stage, done, total)` that moves a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task, shown = progress.add_task("loading", total=None), ""

        def show(label: str, stage: str, done: int, total: int) -> None:
            nonlocal shown
            if shown != stage:
                shown = stage
                progress.reset(task)
            progress.update(task, description=f"{label} {stage}", completed=done, total=total)

        yield show


def notes(jobs: Sequence[Job], generator: ClipGenerator, cuts: dict[str, str]) -> Iterator[str]:
    """What a user should know before waiting."""
    trained = generator.training
    if not trained.has_time:
        yield "this checkpoint has not been trained on time: every frame is a picture of its own"
    elif trained.frames is not None:
        lengths = sorted({job.settings.frames for job in jobs} - {trained.frames})
        if lengths:
            listed = ", ".join(map(str, lengths))
            yield f"clips of {listed} frames: trained on {trained.frames}; any length works, far ones may drift"
    for prompt, cut in cuts.items():
        yield f"the prompt is longer than the text encoder reads; this end of it has no effect: '{cut}' (of '{prompt}')"


def replayed_job(record: dict[str, Any], generator: ClipGenerator) -> Job:
    """The batch a clip was made in, with that clip alone wanted."""
    settings = ClipSettings(**record["clip"])
    generator.check(settings)
    return Job(settings, record["batch"]["seeds"], [record["batch"]["index"]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the clips that the command line asks for."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(words)
    if options.decode_chunk is not None and options.decode_chunk < 1:
        raise UserError(f"--decode-chunk: expected at least 1 frame, found {options.decode_chunk}")
    console = Console(highlight=False, soft_wrap=True)
    record = None
    if options.replay:
        record = read_record(options.replay)
        options = adopt(options, record)
    device = choose_device(options.device)
    path = find_checkpoint(options.ckpt)
    console.print(f"checkpoint: {path}{' (the newest run)' if options.ckpt is None else ''}", markup=False)
    config = read_config(options.config)
    if record and record["config"] is not None:
        config = confined(record["config"], str(options.replay))
    precision = choose_precision(options.precision, device)
    generator = ClipGenerator(path, config, device, precision)
    jobs = [replayed_job(record, generator)] if record else plan(options, generator)
    open_folder(options.outdir)
    with console.status("reading the checkpoint and the prompts"):
        sha256 = hash_checkpoint(path)
        if record:
            check_same_checkpoint(record, path, sha256)
        prompts = dict.fromkeys(text for job in jobs for text in (job.settings.prompt, job.settings.negative_prompt))
        cuts = generator.read_prompts(list(prompts))
    now = {"versions": versions(), "machine": device_and_threads(device)}
    base = {
        "checkpoint": {"path": str(path), "sha256": sha256},
        "config": config,
        "precision": precision,
        "decode_chunk": options.decode_chunk or DECODE_CHUNK,
        "command": shlex.join(["python", "scripts/txt2vid.py", *words]),
    }
    if record:
        base = {name: record[name] for name in base}
    for note in (*notes(jobs, generator, cuts), *(replay_notes(record, now) if record else ())):
        console.print(f"note: {note}", markup=False)
    make_clips(jobs, generator, {**base, **now}, options.outdir, console)


def make_clips(
    jobs: Sequence[Job], generator: ClipGenerator, base: dict[str, Any], outdir: Path, console: Console
) -> None:
    """Generate and write clip after clip, and print the path of each; `base` is what all their records share."""
    num_clips = sum(len(job.wanted) for job in jobs)
    number = next_number(outdir)
    with progress_bar(console) as show:
        done = 0
        for job in jobs:
            label = f"clip {done + 1} of {num_clips}"
            clips = generator.generate(
                job.settings, job.seeds, base["decode_chunk"], lambda *state, label=label: show(label, *state)
            )
            for index in job.wanted:
                record = {
                    **base,
                    "clip": asdict(job.settings),
                    "seed": job.seeds[index],
                    "batch": {"seeds": job.seeds, "index": index},
                }
                stem = outdir / f"{number + done:05}"
                write_clip(stem, clips[index], record)
                done += 1
                console.print(f"{stem}.mp4, .gif, .png, .json: '{job.settings.prompt}'", markup=False)


def read_config(path: Path | None) -> dict[str, Any] | None:
    """A checked config in plain containers with its scale factor as a number; None for None."""
    if path is None:
        return None
    config = load_config([path])
    check(config)
    tree = to_container(config)
    scale = latent_scale(tree)  # a replay asks no other file for it
    return {**tree, "model": {**tree["model"], "params": {**tree["model"]["params"], "scale_factor": scale}}}


def adopt(options: argparse.Namespace, record: dict[str, Any]) -> argparse.Namespace:
    """The options of a replay: those of the record; only --ckpt, --device and --outdir may be given beside it."""
    clip_options = {action.dest for action in clip_parser()._actions}
    given = sorted(clip_options & set(vars(options)))
    given += [name for name in ("config", "precision", "decode_chunk") if getattr(options, name) is not None]
    if given:
        raise UserError(
            f"--replay: takes every setting of the clip from {options.replay}, so --{given[0].replace('_', '-')} "
            "cannot be given beside it; only --ckpt, --device and --outdir can"
        )
    adopted = {"precision": record["precision"], "decode_chunk": record["decode_chunk"]}
    adopted["ckpt"] = options.ckpt or Path(record["checkpoint"]["path"])
    if options.device == "auto":
        adopted["device"] = record["machine"]["device"].partition(":")[0]
    if adopted.get("device", options.device) == "cpu":
        torch.set_num_threads(record["machine"]["threads"])
    return argparse.Namespace(**{**vars(options), **adopted})


if __name__ == "__main__":
    sys.exit(run_command(main))
