"""The command line of scripts/txt2vid.py: its options, and files of prompts with options of their own."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ldm.config.schema import FLAG
from ldm.errors import Parser, UserError
from ldm.sampling.loop import SAMPLERS
from ldm.sampling.settings import PRECISIONS

DECODE_CHUNK = 4
DESCRIPTION = """\
Make video clips from prompts, pictures and videos with one checkpoint file.

Every clip becomes NNNNN.mp4, NNNNN.gif, NNNNN.png (its frames on one sheet) and NNNNN.json (everything it was made
from, also inside the MP4). --replay takes such a JSON or MP4 and makes the same bytes again on the same machine.
"""
EPILOG = """\
four uses:
  text           %(prog)s --prompt "a forest road" --frames 6
  first frame    %(prog)s --prompt "a forest road" --init-image road.jpg
  in-betweening  %(prog)s --prompt "a forest road" --interpolate 4 slow.mp4
  continuation   %(prog)s --prompt "a forest road" --init-video drive.mp4 --frames 65

All but the first need a checkpoint that was trained with known frames. Clips longer than a window are made in
several: the plan is printed before it starts. Seeds belong to clips: clip i of a run has seed + i, whatever
--n_samples is; making several at a time changes rounding, not content. --precision is that of the UNet; text and
pictures are always exact. A checkpoint may suggest other values of what is marked *, as models/drive does. A finished
clip is held in memory as 8-bit pixels: 0.8 GB for 1,000 frames of 512x512.
"""


def clip_parser() -> Parser:
    """The options that a line of a prompt file may set too."""
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    clip = parser.add_argument_group("the clip")
    clip.add_argument("--negative-prompt", metavar="TEXT", help="what guidance moves away from (default: nothing)")
    clip.add_argument("--frames", type=int, metavar="N", help="length, 1 to 10,000 (default: as in training*)")
    clip.add_argument("--H", type=int, metavar="PIXELS", help="height (default: as in training; SD v1: 512)")
    clip.add_argument("--W", type=int, metavar="PIXELS", help="width (default: as in training; SD v1: 512)")
    clip.add_argument("--fps", type=float, help="frames a second, told to networks that ask (default: as in training*)")
    clip.add_argument("--seed", type=int, metavar="N", help="of the first clip; the next ones count on (default: 42)")
    clip.add_argument("--n_samples", type=int, metavar="N", help="clips made at a time, for one prompt (default: 1)")
    clip.add_argument("--n_iter", type=int, metavar="N", help="how often that is done (default: 1)")
    given = parser.add_argument_group("given frames (for checkpoints trained with known frames)")
    given.add_argument("--init-image", type=Path, metavar="FILE", help="first frame: its middle; transparent is black")
    given.add_argument("--init-video", type=Path, metavar="FILE", help="its last --overlap frames begin the clip")
    given.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("K", "VIDEO"),
        help="2 to 64 times the frames of a video, at as many times its rate",
    )
    given.add_argument(
        "--mask", type=Path, metavar="FILE",
        help="grey picture or video: in every frame white is made, and black kept from what is given",
    )  # fmt: skip
    given.add_argument(
        "--known-noise", type=int, metavar="S",
        help="noise on known frames where earlier windows made some, a diffusion step (default: 0)",
    )  # fmt: skip
    long = parser.add_argument_group("long clips")
    long.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="frames made at once (default: as in training; up to twice that in one go)",
    )
    long.add_argument(
        "--overlap", type=int, metavar="N", help="frames that windows share (default: a third of a window)"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: ddim*)")
    sampling.add_argument("--steps", type=int, metavar="N", help="diffusion steps (default: 50*)")
    sampling.add_argument("--scale", type=float, help="guidance; 1 is none and twice as fast (default: 7.5*)")
    sampling.add_argument(
        "--motion-scale", type=float, metavar="SCALE",
        help="guidance away from frames by themselves, which moves things more; 1 is none (default: 1*)",
    )  # fmt: skip
    sampling.add_argument("--eta", type=float, help="noise between DDIM steps, 0 to 1 (default: 0)")
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    """As wide as the description, so that each option takes one line."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=120)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; options of the clip that were not given are absent."""
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
        help="one prompt a line, options after it: a snowy pass --seed 3 --frames 8; # skips a line",
    )  # fmt: skip
    what.add_argument("--replay", type=Path, metavar="FILE", help="a JSON or MP4 written here: make it again")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--ckpt", type=Path, metavar="FILE", help="default: the newest logs/*/checkpoints/last.ckpt, else models/drive"
    )
    files.add_argument(
        "--base", type=Path, metavar="FILE", help="an image model, for --temporal: any fine-tune of SD v1"
    )
    files.add_argument("--temporal", type=Path, metavar="FILE", help="temporal layers alone, to be put into --base")
    files.add_argument(
        "--temporal-decoder", type=Path, metavar="FILE", help="layers over time for the decoder of the autoencoder"
    )
    files.add_argument("--config", type=Path, metavar="YAML", help="for checkpoints that have no config inside")
    files.add_argument(FLAG, action="store_true", help="build whatever class that config names")
    files.add_argument("--outdir", type=Path, default=Path("outputs/txt2vid-samples"), help="default: %(default)s")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    machine.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on CUDA cards that have it, else full")
    machine.add_argument("--compile", action="store_true", help="torch.compile: minutes at first, then faster steps")
    machine.add_argument("--cuda-graphs", action="store_true", help="on a GPU: record the network once, play it back")
    machine.add_argument(
        "--decode-chunk", type=int, metavar="N", help=f"frames decoded at a time (default: {DECODE_CHUNK})"
    )
    return parser.parse_args(arguments)


def read_prompt_file(path: Path) -> list[argparse.Namespace]:
    """A namespace per line with `prompt` and the options that follow it; raises UserError with the line's number."""
    if not path.is_file():
        raise UserError(f"{path}: expected a text file with one prompt a line, found no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a text file in UTF-8, found other bytes ({error.reason})") from error
    parser, jobs = clip_parser(), []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        prompt, options = re.fullmatch(r"(.*?)((?:^|\s)--[A-Za-z].*)?", line.strip()).groups()
        parser.where = f"{path}, line {number}: "
        if not prompt:
            raise UserError(f"{parser.where}expected a prompt before the options, found {line.strip()!r}")
        try:
            words = shlex.split(options or "")
        except ValueError as error:
            raise UserError(f"{parser.where}the options do not parse ({error}): {options.strip()!r}") from error
        jobs.append(parser.parse_args(words, argparse.Namespace(prompt=prompt)))
    if not jobs:
        raise UserError(f"{path}: expected one prompt a line, found none")
    return jobs


def refuse_beside_replay(options: argparse.Namespace) -> None:
    """Raise UserError for an option that a replay takes from the record."""
    clip_options = {action.dest for action in clip_parser()._actions}
    given = sorted(clip_options & set(vars(options)))
    given += [name for name in ("config", "precision", "decode_chunk") if getattr(options, name) is not None]
    given += ["compile"] if options.compile else []
    if given:
        raise UserError(
            f"--replay: takes every setting of the clip from {options.replay}, so --{given[0].replace('_', '-')} "
            "cannot be given beside it; only --ckpt, --base, --temporal, --temporal-decoder, --device and --outdir "
            "can"
        )
