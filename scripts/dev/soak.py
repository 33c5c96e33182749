"""Soak test: a long training of a tiny model with sampling, validation and checkpoints must not leak anything.

    python scripts/dev/soak.py --steps 20000
    python scripts/dev/soak.py --minutes 120 --json soak.json

The training command runs in a child process on the CPU, with two DataLoader workers. Memory, open files, threads and
children of it and its children are sampled from Linux' /proc. After the first tenth of the run none of them may grow,
and no file or process may remain afterwards. Prints a verdict on each; the exit status is 1 if one is bad.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ldm.config import build, load_config, to_container
from ldm.config.schema import trusting
from ldm.data.world import draw_clip
from ldm.errors import Parser, UserError, run_command
from ldm.files import write_atomically
from ldm.video import write_mp4

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from scripts import prepare  # noqa: E402

CONFIG = ROOT / "configs" / "tiny" / "video.yaml"
MOST_GROWTH = 0.02  # of memory, after the first tenth
ROWS = 20  # of the printed table
LINGER = 10  # seconds in which children must end after the process
SHARED_MEMORY = Path("/dev/shm")
SMALL = {
    "model.params.unet_config.params.model_channels": 32,
    "model.params.unet_config.params.channel_mult": "[1]",
    "model.params.unet_config.params.attention_resolutions": "[1]",
    "model.params.first_stage_config.params.ddconfig.ch": 32,
    "model.params.first_stage_config.params.ddconfig.resolution": 64,
    "model.params.scale_factor": 0.5,
}


@dataclass(frozen=True)
class Sample:
    """The resources of a process at one moment; memory in MiB."""

    seconds: float
    step: int
    memory: float
    memory_of_children: float
    files: int
    threads: int
    children: int


@dataclass(frozen=True)
class Verdict:
    """Whether a check passed, and its description."""

    is_good: bool
    text: str


def tree_of(pid: int) -> list[int]:
    """The ids of a process and of all its descendants."""
    found, waiting = [], [pid]
    while waiting:
        process = waiting.pop()
        found.append(process)
        try:
            tasks = list(Path(f"/proc/{process}/task").iterdir())
            waiting += [int(word) for task in tasks for word in (task / "children").read_text().split()]
        except OSError:
            continue  # it has ended
    return found


def look_at(pid: int, begin: float, log: Path) -> Sample | None:
    """A sample of a process; None if it has ended."""
    memory, files, threads = [], 0, 0
    for process in tree_of(pid):
        try:
            status = dict(line.partition(":")[::2] for line in Path(f"/proc/{process}/status").read_text().splitlines())
            memory.append(int(status["VmRSS"].split()[0]) / 1024)
            threads += int(status["Threads"])
            files += len(os.listdir(f"/proc/{process}/fd"))
        except (OSError, KeyError):
            if process == pid:
                return None
    steps = re.findall(r"^step (\d+)", log.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
    step = int(steps[-1]) if steps else 0
    return Sample(time.monotonic() - begin, step, memory[0], sum(memory[1:]), files, threads, len(memory) - 1)


def watch(
    command: Sequence[str], log: Path, every: float, environment: dict[str, str]
) -> tuple[list[Sample], int, set[int]]:
    """Run a command and look at it every so many seconds: the samples, its exit status, processes that outlive it."""
    begin, samples, seen = time.monotonic(), [], set()
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                if sample := look_at(process.pid, begin, log):
                    samples.append(sample)
                    seen |= set(tree_of(process.pid))
                time.sleep(every)
        finally:
            process.terminate()
            process.wait()
    deadline = time.monotonic() + LINGER
    while (left := {pid for pid in seen if is_alive(pid)}) and time.monotonic() < deadline:
        time.sleep(0.2)
    return samples, process.returncode, left


def is_alive(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def find_growth(samples: Sequence[Sample]) -> list[Verdict]:
    """Verdicts on growth: the last tenth of the training time compared with the second."""
    most_steps = max((sample.step for sample in samples), default=0)
    running = [sample for sample in samples if 0 < sample.step < most_steps]  # without start and end
    if len(running) < 20:
        return [
            Verdict(False, f"expected at least 20 samples of the training, found {len(running)}; let it run longer")
        ]
    first, last = running[0].seconds, running[-1].seconds
    shares = [(sample.seconds - first) / max(last - first, 1e-9) for sample in running]
    early = [sample for sample, share in zip(running, shares, strict=True) if 0.1 <= share <= 0.2]
    late = [sample for sample, share in zip(running, shares, strict=True) if share >= 0.9]
    verdicts = []
    for name, title in (("memory", "memory of the process"), ("memory_of_children", "memory of its children")):
        before, after = (statistics.median(getattr(sample, name) for sample in part) for part in (early, late))
        growth = after / before - 1 if before else 0.0
        text = f"{title}: {before:,.1f} MiB in the second tenth, {after:,.1f} in the last, {growth:+.2%}"
        verdicts.append(Verdict(growth < MOST_GROWTH, f"{text} (expected less than {MOST_GROWTH:+.0%})"))
    for name in ("files", "threads", "children"):
        before, after = (max(getattr(sample, name) for sample in part) for part in (early, late))
        most = max(getattr(sample, name) for sample, share in zip(running, shares, strict=True) if share >= 0.1)
        title = {"files": "open files"}.get(name, name)
        verdicts.append(Verdict(after <= before, f"{title}: at most {before} in the second tenth, {after} in the last, "
                                f"{most} in between"))  # fmt: skip
    return verdicts


def find_leftovers(folder: Path, shared_before: set[str]) -> list[str]:
    """Files that must not remain after a run: temporary ones, partial ones, shared memory."""
    found = [str(path) for path in (folder / "tmp").rglob("*")]
    hidden = [path for path in (folder / "logs").rglob(".*") if path.is_file()]
    found += [str(path) for path in hidden if path.suffix == ".partial" or path.name.startswith(".fresh")]
    shared = set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()
    return found + [str(SHARED_MEMORY / name) for name in shared - shared_before if name.startswith("torch_")]


def make_set(folder: Path) -> list[str]:
    """Draw footage, prepare it with untrained encoders, and return the overrides to train on it."""
    first_stage = folder / "first_stage.safetensors"
    overrides = [f"{key}={value}" for key, value in SMALL.items()]
    node = to_container(load_config([CONFIG], overrides))["model"]["params"]["first_stage_config"]
    torch.manual_seed(0)
    node = {**node, "params": {**node["params"], "ckpt_path": None}}
    tensors = build(node, "first_stage_config").compvis_state_dict()
    save_file({f"first_stage_model.{name}": part.contiguous() for name, part in tensors.items()}, first_stage)
    overrides.append(f"model.params.first_stage_config.params.ckpt_path={first_stage}")
    for number in range(3):
        write_mp4(folder / "footage" / f"{number}.mp4", draw_clip("summer dawn", number, 60, 64, 25).frames, fps=25)
    arguments = [str(folder / "footage"), "--out", str(folder / "prepared"), "--config", str(CONFIG), "--size", "64"]
    prepare.main([*arguments, "--prompt", "driving on a highway", *overrides])
    return [*overrides, f"data.params.root={folder / 'prepared'}"]


def training(folder: Path, overrides: Sequence[str], steps: int, minutes: float | None, occasions: int) -> list[str]:
    """The training command, with samples, validation and checkpoints every `occasions` steps."""
    often = {
        "data.params.frames": 3, "data.params.strides": "[1,2]", "data.params.batch_size": 2,
        "data.params.num_workers": 2, "lightning.trainer.precision": "32-true",
        "lightning.trainer.val_check_interval": occasions, "lightning.trainer.max_steps": steps,
        "lightning.callbacks.samples.params.every_n_steps": occasions, "lightning.callbacks.samples.params.steps": 2,
        "lightning.callbacks.last_checkpoint.params.every_n_steps": occasions,
        "lightning.callbacks.progress.params.every_seconds": 0.5, "lightning.callbacks.plan": "null",
    }  # fmt: skip
    command = ["main.py", "-b", str(CONFIG), "-t", "--accelerator", "cpu", "-l", str(folder / "logs"), "-n", "soak"]
    if minutes is not None:
        seconds = round(60 * minutes)
        command += ["--max_time", f"00:{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"]
    return [sys.executable, *command, *overrides, *(f"{key}={value}" for key, value in often.items())]


def table(samples: Sequence[Sample]) -> str:
    """A table of evenly spaced samples."""
    head = f"{'minutes':>8} {'step':>7} {'MiB':>9} {'children':>9} {'files':>6} {'threads':>8} {'processes':>10}"
    chosen = sorted({round(row * (len(samples) - 1) / (ROWS - 1)) for row in range(ROWS)}) if samples else []
    lines = [
        f"{one.seconds / 60:8.1f} {one.step:7,} {one.memory:9,.1f} {one.memory_of_children:9,.1f} {one.files:6} "
        f"{one.threads:8} {one.children + 1:10}"
        for one in (samples[index] for index in chosen)
    ]
    return "\n".join([head, *lines])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimiser steps (default: 20000, or unlimited with --minutes)")
    length.add_argument("--minutes", type=float, help="minutes of training instead of steps")
    parser.add_argument(
        "--occasions", type=int, default=250, metavar="N",
        help="steps between samples, validations and checkpoints (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="S", help="seconds between samples (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the run in this folder (default: delete it)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and verdicts to this file")
    given = parser.parse_args(arguments)
    if (given.steps is not None and given.steps < 1) or (given.minutes is not None and given.minutes <= 0):
        raise UserError("--steps and --minutes: expected at least 1 and more than 0")
    if given.occasions < 1 or given.every <= 0:
        raise UserError("--occasions and --every: expected at least 1 and more than 0")
    if given.out is not None and given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise UserError(f"--out {given.out}: expected a new or an empty folder, found something there; choose another")
    if not Path("/proc/self/status").is_file():
        raise UserError("expected Linux with /proc, found none")
    return given


def soak(given: argparse.Namespace, folder: Path) -> None:
    """Train, sample resources, print the verdicts; raises UserError if one is bad."""
    for name in ("footage", "tmp"):
        (folder / name).mkdir(parents=True)
    with trusting(False):
        overrides = make_set(folder)
    steps = given.steps or (20_000 if given.minutes is None else -1)
    command = training(folder, overrides, steps, given.minutes, given.occasions)
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    shared = set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()
    samples, status, left = watch(command, folder / "training.log", given.every, environment)
    verdicts = find_growth(samples)
    verdicts.append(Verdict(not left, f"processes left behind: {len(left)}"))
    files = find_leftovers(folder, shared)
    verdicts.append(Verdict(not files, f"files left behind: {', '.join(files) or 'none'}"))
    if status != 0:
        tail = (folder / "training.log").read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        verdicts.append(Verdict(False, "\n  ".join([f"the training ended with status {status}:", *tail])))
    print(table(samples))
    for verdict in verdicts:
        print(f"{'good' if verdict.is_good else 'BAD '}  {verdict.text}")
    if given.json is not None:
        found = {"samples": [asdict(sample) for sample in samples], "verdicts": [asdict(one) for one in verdicts]}
        write_atomically(given.json, json.dumps(found, indent=1) + "\n")
    bad = sum(not verdict.is_good for verdict in verdicts)
    if bad:
        raise UserError(f"{bad} of {len(verdicts)} verdicts are bad; see above")
    print(f"{samples[-1].step:,} steps in {samples[-1].seconds / 60:.1f} minutes, all {len(verdicts)} verdicts good")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the soak test in --out or in a temporary folder."""
    given = parse_arguments(arguments)
    if given.out is not None:
        soak(given, given.out.resolve())
        return
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak(given, Path(folder))


if __name__ == "__main__":
    sys.exit(run_command(main))
