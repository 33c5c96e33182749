"""Prepared shards behind an address, read in blocks: from memory, from this machine's disk, else by range requests.

Neighbouring blocks are requested together; a sequential reader gets the following blocks ahead of time. A block with a
wrong checksum is forgotten and fetched again before it counts as damaged.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.shards.address import Address
from ldm.data.shards.bytes import ShardBytes
from ldm.data.shards.index import DatasetError, SceneEntry
from ldm.errors import UserError

log = logging.getLogger(__name__)
DEFAULT_GB = 10.0
KEPT = 0.9  # of the size, when something has to go
ABANDONED = 3600  # seconds after which a half-written block is abandoned


class BlockCache:
    """Named blocks of bytes in `folder`, at most `max_bytes` of them together; the least recently read go first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._is_usable = max_bytes > 0
        if self._is_usable:
            with self._trying():
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @classmethod
    def of_this_machine(cls) -> BlockCache:
        """Where and as large as the environment says."""
        given = os.environ.get("VIDEO_SD_CACHE_GB", str(DEFAULT_GB))
        try:
            size = float(given)
        except ValueError:
            size = -1.0
        if not 0 <= size < float("inf"):
            raise UserError(f"VIDEO_SD_CACHE_GB: expected a size in GB, 0 for no cache, found {given!r}")
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = os.environ.get("VIDEO_SD_CACHE") or Path(home) / "video-stable-diffusion"
        return cls(Path(folder), int(size * 1e9))

    def get(self, name: str, length: int) -> bytes | None:
        """A block of this length; None when it is not here."""
        if not self._is_usable:
            return None
        path = self.folder / name
        try:
            with path.open("rb") as file:
                content = file.read(length + 1)
            os.utime(path)
        except OSError:
            return None
        return content if len(content) == length else None

    def put(self, name: str, content: bytes) -> None:
        """Keep a block; older ones make room for it."""
        if not self._is_usable or len(content) > self.max_bytes:
            return
        partial = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}.partial"
        with self._trying():
            self._make_room(len(content))
            partial.write_bytes(content)
            os.replace(partial, self.folder / name)

    def drop(self, name: str) -> None:
        """Forget a block; that it is counted until the next tidying does no harm."""
        (self.folder / name).unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Count `num_bytes` more, over all processes, and delete what is too much before they are written."""
        with (self.folder / "lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            counted = lock.read(32)
            total = int(counted) if counted.isdecimal() else self.max_bytes  # unknown: counted anew
            if total + num_bytes > self.max_bytes:
                total = self._tidy(int(KEPT * self.max_bytes) - num_bytes)
            lock.truncate(0)
            lock.write(str(total + num_bytes))

    def _tidy(self, limit: int) -> int:
        """Delete the least recently read until at most `limit` bytes are left; returns how many there are."""
        blocks = []
        for entry in os.scandir(self.folder):
            if entry.name == "lock":
                continue
            found = entry.stat()
            if not entry.name.startswith(".") or time.time() - found.st_mtime > ABANDONED:
                blocks.append((found.st_mtime_ns, found.st_size, entry.path))
        total = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if total <= max(0, limit):
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """A cache that cannot be written is left alone from then on."""
        try:
            yield
        except OSError as error:
            self._is_usable = False
            log.warning("%s: remote clips are not kept here (%s)", self.folder, error)


BLOCK = 2**20  # bytes
RUN = 8  # blocks in one request, and blocks read ahead
KEPT_BLOCKS = 32  # in memory, in each process
STREAK = 3  # reads of one block after the other, before anything is read ahead
REREADS = 3  # of bytes that do not match their checksum


class RemoteShardReader(ShardBytes):
    """Bytes out of the shards below an address.

    sizes: bytes of each shard. version: of the set: another one at the same address never meets old blocks.
    """

    def __init__(self, root: Address, sizes: Mapping[str, int], version: int) -> None:
        self.root, self._sizes, self._version = root, dict(sizes), version
        self._begin_process()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "sizes": self._sizes, "version": self._version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def read(self, entry: SceneEntry, offset: int, length: int) -> bytes:
        content = np.empty(max(0, min(length, self._sizes[entry.shard] - offset)), np.uint8)
        if len(content) != length:
            raise self.cut_short(entry, offset, length, len(content))
        self.read_into(entry, offset, content)
        return content.tobytes()

    def read_into(self, entry: SceneEntry, offset: int, place: np.ndarray) -> None:
        if offset + len(place) > self._sizes[entry.shard]:
            raise self.cut_short(entry, offset, len(place), max(0, self._sizes[entry.shard] - offset))
        if not len(place):
            return
        numbers = range(offset // BLOCK, (offset + len(place) - 1) // BLOCK + 1)
        blocks = self._blocks(entry, numbers)
        for number in numbers:
            begin, end = max(offset, number * BLOCK), min(offset + len(place), (number + 1) * BLOCK)
            found = np.frombuffer(blocks[number], np.uint8)
            place[begin - offset : end - offset] = found[begin - number * BLOCK : end - number * BLOCK]

    def expect(self, entry: SceneEntry, offset: int, length: int) -> None:
        """Fetch what will be read piece by piece in one go."""
        last = min(offset + length, self._sizes[entry.shard]) - 1
        self._blocks(entry, range(offset // BLOCK, last // BLOCK + 1)[:KEPT_BLOCKS])

    def forget(self, entry: SceneEntry, offset: int, length: int) -> bool:
        """Drop what was read here; False when that has been done often enough."""
        with self._lock:
            self._begin_process_if_forked()
            self._rereads[entry.shard, offset] += 1
            for number in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1):
                self._kept.pop((entry.shard, number), None)
                self._cache.drop(self._block_name(entry.shard, number))
            return self._rereads[entry.shard, offset] <= REREADS

    def _begin_process(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._cache = BlockCache.of_this_machine()
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._ahead: dict[tuple[str, int], tuple[Future, int]] = {}  # block -> request that brings it, its first block
        self._rereads: Counter[tuple[str, int]] = Counter()
        self._last, self._streak = ("", -1), 0

    def _begin_process_if_forked(self) -> None:
        if self._process != os.getpid():
            self._begin_process()

    def _blocks(self, entry: SceneEntry, numbers: range) -> dict[int, bytes]:
        """These blocks of the scene's shard, by number. Threads wait for their own requests, not for each other."""
        with self._lock:
            self._begin_process_if_forked()
            ahead = next((self._ahead[entry.shard, n] for n in numbers if (entry.shard, n) in self._ahead), None)
            if ahead is not None:
                self._ahead = {}  # one request at a time
        if ahead is not None:
            with suppress(OSError, DatasetError):  # asked for again, with patience
                arrived = self._keep(entry.shard, ahead[1], ahead[0].result())
                with self._lock:
                    self._kept.update({(entry.shard, number): content for number, content in arrived.items()})
        with self._lock:
            found = {number: content for number in numbers if (content := self._have(entry.shard, number)) is not None}
            missing = [number for number in numbers if number not in found]
            requests = [(run, self._request(entry.shard, run)) for run in _runs(missing)]
        for run, request in requests:
            try:
                content = request.result()
            except FileNotFoundError as error:
                raise self.missing(entry) from error
            found.update(self._keep(entry.shard, run[0], content))
        with self._lock:
            for number in numbers:
                self._kept[entry.shard, number] = found[number]
                self._kept.move_to_end((entry.shard, number))
            while len(self._kept) > KEPT_BLOCKS:
                self._kept.popitem(last=False)
            self._read_ahead(entry.shard, numbers)
        return found

    def _have(self, shard: str, number: int) -> bytes | None:
        """A block that is here."""
        if (shard, number) in self._kept:
            return self._kept[shard, number]
        return self._cache.get(self._block_name(shard, number), self._length(shard, number))

    def _read_ahead(self, shard: str, numbers: range) -> None:
        """Ask for what follows once a few reads in a row have each gone on where the one before ended."""
        name, last = self._last
        if (name, last) == (shard, numbers[-1]):
            return
        self._streak = self._streak + 1 if name == shard and numbers[0] - last in (0, 1) else 0
        self._last = (shard, numbers[-1])
        following = range(numbers[-1] + 1, min(numbers[-1] + 1 + RUN, self._num_blocks(shard)))
        if self._streak < STREAK or not following or (shard, following[0]) in self._ahead:
            return
        self._ahead = {}  # a reader that jumps elsewhere leaves these behind
        if (content := self._have(shard, following[0])) is not None:
            self._kept[shard, following[0]] = content
            return
        request = self._request(shard, list(following), attempts=1)
        self._ahead = {(shard, number): (request, following[0]) for number in following}

    def _request(self, shard: str, run: list[int], attempts: int | None = None) -> Future:
        start = run[0] * BLOCK
        end = min((run[-1] + 1) * BLOCK, self._sizes[shard])
        return (self.root / shard).begin_range(start, end - start, attempts)

    def _keep(self, shard: str, first: int, content: bytes) -> dict[int, bytes]:
        """Cut what came into blocks and put those that are new on disk."""
        blocks = {first + i: content[i * BLOCK : (i + 1) * BLOCK] for i in range(-(-len(content) // BLOCK))}
        for number, block in blocks.items():
            self._cache.put(self._block_name(shard, number), block)
        return blocks

    def _num_blocks(self, shard: str) -> int:
        return -(-self._sizes[shard] // BLOCK)

    def _length(self, shard: str, number: int) -> int:
        return min(BLOCK, self._sizes[shard] - number * BLOCK)

    def _block_name(self, shard: str, number: int) -> str:
        identity = f"{self.root.text}\n{self._version}\n{shard}\n{self._sizes[shard]}"
        return f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}-{number}"


def _runs(numbers: list[int]) -> list[list[int]]:
    """Numbers in rising order as runs without gaps, of at most `RUN`."""
    runs = [numbers[:1]] if numbers else []
    for before, number in pairwise(numbers):
        if number == before + 1 and len(runs[-1]) < RUN:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
