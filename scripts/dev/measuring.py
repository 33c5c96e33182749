"""Time and memory of a command in its own process, and a description of the machine."""

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
    """The result of a command.

    status: 0 for success, or minus the number of the signal that ended it.
    peak_memory: peak resident bytes of the command, or of its largest child process, by the kernel's count: including
        pages of mapped files, which the kernel drops when it needs memory.
    peak_own_memory: peak bytes of the command and all its children together, without mapped files and with shared
        pages counted once, sampled up to twice per second; None where /proc does not show it.
    output: stdout and stderr.
    """

    status: int
    seconds: float
    peak_memory: int
    peak_own_memory: int | None
    output: str


def run_measured(command: Sequence[str | Path], show: Callable[[str], None]) -> Measured:
    """Run a command and pass each line of its output to `show`; an interrupt here ends it with its children."""
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
    """CPU, cores, vector instructions, memory and version of torch in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = _cpu_facts()
    name = facts.get("model name", "unknown CPU")
    flags = [flag for flag in NOTEWORTHY_FLAGS if flag in (facts.get("flags") or facts.get("Features", "")).split()]
    return (
        f"{name}, {cores} cores ({', '.join(flags) or 'no vector instructions known'}), {memory / 2**30:.1f} GiB of "
        f"memory, torch {torch.__version__} with {torch.get_num_threads()} threads"
    )


class _OwnMemory(threading.Thread):
    """Samples the private memory of all processes of a session (Linux)."""

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
            pause = max(
                POLL_SECONDS, 20 * (time.monotonic() - start)
            )  # reading a large process is slow and uses its time

    def _size(self, process: Path) -> int | None:
        """Proportional private bytes of one process; None for another session's or an ended one."""
        try:
            if os.getsid(int(process.name)) != self._session:
                return None
            lines = (process / "smaps_rollup").read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


def _cpu_facts() -> dict[str, str]:
    """Linux' entries for the first CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
