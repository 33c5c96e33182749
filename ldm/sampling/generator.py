"""A checkpoint that samples clips from prompts and given frames: from settings and seeds to pixels.

Networks with channels for known frames sample stage by stage (`stages`); others sample clips longer than a window in
overlapping windows (`denoisers`). Options, files and records are not here: see `request`, `record`, scripts/txt2vid.py.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

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
    GuidedDenoiser,
    KnownDenoiser,
    KnownLatents,
    WindowedDenoiser,
    check_known_level,
    check_takes_known_frames,
    overlapping_windows,
)
from ldm.sampling.given_frames import GivenFrames
from ldm.sampling.loop import (
    Denoiser,
    Progress,
    build_scheduler,
    check_eta,
    check_size,
    decode_chunks,
    initial_noise,
    sample,
    set_steps,
)
from ldm.sampling.prompts import read_schedule
from ldm.sampling.settings import MAX_FRAMES, PRECISIONS, ClipSettings, TrainingClips, sampling_defaults
from ldm.sampling.stages import ClipPlan, WindowTask, count_levels, plan_interpolation, plan_stages, sample_plan
from ldm.video import from_uint8, to_uint8

SD_V1_SCHEDULE = {
    "timesteps": 1000,
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "parameterization": "eps",
    "zero_terminal_snr": False,
}

ClipProgress = Callable[[str, int, int], None]  # called with (activity, done, total)


class ClipGenerator:
    """The networks of one checkpoint, loaded on first use; settings are checked before.

    checkpoint: a path, or a checkpoint already read.
    config: a whole config for a checkpoint without one; None: the checkpoint's, or Stable Diffusion v1's.
    device, precision: of the networks, and of the UNet ("full", "bf16", "fp16"); text encoder and image autoencoder
        run in float32.
    compiled, cuda_graphs: run the UNet by torch.compile; replay its recorded kernels (NVIDIA GPU). See `compiled`.
    temporal_decoder: a checkpoint with the temporal decoder to use; True: the checkpoint's, if it has one; False: none.

    Noise schedule, parameterization and noise family are those of training; `defaults` are the settings that the
    config suggests at `sampling`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | Path | str,
        config: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        precision: str = "full",
        compiled: bool = False,
        cuda_graphs: bool = False,
        temporal_decoder: Checkpoint | bool = True,
    ) -> None:
        self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
        self.config, self.device, self.dtype = config, torch.device(device), PRECISIONS[precision]
        self.compiled, self.cuda_graphs = compiled, cuda_graphs
        if cuda_graphs:
            check_cuda_graphs(self.device)
        whole = config or self.checkpoint.config or {}
        self._params = mapping_at("model.params", mapping_at("model", whole.get("model")).get("params"))
        unet = unet_node(self.checkpoint, config)
        check_node(unet, UNET_PATH)
        self._unet_kwargs = unet["params"]
        self.takes_known_frames = self._unet_kwargs["in_channels"] == 2 * self._unet_kwargs["out_channels"] + 1
        self._check_channels()
        self.defaults = sampling_defaults(whole)
        self.training = TrainingClips.from_config(whole, has_temporal_layers(unet_tensors(self.checkpoint)))
        schedule = {key: self._params.get(key, value) for key, value in SD_V1_SCHEDULE.items()}
        node = {"target": "ldm.diffusion.schedule.NoiseSchedule", "params": schedule}
        self.schedule: NoiseSchedule = build(node, "model").to(self.device)
        self.noise = NoiseFamily.from_config(self._params.get("noise"))
        self.fill = fill_of_config(self._params.get("known_frames"))
        self.scale_factor = latent_scale(whole) if self._params else SD_V1_SCALE
        first_stage = outline_first_stage(self._params.get("first_stage_config") or SD_V1_FIRST_STAGE)
        self.num_channels, self.downsampling = first_stage.num_channels, first_stage.downsampling
        self.size_multiple = self.downsampling * 2 ** (len(self._unet_kwargs.get("channel_mult", (1, 2, 4, 4))) - 1)
        self._contexts: dict[str, Tensor] = {}
        self._unet = self._first_stage = self._temporal_decoder = None
        if temporal_decoder is True:
            temporal_decoder = self.checkpoint if has_temporal_decoder(self.checkpoint) else False
        self._decoder_source = temporal_decoder or None

    @property
    def has_fps_embedding(self) -> bool:
        """Whether the network is conditioned on the frame rate."""
        return bool(self._unet_kwargs.get("fps_embedding"))

    def check(self, settings: ClipSettings) -> None:
        """Raise UserError for settings that cannot be sampled; quick."""
        if not 1 <= settings.frames <= MAX_FRAMES:
            raise UserError(f"frames: expected 1 to {MAX_FRAMES}, found {settings.frames}")
        if not 0 < settings.fps <= 240:
            raise UserError(f"fps: expected more than 0 and at most 240, found {settings.fps:g}; set --fps")
        for name, scale in (("scale", settings.scale), ("motion scale", settings.motion_scale)):
            if not math.isfinite(scale):
                raise UserError(f"{name}: expected a finite number, found {scale}; set --{name.replace(' ', '-')}")
        if settings.motion_scale != 1 and not self.training.has_time:
            raise UserError(
                "motion scale: expected a network with temporal layers, found one for images; leave out --motion-scale"
            )
        if settings.window is not None and settings.window < min(2, settings.frames):
            raise UserError(f"window: expected at least 2 frames to sample together, found {settings.window}")
        if settings.overlap < 0:
            raise UserError(f"overlap: expected at least 1 frame, found {settings.overlap}")
        check_size(settings.height, settings.width, self.size_multiple)
        scheduler = build_scheduler(settings.sampler, self.schedule)
        set_steps(scheduler, settings.steps)
        check_eta(scheduler, settings.eta)
        read_schedule(settings.prompt, settings.frames)
        check_known_level(settings.known_noise, self.schedule)
        if settings.known_noise and not self._unet_kwargs.get("known_level_embedding"):
            raise UserError(
                "noise on known frames: expected a network with known_level_embedding, found one without; leave out "
                "--known-noise"
            )

    def check_given(self, option: str) -> None:
        """Raise UserError, which begins with `option`, unless the network takes known frames."""
        check_takes_known_frames(self.takes_known_frames, option)

    def plan(self, settings: ClipSettings, given: GivenFrames | None = None) -> ClipPlan | None:
        """The stages of a clip; None for a single pass or overlapping windows. Raises UserError."""
        self.check(settings)
        window = settings.window or settings.frames
        if given is not None:
            self.check_given("given frames")
        if not self.takes_known_frames:
            overlapping_windows(settings.frames, window, settings.overlap)
            return None
        known = [] if given is None else given.wholly_known()
        if settings.interpolate > 1:
            return plan_interpolation(settings.frames, settings.interpolate, window, settings.overlap, known)
        has_levels = self.training.rates and self.has_fps_embedding  # it knows how far apart keyframes are
        levels = count_levels(settings.fps, self.training.rates[-1]) if has_levels else 0
        return plan_stages(settings.frames, window, settings.overlap, levels, known)

    def read_prompts(self, prompts: Sequence[str]) -> dict[str, str]:
        """Encode prompts and keep the embeddings; returns prompts that were too long, each with the part cut off.

        Loads the text encoder and discards it. The prompts of a schedule are encoded one by one; see `prompts_in`.
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
        progress: ClipProgress | None = None,
        given: GivenFrames | None = None,
        prompts: Sequence[str] | None = None,
        images_only: bool = False,
    ) -> list[np.ndarray]:
        """One clip per seed, sampled as one batch -> uint8 frames `t h w 3` each.

        A clip's noise depends on its seed alone; the batch changes rounding. `read_prompts` must have read all prompts.
        prompts: plain prompts, one per seed, in place of that of the settings. images_only: see `GuidedDenoiser`; with
        independent noise and without the temporal decoder. progress: diffusion steps of all windows and decoded chunks
        in one count. Raises UserError for latents that are not finite.
        """
        decoder = None if images_only else self.temporal_decoder  # loaded, or refused, before anything slow
        num_frames = len(seeds) * settings.frames
        num_chunks, num_steps = -(-num_frames // max(1, decode_chunk)), 0

        def show_steps(done: int, total: int) -> None:
            nonlocal num_steps
            num_steps = total
            if progress:
                progress("denoising", done, total + num_chunks)

        latents = self.make_latents(settings, seeds, given, show_steps, prompts, images_only)
        if not latents.isfinite().all():
            raise UserError(
                "latents: expected finite numbers, found others; try --precision full, a smaller --scale or another "
                "checkpoint"
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
        progress: Progress | None = None,
        prompts: Sequence[str] | None = None,
        images_only: bool = False,
    ) -> Tensor:
        """Scaled latents `b t c h w` of one clip per seed, given ones bit for bit; see `generate`."""
        plan = self.plan(settings, given)
        known = None if given is None else self.encode(given)
        num, unet, family = len(seeds), self.unet, NoiseFamily() if images_only else self.noise
        uncond = self._contexts[settings.negative_prompt].to(self.dtype) if settings.scale != 1 else None
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = self.num_channels, settings.height // self.downsampling, settings.width // self.downsampling

        def draw(frames: int) -> Tensor:
            return initial_noise(num, frames, *size, generators, family)

        def guided(frames: Sequence[int], fps: float) -> GuidedDenoiser:
            context = self._context(settings, frames, prompts)
            context = context.expand(num, *context.shape[1:])
            rates = torch.full((num,), fps, device=context.device)
            options = {"motion_scale": settings.motion_scale, "images_only": images_only}
            return GuidedDenoiser(unet, context, uncond, settings.scale, fps=rates, **options)

        def denoise(denoiser: Denoiser, noise: Tensor, show: Progress | None) -> Tensor:
            scheduler = build_scheduler(settings.sampler, self.schedule)
            return sample(denoiser, scheduler, noise, settings.steps, generators, show, settings.eta, family)

        def sample_window(task: WindowTask) -> Tensor:
            denoiser = guided(task.frames, settings.fps / task.spacing)
            denoiser = KnownDenoiser(denoiser, self.schedule, task.known, task.noise, generators, self.fill)
            return denoise(denoiser, task.noise, task.progress)

        if plan is not None:
            return sample_plan(plan, sample_window, draw, known, settings.known_noise, self.device, progress)
        frames, window = range(settings.frames), settings.window or settings.frames
        denoiser = WindowedDenoiser(lambda part: guided(frames[part], settings.fps), window, settings.overlap)
        if len(frames) <= window:
            denoiser = guided(frames, settings.fps)
        return denoise(denoiser, draw(len(frames)).to(self.device), progress)

    def _context(self, settings: ClipSettings, frames: Sequence[int], prompts: Sequence[str] | None) -> Tensor:
        """Captions of a batch `b n d`, `1 n d`, or of each frame `1 t n d`."""
        if prompts is not None:
            return torch.cat([self._contexts[prompt] for prompt in prompts]).to(self.dtype)
        schedule = read_schedule(settings.prompt, settings.frames)
        if schedule is None:
            return self._contexts[settings.prompt].to(self.dtype)
        return schedule.context(self._contexts, frames)[None].to(self.dtype)

    @torch.no_grad()
    def encode(self, given: GivenFrames) -> KnownLatents:
        """Given frames as scaled latents `1 t c h w`: the mean of the posterior, hence always the same."""
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
        """The frozen UNet on its device."""
        if self._unet is None:
            gc.collect()  # frees the text encoder
            unet = load_unet(self.checkpoint, self.config).requires_grad_(False).eval()
            unet = unet.to(device=self.device, dtype=self.dtype)
            if self.device.type == "cuda":  # no faster on a CPU
                join_projections(unet)
            if self.compiled:
                compile_by_shape(unet)
            if self.cuda_graphs:
                use_cuda_graphs(unet)
            self._unet = unet
        return self._unet

    @property
    def first_stage(self) -> torch.nn.Module:
        """The image autoencoder on its device."""
        if self._first_stage is None:
            first_stage = load_first_stage(self.checkpoint, self._params.get("first_stage_config"))
            self._first_stage = first_stage.to(self.device)
        return self._first_stage

    @property
    def temporal_decoder(self) -> TemporalDecoder | None:
        """The temporal layers of the decoder on their device, None without them."""
        if self._temporal_decoder is None and self._decoder_source is not None:
            found = load_temporal_decoder(self._decoder_source, first_stage_tensors(self.checkpoint))
            self._temporal_decoder = found.to(self.device)
        return self._temporal_decoder

    def _check_channels(self) -> None:
        inputs, outputs = self._unet_kwargs["in_channels"], self._unet_kwargs["out_channels"]
        if inputs != outputs and not self.takes_known_frames:
            raise UserError(
                f"{self.checkpoint.path}: expected a network with {outputs} input channels (noisy latents) or "
                f"{2 * outputs + 1} (and known ones with their mask), found {inputs}; choose another checkpoint"
            )
