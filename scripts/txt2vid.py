"""Sample video clips from prompts, images and videos with one checkpoint.

    python scripts/txt2vid.py --prompt "a drive along a forest road" --frames 6

The options are in `ldm.sampling.options`, where `--help` comes from.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ldm.checkpoint import latent_scale, read_checkpoint
from ldm.checkpoint.layouts import BUNDLED, is_bundle
from ldm.checkpoint.reading import confined
from ldm.checkpoint.temporal import Merged, load_with_temporal
from ldm.config import check, load_config, to_container
from ldm.config.schema import trusting
from ldm.devices import choose_device, choose_precision, keep_freed_memory, set_up_gpu
from ldm.errors import UserError, printable, run_command
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.options import DECODE_CHUNK, parse_arguments, read_prompt_file, refuse_beside_replay
from ldm.sampling.progress import progress_bar
from ldm.sampling.record import (
    check_same_weights,
    device_and_threads,
    given_files,
    hash_given,
    hash_weights,
    next_number,
    open_folder,
    read_record,
    replay_notes,
    versions,
    write_clip,
)
from ldm.sampling.request import ClipRequest, notes, read_request, repeat_request

LOGS = Path("logs")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class ClipBatch:
    """Clips sampled as one batch; `wanted` are the indices of those to write."""

    request: ClipRequest
    given: dict[str, dict[str, str]]  # as in a record
    seeds: list[int]
    wanted: list[int]


def plan(arguments: argparse.Namespace, generator: ClipGenerator) -> list[ClipBatch]:
    """The batches of a command line, settings checked and given files read."""
    lines = read_prompt_file(arguments.from_file) if arguments.from_file else [arguments]
    batches = []
    for line in lines:
        options = {**vars(arguments), **vars(line)}
        num_samples, num_iterations = options.get("n_samples", 1), options.get("n_iter", 1)
        seed = options.get("seed", 42)
        for name, value in (("--n_samples", num_samples), ("--n_iter", num_iterations)):
            if value < 1:
                raise UserError(f"{name}: expected at least 1, found {value}")
        num = num_samples * num_iterations
        if not 0 <= seed <= MAX_SEED - num:
            raise UserError(f"--seed: expected a whole number from 0 to 2^63, found {seed}")
        request = read_request(options, generator)
        given = hash_given(request.files)
        for first in range(seed, seed + num, num_samples):
            seeds = list(range(first, first + num_samples))
            batches.append(ClipBatch(request, given, seeds, list(range(num_samples))))
    return batches


def find_weights(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """The checkpoint, or the image model and the file of temporal layers to merge into it."""
    if options.base is None and options.temporal is None:
        return find_checkpoint(options.ckpt), None
    if options.base is None or options.temporal is None:
        given, missing = ("--base", "--temporal") if options.temporal is None else ("--temporal", "--base")
        raise UserError(f"{given}: expected {missing} with it, found none; give an image model and temporal layers")
    for name in ("ckpt", "config"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: expected none with --base and --temporal, which determine it; leave it out")
    return options.base, options.temporal


def find_checkpoint(given: Path | None) -> Path:
    """The given checkpoint, the newest of any run, or the bundled model."""
    if given is not None:
        return given
    found = sorted(LOGS.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if found:
        return found[-1]
    if not is_bundle(BUNDLED):
        raise UserError(
            f"--ckpt: expected a checkpoint, found none: no option, no {LOGS}/*/checkpoints/last.ckpt of a run below "
            f"this folder, and no bundled model in {BUNDLED}; give --ckpt FILE"
        )
    return relative_path(BUNDLED)


def relative_path(path: Path) -> Path:
    """A path below the working folder relative to it; other paths unchanged."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def describe_origin(path: Path, options: argparse.Namespace, temporal: Path | None) -> str:
    """How the checkpoint was found, printed after its path."""
    if temporal is not None:
        return f" with {temporal}"
    if path.resolve() == BUNDLED:
        return " (the bundled model)"
    if options.ckpt is not None:
        return ""
    other = f"; the bundled model is --ckpt {relative_path(BUNDLED)}" if is_bundle(BUNDLED) else ""
    return f" (the newest run{other})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample the clips of a command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(arguments)
    if options.decode_chunk is not None and options.decode_chunk < 1:
        raise UserError(f"--decode-chunk: expected at least 1 frame, found {options.decode_chunk}")
    with trusting(options.trust_config):
        run(options, shlex.join(["python", "scripts/txt2vid.py", *arguments]))


def run(options: argparse.Namespace, command: str) -> None:
    """Sample the clips of a parsed command line, which goes into their records."""
    console = Console(highlight=False, soft_wrap=True)
    record = None
    if options.replay:
        record = read_record(options.replay)
        options = adopt(options, record)
    device = choose_device("auto" if options.device is None else options.device)
    path, temporal = find_weights(options)
    console.print(f"checkpoint: {path}{describe_origin(path, options, temporal)}", markup=False)
    config = read_config(options.config)
    if record and record["config"] is not None:
        config = confined(record["config"], str(options.replay))
    precision = choose_precision(options.precision, device)
    set_up_gpu(exact=precision == "full", repeatable=True)
    keep_freed_memory()
    merged = Merged(read_checkpoint(path), None) if temporal is None else load_with_temporal(path, temporal)
    decoder = True if options.temporal_decoder is None else read_checkpoint(options.temporal_decoder)
    generator = ClipGenerator(
        merged.checkpoint, config, device, precision, options.compile, options.cuda_graphs, decoder
    )
    with console.status("reading given files"):
        batches = [replayed_batch(record, generator)] if record else plan(options, generator)
    open_folder(options.outdir)
    with console.status("reading the checkpoint and the prompts"):
        files = {"checkpoint": path, "temporal": temporal, "temporal_decoder": options.temporal_decoder}
        files = {kind: hash_weights(file) for kind, file in files.items()}
        if record:
            check_same_weights(record, files)
        cuts = generator.read_prompts(list(dict.fromkeys(text for batch in batches for text in batch.request.prompts)))
    now = {"versions": versions(), "machine": device_and_threads(device)}
    base = {
        **files,
        "config": config,
        "precision": precision,
        "compiled": options.compile,
        "decode_chunk": options.decode_chunk or DECODE_CHUNK,
        "command": command,
    }
    if record:
        base = {name: record[name] for name in base}
    all_notes = [merged.warning] if merged.warning else []
    all_notes += [note for batch in batches for note in notes(batch.request, generator)]
    all_notes += [
        f"the prompt exceeds the text encoder's length; this part has no effect: '{cut}' (of '{prompt}')"
        for prompt, cut in cuts.items()
    ]
    for note in dict.fromkeys([*all_notes, *(replay_notes(record, now) if record else ())]):
        console.print(f"note: {printable(note)}", markup=False)
    make_clips(batches, generator, {**base, **now}, options.outdir, console)


def replayed_batch(record: dict[str, Any], generator: ClipGenerator) -> ClipBatch:
    """The batch of a recorded clip, of which only that clip is wanted."""
    request = repeat_request(record["clip"], given_files(record), generator)
    return ClipBatch(request, record["given"], record["batch"]["seeds"], [record["batch"]["index"]])


def make_clips(
    batches: Sequence[ClipBatch], generator: ClipGenerator, base: dict[str, Any], outdir: Path, console: Console
) -> None:
    """Sample and write all clips, and print plans and paths; `base` is common to their records."""
    num_clips = sum(len(batch.wanted) for batch in batches)
    number = next_number(outdir)
    shown, done = None, 0
    for batch in batches:
        settings, given, label = batch.request.settings, batch.request.given, f"clip {done + 1} of {num_clips}"
        if (lines := batch.request.describe()) != shown:
            console.print("plan:", "\n      ".join(lines), markup=False)
            shown = lines
        with progress_bar(console, f"{label} loading") as update:
            show = partial(_show, update, label)
            clips = generator.generate(settings, batch.seeds, base["decode_chunk"], show, given)
        for index in batch.wanted:
            record = {
                **base,
                "clip": asdict(settings),
                "given": batch.given,
                "seed": batch.seeds[index],
                "batch": {"seeds": batch.seeds, "index": index},
            }
            stem = outdir / f"{number + done:05}"
            write_clip(stem, clips[index], record)
            done += 1
            console.print(f"{stem}.mp4, .gif, .png, .json: '{printable(settings.prompt)}'", markup=False)


def _show(update: Callable[..., None], label: str, activity: str, done: int, total: int) -> None:
    update(description=f"{label} {activity}", completed=done, total=total)


def read_config(path: Path | None) -> dict[str, Any] | None:
    """A checked config in plain containers with its scale factor as a number; None for None."""
    if path is None:
        return None
    config = load_config([path])
    check(config)
    tree = to_container(config)
    scale = latent_scale(tree)  # a replay needs no other file
    return {**tree, "model": {**tree["model"], "params": {**tree["model"]["params"], "scale_factor": scale}}}


def adopt(options: argparse.Namespace, record: dict[str, Any]) -> argparse.Namespace:
    """The options of a replay: those of the record, unless the command line may set them."""
    refuse_beside_replay(options)
    adopted = {name: record[name] for name in ("precision", "decode_chunk")} | {"compile": record["compiled"]}
    if record["temporal"] is None:
        adopted["ckpt"] = options.ckpt or Path(record["checkpoint"]["path"])
    else:
        adopted["base"] = options.base or Path(record["checkpoint"]["path"])
        adopted["temporal"] = options.temporal or Path(record["temporal"]["path"])
    if record["temporal_decoder"] is not None:
        adopted["temporal_decoder"] = options.temporal_decoder or Path(record["temporal_decoder"]["path"])
    if options.device is None:
        adopted["device"] = record["machine"]["device"].partition(":")[0]
    if adopted.get("device", options.device) == "cpu":
        torch.set_num_threads(record["machine"]["threads"])
    return argparse.Namespace(**{**vars(options), **adopted})


if __name__ == "__main__":
    sys.exit(run_command(main))
