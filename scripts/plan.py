"""Does it fit? Count what a training step takes, without a GPU and before anything is trained.

    python scripts/plan.py --base configs/video-sd.yaml
    python scripts/plan.py --base configs/video-sd.yaml --vram 8 data.params.frames=16
    python scripts/plan.py --base configs/video-sd.yaml --processes 8,64,512

One step of the config - forward, backward, optimiser - is taken on tensors without values, and every byte is followed:
the peak of memory and the layer where it occurs, the number of operations, and the least time. With --vram the gentlest
switches that make it fit are searched and printed, as overrides and as YAML to paste. At the size of Stable Diffusion a
count takes a quarter of a minute of one core, with `feed_forward_frames` and many frames a minute or two; a search
makes up to a dozen counts. With --processes, what so many processes read, send and save is computed from the count of
one (docs/scaling.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ldm.config import check, load_config, to_container
from ldm.errors import Parser, UserError, run_command
from ldm.planning.count import CPU, GPU, StepCount, StepShape, count_step, latent_size, shape_of
from ldm.planning.proposals import check_switches, needed, propose
from ldm.planning.report import GPUS, proposal_lines, table
from ldm.planning.scaling import Machines, scaling_lines
from ldm.video import parse_size

MACHINES = {"gpu": GPU, "cpu": CPU, "card": GPU, "processor": CPU}  # the last two: names in older commands


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `.overrides` are its key=value arguments."""
    parser = Parser(prog="plan.py", description="Count what a training step takes, and what would make it fit.")
    parser.add_argument("-b", "--base", nargs="+", required=True, metavar="YAML", help="configs, merged in turn")
    parser.add_argument("--vram", type=float, metavar="GB", help="memory of the GPU: propose switches that make it fit")
    parser.add_argument("--size", help="side, or HEIGHTxWIDTH, in pixels (default: prepare.size, or 512)")
    parser.add_argument("--on", choices=MACHINES, default="gpu", metavar="{gpu,cpu}", help="where the run would be")
    parser.add_argument("--processes", metavar="N,N,...", help="numbers of processes: what they read, send and save")
    names = [gpu.name for gpu in GPUS]
    parser.add_argument("--gpu", "--card", choices=names, help="of each process (default: H100)")
    parser.add_argument("--link", type=float, metavar="GB/S", help="of each GPU to the others (50)")
    parser.add_argument("--disk", type=float, metavar="GB/S", help="for checkpoints (2)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any value of the config")
    options = parser.parse_args(arguments)
    options.overrides += [argument for argument in options.base if "=" in argument]
    options.base = [argument for argument in options.base if "=" not in argument]
    options.on = MACHINES[options.on]
    if options.vram is not None and not options.vram > 0:
        raise UserError(f"--vram: expected the memory of a GPU in GB, found {options.vram:g}")
    if options.vram is not None and options.on != GPU:
        raise UserError("--vram and --on cpu exclude each other: --vram is the memory of a GPU; leave out one")
    if options.processes is not None:
        numbers = options.processes.split(",")
        if not all(number.isdecimal() and int(number) for number in numbers) or options.on != GPU:
            raise UserError(f"--processes: expected numbers from 1, as 8,64,512, on GPUs, found {options.processes!r}")
        options.processes = [int(number) for number in numbers]
    for name, default in (("gpu", "H100"), ("link", 50.0), ("disk", 2.0)):
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.processes is None:
            print(f"note: --{name} has no effect without --processes")
    for name in ("link", "disk"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError(f"--{name}: expected GB a second above 0, found {getattr(options, name):g}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, and with --vram search."""
    options = parse_arguments(arguments)
    config = load_config(options.base, options.overrides)
    check(config)
    config = to_container(config)
    check_switches(config)
    size = options.size and parse_size(options.size, "--size")
    shape, origin = shape_of(config, size), latent_size(config, size)[2]
    counter = CachedCount(shape, options.on)
    count = counter(config)
    print(f"{' + '.join([*options.base, *options.overrides])}: a step of {shape}, on a {options.on}")
    print(f"latents {origin}")
    print(f"counted on tensors without values, in {counter.seconds:.0f} s of one core; nothing was measured\n")
    print("\n".join(table(count, options.on)))
    if options.processes is not None:
        gpu = next(gpu for gpu in GPUS if gpu.name == options.gpu)
        machines = Machines(gpu, options.link, options.disk)
        print("\n".join(["", *scaling_lines(config, counter, options.processes, machines)]))
    if options.vram is None:
        return
    print()
    if needed(count) <= options.vram:
        print(f"fits into {options.vram:g} GB as it is, with {options.vram - needed(count):.1f} GB to spare")
        return
    print(f"does not fit into {options.vram:g} GB: {needed(count):.1f} are needed")
    proposal = propose(config, options.vram, counter)
    print("\n".join([*proposal_lines(proposal, options.base, options.overrides), ""]))
    print(f"then ({counter.num} counts, {counter.seconds:.0f} s):\n")
    print("\n".join(table(proposal.count, options.on)))


class CachedCount:
    """Counts configs of one step shape, each once, with a status line."""

    def __init__(self, shape: StepShape, machine: str) -> None:
        self.shape, self.machine = shape, machine
        self.num = 0
        self.seconds = 0.0
        self._found: list[tuple[dict[str, Any], StepCount]] = []

    def __call__(self, config: dict[str, Any]) -> StepCount:
        for known, count in self._found:
            if known == config:
                return count
        self.num += 1
        start = time.process_time()
        with Console(stderr=True).status(f"counting (number {self.num})"):
            count = count_step(config, self.shape, self.machine)
        self.seconds += time.process_time() - start
        self._found.append((config, count))
        return count


if __name__ == "__main__":
    sys.exit(run_command(main))
