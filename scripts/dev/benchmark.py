"""Measure speed and memory of our network beside other networks, in turns within one run.

    python scripts/dev/benchmark.py                                  # everything; on a GPU at full size, nine minutes
    python scripts/dev/benchmark.py train kernels --device cpu --precision fp32
    python scripts/dev/benchmark.py memory --base configs/video-sd.yaml --vram 8 data.params.frames=64

Sections: train, sample, memory, kernels, loader, trace. On a CPU the networks are small, 64/128/256/256 channels; on a
GPU they have the size of Stable Diffusion v1, the most important rows come first, and a memory cap stands for smaller
GPUs. Peers that are not installed are listed and left out. Seconds are medians with quartiles; GFLOP are counted; a
share is relative to the fastest matrix product of the same run.
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
from scripts.dev.benchmarking.rows import BenchmarkRow, goal_rows, record, table_rows
from scripts.dev.benchmarking.run import GPU_MINUTES, SECTIONS, BenchmarkRun, BenchmarkSettings
from scripts.dev.benchmarking.sections import Cap
from scripts.dev.benchmarking.timing import Budget
from scripts.dev.measuring import describe_machine

TINY = {"widths": (32, 32), "side": 4, "scenes": 4}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="section", help="default: all; with --base also key=value")
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), help="default: both; on a GPU bf16")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help=f"start nothing after them (default on a GPU: {GPU_MINUTES:g})")
    parser.add_argument("--base", nargs="+", metavar="YAML", help="with --vram: test whether this config fits")
    parser.add_argument("--vram", type=float, metavar="GB", help="GPU memory to cap to")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: outputs/benchmark-DEVICE.json)")
    parser.add_argument("--tiny", action="store_true", help="toy networks, to try the command")
    parser.add_argument("--list", action="store_true", help="only list the jobs; the record has no numbers")
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [word for word in options.words if "=" in word]
    options.sections = [word for word in options.words if "=" not in word] or list(SECTIONS)
    for name, value in (("rounds", options.rounds), ("minutes", options.minutes), ("vram", options.vram)):
        if value is not None and not value > 0:
            raise UserError(f"--{name}: expected a number above 0, found {value:g}")
    if (options.base is None) != (options.vram is None):
        raise UserError("--base and --vram: expected both or neither: a config, and the memory it must fit")
    if options.overrides and options.base is None:
        raise UserError(f"{options.overrides[0]}: expected --base, whose config it overrides")
    return options


def settings_of(options: argparse.Namespace) -> tuple[BenchmarkSettings, list[str]]:
    """The settings of a run, and its sections; raises UserError before slow work starts."""
    names = check_peers(options.peers)
    if options.list and options.device.startswith("cuda"):
        device = torch.device(options.device)  # need not be available
    else:
        device = choose_device(options.device)
    if device.type == "mps":
        raise UserError(f"--device: expected cpu or cuda, found {device}")
    precisions = options.precision or (["bf16"] if device.type == "cuda" else list(PRECISIONS))
    if device.type == "cuda" and "bf16" not in precisions:
        raise UserError("--precision: expected bf16 on a GPU, where training always uses it, found fp32")
    more = TINY if options.tiny else {}
    if options.base is None:
        return BenchmarkSettings(device, names, precisions, options.rounds, **more), list(options.sections)
    if device.type != "cuda":
        raise UserError(
            "--vram: expected an NVIDIA GPU to cap, found none; scripts/plan.py counts what fits without a GPU"
        )
    check(load_config(options.base, options.overrides))
    caps = [Cap(options.vram, tuple(options.base), tuple(options.overrides))]
    return BenchmarkSettings(device, names, precisions, options.rounds, caps=caps, **more), ["memory"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print the tables and write the record."""
    options = parse_arguments(arguments)
    settings, sections = settings_of(options)
    device = settings.device
    minutes = GPU_MINUTES if options.minutes is None and device.type == "cuda" else options.minutes
    run = BenchmarkRun(settings, sections, Budget(minutes))
    begin, rows = time.monotonic(), []
    if options.list:
        rows = run.outline()
    else:
        set_up_gpu(exact=False, repeatable=False)
        keep_freed_memory()
        for row in run.rows():
            rows.append(row)
            print(f"{row.section:8} {' | '.join(cell for cell in table_rows([row])[1] if cell)}", flush=True)
    about = {
        "date": None if options.list else date.today().isoformat(), "device": device.type,
        "machine": describe(device) if not options.list else "", "torch": torch.__version__,
        "threads": torch.get_num_threads(), "minutes": round((time.monotonic() - begin) / 60, 2), "peaks": run.peaks,
    }  # fmt: skip
    print(f"\n{about['machine']}; {about['minutes']} minutes")
    for precision, peak in run.peaks.items():
        print(f"fastest matrix product, {precision}: {peak / 1e12:.3g} TFLOP/s")
    print_tables(rows, device.type)
    path = options.out or Path(f"outputs/benchmark-{device.type}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record(rows, about), indent=1) + "\n")
    print(f"written: {path}")


def describe(device: torch.device) -> str:
    """The machine in one line, its GPU first."""
    if device.type != "cuda":
        return describe_machine()
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB; {describe_machine()}"


def print_tables(rows: Sequence[BenchmarkRow], device: str) -> None:
    """The tables of all sections, and the goals."""
    for section in SECTIONS:
        if found := [row for row in rows if row.section == section]:
            headings, *lines = table_rows(found)
            print(f"\n{section}\n\n{markdown_table(headings, lines)}", end="")
    headings, *lines = goal_rows(rows, device)
    print(f"\ngoals\n\n{markdown_table(headings, lines)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
