"""Prepared clips on disk: tar shards with a byte index beside them, read at random, checked as they are read.

`docs/data-format.md` is the contract. Reading is `os.pread` of exactly the bytes that are wanted; no array header and
no pickle is interpreted, shapes come from the index. Sets behind an address are read by `shards.remote`, shards are
written by `shards.writer`.
"""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm.data.shards.address import Address, place_of
from ldm.data.shards.bytes import ShardBytes
from ldm.data.shards.index import (
    DATASET_FILE,
    EMPTY_FILE,
    FLOAT16,
    INDEX_FILE,
    MEMBERS,
    SCHEMA_VERSION,
    TAR_BLOCK,
    VIDEOS_FILE,
    DatasetError,
    DatasetInfo,
    SceneEntry,
    SceneTable,
    Span,
    check_array,
    check_member,
    member_names,
    parse_index,
    read_index,
    read_info,
)
from ldm.data.shards.remote import RemoteShardReader

__all__ = [
    "DATASET_FILE",
    "EMPTY_FILE",
    "INDEX_FILE",
    "SCHEMA_VERSION",
    "VIDEOS_FILE",
    "DatasetError",
    "DatasetInfo",
    "PreparedSet",
    "SceneEntry",
    "ShardReader",
    "Span",
    "parse_index",
    "read_info",
]

MAX_OPEN_SHARDS = 64
MAX_ARRAY_HEADER = 4096


def _float16(content: bytes, shape: Sequence[int]) -> np.ndarray:
    """Raw values as an array; what stands before them (the header) is skipped unread."""
    size = int(np.prod(shape)) * FLOAT16.itemsize
    return np.frombuffer(content, FLOAT16, offset=len(content) - size).reshape(shape)


class ShardReader(ShardBytes):
    """Bytes out of the shards of one folder, for any number of threads; each opens files when it first needs them."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._opened = threading.local()

    def read(self, entry: SceneEntry, offset: int, length: int) -> bytes:
        descriptor = self._descriptor(entry)
        length_here = max(0, os.fstat(descriptor).st_size - offset)  # before memory is taken for it
        content = os.pread(descriptor, min(length, length_here), offset)
        if len(content) != length:
            raise self.cut_short(entry, offset, length, len(content))
        return content

    def read_into(self, entry: SceneEntry, offset: int, place: np.ndarray) -> None:
        found = os.preadv(self._descriptor(entry), [place], offset)
        if found != len(place):
            raise self.cut_short(entry, offset, len(place), found)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def files(self) -> dict[str, BinaryIO]:
        """The shards that this thread has open."""
        return self._opened.__dict__.setdefault("files", {})

    def _descriptor(self, entry: SceneEntry) -> int:
        files = self.files()
        if entry.shard not in files:
            if len(files) >= MAX_OPEN_SHARDS:
                files.pop(next(iter(files))).close()
            try:
                files[entry.shard] = open(self.root / entry.shard, "rb", buffering=0, opener=_open_at_once)
            except FileNotFoundError as error:
                raise self.missing(entry) from error
        return files[entry.shard].fileno()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


class PreparedSet:
    """A prepared folder, open for reading: `info`, `scenes`, `empty_context` (float16 `n d`).

    `root` is a folder or an address such as `s3://bucket/set`. Opening reads the index and compares it with the sizes
    of the shards; `verify=True` also reads every byte. Raises DatasetError, naming shard and scene, for anything that
    is missing, cut short, damaged or of another version, and for an address that does not answer.
    """

    def __init__(self, root: Path | str | Address, verify: bool = False) -> None:
        self.root = place_of(root)
        self.info = read_info(self.root)
        self.scenes = read_index(self.root, self.info)
        self.empty_context = _read_empty_context(self.root, self.info)
        sizes = _shard_sizes(self.root, self.shards)
        self.num_bytes = sum(sizes.values())
        self._reader = _reader_of(self.root, sizes, self.info)
        self._check_sizes(sizes)
        if verify:
            for scene in self.scenes:
                self.verify(scene)

    @property
    def shards(self) -> list[str]:
        """Names of the shards that have scenes."""
        if isinstance(self.scenes, SceneTable):
            return sorted(self.scenes.columns["shards"])
        return sorted({scene.shard for scene in self.scenes})

    def read_moments(self, scene: SceneEntry, start: int = 0, count: int | None = None, stride: int = 1) -> np.ndarray:
        """`count` frames of a scene from `start`, every `stride`-th (None: to its end), float16 `t 2c h w`.

        Only the bytes of these frames are read, and each frame is checked. Raises IndexError outside the scene.
        """
        return self.read_frames(scene, "latents", start, count, stride)

    def read_frames(
        self, scene: SceneEntry, name: str, start: int = 0, count: int | None = None, stride: int = 1
    ) -> np.ndarray:
        """The same of any array of `MEMBERS` that the scene has: float16 `t ...`.

        Frames of latents have a checksum each. Other arrays are small; they are read whole and checked as a whole.
        """
        wanted = range(start, scene.num_frames, stride)
        wanted = wanted if count is None else range(start, start + count * stride, stride)
        if start < 0 or stride < 1 or not wanted or wanted[-1] >= scene.num_frames:
            raise IndexError(f"frames {wanted} are not in scene {scene.key}, which has {scene.num_frames}")
        self._check_entry(scene)
        shape = list(MEMBERS[name](self.info))
        if name != "latents":
            whole = _float16(self._reader.read_span(scene, scene.arrays[name]), [scene.num_frames, *shape])
            return np.ascontiguousarray(whole[wanted.start : wanted.stop : wanted.step])
        size = int(np.prod(shape)) * FLOAT16.itemsize
        first = scene.latents.offset + scene.latents.length - scene.num_frames * size
        content = np.empty([len(wanted), size], np.uint8)
        if stride == 1:
            self._reader.read_into(scene, first + start * size, content.reshape(-1))
        else:
            self._reader.expect(scene, first + start * size, (wanted[-1] + 1 - start) * size)
            for place, frame in zip(content, wanted, strict=True):
                self._reader.read_into(scene, first + frame * size, place)
        for place, frame in zip(content, wanted, strict=True):
            if f"{zlib.crc32(place):08x}" != scene.frames_crc32[8 * frame : 8 * frame + 8]:
                if self._reader.forget(scene, first + frame * size, size):
                    return self.read_frames(scene, name, start, count, stride)
                raise self._reader.damaged(scene, f"the bytes of frame {frame}")
        return content.view(FLOAT16).reshape(len(wanted), *shape)

    def read_context(self, scene: SceneEntry) -> np.ndarray:
        """The embeddings of all captions of a scene, in their order: float16 `captions n d`."""
        return np.stack([self.read_caption(scene, number) for number in range(len(scene.contexts))])

    def read_caption(self, scene: SceneEntry, number: int) -> np.ndarray:
        """The embedding of one caption of a scene: float16 `n d`."""
        self._check_entry(scene)
        return _float16(self._reader.read_span(scene, scene.contexts[number]), self.info.context_shape)

    def verify(self, scene: SceneEntry) -> None:
        """Read everything a scene has; compare it with its crc32 and with its own headers. Raises DatasetError."""
        self._check_entry(scene)
        names = member_names(len(scene.contexts), scene.arrays)
        for span, name, shape in zip(scene.spans, names, self._shapes(scene), strict=True):
            content = self._reader.read_span(scene, span)
            try:
                header = self._reader.read(scene, max(0, span.offset - TAR_BLOCK), TAR_BLOCK)
                check_member(header, f"{scene.key}.{name}", span)
                check_array(content, name, shape)
            except ValueError as error:
                raise DatasetError(
                    f"{self.root / scene.shard}: scene {scene.key}: found {error}; the shard is not the one that "
                    f"{INDEX_FILE} was written for, copy it again or prepare into a fresh folder"
                ) from None

    def _shapes(self, scene: SceneEntry) -> list[list[int]]:
        """Of the arrays of a scene, in the order of its spans."""
        per_frame = {name: [scene.num_frames, *shape(self.info)] for name, shape in MEMBERS.items()}
        contexts = [self.info.context_shape] * len(scene.contexts)
        return [per_frame["latents"], *contexts, *(per_frame[name] for name in scene.arrays)]

    def check_encoders(self, first_stage: str, text_encoder: str, scale_factor: float) -> None:
        """Raise DatasetError unless the set was made by these encoders (their identities) for this scale factor."""
        for name, found, wanted in [
            ("autoencoder", self.info.first_stage, first_stage),
            ("text encoder", self.info.text_encoder, text_encoder),
            ("scale factor", self.info.scale_factor, scale_factor),
        ]:
            if found != wanted:
                raise DatasetError(
                    f"{self.root}: prepared with another {name}: expected {str(wanted)[:16]}, found "
                    f"{str(found)[:16]}; prepare the footage again, into a fresh folder, with this config"
                )

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Compare the index with itself, with the shapes of the data set and with the sizes of the files."""
        if isinstance(self.scenes, SceneTable):  # each entry is compared when it is used
            columns = self.scenes.columns
            of_shards = np.array([sizes[name] for name in columns["shards"]])
            late = np.flatnonzero(columns["end"] > of_shards[columns["shard"]])
            candidates = [self.scenes[number] for number in late[:1]]
        else:
            candidates = self.scenes
        for scene in candidates:
            size = sizes[scene.shard]
            if scene.end > size:
                found = "is missing" if size < 0 else f"is cut short: expected at least {scene.end} bytes, found {size}"
                raise DatasetError(
                    f"{self.root / scene.shard}: the shard {found} (scene {scene.key} is there); copy it again or "
                    "prepare into a fresh folder"
                )
            self._check_entry(scene)

    def _check_entry(self, scene: SceneEntry) -> None:
        """Raise DatasetError for an entry whose numbers do not fit each other or the shapes of the data set."""
        sizes = [FLOAT16.itemsize * math.prod(shape) for shape in self._shapes(scene)]
        if (
            any(span.length < size for span, size in zip(scene.spans, sizes, strict=True))
            or len(scene.frames_crc32) != 8 * scene.num_frames
            or len(scene.contexts) != len(scene.captions)
        ):
            raise DatasetError(f"{self.root / INDEX_FILE}: the line of scene {scene.key} contradicts itself")


def _shard_sizes(root: Path | Address, names: Iterable[str]) -> dict[str, int]:
    """Bytes of each shard, -1 for one that is missing."""
    if isinstance(root, Address):
        return root.sizes(names)
    paths = {name: root / name for name in names}
    return {name: path.stat().st_size if path.is_file() else -1 for name, path in paths.items()}


def _reader_of(root: Path | Address, sizes: Mapping[str, int], info: DatasetInfo) -> ShardBytes:
    return ShardReader(root) if isinstance(root, Path) else RemoteShardReader(root, sizes, info.index_crc32)


def _read_empty_context(root: Path | Address, info: DatasetInfo) -> np.ndarray:
    path = root / EMPTY_FILE
    size = path.stat().st_size if path.is_file() else 0
    least = int(np.prod(info.context_shape)) * FLOAT16.itemsize
    content = path.read_bytes() if least <= size <= least + MAX_ARRAY_HEADER else b""
    if zlib.crc32(content) != info.empty_context_crc32:
        raise DatasetError(
            f"{path}: the embedding of the empty prompt is missing or damaged; copy the folder again or prepare into a "
            "fresh one"
        )
    try:
        check_array(content, EMPTY_FILE, info.context_shape)
    except ValueError as error:
        raise DatasetError(f"{path}: found {error}; copy the folder again or prepare into a fresh one") from None
    return _float16(content, info.context_shape)
