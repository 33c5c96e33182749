"""Measurements in a process of their own: `python -m scripts.dev.benchmarking.child REQUEST`, request and answer JSON.

Its memory is measured alone and, on a GPU, can be capped. Errors come back as one line, never as a traceback.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch

from ldm.devices import peak_memory
from ldm.errors import UserError, is_lack_of_memory
from scripts.dev.benchmarking.contestants import Case
from scripts.dev.benchmarking.steps import TrainingStep
from scripts.dev.benchmarking.timing import wait_for

MARK = "RESULT "
CONTEXT_BYTES = 6 * 2**29 // 5  # 0.6 GiB that CUDA itself takes beside torch's allocations


def ask_child(request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The answer of a new process to a request, or a one-line `error` in its place."""
    command = [sys.executable, "-m", "scripts.dev.benchmarking.child", json.dumps(request)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=max(1, timeout))
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout:.0f} seconds"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"error": f"ended with status {done.returncode}: {last}"}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request with a `contestant`, or with the `base` of a config."""
    device = torch.device(request["device"])
    try:
        if device.type == "cuda":
            cap_memory(request.get("cap"), device)
        if "contestant" in request:
            found = {}
            case = Case(**{**request["case"], "widths": tuple(request["case"]["widths"])})
            step = TrainingStep(request["contestant"], case, device)
            for _ in range(request["steps"]):
                step()
            wait_for(device)
        else:
            from scripts.dev.benchmarking.steps import take_steps  # noqa: PLC0415 - Lightning takes seconds to import

            found = take_steps(request, device)
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        return {"error": "out of memory", "is_out_of_memory": True, "peak_bytes": peak_memory(device)}
    return {**found, "peak_bytes": peak_memory(device)}


def cap_memory(cap: float | None, device: torch.device) -> None:
    """Limit torch to the memory of a GPU of `cap` GB, less the CUDA context; None: no cap."""
    if cap is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (cap * 2**30 - CONTEXT_BYTES) / total), device)


if __name__ == "__main__":
    begin = time.monotonic()
    result = answer(json.loads(sys.argv[1]))
    sys.stdout.write(f"{MARK}{json.dumps({**result, 'wall_seconds': time.monotonic() - begin})}\n")
