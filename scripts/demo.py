"""The bundled model on three prompts; or, with --train, the whole road on a drawn example.

    python scripts/demo.py [--out DIR]            three clips from models/drive, and one sheet of them
    python scripts/demo.py --train [--out DIR]    footage, autoencoder, prepared clips, video model, a new clip

Every stage is a command that could as well be typed; it is printed before it runs and kept in demo-commands.txt. Work
is counted in steps, not in time, so that one machine always makes the same clip. Needs no graphics card, no download.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.checkpoint.layouts import BUNDLED, CONFIG, is_bundle
from ldm.data.world import draw_clip
from ldm.errors import Parser, UserError, run_command
from ldm.files import replacing, write_atomically
from ldm.video import contact_sheet, read_video, write_mp4

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = "demo-commands.txt"  # also the sign that a folder is a demo's
PROMPT = "driving on a highway"  # of what is trained here
BUNDLED_PROMPTS = (
    "cyberpunk scenic byway road drive",
    "volcano fire burning scenic byway road drive",
    "summer dawn scenic byway road drive",
)
SHEET_FRAMES = 8  # of each clip, evenly spaced


@dataclass(frozen=True)
class Budget:
    """How much of everything. size: pixels of a side; footage_frames: drawn at 25 a second; the others are steps."""

    size: int = 128
    footage_frames: int = 300
    autoencoder_steps: int = 350
    video_steps: int = 400
    sampler_steps: int = 25


Runner = Callable[[Sequence[str]], None]  # runs ["script.py", "argument", ...]


def sample_bundled(folder: Path, bundle: Path, run: Runner) -> list[Path]:
    """Sample a clip for each prompt from a bundle, as it suggests -> one sheet of all clips, and their MP4s.

    Raises UserError where there is no bundle.
    """
    if not is_bundle(bundle):
        raise UserError(
            f"{bundle}: expected the bundled model, found no {CONFIG} there. Get the whole folder, or see `make "
            "demo-train`, which trains small models of its own"
        )
    prompts, clips = folder / "prompts.txt", folder / "clips"
    write_atomically(prompts, "".join(f"{prompt}\n" for prompt in BUNDLED_PROMPTS))
    run(["scripts/txt2vid.py", "--ckpt", shown(bundle), "--from-file", str(prompts), "--outdir", str(clips)])
    films = [clips / f"{number:05}.mp4" for number in range(len(BUNDLED_PROMPTS))]
    rows = []
    for film in films:
        frames, _ = read_video(film)
        rows.append(frames[np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round().astype(int)])
    with replacing(folder / "demo.png") as partial:
        contact_sheet(rows, BUNDLED_PROMPTS).save(partial, format="PNG", optimize=True)
    return [folder / "demo.png", *films]


def make_demo(folder: Path, budget: Budget, run: Runner) -> list[Path]:
    """Go the whole road inside a fresh folder -> the MP4, the GIF and the contact sheet of the sampled clip."""
    drive = folder / "drive.mp4"
    write_mp4(drive, draw_clip("summer dawn", 0, budget.footage_frames, budget.size, 25).frames, fps=25)
    print(f"drew {drive}")
    first_stage = train_autoencoder(folder, drive, budget, run)
    prepared, encoder = folder / "prepared", f"model.params.first_stage_config.params.ckpt_path={first_stage}"
    words = ["--out", str(prepared), "--config", "configs/tiny/video.yaml", "--size", str(budget.size)]
    run(["scripts/prepare.py", str(drive), *words, "--prompt", PROMPT, "--preview", encoder])
    video_model = train_video_model(folder, prepared, encoder, budget, run)
    words = ["--steps", str(budget.sampler_steps), "--scale", "1", "--outdir", str(folder / "clips")]
    run(["scripts/txt2vid.py", "--ckpt", str(video_model), "--prompt", PROMPT, "--frames", "6", *words])
    return [folder / "clips" / f"00000{suffix}" for suffix in (".mp4", ".gif", ".png")]


def train_autoencoder(folder: Path, drive: Path, budget: Budget, run: Runner) -> Path:
    """Train the tiny autoencoder on the frames of a video -> its checkpoint."""
    overrides = {
        "data.params.videos": drive,
        "data.params.size": budget.size,
        "data.params.batch_size": 2,
        "model.base_learning_rate": 2e-3,
        **steps(budget.autoencoder_steps),
    }
    run(training("configs/tiny/autoencoder.yaml", "autoencoder", folder, overrides))
    return last_checkpoint(folder, "autoencoder")


def train_video_model(folder: Path, prepared: Path, encoder: str, budget: Budget, run: Runner) -> Path:
    """Train the tiny video model on prepared clips -> its checkpoint."""
    overrides = {
        "data.params.root": prepared,
        "data.params.batch_size": 2,
        "model.base_learning_rate": 1e-3,
        "model.params.warmup_steps": 50,
        "lightning.callbacks.average.params.decay": 0.99,
        "lightning.callbacks.samples": "null",  # the clip comes at the end
        **steps(budget.video_steps),
    }
    run([*training("configs/tiny/video.yaml", "video", folder, overrides), encoder])
    return last_checkpoint(folder, "video")


def training(config: str, name: str, folder: Path, overrides: dict[str, object]) -> list[str]:
    """The command that trains what a config describes, with overrides, in DIR/logs."""
    words = ["main.py", "--base", config, "-t", "--accelerator", "cpu", "-n", name, "-l", str(folder / "logs")]
    return [*words, *(f"{key}={value}" for key, value in overrides.items())]


def steps(number: int) -> dict[str, object]:
    """Overrides for a short run, validated once, at its end."""
    trainer = {"max_steps": number, "val_check_interval": number, "check_val_every_n_epoch": "null"}
    return {f"lightning.trainer.{key}": value for key, value in trainer.items()}


def last_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint of the run called `name`; raises UserError when it was stopped before there was one."""
    found = sorted((folder / "logs").glob(f"*_{name}/checkpoints/last.ckpt"))
    if not found:
        where = folder / "logs"
        raise UserError(f"{where}: expected a checkpoint of the run '{name}', found none; run the demo again")
    return found[-1]


def fresh_folder(folder: Path) -> None:
    """Make the folder, empty; an earlier demo's is cleared, anything else that has something in it is refused."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: expected a folder, found a file of that name; choose another")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / COMMANDS).is_file():
            raise UserError(
                f"--out {folder}: expected a new folder or that of an earlier demo (with {COMMANDS} in it), found "
                "other files, which would be lost; choose another folder"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def run_and_time(words: Sequence[str], log: Path) -> None:
    """Print a command, append it to the log, run it in the project's root, print its time.

    Raises UserError when it fails or was interrupted; it has said why itself.
    """
    line = shlex.join([shown(Path(sys.executable)), *words])
    with log.open("a") as file:
        file.write(f"{line}\n")
    print(f"\n$ {line}", flush=True)
    begin = time.monotonic()
    status = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
    if status:
        raise UserError(f"the demo ends here: {words[0]} ended with status {status}; it says why above")
    print(f"{words[0]}: {time.monotonic() - begin:.0f} s", flush=True)


def shown(path: Path) -> str:
    """A path as seen from the project's root, where the commands run, if it lies inside."""
    path = Path(os.path.abspath(path))  # a link, as python is in a virtual environment, stays one
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo and print what it made."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--train", action="store_true", help="train small models from nothing and sample from them")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where everything goes; what an earlier demo left there is cleared (default: outputs/demo, and "
        "outputs/demo-train with --train)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    given.out = given.out or ROOT / "outputs" / ("demo-train" if given.train else "demo")
    begin = time.monotonic()
    fresh_folder(given.out)
    folder = Path(shown(given.out))
    os.chdir(ROOT)
    log = folder / COMMANDS
    log.touch()

    def run(words: Sequence[str]) -> None:
        run_and_time(words, log)

    files = make_demo(folder, Budget(), run) if given.train else sample_bundled(folder, BUNDLED, run)
    print(f"\nthe demo took {time.monotonic() - begin:.0f} s and made, from nothing but this repository,")
    for path in files:
        print(f"  {path}")


if __name__ == "__main__":
    sys.exit(run_command(main))
