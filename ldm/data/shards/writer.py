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
        self,
        key: str,
        about: Mapping[str, Any],
        moments: np.ndarray,
        contexts: Sequence[np.ndarray],
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> SceneEntry:
        """Write one scene and return its index entry.

        `about` holds source, start, fps, captions and, if there are any, notes; moments float16 `t 2c h w`; one float16
        `n d` for each caption; `arrays` further `MEMBERS`, float16 `t ...`.
        """
        frames, arrays = np.ascontiguousarray(moments), dict(arrays or {})
        if any(array.dtype != FLOAT16 for array in (frames, *contexts, *arrays.values())):
            raise TypeError("prepared arrays are float16")
        crcs = "".join(f"{zlib.crc32(frame):08x}" for frame in frames)
        content = [npy_bytes(array) for array in (frames, *contexts, *arrays.values())]
        return self._write(key, {**about, "num_frames": len(frames)}, crcs, content, list(arrays))

    def copy(self, entry: SceneEntry, content: Sequence[bytes]) -> SceneEntry:
        """Write a scene that lies elsewhere, from the bytes of its `.npy` files in the order of `entry.spans`."""
        about = {name: getattr(entry, name) for name in ("source", "start", "fps", "captions", "num_frames")}
        if entry.notes:
            about["notes"] = entry.notes
        return self._write(entry.key, about, entry.frames_crc32, content, list(entry.arrays))

    def _write(
        self, key: str, about: dict[str, Any], crcs: str, content: Sequence[bytes], arrays: Sequence[str]
    ) -> SceneEntry:
        names = member_names(len(content) - 1 - len(arrays), arrays)
        described = json.dumps({"key": key, **about}, ensure_ascii=False, sort_keys=True).encode()
        members = {"json": described, **dict(zip(names, content, strict=True))}
        position = self._tar.tarstream.offset
        self._tar.write({"__key__": key, **members})
        spans = {}
        for name, member in sorted(members.items()):  # the order in which TarWriter writes
            spans[name] = Span(position + TAR_BLOCK, len(member), zlib.crc32(member))
            position += TAR_BLOCK + -(-len(member) // TAR_BLOCK) * TAR_BLOCK
        if position != self._tar.tarstream.offset:
            raise RuntimeError("the tar writer does not lay members out as the index assumes")
        latents, *others = (spans[name] for name in names)
        num_contexts = len(others) - len(arrays)
        further = dict(zip(arrays, others[num_contexts:], strict=True))
        return SceneEntry(
            key=key, shard=self.name, latents=latents, contexts=others[:num_contexts], frames_crc32=crcs,
            arrays=further, **about,
        )  # fmt: skip


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as a `.npy` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
