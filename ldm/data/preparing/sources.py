"""Footage with captions -> scenes: captions of videos, the frozen encoders, and the preparation of one source.

The folder that is written is `preparation`'s; clips of the procedural world are sources too (`ldm.data.world.sources`).
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import DictConfig

from ldm import checkpoint
from ldm.checkpoint.names import FIRST_STAGE_PREFIX, TEXT_PREFIX
from ldm.data.preparing.footage import FootageError, find_scenes, probe, read_frames
from ldm.data.preparing.parts import EncodingSettings, PartFolder, VideoReport, hash_file
from ldm.data.preparing.preparation import Preparation
from ldm.errors import UserError
from ldm.modules.posterior import posterior_mean
from ldm.video import from_uint8, to_uint8

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MAX_BYTES = 2**26  # of a file of captions
THREE_WAYS = (
    "give one to all videos (--prompt TEXT), put a text file of the same name beside the video (drive.mp4, drive.txt; "
    "one caption a line), or give a table (--captions FILE.csv with the columns file,caption)"
)


def find_captions(
    videos: Mapping[Path, str], prompt: str | None = None, table: Path | str | None = None
) -> tuple[dict[Path, list[str]], list[str]]:
    """The captions of each video, and the files that the table names but `videos` does not.

    videos: path -> name in the data set. Captions come from `prompt`, otherwise from the table, otherwise from the text
    file beside the video. A video without captions is absent from the result. Raises UserError if no video has
    captions and if the table or a text file cannot be read.
    """
    if prompt is not None:
        if not prompt.strip():
            raise UserError("--prompt: expected a caption, found only spaces")
        return {path: [prompt.strip()] for path in videos}, []
    rows = read_table(table) if table is not None else {}
    captions: dict[Path, list[str]] = {}
    used: set[str] = set()
    for path, name in videos.items():
        row = next((key for key in (name, str(path), str(path.resolve()), path.name) if key in rows), None)
        if row is not None:
            used.add(row)
        if found := read_sidecar(path) if row is None else rows[row]:
            captions[path] = found
    if not captions:
        raise UserError(f"none of the {len(videos)} videos has a caption: {THREE_WAYS}")
    return captions, sorted(set(rows) - used)


def read_sidecar(video: Path) -> list[str]:
    """The captions in the `.txt` beside a video, one per line; empty without such a file."""
    path = video.with_suffix(".txt")
    if not path.is_file() or path == video:
        return []
    return _distinct(_read_text(path).splitlines())


def read_table(path: Path | str) -> dict[str, list[str]]:
    """Captions by file from a CSV with the columns `file` and `caption`; a file may have several rows."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such table; expected a CSV with the columns file,caption")
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
    """Captions without control characters, repeated spaces and duplicates."""
    texts = (_CONTROL.sub(" ", caption).split() for caption in captions)
    return list(dict.fromkeys(" ".join(words) for words in texts if words))


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: expected captions of at most {MAX_BYTES:,} bytes, found a larger file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, found an invalid byte at offset {error.start}") from error


KEPT_CAPTIONS = 256  # embeddings kept in memory; many clips share a caption


def identities(config: DictConfig) -> tuple[str, str]:
    """Hashes of the weights of the autoencoder and the text encoder that a config names."""
    tensors = checkpoint.encoder_tensors(config)
    first_stage, text_encoder = (
        checkpoint.identity({n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)})
        for prefix in (FIRST_STAGE_PREFIX, TEXT_PREFIX)
    )
    return first_stage, text_encoder


class Encoders:
    """The autoencoder and the text encoder that a config names, on the GPU if there is one."""

    def __init__(self, config: DictConfig) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        first_stage, text_encoder = checkpoint.load_encoders(config)
        self.first_stage, self.text_encoder = first_stage.to(self.device).eval(), text_encoder.to(self.device).eval()
        self.context = lru_cache(KEPT_CAPTIONS)(self._context)

    @torch.inference_mode()
    def moments(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Frames uint8 `h w 3` -> moments float16 `t 2c h w`."""
        moments = self.first_stage.encode(from_uint8(frames).to(self.device))
        return moments.half().cpu().numpy()

    @torch.inference_mode()
    def pictures(self, moments: np.ndarray) -> np.ndarray:
        """Moments `t 2c h w` -> decoded frames uint8 `t h w 3`."""
        means = posterior_mean(torch.from_numpy(moments.copy()).to(self.device).float())
        return np.concatenate([to_uint8(self.first_stage.decode(mean[None])) for mean in means])

    def cut_captions(self, captions: Iterable[str]) -> dict[str, str]:
        """Captions that the text encoder truncates -> the part that is lost."""
        lost = {caption: self.text_encoder.truncated(caption) for caption in captions}
        return {caption: end for caption, end in lost.items() if end}

    @torch.inference_mode()
    def _context(self, caption: str) -> np.ndarray:
        """A caption -> its embedding, float16 `n d`."""
        return self.text_encoder.encode([caption])[0].half().cpu().numpy()


CHUNK_PIXELS = 2 * 512 * 512  # encoded at a time
MAX_SCENE_FRAMES = 600  # longer scenes are stored in pieces: memory stays bounded


class Source(Protocol):
    """A video or a clip to prepare: its name in the data set, and a hash of its content."""

    name: str
    sha256: str
    num_frames: int  # at the prepared rate; an estimate until it is decoded

    def open(self, settings: EncodingSettings) -> Footage:
        """Open it. Raises FootageError at once or, for corruption further on, while its frames are read."""


@dataclass(frozen=True)
class Footage:
    """An opened source: its frames uint8 `h w 3`, and its scenes, consecutive ranges that cover all frames.

    shortest: scenes of fewer frames are dropped. notes: stored with each scene.
    """

    frames: Iterator[np.ndarray]
    scenes: Iterable[range]
    captions: list[str]
    shortest: int = 2
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoSource:
    """A readable video with captions."""

    name: str
    sha256: str
    num_frames: int
    path: Path
    captions: list[str]

    def open(self, settings: EncodingSettings) -> Footage:
        frames = read_frames(self.path, settings.fps, tuple(settings.size))
        return Footage(frames, find_scenes(self.path, settings.fps).scenes, self.captions)


@dataclass
class PreparePlan:
    """Sources to prepare, unusable files (name -> reason), and reports of what is prepared already."""

    sources: list[Source] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)
    done: list[VideoReport] = field(default_factory=list)

    def add(self, source: Source, report: VideoReport | None) -> None:
        """Add a source; report: its own if it is prepared already, otherwise None."""
        if report is None:
            self.sources.append(source)
        else:
            self.done.append(report)


def plan_videos(
    names: Iterable[tuple[Path, str]],
    captions: dict[Path, list[str]],
    preparation: Preparation,
    retry_broken: bool = False,
) -> PreparePlan:
    """Probe and hash every file; names: pairs of path and name in the data set.

    Videos that an earlier run found broken are unusable unless `retry_broken`.
    """
    plan = PreparePlan()
    found: dict[str, VideoSource] = {}
    twins: dict[str, list[str]] = {}
    for path, name in names:
        try:
            info = probe(path)
        except FootageError as error:
            plan.unusable[name] = str(error).removeprefix(f"{path}: ")
            continue
        if path not in captions:
            plan.unusable[name] = f"no caption: {THREE_WAYS}"
            continue
        sha256 = hash_file(path)
        if sha256 in found:
            plan.unusable[name] = f"the same bytes as {found[sha256].name}"
            twins.setdefault(sha256, []).append(name)
            continue
        num_frames = int(info.duration * preparation.settings.fps)
        found[sha256] = VideoSource(name, sha256, num_frames, path, captions[path])
    for sha256, source in found.items():
        if sha256 in preparation.broken and not retry_broken:
            reason = preparation.broken[sha256].reason
            plan.unusable[source.name] = f"{reason} (an earlier run found this; --retry-broken tries again)"
        else:
            plan.add(source, preparation.done(sha256, source.name, source.captions, twins.get(sha256, [])))
    return plan


def prepare_source(
    source: Source, preparation: Preparation | PartFolder, encoders: Encoders, advance: Callable[[int], None]
) -> VideoReport:
    """Encode and store all scenes of one source; calls `advance` with numbers of encoded frames.

    Raises FootageError if it cannot be decoded to its end; nothing of it is kept then.
    """
    footage = source.open(preparation.settings)
    contexts = [encoders.context(caption) for caption in footage.captions]
    height, width = preparation.settings.size
    per_chunk = max(1, CHUNK_PIXELS // (height * width))
    with preparation.video(source.name, source.sha256, footage.captions) as part:
        for piece in (piece for scene in footage.scenes for piece in split(scene)):
            moments = []
            for first in range(0, len(piece), per_chunk):
                chunk = list(islice(footage.frames, min(per_chunk, len(piece) - first)))
                assert chunk, "the scenes of a source count all its frames"
                moments.append(encoders.moments(chunk))
                advance(len(chunk))
            scene = np.concatenate(moments)
            if len(scene) < footage.shortest:
                part.drop(piece, "a single frame between two cuts")
            elif not np.isfinite(scene).all():
                part.drop(piece, "the autoencoder returned infinite values or NaN")
            else:
                part.add(piece, scene, contexts, footage.notes)
        deque(footage.frames, maxlen=0)  # run ffmpeg to its end: it may still report an error
    return part.report


def split(scene: range) -> Iterator[range]:
    """The fewest equal pieces of a scene that are no longer than `MAX_SCENE_FRAMES`."""
    num_pieces = -(-len(scene) // MAX_SCENE_FRAMES)
    edges = [scene.start + len(scene) * piece // num_pieces for piece in range(num_pieces + 1)]
    return (range(start, stop) for start, stop in pairwise(edges))
