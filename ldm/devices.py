"""Device, precision, GPU settings and memory of the process of a command."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch

from ldm.errors import UserError

# glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD, in bytes
_MALLOC = ((-3, 32 * 2**20), (-1, 2**31 - 1), (-2, 64 * 2**20))


def choose_device(name: str) -> torch.device:
    """The device `name`, "auto" for the best one. Raises `UserError` if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):  # torch accepts others, such as "meta"
            raise RuntimeError("there is no such device")
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: expected cpu or a device this machine has, found {name!r} ({reason})") from error
    return device


def choose_precision(given: str | None, device: torch.device) -> str:
    """`given`, or bf16 on a GPU that has it and full elsewhere."""
    if given is not None:
        return given
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "full"


def set_up_gpu(exact: bool, repeatable: bool) -> None:
    """Set float32 precision and the choice of cuDNN algorithms for the process; without a GPU nothing changes.

    exact: float32 products and convolutions in float32; False: in TF32 (10 bits of fraction instead of 23), at several
        times the speed. Commands set it for full precision; in bf16 or fp16 the remaining float32 uses TF32.
    repeatable: deterministic algorithms; False: the fastest, measured for each new input size.
    """
    if not torch.cuda.is_available():
        return
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.deterministic = repeatable
    torch.backends.cudnn.benchmark = not repeatable


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next step instead of returning it; returns whether that was set.

    The kernel clears every page that it hands out again. Blocks of up to 32 MiB, glibc's maximum, are then taken from
    memory that the process keeps. Allocator settings in the environment take precedence.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library has another allocator
        return False
    return all(mallopt(option, value) for option, value in _MALLOC)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated by PyTorch on a GPU, resident memory of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss includes the peak of the parent process
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii", errors="replace"))[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
