"""A prepared folder in the making: skip what is done, survive a kill at any moment, end with the same bytes.

Each video is prepared on its own into `.unfinished/`: a tar with its scenes and then a note of what it gave. When all
are there, `finish` copies the scenes in a fixed order into shards and only then writes the index. Every step ends with
a rename, so that after a kill the same command goes on where it was; shards of earlier runs are never touched.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.atomic import replacing, write_atomically
from ldm.data.shard_writer import ShardWriter, npy_bytes
from ldm.data.shards import (
    DATASET_FILE,
    EMPTY_FILE,
    INDEX_FILE,
    SCHEMA_VERSION,
    VIDEOS_FILE,
    DatasetError,
    DatasetInfo,
    PreparedSet,
    SceneEntry,
    ShardReader,
    parse_index,
    read_info,
)
from ldm.json_text import parse_json

_SHA256 = re.compile("[0-9A-Za-z_-]{1,128}")
_NUMBERED = re.compile(r"shard-([0-9]{1,12})\.tar")
SHARD_BYTES = 256 * 2**20
WORK_FOLDER = ".unfinished"
FINISH_OR_FRESH = "choose a fresh --out (what is there stays as it is)"


@dataclass(frozen=True)
class Settings:
    """What every scene of a prepared folder has in common; another value needs another folder."""

    first_stage: str
    text_encoder: str
    scale_factor: float
    fps: float
    size: list[int]  # height, width
    num_tokens: int  # of a caption's embedding


@dataclass
class Dropped:
    """A stretch of a video that was left out, in frames at the prepared rate, and why."""

    start: int
    stop: int
    reason: str


@dataclass
class VideoReport:
    """What one video gave; a line of `videos.jsonl`."""

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

    def to_line(self) -> str:
        """One line of JSON, with its newline."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PartWriter:
    """The scenes of one video on their way to disk."""

    def __init__(self, report: VideoReport, settings: Settings, shard: ShardWriter) -> None:
        self.report = report
        self.entries: list[SceneEntry] = []
        self._settings = settings
        self._shard = shard

    def add(
        self, frames: range, moments: np.ndarray, contexts: list[np.ndarray], notes: Mapping[str, Any] | None = None
    ) -> None:
        """Store the scene that is `frames` of the video: moments float16 `t 2c h w`, a float16 `n d` per caption.

        notes: plain values that are to be kept with the scene; they are no part of its key.
        """
        about: dict[str, Any] = {
            "source": self.report.source,
            "start": frames.start,
            "fps": self._settings.fps,
            "captions": self.report.captions,
        }
        if notes:
            about["notes"] = dict(notes)
        self.entries.append(self._shard.add(self._key(frames), about, moments, contexts))
        self.report.num_scenes += 1
        self.report.num_frames += len(moments)

    def drop(self, frames: range, reason: str) -> None:
        """Note that `frames` of the video are left out."""
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


class Preparation:
    """The folder `out` while it is being filled under `settings`; one process at a time.

    Raises DatasetError when `out` was prepared, or begun, with other settings, when its index is gone, and when
    another process is filling it.
    """

    def __init__(self, out: Path | str, settings: Settings, shard_bytes: int = SHARD_BYTES) -> None:
        self.out = Path(out)
        self.settings = settings
        self.work = self.out / WORK_FOLDER
        self._shard_bytes = shard_bytes
        if self.out.exists() and not self.out.is_dir():
            raise DatasetError(f"{self.out}: expected a folder to write into, found a file")
        self._check_settings()
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = (self.work / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DatasetError(f"{self.out}: another scripts/prepare.py is writing here; wait until it ends") from error
        write_atomically(self.work / "settings.json", json.dumps(asdict(settings)))
        with _reading(self.out / VIDEOS_FILE, FINISH_OR_FRESH) as lines:
            self._committed_videos = [VideoReport.from_values(parse_json(line)) for line in lines.splitlines()]
        self.reports = {report.sha256: report for report in self._committed_videos}
        self.reports.update((note["video"].sha256, note["video"]) for note in self._notes())

    @property
    def has_empty_context(self) -> bool:
        """Whether the embedding of the empty prompt is stored already."""
        return (self.out / DATASET_FILE).is_file() or (self.work / EMPTY_FILE).is_file()

    def store_empty_context(self, context: np.ndarray) -> None:
        """Store the embedding of the empty prompt, `n d`; it is these settings' own and moves out with the scenes."""
        write_atomically(self.work / EMPTY_FILE, npy_bytes(context.astype(np.float16)))

    def done(self, sha256: str, source: str, captions: list[str]) -> VideoReport | None:
        """The report of a video that is prepared already. Raises DatasetError when that was with other captions."""
        report = self.reports.get(sha256)
        if report is not None and report.captions != captions:
            raise DatasetError(
                f"{self.out}: {source} was prepared with the captions {report.captions}, now they are {captions}: "
                f"{FINISH_OR_FRESH}"
            )
        return report

    @contextmanager
    def video(self, source: str, sha256: str, captions: list[str]) -> Iterator[PartWriter]:
        """Write one video's scenes; they count only when the block ends without an error."""
        part = self.work / f"{sha256}.tar"
        with replacing(part) as partial, ShardWriter(partial, part.name) as shard:
            writer = PartWriter(VideoReport(source, sha256, captions), self.settings, shard)
            yield writer
        note = {"video": asdict(writer.report), "scenes": [entry.to_line() for entry in writer.entries]}
        write_atomically(part.with_suffix(".json"), json.dumps(note, ensure_ascii=False))
        self.reports[sha256] = writer.report

    def finish(self) -> PreparedSet | None:
        """Move everything prepared into shards, write the index, tidy up; None when the folder holds no scene."""
        notes = self._notes()
        if notes:
            self._commit(self._assemble(notes), [note["video"] for note in notes])
        shutil.rmtree(self.work)
        self._lock.close()
        return PreparedSet(self.out) if (self.out / DATASET_FILE).is_file() else None

    @property
    def _begin_again(self) -> str:
        return f"delete the folder {self.work} (what was finished lies outside it and stays), or {FINISH_OR_FRESH}"

    def _check_settings(self) -> None:
        dataset, begun = self.out / DATASET_FILE, self.work / "settings.json"
        if dataset.is_file():
            info = asdict(read_info(self.out))
            found = {name: info[name] for name in asdict(self.settings)}
        elif begun.is_file():
            with _reading(begun, self._begin_again) as content:
                found = asdict(Settings(**parse_json(content)))
        else:
            return
        differences = [
            f"{name} was {str(found[name])[:16]}, now {str(value)[:16]}"
            for name, value in asdict(self.settings).items()
            if found[name] != value
        ]
        if differences:
            raise DatasetError(
                f"{self.out}: prepared with other settings ({'; '.join(differences)}), which cannot be mixed: "
                f"repeat them or {FINISH_OR_FRESH}"
            )
        if dataset.is_file() and not (self.work.is_dir() and (self.out / INDEX_FILE).is_file()):
            PreparedSet(self.out)  # nothing is added to a damaged folder

    def _notes(self) -> list[dict[str, Any]]:
        """What each finished part holds, in the order in which it goes into the shards."""
        notes = []
        for path in self.work.glob("*.json"):
            if path.name == "settings.json":
                continue
            with _reading(path, self._begin_again) as content:
                note = parse_json(content)
                scenes = [SceneEntry.from_line(line) for line in note["scenes"]]
                notes.append({"video": VideoReport.from_values(note["video"]), "scenes": scenes})
        return sorted(notes, key=lambda note: (note["video"].source, note["video"].sha256))

    def _assemble(self, notes: list[dict[str, Any]]) -> list[SceneEntry]:
        """Copy the scenes of all parts into new shards; returns the whole index, old entries first."""
        index = _read_lines(self.out / INDEX_FILE)
        keys = {entry.key for entry in index}
        for journal in sorted(self.work.glob("shard-*.jsonl")):  # of a run that was killed while assembling
            index += [entry for entry in _read_lines(journal) if entry.key not in keys]
        keys.update(entry.key for entry in index)
        parts = ShardReader(self.work)
        numbers = (_NUMBERED.fullmatch(entry.shard) for entry in index)
        number = max((int(found[1]) for found in numbers if found), default=-1) + 1
        pending = [entry for note in notes for entry in note["scenes"] if entry.key not in keys]
        for group in _shard_loads(pending, self._shard_bytes):
            name = f"shard-{number:06d}.tar"
            with replacing(self.out / name) as partial, ShardWriter(partial, name) as shard:
                written = [_copy(parts, entry, shard) for entry in group]
            write_atomically(self.work / f"{name[:-4]}.jsonl", "".join(entry.to_line() for entry in written))
            index += written
            keys.update(entry.key for entry in written)
            for note in notes:
                if all(entry.key in keys for entry in note["scenes"]):
                    (self.work / f"{note['video'].sha256}.tar").unlink(missing_ok=True)
            number += 1
        return index

    def _commit(self, index: list[SceneEntry], videos: list[VideoReport]) -> None:
        known = {report.sha256 for report in self._committed_videos}
        reports = self._committed_videos + [report for report in videos if report.sha256 not in known]
        if not index:  # nothing was kept: the folder is not begun, other settings may try
            return
        write_atomically(self.out / VIDEOS_FILE, "".join(report.to_line() for report in reports))
        lines = "".join(entry.to_line() for entry in index).encode()
        write_atomically(self.out / INDEX_FILE, lines)
        if not (self.out / DATASET_FILE).is_file():
            write_atomically(self.out / EMPTY_FILE, (self.work / EMPTY_FILE).read_bytes())
        empty = (self.out / EMPTY_FILE).read_bytes()
        info = DatasetInfo(
            schema_version=SCHEMA_VERSION,
            **asdict(self.settings),
            moments_shape=self._stored_shape(index[0], index[0].latents)[1:],
            context_shape=self._stored_shape(index[0], index[0].contexts[0]),
            empty_context_crc32=zlib.crc32(empty),
            num_videos=sum(report.num_scenes > 0 for report in reports),
            num_scenes=len(index),
            num_frames=sum(entry.num_frames for entry in index),
            index_crc32=zlib.crc32(lines),
        )
        write_atomically(self.out / DATASET_FILE, info.to_json())

    def _stored_shape(self, entry: SceneEntry, span: Any) -> list[int]:
        """The shape in the header of an array that we wrote just now."""
        with (self.out / entry.shard).open("rb") as file:
            file.seek(span.offset)
            np.lib.format.read_magic(file)
            return list(np.lib.format.read_array_header_1_0(file)[0])


def _copy(parts: ShardReader, entry: SceneEntry, shard: ShardWriter) -> SceneEntry:
    latents = parts.read_span(entry, entry.latents)
    return shard.copy(entry, latents, [parts.read_span(entry, span) for span in entry.contexts])


def _shard_loads(entries: Iterable[SceneEntry], max_bytes: int) -> Iterator[list[SceneEntry]]:
    """Cut a list of scenes into runs that fill a shard each; a scene above the limit has a shard to itself."""
    load: list[SceneEntry] = []
    num_bytes = 0
    for entry in entries:
        size = entry.latents.length + sum(span.length for span in entry.contexts)
        if load and num_bytes + size > max_bytes:
            yield load
            load, num_bytes = [], 0
        load.append(entry)
        num_bytes += size
    if load:
        yield load


def _read_lines(path: Path) -> list[SceneEntry]:
    return parse_index(path.read_bytes().splitlines(), path) if path.is_file() else []


@contextmanager
def _reading(path: Path, advice: str) -> Iterator[bytes]:
    """Give a file's content, none if it is missing; a block that cannot make sense of it ends in a DatasetError."""
    try:
        yield path.read_bytes() if path.is_file() else b""
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path}: damaged, or of another version of this project ({error}); {advice}") from error
