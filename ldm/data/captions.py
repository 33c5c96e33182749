"""Captions of videos: one for all, a text file beside each, or a table."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.errors import UserError

_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MAX_BYTES = 2**26  # of a table
THREE_WAYS = (
    "give one to all videos (--prompt TEXT), put a text file of the same name beside the video (drive.mp4, drive.txt; "
    "one caption a line), or give a table (--captions FILE.csv with the columns file,caption)"
)


def find_captions(
    videos: Mapping[Path, str], prompt: str | None = None, table: Path | str | None = None
) -> tuple[dict[Path, list[str]], list[str]]:
    """The captions of each video, and the files of the table that belong to no video.

    `videos` maps paths to the names they have in the data set. With `prompt` every video has that one; else those of
    the table, else those in the text file beside it. A video without a caption is absent from the result. Raises
    UserError when no video has one and when the table or a text file cannot be read.
    """
    if prompt is not None:
        if not prompt.strip():
            raise UserError("--prompt: expected a caption, found only blanks")
        return {path: [prompt.strip()] for path in videos}, []
    rows = read_table(table) if table is not None else {}
    captions: dict[Path, list[str]] = {}
    used: set[str] = set()
    for path, name in videos.items():
        row = next((key for key in (name, str(path), str(path.resolve()), path.name) if key in rows), None)
        if row is not None:
            used.add(row)
        found = rows[row] if row is not None else read_sidecar(path)
        if found:
            captions[path] = found
    if not captions:
        raise UserError(f"none of the {len(videos)} videos has a caption: {THREE_WAYS}")
    return captions, sorted(set(rows) - used)


def read_sidecar(video: Path) -> list[str]:
    """The captions in the `.txt` beside a video, one a line; empty when there is none."""
    path = video.with_suffix(".txt")
    if not path.is_file() or path == video:
        return []
    return _distinct(_read_text(path).splitlines())


def read_table(path: Path | str) -> dict[str, list[str]]:
    """Captions by file from a CSV with the columns `file` and `caption`; a file may have several rows."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such table of captions; expected a CSV with the columns file,caption")
    try:
        return _rows(path)
    except csv.Error as error:
        raise UserError(f"{path}: expected a CSV with the columns file,caption, found another ({error})") from error


def _rows(path: Path) -> dict[str, list[str]]:
    reader = csv.DictReader(_read_text(path).splitlines(keepends=True), skipinitialspace=True)
    if not {"file", "caption"} <= set(reader.fieldnames or []):
        found = ", ".join(reader.fieldnames or []) or "nothing"
        raise UserError(f"{path}: expected a first line with the columns file,caption, found {found}")
    rows: dict[str, list[str]] = {}
    for row in reader:
        if row["file"] and row["caption"]:
            rows.setdefault(Path(row["file"].strip()).as_posix(), []).append(row["caption"])
    return {file: _distinct(captions) for file, captions in rows.items()}


def _distinct(captions: Sequence[str]) -> list[str]:
    """Without blanks at the ends, letters that steer a terminal, and what is there twice."""
    texts = (_STEERING.sub(" ", caption).split() for caption in captions)
    return list(dict.fromkeys(" ".join(words) for words in texts if words))


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: expected a text of captions, at most {MAX_BYTES:,} bytes, found a longer file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8, found a byte that is none at {error.start}") from error
