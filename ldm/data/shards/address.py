"""Files behind an address, `s3://bucket/set` or `https://host/set`, and their bytes: asked for in ranges, patiently.

Connections belong to one process and are made when that process first needs them, so an `Address` may be forked
and pickled. A request that fails in a way that may pass is made again, later and later; what cannot pass (no such file,
no permission) is said at once. Nothing here is reached unless somebody names an address.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from ldm.config.schema import FLAG, is_trusted
from ldm.errors import UserError

KNOWN_SCHEMES = frozenset("http https s3 s3a gs gcs az abfs abfss hdfs memory".split())
ATTEMPTS = 10
FIRST_WAIT, LONGEST_WAIT = 0.1, 30.0  # seconds before the second attempt, doubled each time
ANSWER_WITHIN = 60.0  # seconds for one attempt
PIECE = 2**23  # bytes of a file that is read whole are asked for in such pieces
MAX_WHOLE = 2**31
SIZES_AT_A_TIME = 16
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_TRY_LATER = frozenset({408, 425, 429})
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+)")
_CHANCE = random.SystemRandom()  # waits never touch the generators that a run depends on


class DatasetError(UserError):
    """A prepared folder that is incomplete, damaged, or made for something else."""


class RefusedError(OSError):
    """An answer that would be the same next time."""


@dataclass(frozen=True)
class Address:
    """A file or folder behind an address, used as a `Path` is for reading. What is secret in it is never shown."""

    text: str

    @property
    def scheme(self) -> str:
        return self.text.partition("://")[0].lower()

    @property
    def is_http(self) -> bool:
        return self.scheme in ("http", "https")

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rstrip("/").rpartition("/")[2]

    def __truediv__(self, name: str) -> Address:
        base, mark, query = self.text.partition("?") if self.is_http else (self.text, "", "")
        return Address(f"{base.rstrip('/')}/{name}{mark}{query}")

    def __str__(self) -> str:
        """Without a user's name and password, and without a signature behind `?`."""
        shown = re.sub(r"(?<=://)[^/@]*@", "", self.text)
        return shown.partition("?")[0] if self.is_http else shown

    def is_dir(self) -> bool:
        """Whether there may be files below it: addresses have no folders to ask for."""
        return True

    def is_file(self) -> bool:
        return _size(self) is not None

    def stat(self) -> SimpleNamespace:
        """Its `st_size`."""
        size = _size(self)
        if size is None:
            raise FileNotFoundError(str(self))
        return SimpleNamespace(st_size=size)

    @contextmanager
    def open(self, mode: str = "rb") -> Iterator[SimpleNamespace]:
        """Its beginning, to be read once."""
        assert mode == "rb"
        yield SimpleNamespace(read=lambda most: self.read_range(0, min(most, self.stat().st_size)))

    def read_bytes(self) -> bytes:
        """All of it. Raises DatasetError for more than `MAX_WHOLE` bytes."""
        size = self.stat().st_size
        if size > MAX_WHOLE:
            raise DatasetError(f"{self}: expected at most {MAX_WHOLE:,} bytes, found {size:,}; name a prepared set")
        pieces = [self.read_range(start, min(PIECE, size - start)) for start in range(0, size, PIECE)]
        return b"".join(pieces)

    def read_range(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`."""
        return self.begin_range(start, length).result()

    def begin_range(self, start: int, length: int, attempts: int | None = None) -> Future:
        """The same without waiting; None: as many attempts as it takes. Only in the process that waits for it."""
        what = f"{length:,} bytes at {start:,}"
        return connection().begin(patiently(self, what, lambda: _range(self, start, length), attempts))

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of the files of these names in it, -1 for one that is not there."""
        return connection().begin(_sizes(self, sorted(names))).result()


def place_of(root: str | Path | Address) -> Path | Address:
    """A plain path as it is, `file://` as the path that it means, anything else with `://` as an address.

    Raises DatasetError for kinds of addresses that a config may not name.
    """
    found = _ADDRESS.fullmatch(root) if isinstance(root, str) else None
    if found is None:
        return root if isinstance(root, Address) else Path(root)
    scheme, rest = found[1].lower(), found[2]
    if scheme == "file" and rest.startswith("/"):
        return Path(rest)
    address = Address(root.rstrip("/"))
    if "::" in root or scheme == "file":
        raise DatasetError(
            f"{address}: expected a single address, such as file:///data/set, s3://bucket/set, https://.."
        )
    if scheme not in KNOWN_SCHEMES and not is_trusted():
        raise DatasetError(
            f"{address}: expected an address of {', '.join(sorted(KNOWN_SCHEMES))}, found {scheme}; give {FLAG} if you "
            "know where it leads"
        )
    return address


class Connection:
    """What one process holds to talk to others: an event loop in a thread of its own, file systems, open requests."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._systems: dict[str, AbstractFileSystem] = {}
        self._sessions: list[Any] = []
        self._flying: set[Future] = set()
        self._opening = asyncio.Lock()
        threading.Thread(target=self.loop.run_forever, name="remote files", daemon=True).start()

    def begin(self, work: Awaitable) -> Future:
        """Start a coroutine in the loop."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        self._flying.add(future)
        future.add_done_callback(self._flying.discard)
        return future

    async def system(self, address: Address) -> AbstractFileSystem:
        """The file system of an address, made once. Raises RefusedError where a package is missing."""
        async with self._opening:
            if address.scheme not in self._systems:
                if address.scheme not in fsspec.available_protocols():
                    raise RefusedError(f"expected an address of a kind that fsspec knows, found {address.scheme}")
                kind = fsspec.get_filesystem_class(address.scheme)
                words: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
                if kind.async_impl:
                    words |= {"asynchronous": True, "loop": self.loop}
                if address.is_http:
                    words["client_kwargs"] = {"trust_env": True}
                system = kind(**words)
                if kind.async_impl and hasattr(system, "set_session"):
                    self._sessions.append(await system.set_session())
                self._systems[address.scheme] = system
        return self._systems[address.scheme]

    def settle(self, seconds: float = 5.0) -> None:
        """Wait for open requests, so no thread holds a lock while this process forks."""
        wait(list(self._flying), timeout=seconds)

    def close(self) -> None:
        """End all sessions; the process is about to."""

        async def end() -> None:
            for session in self._sessions:
                await session.close()

        with suppress(Exception):  # what is left ends with the process
            asyncio.run_coroutine_threadsafe(end(), self.loop).result(timeout=2)


_connections: dict[int, Connection] = {}  # by process; those of the one that forked are kept and never touched
_making = threading.Lock()


def connection() -> Connection:
    """This process's own."""
    number = os.getpid()
    if number not in _connections:
        with _making:
            if number not in _connections:
                _connections[number] = Connection()
    return _connections[number]


def _before_fork() -> None:
    if found := _connections.get(os.getpid()):
        found.settle()
    _making.acquire()


def _at_exit() -> None:
    if found := _connections.get(os.getpid()):
        found.close()


os.register_at_fork(before=_before_fork, after_in_parent=_making.release, after_in_child=_making.release)
atexit.register(_at_exit)


async def patiently(
    address: Address,
    what: str,
    attempt: Callable[[], Awaitable[Any]],
    attempts: int | None = None,
    within: float | None = None,
) -> Any:
    """Make an attempt, each for so many seconds, until one succeeds.

    FileNotFoundError passes; all else that is final becomes a DatasetError.
    """
    begin, reason = time.monotonic(), ""
    attempts = ATTEMPTS if attempts is None else attempts
    within = ANSWER_WITHIN if within is None else within
    for number in range(attempts):
        if number:
            pause = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (number - 1))
            await asyncio.sleep(pause * _CHANCE.uniform(0.5, 1))
        try:
            return await asyncio.wait_for(attempt(), within)
        except FileNotFoundError:
            raise
        except (PermissionError, RefusedError, ImportError) as error:
            raise DatasetError(f"{address}: {_final_words(error)}") from error
        except TimeoutError:
            reason = f"no answer within {within:g} s"
        except Exception as error:  # whatever a library calls a connection that breaks
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                raise DatasetError(f"{address}: {_final_words(error)}") from error
            reason = f"{type(error).__name__}: {error}"[:200]
    seconds = time.monotonic() - begin
    raise DatasetError(
        f"{address}: expected {what}, found none in {attempts} attempts within {seconds:.0f} s, the last one: "
        f"{reason}; look after the connection and the server, then start again: a run goes on where it was"
    )


def _final_words(error: Exception) -> str:
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, ImportError):
        return f'a package for such addresses is missing ({error}); pip install -e ".[remote]"'
    return f"not allowed ({str(error)[:200]}); give the credentials that its server asks for, as its tools take them"


async def _range(address: Address, start: int, length: int) -> bytes:
    """One attempt at exactly these bytes."""
    system = await connection().system(address)
    if address.is_http:
        content, _ = await _http_range(system, address, start, length)
    elif system.async_impl:
        content = await system._cat_file(address.text, start=start, end=start + length)
    else:
        content = await asyncio.to_thread(system.cat_file, address.text, start, start + length)
    if len(content) != length:
        raise OSError(f"{len(content):,} bytes came, the answer was cut short")
    return content


async def _http_range(system: AbstractFileSystem, address: Address, start: int, length: int) -> tuple[bytes, int]:
    """At most so many bytes, and how many the file has; no more memory is taken than was asked for."""
    session = await system.set_session()
    wanted = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
    async with session.get(address.text, headers=wanted) as answer:
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status in (404, 410):
            raise FileNotFoundError(str(address))
        if answer.status in (401, 403):
            raise PermissionError(f"{answer.status} {answer.reason}")
        if answer.status == 416 and found:
            return b"", int(found[2])
        if answer.status == 200 or (answer.status == 206 and found is None):
            raise RefusedError(
                "expected a server that answers range requests, found one that does not (python -m http.server is "
                "such a one); use another, or copy the folder here"
            )
        if 400 <= answer.status < 500 and answer.status not in _TRY_LATER:
            raise RefusedError(f"the server refuses: {answer.status} {answer.reason}; correct the address")
        if answer.status != 206 or found[1] is None or int(found[1]) != start:
            raise OSError(f"{answer.status} {answer.reason}")
        return await answer.content.readexactly(min(length, int(found[2]) - start)), int(found[2])


def _size(address: Address) -> int | None:
    """Bytes of a file, None when there is none."""
    try:
        return connection().begin(patiently(address, "a file", lambda: _ask_size(address))).result()
    except FileNotFoundError:
        return None


async def _ask_size(address: Address) -> int:
    system = await connection().system(address)
    if address.is_http:
        return (await _http_range(system, address, 0, 1))[1]
    info = await system._info(address.text) if system.async_impl else await asyncio.to_thread(system.info, address.text)
    if info["type"] != "file":
        raise FileNotFoundError(str(address))
    return int(info["size"])


async def _sizes(folder: Address, names: list[str]) -> dict[str, int]:
    """By one listing where the file system has listings, else file by file."""
    if not folder.is_http:
        try:
            found = await patiently(folder, "a list of its files", lambda: _listing(folder))
        except FileNotFoundError:
            found = {}
        return {name: found.get(name, -1) for name in names}
    places = asyncio.Semaphore(SIZES_AT_A_TIME)

    async def one(name: str) -> int:
        async with places:
            try:
                return await patiently(folder / name, "a file", lambda: _ask_size(folder / name))
            except FileNotFoundError:
                return -1

    return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))


async def _listing(folder: Address) -> dict[str, int]:
    system = await connection().system(folder)
    if system.async_impl:
        entries = await system._ls(folder.text, detail=True, refresh=True)
    else:
        entries = await asyncio.to_thread(system.ls, folder.text, detail=True)
    return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in entries if entry["type"] == "file"}
