"""Videos prepared by the workers of a Ray cluster, each with encoders of its own, whatever becomes of them.

A worker runs what the local loop runs for one video, `prepare_source`, into a folder of its own, and hands the part
over through Ray's object store, so that only the process that leads needs to see the prepared folder. Workers and nodes
may vanish at any moment: their videos go to others. Every node has to see the videos under the same paths.
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
PIECE = 2**26  # bytes of a part that go through the object store at a time
TRIES = 3  # of a video that its worker does not survive, and of workers that cannot start
GIVE_UP_AFTER = 600.0  # seconds without any worker
LOOK_AGAIN = 2.0  # seconds between looks at what the cluster has


@dataclass(frozen=True)
class Work:
    """What all workers are told: the config's content, what all scenes have in common, and their share of a machine."""

    config: dict[str, Any]
    settings: EncodingSettings
    is_trusted: bool
    num_cpus: int


@dataclass(frozen=True)
class Part:
    """A prepared video: its note, and its tar in pieces in the object store."""

    note: str
    pieces: list[ray.ObjectRef]


class VideoWorker:
    """One process on one GPU, or on a few cores, that keeps its encoders from video to video."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def begin(self) -> str:
        """Build the encoders; returns the node this runs on. Raises UserError where they are not the leader's."""
        work = self._work
        torch.set_num_threads(work.num_cpus)
        config = OmegaConf.create(work.config)
        with trusting(work.is_trusted):
            found = identities(config)
            if found != (work.settings.first_stage, work.settings.text_encoder):
                raise UserError(
                    f"the encoders' weights on the node {ray.util.get_node_ip_address()} are not those of the machine "
                    "that leads: expected the same files under the same paths; copy them there"
                )
            self._encoders = Encoders(config)
        self._folder = tempfile.TemporaryDirectory(prefix="preparing-")
        return ray.get_runtime_context().get_node_id()

    def words(self, captions: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """The embedding of the empty prompt, float16 `n d`, and what is cut of captions that are too long."""
        lost = {caption: self._encoders.text_encoder.truncated(caption) for caption in captions}
        return self._encoders.context(""), {caption: end for caption, end in lost.items() if end}

    def prepare(self, source: Source) -> Part | str:
        """A part, or why there is none."""
        folder = PartFolder(Path(self._folder.name), self._work.settings)
        try:
            prepare_source(source, folder, self._encoders, lambda count: None)
        except FootageError as error:
            return str(error)
        tar, note = (folder.folder / f"{source.sha256}.{kind}" for kind in ("tar", "json"))
        pieces = []
        with tar.open("rb") as file:
            while piece := file.read(PIECE):
                pieces.append(ray.put(piece))
        part = Part(note.read_text(), pieces)
        tar.unlink()
        note.unlink()
        return part


@dataclass(eq=False)
class Job:
    """A video on its way."""

    source: Source
    failures: int = 0
    reason: str = ""


@dataclass(eq=False)
class Hand:
    """A worker as the leading process knows it; `node` is known once it has begun."""

    actor: Any
    node: str | None = None
    job: Job | None = None


class Workshop:
    """All workers that a cluster has room for, and the videos they are given.

    address: of a Ray cluster, host:port or "auto"; None starts Ray on this machine, for this process alone.
    """

    def __init__(self, work: Work, address: str | None = None) -> None:
        self._work = work
        self._hands: dict[ray.ObjectRef, Hand] = {}  # by what they are at
        self._idle: list[Hand] = []
        self._failed_starts, self._seen_alive = 0, time.monotonic()
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _connect(address)

    def close(self) -> None:
        """Let all workers go."""
        for hand in [*self._hands.values(), *self._idle]:
            _end(hand)
        if self._is_ours:
            ray.shutdown()

    def words(self, captions: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """What `VideoWorker.words` says, from the first worker that lives long enough."""
        while True:
            while not self._idle:
                self._hire(1)
                self._look([])
            hand = self._idle.pop()
            try:
                answer = ray.get(hand.actor.words.remote(list(captions)))
            except RayActorError:
                continue
            self._idle.append(hand)
            return answer

    def prepare(
        self, sources: Sequence[Source], preparation: Preparation
    ) -> Iterator[tuple[Source, VideoReport | None, str]]:
        """Each source with its report once it is in the preparation, or with None and why it cannot be prepared."""
        waiting = deque(Job(source) for source in sources)
        num_left = len(waiting)
        while num_left:
            self._hire(num_left)
            while waiting and self._idle:
                self._give(self._idle.pop(), waiting.popleft())
            for job, answer in self._look(waiting):
                report, reason = None, job.reason
                if isinstance(answer, Part):
                    try:
                        report = preparation.adopt(answer.note, (ray.get(piece) for piece in answer.pieces))
                    except RayError as error:  # the node that held the pieces is gone
                        log.info("%s: lost on its way (%s); again", job.source.name, type(error).__name__)
                        waiting.append(job)
                        continue
                elif isinstance(answer, str):
                    reason = answer
                num_left -= 1
                yield job.source, report, reason

    def _give(self, hand: Hand, job: Job) -> None:
        hand.job = job
        self._hands[hand.actor.prepare.remote(job.source)] = hand

    def _hire(self, num_wanted: int) -> None:
        """Start workers for as many videos as there are, as far as the cluster has room."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_gpus = int(sum(resources.get("GPU", 0) for resources in nodes))
        room = num_gpus or sum(int(resources.get("CPU", 0)) // self._work.num_cpus for resources in nodes)
        for _ in range(len(self._hands) + len(self._idle), min(room, num_wanted)):
            options = {"num_cpus": self._work.num_cpus, "num_gpus": 1 if num_gpus else 0, "max_restarts": 0}
            actor = ray.remote(VideoWorker).options(**options, scheduling_strategy="SPREAD").remote(self._work)
            self._hands[actor.begin.remote()] = Hand(actor)
        if self._idle or any(hand.node for hand in self._hands.values()):
            self._seen_alive = time.monotonic()
        elif time.monotonic() - self._seen_alive > GIVE_UP_AFTER:
            raise UserError(
                f"--engine ray: expected a worker within {GIVE_UP_AFTER:.0f} s, found none; the cluster has {num_gpus} "
                f"GPUs and {sum(int(resources.get('CPU', 0)) for resources in nodes)} CPUs, a worker asks for "
                f"{self._work.num_cpus} CPUs (--worker-cpus): see `ray status`, and run the same command again"
            )

    def _look(self, waiting: deque[Job]) -> list[tuple[Job, Part | str | None]]:
        """Wait a while for workers; what they answered. Videos of workers that are gone wait again or are given up."""
        if not self._hands:
            time.sleep(LOOK_AGAIN)
            return []
        answers = []
        for ref in ray.wait(list(self._hands), timeout=LOOK_AGAIN)[0]:
            hand = self._hands.pop(ref)
            job, hand.job = hand.job, None
            try:
                answer = ray.get(ref)
            except RayError as error:
                _end(hand)
                if job is None:
                    self._note_failed_start(error)
                elif self._is_given_up(job, hand, error):
                    answers.append((job, None))
                else:
                    waiting.append(job)
                continue
            if job is None:
                hand.node, self._failed_starts = answer, 0
            else:
                answers.append((job, answer))
            self._idle.append(hand)
        return answers

    def _note_failed_start(self, error: RayError) -> None:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            raise UserError(f"--engine ray: {cause}") from error
        self._failed_starts += not isinstance(error, RayActorError) or not _is_node_lost(error)
        if self._failed_starts >= TRIES:
            raise UserError(
                f"--engine ray: no worker can start, the last of {TRIES} ended with: {_last_line(error)}; see "
                "the cluster's logs"
            ) from error

    def _is_given_up(self, job: Job, hand: Hand, error: RayError) -> bool:
        """Count a failure against a video, unless its node vanished with everything on it."""
        if isinstance(error, RayTaskError):
            job.reason = f"its preparing failed {TRIES} times, the last time with: {_last_line(error)}"
        else:
            job.reason = f"its worker died {TRIES} times; it may crash ffmpeg or take more memory than there is"
        if not _is_node_lost(error) and _is_alive(hand.node):
            job.failures += 1
        log.info("%s: %s; %d of %d", job.source.name, _last_line(error), job.failures, TRIES)
        return job.failures >= TRIES


def _connect(address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
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


def _end(hand: Hand) -> None:
    with suppress(RayError, ValueError):
        ray.kill(hand.actor)


def _is_alive(node: str | None) -> bool:
    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())


def _is_node_lost(error: RayError) -> bool:
    return "node has died" in str(error) or "node died" in str(error) or "node was terminated" in str(error)


def _last_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[-1]}"[:200]
