"""Preparing videos on a Ray cluster.

Each worker holds the encoders, runs `prepare_source` into its own temporary folder and returns the finished part
through Ray's object store; only the driver writes the prepared folder. Videos of a lost worker or node go to another
worker. Every node must see the videos under the same paths.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from omegaconf import OmegaConf
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from ldm.config.schema import trusting
from ldm.data.preparing.footage import FootageError
from ldm.data.preparing.parts import EncodingSettings, PartFolder, VideoReport
from ldm.data.preparing.preparation import Preparation
from ldm.data.preparing.sources import Encoders, Source, identities, prepare_source
from ldm.errors import UserError

log = logging.getLogger(__name__)
PIECE = 2**26  # bytes of a part per object in the object store
TRIES = 3  # attempts at a video whose worker dies, and at starting workers
GIVE_UP_AFTER = 600.0  # seconds without any worker
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class WorkerOptions:
    """Arguments of every worker: the config's content, the encoding settings, whether the config is trusted, CPUs."""

    config: dict[str, Any]
    settings: EncodingSettings
    is_trusted: bool
    num_cpus: int


@dataclass(frozen=True)
class RemotePart:
    """A prepared video: its note, and references to the pieces of its tar in the object store."""

    note: str
    pieces: list[ray.ObjectRef]


class VideoWorker:
    """The Ray actor: one process on one GPU, or on a few CPU cores, that keeps its encoders between videos."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options

    def begin(self) -> str:
        """Build the encoders; returns the node's id. Raises UserError if their weights are not the driver's."""
        options = self._options
        torch.set_num_threads(options.num_cpus)
        config = OmegaConf.create(options.config)
        with trusting(options.is_trusted):
            if identities(config) != (options.settings.first_stage, options.settings.text_encoder):
                raise UserError(
                    f"the encoders' weights on the node {ray.util.get_node_ip_address()} are not those of the driver: "
                    "expected the same files under the same paths; copy them there"
                )
            self._encoders = Encoders(config)
        self._folder = tempfile.TemporaryDirectory(prefix="preparing-")
        return ray.get_runtime_context().get_node_id()

    def check_captions(self, captions: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """The embedding of the empty prompt, float16 `n d`, and `Encoders.cut_captions`."""
        return self._encoders.context(""), self._encoders.cut_captions(captions)

    def prepare(self, source: Source) -> RemotePart | str:
        """A part, or the reason why the video cannot be prepared."""
        folder = PartFolder(Path(self._folder.name), self._options.settings)
        try:
            prepare_source(source, folder, self._encoders, lambda count: None)
        except FootageError as error:
            return str(error)
        tar, note = (folder.folder / f"{source.sha256}.{kind}" for kind in ("tar", "json"))
        pieces = []
        with tar.open("rb") as file:
            while piece := file.read(PIECE):
                pieces.append(ray.put(piece))
        part = RemotePart(note.read_text(), pieces)
        tar.unlink()
        note.unlink()
        return part


@dataclass(eq=False)
class VideoTask:
    """A video to prepare, its failures so far, and the reason of the last one."""

    source: Source
    failures: int = 0
    reason: str = ""


@dataclass(eq=False)
class Worker:
    """A worker as the driver sees it; node: None until it has started. task: the video it prepares now."""

    actor: Any
    node: str | None = None
    task: VideoTask | None = None


class WorkerPool:
    """As many workers as the cluster has room for, and the videos given to them.

    address: of a Ray cluster, host:port or "auto"; None starts Ray on this machine for this process alone.
    """

    def __init__(self, options: WorkerOptions, address: str | None = None) -> None:
        self._options = options
        self._busy: dict[ray.ObjectRef, Worker] = {}  # by the call that they run
        self._idle: list[Worker] = []
        self._failed_starts, self._seen_alive = 0, time.monotonic()
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _connect(address)

    def close(self) -> None:
        """Stop all workers, and Ray if it was started here."""
        for worker in [*self._busy.values(), *self._idle]:
            _kill(worker)
        if self._owns_ray:
            ray.shutdown()

    def check_captions(self, captions: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """`VideoWorker.check_captions`, by the first worker that survives it."""
        while True:
            while not self._idle:
                self._start_workers(1)
                self._collect(deque())
            worker = self._idle.pop()
            try:
                answer = ray.get(worker.actor.check_captions.remote(list(captions)))
            except RayActorError:
                continue
            self._idle.append(worker)
            return answer

    def prepare(
        self, sources: Sequence[Source], preparation: Preparation
    ) -> Iterator[tuple[Source, VideoReport | None, str]]:
        """Each source with its report once the preparation has it, or with None and the reason of the failure."""
        waiting = deque(VideoTask(source) for source in sources)
        num_left = len(waiting)
        while num_left:
            self._start_workers(num_left)
            while waiting and self._idle:
                worker = self._idle.pop()
                worker.task = waiting.popleft()
                self._busy[worker.actor.prepare.remote(worker.task.source)] = worker
            for task, answer in self._collect(waiting):
                report, reason = None, task.reason
                if isinstance(answer, RemotePart):
                    try:
                        report = preparation.adopt(answer.note, (ray.get(piece) for piece in answer.pieces))
                    except RayError as error:  # the node that held the pieces is gone
                        log.info("%s: its part was lost (%s); again", task.source.name, type(error).__name__)
                        waiting.append(task)
                        continue
                elif isinstance(answer, str):
                    reason = answer
                num_left -= 1
                yield task.source, report, reason

    def _start_workers(self, num_wanted: int) -> None:
        """Start workers up to `num_wanted`, as far as the cluster has room; raises UserError after `GIVE_UP_AFTER`."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_gpus = int(sum(resources.get("GPU", 0) for resources in nodes))
        room = num_gpus or sum(int(resources.get("CPU", 0)) // self._options.num_cpus for resources in nodes)
        for _ in range(len(self._busy) + len(self._idle), min(room, num_wanted)):
            options = {"num_cpus": self._options.num_cpus, "num_gpus": 1 if num_gpus else 0, "max_restarts": 0}
            actor = ray.remote(VideoWorker).options(**options, scheduling_strategy="SPREAD").remote(self._options)
            self._busy[actor.begin.remote()] = Worker(actor)
        if self._idle or any(worker.node for worker in self._busy.values()):
            self._seen_alive = time.monotonic()
        elif time.monotonic() - self._seen_alive > GIVE_UP_AFTER:
            raise UserError(
                f"--engine ray: expected a worker within {GIVE_UP_AFTER:.0f} s, found none; the cluster has {num_gpus} "
                f"GPUs and {sum(int(resources.get('CPU', 0)) for resources in nodes)} CPUs, a worker asks for "
                f"{self._options.num_cpus} CPUs (--worker-cpus): see `ray status`, and run the same command again"
            )

    def _collect(self, waiting: deque[VideoTask]) -> list[tuple[VideoTask, RemotePart | str | None]]:
        """Wait up to `POLL_SECONDS` for answers; tasks of lost workers wait again, or come with None after `TRIES`."""
        if not self._busy:
            time.sleep(POLL_SECONDS)
            return []
        answers = []
        for ref in ray.wait(list(self._busy), timeout=POLL_SECONDS)[0]:
            worker = self._busy.pop(ref)
            task, worker.task = worker.task, None
            try:
                answer = ray.get(ref)
            except RayError as error:
                _kill(worker)
                if task is None:
                    self._count_failed_start(error)
                elif self._is_given_up(task, worker, error):
                    answers.append((task, None))
                else:
                    waiting.append(task)
                continue
            if task is None:
                worker.node, self._failed_starts = answer, 0
            else:
                answers.append((task, answer))
            self._idle.append(worker)
        return answers

    def _count_failed_start(self, error: RayError) -> None:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            raise UserError(f"--engine ray: {cause}") from error
        self._failed_starts += not isinstance(error, RayActorError) or not _is_node_lost(error)
        if self._failed_starts >= TRIES:
            raise UserError(
                f"--engine ray: no worker can start, the last of {TRIES} ended with: {_last_line(error)}; see "
                "the cluster's logs"
            ) from error

    def _is_given_up(self, task: VideoTask, worker: Worker, error: RayError) -> bool:
        """Count a failure of a video, unless the node was lost with everything on it."""
        if isinstance(error, RayTaskError):
            task.reason = f"preparing it failed {TRIES} times, the last time with: {_last_line(error)}"
        else:
            task.reason = f"its worker died {TRIES} times; it may crash ffmpeg or need more memory than there is"
        if not _is_node_lost(error) and _is_alive(worker.node):
            task.failures += 1
        log.info("%s: %s; %d of %d", task.source.name, _last_line(error), task.failures, TRIES)
        return task.failures >= TRIES


def _connect(address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send nothing
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **options)
        else:
            ray.init(address, **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError, GetTimeoutError) as error:
        raise UserError(
            f"--address {address}: expected a Ray cluster there, as host:port, found none ({_last_line(error)}); "
            "start one with `ray start --head`, or leave --address out"
        ) from error


def _kill(worker: Worker) -> None:
    with suppress(RayError, ValueError):
        ray.kill(worker.actor)


def _is_alive(node: str | None) -> bool:
    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())


def _is_node_lost(error: RayError) -> bool:
    return "node has died" in str(error) or "node died" in str(error) or "node was terminated" in str(error)


def _last_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[-1]}"[:200]
