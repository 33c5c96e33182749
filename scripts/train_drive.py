"""Train the experiment in the drawn world: all of its models, one after the other, each for so many minutes.

    python scripts/train_drive.py --out runs/drive --minutes 10

The stages are an autoencoder, a text encoder, a judge of looks, an image model (with the images that it needs), a
video model (with its clips), and layers over time for the decoder of the autoencoder. The same command goes on after an
interruption; with more --minutes it trains on from where it was. A stage that a later one has begun to build on stays
as it is, but for the video model: the layers of the decoder go on with what it has become. Words of main.py for one
stage are given as STAGE:WORD, for instance video:data.params.batch_size=4.
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
FLAT = 0.75  # share of a stage's time at the full learning rate; in the rest it falls to nothing
MARGIN = 0.95  # of the steps that the rest of the time is reckoned to be enough for
ENDLESS = 10**7  # steps


@dataclass(frozen=True)
class Stage:
    """A model to train. needs: earlier stages -> the word of its config that names their checkpoint.

    prepares: the folder of prepared clips, and words of prepare.py for them. on_gpu: words for main.py there.
    follows: the earlier stages may train on, and this one goes on with what they have become.
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
AMOUNTS = {"images": (6000, 40_000), "clips": (600, 6000)}  # without a graphics card, with one


@dataclass(frozen=True)
class Budget:
    """minutes: of training for each stage. amounts: of images and clips. on_gpu: whether there is a graphics card.

    words: stage -> more words for main.py.
    """

    minutes: float
    amounts: Mapping[str, int]
    on_gpu: bool
    words: Mapping[str, Sequence[str]]


class DriveTraining:
    """A folder in which the stages are prepared and trained by the scripts that `run` runs."""

    def __init__(self, out: Path, budget: Budget, run: Runner) -> None:
        self.out, self.budget, self._run = out, budget, run
        record = out / "stages.json"
        self.done: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}

    def make(self, name: str) -> None:
        """Train a stage for its minutes, those that it has had before included. Raises UserError."""
        folder, minutes = self._run_folder(name), self.budget.minutes
        if self.done.get(name, {}).get("minutes", 0) >= minutes:
            print(f"{name}: has had its {minutes:g} minutes")
            return
        if folder is not None and (builders := [later for later in STAGES if self._has_begun_on(later, name)]):
            print(f"{name}: stays as it is, since {builders[0]} builds on it")
            return
        if folder is None:
            self._prepare(name)
        steps, seconds = self.progress(name)
        if seconds < FLAT * 60 * minutes:
            self._train(name, FLAT * minutes, ENDLESS, [])
            steps, seconds = self.progress(name)
        rest = max(0.0, 60 * minutes - seconds)
        more = max(1, int(MARGIN * rest * steps / seconds))
        words = [f"--val_check_interval={steps + more}"]  # after the last step
        if "cooldown_steps" in load_config([config_of(name)]).model.params:
            words.append(f"model.params.cooldown_steps={more}")
        self._train(name, minutes, steps + more, words)
        steps, seconds = self.progress(name)
        self.done[name] = {"minutes": minutes, "steps": steps, "seconds": round(seconds, 1)}
        write_atomically(self.out / "stages.json", json.dumps(self.done, indent=1) + "\n")
        print(f"{name}: {steps} steps in {seconds / 60:.1f} minutes, {self.checkpoint(name)}")

    def progress(self, name: str) -> tuple[int, float]:
        """Steps and seconds that a stage has been trained."""
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

    def _train(self, name: str, minutes: float, max_steps: int, words: Sequence[str]) -> None:
        """Begin the run of a stage, or go on with it, until it has had so many minutes or steps."""
        folder = self._run_folder(name)
        start = ["--base", config_of(name), "-n", name, "-l", str(self.out / "logs")]
        seconds = max(1, round(60 * minutes))
        clock = f"00:{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        limits = [f"--max_time={clock}", f"--max_steps={max_steps}", *words]
        # the learning rate falls later
        go_on = ["-r", str(folder), "--allow", "config,model" if STAGES[name].follows else "config"]
        command = ["main.py", *(start if folder is None else go_on), "-t", *self._machine()]
        self._do([*command, *limits, *self._words(name)])

    def _prepare(self, name: str) -> None:
        """Draw and encode what a stage is trained on, if it is trained on prepared clips."""
        stage = STAGES[name]
        if stage.prepares:
            folder, *words = stage.prepares
            amount = ["--world", str(self.budget.amounts[folder]), "--out", str(self.out / folder)]
            encoders = [f"{ENCODERS[need]}={self.checkpoint(need)}" for need in ENCODERS]
            self._do(["scripts/prepare.py", *amount, "--config", config_of(name), *words, *encoders])

    def _words(self, name: str) -> list[str]:
        """The stage's overrides: checkpoints of other stages, prepared clips, the machine's, the user's."""
        stage = STAGES[name]
        words = [f"{word}={self.checkpoint(need)}" for need, word in stage.needs.items()]
        if stage.prepares:
            words.append(f"data.params.root={self.out / stage.prepares[0]}")
        if "image" in stage.needs:
            words.append(f"data.params.image_root={self.out / STAGES['image'].prepares[0]}")
        if self.budget.on_gpu:
            words += [*stage.on_gpu, f"data.params.num_workers={max(1, usable_cores() - 1)}"]
        return [*words, *self.budget.words.get(name, ())]

    def _machine(self) -> list[str]:
        return ["--accelerator", "gpu" if self.budget.on_gpu else "cpu"]

    def _run_folder(self, name: str) -> Path | None:
        """The newest run of a stage that has a checkpoint."""
        found = sorted((self.out / "logs").glob(f"*_{name}/checkpoints/last.ckpt"))
        return found[-1].parents[1] if found else None

    def _has_begun_on(self, later: str, name: str) -> bool:
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


def run_script(words: Sequence[str]) -> int:
    """Run a script of the project in a process of its own; after Ctrl-C it may still save what it has reached."""
    with subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def read_words(words: Sequence[str]) -> dict[str, list[str]]:
    """STAGE:WORD, ... -> stage -> words; raises UserError."""
    found: dict[str, list[str]] = {}
    for text in words:
        name, _, word = text.partition(":")
        if name not in STAGES or not word:
            raise UserError(f"{text}: expected STAGE:WORD with one of {', '.join(STAGES)}; {nearest(name, STAGES)}")
        found.setdefault(name, []).append(word)
    return found


def read_stages(text: str) -> list[str]:
    """The stages of --stages in their order; raises UserError."""
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in STAGES:
            raise UserError(f"--stages: expected some of {', '.join(STAGES)}, found {name!r}; {nearest(name, STAGES)}")
    return [name for name in STAGES if name in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the stages that the command line names."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="STAGE:WORD", help="for main.py of one stage")
    parser.add_argument("--out", type=Path, default=Path("runs/drive"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="N",
        help="of training for each stage, all calls together; starting and preparing come on top (default: 10)",
    )  # fmt: skip
    parser.add_argument("--stages", default=",".join(STAGES), metavar="A,B,...", help="default: %(default)s")
    parser.add_argument(
        "--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="default: a graphics card if there is one"
    )
    for name, (without, with_one) in AMOUNTS.items():
        parser.add_argument(
            f"--{name}",
            type=int,
            metavar="N",
            help=f"to prepare (default: {without:,}; on a graphics card {with_one:,})",
        )
    given = parser.parse_args(arguments)
    if not 0 < given.minutes < 24 * 60:
        raise UserError(f"--minutes: expected more than 0 and less than a day, found {given.minutes:g}")
    on_gpu = torch.cuda.is_available() if given.accelerator == "auto" else given.accelerator == "gpu"
    amounts = {name: getattr(given, name) or default[on_gpu] for name, default in AMOUNTS.items()}
    budget = Budget(given.minutes, amounts, on_gpu, read_words(given.words))
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    training = DriveTraining(out, budget, run_script)
    for name in read_stages(given.stages):
        training.make(name)


if __name__ == "__main__":
    sys.exit(run_command(main))
