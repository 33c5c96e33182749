"""Clip metrics while training: of sampled clips, beside those of the data's clips."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.callbacks.compute import ComputeCount
from ldm.callbacks.samples import Recipe, averaged, decode_clips, sample_latents
from ldm.callbacks.steps import StepLogger, log_metrics
from ldm.checkpoint import load_text_encoder_of
from ldm.data.batch import SceneRange
from ldm.data.clips import ClipDataModule, HeldOutClips
from ldm.errors import UserError
from ldm.evaluation.look_judge import load_style_classifier
from ldm.evaluation.metrics import BUNDLED_CLASSIFIER, MetricSet
from ldm.evaluation.text_alignment import style_alignment
from ldm.files import parse_json, write_atomically
from ldm.sampling.loop import initial_noise
from ldm.sharding import is_sharded

log = logging.getLogger(__name__)

Readings = dict[str, list[float | None]]  # metric -> one value per clip, None where it is undefined


class MotionLogger(StepLogger):
    """Samples clips with the averaged weights, if there are any, and measures them (`ldm.evaluation`).

    Captions and noise are always the same. Logs the means as `<tag>/<metric>` and those of the data as
    `<tag>_data/<metric>`: of held-out clips decoded by the image autoencoder at the same frame rate, measured once.
    `<tag>.json` in the run folder has every clip's values and, with a `ComputeCount` callback, the TFLOP so far, for
    scripts/curves.py. Values depend on the sampler and its steps: compare runs of the same settings only.

    Args:
        config, folder: of the run; filled in by main.py.
        prompts: captions of the clips, in turn; None: those of the data's held-out clips.
        every_n_steps: optimiser steps between measurements; there is one more at the end of training.
        at_start: also before the first step, where the image model alone is measured.
        num_clips: sampled clips, and clips of the data, at most.
        frames, fps: of a clip; None: as in training, at the highest rate.
        steps, sampler, scale: of the sampling loop, as in scripts/txt2vid.py; guidance (scale) doubles the cost.
        seed: of the noise; every clip has its own.
        judge: file of the style classifier, for text alignment where a caption names a style of the procedural world;
            None: the bundled one, if there is one.
        tag: of the file and the scalars, for several of these callbacks.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the keys of the config
        self,
        config: Mapping[str, Any],
        folder: str,
        prompts: Sequence[str] | None = None,
        every_n_steps: int = 1000,
        at_start: bool = True,
        num_clips: int = 16,
        frames: int | None = None,
        fps: float | None = None,
        steps: int = 12,
        sampler: str = "dpm++",
        scale: float = 1.0,
        seed: int = 23,
        judge: str | None = None,
        tag: str = "motion",
    ) -> None:
        if every_n_steps < 1 or num_clips < 1 or (frames is not None and frames < 2):
            raise UserError(
                "MotionLogger: expected every_n_steps and num_clips of at least 1 and frames of at least 2, found "
                f"every_n_steps {every_n_steps}, num_clips {num_clips}, frames {frames}"
            )
        if prompts is not None and not prompts:
            raise UserError("MotionLogger: expected at least one prompt, or null for the data's captions, found none")
        if not tag.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"MotionLogger: tag: expected letters, digits, _ and -, found {tag!r}")
        self.config, self.path, self.tag = config, Path(folder) / f"{tag}.json", tag
        self.prompts, self.every_n_steps, self.at_start = prompts, every_n_steps, at_start
        self.num_clips, self.frames, self.fps = num_clips, frames, fps
        self.recipe, self.seed, self.judge = Recipe(sampler, steps, scale), seed, judge
        self._metrics = MetricSet()
        self._clips: HeldOutClips | None = None
        self._captions: list[str] = []
        self._context: Tensor | None = None
        self._record: dict[str, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the data's clips, encode the prompts and check the settings, before the first step."""
        self.recipe.check(pl_module, "MotionLogger")
        if self.judge is not None or BUNDLED_CLASSIFIER.is_file():
            self._metrics = MetricSet(style_alignment(load_style_classifier(self.judge or BUNDLED_CLASSIFIER)))
        if not trainer.is_global_zero and not is_sharded(pl_module.unet):
            return
        data = trainer.datamodule
        self.frames = data.frames if self.frames is None else self.frames
        self.fps = data.info.fps / min(data.strides) if self.fps is None else self.fps
        self._clips = _spread_clips(data, self.frames, self.fps, self.num_clips)
        captions, contexts = self._read_captions()
        self._context = torch.stack([contexts[number % len(contexts)] for number in range(self.num_clips)])
        self._captions = [captions[number % len(captions)] for number in range(self.num_clips)]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            self._begin_record(trainer, pl_module)
        if self.at_start and trainer.global_step == 0:
            self._log_motion(trainer, pl_module)

    def _begin_record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Earlier measurements, and those of the data's clips, which are measured once."""
        self._record = _begin(self.path, self._settings(), trainer.global_step)
        measures = self._metrics.measures
        if set(self._record.get("data", {}).get("values", ())) != set(measures):
            parts = [part for part, _, _ in self._clips.windows]
            found = self._measure(pl_module, self._data_latents(pl_module), [part.scene.captions[0] for part in parts])
            self._record["data"] = {"scenes": [part.scene.key for part in parts], **found}
        words = ("title", "better", "places")
        self._record["measures"] = {
            name: {word: getattr(measure, word) for word in words} for name, measure in measures.items()
        }

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._log_motion(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step % self.every_n_steps:
            self._log_motion(trainer, pl_module)

    def _settings(self) -> dict[str, Any]:
        """Settings on which the numbers depend."""
        return {
            "captions": self._captions, "num_clips": self.num_clips, "frames": self.frames, "fps": self.fps,
            "seed": self.seed, **asdict(self.recipe),
        }  # fmt: skip

    def _log_motion(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            if is_sharded(pl_module.unet):
                self._sample(trainer, pl_module)
            return
        begin, step = time.monotonic(), trainer.global_step
        tflop = next((callback.tflop for callback in trainer.callbacks if isinstance(callback, ComputeCount)), None)
        found = self._measure(pl_module, self._sample(trainer, pl_module), self._captions)
        self._record["occasions"].append({"step": step, "tflop": tflop, **found})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self._record, allow_nan=False) + "\n")
        of_samples, of_data = _means(found["values"]), _means(self._record["data"]["values"])
        log_metrics(trainer, {f"{self.tag}/{name}": mean for name, mean in of_samples.items()})
        log_metrics(trainer, {f"{self.tag}_data/{name}": mean for name, mean in of_data.items()})
        words = ", ".join(
            f"{measure.title} {of_samples[name]:.{measure.places}f} (data {of_data[name]:.{measure.places}f})"
            for name, measure in self._metrics.measures.items()
            if name in of_samples and name in of_data
        )
        log.info("%s at step %d: %s; %.0f s", self.tag, step, words or "no metric is defined", time.monotonic() - begin)

    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor:
        """Latents of all clips, `b t c h w`, in batches of the training's size."""
        info, together = trainer.datamodule.info, trainer.datamodule.batch_size
        shape = (self.frames, info.latent_channels, *info.moments_shape[1:])
        generators = [torch.Generator().manual_seed(self.seed + number) for number in range(self.num_clips)]
        noise = initial_noise(self.num_clips, *shape, generators, pl_module.noise)
        with averaged(trainer, pl_module):
            batches = zip(noise.split(together), self._context.split(together), strict=True)
            latents = [sample_latents(trainer, pl_module, self.recipe, *batch, self.fps).cpu() for batch in batches]
        return torch.cat(latents)

    def _data_latents(self, pl_module: pl.LightningModule) -> Tensor:
        """The most likely latents of the data's clips, scaled, `b t c h w`."""
        moments = torch.cat([self._clips[number].moments for number in range(len(self._clips))]).float()
        return moments.chunk(2, dim=2)[0] * pl_module.scale_factor

    def _measure(self, pl_module: pl.LightningModule, latents: Tensor, captions: Sequence[str]) -> dict[str, Readings]:
        """All metrics of each clip."""
        clips = decode_clips(self.config, pl_module, latents)
        seen = [self._metrics.measure(*clip).readings for clip in zip(clips, captions, strict=True)]
        return {"values": {name: [readings[name].value for readings in seen] for name in self._metrics.measures}}

    def _read_captions(self) -> tuple[Sequence[str], Tensor]:
        """Captions and their embeddings `k n d`."""
        if self.prompts is None:
            contexts = torch.cat([self._clips[number].context for number in range(len(self._clips))])
            return [part.scene.captions[0] for part, _, _ in self._clips.windows], contexts
        text_encoder = load_text_encoder_of(self.config)
        for prompt in self.prompts:
            if lost := text_encoder.truncated(prompt):
                log.warning("the prompt '%.40s...' is longer than the text encoder holds; cut: '%s'", prompt, lost)
        with torch.no_grad():
            return self.prompts, text_encoder.encode(list(self.prompts)).cpu()


def _spread_clips(data: ClipDataModule, frames: int, fps: float, most: int) -> HeldOutClips:
    """Clips of the data, spread over what is held out, or over all scenes where nothing is; `most` at most."""
    stride = data.info.fps / fps if fps > 0 else 0.0
    if stride < 1 or abs(stride - round(stride)) > 1e-6:
        rates = ", ".join(f"{data.info.fps / every:g}" for every in (1, 2, 3))
        raise UserError(
            f"MotionLogger: fps: expected the prepared frame rate or a whole part of it ({rates}, ...), found {fps:g}"
        )
    parts = {(part.scene.key, part.start): part for part, _, _ in data.val_clips.windows}
    if not parts:
        parts = dict(enumerate(SceneRange.whole(data.prepared.scenes)))
    clips = HeldOutClips(data.prepared, list(parts.values()), frames, [round(stride)])
    if not len(clips):
        raise UserError(
            f"MotionLogger: no held-out scene of {data.root} is long enough for {frames} frames at {fps:g} a second; "
            "ask for fewer frames or a higher fps"
        )
    chosen = np.linspace(0, len(clips) - 1, min(most, len(clips))).astype(int)
    clips.windows = [clips.windows[number] for number in chosen]
    return clips


def _begin(path: Path, settings: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The record of a run up to this step; empty for a new run."""
    if not path.is_file():
        return {"settings": dict(settings), "occasions": []}
    try:
        record = parse_json(path.read_bytes())
        before, occasions = dict(record["settings"]), [(occasion["step"], occasion) for occasion in record["occasions"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected a record of this callback, found something else ({error!r}); delete the file"
        ) from None
    if differing := [name for name, value in settings.items() if before.get(name) != value]:
        raise UserError(
            f"{path}: expected clips measured with the same settings, found another {differing[0]}; give the callback "
            "another tag, or delete the file"
        )
    return {**record, "occasions": [occasion for reached, occasion in occasions if reached <= step]}


def _means(values: Readings) -> dict[str, float]:
    """Mean of each metric over the clips that have it; metrics that no clip has are left out."""
    judged = {name: [value for value in row if value is not None] for name, row in values.items()}
    return {name: float(np.mean(row)) for name, row in judged.items() if row}
