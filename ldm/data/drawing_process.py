"""Clips of the drawn world out of processes of their own, so that drawing keeps all cores busy.

A process reads what to draw from its standard input and writes the clips to its standard output, pickled; it ends with
its input, also when the one that started it was killed. Pipes are short, so none gets further ahead than one clip.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from ldm.data.drive_world import WorldClip, draw_clip

PACKAGES = Path(__file__).parents[2]


def draw_clips(requests: Sequence[tuple[Any, ...]], processes: int) -> Iterator[WorldClip]:
    """One clip for each request, the arguments of `draw_clip`, in their order."""
    processes = min(processes, len(requests))
    with ExitStack() as at_end:
        workers = [_start(at_end) for _ in range(processes)]
        for worker in workers:
            _ask(worker, requests, workers.index(worker))
        for number in range(len(requests)):
            worker = workers[number % processes]
            clip = pickle.load(worker.stdout)
            _ask(worker, requests, number + processes)
            yield clip


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Draw what is asked for until there is no more, or nobody who wants it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the one who started this ends it
    while True:
        try:
            request = pickle.load(requests)
            pickle.dump(draw_clip(*request), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except (EOFError, BrokenPipeError):
            os._exit(0)  # without writing what is left to a pipe that nobody reads


def _start(at_end: ExitStack) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, (str(PACKAGES), os.environ.get("PYTHONPATH"))))
    worker = subprocess.Popen(
        [sys.executable, "-m", "ldm.data.drawing_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    at_end.callback(worker.wait)
    at_end.callback(worker.kill)
    at_end.callback(worker.stdout.close)
    at_end.callback(worker.stdin.close)
    return worker


def _ask(worker: subprocess.Popen, requests: Sequence[tuple[Any, ...]], number: int) -> None:
    if number < len(requests):
        pickle.dump(requests[number], worker.stdin)
        worker.stdin.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
