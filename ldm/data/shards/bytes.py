"""What every reader of shards has: bytes of a scene checked against the index, and errors that say which scene."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.data.shards.index import DatasetError, SceneEntry, Span

if TYPE_CHECKING:
    from ldm.data.shards.address import Address


class ShardBytes:
    """Bytes out of the shards of one set; `root` is where they are."""

    root: Path | Address

    def read(self, entry: SceneEntry, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` of the scene's shard. Raises DatasetError when they are not there."""
        raise NotImplementedError

    def read_into(self, entry: SceneEntry, offset: int, place: np.ndarray) -> None:
        """Fill an array of bytes from `offset` of the scene's shard. Raises DatasetError when they are not there."""
        raise NotImplementedError

    def forget(self, entry: SceneEntry, offset: int, length: int) -> bool:
        """Whether bytes that are not those that were written may be others when they are read again."""
        return False

    def expect(self, entry: SceneEntry, offset: int, length: int) -> None:
        """Be told what will be read next, piece by piece."""

    def read_span(self, entry: SceneEntry, span: Span) -> bytes:
        """A whole `.npy` file, checked against its crc32."""
        content = self.read(entry, span.offset, span.length)
        while zlib.crc32(content) != span.crc32:
            if not self.forget(entry, span.offset, span.length):
                raise self.damaged(entry, f"bytes {span.offset} to {span.offset + span.length}")
            content = self.read(entry, span.offset, span.length)
        return content

    def damaged(self, entry: SceneEntry, where: str) -> DatasetError:
        """The error for bytes that are not those that were written."""
        return DatasetError(
            f"{self.root / entry.shard}: scene {entry.key} ({entry.source}) is damaged: {where} do not match the crc32 "
            "in the index; copy the shard again or prepare into a fresh folder"
        )

    def missing(self, entry: SceneEntry) -> DatasetError:
        """The error for a shard that is not there."""
        return DatasetError(
            f"{self.root / entry.shard}: the shard is missing, scene {entry.key} is in it; copy it again"
        )

    def cut_short(self, entry: SceneEntry, offset: int, length: int, found: int) -> DatasetError:
        """The error for a shard that ends too early."""
        return DatasetError(
            f"{self.root / entry.shard}: cut short: scene {entry.key} needs {length} bytes at {offset}, found {found}; "
            "copy the shard again or prepare into a fresh folder"
        )
