"""Which device the networks of a command run on, in which precision, and how its libraries are set."""

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
    """The device called `name`, which must be there; "auto" takes the best."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):  # torch knows others, such as "meta"
            raise RuntimeError("there is no such device")
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: expected cpu or a device this machine has, found {name!r} ({reason})") from error
    return device


def choose_precision(given: str | None, device: torch.device) -> str:
    """What was given, or what suits the device."""
    if given is not None:
        return given
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "full"


def set_up_gpu(exact: bool, repeatable: bool) -> None:
    """Choose what torch leaves open on NVIDIA cards, for the whole process; elsewhere it changes nothing.

    exact: products and convolutions of float32 numbers are computed in float32. If not, in TF32, whose factors have 10
        bits of fraction instead of 23, at several times the speed. Who asks for full precision gets it; where bfloat16
        or float16 is asked for, what is left in float32 takes TF32.
    repeatable: cuDNN takes algorithms that give the same bits again. If not, it tries several for each size it meets
        and keeps the fastest: training has few sizes.
    """
    if not torch.cuda.is_available():
        return
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.deterministic = repeatable
    torch.backends.cudnn.benchmark = not repeatable


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees instead of giving it back; whether that could be arranged.

    Every step of a network frees what it takes and takes it again; given back, each page is cleared by the system
    before it comes again. With glibc, blocks of up to 32 MiB, the most it allows, are then cut from memory that stays.
    Where the environment says how glibc is to go about it, that holds.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library has another allocator
        return False
    return all(mallopt(option, value) for option, value in _MALLOC)


def peak_memory(device: torch.device) -> int:
    """Most bytes ever in use: by PyTorch on a card, resident of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # the kernel's other number begins with what the process had that started this one
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii", errors="replace"))[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
