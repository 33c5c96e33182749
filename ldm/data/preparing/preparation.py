"""Filling a prepared folder: finished videos are skipped, a kill loses at most one video, the bytes are the same.

Each video becomes a part (`parts.py`) in `.unfinished/`. `finish` copies the scenes in a fixed order into shards and
then writes the index. Every step ends with an atomic rename: after a kill, the same command resumes; shards of earlier
runs are never modified. With `--shard`, each process has its own folder in `.unfinished/` and none of them finishes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from ldm.data.preparing.parts import Broken, EncodingSettings, Note, PartFolder, PartWriter, VideoReport, json_line
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
from ldm.data.shards.index import write_columns
from ldm.data.shards.writer import ShardWriter, npy_bytes
from ldm.files import parse_json, replacing, write_atomically

_NUMBERED = re.compile(r"shard-([0-9]{1,12})\.tar")
SHARD_BYTES = 256 * 2**20
WORK_FOLDER = ".unfinished"
SETTINGS_FILE, BROKEN_FILE = "settings.json", "broken.jsonl"
FINISH_OR_FRESH = "choose a fresh --out (what is there stays as it is)"


class Preparation:
    """The folder `out` while it is filled; one process at a time, or one per share.

    share: (i, n): this process prepares the i-th of n shares of the videos, i from 1. Raises DatasetError if `out` has
    other settings, if it is incomplete, and if another process is writing to it.
    """

    def __init__(
        self,
        out: Path | str,
        settings: EncodingSettings,
        shard_bytes: int = SHARD_BYTES,
        share: tuple[int, int] = (1, 1),
    ) -> None:
        self.out = Path(out)
        self.settings = settings
        self.work = self.out / WORK_FOLDER
        self._shard_bytes = shard_bytes
        if self.out.exists() and not self.out.is_dir():
            raise DatasetError(f"{self.out}: expected a folder to write into, found a file")
        self._check_settings()
        self._own = self.work if share == (1, 1) else self.work / f"{share[0]}-of-{share[1]}"
        self._own.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock(self.work, fcntl.LOCK_EX if self._own == self.work else fcntl.LOCK_SH)
        self._own_lock = self._lock if self._own == self.work else self._take_lock(self._own, fcntl.LOCK_EX)
        self._check_settings()  # another process may have started meanwhile
        write_atomically(self._own / SETTINGS_FILE, json.dumps(asdict(settings)))
        if self._own != self.work:
            os.replace(self._own / SETTINGS_FILE, self.work / SETTINGS_FILE)
        self._parts = PartFolder(self._own, settings)
        with _reading(self.out / VIDEOS_FILE, FINISH_OR_FRESH) as lines:
            self._committed_videos = [VideoReport.from_values(parse_json(line)) for line in lines.splitlines()]
        self.reports = {report.sha256: report for report in self._committed_videos}
        self._rivals: dict[str, list[VideoReport]] = {}  # by sha256: parts that are not in the index yet
        for note in self._notes():
            self._rivals.setdefault(note.video.sha256, []).append(note.video)
            self.reports[note.video.sha256] = note.video
        self.broken = self._read_broken()

    @property
    def has_empty_context(self) -> bool:
        """Whether the embedding of the empty prompt is stored already."""
        return (self.out / DATASET_FILE).is_file() or self._empty_context() is not None

    def store_empty_context(self, context: np.ndarray) -> None:
        """Store the embedding of the empty prompt, `n d`; `finish` moves it to the prepared folder."""
        write_atomically(self._own / EMPTY_FILE, npy_bytes(context.astype(np.float16)))

    def done(self, sha256: str, source: str, captions: list[str], twins: Collection[str] = ()) -> VideoReport | None:
        """The report of a video that is prepared already, or None. Raises DatasetError if its captions were others.

        twins: names of files with the same bytes; their parts count as this video's only once they are in the index.
        """
        for rival in self._rivals.get(sha256, []):
            if rival.source == source:
                self.reports[sha256] = rival
        report = self.reports.get(sha256)
        if report is not None and sha256 in self._rivals and report.source != source and report.source in twins:
            return None
        if report is not None and report.captions != captions:
            raise DatasetError(
                f"{self.out}: {source} was prepared with the captions {report.captions}, now they are {captions}: "
                f"{FINISH_OR_FRESH}"
            )
        return report

    @contextmanager
    def video(self, source: str, sha256: str, captions: list[str]) -> Iterator[PartWriter]:
        """Write one video's scenes; the part is finished when the block ends without an error."""
        with self._parts.video(source, sha256, captions) as writer:
            yield writer
        self.reports[sha256] = writer.report
        self.broken.pop(sha256, None)

    def adopt(self, note: str, content: Iterable[bytes]) -> VideoReport:
        """Store a part that another process wrote with the same settings: its note, and the pieces of its tar."""
        report = self._parts.adopt(note, content)
        self.reports[report.sha256] = report
        self.broken.pop(report.sha256, None)
        return report

    def note_broken(self, source: str, sha256: str, reason: str) -> None:
        """Record that a video cannot be prepared; later runs skip it."""
        self.broken[sha256] = Broken(source, sha256, reason)
        write_atomically(self._own / BROKEN_FILE, "".join(json_line(broken) for broken in self.broken.values()))

    def leave(self) -> None:
        """Release the folder without finishing: other shares are still being prepared."""
        self._own_lock.close()
        self._lock.close()

    def finish(self) -> PreparedSet | None:
        """Copy all parts into shards, write the index, delete `.unfinished/`; None if the folder holds no scene."""
        notes = [note for note in self._notes() if note.video == self.reports[note.video.sha256]]
        notes = list({note.video.sha256: note for note in notes}.values())
        if notes:
            self._commit(self._assemble(notes), [note.video for note in notes])
        if (self.out / DATASET_FILE).is_file() and (self.broken or (self.out / BROKEN_FILE).is_file()):
            lines = [json_line(broken) for broken in sorted(self.broken.values())]
            write_atomically(self.out / BROKEN_FILE, "".join(lines))
        shutil.rmtree(self.work)
        self.leave()
        return PreparedSet(self.out) if (self.out / DATASET_FILE).is_file() else None

    @property
    def _begin_again(self) -> str:
        return f"delete the folder {self.work} (finished scenes lie outside it and stay), or {FINISH_OR_FRESH}"

    def _take_lock(self, folder: Path, kind: int) -> IO[str]:
        """Lock the whole folder or one share's; kind: LOCK_EX or LOCK_SH. Raises DatasetError if it is taken."""
        file = (folder / "lock").open("a+")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            which = "" if folder == self.work else f" (share {folder.name})"
            raise DatasetError(
                f"{self.out}: another scripts/prepare.py is writing here{which}; wait until it ends"
            ) from error
        return file

    def _check_settings(self) -> None:
        dataset, begun = self.out / DATASET_FILE, self.work / SETTINGS_FILE
        if dataset.is_file():
            info = asdict(read_info(self.out))
            found = {name: info[name] for name in asdict(self.settings)}
        elif begun.is_file():
            with _reading(begun, self._begin_again) as content:
                found = asdict(EncodingSettings(**parse_json(content)))
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
            PreparedSet(self.out)  # raises DatasetError: nothing is added to a corrupted folder

    def _notes(self) -> list[Note]:
        """The notes of all finished parts of all shares, in the order of the shards."""
        notes = []
        for path in [*self.work.glob("*.json"), *self.work.glob("*-of-*/*.json")]:
            if path.name == SETTINGS_FILE:
                continue
            with _reading(path, self._begin_again) as content:
                notes.append(Note.from_json(content, path.parent))
        return sorted(notes, key=lambda note: (note.video.source, note.video.sha256))

    def _read_broken(self) -> dict[str, Broken]:
        """Videos that this run or an earlier one could not prepare, by sha256."""
        broken = {}
        for path in [self.out / BROKEN_FILE, *self.work.glob(BROKEN_FILE), *self.work.glob(f"*-of-*/{BROKEN_FILE}")]:
            with _reading(path, FINISH_OR_FRESH if path.parent == self.out else self._begin_again) as lines:
                found = [Broken.from_values(parse_json(line)) for line in lines.splitlines()]
            broken.update((entry.sha256, entry) for entry in found if entry.sha256 not in self.reports)
        return broken

    def _empty_context(self) -> Path | None:
        """The file with the embedding of the empty prompt; all shares have the same."""
        paths = [self.work / EMPTY_FILE, *sorted(self.work.glob(f"*-of-*/{EMPTY_FILE}"))]
        return next((path for path in paths if path.is_file()), None)

    def _assemble(self, notes: list[Note]) -> list[SceneEntry]:
        """Copy the scenes of all parts into new shards; returns the whole index, existing entries first."""
        index = _read_lines(self.out / INDEX_FILE)
        keys = {entry.key for entry in index}
        for journal in sorted(self.work.glob("shard-*.jsonl")):  # an earlier run was killed here
            index += [entry for entry in _read_lines(journal) if entry.key not in keys]
        keys.update(entry.key for entry in index)
        readers = {folder: ShardReader(folder) for folder in {note.folder for note in notes}}
        parts = {entry.key: readers[note.folder] for note in notes for entry in note.scenes}
        numbers = (_NUMBERED.fullmatch(entry.shard) for entry in index)
        number = max((int(found[1]) for found in numbers if found), default=-1) + 1
        pending = [entry for note in notes for entry in note.scenes if entry.key not in keys]
        for group in _shard_loads(pending, self._shard_bytes):
            name = f"shard-{number:06d}.tar"
            with replacing(self.out / name) as partial, ShardWriter(partial, name) as shard:
                written = [_copy(parts[entry.key], entry, shard) for entry in group]
            write_atomically(self.work / f"{name[:-4]}.jsonl", "".join(entry.to_line() for entry in written))
            index += written
            keys.update(entry.key for entry in written)
            for note in notes:
                if all(entry.key in keys for entry in note.scenes):
                    (note.folder / f"{note.video.sha256}.tar").unlink(missing_ok=True)
            number += 1
        return index

    def _commit(self, index: list[SceneEntry], videos: list[VideoReport]) -> None:
        known = {report.sha256 for report in self._committed_videos}
        reports = self._committed_videos + [report for report in videos if report.sha256 not in known]
        if not index:  # no scene was kept: the folder stays free for other settings
            return
        write_atomically(self.out / VIDEOS_FILE, "".join(json_line(report) for report in reports))
        lines = [entry.to_line().encode() for entry in index]
        write_atomically(self.out / INDEX_FILE, b"".join(lines))
        write_columns(self.out, lines, index)
        if not (self.out / DATASET_FILE).is_file():
            write_atomically(self.out / EMPTY_FILE, self._empty_context().read_bytes())
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
            index_crc32=zlib.crc32(b"".join(lines)),
        )
        write_atomically(self.out / DATASET_FILE, info.to_json())

    def _stored_shape(self, entry: SceneEntry, span: Any) -> list[int]:
        """The shape in the header of an array in a shard."""
        with (self.out / entry.shard).open("rb") as file:
            file.seek(span.offset)
            np.lib.format.read_magic(file)
            return list(np.lib.format.read_array_header_1_0(file)[0])


def _copy(part: ShardReader, entry: SceneEntry, shard: ShardWriter) -> SceneEntry:
    return shard.copy(entry, [part.read_span(entry, span) for span in entry.spans])


def _shard_loads(entries: Iterable[SceneEntry], max_bytes: int) -> Iterator[list[SceneEntry]]:
    """Consecutive scenes grouped into shards of at most `max_bytes`; a larger scene gets its own shard."""
    load: list[SceneEntry] = []
    num_bytes = 0
    for entry in entries:
        size = sum(span.length for span in entry.spans)
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
    """The content of a file, empty if it is missing; errors while the block parses it become a DatasetError."""
    try:
        yield path.read_bytes() if path.is_file() else b""
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path}: corrupted, or written by another version of this project ({error}); {advice}"
        ) from error
