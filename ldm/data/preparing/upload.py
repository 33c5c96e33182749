"""Uploading a finished prepared folder: shards first, index and description last, so readers never see a partial set.

An address that holds the same set, or an earlier state of it, gets the missing files; another set is never overwritten.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from pathlib import Path

from ldm.data.shards import PreparedSet
from ldm.data.shards.address import Address, connection, patiently
from ldm.data.shards.index import (
    DATASET_FILE,
    EMPTY_FILE,
    INDEX_FILE,
    PARQUET_FILE,
    VIDEOS_FILE,
    DatasetError,
    read_info,
)

TAIL = 2**16  # bytes at the end of a shard that are compared with the remote file
SECONDS_PER_FILE = 3600.0
DESCRIPTIONS = (VIDEOS_FILE, EMPTY_FILE, INDEX_FILE, PARQUET_FILE, DATASET_FILE)  # in this order


def check_writable(address: Address) -> None:
    """Raise DatasetError for an address that files cannot be sent to."""
    if address.is_http:
        raise DatasetError(f"{address}: expected an address that can be written, such as s3://bucket/set, found http")


def upload(prepared: PreparedSet, address: Address, advance: Callable[[int], None]) -> int:
    """Copy a finished folder; calls `advance` with numbers of stored bytes. Returns the number of files sent."""
    check_writable(address)
    _check_same(prepared.root, address)
    sizes, sent = address.sizes(prepared.shards), 0
    for name in prepared.shards:
        path = prepared.root / name
        if sizes[name] != path.stat().st_size or not _ends_alike(path, address / name, sizes[name]):
            _send(path, address / name)
            sent += 1
        advance(path.stat().st_size)
    for name in _descriptions(prepared.root):
        content, there = (prepared.root / name).read_bytes(), address / name
        if not there.is_file() or there.read_bytes() != content:
            _send(prepared.root / name, there)
            sent += 1
        advance(len(content))
    return sent


def num_bytes(prepared: PreparedSet) -> int:
    """Bytes that `upload` sends to an empty address."""
    names = [*prepared.shards, *_descriptions(prepared.root)]
    return sum((prepared.root / name).stat().st_size for name in names)


def _descriptions(folder: Path) -> list[str]:
    """The descriptions in the folder; sets of earlier versions have no Parquet file."""
    return [name for name in DESCRIPTIONS if (folder / name).is_file()]


def _check_same(folder: Path, address: Address) -> None:
    """Raise DatasetError if the address holds a set that is not an earlier state of this one."""
    if not (address / DATASET_FILE).is_file():
        return
    there = read_info(address)
    lines = (folder / INDEX_FILE).read_bytes().splitlines(keepends=True)[: there.num_scenes]
    if len(lines) < there.num_scenes or zlib.crc32(b"".join(lines)) != there.index_crc32:
        raise DatasetError(
            f"{address}: expected nothing, or an earlier state of {folder}, found another prepared set of "
            f"{there.num_scenes} scenes; choose another address (nothing there was changed)"
        )


def _ends_alike(path: Path, there: Address, size: int) -> bool:
    length = min(TAIL, size)
    with path.open("rb") as file:
        file.seek(size - length)
        return file.read() == there.read_range(size - length, length)


def _send(path: Path, there: Address) -> None:
    work = patiently(there, "to write it", lambda: _put(path, there), within=SECONDS_PER_FILE)
    connection().begin(work).result()


async def _put(path: Path, there: Address) -> None:
    system = await connection().system(there)
    if system.async_impl:
        await system._put_file(str(path), there.text)
    else:
        await asyncio.to_thread(system.put_file, str(path), there.text)
