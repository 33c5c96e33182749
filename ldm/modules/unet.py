"""Stable Diffusion v1's UNet with temporal layers: image parameters keep their public names, others are `temporal`.

Blocks as in Dhariwal & Nichol 2021, "Diffusion Models Beat GANs", with the transformers of Rombach et al. 2022;
temporal layers and the legend of shapes are in `temporal.py`. Options of the public class that no Stable Diffusion v1
model uses (class labels, scale-shift norm, attention without text) are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.attention import SpatialTransformer
from ldm.modules.backends import check_backend
from ldm.modules.nn import GroupNorm32, timestep_embedding, use_channels_last, zeroed
from ldm.modules.recompute import check_memory_options, choose_runs, run_directly
from ldm.modules.temporal import PseudoConv3d, see_changes_only

OCTAVE = 100.0  # what a doubled frame rate adds to the input of the sinusoids


class Embedding(nn.Sequential):
    """Two layers on sinusoids of a number, initialised to zero: `b` -> `b e`."""

    def __init__(self, channels: int, emb_channels: int) -> None:
        super().__init__(nn.Linear(channels, emb_channels), nn.SiLU(), zeroed(nn.Linear(emb_channels, emb_channels)))
        self.channels = channels

    def forward(self, numbers: Tensor) -> Tensor:
        return super().forward(timestep_embedding(numbers, self.channels).to(self[0].weight.dtype))


class ClipConditioning(nn.Module):
    """Known frames, frame rate and noise on the known frames, each optional; see `UNetModel`."""

    def __init__(
        self, takes_known_frames: bool, num_latent_channels: int, model_channels: int, fps: bool, known_level: bool
    ) -> None:
        super().__init__()
        if takes_known_frames:
            self.known = zeroed(nn.Conv2d(num_latent_channels + 1, model_channels, 3, padding=1, bias=False))
        if fps:
            self.fps = Embedding(model_channels, 4 * model_channels)
        if known_level:
            self.known_level = Embedding(model_channels, 4 * model_channels)

    def embed(self, emb: Tensor, fps: Tensor | None, known_level: Tensor | None) -> Tensor:
        """Add the conditions to the timestep embedding: `b e` -> `b e`.

        fps: frames a second, `b`, above 0; known_level: diffusion step of the noise on known latents, `b`, 0 for none.
            None, or an embedding that was left out, adds nothing.
        """
        if fps is not None and hasattr(self, "fps"):
            emb = emb + self.fps(OCTAVE * torch.log2(fps.float()))
        if known_level is not None and hasattr(self, "known_level"):
            emb = emb + self.known_level(known_level)
        return emb


def build_conditioning(
    takes_known_frames: bool, num_latent_channels: int, model_channels: int, fps: bool, known_level: bool
) -> nn.ModuleDict | None:
    """`ClipConditioning` under the name `temporal`; None without any condition. Raises `UserError`."""
    if known_level and not takes_known_frames:
        raise UserError(
            "known_level_embedding: expected a network that takes known frames, whose in_channels are 2 * out_channels "
            "+ 1 (9 for 4); set in_channels or leave the embedding out"
        )
    if not takes_known_frames and not fps:
        return None
    return nn.ModuleDict(
        {"temporal": ClipConditioning(takes_known_frames, num_latent_channels, model_channels, fps, known_level)}
    )


class Downsample(nn.Module):
    """Halve height and width by a strided convolution: `(b t) c h w` -> `(b t) c h/2 w/2`."""

    def __init__(self, channels: int, temporal_kernel_size: int | None = 3) -> None:
        super().__init__()
        self.op = PseudoConv3d(channels, channels, 3, stride=2, temporal_kernel_size=temporal_kernel_size)

    def forward(self, x: Tensor, num_frames: int | None = None) -> Tensor:
        return self.op(x, num_frames)


class Upsample(nn.Module):
    """Double height and width by repetition and a convolution: `(b t) c h w` -> `(b t) c 2h 2w`."""

    def __init__(self, channels: int, temporal_kernel_size: int | None = 3) -> None:
        super().__init__()
        self.conv = PseudoConv3d(channels, channels, 3, temporal_kernel_size=temporal_kernel_size)

    def forward(self, x: Tensor, num_frames: int | None = None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"), num_frames)


class ResBlock(nn.Module):
    """Residual block of two convolutions with the diffusion step added between; initialised to its shortcut."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        temporal_kernel_size: int | None = 3,
        norm_over_clip: bool = False,
    ) -> None:
        super().__init__()
        conv = partial(PseudoConv3d, out_channels=out_channels, temporal_kernel_size=temporal_kernel_size)
        self.in_layers = nn.Sequential(GroupNorm32(channels), nn.SiLU(), conv(channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels), nn.SiLU(), nn.Dropout(dropout), zeroed_image_part(conv(out_channels))
        )
        self.skip_connection = nn.Identity() if channels == out_channels else conv(channels, kernel_size=1)
        self.norm_over_clip = norm_over_clip

    def forward(self, x: Tensor, emb: Tensor, num_frames: int | None = None) -> Tensor:
        """`(b t) c h w`, `b e` -> `(b t) c' h w`."""
        step = repeat(self.emb_layers(emb), "b c -> (b t) c 1 1", t=x.shape[0] // emb.shape[0])
        out = _norm_to_convolution(self.in_layers, x, num_frames, self.norm_over_clip) + step
        out = _norm_to_convolution(self.out_layers, out, num_frames, self.norm_over_clip)
        if isinstance(self.skip_connection, PseudoConv3d):
            x = self.skip_connection(x, num_frames)
        return x + out


def _norm_to_convolution(layers: nn.Sequential, x: Tensor, num_frames: int | None, norm_over_clip: bool) -> Tensor:
    """Run `layers`, from a norm over each frame or over the clip to a convolution that takes all frames."""
    x = layers[0](x, num_frames if norm_over_clip else None)
    for layer in layers[1:-1]:
        x = layer(x)
    return layers[-1](x, num_frames)


def zeroed_image_part(conv: PseudoConv3d) -> PseudoConv3d:
    """Set the image convolution to zero, not its temporal one, and return both."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class UNetBlock(nn.Sequential):
    """Layers in sequence, each called with the inputs it takes: diffusion step, text or neither.

    `runs`: how each layer is called, see `recompute`.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.runs = [run_directly] * len(layers)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, num_frames: int | None) -> Tensor:
        for layer, run in zip(self, self.runs, strict=True):
            if isinstance(layer, ResBlock):
                x = run(layer, x, emb, num_frames)
            elif isinstance(layer, SpatialTransformer):
                x = run(layer, x, context, num_frames)
            else:
                x = run(layer, x, num_frames)
        return x


class UNetModel(nn.Module):
    """The denoiser: noisy latents of clips or images, diffusion steps and captions -> the prediction target.

    in_channels, out_channels: 4 and 4 in Stable Diffusion v1. With 2 * out + 1 = 9 in, as in its inpainting variant,
        the network takes known frames: noisy latents, mask and known latents. The image convolution keeps the first 4,
        the other 5 are `conditioning.temporal.known`.
    model_channels, channel_mult: width of the first level, and of each level in multiples of it; multiples of 32.
    num_res_blocks: residual blocks per level.
    attention_resolutions: downsampling factors (1, 2, 4, ...) of the levels that have transformers.
    num_heads, transformer_depth, context_dim: heads and blocks of each transformer, width of a caption token.
    dropout: in residual blocks.
    use_checkpoint: keep only the inputs of each block for the backward pass and compute the rest again; a number: of
        the first blocks. Blocks are residual blocks, transformers, down- and upsampling.
    feed_forward_frames: frames per call of a transformer's feed-forward; None: all of them.
    inputs_on_host: the inputs that `use_checkpoint` keeps wait in host memory.
    temporal: False leaves out every temporal layer: the image network of Stable Diffusion v1.
    temporal_kernel_size: frames of a temporal convolution, odd; None: no temporal convolutions.
    attention_backend: see `backends`.
    norm_over_clip: residual blocks and the output take the statistics of their norms over all frames of a clip.
    temporal_attention: `local`, `sees_first`, `positions` of `TemporalAttention`; False: no attention over frames.
    temporal_changes_only: temporal layers see only changes between frames, see `temporal.see_changes_only`.
    fps_embedding, known_level_embedding: condition on the frame rate, and on the noise of the known frames.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the keys of the public config
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_heads: int = 8,
        transformer_depth: int = 1,
        context_dim: int = 768,
        dropout: float = 0.0,
        use_checkpoint: bool | int = False,
        temporal: bool = True,
        temporal_kernel_size: int | None = 3,
        attention_backend: str = "sdpa",
        norm_over_clip: bool = False,
        temporal_attention: Mapping[str, Any] | bool | None = None,
        temporal_changes_only: bool = False,
        fps_embedding: bool = False,
        known_level_embedding: bool = False,
        feed_forward_frames: int | None = None,
        inputs_on_host: bool = False,
    ) -> None:
        super().__init__()
        check_backend(attention_backend)
        _check_widths(model_channels, channel_mult, num_heads)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.takes_known_frames = in_channels == 2 * out_channels + 1
        self.has_fps_embedding, self.has_known_level = fps_embedding, known_level_embedding
        self.norm_over_clip = norm_over_clip
        self.model_channels, self.context_dim = model_channels, context_dim
        self.downsampling = 2 ** (len(channel_mult) - 1)
        emb_channels = 4 * model_channels
        attention, kernel_size = _check_temporal(temporal, temporal_attention, temporal_kernel_size)
        time = {"temporal_kernel_size": kernel_size}

        def res_block(channels: int, out_channels: int) -> ResBlock:
            return ResBlock(channels, emb_channels, out_channels, dropout, kernel_size, norm_over_clip)

        def transformer(channels: int) -> SpatialTransformer:
            heads = (num_heads, channels // num_heads, transformer_depth, context_dim)
            return SpatialTransformer(channels, *heads, attention, feed_forward_frames, attention_backend)

        def at_level(level: int, channels: int) -> list[nn.Module]:
            """A residual block to the level's width, and a transformer if the level has them."""
            width = channel_mult[level] * model_channels
            layers = [res_block(channels, width)]
            return [*layers, transformer(width)] if 2**level in attention_resolutions else layers

        levels = range(len(channel_mult))
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        image_channels = out_channels if self.takes_known_frames else in_channels
        self.input_blocks = nn.ModuleList([UNetBlock(PseudoConv3d(image_channels, model_channels, 3, **time))])
        widths = [model_channels]  # of the skip connections
        for level in levels:
            for _ in range(num_res_blocks):
                self.input_blocks.append(UNetBlock(*at_level(level, widths[-1])))
                widths.append(channel_mult[level] * model_channels)
            if level != levels[-1]:
                self.input_blocks.append(UNetBlock(Downsample(widths[-1], **time)))
                widths.append(widths[-1])
        channels = widths[-1]
        self.middle_block = UNetBlock(
            res_block(channels, channels), transformer(channels), res_block(channels, channels)
        )
        self.output_blocks = nn.ModuleList()
        for level, index in itertools.product(reversed(levels), range(num_res_blocks + 1)):
            layers = at_level(level, channels + widths.pop())
            channels = channel_mult[level] * model_channels
            if level > 0 and index == num_res_blocks:
                layers.append(Upsample(channels, **time))
            self.output_blocks.append(UNetBlock(*layers))
        self.out = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), zeroed_image_part(PseudoConv3d(channels, out_channels, 3, **time))
        )
        see_changes_only(self, temporal_changes_only)
        self._choose_runs(use_checkpoint, feed_forward_frames, inputs_on_host)
        self.conditioning = build_conditioning(
            self.takes_known_frames, out_channels, model_channels, fps_embedding, known_level_embedding
        )
        if torch.cuda.is_available():
            use_channels_last(self)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        enable_time: bool = True,
        *,
        fps: Tensor | None = None,
        known_level: Tensor | None = None,
    ) -> Tensor:
        """Images `b c h w` or clips `b t c h w`, diffusion steps `b`, captions `b n d` -> latents of the same size.

        c is `in_channels`, and `out_channels` in the output. Captions of single frames are `b t n d`. A clip of one
        frame, or any clip with `enable_time=False`, is treated as images, without temporal layers. h and w are
        multiples of `downsampling` (8 for Stable Diffusion v1). Timesteps may be fractional.

        fps, known_level: see `ClipConditioning.embed`; the frame rate of images is ignored.
        """
        self._check_input(x, context)
        frames = x.shape[1] if x.ndim == 5 else 1
        num_frames = frames if enable_time and frames > 1 else None
        if context.ndim == 4:
            context = rearrange(context, "b t n d -> (b t) n d")
        h = rearrange(x, "b t c h w -> (b t) c h w") if x.ndim == 5 else x
        h = h.contiguous(memory_format=torch.channels_last)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        if self.conditioning is not None:
            emb = self.conditioning["temporal"].embed(emb, None if num_frames is None else fps, known_level)
        h = self._first_block(h, emb, context, num_frames)
        skips = [h]
        for block in self.input_blocks[1:]:
            h = block(h, emb, context, num_frames)
            skips.append(h)
        h = self.middle_block(h, emb, context, num_frames)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context, num_frames)
        h = _norm_to_convolution(self.out, h, num_frames, self.norm_over_clip)
        return rearrange(h, "(b t) c h w -> b t c h w", t=frames) if x.ndim == 5 else h

    def _first_block(self, x: Tensor, emb: Tensor, context: Tensor, num_frames: int | None) -> Tensor:
        """The first convolution, with that of the known latents added before the temporal one."""
        if not self.takes_known_frames:
            return self.input_blocks[0](x, emb, context, num_frames)
        noisy, known = x.split([self.out_channels, self.out_channels + 1], dim=1)
        convolution = self.input_blocks[0][0]
        h = convolution(noisy) + self.conditioning["temporal"].known(known)
        return h if num_frames is None or convolution.temporal is None else convolution.temporal(h, num_frames)

    def _choose_runs(self, use_checkpoint: bool | int, feed_forward_frames: int | None, inputs_on_host: bool) -> None:
        sequences = [*self.input_blocks[1:], self.middle_block, *self.output_blocks]
        layers = [layer for sequence in sequences for layer in sequence]
        check_memory_options(use_checkpoint, feed_forward_frames, inputs_on_host, len(layers))
        runs = choose_runs(layers, use_checkpoint, inputs_on_host)
        for sequence in sequences:
            sequence.runs = [runs[layer] for layer in sequence]

    def _check_input(self, x: Tensor, context: Tensor) -> None:
        if x.ndim not in (4, 5) or x.shape[-3] != self.in_channels:
            raise UserError(
                f"UNetModel: expected images b c h w or clips b t c h w with c = {self.in_channels}, found shape "
                f"{tuple(x.shape)}"
            )
        if x.shape[-1] % self.downsampling or x.shape[-2] % self.downsampling:
            raise UserError(
                f"UNetModel: expected latents whose height and width are multiples of {self.downsampling}, found "
                f"{x.shape[-2]}x{x.shape[-1]}"
            )
        per_clip, per_frame = tuple(x.shape[:1]), tuple(x.shape[:2]) if x.ndim == 5 else None
        if tuple(context.shape[:-2]) not in (per_clip, per_frame) or context.shape[-1] != self.context_dim:
            raise UserError(
                f"UNetModel: expected one caption a clip, context {x.shape[0]} n {self.context_dim}, found shape "
                f"{tuple(context.shape)}; one caption a frame is b t n d"
            )


def _check_widths(model_channels: int, channel_mult: Sequence[int], num_heads: int) -> None:
    if model_channels % 32:
        raise UserError(f"model_channels: expected a multiple of 32 (groups of the norms), found {model_channels}")
    for mult in channel_mult:
        if mult < 1 or (mult * model_channels) % (2 * num_heads):
            raise UserError(
                f"channel_mult: expected each level's width to be a multiple of 2 x num_heads = {2 * num_heads}, found "
                f"{mult} x {model_channels}"
            )


def _check_temporal(
    temporal: bool, attention: Mapping[str, Any] | bool | None, kernel_size: int | None
) -> tuple[dict[str, Any] | None, int | None]:
    """Keyword arguments of `TemporalAttention` and the kernel size of temporal convolutions, each None for none."""
    if not temporal:
        return None, None
    known = ("local", "sees_first", "positions")
    options = None if attention is False else {} if attention in (None, True) else dict(attention)
    for key, value in (options or {}).items():
        if key not in known:
            raise UserError(f"temporal_attention.{key}: expected one of {', '.join(known)}")
        if key != "local" and not isinstance(value, bool):
            raise UserError(f"temporal_attention.{key}: expected true or false, found {value!r}")
    if options is None and kernel_size is None:
        raise UserError(
            "temporal: expected convolutions or attention over frames, found temporal_kernel_size: null and "
            "temporal_attention: false; an image network is temporal: false"
        )
    return options, kernel_size
