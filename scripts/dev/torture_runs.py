"""What scripts/dev/torture.py does to a process: commands run in one, tell where they are, and are killed there."""

from __future__ import annotations

import importlib
import mmap
import multiprocessing
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STARTING, BETWEEN = "starting", "between steps"
# Phase -> where it happens: module, class if it is in one, function. The innermost counts.
PHASES = {
    "main": {
        "step": ("pytorch_lightning.loops.training_epoch_loop", "_TrainingEpochLoop", "advance"),
        "validation": ("pytorch_lightning.loops.evaluation_loop", "_EvaluationLoop", "run"),
        "sampling": ("ldm.callbacks.samples", "VideoLogger", "_log_videos"),
        "checkpoint": ("ldm.callbacks.saving", "AtomicCheckpointIO", "save_checkpoint"),
        "renaming": ("ldm.callbacks.saving", None, "publish"),
        "cutting logs": ("ldm.callbacks.saving", None, "cut_logs"),
    },
    "scripts.prepare": {
        "encoding": ("scripts.prepare", None, "prepare_source"),
        "shards": ("ldm.data.preparing.preparation", "Preparation", "_assemble"),
        "index": ("ldm.data.preparing.preparation", "Preparation", "_commit"),
    },
}
CALLS = ("replace", "link", "unlink", "fsync", "truncate")  # of files: a kill before each of them is a case of its own
# What a session imports sooner or later.
PRELOADED = [
    "main", "scripts.prepare", "ldm.models.diffusion.ddpm", "ldm.callbacks.reports", "ldm.modules.unet",
    "torch._dynamo", "ldm.modules.encoders", "ldm.data.clips", "transformers.models.clip.modeling_clip",
    "torch.utils.tensorboard",
]  # fmt: skip


@dataclass(frozen=True)
class Death:
    """When a process kills itself: in a phase, the n-th time, after seconds or before the n-th change of a file's name.

    Without a phase: so many seconds after it was started.
    """

    phase: str | None
    entry: int = 1
    seconds: float = 0.0
    call: int | None = None


class Board:
    """A page of shared memory: the phase that a process is in. What it held when it died stays."""

    def __init__(self, path: Path, module: str) -> None:
        self.names = [STARTING, BETWEEN, *PHASES[module]]
        if not path.exists():
            path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)

    @property
    def phase(self) -> str:
        return self.names[struct.unpack("q", self._memory[:8])[0]]

    @phase.setter
    def phase(self, name: str) -> None:
        self._memory[:8] = struct.pack("q", self.names.index(name))


class Session:
    """A command of the project in a process of its own, forked from one that has the imports behind it."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, module: str, words: Sequence[str], folder: Path, settings: dict[str, Any]) -> None:
        self.context.set_forkserver_preload(PRELOADED)
        self.board = Board(folder / f"{module}.phase", module)
        self.board.phase = STARTING
        self._arguments = (module, list(words), folder, settings)

    def run(self, death: Death | None = None) -> int:
        """Run to the end, or to death; the exit status, -9 where it was killed."""
        process = self.context.Process(target=_live, args=(*self._arguments, death))
        process.start()
        if death is not None and death.phase is None:
            process.join(death.seconds)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        process.join()
        return process.exitcode


def _live(module: str, words: list[str], folder: Path, settings: dict[str, Any], death: Death | None) -> None:
    with (folder / f"{module}.log").open("ab") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # as main.py's DataLoader workers start
    board = Board(folder / f"{module}.phase", module)
    for phase, (place, owner, name) in PHASES[module].items():
        _watch(board, phase, place, owner, name, death)
    for name, value in settings.items():
        setattr(importlib.import_module(module), name, value)
    errors = importlib.import_module("ldm.errors")
    sys.exit(errors.run_command(lambda: importlib.import_module(module).main(words)))


def _watch(board: Board, phase: str, place: str, owner: str | None, name: str, death: Death | None) -> None:
    """Let a function tell when it is at work, and die in it if that is to be."""
    module = importlib.import_module(place)
    holder = module if owner is None else getattr(module, owner)
    plain = getattr(holder, name)
    entries = 0

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal entries
        entries += 1
        before = BETWEEN if board.phase == STARTING else board.phase
        board.phase = phase
        if death is not None and (death.phase, death.entry) == (phase, entries):
            _die(death)
        try:
            return plain(*arguments, **options)
        finally:
            board.phase = before

    setattr(holder, name, watched)


def _die(death: Death) -> None:
    if death.call is None:
        threading.Thread(target=lambda: (time.sleep(death.seconds), _kill()), daemon=True).start()
        return
    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == death.call:
                _kill()
            return call(*arguments, **options)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
