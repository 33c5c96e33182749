"""Sample three prompts with the bundled model; with --train, train small models from scratch and sample a clip.

    python scripts/demo.py [--out DIR]            three clips by models/drive, and a contact sheet
    python scripts/demo.py --train [--out DIR]    procedural footage, autoencoder, prepared clips, video model, a clip

Every stage is an ordinary command, printed before it runs and appended to demo-commands.txt. The numbers of steps are
fixed: a machine always makes the same clip. Needs neither a GPU nor a download.
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
COMMANDS = "demo-commands.txt"  # also marks a folder as that of a demo
PROMPT = "driving on a highway"  # of the model trained here
BUNDLED_PROMPTS = (
    "cyberpunk scenic byway road drive",
    "volcano fire burning scenic byway road drive",
    "summer dawn scenic byway road drive",
)
SHEET_FRAMES = 8  # of each clip, evenly spaced


@dataclass(frozen=True)
class DemoSettings:
    """size: side in pixels. footage_frames: at 25 per second. The others are steps."""

    size: int = 128
    footage_frames: int = 300
    autoencoder_steps: int = 350
    video_steps: int = 400
    sampler_steps: int = 25


Runner = Callable[[Sequence[str]], None]  # runs ["script.py", "argument", ...]


def sample_bundled(folder: Path, bundle: Path, run: Runner) -> list[Path]:
    """Sample a clip for each prompt with a bundle's default options -> the contact sheet and the MP4s.

    Raises UserError without a bundle.
    """
    if not is_bundle(bundle):
        raise UserError(
            f"{bundle}: expected the bundled model, found no {CONFIG} there. Get the whole folder, or run `make "
            "demo-train`, which trains small models from scratch"
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


def train_and_sample(folder: Path, settings: DemoSettings, run: Runner) -> list[Path]:
    """Train and sample in an empty folder -> the MP4, the GIF and the contact sheet of the clip."""
    drive = folder / "drive.mp4"
    write_mp4(drive, draw_clip("summer dawn", 0, settings.footage_frames, settings.size, 25).frames, fps=25)
    print(f"drew {drive}")
    first_stage = train_autoencoder(folder, drive, settings, run)
    prepared, encoder = folder / "prepared", f"model.params.first_stage_config.params.ckpt_path={first_stage}"
    options = ["--out", str(prepared), "--config", "configs/tiny/video.yaml", "--size", str(settings.size)]
    run(["scripts/prepare.py", str(drive), *options, "--prompt", PROMPT, "--preview", encoder])
    video_model = train_video_model(folder, prepared, encoder, settings, run)
    options = ["--steps", str(settings.sampler_steps), "--scale", "1", "--outdir", str(folder / "clips")]
    run(["scripts/txt2vid.py", "--ckpt", str(video_model), "--prompt", PROMPT, "--frames", "6", *options])
    return [folder / "clips" / f"00000{suffix}" for suffix in (".mp4", ".gif", ".png")]


def train_autoencoder(folder: Path, drive: Path, settings: DemoSettings, run: Runner) -> Path:
    """Train the tiny autoencoder on the frames of a video -> its checkpoint."""
    overrides = {
        "data.params.videos": drive,
        "data.params.size": settings.size,
        "data.params.batch_size": 2,
        "model.base_learning_rate": 2e-3,
        **steps(settings.autoencoder_steps),
    }
    run(training("configs/tiny/autoencoder.yaml", "autoencoder", folder, overrides))
    return last_checkpoint(folder, "autoencoder")


def train_video_model(folder: Path, prepared: Path, encoder: str, settings: DemoSettings, run: Runner) -> Path:
    """Train the tiny video model on prepared clips -> its checkpoint."""
    overrides = {
        "data.params.root": prepared,
        "data.params.batch_size": 2,
        "model.base_learning_rate": 1e-3,
        "model.params.warmup_steps": 50,
        "lightning.callbacks.average.params.decay": 0.99,
        "lightning.callbacks.samples": "null",  # the clip is sampled at the end
        **steps(settings.video_steps),
    }
    run([*training("configs/tiny/video.yaml", "video", folder, overrides), encoder])
    return last_checkpoint(folder, "video")


def training(config: str, name: str, folder: Path, overrides: dict[str, object]) -> list[str]:
    """The command that trains a config with overrides; its run folder is in DIR/logs."""
    command = ["main.py", "--base", config, "-t", "--accelerator", "cpu", "-n", name, "-l", str(folder / "logs")]
    return [*command, *(f"{key}={value}" for key, value in overrides.items())]


def steps(number: int) -> dict[str, object]:
    """Overrides for a run of `number` steps, validated once at its end."""
    trainer = {"max_steps": number, "val_check_interval": number, "check_val_every_n_epoch": "null"}
    return {f"lightning.trainer.{key}": value for key, value in trainer.items()}


def last_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint of the run `name`; raises UserError if it was stopped before the first."""
    found = sorted((folder / "logs").glob(f"*_{name}/checkpoints/last.ckpt"))
    if not found:
        where = folder / "logs"
        raise UserError(f"{where}: expected a checkpoint of the run '{name}', found none; run the demo again")
    return found[-1]


def fresh_folder(folder: Path) -> None:
    """Create an empty folder; clears that of an earlier demo, raises UserError for other folders with files."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: expected a folder, found a file of that name; choose another")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / COMMANDS).is_file():
            raise UserError(
                f"--out {folder}: expected a new folder or that of an earlier demo (with {COMMANDS} in it), found "
                "other files, which would be deleted; choose another folder"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def run_and_time(command: Sequence[str], log: Path) -> None:
    """Print and log a command, run it in the project's root, print its time; raises UserError if it fails."""
    line = shlex.join([shown(Path(sys.executable)), *command])
    with log.open("a") as file:
        file.write(f"{line}\n")
    print(f"\n$ {line}", flush=True)
    begin = time.monotonic()
    status = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    if status:
        raise UserError(f"{command[0]} ended with status {status}; see its message above")
    print(f"{command[0]}: {time.monotonic() - begin:.0f} s", flush=True)


def shown(path: Path) -> str:
    """A path relative to the project's root, where the commands run, if it lies inside."""
    path = Path(os.path.abspath(path))  # keeps links: python of a virtual environment is one
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo and print the paths of its files."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--train", action="store_true", help="train small models from scratch and sample a clip")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder of all files; that of an earlier demo is cleared (default: outputs/demo, and "
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

    def run(command: Sequence[str]) -> None:
        run_and_time(command, log)

    files = train_and_sample(folder, DemoSettings(), run) if given.train else sample_bundled(folder, BUNDLED, run)
    print(f"\nThe demo took {time.monotonic() - begin:.0f} s and made")
    for path in files:
        print(f"  {path}")


if __name__ == "__main__":
    sys.exit(run_command(main))
