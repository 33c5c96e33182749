"""Training of a temporal decoder (`ldm.modules.temporal_decoder`) for the image autoencoder of a trained video model.

It learns to give clips back from latents that are not quite theirs: with noise on them, or remade by the video model
itself. Image autoencoder and video model stay as they are. A checkpoint holds the layers over time alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import pytorch_lightning as pl
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
from ldm.modules.nn import GroupNorm32
from ldm.modules.posterior import posterior_mean
from ldm.modules.temporal_decoder import BRIGHTNESS
from ldm.optim import rate_schedule
from ldm.sampling.denoisers import KnownDenoiser, KnownLatents
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.loop import GuidedDenoiser, build_scheduler, set_steps

SAMPLER = "ddim"
KEPT_CAPTIONS = 256


class Remaker:
    """The video model of a `ClipGenerator`, that remakes true clips.

    steps: of a whole way from noise to a clip. most: at most so many of them, the last ones, and at least two are gone
        back: how many is drawn for each clip.
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
        """Scaled latents of true clips `b t c h w` -> remade ones; what is drawn comes from each clip's generator."""
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


SPOILING, RECOLOURING = 1, 2  # streams of draws
HELD_OUT = 2**20  # in place of the seed, for what is done to held-out latents: always the same
REMADE = {"share": float, "steps": int, "most": int}
WINDOW = 7  # pixels, of structure
FAINTEST = (2 / 255) ** 2  # variance of brightness, of 1, from which on structure counts
MAX_SHOWN = 16  # batches of the validation that are kept for pictures


class TemporalDecoderTraining(pl.LightningModule):
    """A temporal decoder in training: `FrameBatch` of rows of frames in, layers over time out.

    temporal_decoder_config: the layers, see `TemporalDecoder`.
    ckpt_path: a whole video model, for its image autoencoder and for what it makes of clips.
    start_path: checkpoint of a temporal decoder to begin with, of another video model for instance; None: fresh layers.
    noise: of the clips that are not remade, three quarters have white noise on their latents, of a standard deviation
        drawn from 0 to this one, in units of the latents' own.
    remade: `share` of the clips that the video model remakes, from noise of two to `most` of the last of `steps`
        sampling steps, see `Remaker`; None: none are.
    changes: weight of the distance between the changes from frame to frame, beside that between the frames.
    structure: weight of the mean structural dissimilarity of each frame's brightness, see `unlikeness`; faint texture,
        the road's for instance, counts in it as much as trees do.
    recoloured: share of the clips whose colours and contrast are others in training, see `recolour`, so that what is
        learned holds for other looks than those of the clips.
    learning_rate: highest rate; it rises over `warmup_steps` steps and falls over the last `cooldown_steps`.
    seed: of every draw. config: the config of the run, kept in checkpoints.
    """

    keeps_averages = False

    def __init__(  # noqa: PLR0913, PLR0917 - the words of the config
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
        super().__init__()
        if not 0 <= noise <= 1:
            raise UserError(f"model.params.noise: expected a standard deviation, 0 to 1, found {noise!r}")
        for name, weight in (("changes", changes), ("structure", structure)):
            if not 0 <= weight <= 100:
                raise UserError(f"model.params.{name}: expected a weight, 0 to 100, found {weight!r}")
        if not 0 <= recoloured <= 1:
            raise UserError(f"model.params.recoloured: expected a share, 0 to 1, found {recoloured!r}")
        self.temporal_decoder = build(temporal_decoder_config, DECODER_PATH)
        self.noise, self.remade, self.seed = noise, _checked_remade(remade), seed
        self.changes, self.structure, self.recoloured = changes, structure, recoloured
        self.learning_rate, self.warmup_steps, self.cooldown_steps = learning_rate, warmup_steps, cooldown_steps
        self.config = config
        self._source = ClipGenerator(ckpt_path, temporal_decoder=False)
        self._remaker: Remaker | None = None
        _check_alike(temporal_decoder_config, self._source)
        if start_path is not None:
            start = read_checkpoint(start_path)
            load_weights(
                self.temporal_decoder, temporal_decoder_tensors(start), where=f"temporal decoder from {start_path}"
            )
        self.temporal_decoder.made_for.copy_(digest_of(first_stage_tensors(self._source.checkpoint)))
        self.shown: list[tuple[Tensor, Tensor]] = []  # originals and reconstructions of the last validation

    def parameter_summary(self) -> str:
        """One line: how many parameters are trained, and how many of the image decoder stay as they are."""
        network = self._source.first_stage.network
        frozen = sum(one.numel() for part in (network.decoder, network.post_quant_conv) for one in part.parameters())
        trained = sum(one.numel() for one in self.temporal_decoder.parameters())
        return f"trained: {trained:,} parameters (temporal decoder); frozen: {frozen:,} (the image decoder)"

    def setup(self, stage: str) -> None:
        """Put the frozen networks where the layers are trained."""
        device = self.trainer.strategy.root_device
        if device != self._source.device:
            self._source = ClipGenerator(self._source.checkpoint, device=device, temporal_decoder=False)
        if self._remaker is None and self.remade["share"]:
            self._remaker = Remaker(self._source, self.remade["steps"], self.remade["most"])
        with_quick_norms(self._source.first_stage.network.decoder)

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents of whole clips `b t c h w` -> frames, about [-1, 1], `b t 3 H W`."""
        return self.temporal_decoder(self._source.first_stage.decoder_parts(), latents / self._source.scale_factor)

    def training_step(self, batch: FrameBatch, batch_idx: int) -> Tensor:
        """Mean distance per pixel value, and of the changes from frame to frame, and unlikeness of structure."""
        pixels, latents = self._pixels_and_latents(batch, self.seed, self.recoloured)
        # torch's group norm loses its head over inputs of which no gradient is asked, on a CPU
        terms = self._terms(self(latents.requires_grad_()).float(), pixels)
        for name, value in terms.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "l1", batch_size=len(batch))
        return terms["l1"] + self.changes * terms["change"] + self.structure * terms["unlikeness"]

    def validation_step(self, batch: FrameBatch, batch_idx: int) -> None:
        """The same of held-out clips, beside that of the image decoder alone (`val/alone_*`), and PSNR."""
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
        if batch_idx == 0:
            self.shown = []
        if batch_idx < MAX_SHOWN:
            middle = pixels.shape[1] // 2
            self.shown.append((pixels[:, middle].cpu(), output[:, middle].cpu()))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.temporal_decoder.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        scheduler = rate_schedule(optimizer, self.warmup_steps, self.cooldown_steps, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The config beside the layers."""
        if self.config is not None:
            checkpoint["config"] = dict(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise UserError for layers of another image decoder than the source's."""
        if not torch.equal(checkpoint["state_dict"]["temporal_decoder.made_for"].cpu(), self.temporal_decoder.made_for):
            raise UserError(
                f"{self._source.checkpoint.path}: expected the image decoder that this run's layers were trained with "
                "so far, found another one; start a new run, with them at model.params.start_path"
            )

    def _terms(self, frames: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        change = (frames.diff(dim=1) - pixels.diff(dim=1)).abs().mean()
        return {"l1": (frames - pixels).abs().mean(), "change": change, "unlikeness": unlikeness(frames, pixels).mean()}

    @torch.no_grad()
    def _pixels_and_latents(self, batch: FrameBatch, seed: int, recoloured: float = 0.0) -> tuple[Tensor, Tensor]:
        """Frames `b t 3 H W` and scaled latents `b t c h w`, recoloured and spoilt as seed and positions say."""
        if len(batch.pixels) < 2 * len(batch):
            raise UserError(
                "data: expected rows of at least 2 frames for the temporal decoder, found single frames; set "
                "data.params.frames, to 5 for instance"
            )
        captions = getattr(batch, "captions", [""] * len(batch))
        clips, latents = [], []
        for place, (shown, position) in enumerate(zip(batch.pixels.chunk(len(batch)), batch.positions, strict=True)):
            clip, caption = shown, captions[place]
            generator = torch.Generator().manual_seed(mix_seed(seed, RECOLOURING, position))
            with torch.autocast(shown.device.type, enabled=False):
                if torch.rand((), generator=generator).item() < recoloured:
                    clip, caption = recolour(shown, generator), ""  # the caption speaks of other colours
                moments = self._source.first_stage.encode(clip)  # alone: no clip depends on what it is in a batch with
            clips.append(clip)
            own = posterior_mean(moments.float())[None] * self._source.scale_factor
            latents.append(self._spoilt(own, caption, batch.rates[place], mix_seed(seed, SPOILING, position)))
        return torch.stack(clips), torch.cat(latents).float()

    def _spoilt(self, latents: Tensor, caption: str, rate: float, seed: int) -> Tensor:
        """Latents of one clip `1 t c h w` remade, with noise on them, or as they are."""
        generator = torch.Generator().manual_seed(seed)
        draw, strength = torch.rand(2, generator=generator).tolist()
        if draw < self.remade["share"]:
            return self._remaker(latents, [caption], [rate], [generator])
        if draw < 1 - (1 - self.remade["share"]) / 4:
            return latents + self.noise * strength * torch.randn(latents.shape, generator=generator).to(latents)
        return latents


def recolour(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Frames in [-1, 1], `t 3 h w`, with hues turned by one random angle, other saturation, contrast and brightness."""
    turn, saturation, contrast, brightness = torch.rand(4, generator=generator).tolist()
    x, y = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    own, following, before = (1 + 2 * x) / 3, (1 - x) / 3 - y / math.sqrt(3), (1 - x) / 3 + y / math.sqrt(3)
    around_grey = frames.new_tensor([[own, following, before], [before, own, following], [following, before, own]])
    frames = torch.einsum("o i, t i h w -> t o h w", around_grey, frames)
    grey = (frames * frames.new_tensor(BRIGHTNESS)[:, None, None]).sum(dim=1, keepdim=True)
    frames = grey + (0.3 + 1.2 * saturation) * (frames - grey)
    return ((0.6 + 0.6 * contrast) * frames + 0.6 * brightness - 0.3).clamp(-1, 1)


def unlikeness(frames: Tensor, true: Tensor) -> Tensor:
    """Structural dissimilarity of brightness, from 0, alike, to 2, reversed; frames in [-1, 1], `b t 3 h w`.

    1 - (2 covariance + c) / (sum of both variances + c), the second factor of SSIM (Wang et al. 2004, eq. 13), in
    windows of 7x7 pixels, `b t h-6 w-6`. c is the square of two grey levels of 255, a fifteenth of what is usual, so
    that all texture counts that can be seen at all.
    """
    share = true.new_tensor(BRIGHTNESS)[:, None, None]
    both = [(one / 2 * share).sum(dim=2) for one in (frames, true)]
    values = torch.stack([*both, both[0].square(), both[1].square(), both[0] * both[1]])
    mean, true_mean, square, true_square, product = F.avg_pool2d(values.flatten(0, 1), WINDOW, stride=1).unflatten(
        0, values.shape[:2]
    )
    variances = square - mean.square() + true_square - true_mean.square()
    return 1 - (2 * (product - mean * true_mean) + FAINTEST) / (variances + FAINTEST)


def with_quick_norms(decoder: nn.Module) -> None:
    """Let the group norms of a frozen image decoder be ours, whose backward pass is not slow on a processor.

    Those of attention, which sees no picture, stay.
    """
    for name, module in list(decoder.named_modules()):
        if type(module) is nn.GroupNorm and module.num_groups == 32 and "attentions" not in name:
            norm = GroupNorm32(module.num_channels, module.eps)
            norm.weight, norm.bias = module.weight, module.bias
            decoder.set_submodule(name, norm)
    decoder.to(memory_format=torch.channels_last)


def _check_alike(node: Mapping[str, Any], source: ClipGenerator) -> None:
    """Raise UserError unless the layers are for an autoencoder of the sizes that the source has."""
    first_stage = own_node(source.checkpoint, "first_stage_config") or SD_V1_FIRST_STAGE
    for word in ("ch", "ch_mult"):
        wanted, found = first_stage["params"]["ddconfig"][word], node["params"][word]
        if found != wanted:
            raise UserError(
                f"{DECODER_PATH}.params.{word}: expected {wanted}, as the autoencoder in {source.checkpoint.path} has, "
                f"found {found}"
            )


def _checked_remade(words: Mapping[str, Any] | None) -> dict[str, Any]:
    if words is None:
        return {"share": 0.0}
    where = "model.params.remade"
    if set(words) != set(REMADE):
        raise UserError(f"{where}: expected the words {', '.join(REMADE)}, found {', '.join(words) or 'none'}")
    check_values(words, REMADE, where)
    if not 2 <= words["most"] < words["steps"]:
        raise UserError(
            f"{where}: expected steps and, of the last of them, a smaller number from 2 on that are gone back, found "
            f"steps {words['steps']}, most {words['most']}"
        )
    if not 0 < words["share"] <= 1:
        raise UserError(f"{where}.share: expected a share above 0 and up to 1, found {words['share']!r}")
    return dict(words)
