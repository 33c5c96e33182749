"""Rows of clips for an evaluation: of a checkpoint, of its image part, of its autoencoder, and of the procedural world.

A row is a folder of MP4 files with their records; clips that exist with the same settings are kept. Clips are sampled
in batches, each with its own prompt and noise. The noise depends on the clip's number alone, so a row can grow later.
Measuring is not here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.checkpoint import first_stage_tensors, identity
from ldm.data.world import UnseenScene
from ldm.errors import UserError
from ldm.modules.posterior import posterior_mean
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.loop import decode_chunks
from ldm.sampling.record import device_and_threads, hash_weights, versions
from ldm.sampling.request import read_request
from ldm.sampling.settings import PRECISIONS, ClipSettings
from ldm.video import from_uint8, read_metadata, read_video, to_uint8, write_mp4

BATCH_FRAMES = 40  # larger batches are no faster on a CPU
DECODE_CHUNK = 4
ALONE = "per-frame image model"
AUTOENCODED = "true, autoencoded"
TRUE = "true"
ORIGIN = ("command", "machine", "versions")  # keys of a record that may differ for a clip to be kept

Advance = Callable[[int], object]  # called with the number of clips done


@dataclass(frozen=True)
class WantedClip:
    """A clip to sample: its number in the row, the seed of its noise, its prompt."""

    number: int
    seed: int
    prompt: str


@dataclass(frozen=True)
class MadeRow:
    """The files of a row, in order."""

    name: str
    files: tuple[Path, ...]
    is_reference: bool


@torch.no_grad()
def autoencode(generator: ClipGenerator, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 `t h w 3` reconstructed by the image autoencoder and temporal decoder."""
    pixels = from_uint8(frames).to(generator.device).split(DECODE_CHUNK)
    latents = torch.cat([posterior_mean(generator.first_stage.encode(part)) for part in pixels])
    decoded = decode_chunks(generator.first_stage, latents, 1.0, DECODE_CHUNK, None, generator.temporal_decoder)
    return np.concatenate([to_uint8(part) for part in decoded])


def autoencoder_identity(generator: ClipGenerator) -> str:
    """The sha256 of the weights of image autoencoder and temporal decoder, and of its settings."""
    decoder, layers = generator.temporal_decoder, {}
    if decoder is not None:
        layers = {**decoder.state_dict(), "brightness_area": torch.tensor(decoder.brightness_area)}
    return identity({**first_stage_tensors(generator.checkpoint), **layers})


class SampledRows:
    """The rows of one checkpoint.

    clip: options as in `request.read_request`. folder: parent of the rows' folders. command: for the records.
    """

    def __init__(
        self, generator: ClipGenerator, name: str, clip: Mapping[str, Any], folder: Path, command: str
    ) -> None:
        self.generator, self.name, self.folder, self.clip = generator, name, folder, dict(clip)
        self.settings = self.settings_at(None)
        if self.settings.frames < 2:
            raise UserError(
                f"{generator.checkpoint.path}: expected clips of at least 2 frames, found {self.settings.frames}; set "
                "--frames, as one frame has no motion"
            )
        self.base = {
            "checkpoint": hash_weights(generator.checkpoint.path),
            "temporal": None,
            "config": None,
            "precision": next(name for name, dtype in PRECISIONS.items() if dtype == generator.dtype),
            "decode_chunk": DECODE_CHUNK,
            "given": {},
            "machine": device_and_threads(generator.device),
            "versions": versions(),
            "command": command,
        }
        self._prompts_read: set[str] = set()

    def settings_at(self, fps: float | None) -> ClipSettings:
        """The settings, at another frame rate unless it is None."""
        rate = {} if fps is None else {"fps": fps}
        return read_request({**self.clip, "prompt": "", **rate}, self.generator).settings

    def sampled(self, wanted: Sequence[WantedClip], advance: Advance, fps: float | None = None) -> MadeRow:
        """The checkpoint's own row, at another frame rate unless that is None."""
        return MadeRow(self.name, self._make(self.settings_at(fps), wanted, advance), is_reference=False)

    def alone(self, wanted: Sequence[WantedClip], advance: Advance, name: str = ALONE) -> MadeRow:
        """Clips of independent images from the image part of the network."""
        settings = replace(self.settings, window=self.settings.frames, motion_scale=1.0)
        return MadeRow(name, self._make(settings, wanted, advance, images_only=True), is_reference=True)

    def autoencoded(self, true: MadeRow, advance: Advance, name: str = AUTOENCODED) -> MadeRow:
        """True clips reconstructed by the autoencoder of the checkpoint."""
        which = autoencoder_identity(self.generator)
        folder = _row_folder(self.folder, AUTOENCODED, which[:8], self.settings.frames, self.settings.fps)
        for source in true.files:
            record = {**read_metadata(source), "row": AUTOENCODED, "autoencoder": which}
            if not _exists(folder / source.name, record):
                frames, fps = read_video(source)
                write_mp4(folder / source.name, autoencode(self.generator, frames), fps, record)
            advance(1)
        return MadeRow(name, tuple(folder / source.name for source in true.files), is_reference=True)

    def _make(
        self, settings: ClipSettings, wanted: Sequence[WantedClip], advance: Advance, images_only: bool = False
    ) -> tuple[Path, ...]:
        """The files of the wanted clips; missing ones are sampled."""
        kind = {"row": ALONE} if images_only else {}
        folder = _row_folder(self.folder, self.name, kind.get("row", ""), settings.frames, settings.fps)
        records = {clip.number: self._record(settings, clip, kind) for clip in wanted}
        files = {clip.number: folder / f"{clip.number:05}.mp4" for clip in wanted}
        missing = [clip for clip in wanted if not _exists(files[clip.number], records[clip.number])]
        advance(len(wanted) - len(missing))
        self._read_prompts([*(clip.prompt for clip in missing), settings.negative_prompt] if missing else [])
        batch_size = max(1, BATCH_FRAMES // settings.frames)
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            seeds, prompts = [clip.seed for clip in batch], [clip.prompt for clip in batch]
            options = {"prompts": prompts, "images_only": images_only}
            clips = self.generator.generate(settings, seeds, DECODE_CHUNK, **options)
            for clip, frames in zip(batch, clips, strict=True):
                write_mp4(files[clip.number], frames, settings.fps, records[clip.number])
            advance(len(batch))
        return tuple(files.values())

    def _read_prompts(self, prompts: Sequence[str]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts_read]
        if new:
            self.generator.read_prompts(new)
            self._prompts_read.update(new)

    def _record(self, settings: ClipSettings, clip: WantedClip, kind: Mapping[str, str]) -> dict[str, Any]:
        """A record as in `ldm.sampling.record`; clips of the image part have the key `row` too."""
        own = {"seed": clip.seed, "batch": {"seeds": [clip.seed], "index": 0}}
        return {**self.base, "clip": {**asdict(settings), "prompt": clip.prompt}, **own, **kind}


def true_row(
    scenes: Sequence[UnseenScene], frames: int, size: tuple[int, int], fps: float, folder: Path, advance: Advance
) -> MadeRow:
    """The scenes' clips of `frames` frames, size (h, w), rendered every time; each has a caption as its prompt."""
    folder = _row_folder(folder, TRUE, "", frames, fps)
    files = []
    for number, scene in enumerate(scenes):
        clip = scene.draw(frames, size, fps)
        files.append(folder / f"{number:05}.mp4")
        record = {
            "row": TRUE,
            "clip": {"prompt": scene.caption_of(clip), "look": scene.look, "fps": fps},
            "seed": scene.seed,
            "sha256": hashlib.sha256(clip.frames.tobytes()).hexdigest(),
        }
        write_mp4(files[-1], clip.frames, fps, record)
        advance(1)
    return MadeRow(TRUE, tuple(files), is_reference=True)


def _row_folder(folder: Path, name: str, row: str, frames: int, fps: float) -> Path:
    """The folder of a row's clips; created if missing."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(filter(None, (name, row))))
    found = folder / f"{stem}-{frames}-at-{fps:g}"
    found.mkdir(parents=True, exist_ok=True)
    return found


def _exists(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the clip exists with this record, `ORIGIN` aside."""
    if not path.is_file():
        return False
    try:
        found = read_metadata(path)
    except UserError:
        return False
    anywhere = dict.fromkeys(ORIGIN)
    return {**found, **anywhere} == {**json.loads(json.dumps(record)), **anywhere}  # as read from a file
