"""Blocks of remote files on the disk of this machine, shared by all its processes and never above a set size.

What lies here is checked by whoever reads it, as anything from a shard is; a block that is lost or cannot be written
costs another request and nothing else. The person at the machine says where and how much, not a config:
`VIDEO_SD_CACHE` is a folder, `VIDEO_SD_CACHE_GB` a size in GB (10^9 bytes), 0 for none.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError

log = logging.getLogger(__name__)
DEFAULT_GB = 10.0
KEPT = 0.9  # of the size, when something has to go
ABANDONED = 3600  # seconds after which a half-written block belongs to nobody


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
        partial = self.folder / f".{name}.{os.getpid()}.partial"
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
