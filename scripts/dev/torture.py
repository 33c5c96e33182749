"""Kill a tiny run and a tiny preparation repeatedly, and compare the results with undisturbed ones.

    python scripts/dev/torture.py --kills 20

SIGKILL comes at random moments: in a step, in a checkpoint or between its renames, in a validation, while sampling,
while starting. After each kill the newest whole checkpoint has to equal the undisturbed run's at that step, and each
finished shard that of the undisturbed preparation; at the end weights, average, optimiser states, random generators,
data position, logs, samples and all prepared files have to be identical to the bit. The last line counts the kills that
left no trace.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same in all processes: sums depend on it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ldm.callbacks import AtomicCheckpointIO
from ldm.config import build, load_config, to_container
from ldm.errors import Parser, UserError, run_command
from ldm.runs.last_checkpoints import corruption, kept
from scripts.dev.torture_runs import ROOT, Death, Session

CONFIG = str(ROOT / "configs" / "tiny" / "video.yaml")
STEPS_A_KILL = 4  # steps of the run per kill: no kill comes after its end
CLIPS_A_KILL = 1
OPTIMIZERS = ("adamw", "adamw8bit", "adamw4bit")
# Measured values differ each time: only their steps are compared.
MEASURED = ("memory/", "train/data_wait")
# What a kill is called -> the phase it waits for, the entries to choose from and the most seconds from then on; None:
# before one of the next changes of files' names. Seconds without a phase count from the start of the process.
TRAINING = {
    "step": ("step", 2, 4, 0.03), "checkpoint": ("checkpoint", 1, 2, 0.01),
    "renaming": ("renaming", 1, 2, None), "validation": ("validation", 1, 2, 0.05),
    "sampling": ("sampling", 1, 1, 0.1), "at any time": ("step", 1, 1, 3.0),
    "while logs are cut": ("cutting logs", 1, 1, None), "starting": (None, 1, 1, 3.0),
}  # fmt: skip
ENCODING = {"encoding": ("encoding", 1, 2, 0.05), "at any time": ("encoding", 1, 1, 1.0), "start": (None, 1, 1, 2.0)}
SHARDS, INDEX = {"shards": ("shards", 1, 1, None)}, {"index": ("index", 1, 1, None)}  # come when all is encoded


def tiny(folder: Path, optimizer: str) -> list[str]:
    """Overrides that make the tiny config smaller, with every part that has state."""
    unet = "model.params.unet_config.params"
    return [
        f"{unet}.model_channels=32", f"{unet}.channel_mult=[1]", f"{unet}.attention_resolutions=[1]",
        f"{unet}.dropout=0.1", f"{unet}.context_dim=32", f"{unet}.num_heads=2",
        "model.params.cond_stage_config.params.text_config.hidden_size=32", "model.params.scale_factor=0.5",
        f"model.params.optimizer.name={optimizer}",
        "model.params.first_stage_config.params.ddconfig.ch_mult=[1,1,1,1]", "model.params.warmup_steps=10",
        f"model.params.first_stage_config.params.ckpt_path={folder / 'first_stage.safetensors'}",
    ]  # fmt: skip


def training_arguments(folder: Path, optimizer: str, workers: int, max_steps: int) -> list[str]:
    """A run with validation, samples, an average, two micro-batches a step and everything logged at every step."""
    callbacks = "lightning.callbacks"
    return [
        "--accelerator", "cpu", "--max_steps", str(max_steps), "--precision", "32-true", "--log_every_n_steps", "1",
        "--val_check_interval", "6", "--accumulate_grad_batches", "2", *tiny(folder, optimizer),
        f"data.params.root={folder / 'straight'}", "data.params.batch_size=1", "data.params.frames=3",
        "data.params.strides=[1,2]", "data.params.val_share=0.15", f"data.params.num_workers={workers}",
        f"{callbacks}.samples.params.every_n_steps=4", f"{callbacks}.samples.params.steps=2",
        f"{callbacks}.last_checkpoint.params.every_n_steps=2",
        f"{callbacks}.compute.target=ldm.callbacks.ComputeCount",
    ]  # fmt: skip


def write_first_stage(folder: Path) -> None:
    """The autoencoder of the tiny config with random weights."""
    node = to_container(load_config([CONFIG], tiny(folder, "adamw")))["model"]["params"]["first_stage_config"]
    torch.manual_seed(0)
    module = build({**node, "params": {**node["params"], "ckpt_path": None}}, "first_stage_config")
    tensors = {f"first_stage_model.{name}": part.contiguous() for name, part in module.compvis_state_dict().items()}
    save_file(tensors, folder / "first_stage.safetensors")


def deaths(kinds: Mapping[str, tuple], kills: int, seed: int) -> list[Death]:
    """The moment of each kill, of all kinds in turn."""
    chance, found = random.Random(seed), []
    for number in range(kills):
        phase, first, last, seconds = list(kinds.values())[number % len(kinds)]
        call = chance.randint(1, 6) if seconds is None else None
        found.append(Death(phase, chance.randint(first, last), chance.uniform(0, seconds or 0), call))
    return found


class Training:
    """A run that is never killed, and one that is, side by side."""

    def __init__(self, folder: Path, optimizer: str, workers: int, kills: int) -> None:
        self.folder, self.logs = folder, folder / "logs"
        self.words = training_arguments(folder, optimizer, workers, STEPS_A_KILL * kills)
        self._io = AtomicCheckpointIO()

    def straight(self) -> None:
        """Run without a kill; every checkpoint is kept."""
        self._start("straight", ["lightning.callbacks.last_checkpoint.params.keep_last=100000"]).must_end()

    def killed(self, death: Death) -> tuple[str, str, str | None]:
        """Go on until death: the phase it came in, what is whole on disk, and what of it is not as it should be."""
        status, phase = self._start("killed", []).dies(death)
        if status == 0:
            return "after its end", "", None
        found = self._newest("killed")
        if found is None:
            return phase, "no checkpoint yet", None
        step = found["global_step"]
        wanted = self._at("straight", step)
        return phase, f"step {step}", unlike("checkpoint", dict(leaves(wanted)), dict(leaves(found)))

    def finish(self) -> str | None:
        """Go on to the end; the first thing that is not as in the straight run, if any is."""
        self._start("killed", []).must_end()
        ends = [dict(leaves(self._newest(name))) for name in ("straight", "killed")]
        folders = [self._folder(name) for name in ("straight", "killed")]
        logs = [logged(folder / "tensorboard") for folder in folders]
        files = [contents(folder / "images") for folder in folders]
        if not (logs[0] and files[0]):
            raise UserError(f"{folders[0]}: expected logs and sample videos of the straight run, found none")
        return unlike("checkpoint", *ends) or unlike("logged", *logs) or unlike("samples", *files)

    def _start(self, name: str, words: Sequence[str]) -> _Part:
        folder = self._folder(name)
        begin = ["-b", CONFIG, "-n", name, "-l", str(self.logs), *self.words, *words]
        words = begin if folder is None else ["-r", str(folder)]
        return _Part(Session("main", [*words, "-t"], self.folder, {}))

    def _folder(self, name: str) -> Path | None:
        """The run's folder, once it has configs."""
        return next((path.parents[1] for path in self.logs.glob(f"*_{name}/configs/*-lightning.yaml")), None)

    def _newest(self, name: str) -> dict[str, Any] | None:
        folder = self._folder(name)
        whole = [] if folder is None else [path for path in kept(folder / "checkpoints") if corruption(path) is None]
        return self._io.load_checkpoint(whole[0]) if whole else None

    def _at(self, name: str, step: int) -> dict[str, Any]:
        for path in kept(self._folder(name) / "checkpoints"):
            checkpoint = self._io.load_checkpoint(path)
            if checkpoint["global_step"] == step:
                return checkpoint
        raise UserError(f"the straight run has no checkpoint of step {step}")


class Preparing:
    """A folder that is prepared without a kill, and one with many."""

    def __init__(self, folder: Path, optimizer: str, kills: int) -> None:
        self.folder = folder
        self.words = ["--world", str(max(8, CLIPS_A_KILL * kills)), "--frames", "7", "--size", "64", "--processes", "1"]
        self.words += ["--config", CONFIG, *tiny(folder, optimizer)]

    def straight(self) -> None:
        self._start("straight").must_end()

    def killed(self, death: Death) -> tuple[str, str, str | None]:
        """Go on until death: its phase, how many shards are finished, and the first that is not as it should be."""
        status, phase = self._start("killed").dies(death)
        if status == 0:
            return "after its end", "", None
        straight, found = (contents(self.folder / name, "shard-*.tar") for name in ("straight", "killed"))
        wrong = [name for name, content in found.items() if straight.get(name) != content]
        return phase, f"{len(found)} shards", f"{wrong[0]} differs" if wrong else None

    def finish(self) -> str | None:
        self._start("killed").must_end()
        return unlike("prepared", *(contents(self.folder / name) for name in ("straight", "killed")))

    def _start(self, name: str) -> _Part:
        words = [*self.words, "--out", str(self.folder / name)]
        return _Part(Session("scripts.prepare", words, self.folder, {"SHARD_BYTES": 60_000}))


class _Part:
    def __init__(self, session: Session) -> None:
        self._session = session

    def must_end(self) -> None:
        """Run to the end; raises UserError where that is no good one."""
        if status := self._session.run():
            raise UserError(f"an undisturbed run ended with status {status}; see its log in the same folder")

    def dies(self, death: Death) -> tuple[int, str]:
        status = self._session.run(death)
        if status not in (0, -9):
            raise UserError(f"expected a process that is killed, found one that ended with status {status} by itself")
        return status, self._session.board.phase


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every number of a checkpoint by its place, tensors as their bytes.

    Left out are the config, which names the folder, and how long logs are, which depends on how often they were begun.
    """
    if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
        value = {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, part in value.items():
            if place or key != "config":
                known = {} if (place, key) == ("between_steps", "logs") else part
                yield from leaves(known, f"{place}.{key}".strip("."))
    elif isinstance(value, torch.Tensor):
        yield place, (value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        yield place, value


def logged(folder: Path) -> dict[tuple[str, int, int], Any]:
    """Everything in TensorBoard's files: tag, step and how often there -> value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    found: dict[tuple[str, int, int], Any] = {}
    for kind, read in (("scalars", events.Scalars), ("images", events.Images)):
        for tag in events.Tags()[kind]:
            for event in read(tag):
                times = sum((tag, event.step, number) in found for number in range(3))
                value = event.value if kind == "scalars" else event.encoded_image_string
                found[tag, event.step, times] = None if tag.startswith(MEASURED) else value
    return found


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """The files below a folder."""
    paths = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def unlike(what: str, wanted: Mapping[Any, Any], found: Mapping[Any, Any]) -> str | None:
    """The first of many things that is missing, too much or another one."""
    for key in dict.fromkeys([*wanted, *found]):
        if key not in found or key not in wanted:
            return f"{what}: {key} is {'missing' if key in wanted else 'too much'}"
        if found[key] != wanted[key]:
            return f"{what}: {key} is another one"
    return None


def torture(part: Training | Preparing, name: str, moments: Sequence[Death], console: Console) -> list[bool]:
    """Kill one of the two again and again; prints a table, and says for each kill whether it left no trace."""
    begin = time.monotonic()
    part.straight()
    console.print(f"{name}: the straight one took {time.monotonic() - begin:.0f} s", highlight=False)
    table = Table(title=name)
    for column in ("kill", "killed in", "whole on disk", "as in the straight one"):
        table.add_column(column, overflow="fold")
    good = []
    for number, death in enumerate(moments, 1):
        phase, state, difference = part.killed(death)
        was_killed = phase != "after its end"
        good.append(was_killed and difference is None)
        table.add_row(str(number), phase, state, difference or ("identical" if was_killed else "not killed"))
    difference = part.finish()
    table.add_row("end", "", "all of it", difference or "identical")
    console.print(table, markup=False)
    return [each and difference is None for each in good]


def main(arguments: Sequence[str] | None = None) -> None:
    """Torture; raises UserError where a kill left a trace."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of each of the two (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="DataLoader workers (default: 1)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: adamw")
    parser.add_argument("--work", type=Path, metavar="DIR", help="an empty folder to work in (default: one that goes)")
    given = parser.parse_args(arguments)
    if given.kills < 1:
        raise UserError(f"--kills: expected at least 1, found {given.kills}")
    if given.work is not None and given.work.exists() and any(given.work.iterdir()):
        raise UserError(f"--work: expected an empty folder, or none yet, found files in {given.work}")
    console = Console()
    with tempfile.TemporaryDirectory() as spare:
        folder = (given.work or Path(spare)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        write_first_stage(folder)
        preparing = Preparing(folder, given.optimizer, given.kills)
        half, quarter = given.kills // 2, (given.kills + 1) // 4
        parts = ((ENCODING, half), (SHARDS, given.kills - half - quarter), (INDEX, quarter))
        moments = [death for kinds, kills in parts for death in deaths(kinds, kills, given.seed)]
        prepared = torture(preparing, "preparing", moments, console)
        training = Training(folder, given.optimizer, given.workers, given.kills)
        trained = torture(training, "training", deaths(TRAINING, given.kills, given.seed), console)
    both = sum(first and second for first, second in zip(prepared, trained, strict=True))
    print(f"{both} of {given.kills} identical")
    if both < given.kills:
        raise UserError("some kills left a trace, or came too late; the tables say which")


if __name__ == "__main__":
    sys.exit(run_command(main))
