"""Feed malformed input to the readers of files: only our own errors may come out, and little memory may be taken.

    python scripts/dev/fuzz.py --inputs 100000 --minutes 10
    python scripts/dev/fuzz.py --readers index,config --engine atheris --minutes 5

Inputs are whole files, written by hypothesis: sound ones with bytes changed, cut and repeated, and made-up ones of the
right kind with numbers and names that lie. Each is read in this process, whose memory is bounded; one that ends in
anything but a message, or takes more than 64 MB or 20 seconds, is saved below --save and named, and the exit status
is 1. atheris, which looks for new paths through the code, is used where it is installed and asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase

from ldm.errors import Parser, UserError, run_command

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.dev.fuzz_inputs import READERS, Reader

MOST_BYTES = 64 * 2**20  # that may be taken for one input
ROOM = 4 * 2**30  # of address space beyond what the program itself has
SECONDS = 20  # for one input
BATCH = 500  # inputs between two looks at the clock
SHOWN = 5  # kinds of messages of a reader


@dataclass
class Tally:
    """What came of the inputs of one reader."""

    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: dict[str, Path] = field(default_factory=dict)
    most_bytes: int = 0
    slowest: float = 0.0

    @property
    def inputs(self) -> int:
        """All together."""
        return self.read + sum(self.refused.values())


class TooSlowError(Exception):
    """Raised by the alarm."""


class Trial:
    """Reads one input after the other with one reader and keeps count; what should not be is saved."""

    def __init__(self, reader: Reader, folder: Path, save: Path, traced: bool) -> None:
        self.reader, self.folder, self.save, self.traced = reader, folder, save, traced
        self.tally = Tally()

    def __call__(self, content: bytes) -> None:
        """Read one input."""
        begin, peak = time.monotonic(), 0
        if self.traced:
            tracemalloc.reset_peak()
            peak = tracemalloc.get_traced_memory()[0]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        problem = self._attempt(content)
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if self.traced:
            taken = max(taken, tracemalloc.get_traced_memory()[1] - peak)
        self.tally.most_bytes = max(self.tally.most_bytes, taken)
        self.tally.slowest = max(self.tally.slowest, time.monotonic() - begin)
        if problem is None and taken > MOST_BYTES:
            problem = f"took {taken:,} bytes"
        if problem is not None:
            self._keep(content, problem)

    def _attempt(self, content: bytes) -> str | None:
        """What went wrong; None where it was read or refused with a message."""
        try:
            with alarm(SECONDS):
                self.reader.read(content, self.folder)
        except UserError as error:
            self.tally.refused[kind(str(error), self.folder)] += 1
            return None
        except (Exception, RecursionError) as error:  # whatever comes out is what is looked for
            self.tally.read += 1
            return f"{type(error).__name__}: {str(error)[:120]}"
        self.tally.read += 1
        return None

    def _keep(self, content: bytes, problem: str) -> None:
        name = problem.partition(":")[0]
        if name not in self.tally.failed:
            self.save.mkdir(parents=True, exist_ok=True)
            path = self.save / f"{self.reader.name}-{hashlib.sha256(content).hexdigest()[:12]}.bin"
            path.write_bytes(content)
            self.tally.failed[name] = path
            print(f"  {self.reader.name}: {problem} ({path})", flush=True)


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise TooSlowError in the block when it takes longer."""

    def ring(number: int, frame: object) -> None:
        raise TooSlowError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def kind(message: str, folder: Path) -> str:
    """A message without what differs from input to input, to count kinds of messages."""
    words = message.replace(str(folder), "").split("found")[0]
    return "".join(letter for letter in words if not letter.isdigit())[:60].strip()


def by_hypothesis(trial: Trial, num: int, deadline: float, seed: int) -> None:
    """At most `num` inputs from the reader's strategy, until the deadline."""
    done = 0
    while done < num and time.monotonic() < deadline:
        batch = min(BATCH, num - done)

        @hypothesis.seed(seed + done)
        @hypothesis.settings(
            max_examples=batch, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @hypothesis.given(trial.reader.inputs)
        def attempt(content: bytes) -> None:
            if time.monotonic() < deadline:
                trial(content)

        before = trial.tally.inputs
        attempt()
        done += max(1, trial.tally.inputs - before)


def by_atheris(trial: Trial, num: int, deadline: float, seed: int) -> None:
    """The same from atheris; it ends the process and therefore runs in one of its own."""
    import atheris  # noqa: PLC0415 - an extra, and for few machines

    seconds = max(1, int(deadline - time.monotonic()))
    corpus = trial.folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(trial.reader.samples()):
        (corpus / str(number)).write_bytes(content)
    for function in functions_of("ldm"):
        atheris.instrument_func(function)
    begin = time.monotonic()

    def attempt(content: bytes) -> None:
        trial(content)
        if trial.tally.inputs >= num or time.monotonic() > deadline:
            print(report(trial.reader.name, trial.tally, time.monotonic() - begin))
            print(f"{trial.tally.inputs:,} inputs, {len(trial.tally.failed)} kinds of failures", flush=True)
            shutil.rmtree(trial.folder)
            os._exit(bool(trial.tally.failed))

    words = ["fuzz", f"-max_total_time={seconds + SECONDS}", f"-seed={seed + 1}", "-max_len=65536", "-verbosity=0"]
    atheris.Setup([*words, str(corpus)], attempt)
    atheris.Fuzz()


def functions_of(package: str) -> Iterator[types.FunctionType]:
    """All functions and methods of the modules of a package that are loaded."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        places = [vars(sys.modules[name])]
        places += [vars(value) for value in places[0].values() if isinstance(value, type) and value.__module__ == name]
        for place in places:
            for value in list(place.values()):
                if isinstance(value, types.FunctionType) and value.__module__ == name:
                    yield value


ENGINES: Mapping[str, Callable[[Trial, int, float, int], None]] = {"hypothesis": by_hypothesis, "atheris": by_atheris}


def bound_memory() -> None:
    """No allocation beyond `ROOM`: a declared size that is believed ends in a MemoryError, not in a full machine."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + ROOM
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, metavar="N", help="all together (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="all together (default: %(default)s)")
    parser.add_argument("--readers", default=",".join(READERS), metavar="A,B,...", help="default: %(default)s")
    parser.add_argument("--engine", choices=ENGINES, default="hypothesis", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--save", type=Path, default=Path("outputs/fuzz"), help="for inputs that fail: %(default)s")
    parser.add_argument("--traced", action="store_true", help="measure Python's own memory too: several times slower")
    options = parser.parse_args(arguments)
    options.readers = options.readers.split(",")
    if odd := [name for name in options.readers if name not in READERS]:
        raise UserError(f"--readers: expected some of {', '.join(READERS)}, found {odd[0]!r}")
    if options.inputs < 1 or options.minutes <= 0:
        raise UserError("--inputs and --minutes: expected at least 1 and more than 0")
    if options.engine == "atheris" and len(options.readers) != 1:
        raise UserError("--engine atheris: expected one of --readers, found several; atheris ends the process")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Fuzz the readers and print what came of it; raises UserError where an input failed."""
    options = parse_arguments(arguments)
    bound_memory()
    if options.traced:
        tracemalloc.start()
    tallies = {}
    for place, name in enumerate(options.readers):
        left = len(options.readers) - place
        spent = sum(tally.inputs for tally in tallies.values())
        if not tallies:
            end = time.monotonic() + 60 * options.minutes
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(READERS[name], Path(folder), options.save, options.traced)
            trial.reader.read(next(iter(trial.reader.samples())), Path(folder))  # imports and caches
            now = time.monotonic()
            ENGINES[options.engine](trial, (options.inputs - spent) // left, now + (end - now) / left, options.seed)
        tallies[name] = trial.tally
        print(report(name, trial.tally, time.monotonic() - now), flush=True)
    total, failed = (sum(counts) for counts in zip(*((t.inputs, len(t.failed)) for t in tallies.values()), strict=True))
    print(f"{total:,} inputs, {failed} kinds of failures")
    if failed:
        raise UserError(f"{failed} kinds of inputs ended in something else than a message; they are in {options.save}")


def report(name: str, tally: Tally, seconds: float) -> str:
    """A line for a reader, and its most frequent messages."""
    refused = sum(tally.refused.values())
    first = (
        f"{name}: {tally.inputs:,} inputs in {seconds:.0f} s, {refused:,} refused in {len(tally.refused)} ways, "
        f"{tally.inputs - refused:,} read; at most {tally.most_bytes / 2**20:.1f} MB and {tally.slowest:.2f} s for one"
    )
    return "\n".join([first, *(f"  {count:>7,}  {words}" for words, count in tally.refused.most_common(SHOWN))])


if __name__ == "__main__":
    sys.exit(run_command(main))
