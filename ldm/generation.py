"""A checkpoint, ready to make clips from prompts: what a clip's settings mean, and the way from prompt to pixels.

Files, names and the command line are the business of scripts/txt2vid.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint import (
    SD_V1_FIRST_STAGE,
    SD_V1_SCALE,
    UNET_PATH,
    Checkpoint,
    is_temporal,
    latent_scale,
    load_first_stage,
    load_text_encoder,
    load_unet,
    outline_first_stage,
    read_checkpoint,
    unet_node,
    unet_tensors,
)
from ldm.config import build, check_node
from ldm.config_values import check_values, mapping_at
from ldm.errors import UserError
from ldm.models.diffusion.sampling import (
    GuidedDenoiser,
    build_scheduler,
    check_eta,
    check_size,
    decode_video,
    initial_noise,
    sample,
    set_steps,
)
from ldm.video import parse_size, to_uint8

SD_V1_SIZE, DEFAULT_FRAMES, DEFAULT_FPS = 512, 5, 10.0
SD_V1_SCHEDULE = {
    "target": "ldm.models.diffusion.schedule.NoiseSchedule",
    "params": {"timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012, "parameterization": "eps"},
}
PRECISIONS = {"full": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Progress = Callable[[str, int, int], None]  # called with (stage, done, total)


@dataclass(frozen=True)
class ClipSettings:
    """All that decides how a clip looks, the seed and the checkpoint aside.

    height, width: pixels. fps: playback rate. scale: of the guidance, 1 for none; it pushes away from
    `negative_prompt`. eta: noise between DDIM steps.
    """

    prompt: str
    frames: int
    height: int
    width: int
    fps: float
    negative_prompt: str = ""
    steps: int = 50
    sampler: str = "ddim"
    scale: float = 7.5
    eta: float = 0.0


@dataclass(frozen=True)
class Training:
    """What a checkpoint says of the clips it was trained on; None where it says nothing."""

    frames: int | None
    fps: float | None
    size: tuple[int, int] | None  # height, width
    has_time: bool


class ClipGenerator:
    """The networks of one checkpoint.

    checkpoint: a path, or one already read.
    config: a whole config for a checkpoint without one; None: the checkpoint's own, else Stable Diffusion v1's.
    device, precision: where the networks run, and what the UNet runs in ("full", "bf16", "fp16"); the text encoder and
        the image decoder always run in float32.

    The networks are loaded when first needed, so that `check` can refuse settings before anything slow happens.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | Path | str,
        config: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        precision: str = "full",
    ) -> None:
        self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
        self.config, self.device, self.dtype = config, torch.device(device), PRECISIONS[precision]
        whole = config or self.checkpoint.config or {}
        self._params = mapping_at("model.params", mapping_at("model", whole.get("model")).get("params"))
        unet = unet_node(self.checkpoint, config)
        check_node(unet, UNET_PATH)
        self._check_channels(unet["params"])
        self.training = _training(whole, any(map(is_temporal, unet_tensors(self.checkpoint))))
        schedule = {key: self._params.get(key, value) for key, value in SD_V1_SCHEDULE["params"].items()}
        self.schedule = build({**SD_V1_SCHEDULE, "params": schedule}, "model").to(self.device)
        self.scale_factor = latent_scale(whole) if self._params else SD_V1_SCALE
        first_stage = outline_first_stage(self._params.get("first_stage_config") or SD_V1_FIRST_STAGE)
        self.num_channels, self.downsampling = first_stage.num_channels, first_stage.downsampling
        self.size_multiple = self.downsampling * 2 ** (len(unet["params"].get("channel_mult", (1, 2, 4, 4))) - 1)
        self._contexts: dict[str, Tensor] = {}
        self._unet = self._first_stage = None

    def check(self, settings: ClipSettings) -> None:
        """Raise UserError for settings that cannot be sampled; quick."""
        if settings.frames < 1:
            raise UserError(f"frames: expected at least 1, found {settings.frames}")
        if not 0 < settings.fps <= 240:
            raise UserError(f"fps: expected more than 0 and at most 240 frames a second, found {settings.fps:g}")
        check_size(settings.height, settings.width, self.size_multiple)
        scheduler = build_scheduler(settings.sampler, self.schedule)
        set_steps(scheduler, settings.steps)
        check_eta(scheduler, settings.eta)

    def read_prompts(self, prompts: Sequence[str]) -> dict[str, str]:
        """Encode prompts for later; returns the prompts that were too long, each with the end that was cut off.

        The text encoder is loaded for this and not kept.
        """
        encoder = load_text_encoder(self.checkpoint, self._params.get("cond_stage_config")).to(self.device)
        for prompt in prompts:
            self._contexts[prompt] = encoder.encode([prompt])
        return {prompt: cut for prompt in prompts if (cut := encoder.truncated(prompt)) is not None}

    def generate(
        self, settings: ClipSettings, seeds: Sequence[int], decode_chunk: int = 4, progress: Progress | None = None
    ) -> list[np.ndarray]:
        """One clip per seed, made as one batch -> uint8 frames `t h w 3` each.

        A clip's noise depends on its own seed alone; what the batch changes is rounding. Both prompts must have been
        read before. Raises UserError when the network gives numbers that are not finite.
        """
        self.check(settings)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        h, w = settings.height // self.downsampling, settings.width // self.downsampling
        noise = initial_noise(len(seeds), settings.frames, self.num_channels, h, w, generators).to(self.device)
        context = self._contexts[settings.prompt].to(self.dtype).expand(len(seeds), -1, -1)
        uncond = self._contexts[settings.negative_prompt].to(self.dtype) if settings.scale != 1 else None
        denoiser = GuidedDenoiser(self.unet, context, uncond, settings.scale)
        scheduler = build_scheduler(settings.sampler, self.schedule)
        latents = sample(
            denoiser, scheduler, noise, settings.steps, generators, _staged(progress, "denoising"), settings.eta
        )
        if not latents.isfinite().all():
            raise UserError(
                "the network gave numbers that are not finite; expected are finite ones. Try --precision full, a "
                "smaller --scale, or another checkpoint"
            )
        video = decode_video(self.first_stage, latents, self.scale_factor, decode_chunk, _staged(progress, "decoding"))
        return [to_uint8(clip) for clip in video]

    @property
    def unet(self) -> torch.nn.Module:
        """The UNet on its device, frozen; loaded now if it was not before."""
        if self._unet is None:
            gc.collect()  # the text encoder may just have gone
            unet = load_unet(self.checkpoint, self.config).requires_grad_(False).eval()
            self._unet = unet.to(device=self.device, dtype=self.dtype)
        return self._unet

    @property
    def first_stage(self) -> torch.nn.Module:
        """The image autoencoder on its device; loaded now if it was not before."""
        if self._first_stage is None:
            first_stage = load_first_stage(self.checkpoint, self._params.get("first_stage_config"))
            self._first_stage = first_stage.to(self.device)
        return self._first_stage

    def _check_channels(self, words: Mapping[str, Any]) -> None:
        if words["in_channels"] != words["out_channels"]:
            raise UserError(
                f"{self.checkpoint.path}: expected a network that takes noisy latents alone ({words['out_channels']} "
                f"channels), found one with {words['in_channels']} input channels, as for inpainting, which needs a "
                "picture and a mask; choose a text-to-video checkpoint"
            )


def _training(config: Mapping[str, Any], has_time: bool) -> Training:
    data, prepare = (mapping_at(name, config.get(name)) for name in ("data", "prepare"))
    params = mapping_at("data.params", data.get("params"))
    found = {"frames": params.get("frames"), "strides": params.get("strides", 1)}
    check_values(found, {"frames": int | None, "strides": int | Sequence[int]}, "data.params")
    check_values({"fps": prepare.get("fps")}, {"fps": float | None}, "prepare")
    strides = [found["strides"]] if isinstance(found["strides"], int) else found["strides"]
    fps, size = prepare.get("fps"), prepare.get("size")
    return Training(
        found["frames"],
        fps and fps / max(1, min(strides, default=1)),
        None if size is None else parse_size(size, "prepare.size"),
        has_time,
    )


def _staged(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(stage, done, total)
