"""A part: the prepared scenes of one video before they are copied into shards, a tar and a note (JSON) beside it.

Any process on any machine may write a part; it counts as finished once its note exists.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.shards.index import SCHEMA_VERSION, SceneEntry
from ldm.data.shards.writer import ShardWriter
from ldm.files import parse_json, replacing, write_atomically

_SHA256 = re.compile("[0-9A-Za-z_-]{1,128}")


@dataclass(frozen=True)
class EncodingSettings:
    """Settings shared by all scenes of a prepared folder; other settings need another folder."""

    first_stage: str
    text_encoder: str
    scale_factor: float
    fps: float
    size: list[int]  # height, width
    num_tokens: int  # of a caption's embedding


@dataclass
class Dropped:
    """A range of frames, at the prepared rate, that was left out, and the reason."""

    start: int
    stop: int
    reason: str


@dataclass
class VideoReport:
    """The result of preparing one video; a line of `videos.jsonl`."""

    source: str
    sha256: str
    captions: list[str]
    num_scenes: int = 0
    num_frames: int = 0
    dropped: list[Dropped] = field(default_factory=list)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> VideoReport:
        """From parsed JSON; raises KeyError, TypeError or ValueError."""
        report = cls(**{**values, "dropped": [Dropped(**dropped) for dropped in values["dropped"]]})
        counts = (report.num_scenes, report.num_frames)
        if not isinstance(report.sha256, str) or not _SHA256.fullmatch(report.sha256):  # it names a file
            raise ValueError(f"sha256: found {str(report.sha256)[:80]!r}")
        if not all(isinstance(text, str) for text in (report.source, *report.captions)):
            raise ValueError("source and captions: expected strings")
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"num_scenes, num_frames: found {counts}")
        return report


@dataclass(frozen=True, order=True)
class Broken:
    """A video that cannot be prepared, and the reason; a line of `broken.jsonl`."""

    source: str
    sha256: str
    reason: str

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Broken:
        """From parsed JSON; raises TypeError or ValueError."""
        broken = cls(**values)
        if not all(isinstance(text, str) for text in asdict(broken).values()):
            raise ValueError("source, sha256 and reason: expected strings")
        return broken


def json_line(record: VideoReport | Broken) -> str:
    """A record as one line of JSON, with its newline."""
    return json.dumps(asdict(record), ensure_ascii=False) + "\n"


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PartWriter:
    """Writes the scenes of one video and counts them in `report`."""

    def __init__(self, report: VideoReport, settings: EncodingSettings, shard: ShardWriter) -> None:
        self.report = report
        self.entries: list[SceneEntry] = []
        self._settings = settings
        self._shard = shard

    def add(
        self, frames: range, moments: np.ndarray, contexts: list[np.ndarray], notes: Mapping[str, Any] | None = None
    ) -> None:
        """Store the scene of `frames`: moments float16 `t 2c h w`, an embedding float16 `n d` per caption.

        notes: JSON values stored with the scene; not part of its key.
        """
        report, fps = self.report, self._settings.fps
        about = {"source": report.source, "start": frames.start, "fps": fps, "captions": report.captions}
        about |= {"notes": dict(notes)} if notes else {}
        self.entries.append(self._shard.add(self._key(frames), about, moments, contexts))
        self.report.num_scenes += 1
        self.report.num_frames += len(moments)

    def drop(self, frames: range, reason: str) -> None:
        """Report that `frames` are left out."""
        self.report.dropped.append(Dropped(frames.start, frames.stop, reason))

    def _key(self, frames: range) -> str:
        identity = {
            "schema_version": SCHEMA_VERSION,
            **asdict(self._settings),
            "source": self.report.sha256,
            "captions": self.report.captions,
            "frames": [frames.start, frames.stop],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class Note:
    """A finished part: the report of its video, the scenes in its tar, and the folder of both files."""

    video: VideoReport
    scenes: list[SceneEntry]
    folder: Path

    @classmethod
    def from_json(cls, text: str | bytes, folder: Path) -> Note:
        """Parse a note; raises KeyError, TypeError or ValueError."""
        values = parse_json(text)
        scenes = [SceneEntry.from_line(line) for line in values["scenes"]]
        return cls(VideoReport.from_values(values["video"]), scenes, folder)

    def to_json(self) -> str:
        """The text of the note."""
        values = {"video": asdict(self.video), "scenes": [entry.to_line() for entry in self.scenes]}
        return json.dumps(values, ensure_ascii=False)


class PartFolder:
    """A folder of parts, all with the same settings."""

    def __init__(self, folder: Path, settings: EncodingSettings) -> None:
        self.folder, self.settings = folder, settings

    @contextmanager
    def video(self, source: str, sha256: str, captions: list[str]) -> Iterator[PartWriter]:
        """Write one video's scenes; the part is finished when the block ends without an error."""
        part = self.folder / f"{sha256}.tar"
        with replacing(part) as partial, ShardWriter(partial, part.name) as shard:
            writer = PartWriter(VideoReport(source, sha256, captions), self.settings, shard)
            yield writer
        write_atomically(part.with_suffix(".json"), Note(writer.report, writer.entries, self.folder).to_json())

    def adopt(self, note: str, content: Iterable[bytes]) -> VideoReport:
        """Store a part that another process wrote: its note, and the pieces of its tar."""
        found = Note.from_json(note, self.folder)
        part = self.folder / f"{found.video.sha256}.tar"
        with replacing(part) as partial, partial.open("wb") as file:
            for piece in content:
                file.write(piece)
        write_atomically(part.with_suffix(".json"), note)
        return found.video
