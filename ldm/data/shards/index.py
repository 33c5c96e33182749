"""What a prepared folder says of itself: `dataset.json` and the lines of `index.jsonl`."""

from __future__ import annotations

import gc
import io
import json
import logging
import math
import mmap
import re
import tarfile
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.data.shards.address import Address, DatasetError
from ldm.files import check_depth, parse_json, replacing

log = logging.getLogger(__name__)
FLOAT16 = np.dtype("<f2")
SCHEMA_VERSION = 1
MAX_INFO_BYTES = 2**20  # of dataset.json
MAX_SIDE, MAX_VALUES = 2**16, 2**28  # of an array in a shard: of one dimension, of all together
MAX_CAPTIONS = 1000  # of a scene
DATASET_FILE, INDEX_FILE, VIDEOS_FILE, EMPTY_FILE = "dataset.json", "index.jsonl", "videos.jsonl", "empty.npy"
PARQUET_FILE = "index.parquet"


# A key becomes the name of a file in an archive, and a shard is a file in the folder: neither says where else to go.
_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_CRCS = re.compile(r"(?:[0-9a-f]{8})+")


# Arrays of a scene that have one value per frame -> the shape of that value. Writer, reader, checks and `Clips` go by
# this table; all are float16. `latents` are always there, the others where preparing gave them.
MEMBERS: dict[str, Callable[[DatasetInfo], Sequence[int]]] = {"latents": lambda info: info.moments_shape}


class Span(NamedTuple):
    """A `.npy` file inside a shard: where it starts, its bytes with the array header, crc32 of all of them."""

    offset: int
    length: int
    crc32: int


@dataclass(slots=True)
class SceneEntry:
    """One line of the index: an unbroken stretch of one video."""

    key: str
    shard: str
    source: str
    start: int  # of its first frame in the source, counted at `fps`
    num_frames: int
    fps: float
    captions: list[str]
    latents: Span
    frames_crc32: str  # 8 hex digits for each frame
    contexts: list[Span]  # one for each caption
    notes: dict[str, Any] = field(default_factory=dict)  # what else is known of it, such as how it was drawn
    arrays: dict[str, Span] = field(default_factory=dict)  # further arrays of `MEMBERS`, one value per frame

    @classmethod
    def from_line(cls, line: str | bytes) -> SceneEntry:
        """Parse a line of the index; raises TypeError or ValueError when it is none."""
        return cls.from_values(parse_json(line))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> SceneEntry:
        """From a parsed line, every value looked at; raises TypeError or ValueError."""
        entry = cls(**values)
        entry.latents = _span(entry.latents)
        entry.contexts = [_span(span) for span in entry.contexts]
        if type(entry.arrays) is not dict:
            raise ValueError(f"arrays: found {str(entry.arrays)[:80]!r}")
        entry.arrays = {name: _span(span) for name, span in entry.arrays.items()}
        for name, is_sound in _SOUND.items():
            if not is_sound(entry):
                raise ValueError(f"{name}: found {str(getattr(entry, name))[:80]!r}")
        return entry

    @property
    def spans(self) -> list[Span]:
        """Of all its arrays, in the order of `member_names`."""
        return [self.latents, *self.contexts, *self.arrays.values()]

    @property
    def end(self) -> int:
        """The first byte of the shard behind the scene's arrays."""
        return max(span.offset + span.length for span in self.spans)

    def to_line(self) -> str:
        """The entry as a line of the index, with its newline."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("notes", "arrays"):
            if not values[name]:
                del values[name]
        return json.dumps(values, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class DatasetInfo:
    """`dataset.json`: what is the same for all scenes, and how many there are."""

    schema_version: int
    first_stage: str  # identity of the autoencoder that made the moments
    text_encoder: str  # identity of the text encoder that made the embeddings
    scale_factor: float  # latents = scale_factor * sample; what is stored is not scaled
    fps: float
    size: list[int]  # height, width of the pictures
    num_tokens: int  # n of context_shape
    moments_shape: list[int]  # 2c, h, w of one frame: mean and log-variance
    context_shape: list[int]  # n, d of one caption
    empty_context_crc32: int
    num_videos: int
    num_scenes: int
    num_frames: int
    index_crc32: int

    @property
    def latent_channels(self) -> int:
        """Channels of a sampled latent, half of what is stored."""
        return self.moments_shape[0] // 2

    def misfit(self, latent_channels: int, context_dim: int) -> str:
        """What a network with these latent channels and text embeddings does not accept; empty where it fits."""
        for name, found, wanted in (
            ("latent channels", self.latent_channels, latent_channels),
            ("values per text token", self.context_shape[-1], context_dim),
        ):
            if found != wanted:
                return f"expected {wanted} {name}, as the model's network takes, found {found}"
        return ""

    def to_json(self) -> str:
        """The text of `dataset.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_info(root: Path | Address) -> DatasetInfo:
    """Read `dataset.json`. Raises DatasetError when it is missing, no JSON, incomplete or of another version."""
    path = root / DATASET_FILE
    advice = "give a folder that scripts/prepare.py finished (running the same command again finishes it)"
    if not root.is_dir():
        raise DatasetError(f"{root}: there is no such folder; {advice}")
    if not path.is_file():
        raise DatasetError(f"{root}: expected {DATASET_FILE} in it, found none; {advice}")
    try:
        values = parse_json(_content(path, MAX_INFO_BYTES))
        version = values["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path}: expected JSON with a schema_version ({error}); {advice}") from error
    if version != SCHEMA_VERSION:
        raise DatasetError(
            f"{path}: expected schema version {SCHEMA_VERSION}, found {version}: it was made by another version of "
            "this project; prepare the footage again into a fresh folder"
        )
    names = {field.name for field in fields(DatasetInfo)}
    if set(values) != names:
        raise DatasetError(
            f"{path}: these fields are missing or unknown: {', '.join(sorted(names ^ set(values)))}; prepare the "
            "footage again into a fresh folder"
        )
    info = DatasetInfo(**values)
    for name, expected, is_sound in _demands(info):
        if not is_sound:
            raise DatasetError(f"{path}: {name}: expected {expected}, found {str(values[name])[:80]}; {advice}")
    return info


def read_index(root: Path | Address, info: DatasetInfo) -> Sequence[SceneEntry]:
    """The scenes of a set: by the columns of `index.parquet` where it belongs to `index.jsonl`, otherwise by its lines.

    Raises DatasetError when `index.jsonl` is missing or not the one that `dataset.json` was written with.
    """
    path = root / INDEX_FILE
    if not path.is_file():
        raise DatasetError(
            f"{root}: expected {INDEX_FILE} beside {DATASET_FILE}, found none: without it the shards cannot be read; "
            "copy it again or prepare into a fresh folder"
        )
    content = None if isinstance(path, Path) else path.read_bytes()
    if (_crc32_of(path) if content is None else zlib.crc32(content)) != info.index_crc32:
        raise DatasetError(
            f"{path}: not the index that {DATASET_FILE} was written with: damaged, or preparing was interrupted at its "
            "very end; run the same scripts/prepare.py command again, or copy the folder again"
        )
    if content is None and (columns := _read_columns(root / PARQUET_FILE, info)) is not None:
        return SceneTable(path, columns)
    return parse_index((path.read_bytes() if content is None else content).splitlines(), path)


class SceneTable(Sequence[SceneEntry]):
    """The scenes of a long index. Columns of numbers lie in memory; an entry is parsed from its line when asked for.

    path: of `index.jsonl`. columns: of `index.parquet`, as `_read_columns` returns them.
    """

    def __init__(self, path: Path, columns: Mapping[str, Any]) -> None:
        self.path, self.columns = path, columns
        self.num_frames: np.ndarray = columns["num_frames"]
        with path.open("rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._entry = lru_cache(maxsize=4096)(self._parse)

    def __len__(self) -> int:
        return len(self.num_frames)

    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self._entry(int(number) % len(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return SceneTable, (self.path, self.columns)

    def keys(self) -> list[str]:
        return self.columns["key"].to_pylist()

    def _parse(self, number: int) -> SceneEntry:
        offset = int(self.columns["line_offset"][number])
        line = self._lines[offset : offset + int(self.columns["line_bytes"][number])]
        (entry,) = parse_index([line], self.path)
        shard = self.columns["shards"][self.columns["shard"][number]]
        if (entry.num_frames, entry.shard, entry.end) != (self.num_frames[number], shard, self.columns["end"][number]):
            raise DatasetError(
                f"{self.path.with_name(PARQUET_FILE)}: contradicts {INDEX_FILE} about scene {entry.key}; delete it, "
                "the set can be read without it"
            )
        return entry


def lengths_of(scenes: Sequence[SceneEntry]) -> Sequence[int]:
    """Frames of each scene."""
    return scenes.num_frames if isinstance(scenes, SceneTable) else [scene.num_frames for scene in scenes]


def keys_of(scenes: Sequence[SceneEntry]) -> Sequence[str]:
    """Key of each scene."""
    return scenes.keys() if isinstance(scenes, SceneTable) else [scene.key for scene in scenes]


def write_columns(folder: Path, lines: Sequence[bytes], entries: Sequence[SceneEntry]) -> None:
    """Write `index.parquet`: what opening a set needs of every scene, and where its line is in `index.jsonl`.

    Plain columns without compression or dictionaries: its size in memory is its size on disk.
    """
    import pyarrow  # noqa: PLC0415 - only for sets of prepared clips
    from pyarrow import parquet  # noqa: PLC0415

    offsets = np.cumsum([0, *map(len, lines)])
    columns = {
        "key": [entry.key for entry in entries],
        "shard": [entry.shard for entry in entries],
        "source": [entry.source for entry in entries],
        "caption": [entry.captions[0] for entry in entries],
        "start": np.array([entry.start for entry in entries], np.int64),
        "num_frames": np.array([entry.num_frames for entry in entries], np.int64),
        "fps": np.array([entry.fps for entry in entries], np.float64),
        "end": np.array([entry.end for entry in entries], np.int64),
        "line_offset": offsets[:-1],
        "line_bytes": np.diff(offsets),
    }
    crc32 = f"{zlib.crc32(b''.join(lines)):08x}"
    schema = [pyarrow.field(name, pyarrow.array(column).type, nullable=False) for name, column in columns.items()]
    table = pyarrow.table(columns, schema=pyarrow.schema(schema, metadata={"index_crc32": crc32}))
    with replacing(folder / PARQUET_FILE) as partial:
        parquet.write_table(table, partial, compression="NONE", use_dictionary=False, write_page_checksum=True)


def _read_columns(path: Path, info: DatasetInfo) -> dict[str, Any] | None:
    """The columns of an `index.parquet` that was written with this index; None for none.

    A file of another making is left alone: one that is compressed or has dictionaries could grow without bound.
    """
    if not path.is_file():
        return None
    import pyarrow  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    numbers = ("num_frames", "end", "line_offset", "line_bytes")
    try:
        with parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            if not _is_plain(file.metadata, info, path.stat().st_size):
                raise ValueError("not written with this index")
            table = file.read(columns=["key", "shard", *numbers])
        shards = table["shard"].combine_chunks().dictionary_encode()
        columns = {name: table[name].to_numpy() for name in numbers}
        if any(column.dtype != np.int64 or (column < 0).any() for column in columns.values()):
            raise ValueError("numbers below 0 or of another type")
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        log.info("%s is not used, the lines of %s are read instead: %s", path, INDEX_FILE, error)
        return None
    names = {"shard": shards.indices.to_numpy(), "shards": shards.dictionary.to_pylist(), "key": table["key"]}
    return {**columns, **names}


def _is_plain(metadata: Any, info: DatasetInfo, num_bytes: int) -> bool:
    """Whether the metadata of a Parquet file promise as many rows as the index has, in columns of plain values."""
    belongs = (metadata.metadata or {}).get(b"index_crc32") == f"{info.index_crc32:08x}".encode()
    if not belongs or metadata.num_rows != info.num_scenes:
        return False
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    is_plain = all(
        chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page and "DELTA" not in str(chunk.encodings)
        for chunk in chunks
    )
    return is_plain and sum(chunk.total_uncompressed_size for chunk in chunks) <= num_bytes


def _crc32_of(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            found = zlib.crc32(piece, found)
    return found


def parse_index(lines: Iterable[bytes], path: Path | Address) -> list[SceneEntry]:
    """Entries from the lines of an index; raises DatasetError naming the first bad line."""
    lines = list(lines)
    collecting = gc.isenabled()
    gc.disable()  # it would walk the growing list again and again: two thirds of the time
    try:
        values = parse_json(b"[" + b",".join(lines) + b"]", depth=None)
        if len(values) == len(lines):
            return [SceneEntry.from_values(value) for value in values]
    except (ValueError, TypeError):
        pass  # one by one, to say which
    finally:
        if collecting:
            gc.enable()
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(SceneEntry.from_line(line))
        except (ValueError, TypeError) as error:
            raise DatasetError(f"{path}: line {number} is no scene ({error}); prepare into a fresh folder") from error
    return entries


def _span(numbers: Any) -> Span:
    if not isinstance(numbers, list) or len(numbers) != len(Span._fields):
        raise ValueError(f"a span is offset, length and crc32, found {str(numbers)[:80]}")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"a span has whole numbers from 0, found {str(numbers)[:80]}")
    return Span(*numbers)


# Whether each value of a line can be meant; checked for every scene, so it has to be quick.
_SOUND: dict[str, Callable[[SceneEntry], Any]] = {
    "key": lambda its: type(its.key) is str and _KEY.fullmatch(its.key),
    "shard": lambda its: type(its.shard) is str and _SHARD.fullmatch(its.shard),
    "source": lambda its: type(its.source) is str,
    "start": lambda its: type(its.start) is int and its.start >= 0,
    "num_frames": lambda its: type(its.num_frames) is int and its.num_frames > 0,
    "fps": lambda its: _is_positive(its.fps),
    "captions": lambda its: type(its.captions) is list and set(map(type, its.captions)) == {str},
    "contexts": lambda its: len(its.contexts) == len(its.captions) <= MAX_CAPTIONS,
    "frames_crc32": lambda its: type(its.frames_crc32) is str and _CRCS.fullmatch(its.frames_crc32),
    "notes": lambda its: type(its.notes) is dict and (not its.notes or check_depth(its.notes) is None),
    "arrays": lambda its: not its.arrays or its.arrays.keys() <= MEMBERS.keys() - {"latents"},
}


def _demands(info: DatasetInfo) -> Iterator[tuple[str, str, bool]]:
    """What the values of `dataset.json` must be: name, in words, whether it is so."""
    for name in ("first_stage", "text_encoder"):
        yield name, "a string", isinstance(getattr(info, name), str)
    for name in ("scale_factor", "fps"):
        yield name, "a number above 0", _is_positive(getattr(info, name))
    for name, length in (("size", 2), ("moments_shape", 3), ("context_shape", 2)):
        yield name, f"{length} whole numbers from 1 to {MAX_SIDE}", _is_shape(getattr(info, name), length)
    yield "moments_shape", "an even number of channels", info.moments_shape[0] % 2 == 0
    for name in ("num_tokens", "empty_context_crc32", "num_videos", "num_scenes", "num_frames", "index_crc32"):
        value = getattr(info, name)
        yield name, "a whole number from 0", type(value) is int and value >= 0


def _is_shape(value: Any, length: int) -> bool:
    if not isinstance(value, list) or len(value) != length:
        return False
    return all(type(side) is int and 0 < side <= MAX_SIDE for side in value) and math.prod(value) <= MAX_VALUES


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _content(path: Path | Address, most: int) -> bytes:
    """The bytes of a small file; raises ValueError for a larger one."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most:,} bytes")
    return content


TAR_BLOCK = 512
LONGEST_NAME = 100  # that fits into a header of an archive; longer ones are kept elsewhere


def member_names(num_captions: int, arrays: Iterable[str] = ()) -> list[str]:
    """File names of a scene's arrays, after its key: latents, one context per caption, then further `MEMBERS`."""
    contexts = ["context.npy", *(f"context.{n}.npy" for n in range(1, num_captions))]
    return ["latents.npy", *contexts, *(f"{name}.npy" for name in arrays)]


def check_member(header: bytes, name: str, span: Span) -> None:
    """Raise ValueError unless the block before a span is the header of the plain file `name` of its length."""
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise ValueError(f"no header of an archive before {name} ({error})") from None
    if not found.isreg():
        raise ValueError(f"something that is no plain file (kind {found.type!r}) in the place of {name}")
    if found.size != span.length:
        raise ValueError(f"{name} with {found.size:,} bytes in the archive and {span.length:,} in the index")
    if len(name) <= LONGEST_NAME and found.name != name:
        raise ValueError(f"{found.name[:80]!r} in the place of {name}")


def check_array(content: bytes, name: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless a `.npy` file holds float16 numbers of this shape and nothing else."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        found, is_fortran, kind = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else ((), True, None)
    except (ValueError, TypeError, SyntaxError, KeyError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(f"{name} without the header of an array ({str(error)[:80]})") from None
    if kind != FLOAT16 or is_fortran or list(found) != list(shape):
        order = ", by columns," if is_fortran and kind else ""
        raise ValueError(f"{name} with {kind}{order} of shape {list(found)[:8]}, not float16 of {list(shape)}")
    if len(content) - file.tell() != FLOAT16.itemsize * int(np.prod(shape)):
        raise ValueError(f"{name} with {len(content) - file.tell():,} bytes of numbers for the shape {list(shape)}")
