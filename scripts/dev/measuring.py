"""Commands run as processes of their own, with the time and the memory they took, and what machine they ran on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

NOTEWORTHY_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Measured:
    """How a command ended and what it took.

    status: 0 if it went well, minus the number of the signal that ended it.
    peak_memory: the most bytes resident at once in it, or in the largest of the processes it started, as the kernel
        counts them: with pages of mapped files, which it drops when it needs room.
    peak_own_memory: the most that it and all processes it started held at once, without those pages and with shared
        pages counted once, looked at twice a second or, where that is slow, less; None where that cannot be seen.
    output: what it wrote to stdout and stderr.
    """

    status: int
    seconds: float
    peak_memory: int
    peak_own_memory: int | None
    output: str


def run_measured(command: Sequence[str | Path], show: Callable[[str], None]) -> Measured:
    """Run a command to its end, giving each line it writes to `show`; whatever stops us stops it and its children."""
    start = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    memory = _OwnMemory(process.pid)
    lines = []
    try:
        memory.start()
        for line in process.stdout:
            lines.append(line)
            show(line.rstrip("\n"))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        memory.end.set()
        process.stdout.close()
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory.join()
    return Measured(process.returncode, time.monotonic() - start, peak, memory.peak, "".join(lines))


def describe_machine() -> str:
    """Processor, cores, instructions that matter, memory, and the version of torch, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = _processor_facts()
    name = facts.get("model name", "processor of unknown name")
    flags = [flag for flag in NOTEWORTHY_FLAGS if flag in (facts.get("flags") or facts.get("Features", "")).split()]
    return (
        f"{name}, {cores} cores ({', '.join(flags) or 'no vector instructions known'}), {memory / 2**30:.1f} GiB of "
        f"memory, torch {torch.__version__} with {torch.get_num_threads()} threads"
    )


class _OwnMemory(threading.Thread):
    """Watches how much memory the processes of a session have taken for themselves (Linux)."""

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self.end = threading.Event()
        self.peak: int | None = None
        self._session = session

    def run(self) -> None:
        pause = POLL_SECONDS
        while not self.end.wait(pause):
            start = time.monotonic()
            sizes = [size for folder in Path("/proc").glob("[0-9]*") if (size := self._size(folder)) is not None]
            if sizes:
                self.peak = max(self.peak or 0, sum(sizes))
            pause = max(POLL_SECONDS, 20 * (time.monotonic() - start))  # a look at a large process takes time, its own

    def _size(self, process: Path) -> int | None:
        """Bytes of one process, its share of what it shares; None for another session's and for one that has ended."""
        try:
            if os.getsid(int(process.name)) != self._session:
                return None
            lines = (process / "smaps_rollup").read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


def _processor_facts() -> dict[str, str]:
    """What Linux says of the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
