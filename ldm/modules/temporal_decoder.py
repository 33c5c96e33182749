"""Temporal layers for the decoder of an image autoencoder, which itself is unchanged.

Frames that are decoded one by one flicker, because latents do not determine details; a decoder that also sees the
neighbouring frames decodes them consistently (Blattmann et al. 2023, "Align your Latents", section 3.1.1). Residual
blocks over three frames, initialised to the identity, stand between the parts of the image decoder. A clip is decoded
in chunks with the same result as at once.

Temporal layers would carry the colours of their training clips into others. So only the brightness of details, where
motion is visible, comes from them; colours and the mean brightness of areas come from the image decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.nn import GroupNorm32, zeroed

DIGEST_BYTES = 32
BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
Part = Callable[[Tensor], Tensor]
Held = tuple[Tensor, Tensor]


class FramesBlock(nn.Module):
    """Residual block with a zero-padded 3x3x3 convolution, initialised to the identity: `b t c h w` -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm32(channels)
        self.gather = nn.Conv2d(3 * channels, channels, 3, padding=1)  # 3x3x3, as frames side by side
        self.put = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, held: Held | None, is_end: bool) -> tuple[Tensor, Held]:
        """The frames whose two neighbours are known, and the state for the next call.

        held: the state of the last call, frames that wait for a neighbour and features of the last two; None at the
            beginning of a clip. is_end: no frames follow.
        """
        b = len(x)
        seen = F.silu(self.norm(rearrange(x, "b t c h w -> (b t) c h w")))
        seen = rearrange(seen, "(b t) c h w -> b t c h w", b=b)
        nothing = torch.zeros_like(seen[:, :1])
        if held is None:
            seen = torch.cat([nothing, seen], dim=1)
        else:
            x, seen = (torch.cat(pair, dim=1) for pair in zip(held, (x, seen), strict=True))
        if is_end:
            seen = torch.cat([seen, nothing], dim=1)
        t = seen.shape[1] - 2  # frames with both neighbours
        waiting = x[:, t:].clone(), seen[:, -2:].clone()  # views would keep all frames in memory
        if t == 0:
            return x[:, :0], waiting
        around = torch.cat([seen[:, shift : shift + t] for shift in range(3)], dim=2)
        found = self.put(F.silu(self.gather(rearrange(around, "b t c h w -> (b t) c h w"))))
        return x[:, :t] + rearrange(found, "(b t) c h w -> b t c h w", b=b), waiting


class TemporalDecoder(nn.Module):
    """The temporal blocks of one image decoder.

    ch, ch_mult: of the autoencoder's `ddconfig`.
    blocks: number of blocks after each part of the decoder but the last; the first part has the size of the latents,
        the last blocks, the most expensive, the full size. A frame depends on as many frames before and after it as
        there are blocks.
    brightness_area: side of a detail, in latents; colours, and the brightness of anything larger, come from the image
        decoder. 0: everything comes from these layers.

    `made_for`: digest of the image decoder that it was trained with, see `checkpoint.encoders`; zeros before training.
    """

    def __init__(self, ch: int, ch_mult: Sequence[int], blocks: Sequence[int], brightness_area: int = 2) -> None:
        super().__init__()
        if ch % 32:
            raise UserError(f"temporal decoder, ch: expected a multiple of 32, as of the autoencoder, found {ch}")
        if not isinstance(brightness_area, int) or isinstance(brightness_area, bool) or brightness_area < 0:
            raise UserError(
                f"temporal decoder, brightness_area: expected a whole number of latents, found {brightness_area!r}"
            )
        self.brightness_area = brightness_area
        widths = [ch * mult for mult in reversed(ch_mult)]
        channels = [widths[0], *widths][: len(widths)]  # after each part of the decoder but the last
        is_list = isinstance(blocks, Sequence) and all(isinstance(num, int) and num >= 0 for num in blocks)
        if not is_list or len(blocks) > len(channels) or not sum(blocks):
            raise UserError(
                f"temporal decoder, blocks: expected up to {len(channels)} whole numbers, one for each part of the "
                f"image decoder but the last, not all 0, found {blocks!r}"
            )
        numbers = [*blocks, *[0] * (len(channels) - len(blocks))]
        self.places = nn.ModuleList(
            nn.ModuleList(FramesBlock(width) for _ in range(num)) for width, num in zip(channels, numbers, strict=True)
        )
        self.register_buffer("made_for", torch.zeros(DIGEST_BYTES, dtype=torch.uint8))

    def forward(self, parts: Sequence[Part], latents: Tensor) -> Tensor:
        """Whole clips, latents `b t z h w`, unscaled, -> frames, about [-1, 1], `b t c fh fw`.

        parts: of the image decoder, see `FirstStage.decoder_parts`.
        """
        (frames,) = self._decode_from(parts, 0, latents, {}, is_end=True, most=latents.shape[1])
        if not self.brightness_area:
            return frames
        alone = self._decode_images(parts, rearrange(latents, "b t c h w -> (b t) c h w"))
        joined = self._join(rearrange(frames, "b t c h w -> (b t) c h w"), alone, latents.shape[-2:])
        return rearrange(joined, "(b t) c h w -> b t c h w", b=len(frames))

    def decode(self, parts: Sequence[Part], chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The latents of one clip in chunks, `t z h w`, -> the frames of `forward`, `t' c fh fw`, some chunks later.

        At most as many frames as a chunk has are returned or pass through a part of the image decoder at a time. The
        output of the image decoder is held until it is joined: a chunk, and one frame for each block.
        """
        held: dict[FramesBlock, Held] = {}
        chunks, alone = iter(chunks), None  # the image decoder's frames that are not joined yet
        chunk = next(chunks, None)
        while chunk is not None:
            following = next(chunks, None)
            if self.brightness_area:
                own = self._decode_images(parts, chunk)
                alone = own if alone is None else torch.cat([alone, own])
            for (frames,) in self._decode_from(parts, 0, chunk[None], held, is_end=following is None, most=len(chunk)):
                if alone is None:
                    yield frames
                else:
                    yield self._join(frames, alone[: len(frames)], chunk.shape[-2:])
                    alone = alone[len(frames) :]
            chunk = following

    @torch.no_grad()
    def _decode_images(self, parts: Sequence[Part], latents: Tensor) -> Tensor:
        """Each frame by the image decoder alone, `t z h w` -> `t c fh fw`."""
        for part in parts:
            latents = part(latents)
        return latents

    def _join(self, frames: Tensor, alone: Tensor, latent_size: Sequence[int]) -> Tensor:
        """The image decoder's frames `t c h w` with the brightness of details of `frames`.

        The difference of brightness less its means over areas, bilinear between their centres, is a detail.
        """
        share = frames.new_tensor(BRIGHTNESS)[:, None, None]
        brighter = ((frames - alone) * share).sum(dim=1, keepdim=True)
        areas = F.adaptive_avg_pool2d(brighter, [math.ceil(side / self.brightness_area) for side in latent_size])
        coarse = F.interpolate(areas, size=frames.shape[-2:], mode="bilinear", align_corners=False)
        return alone + brighter - coarse

    def _decode_from(
        self, parts: Sequence[Part], place: int, x: Tensor, held: dict[FramesBlock, Held], is_end: bool, most: int
    ) -> Iterator[Tensor]:
        """The frames that follow from the input `x` of part `place`, at most `most` at a time."""
        b = len(x)
        x = rearrange(parts[place](rearrange(x, "b t c h w -> (b t) c h w")), "(b t) c h w -> b t c h w", b=b)
        if place == len(self.places):
            yield x
            return
        for block in self.places[place]:
            x, held[block] = block(x, held.get(block), is_end)
            if x.shape[1] == 0:
                return
        pieces = x.split(most, dim=1)
        for number, piece in enumerate(pieces, start=1):
            yield from self._decode_from(parts, place + 1, piece, held, is_end and number == len(pieces), most)
