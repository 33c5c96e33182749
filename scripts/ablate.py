"""Train runs that differ in one thing with equal budgets, sample clips from them and measure these.

    python scripts/ablate.py configs/drive/ablations.yaml --out DIR --accelerator cpu [key=value ...]

Unknown arguments go to main.py of every run, before the run's own. Run the same command again to continue: finished
runs and rows are kept. DIR/results.json and table.md hold the results so far.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from ldm.config import load_config, to_container
from ldm.data.world import choose_looks, unseen_scenes
from ldm.errors import Parser, UserError, run_command
from ldm.experiments.ablations import START, Ablations, Sampling
from ldm.experiments.comparison import file_name, read_logged, read_plan_file
from ldm.experiments.tables import ablation_table
from ldm.files import write_atomically
from ldm.runs.arguments import parse_arguments
from ldm.video import write_mp4

ROOT = Path(__file__).resolve().parents[1]
NO_CONTROLS = "--no-spoilt"  # not --no-controls: commands in existing results must not change
Runner = Callable[[Sequence[str]], int]  # runs ["script.py", "argument", ...] and returns its exit status


class AblationRunner:
    """A folder with the runs and rows of a plan; one process may train while another measures.

    run: starts a script. trains: train missing runs; otherwise their rows are skipped.
    """

    def __init__(self, plan: Ablations, out: Path, run: Runner, trains: bool = True) -> None:
        self.plan, self.out, self._run, self.trains = plan, out, run, trains

    @property
    def runs(self) -> dict[str, Any]:
        """Trained runs: name -> command, folder, seconds, logged."""
        return _read(self.out / "runs.json")

    @property
    def rows(self) -> dict[str, Any]:
        """Measured rows: name -> evaluation -> command, made_as, report."""
        return _read(self.out / "rows.json")

    def make_rows(self) -> None:
        """Make all rows of the plan and train what they need; results are written after each."""
        for row, (run, samplings) in self.plan.rows.items():
            checkpoint = self.checkpoint(run)
            if checkpoint is None:
                print(f"\n{row}: '{run}' is not trained yet", flush=True)
                continue
            for evaluation, sampling in samplings.items():
                folder = self.out / "rows" / file_name(row) / file_name(evaluation)
                rows = self.rows
                made = rows.setdefault(row, {})
                is_first = row == next(name for name, (_, each) in self.plan.rows.items() if evaluation in each)
                options = [] if is_first else [NO_CONTROLS]  # controls of true clips are the same for all rows
                made[evaluation] = self.evaluated(checkpoint, sampling, folder, options, made.get(evaluation))
                write_atomically(self.out / "rows.json", json.dumps(rows, indent=1) + "\n")
                self.write_results()

    def train(self) -> None:
        """Train all missing runs of the plan."""
        for run in dict.fromkeys(run for run, _ in self.plan.rows.values()):
            self.checkpoint(run)

    def checkpoint(self, run: str) -> Path | None:
        """The checkpoint of a run, trained now if missing; None if missing and not to be trained."""
        plan = self.plan.comparison
        if run == START:
            return self._start()
        command, runs = plan.command(run, self.out / "logs", []), self.runs
        if run in runs:
            if runs[run]["command"] != command:
                raise UserError(
                    f"{self.out}: expected the run '{run}' of the same command, found that of "
                    f"{shlex.join(runs[run]['command'])}; choose another --out"
                )
        elif not self.trains:
            return None
        else:
            begin = time.monotonic()
            self._do(run, command)
            folder = max((self.out / "logs").glob(f"*_{file_name(run)}"))
            seconds = round(time.monotonic() - begin, 1)
            runs[run] = {
                "command": command, "folder": folder.name, "seconds": seconds, "logged": read_logged(folder)
            }  # fmt: skip
            write_atomically(self.out / "runs.json", json.dumps(runs, indent=1) + "\n")
            self.write_results()
        return self.out / "logs" / runs[run]["folder"] / "checkpoints" / "last.ckpt"

    def evaluated(
        self,
        checkpoint: Path,
        sampling: Sampling,
        folder: Path,
        options: Sequence[str],
        before: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Evaluate clips of a checkpoint -> the command of scripts/evaluate.py, and its report without single clips.

        options: more arguments of evaluate.py. before: the last result, kept if the command is the same.
        """
        if sampling.has_given_frames:
            clips, true = folder / "clips", folder / "true"
            command = ["scripts/evaluate.py", str(clips), "--reference", str(true), "--out", str(folder)]
            made_as = {"checkpoint": str(checkpoint), "sampling": repr(sampling)}
        else:
            command, made_as = evaluation_command(checkpoint, sampling, folder), {}
        command += options
        if before is not None and before["command"] == command and before["made_as"] == made_as:
            return dict(before)
        if sampling.has_given_frames:
            self._make_from_given(checkpoint, sampling, folder)
        self._do(f"{folder.parent.name}, {folder.name}", command)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        for row in report["rows"]:
            row.pop("clips", None)
        return {"command": command, "made_as": made_as, "report": report}

    def write_results(self) -> None:
        """Write results.json and table.md."""
        results = self.plan.gather(self.runs, self.rows)
        write_atomically(self.out / "results.json", json.dumps(results, indent=1) + "\n")
        write_atomically(self.out / "table.md", ablation_table(results))

    def _make_from_given(self, checkpoint: Path, sampling: Sampling, folder: Path) -> None:
        """Render true clips of unseen scenes, and sample clips from some of their frames."""
        true, given, clips = (folder / part for part in ("true", "given", "clips"))
        for part in (true, given, clips):
            shutil.rmtree(part, ignore_errors=True)
        true.mkdir(parents=True)
        given.mkdir()
        size, lines = (self._config()["prepare"]["size"],) * 2, []
        for number, scene in enumerate(unseen_scenes(choose_looks(sampling.looks), sampling.clips)):
            clip = scene.draw(sampling.frames, size, sampling.fps)
            caption = scene.caption_of(clip)
            write_mp4(true / f"{number:05}.mp4", clip.frames, sampling.fps, {"clip": {"prompt": caption}})
            if sampling.interpolate is None:
                picture = given / f"{number:05}.png"
                Image.fromarray(clip.frames[0]).save(picture)
                options = ["--init-image", str(picture), *sampling.options("frames", "fps")]
            else:
                slow, step = given / f"{number:05}.mp4", sampling.interpolate
                write_mp4(slow, clip.frames[::step], sampling.fps / step)
                options = ["--interpolate", str(step), str(slow)]
            options += ["--seed", str(sampling.seed + number)]
            options += sampling.options("steps", "scale", "motion_scale", "sampler")
            lines.append(f"{caption} {shlex.join(options)}")
        prompts = given / "prompts.txt"
        write_atomically(prompts, "\n".join(lines) + "\n")
        options = ["--ckpt", str(checkpoint), "--from-file", str(prompts), "--outdir", str(clips)]
        self._do(f"{folder.parent.name}, clips", ["scripts/txt2vid.py", *options])

    def _config(self) -> dict[str, Any]:
        plan = self.plan.comparison
        arguments = parse_arguments(["--base", *plan.base, *plan.overrides])
        return to_container(load_config([ROOT / path for path in arguments.base], arguments.overrides))

    def _start(self) -> Path:
        path = self._config()["model"]["params"].get("ckpt_path")
        if path is None or not Path(path).exists():
            raise UserError(f"model.params.ckpt_path: expected the common starting checkpoint, found {path}")
        return Path(path)

    def _do(self, title: str, command: Sequence[str]) -> None:
        print(f"\n{title}\n$ {shlex.join(command)}", flush=True)
        if status := self._run(command):
            raise UserError(f"'{title}': expected {command[0]} to succeed, found status {status}; see its output above")


def evaluation_command(checkpoint: Path, sampling: Sampling, folder: Path) -> list[str]:
    """scripts/evaluate.py that samples clips of a checkpoint, compares them with true ones and writes the report."""
    options = sampling.options("looks", "clips", "seed", "frames", "fps", "steps", "scale", "motion_scale", "sampler")
    options += ["--alone", "0", "--reference", "world"]  # the image model is a separate row
    return ["scripts/evaluate.py", str(checkpoint), *options, "--out", str(folder)]


def run_script(command: Sequence[str]) -> int:
    """Run a script of the project in a new process."""
    return subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], check=False).returncode


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Complete a plan and print its table."""
    parser = Parser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("plan", type=Path, help="YAML: base, overrides, runs, sampling, evaluations, rows, columns")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for runs, clips, reports and the table")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--train-only", action="store_true", help="train, sample no clips yet")
    part.add_argument("--evaluate-only", action="store_true", help="rows of trained runs only")
    given, more = parser.parse_known_args(arguments)
    plan = Ablations.from_mapping(read_plan_file(given.plan), str(given.plan)).with_overrides(more)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    runner = AblationRunner(plan, out, run_script, trains=not given.evaluate_only)
    if given.train_only:
        runner.train()
    else:
        runner.make_rows()
    runner.write_results()
    print(f"\n{(out / 'table.md').read_text()}")


if __name__ == "__main__":
    sys.exit(run_command(main))
