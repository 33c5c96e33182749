"""How fast are we, and how much memory do we take: our network beside others, turn by turn in one run.

    python scripts/dev/benchmark.py                                  # everything; on a card at full size, nine minutes
    python scripts/dev/benchmark.py train kernels --device cpu --precision fp32
    python scripts/dev/benchmark.py memory --base configs/video-sd.yaml --vram 8 data.params.frames=64

Sections: train, sample, memory, kernels, loader, trace. On a processor the networks are small, 64/128/256/256 channels;
on a card they are those of Stable Diffusion v1, the most important rows come first, and smaller cards are stood for by
a cap on the memory. Peers that are not installed are named and left out. Seconds are medians with quartiles; GFLOP are
counted; a share is of the fastest matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from ldm.config import check, load_config
from ldm.devices import choose_device, keep_freed_memory, set_up_gpu
from ldm.errors import Parser, UserError, run_command
from ldm.experiments.tables import markdown_table
from ldm.files import write_atomically
from scripts.dev.benchmarking.contestants import PEERS, PRECISIONS, check_peers
from scripts.dev.benchmarking.plan import GPU_MINUTES, SECTIONS, SMALL, SMALL_SIDE, Plan, Settings
from scripts.dev.benchmarking.rows import Row, goal_rows, record, table_rows
from scripts.dev.benchmarking.sections import Cap
from scripts.dev.benchmarking.timing import Budget
from scripts.dev.measuring import describe_machine

TINY, TINY_SIDE, TINY_SCENES = (32, 32), 4, 4


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="section", help="default: all; with --base also key=value")
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: what there is)")
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), help="default: both, on a card bf16")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help=f"after which nothing more is begun (on a card {GPU_MINUTES:g})")
    parser.add_argument("--base", nargs="+", metavar="YAML", help="with --vram: does this config fit")
    parser.add_argument("--vram", type=float, metavar="GB", help="memory of the card that a cap stands for")
    parser.add_argument("--out", type=Path, help="JSON to write (default: outputs/benchmark-DEVICE.json)")
    parser.add_argument("--tiny", action="store_true", help="networks of a toy's size, to try the command")
    parser.add_argument("--list", action="store_true", help="only say what would be run; the record has no numbers")
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [word for word in options.words if "=" in word]
    options.sections = [word for word in options.words if "=" not in word] or list(SECTIONS)
    for name, value in (("rounds", options.rounds), ("minutes", options.minutes), ("vram", options.vram)):
        if value is not None and not value > 0:
            raise UserError(f"--{name}: expected a number above 0, found {value:g}")
    if (options.base is None) != (options.vram is None):
        raise UserError("--base and --vram: expected both or neither: a config, and the card it is to fit")
    if options.overrides and options.base is None:
        raise UserError(f"{options.overrides[0]}: expected --base with it, which it overrides")
    return options


def settings_of(options: argparse.Namespace) -> tuple[Settings, list[str]]:
    """What a run is asked for, and its sections; raises UserError before anything slow."""
    names = check_peers(options.peers)
    if options.list and options.device.startswith("cuda"):
        device = torch.device(options.device)  # need not be there
    else:
        device = choose_device(options.device)
    if device.type == "mps":
        raise UserError(f"--device: expected cpu or cuda, found {device}")
    precisions = options.precision or (["bf16"] if device.type == "cuda" else list(PRECISIONS))
    if device.type == "cuda" and "bf16" not in precisions:
        raise UserError("--precision: expected bf16 on a card, where nothing is trained without it, found fp32")
    sections = list(options.sections)
    words = {}
    if options.base is not None:
        if device.type != "cuda":
            raise UserError(
                "--vram: expected an NVIDIA GPU, whose memory is capped, found none; scripts/plan.py counts what fits "
                "without one"
            )
        check(load_config(options.base, options.overrides))
        words, sections = {"caps": [Cap(options.vram, tuple(options.base), tuple(options.overrides))]}, ["memory"]
    if options.tiny:
        words |= {"scenes": TINY_SCENES}
    widths, side = (TINY, TINY_SIDE) if options.tiny else (SMALL, SMALL_SIDE)
    return Settings(device, names, precisions, options.rounds, widths, side, **words), sections


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print and write."""
    options = parse_arguments(arguments)
    settings, sections = settings_of(options)
    device = settings.device
    is_on_card = device.type == "cuda"
    minutes = GPU_MINUTES if options.minutes is None and is_on_card else options.minutes
    plan = Plan(settings, sections, Budget(minutes))
    begin, rows = time.monotonic(), []
    if options.list:
        rows = plan.outline()
    else:
        set_up_gpu(exact=False, repeatable=False)
        keep_freed_memory()
        for row in plan.run():
            rows.append(row)
            print(f"{row.section:8} {' | '.join(cell for cell in table_rows([row])[1] if cell)}", flush=True)
    about = {
        "date": None if options.list else date.today().isoformat(), "device": device.type,
        "machine": describe(device) if not options.list else "", "torch": torch.__version__,
        "threads": torch.get_num_threads(), "minutes": round((time.monotonic() - begin) / 60, 2),
        "peaks": {name: peak for name, peak in plan.peaks.items()},
    }  # fmt: skip
    print(f"\n{about['machine']}; {about['minutes']} minutes")
    for precision, peak in plan.peaks.items():
        print(f"fastest matrix product, {precision}: {peak / 1e12:.3g} TFLOP/s")
    show(rows, device.type)
    path = options.out or Path(f"outputs/benchmark-{device.type}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record(rows, about), indent=1) + "\n")
    print(f"written: {path}")


def describe(device: torch.device) -> str:
    """The machine in a line, its card first."""
    if device.type != "cuda":
        return describe_machine()
    card = torch.cuda.get_device_properties(device)
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB; {describe_machine()}"


def show(rows: Sequence[Row], kind: str) -> None:
    """The tables of all sections, and the goals."""
    for section in SECTIONS:
        found = [row for row in rows if row.section == section]
        if found:
            headings, *lines = table_rows(found)
            print(f"\n{section}\n\n{markdown_table(headings, lines)}", end="")
    headings, *lines = goal_rows(rows, kind)
    print(f"\ngoals\n\n{markdown_table(headings, lines)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
