"""The options of sampling, one table for scripts/txt2vid.py and scripts/evaluate.py, and prompt files with options."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.config.schema import FLAG
from ldm.errors import Parser, UserError
from ldm.sampling.loop import SAMPLERS
from ldm.sampling.prompts import read_prompt_lines
from ldm.sampling.settings import PRECISIONS

DECODE_CHUNK = 4
DESCRIPTION = """\
Sample video clips from prompts, images and videos with one checkpoint.

Writes NNNNN.mp4, NNNNN.gif, NNNNN.png (all frames on one sheet) and NNNNN.json (the record, also inside the MP4).
--replay reads a record and writes identical files on the same machine.
"""
EPILOG = """\
four uses:
  text           %(prog)s --prompt "a forest road" --frames 6
  first frame    %(prog)s --prompt "a forest road" --init-image road.jpg
  in-betweening  %(prog)s --prompt "a forest road" --interpolate 4 slow.mp4
  continuation   %(prog)s --prompt "a forest road" --init-video drive.mp4 --frames 65

All but the first need a checkpoint trained with known frames. A clip longer than a window is sampled in several; the
plan is printed first. Clip i of a run has seed + i for every --n_samples; the batch affects rounding only. --precision
applies to the UNet. A checkpoint may set other defaults for options marked *, as models/drive does. 1,000 frames of
512x512 need 0.8 GB of memory.
"""
# Option -> arguments of `add_argument`.
OPTIONS: dict[str, dict[str, Any]] = {
    "--negative-prompt": {"metavar": "TEXT", "help": "guidance moves away from this prompt (default: empty)"},
    "--frames": {"type": int, "metavar": "N", "help": "length, 1 to 10,000 (default: as in training*)"},
    "--H": {"type": int, "metavar": "PIXELS", "help": "height (default: as in training; SD v1: 512)"},
    "--W": {"type": int, "metavar": "PIXELS", "help": "width (default: as in training; SD v1: 512)"},
    "--fps": {"type": float, "help": "frames a second, an input of some networks (default: as in training*)"},
    "--seed": {"type": int, "metavar": "N", "help": "of the first clip; later clips count up (default: 42)"},
    "--n_samples": {"type": int, "metavar": "N", "help": "clips per batch, for one prompt (default: 1)"},
    "--n_iter": {"type": int, "metavar": "N", "help": "number of batches (default: 1)"},
    "--init-image": {"type": Path, "metavar": "FILE", "help": "first frame: centre crop, transparency on black"},
    "--init-video": {"type": Path, "metavar": "FILE", "help": "its last --overlap frames begin the clip"},
    "--interpolate": {"nargs": 2, "metavar": ("K", "VIDEO"), "help": "raise a video's frame rate K times, 2 to 64"},
    "--mask": {"type": Path, "metavar": "FILE", "help": "grey image or video: sample where white, keep where black"},
    "--known-noise": {
        "type": int, "metavar": "S", "help": "diffusion step of the noise on frames of earlier windows (default: 0)",
    },
    "--window": {"type": int, "metavar": "N", "help": "frames sampled together (default: as in training, up to 2x)"},
    "--overlap": {"type": int, "metavar": "N", "help": "frames that windows share (default: a third of a window)"},
    "--sampler": {"metavar": "NAME", "help": f"{', '.join(SAMPLERS)} (default: ddim*)"},
    "--steps": {"type": int, "metavar": "N", "help": "diffusion steps (default: 50*)"},
    "--scale": {"type": float, "help": "guidance; 1 is none and twice as fast (default: 7.5*)"},
    "--motion-scale": {
        "type": float, "metavar": "SCALE",
        "help": "guidance away from independent frames, for more motion; 1 is none (default: 1*)",
    },
    "--eta": {"type": float, "help": "noise between DDIM steps, 0 to 1 (default: 0)"},
    "--device": {"help": "cpu, cuda, cuda:1, mps (default: the best available)"},
    "--precision": {"choices": PRECISIONS, "help": "default: bf16 on GPUs that support it, otherwise full"},
}  # fmt: skip
GROUPS = {
    "the clip": ("--negative-prompt", "--frames", "--H", "--W", "--fps", "--seed", "--n_samples", "--n_iter"),
    "given frames (for checkpoints trained with known frames)": (
        "--init-image", "--init-video", "--interpolate", "--mask", "--known-noise",
    ),
    "long clips": ("--window", "--overlap"),
    "sampling": ("--sampler", "--steps", "--scale", "--motion-scale", "--eta"),
}  # fmt: skip


def add_options(group: argparse._ActionsContainer, *names: str) -> None:
    """Add options of the table to a parser or one of its groups."""
    for name in names:
        group.add_argument(name, **OPTIONS[name])


def clip_parser() -> Parser:
    """The options that a line of a prompt file may set too; absent when not given."""
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for title, names in GROUPS.items():
        add_options(parser.add_argument_group(title), *names)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=120)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; clip options that were not given are absent."""
    parser = Parser(
        parents=[clip_parser()], allow_abbrev=False, formatter_class=_formatter,
        usage="%(prog)s (--prompt TEXT | --from-file FILE | --replay FILE) [options]", description=DESCRIPTION,
        epilog=EPILOG,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt", metavar="TEXT",
        help='what to show; "0: dawn road | 40: night road" changes it at these frames, blended in between',
    )  # fmt: skip
    what.add_argument(
        "--from-file", type=Path, metavar="FILE",
        help="one prompt a line, with options: a snowy pass --seed 3 --frames 8; # begins a comment",
    )  # fmt: skip
    what.add_argument("--replay", type=Path, metavar="FILE", help="a JSON or MP4 of this script: sample it again")
    files = parser.add_argument_group("files")
    for name, metavar, help_text in (
        ("--ckpt", "FILE", "default: the newest logs/*/checkpoints/last.ckpt, otherwise models/drive"),
        ("--base", "FILE", "an image model for --temporal: any fine-tune of SD v1"),
        ("--temporal", "FILE", "temporal layers to merge into --base"),
        ("--temporal-decoder", "FILE", "temporal layers for the decoder of the autoencoder"),
        ("--config", "YAML", "for checkpoints without a config"),
    ):
        files.add_argument(name, type=Path, metavar=metavar, help=help_text)
    files.add_argument(FLAG, action="store_true", help="build any class that this config names")
    files.add_argument("--outdir", type=Path, default=Path("outputs/txt2vid-samples"), help="default: %(default)s")
    machine = parser.add_argument_group("machine")
    add_options(machine, "--device", "--precision")
    machine.add_argument("--compile", action="store_true", help="torch.compile: minutes at first, then faster steps")
    machine.add_argument("--cuda-graphs", action="store_true", help="on a GPU: record the network once and replay it")
    machine.add_argument(
        "--decode-chunk", type=int, metavar="N", help=f"frames decoded together (default: {DECODE_CHUNK})"
    )
    return parser.parse_args(arguments)


def read_prompt_file(path: Path) -> list[argparse.Namespace]:
    """A namespace per line with `prompt` and the options after it; raises UserError with the line number."""
    parser, requests = clip_parser(), []
    for number, line in read_prompt_lines(path):
        prompt, options = re.fullmatch(r"(.*?)((?:^|\s)--[A-Za-z].*)?", line).groups()
        parser.where = f"{path}, line {number}: "
        if not prompt:
            raise UserError(f"{parser.where}expected a prompt before the options, found {line!r}")
        try:
            arguments = shlex.split(options or "")
        except ValueError as error:
            raise UserError(f"{parser.where}the options do not parse ({error}): {options.strip()!r}") from error
        requests.append(parser.parse_args(arguments, argparse.Namespace(prompt=prompt)))
    return requests


def refuse_beside_replay(options: argparse.Namespace) -> None:
    """Raise UserError for an option that a replay reads from the record."""
    given = [name for names in GROUPS.values() for name in names if hasattr(options, name[2:].replace("-", "_"))]
    others = {"--config": options.config, "--precision": options.precision, "--decode-chunk": options.decode_chunk}
    given += [name for name, value in {**others, "--compile": options.compile or None}.items() if value is not None]
    if given:
        raise UserError(
            f"{given[0]}: expected no setting of the clip with --replay, found one that {options.replay} holds; use "
            "only --ckpt, --base, --temporal, --temporal-decoder, --device and --outdir"
        )
