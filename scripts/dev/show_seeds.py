"""Contact sheets of clips that are not selected: the seed decides the style, the prompt and the noise.

    python scripts/dev/show_seeds.py --ckpt models/drive --page docs/experiments/seeds.md

One sheet per seed, docs/images/drive/NN.png, and a page that shows them and tells which styles the model saw in motion
in training. The clips, with their records, stay in --outdir.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from ldm.data.world import LOOKS, MOVING_LOOKS
from ldm.data.world.captions import DRIVES
from ldm.data.world.looks import LOOKS as DESCRIBED
from ldm.errors import Parser, UserError, run_command
from ldm.files import replacing, write_atomically
from ldm.sampling.record import next_number, read_record
from ldm.video import contact_sheet, read_video

ROOT = Path(__file__).resolve().parents[2]
PER_ROW = 8
MOST_SEEDS = 100


@dataclass(frozen=True)
class SeedChoice:
    """The style and prompt of a seed."""

    seed: int
    look: str
    prompt: str
    has_moved: bool  # whether the training set had clips of the style


def choose(seed: int) -> SeedChoice:
    """The style and the prompt of a seed."""
    look = LOOKS[int(np.random.default_rng(seed).integers(len(LOOKS)))]
    return SeedChoice(seed, look, f"{DESCRIBED[look].phrases[0]} {DRIVES[0]}", look in MOVING_LOOKS)


def make_sheets(
    checkpoint: Path, chosen: Sequence[SeedChoice], outdir: Path, images: Path, run: Callable[[Sequence[str]], None]
) -> None:
    """Sample a clip per seed with the checkpoint's defaults by txt2vid.py; write each as `images`/NN.png.

    run: runs ["script.py", "argument", ...].
    """
    outdir.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    first = next_number(outdir)
    prompts = outdir / "prompts.txt"
    write_atomically(prompts, "".join(f"{one.prompt} --seed {one.seed}\n" for one in chosen))
    run(["scripts/txt2vid.py", "--ckpt", str(checkpoint), "--from-file", str(prompts), "--outdir", str(outdir)])
    for number, one in enumerate(chosen, start=first):
        clip = outdir / f"{number:05}.mp4"
        if read_record(clip)["seed"] != one.seed:
            raise UserError(f"{clip}: expected the clip of seed {one.seed}, found another; give an empty --outdir")
        frames, _ = read_video(clip)
        rows = [frames[start : start + PER_ROW] for start in range(0, len(frames), PER_ROW)]
        with replacing(images / f"{one.seed:02}.png") as partial:
            contact_sheet(rows).quantize(256).save(partial, format="PNG", optimize=True)


def page(chosen: Sequence[SeedChoice], images: Path, path: Path, checkpoint: Path) -> str:
    """A Markdown page of the sheets, to be written to `path`."""
    num_moved = sum(one.has_moved for one in chosen)
    lines = [
        f"# Seeds {chosen[0].seed} to {chosen[-1].seed}",
        "",
        f"Clips of `{checkpoint.as_posix()}`, by `python scripts/dev/show_seeds.py`, not selected: the seed decides "
        f"style and noise. Frames go from left to right, {PER_ROW} in a row. Of {len(chosen)} styles here, "
        f"{num_moved} were seen in motion in training and {len(chosen) - num_moved} as single pictures only.",
    ]
    for one in chosen:
        seen = "seen in motion in training" if one.has_moved else "never seen in motion in training"
        image = Path(os.path.relpath(images, path.parent)) / f"{one.seed:02}.png"
        lines += ["", f"**{one.seed}** {one.prompt} ({seen})", "", f"![{one.look}]({image.as_posix()})"]
    return "\n".join(lines) + "\n"


def run_in_root(words: Sequence[str]) -> None:
    """Run a script of the project; raises UserError if it fails, after its own message."""
    status = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
    if status:
        raise UserError(f"{words[0]} ended with status {status}; see its message above")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the sheets and the page."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, default=Path("models/drive"), metavar="PATH", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=16, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    for name, default, metavar in (
        ("--images", "docs/images/drive", "DIR"), ("--page", "docs/experiments/seeds.md", "FILE"),
        ("--outdir", "outputs/seeds", "DIR"),
    ):  # fmt: skip
        parser.add_argument(name, type=Path, default=Path(default), metavar=metavar, help="default: %(default)s")
    given = parser.parse_args(arguments)
    if not 1 <= given.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds: expected 1 to {MOST_SEEDS}, found {given.seeds}")
    os.chdir(ROOT)
    chosen = [choose(seed) for seed in range(given.seeds)]
    make_sheets(given.ckpt, chosen, given.outdir, given.images, run_in_root)
    write_atomically(given.page, page(chosen, given.images, given.page, given.ckpt))
    print(f"{given.page}, and {len(chosen)} sheets in {given.images}")


if __name__ == "__main__":
    sys.exit(run_command(main))
