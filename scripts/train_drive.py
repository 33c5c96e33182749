"""Train all models of the procedural-world experiment, one after the other, each for a number of minutes.

    python scripts/train_drive.py --out runs/drive --minutes 10

The stages: autoencoder, text encoder, style classifier, image model (after preparing images), video model (after
preparing clips), and temporal layers for the decoder of the autoencoder. The same command resumes after an
interruption; with more --minutes it continues training. A stage that a later stage depends on is not trained further,
except the video model: the temporal decoder continues with its new weights. Give arguments of main.py for one stage as
STAGE:ARGUMENT, for instance video:data.params.batch_size=4.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm.callbacks import AtomicCheckpointIO
from ldm.config import load_config, nearest
from ldm.data.world import MOVING_LOOKS
from ldm.data.world.sources import usable_cores
from ldm.errors import Parser, UserError, run_command
from ldm.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
Runner = Callable[[Sequence[str]], int]  # runs ["script.py", "argument", ...] and returns its exit status
FLAT = 0.75  # share of a stage's time at the full learning rate, before the cooldown
MARGIN = 0.95  # share of the steps predicted for the remaining time
ENDLESS = 10**7  # steps


@dataclass(frozen=True)
class Stage:
    """A model to train.

    needs: earlier stage -> config key of its checkpoint. prepares: folder of prepared clips, and arguments of
    prepare.py. on_gpu: overrides on a GPU. follows: continues with new weights when earlier stages are trained further.
    """

    needs: Mapping[str, str] = field(default_factory=dict)
    prepares: tuple[str, ...] = ()
    on_gpu: tuple[str, ...] = ()
    follows: bool = False


ENCODERS = {
    "autoencoder": "model.params.first_stage_config.params.ckpt_path",
    "text": "model.params.cond_stage_config.params.ckpt_path",
}
STAGES = {
    "autoencoder": Stage(on_gpu=("data.params.batch_size=32",)),
    "text": Stage(on_gpu=("data.params.batch_size=128",)),
    "judge": Stage(on_gpu=("data.params.batch_size=128",)),
    "image": Stage(ENCODERS, ("images", "--frames", "1"), ("data.params.batch_size=256",)),
    "video": Stage(
        {**ENCODERS, "image": "model.params.ckpt_path"},
        ("clips", "--frames", "25", "--seed", "1", "--looks", ",".join(MOVING_LOOKS)),
        ("data.params.batch_size=64",),
    ),
    "temporal_decoder": Stage({"video": "model.params.ckpt_path"}, on_gpu=("data.params.batch_size=16",), follows=True),
}
AMOUNTS = {"images": (6000, 40_000), "clips": (600, 6000)}  # on a CPU, on a GPU


@dataclass(frozen=True)
class TrainingBudget:
    """minutes: of training per stage. amounts: number of images and clips. arguments: stage -> for main.py."""

    minutes: float
    amounts: Mapping[str, int]
    on_gpu: bool
    arguments: Mapping[str, Sequence[str]]


class DriveTraining:
    """The stages in a folder; `run` runs the scripts that prepare and train them."""

    def __init__(self, out: Path, budget: TrainingBudget, run: Runner) -> None:
        self.out, self.budget, self._run = out, budget, run
        record = out / "stages.json"
        self.done: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}

    def make(self, name: str) -> None:
        """Train a stage until it has had its minutes, earlier runs included; raises UserError."""
        folder, minutes = self._run_folder(name), self.budget.minutes
        if self.done.get(name, {}).get("minutes", 0) >= minutes:
            print(f"{name}: already trained for {minutes:g} minutes")
            return
        if folder is not None and (dependents := [later for later in STAGES if self._depends_on(later, name)]):
            print(f"{name}: not trained further, since {dependents[0]} depends on it")
            return
        if folder is None:
            self._prepare(name)
        steps, seconds = self.progress(name)
        if seconds < FLAT * 60 * minutes:
            self._train(name, FLAT * minutes, ENDLESS, [])
            steps, seconds = self.progress(name)
        rest = max(0.0, 60 * minutes - seconds)
        more = max(1, int(MARGIN * rest * steps / seconds))
        arguments = [f"--val_check_interval={steps + more}"]  # after the last step
        if "cooldown_steps" in load_config([config_of(name)]).model.params:
            arguments.append(f"model.params.cooldown_steps={more}")
        self._train(name, minutes, steps + more, arguments)
        steps, seconds = self.progress(name)
        self.done[name] = {"minutes": minutes, "steps": steps, "seconds": round(seconds, 1)}
        write_atomically(self.out / "stages.json", json.dumps(self.done, indent=1) + "\n")
        print(f"{name}: {steps} steps in {seconds / 60:.1f} minutes, {self.checkpoint(name)}")

    def progress(self, name: str) -> tuple[int, float]:
        """Steps and seconds of training that a stage has had."""
        if self._run_folder(name) is None:
            return 0, 0.0
        contents = AtomicCheckpointIO().load_checkpoint(self.checkpoint(name))
        timers = [state for key, state in contents["callbacks"].items() if key.startswith("Timer")]
        return contents["global_step"], timers[0]["time_elapsed"]["train"] if timers else 0.0

    def checkpoint(self, name: str) -> Path:
        """The checkpoint of a stage; raises UserError if there is none."""
        folder = self._run_folder(name)
        if folder is None:
            raise UserError(f"{self.out}: expected the checkpoint of the stage '{name}', found none; train it first")
        return folder / "checkpoints" / "last.ckpt"

    def _train(self, name: str, minutes: float, max_steps: int, arguments: Sequence[str]) -> None:
        """Start or resume the run of a stage until `minutes` or `max_steps`, earlier runs included."""
        folder = self._run_folder(name)
        run = ["--base", config_of(name), "-n", name, "-l", str(self.out / "logs")]
        if folder is not None:  # the config differs: the cooldown starts later
            run = ["-r", str(folder), "--allow", "config,model" if STAGES[name].follows else "config"]
        seconds = max(1, round(60 * minutes))
        clock = f"00:{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        machine = ["--accelerator", "gpu" if self.budget.on_gpu else "cpu"]
        limits = [f"--max_time={clock}", f"--max_steps={max_steps}"]
        self._do(["main.py", *run, "-t", *machine, *limits, *arguments, *self._overrides(name)])

    def _prepare(self, name: str) -> None:
        """Prepare the images or clips of a stage that needs them."""
        stage = STAGES[name]
        if stage.prepares:
            folder, *options = stage.prepares
            amount = ["--world", str(self.budget.amounts[folder]), "--out", str(self.out / folder)]
            encoders = [f"{ENCODERS[need]}={self.checkpoint(need)}" for need in ENCODERS]
            self._do(["scripts/prepare.py", *amount, "--config", config_of(name), *options, *encoders])

    def _overrides(self, name: str) -> list[str]:
        """Overrides of a stage: checkpoints of other stages, prepared clips, those of a GPU, the user's."""
        stage = STAGES[name]
        overrides = [f"{key}={self.checkpoint(need)}" for need, key in stage.needs.items()]
        if stage.prepares:
            overrides.append(f"data.params.root={self.out / stage.prepares[0]}")
        if "image" in stage.needs:
            overrides.append(f"data.params.image_root={self.out / STAGES['image'].prepares[0]}")
        if self.budget.on_gpu:
            overrides += [*stage.on_gpu, f"data.params.num_workers={max(1, usable_cores() - 1)}"]
        return [*overrides, *self.budget.arguments.get(name, ())]

    def _run_folder(self, name: str) -> Path | None:
        """The newest run of a stage that has a checkpoint."""
        found = sorted((self.out / "logs").glob(f"*_{name}/checkpoints/last.ckpt"))
        return found[-1].parents[1] if found else None

    def _depends_on(self, later: str, name: str) -> bool:
        stage = STAGES[later]
        if name not in stage.needs or stage.follows:
            return False
        is_prepared = name in ENCODERS and (self.out / stage.prepares[0]).exists()
        return is_prepared or self._run_folder(later) is not None

    def _do(self, command: Sequence[str]) -> None:
        print(f"\n$ {shlex.join(command)}", flush=True)
        if status := self._run(command):
            raise UserError(f"{command[0]} ended with status {status}; it says why above")


def config_of(name: str) -> str:
    """The config of a stage."""
    return str(ROOT / "configs" / "drive" / f"{name}.yaml")


def run_script(command: Sequence[str]) -> int:
    """Run a script in a child process; after Ctrl-C wait until it has saved its state."""
    with subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def read_arguments(texts: Sequence[str]) -> dict[str, list[str]]:
    """["STAGE:ARGUMENT", ...] -> stage -> arguments; raises UserError."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, _, argument = text.partition(":")
        if name not in STAGES or not argument:
            raise UserError(f"{text}: expected STAGE:ARGUMENT with one of {', '.join(STAGES)}; {nearest(name, STAGES)}")
        found.setdefault(name, []).append(argument)
    return found


def read_stages(text: str) -> list[str]:
    """The stages of --stages in the order of training; raises UserError."""
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in STAGES:
            raise UserError(f"--stages: expected some of {', '.join(STAGES)}, found {name!r}; {nearest(name, STAGES)}")
    return [name for name in STAGES if name in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the stages."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="STAGE:ARGUMENT", help="argument of main.py for one stage")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/drive"),
        metavar="DIR",
        help="folder of all stages (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="N",
        help="minutes of training per stage, earlier runs included; starting and preparing not included (default: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--stages", default=",".join(STAGES), metavar="A,B,...", help="stages to train (default: %(default)s)"
    )
    parser.add_argument(
        "--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="default: a GPU if there is one"
    )
    for name, (on_cpu, on_a_gpu) in AMOUNTS.items():
        parser.add_argument(
            f"--{name}",
            type=int,
            metavar="N",
            help=f"{name} to prepare (default: {on_cpu:,}; on a GPU {on_a_gpu:,})",
        )
    given = parser.parse_args(arguments)
    if not 0 < given.minutes < 24 * 60:
        raise UserError(f"--minutes: expected more than 0 and less than a day, found {given.minutes:g}")
    on_gpu = torch.cuda.is_available() if given.accelerator == "auto" else given.accelerator == "gpu"
    amounts = {name: getattr(given, name) or default[on_gpu] for name, default in AMOUNTS.items()}
    budget = TrainingBudget(given.minutes, amounts, on_gpu, read_arguments(given.arguments))
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    training = DriveTraining(out, budget, run_script)
    for name in read_stages(given.stages):
        training.make(name)


if __name__ == "__main__":
    sys.exit(run_command(main))
