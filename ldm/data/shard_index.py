"""What a prepared folder says of itself: `dataset.json` and the lines of `index.jsonl`."""

from __future__ import annotations

import gc
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.errors import UserError

FLOAT16 = np.dtype("<f2")
SCHEMA_VERSION = 1
DATASET_FILE, INDEX_FILE, VIDEOS_FILE, EMPTY_FILE = "dataset.json", "index.jsonl", "videos.jsonl", "empty.npy"


class DatasetError(UserError):
    """A prepared folder that is incomplete, damaged, or made for something else."""


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
        """Parse a line of the index; raises KeyError, TypeError or ValueError when it is none."""
        return cls.from_values(json.loads(line))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> SceneEntry:
        """From a parsed line."""
        entry = cls(**values)
        entry.latents = Span(*entry.latents)
        entry.contexts = [Span(*span) for span in entry.contexts]
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


def read_info(root: Path) -> DatasetInfo:
    """Read `dataset.json`. Raises DatasetError when it is missing, no JSON, incomplete or of another version."""
    path = root / DATASET_FILE
    advice = "give a folder that scripts/prepare.py finished (running the same command again finishes it)"
    if not root.is_dir():
        raise DatasetError(f"{root}: there is no such folder; {advice}")
    if not path.is_file():
        raise DatasetError(f"{root}: expected {DATASET_FILE} in it, found none; {advice}")
    try:
        values = json.loads(path.read_bytes())
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
    return DatasetInfo(**values)


def read_index(root: Path, info: DatasetInfo) -> list[SceneEntry]:
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


def parse_index(lines: Iterable[bytes], path: Path) -> list[SceneEntry]:
    """Entries from the lines of an index; raises DatasetError naming the first bad line."""
    lines = list(lines)
    collecting = gc.isenabled()
    gc.disable()  # it would walk the growing list again and again: two thirds of the time
    try:
        return [SceneEntry.from_values(values) for values in json.loads(b"[" + b",".join(lines) + b"]")]
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
