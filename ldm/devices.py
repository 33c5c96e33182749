"""Which device the networks of a command run on, and in which precision."""

from __future__ import annotations

import re

import torch

from ldm.errors import UserError


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
