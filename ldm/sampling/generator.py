"""A checkpoint, ready to make clips from prompts and given frames: the way from these to pixels.

What a clip's settings mean is in `clip_settings`, how long clips are made in `long_clips`; files, names and the command
line are the business of scripts/txt2vid.py.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.checkpoint import (
    SD_V1_FIRST_STAGE,
    SD_V1_SCALE,
    UNET_PATH,
    Checkpoint,
    first_stage_tensors,
    has_temporal_layers,
    latent_scale,
    load_first_stage,
    load_text_encoder,
    load_unet,
    outline_first_stage,
    read_checkpoint,
    unet_node,
    unet_tensors,
)
from ldm.checkpoint.encoders import has_temporal_decoder, load_temporal_decoder
from ldm.config import build, check_node
from ldm.config.schema import mapping_at
from ldm.diffusion.known_frames import fill_of_config
from ldm.diffusion.noise import NoiseFamily
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.modules.compiled import check_cuda_graphs, compile_by_shape, use_cuda_graphs
from ldm.modules.nn import join_projections
from ldm.modules.posterior import posterior_mean
from ldm.modules.temporal_decoder import TemporalDecoder
from ldm.sampling.denoisers import (
    KnownDenoiser,
    KnownLatents,
    WindowedDenoiser,
    check_known_level,
    check_takes_known_frames,
    overlapping_windows,
)
from ldm.sampling.given_frames import MAX_FRAMES, GivenFrames
from ldm.sampling.loop import (
    GuidedDenoiser,
    build_scheduler,
    check_eta,
    check_size,
    decode_chunks,
    initial_noise,
    sample,
    set_steps,
)
from ldm.sampling.prompts import read_schedule
from ldm.sampling.settings import PRECISIONS, ClipSettings, Training, sampling_defaults
from ldm.sampling.stages import Plan, WindowTask, count_levels, plan_interpolation, plan_stages, sample_plan
from ldm.video import from_uint8, to_uint8

Show = Callable[[int, int], None] | None  # called with (done, total)


def plan_clip(
    settings: ClipSettings,
    training: Training,
    takes_known_frames: bool,
    is_told_fps: bool,
    given: Sequence[int] = (),
) -> Plan | None:
    """The stages in which a clip is made; None for one pass, or overlapping windows.

    is_told_fps: whether the network can know that keyframes lie further apart; if not, there are none.
    given: the frames that are wholly known. Raises UserError for what cannot be planned.
    """
    window = settings.window or settings.frames
    if not takes_known_frames:
        overlapping_windows(settings.frames, window, settings.overlap)
        return None
    if settings.interpolate > 1:
        return plan_interpolation(settings.frames, settings.interpolate, window, settings.overlap, given)
    levels = count_levels(settings.fps, training.rates[-1]) if training.rates and is_told_fps else 0
    return plan_stages(settings.frames, window, settings.overlap, levels, given)


def describe_plan(plan: Plan | None, settings: ClipSettings) -> list[str]:
    """The plan in words, a line for each stage."""
    if plan is not None:
        return plan.describe(settings.fps)
    num = len(overlapping_windows(settings.frames, settings.window or settings.frames, settings.overlap))
    windows = "one window" if num == 1 else f"{num} overlapping windows of {settings.window}"
    return [f"{settings.frames} frames at {settings.fps:.3g} fps in {windows}"]


def rates_of(plan: Plan | None, settings: ClipSettings) -> list[float]:
    """The frames a second of all windows, each once."""
    spacings = {1} if plan is None else {stage.spacing for stage in plan.stages}
    return [settings.fps / spacing for spacing in sorted(spacings)]


@dataclass(frozen=True)
class ClipSampler:
    """A network with everything that latents of clips are made from, but the noise.

    context: for numbers of frames, their captions `1 n d`, or one for each frame `1 t n d`, on the network's device.
    uncond: what guidance moves away from, `1 n d`; None for no guidance.
    family: of the noise. generators: one per sample. fill: as the network was trained, see `filling`.
    """

    unet: nn.Module
    schedule: NoiseSchedule
    family: NoiseFamily
    settings: ClipSettings
    context: Callable[[Sequence[int]], Tensor]
    uncond: Tensor | None
    generators: Sequence[torch.Generator]
    fill: str

    def make(self, plan: Plan | None, size: tuple[int, int, int], given: KnownLatents | None, show: Show) -> Tensor:
        """Scaled latents `b t c h w` of a clip per generator, on the network's device.

        size: c h w of a frame. given: what is known. show: called with (done, total) diffusion steps of all windows.
        """
        device = self.schedule.alphas_cumprod.device

        def draw(frames: int) -> Tensor:
            return initial_noise(len(self.generators), frames, *size, self.generators, self.family)

        if plan is not None:
            return sample_plan(plan, self._make_window, draw, given, self.settings.known_noise, device, show)
        frames, window = self.settings.frames, self.settings.window or self.settings.frames
        if frames <= window:
            denoiser = self._denoiser(range(frames), self.settings.fps)
        else:
            denoiser = WindowedDenoiser(
                lambda part: self._denoiser(range(frames)[part], self.settings.fps), window, self.settings.overlap
            )
        return self._sample(denoiser, draw(frames).to(device), show)

    def _make_window(self, task: WindowTask) -> Tensor:
        denoiser = self._denoiser(task.frames, self.settings.fps / task.spacing)
        known = KnownDenoiser(denoiser, self.schedule, task.known, task.noise, self.generators, self.fill)
        return self._sample(known, task.noise, task.progress)

    def _denoiser(self, frames: Sequence[int], fps: float) -> GuidedDenoiser:
        num = len(self.generators)
        context = self.context(frames)
        context = context.expand(num, *context.shape[1:])
        rates = torch.full((num,), fps, device=context.device)
        scales = {"scale": self.settings.scale, "motion_scale": self.settings.motion_scale}
        return GuidedDenoiser(self.unet, context, self.uncond, fps=rates, **scales)

    def _sample(self, denoiser: Callable[[Tensor, Tensor], Tensor], noise: Tensor, show: Show) -> Tensor:
        scheduler = build_scheduler(self.settings.sampler, self.schedule)
        return sample(
            denoiser, scheduler, noise, self.settings.steps, self.generators, show, self.settings.eta, self.family
        )


SD_V1_SCHEDULE = {
    "timesteps": 1000,
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "parameterization": "eps",
    "zero_terminal_snr": False,
}

Progress = Callable[[str, int, int], None]  # called with (what is being done, done, total)


class ClipGenerator:
    """The networks of one checkpoint.

    checkpoint: a path, or one already read.
    config: a whole config for a checkpoint without one; None: the checkpoint's own, else Stable Diffusion v1's.
    device, precision: where the networks run, and what the UNet runs in ("full", "bf16", "fp16"); the text encoder and
        the image autoencoder always run in float32.
    compiled, played_back: whether the UNet goes through torch.compile, and whether its kernels are recorded and played
        back (on an NVIDIA GPU); see `compiling` and `cuda_graphs`.
    temporal_decoder: a checkpoint with one, to decode clips with; True: the checkpoint's own, if it has one; False:
        none, frames are decoded one by one.

    The networks are loaded when first needed, so that `check` can refuse settings before anything slow happens. Noise
    schedule, target and noise family are those the checkpoint was trained with. `defaults` are the settings of
    clips that its config suggests.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | Path | str,
        config: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        precision: str = "full",
        compiled: bool = False,
        played_back: bool = False,
        temporal_decoder: Checkpoint | bool = True,
    ) -> None:
        self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
        self.config, self.device, self.dtype = config, torch.device(device), PRECISIONS[precision]
        self.compiled, self.played_back = compiled, played_back
        if played_back:
            check_cuda_graphs(self.device)
        whole = config or self.checkpoint.config or {}
        self._params = mapping_at("model.params", mapping_at("model", whole.get("model")).get("params"))
        unet = unet_node(self.checkpoint, config)
        check_node(unet, UNET_PATH)
        self._words = unet["params"]
        self.takes_known_frames = self._words["in_channels"] == 2 * self._words["out_channels"] + 1
        self._check_channels()
        self.defaults = sampling_defaults(whole)
        self.training = Training.of_config(whole, has_temporal_layers(unet_tensors(self.checkpoint)))
        self.defaults = sampling_defaults(whole)
        schedule = {key: self._params.get(key, value) for key, value in SD_V1_SCHEDULE.items()}
        node = {"target": "ldm.diffusion.schedule.NoiseSchedule", "params": schedule}
        self.schedule = build(node, "model").to(self.device)
        self.noise = NoiseFamily.from_config(self._params.get("noise"))
        self.fill = fill_of_config(self._params.get("known_frames"))
        self.scale_factor = latent_scale(whole) if self._params else SD_V1_SCALE
        first_stage = outline_first_stage(self._params.get("first_stage_config") or SD_V1_FIRST_STAGE)
        self.num_channels, self.downsampling = first_stage.num_channels, first_stage.downsampling
        self.size_multiple = self.downsampling * 2 ** (len(self._words.get("channel_mult", (1, 2, 4, 4))) - 1)
        self._contexts: dict[str, Tensor] = {}
        self._unet = self._first_stage = self._temporal_decoder = None
        if temporal_decoder is True:
            temporal_decoder = self.checkpoint if has_temporal_decoder(self.checkpoint) else False
        self._decoder_source = temporal_decoder or None

    @property
    def is_told_fps(self) -> bool:
        """Whether the network has an embedding of the frame rate."""
        return bool(self._words.get("fps_embedding"))

    def check(self, settings: ClipSettings) -> None:
        """Raise UserError for settings that cannot be sampled; quick."""
        if not 1 <= settings.frames <= MAX_FRAMES:
            raise UserError(f"frames: expected 1 to {MAX_FRAMES}, found {settings.frames}")
        if not 0 < settings.fps <= 240:
            raise UserError(
                f"fps: expected more than 0 and at most 240 frames a second, found {settings.fps:g}; set --fps"
            )
        if not math.isfinite(settings.scale):
            raise UserError(f"scale: expected a finite number, found {settings.scale}; set --scale")
        if not math.isfinite(settings.motion_scale):
            raise UserError(
                f"motion scale: expected a finite number, found {settings.motion_scale}; set --motion-scale"
            )
        if settings.motion_scale != 1 and not self.training.has_time:
            raise UserError(
                "motion scale: expected a network with layers over time, found one for images; leave out --motion-scale"
            )
        if settings.window is not None and settings.window < min(2, settings.frames):
            raise UserError(
                "window: expected at least 2 frames, so that those made at a time belong together, found "
                f"{settings.window}"
            )
        if settings.overlap < 0:
            raise UserError(f"overlap: expected at least 1 frame, found {settings.overlap}")
        check_size(settings.height, settings.width, self.size_multiple)
        scheduler = build_scheduler(settings.sampler, self.schedule)
        set_steps(scheduler, settings.steps)
        check_eta(scheduler, settings.eta)
        read_schedule(settings.prompt, settings.frames)
        check_known_level(settings.known_noise, self.schedule)
        if settings.known_noise and not self._words.get("known_level_embedding"):
            raise UserError(
                "noise on known frames: expected a network that is told of it (known_level_embedding), found one that "
                "is not; leave out --known-noise"
            )

    def check_given(self, what: str) -> None:
        """Raise UserError, which begins with the option `what`, unless the network takes known frames."""
        check_takes_known_frames(self.takes_known_frames, what)

    def plan(self, settings: ClipSettings, given: GivenFrames | None = None) -> Plan | None:
        """The stages of a clip, None for one pass or overlapping windows; raises UserError for what cannot be made."""
        self.check(settings)
        if given is not None:
            self.check_given("given frames")
        wholly_known = [] if given is None else given.wholly_known()
        return plan_clip(settings, self.training, self.takes_known_frames, self.is_told_fps, wholly_known)

    def read_prompts(self, prompts: Sequence[str]) -> dict[str, str]:
        """Encode prompts for later; returns the prompts that were too long, each with the end that was cut off.

        The text encoder is loaded for this and not kept. Of a schedule, each prompt is one; see `prompts.prompts_in`.
        """
        encoder = load_text_encoder(self.checkpoint, self._params.get("cond_stage_config")).to(self.device)
        for prompt in prompts:
            self._contexts[prompt] = encoder.encode([prompt])
        return {prompt: cut for prompt in prompts if (cut := encoder.truncated(prompt)) is not None}

    def generate(
        self,
        settings: ClipSettings,
        seeds: Sequence[int],
        decode_chunk: int = 4,
        progress: Progress | None = None,
        given: GivenFrames | None = None,
    ) -> list[np.ndarray]:
        """One clip per seed, made as one batch -> uint8 frames `t h w 3` each.

        A clip's noise depends on its own seed alone; what the batch changes is rounding. All prompts must have been
        read before. progress: called with diffusion steps of all windows and decoded chunks, counted together. Raises
        UserError when the network gives numbers that are not finite.
        """
        decoder = self.temporal_decoder  # which may be refused, before anything slow
        num_frames = len(seeds) * settings.frames
        num_chunks, num_steps = -(-num_frames // max(1, decode_chunk)), 0

        def show_steps(done: int, total: int) -> None:
            nonlocal num_steps
            num_steps = total
            if progress:
                progress("denoising", done, total + num_chunks)

        latents = self.make_latents(settings, seeds, given, show_steps)
        if not latents.isfinite().all():
            raise UserError(
                "the network gave numbers that are not finite; expected are finite ones. Try --precision full, a "
                "smaller --scale, or another checkpoint"
            )
        frames = np.empty((num_frames, settings.height, settings.width, 3), np.uint8)
        done = 0
        for part in [rearrange(latents, "b t c h w -> (b t) c h w")] if decoder is None else latents:
            for chunk in decode_chunks(self.first_stage, part, self.scale_factor, decode_chunk, None, decoder):
                frames[done : done + len(chunk)] = to_uint8(chunk)
                done += len(chunk)
                if progress:
                    progress("decoding", num_steps + -(-done // decode_chunk), num_steps + num_chunks)
        return list(rearrange(frames, "(b t) h w c -> b t h w c", b=len(seeds)))

    @torch.no_grad()
    def make_latents(
        self,
        settings: ClipSettings,
        seeds: Sequence[int],
        given: GivenFrames | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Scaled latents `b t c h w` of one clip per seed; what was given of them is there bit for bit.

        progress: called with (done, total) diffusion steps of all windows.
        """
        plan = self.plan(settings, given)
        known = None if given is None else self.encode(given)
        schedule = read_schedule(settings.prompt, settings.frames)

        def context(frames: Sequence[int]) -> Tensor:
            if schedule is None:
                return self._contexts[settings.prompt].to(self.dtype)
            return schedule.context(self._contexts, frames)[None].to(self.dtype)

        sampler = ClipSampler(
            self.unet,
            self.schedule,
            self.noise,
            settings,
            context,
            self._contexts[settings.negative_prompt].to(self.dtype) if settings.scale != 1 else None,
            [torch.Generator().manual_seed(seed) for seed in seeds],
            self.fill,
        )
        size = (settings.height // self.downsampling, settings.width // self.downsampling)
        return sampler.make(plan, (self.num_channels, *size), known, progress)

    @torch.no_grad()
    def encode(self, given: GivenFrames) -> KnownLatents:
        """Given frames as scaled latents, `1 t c h w`: the most likely ones, so that the same always come of them."""
        pictures = [
            posterior_mean(self.first_stage.encode(from_uint8(picture[None]).to(self.device))) * self.scale_factor
            for picture in given.pictures
        ]
        mask = torch.from_numpy(given.latent_mask(self.downsampling)).to(self.device)
        latents = torch.zeros(len(given.shown), *pictures[0].shape[1:], device=self.device)
        for frame, picture in enumerate(given.shown):
            if picture is not None:
                latents[frame] = pictures[picture]
        return KnownLatents(latents[None], rearrange(mask, "t h w -> 1 t 1 h w").to(latents))

    @property
    def unet(self) -> torch.nn.Module:
        """The UNet on its device, frozen; loaded now if it was not before."""
        if self._unet is None:
            gc.collect()  # the text encoder may just have gone
            unet = load_unet(self.checkpoint, self.config).requires_grad_(False).eval()
            unet = unet.to(device=self.device, dtype=self.dtype)
            if self.device.type == "cuda":  # on a CPU it is no faster
                join_projections(unet)
            if self.compiled:
                compile_by_shape(unet)
            if self.played_back:
                use_cuda_graphs(unet)
            self._unet = unet
        return self._unet

    @property
    def first_stage(self) -> torch.nn.Module:
        """The image autoencoder on its device; loaded now if it was not before."""
        if self._first_stage is None:
            first_stage = load_first_stage(self.checkpoint, self._params.get("first_stage_config"))
            self._first_stage = first_stage.to(self.device)
        return self._first_stage

    @property
    def temporal_decoder(self) -> TemporalDecoder | None:
        """The layers over time of the decoder on their device, None where there are none; loaded when first asked."""
        if self._temporal_decoder is None and self._decoder_source is not None:
            found = load_temporal_decoder(self._decoder_source, first_stage_tensors(self.checkpoint))
            self._temporal_decoder = found.to(self.device)
        return self._temporal_decoder

    def _check_channels(self) -> None:
        inputs, outputs = self._words["in_channels"], self._words["out_channels"]
        if inputs != outputs and not self.takes_known_frames:
            raise UserError(
                f"{self.checkpoint.path}: expected a network that takes noisy latents alone ({outputs} channels), or "
                f"known ones and their mask besides ({2 * outputs + 1}), found one with {inputs} input channels; "
                "choose another checkpoint"
            )
