"""What a prepared folder says of itself: `dataset.json` and the lines of `index.jsonl`."""

from __future__ import annotations

import gc
import io
import json
import math
import re
import tarfile
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.data.shards.address import Address, DatasetError
from ldm.files import check_depth, parse_json

FLOAT16 = np.dtype("<f2")
SCHEMA_VERSION = 1
MAX_INFO_BYTES = 2**20  # of dataset.json
MAX_SIDE, MAX_VALUES = 2**16, 2**28  # of an array in a shard: of one dimension, of all together
MAX_CAPTIONS = 1000  # of a scene
DATASET_FILE, INDEX_FILE, VIDEOS_FILE, EMPTY_FILE = "dataset.json", "index.jsonl", "videos.jsonl", "empty.npy"


# A key becomes the name of a file in an archive, and a shard is a file in the folder: neither says where else to go.
_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_CRCS = re.compile(r"(?:[0-9a-f]{8})+")


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
        for name, is_sound in _SOUND.items():
            if not is_sound(entry):
                raise ValueError(f"{name}: found {str(getattr(entry, name))[:80]!r}")
        return entry

    def to_line(self) -> str:
        """The entry as a line of the index, with its newline."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.notes:
            del values["notes"]
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


def read_index(root: Path | Address, info: DatasetInfo) -> list[SceneEntry]:
    """Read `index.jsonl`. Raises DatasetError when it is missing or not the one `dataset.json` was written with."""
    path = root / INDEX_FILE
    if not path.is_file():
        raise DatasetError(
            f"{root}: expected {INDEX_FILE} beside {DATASET_FILE}, found none: without it the shards cannot be read; "
            "copy it again or prepare into a fresh folder"
        )
    content = path.read_bytes()
    if zlib.crc32(content) != info.index_crc32:
        raise DatasetError(
            f"{path}: not the index that {DATASET_FILE} was written with: damaged, or preparing was interrupted at its "
            "very end; run the same scripts/prepare.py command again, or copy the folder again"
        )
    return parse_index(content.splitlines(), path)


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


# Whether each value of a line can be meant; looked at for every scene, so that it has to be quick.
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


def member_names(num_captions: int) -> list[str]:
    """What the arrays of a scene are called in the archive, after its key: its latents, then a context a caption."""
    return ["latents.npy", "context.npy", *(f"context.{n}.npy" for n in range(1, num_captions))]


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
