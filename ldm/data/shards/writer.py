"""Scenes into tar shards by WebDataset's convention, and what the index has to know about them."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from ldm.data.shards.index import FLOAT16, TAR_BLOCK, SceneEntry, Span, member_names


class ShardWriter:
    """Write scenes into one uncompressed tar by WebDataset's convention; the same scenes give the same bytes."""

    def __init__(self, path: Path | str, name: str) -> None:
        """Start the file at `path`, which the index shall know as `name`."""
        self.name = name
        self._file = open(path, "wb")
        self._tar = TarWriter(self._file, encoder=False, compress=False, mtime=0, user="prepare", group="prepare")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._tar.close()  # writes the end of the archive
            else:
                self._tar.tarstream.fileobj.closed = True  # or it would write that end when it is collected
        finally:
            self._file.close()

    def add(
        self, key: str, about: Mapping[str, Any], moments: np.ndarray, contexts: Sequence[np.ndarray]
    ) -> SceneEntry:
        """Write one scene and return its index entry.

        `about` holds source, start, fps, captions and, if there are any, notes; moments float16 `t 2c h w`; one float16
        `n d` for each caption.
        """
        if moments.dtype != FLOAT16 or any(context.dtype != FLOAT16 for context in contexts):
            raise TypeError("prepared arrays are float16")
        frames = np.ascontiguousarray(moments)
        crcs = "".join(f"{zlib.crc32(frame):08x}" for frame in frames)
        return self._write(key, {**about, "num_frames": len(frames)}, crcs, [frames, *contexts])

    def copy(self, entry: SceneEntry, latents: bytes, contexts: Sequence[bytes]) -> SceneEntry:
        """Write a scene that lies elsewhere, from the bytes of its `.npy` files; returns its entry in this shard."""
        about = {name: getattr(entry, name) for name in ("source", "start", "fps", "captions", "num_frames")}
        if entry.notes:
            about["notes"] = entry.notes
        return self._write(entry.key, about, entry.frames_crc32, [latents, *contexts])

    def _write(self, key: str, about: dict[str, Any], crcs: str, arrays: Sequence[np.ndarray | bytes]) -> SceneEntry:
        names = member_names(len(arrays) - 1)
        members = {
            name: array if isinstance(array, bytes) else npy_bytes(array)
            for name, array in zip(names, arrays, strict=True)
        }
        described = json.dumps({"key": key, **about}, ensure_ascii=False, sort_keys=True).encode()
        position = self._tar.tarstream.offset
        self._tar.write({"__key__": key, "json": described, **members})
        spans = {}
        for name, content in sorted({"json": described, **members}.items()):  # the order in which TarWriter writes
            spans[name] = Span(position + TAR_BLOCK, len(content), zlib.crc32(content))
            position += TAR_BLOCK + -(-len(content) // TAR_BLOCK) * TAR_BLOCK
        if position != self._tar.tarstream.offset:
            raise RuntimeError("the tar writer does not lay members out as the index assumes")
        contexts = [spans[name] for name in names[1:]]
        return SceneEntry(
            key=key, shard=self.name, latents=spans["latents.npy"], contexts=contexts, frames_crc32=crcs, **about
        )


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as a `.npy` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
