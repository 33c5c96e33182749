"""Rows of clips to evaluate, made here: by a checkpoint, by its image part alone, and true ones of the drawn world.

Clips lie as MP4 files with their settings inside, a folder for each row, and one that is there already with the same
settings is not made again. Several are made at a time, each with its own prompt and noise; the noise depends on the
clip's number alone, so that more clips can be added later. How rows are measured is not told here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoint import first_stage_tensors, identity
from ldm.data.world import UnseenScene
from ldm.diffusion.noise import NoiseFamily
from ldm.errors import UserError
from ldm.modules.posterior import posterior_mean
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.loop import decode_chunks
from ldm.sampling.record import device_and_threads, hash_weights, versions
from ldm.sampling.request import read_request
from ldm.sampling.settings import PRECISIONS, ClipSettings
from ldm.video import from_uint8, read_metadata, read_video, to_uint8, write_mp4

FRAMES_AT_A_TIME = 40  # made as one batch on a CPU, where more are no faster
DECODE_CHUNK = 4
ALONE = "per-frame image model"
AUTOENCODED = "true, autoencoded"
TRUE = "true"
WHEREABOUTS = ("command", "machine", "versions")  # of a record: clips that differ in these alone are not made again

Advance = Callable[[int], object]  # called with the number of clips that are done


@dataclass(frozen=True)
class Wanted:
    """One clip to be made: its number in the row, the seed of its noise, its prompt."""

    number: int
    seed: int
    prompt: str


@dataclass(frozen=True)
class MadeRow:
    """The files of a row, in order."""

    name: str
    files: tuple[Path, ...]
    is_reference: bool


class RowGenerator(ClipGenerator):
    """A checkpoint that makes several clips at a time, each from a prompt of its own."""

    def generate_each(self, settings: ClipSettings, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        """Frames uint8 `t h w 3` of each clip, whose prompts take the place of the settings' one.

        All of them, and the negative prompt, must have been read before.
        """
        together = "together: " + "\n".join(clip.prompt for clip in wanted)
        self._contexts[together] = torch.cat([self._contexts[clip.prompt] for clip in wanted])
        frames = self.generate(replace(settings, prompt=together), [clip.seed for clip in wanted], DECODE_CHUNK)
        del self._contexts[together]
        return frames

    def without_time(self) -> RowGenerator:
        """The same networks without the layers over time; frames have nothing in common but their prompt."""
        alone = copy.copy(self)
        alone._unet, alone.noise = ImagesAlone(self.unet), NoiseFamily()
        alone._decoder_source = alone._temporal_decoder = None
        return alone

    @torch.no_grad()
    def autoencode(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 `t h w 3` as the image autoencoder gives them back."""
        pixels = from_uint8(frames).to(self.device).split(DECODE_CHUNK)
        latents = torch.cat([posterior_mean(self.first_stage.encode(part)) for part in pixels])
        decoded = decode_chunks(self.first_stage, latents, 1.0, DECODE_CHUNK, None, self.temporal_decoder)
        return np.concatenate([to_uint8(part) for part in decoded])

    def identity_of_autoencoder(self) -> str:
        """The sha256 of its weights, a temporal decoder's and how it is joined among them."""
        decoder, layers = self.temporal_decoder, {}
        if decoder is not None:
            layers = {**decoder.state_dict(), "brightness_area": torch.tensor(decoder.brightness_area)}
        return identity({**first_stage_tensors(self.checkpoint), **layers})


class ImagesAlone(nn.Module):
    """A network whose clips are images: time takes no part in any of them, nor does the frame rate."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.has_known_level = unet.has_known_level

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, *, known_level: Tensor | None = None) -> Tensor:
        return self.unet(x, timesteps, context, enable_time=False, known_level=known_level)


class SampledRows:
    """The rows that one checkpoint makes.

    clip: settings as in `clip_requests.read_request`; what it does not name is as the checkpoint suggests.
    folder: the rows' folders are made here.
    words: the command line, for the records.
    """

    def __init__(self, generator: RowGenerator, name: str, clip: Mapping[str, Any], folder: Path, words: str) -> None:
        self.generator, self.name, self.folder, self.clip = generator, name, folder, dict(clip)
        self.settings = self.settings_at(None)
        if self.settings.frames < 2:
            raise UserError(
                f"{generator.checkpoint.path}: expected clips of at least 2 frames, found {self.settings.frames}; set "
                "--frames, as nothing moves in a single picture"
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
            "command": words,
        }
        self._prompts_read: set[str] = set()

    def settings_at(self, fps: float | None) -> ClipSettings:
        """The settings, at another frame rate unless it is None."""
        rate = {} if fps is None else {"fps": fps}
        return read_request({**self.clip, "prompt": "", **rate}, self.generator).settings

    def sampled(self, wanted: Sequence[Wanted], advance: Advance, fps: float | None = None) -> MadeRow:
        """The checkpoint's own row, at another frame rate unless that is None."""
        settings = self.settings_at(fps)
        files = self._make(lambda: self.generator, settings, wanted, {}, advance)
        return MadeRow(self.name, files, is_reference=False)

    def alone(self, wanted: Sequence[Wanted], advance: Advance, name: str = ALONE) -> MadeRow:
        """What the image part of the network makes of each frame by itself."""
        settings = replace(self.settings, window=self.settings.frames, motion_scale=1.0)
        files = self._make(self.generator.without_time, settings, wanted, {"row": ALONE}, advance)
        return MadeRow(name, files, is_reference=True)

    def autoencoded(self, true: MadeRow, advance: Advance, name: str = AUTOENCODED) -> MadeRow:
        """True clips as the image autoencoder of the checkpoint gives them back."""
        which = self.generator.identity_of_autoencoder()
        folder = _row_folder(self.folder, AUTOENCODED, which[:8], self.settings.frames, self.settings.fps)
        for source in true.files:
            record = {**read_metadata(source), "row": AUTOENCODED, "autoencoder": which}
            if not _is_there(folder / source.name, record):
                frames, fps = read_video(source)
                write_mp4(folder / source.name, self.generator.autoencode(frames), fps, record)
            advance(1)
        return MadeRow(name, tuple(folder / source.name for source in true.files), is_reference=True)

    def _make(
        self,
        network: Callable[[], RowGenerator],
        settings: ClipSettings,
        wanted: Sequence[Wanted],
        kind: Mapping[str, str],
        advance: Advance,
    ) -> tuple[Path, ...]:
        """The files of the wanted clips; those that are missing are made by what `network` gives."""
        folder = _row_folder(self.folder, self.name, kind.get("row", ""), settings.frames, settings.fps)
        records = {clip.number: self._record(settings, clip, kind) for clip in wanted}
        files = {clip.number: folder / f"{clip.number:05}.mp4" for clip in wanted}
        missing = [clip for clip in wanted if not _is_there(files[clip.number], records[clip.number])]
        advance(len(wanted) - len(missing))
        if missing:
            self._read_prompts([*(clip.prompt for clip in missing), settings.negative_prompt])
            made_by, at_a_time = network(), max(1, FRAMES_AT_A_TIME // settings.frames)
            for start in range(0, len(missing), at_a_time):
                batch = missing[start : start + at_a_time]
                for clip, frames in zip(batch, made_by.generate_each(settings, batch), strict=True):
                    write_mp4(files[clip.number], frames, settings.fps, records[clip.number])
                advance(len(batch))
        return tuple(files.values())

    def _read_prompts(self, prompts: Sequence[str]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts_read]
        if new:
            self.generator.read_prompts(new)
            self._prompts_read.update(new)

    def _record(self, settings: ClipSettings, clip: Wanted, kind: Mapping[str, str]) -> dict[str, Any]:
        """What a clip is made from, as in `provenance`; what is made with the image part alone has `row` besides."""
        alone = {"seed": clip.seed, "batch": {"seeds": [clip.seed], "index": 0}}
        return {**self.base, "clip": {**asdict(settings), "prompt": clip.prompt}, **alone, **kind}


def true_row(
    scenes: Sequence[UnseenScene], frames: int, size: tuple[int, int], fps: float, folder: Path, advance: Advance
) -> MadeRow:
    """The scenes' clips of `frames` frames, size (h, w), drawn anew each time; a caption in each as its prompt."""
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
    """Where the clips of a row lie; made if it is not there."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(filter(None, (name, row))))
    found = folder / f"{words}-{frames}-at-{fps:g}"
    found.mkdir(parents=True, exist_ok=True)
    return found


def _is_there(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the clip was made before, with this record but for when and where."""
    if not path.is_file():
        return False
    try:
        found = read_metadata(path)
    except UserError:
        return False
    anywhere = dict.fromkeys(WHEREABOUTS)
    return {**found, **anywhere} == {**json.loads(json.dumps(record)), **anywhere}  # as it comes back from a file
