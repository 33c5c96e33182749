"""Training of a temporal decoder (`ldm.modules.temporal_decoder`) for the image autoencoder of a trained video model.

It learns to reconstruct clips from imperfect latents: noisy ones, or ones that the video model remade, noised for the
last few diffusion steps and denoised again (Meng et al. 2022, "SDEdit", section 3). Frames decoded from a diffusion
model's latents are less consistent than those of encoded clips. Image autoencoder and video model stay frozen; a
checkpoint holds the temporal layers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.checkpoint import SD_V1_FIRST_STAGE, first_stage_tensors, load_text_encoder, load_weights, read_checkpoint
from ldm.checkpoint.encoders import DECODER_PATH, digest_of, own_node, temporal_decoder_tensors
from ldm.config import build
from ldm.config.schema import check_values
from ldm.data.frames import FrameBatch
from ldm.diffusion.noise import mix_seed
from ldm.errors import UserError
from ldm.models.autoencoder import psnr
from ldm.models.small import HELD_OUT, SmallModelTraining, check_share
from ldm.modules.nn import GroupNorm32
from ldm.modules.posterior import posterior_mean
from ldm.modules.temporal_decoder import BRIGHTNESS
from ldm.sampling.denoisers import GuidedDenoiser, KnownDenoiser, KnownLatents
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.loop import build_scheduler, set_steps

SAMPLER = "ddim"
KEPT_CAPTIONS = 256


class Remaker:
    """Remakes true clips with the video model of a `ClipGenerator`.

    steps: of sampling from pure noise. most: upper bound of the last steps that a clip repeats; how many, from two on,
        is drawn for each clip.
    """

    def __init__(self, source: ClipGenerator, steps: int, most: int) -> None:
        self.source, self.most = source, most
        self.scheduler = build_scheduler(SAMPLER, source.schedule)
        self.timesteps = set_steps(self.scheduler, steps, source.device)
        encoder = load_text_encoder(source.checkpoint).to(source.device)
        self.context = lru_cache(KEPT_CAPTIONS)(lambda caption: encoder.encode([caption]))

    @torch.no_grad()
    def __call__(
        self, latents: Tensor, captions: Sequence[str], rates: Sequence[float], generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Scaled latents of true clips `b t c h w` -> remade ones, with the draws of each clip's generator."""
        source = self.source
        noise = torch.stack([source.noise.draw(*latents.shape[1:], one) for one in generators]).to(latents)
        remade = []
        for clip, own, caption, rate, one in zip(
            latents[:, None], noise[:, None], captions, rates, generators, strict=True
        ):
            back = int(torch.randint(2, self.most + 1, (), generator=one))
            remade.append(self._remake(clip, own, self.context(caption), rate, self.timesteps[-back:]))
        return torch.cat(remade)

    def _remake(self, clip: Tensor, noise: Tensor, context: Tensor, rate: float, timesteps: Tensor) -> Tensor:
        source = self.source
        rates = torch.full((1,), float(rate), device=clip.device)
        denoiser = GuidedDenoiser(source.unet, context, None, fps=rates)
        if source.takes_known_frames:
            denoiser = KnownDenoiser(denoiser, source.schedule, KnownLatents.nothing(clip), noise, fill=source.fill)
        signal, strength = source.schedule.scales_at(timesteps[:1])
        clip = signal * clip + strength * noise
        for timestep in timesteps:
            output = denoiser(clip, timestep.expand(1)).float()
            clip = self.scheduler.step(output, timestep, clip).prev_sample
        return clip


LATENTS, COLOURS = 1, 2  # streams of draws
REMADE = {"share": float, "steps": int, "most": int}
WINDOW = 7  # pixels along a side, for structural dissimilarity
FAINTEST = (2 / 255) ** 2  # its constant c, a variance of brightness in [0, 1]


class TemporalDecoderTraining(SmallModelTraining):
    """A temporal decoder in training: `FrameBatch` of rows of frames in, temporal layers out.

    temporal_decoder_config: the layers, see `TemporalDecoder`.
    ckpt_path: a whole video model; its image autoencoder is used, and it remakes clips.
    start_path: checkpoint of a temporal decoder to start from, possibly of another video model; None: fresh layers.
    noise: standard deviation of white noise, in units of the latents' own: three quarters of the clips that are not
        remade get noise with a standard deviation drawn from 0 to this one.
    remade: `share` of the clips that the video model remakes, from noise of two to `most` of the last of `steps`
        sampling steps, see `Remaker`; None: none.
    changes: weight of the distance between frame differences, beside that between frames.
    structure: weight of the mean structural dissimilarity of each frame's brightness, see `dissimilarity`.
    recoloured: share of the training clips with random colours and contrast, see `recolour`, for generalisation to
        other styles.
    learning_rate, warmup_steps, cooldown_steps, seed, config: of `SmallModelTraining`.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the keys of the config
        self,
        temporal_decoder_config: Mapping[str, Any],
        ckpt_path: str,
        start_path: str | None = None,
        noise: float = 0.2,
        remade: Mapping[str, Any] | None = None,
        changes: float = 1.0,
        structure: float = 0.0,
        recoloured: float = 0.0,
        learning_rate: float = 1e-3,
        warmup_steps: int = 50,
        cooldown_steps: int = 0,
        seed: int = 23,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, cooldown_steps, seed, config)
        check_share("noise", noise, "standard deviation")
        for name, weight in (("changes", changes), ("structure", structure)):
            if not 0 <= weight <= 100:
                raise UserError(f"model.params.{name}: expected a weight, 0 to 100, found {weight!r}")
        check_share("recoloured", recoloured)
        self.temporal_decoder = build(temporal_decoder_config, DECODER_PATH)
        self.noise, self.remade = noise, _checked_remade(remade)
        self.changes, self.structure, self.recoloured = changes, structure, recoloured
        self._source = ClipGenerator(ckpt_path, temporal_decoder=False)
        self._remaker: Remaker | None = None
        _check_alike(temporal_decoder_config, self._source)
        if start_path is not None:
            start = read_checkpoint(start_path)
            load_weights(
                self.temporal_decoder, temporal_decoder_tensors(start), where=f"temporal decoder from {start_path}"
            )
        self.temporal_decoder.made_for.copy_(digest_of(first_stage_tensors(self._source.checkpoint)))

    def parameter_summary(self) -> str:
        """One line: how many parameters are trained, and how many of the image decoder are frozen."""
        network = self._source.first_stage.network
        frozen = sum(one.numel() for part in (network.decoder, network.post_quant_conv) for one in part.parameters())
        trained = sum(one.numel() for one in self.temporal_decoder.parameters())
        return f"trained: {trained:,} parameters (temporal decoder); frozen: {frozen:,} (the image decoder)"

    def setup(self, stage: str) -> None:
        """Move the frozen networks to the device of the trained layers."""
        device = self.trainer.strategy.root_device
        if device != self._source.device:
            self._source = ClipGenerator(self._source.checkpoint, device=device, temporal_decoder=False)
        if self._remaker is None and self.remade["share"]:
            self._remaker = Remaker(self._source, self.remade["steps"], self.remade["most"])
        use_fast_norms(self._source.first_stage.network.decoder)

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents of whole clips `b t c h w` -> frames, about [-1, 1], `b t 3 H W`."""
        return self.temporal_decoder(self._source.first_stage.decoder_parts(), latents / self._source.scale_factor)

    def training_step(self, batch: FrameBatch, batch_idx: int) -> Tensor:
        """Weighted sum of the mean distance per pixel value, of frame differences, and of structural dissimilarity."""
        pixels, latents = self._pixels_and_latents(batch, self.seed, self.recoloured)
        # On a CPU, torch's group norm is very slow for inputs that require no gradient.
        terms = self._terms(self(latents.requires_grad_()).float(), pixels)
        for name, value in terms.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "l1", batch_size=len(batch))
        return terms["l1"] + self.changes * terms["change"] + self.structure * terms["unlikeness"]

    def validation_step(self, batch: FrameBatch, batch_idx: int) -> None:
        """The same terms and PSNR on held-out clips, also of the image decoder alone (`val/alone_*`)."""
        pixels, latents = self._pixels_and_latents(batch, HELD_OUT)
        output = self(latents).float()
        flat = rearrange(latents, "b t c h w -> (b t) c h w")
        alone = self._source.first_stage.decode(flat / self._source.scale_factor).float()
        found = {"": output, "alone_": rearrange(alone, "(b t) c h w -> b t c h w", b=len(batch))}
        for prefix, frames in found.items():
            terms = self._terms(frames, pixels)
            terms["psnr"] = psnr(*(rearrange(one, "b t c h w -> (b t) c h w") for one in (frames, pixels))).mean()
            for name, value in terms.items():
                self.log(f"val/{prefix}{name}", value, prog_bar=name == "psnr", on_epoch=True, batch_size=len(batch))
        middle = pixels.shape[1] // 2
        self.keep_shown(batch_idx, pixels[:, middle], output[:, middle])

    def configure_optimizers(self) -> dict[str, Any]:
        return self.adamw(self.temporal_decoder.parameters(), betas=(0.9, 0.99), weight_decay=0.0)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise UserError for layers that were trained with another image decoder."""
        if not torch.equal(checkpoint["state_dict"]["temporal_decoder.made_for"].cpu(), self.temporal_decoder.made_for):
            raise UserError(
                f"{self._source.checkpoint.path}: expected the image decoder that this run's layers were trained with "
                "so far, found another one; start a new run, with them at model.params.start_path"
            )

    def _terms(self, frames: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        change = (frames.diff(dim=1) - pixels.diff(dim=1)).abs().mean()
        return {
            "l1": (frames - pixels).abs().mean(),
            "change": change,
            "unlikeness": dissimilarity(frames, pixels).mean(),
        }

    @torch.no_grad()
    def _pixels_and_latents(self, batch: FrameBatch, seed: int, recoloured: float = 0.0) -> tuple[Tensor, Tensor]:
        """Frames `b t 3 H W` and scaled latents `b t c h w`, augmented as seed and positions determine."""
        if len(batch.pixels) < 2 * len(batch):
            raise UserError(
                "data: expected rows of at least 2 frames for the temporal decoder, found single frames; set "
                "data.params.frames, to 5 for instance"
            )
        captions = getattr(batch, "captions", [""] * len(batch))
        clips, latents = [], []
        for index, (shown, position) in enumerate(zip(batch.pixels.chunk(len(batch)), batch.positions, strict=True)):
            clip, caption = shown, captions[index]
            generator = torch.Generator().manual_seed(mix_seed(seed, COLOURS, position))
            with torch.autocast(shown.device.type, enabled=False):
                if torch.rand((), generator=generator).item() < recoloured:
                    clip, caption = recolour(shown, generator), ""  # the caption describes the original colours
                moments = self._source.first_stage.encode(clip)  # one by one: no clip depends on its batch
            clips.append(clip)
            own = posterior_mean(moments.float())[None] * self._source.scale_factor
            latents.append(self._augmented(own, caption, batch.rates[index], mix_seed(seed, LATENTS, position)))
        return torch.stack(clips), torch.cat(latents).float()

    def _augmented(self, latents: Tensor, caption: str, rate: float, seed: int) -> Tensor:
        """Latents of one clip `1 t c h w`: remade, noisy or unchanged."""
        generator = torch.Generator().manual_seed(seed)
        draw, strength = torch.rand(2, generator=generator).tolist()
        if draw < self.remade["share"]:
            return self._remaker(latents, [caption], [rate], [generator])
        if draw < 1 - (1 - self.remade["share"]) / 4:
            return latents + self.noise * strength * torch.randn(latents.shape, generator=generator).to(latents)
        return latents


def recolour(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Frames in [-1, 1], `t 3 h w`, with one random hue rotation, saturation, contrast and brightness for all."""
    turn, saturation, contrast, brightness = torch.rand(4, generator=generator).tolist()
    x, y = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    own, following, before = (1 + 2 * x) / 3, (1 - x) / 3 - y / math.sqrt(3), (1 - x) / 3 + y / math.sqrt(3)
    around_grey = frames.new_tensor([[own, following, before], [before, own, following], [following, before, own]])
    frames = torch.einsum("o i, t i h w -> t o h w", around_grey, frames)
    grey = (frames * frames.new_tensor(BRIGHTNESS)[:, None, None]).sum(dim=1, keepdim=True)
    frames = grey + (0.3 + 1.2 * saturation) * (frames - grey)
    return ((0.6 + 0.6 * contrast) * frames + 0.6 * brightness - 0.3).clamp(-1, 1)


def dissimilarity(frames: Tensor, true: Tensor) -> Tensor:
    """Structural dissimilarity of brightness, from 0 (identical) to 2 (inverted); frames in [-1, 1], `b t 3 h w`.

    1 - (2 covariance + c) / (sum of both variances + c), the second factor of SSIM (Wang et al. 2004, eq. 13), in
    windows of 7x7 pixels, `b t h-6 w-6`. c is the square of two grey levels of 255, a fifteenth of the usual value, so
    faint but visible texture counts as much as strong texture.
    """
    share = true.new_tensor(BRIGHTNESS)[:, None, None]
    both = [(one / 2 * share).sum(dim=2) for one in (frames, true)]
    values = torch.stack([*both, both[0].square(), both[1].square(), both[0] * both[1]])
    mean, true_mean, square, true_square, product = F.avg_pool2d(values.flatten(0, 1), WINDOW, stride=1).unflatten(
        0, values.shape[:2]
    )
    variances = square - mean.square() + true_square - true_mean.square()
    return 1 - (2 * (product - mean * true_mean) + FAINTEST) / (variances + FAINTEST)


def use_fast_norms(decoder: nn.Module) -> None:
    """Replace the group norms of a frozen image decoder by ours, whose backward pass is fast on a CPU; in place.

    Those of the attention block stay.
    """
    for name, module in list(decoder.named_modules()):
        if type(module) is nn.GroupNorm and module.num_groups == 32 and "attentions" not in name:
            norm = GroupNorm32(module.num_channels, module.eps)
            norm.weight, norm.bias = module.weight, module.bias
            decoder.set_submodule(name, norm)
    decoder.to(memory_format=torch.channels_last)


def _check_alike(node: Mapping[str, Any], source: ClipGenerator) -> None:
    """Raise UserError unless the layers fit the autoencoder of the source."""
    first_stage = own_node(source.checkpoint, "first_stage_config") or SD_V1_FIRST_STAGE
    for key in ("ch", "ch_mult"):
        wanted, found = first_stage["params"]["ddconfig"][key], node["params"][key]
        if found != wanted:
            raise UserError(
                f"{DECODER_PATH}.params.{key}: expected {wanted}, as the autoencoder in {source.checkpoint.path} has, "
                f"found {found}"
            )


def _checked_remade(options: Mapping[str, Any] | None) -> dict[str, Any]:
    if options is None:
        return {"share": 0.0}
    where = "model.params.remade"
    if set(options) != set(REMADE):
        raise UserError(f"{where}: expected the keys {', '.join(REMADE)}, found {', '.join(options) or 'none'}")
    check_values(options, REMADE, where)
    if not 2 <= options["most"] < options["steps"]:
        raise UserError(
            f"{where}: expected most from 2 on and below steps, found steps {options['steps']}, most {options['most']}"
        )
    if not 0 < options["share"] <= 1:
        raise UserError(f"{where}.share: expected a share above 0 and up to 1, found {options['share']!r}")
    return dict(options)
