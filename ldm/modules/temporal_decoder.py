"""Layers over time for the decoder of an image autoencoder, which stays as it is.

Decoded one by one, the frames of a clip flicker: each has its own guess at what its latents leave open. A decoder that
sees the neighbouring frames too makes one guess for all of them (Blattmann et al. 2023, "Align your Latents", section
3.1.1). Here residual blocks over three frames lie between the parts of the image decoder. Fresh ones change nothing,
pictures never pass through them, and the frames of a clip go through chunk by chunk, with the same result as at once.

Layers over time carry the colours of the clips that they were trained on into others. So they have a say in the
brightness of details alone, which is where motion shows: colours, and how bright an area is on the whole, are what the
image decoder makes of each frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.nn import GroupNorm32

DIGEST_BYTES = 32
BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
Part = Callable[[Tensor], Tensor]
Held = tuple[Tensor, Tensor]


class FramesBlock(nn.Module):
    """A residual block whose convolution sees 3x3 pixels of a frame and of its two neighbours, `b t c h w` -> same.

    Before the first and after the last frame are zeros. The last layer begins at zero, so that a fresh block is the
    identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm32(channels)
        self.gather = nn.Conv2d(3 * channels, channels, 3, padding=1)  # a 3x3x3 convolution, by frames side by side
        self.put = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.put.weight)
        nn.init.zeros_(self.put.bias)

    def forward(self, x: Tensor, held: Held | None, is_end: bool) -> tuple[Tensor, Held]:
        """The frames that can be told now, all whose neighbours are known, and what to call it with for the next ones.

        held: what the last call returned, the frames that wait for a neighbour and what was seen of the last two; None
            at the beginning of a clip. is_end: no frames follow.
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
        t = seen.shape[1] - 2  # as many have both neighbours
        waiting = x[:, t:].clone(), seen[:, -2:].clone()  # not views, which would keep all frames
        if t == 0:
            return x[:, :0], waiting
        around = torch.cat([seen[:, shift : shift + t] for shift in range(3)], dim=2)
        found = self.put(F.silu(self.gather(rearrange(around, "b t c h w -> (b t) c h w"))))
        return x[:, :t] + rearrange(found, "(b t) c h w -> b t c h w", b=b), waiting


class TemporalDecoder(nn.Module):
    """The blocks over time of one image decoder.

    ch, ch_mult: of the autoencoder's `ddconfig`.
    blocks: how many there are after the first part of the decoder, which has the size of the latents, and after each
        later one but the last. A part enlarges the picture at its end, so that the last place, the dearest, has the
        full size already. A frame depends on as many frames before and after it as there are blocks.
    brightness_area: side, in latents, of what counts as a detail. The image decoder decodes each frame as well; colours
        are its own in every pixel, and so is brightness in what is larger than such an area. 0: all is of these layers.

    `made_for` is a digest of the image decoder that it was trained with, see `checkpoint_decoder`; zeros before.
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
        channels = [widths[0], *widths][: len(widths)]  # after the middle, and after each part but the last
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
        (frames,) = self._onward(parts, 0, latents, {}, is_end=True, most=latents.shape[1])
        if not self.brightness_area:
            return frames
        alone = self._alone(parts, rearrange(latents, "b t c h w -> (b t) c h w"))
        joined = self._joined(rearrange(frames, "b t c h w -> (b t) c h w"), alone, latents.shape[-2:])
        return rearrange(joined, "(b t) c h w -> b t c h w", b=len(frames))

    def decode(self, parts: Sequence[Part], chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The latents of one clip chunk by chunk, `t z h w` each, -> its frames `t' c fh fw`, some chunks later.

        The frames are those of `forward` for the whole clip. No more of them than there are latents in a chunk come or
        go through a part of the image decoder at a time, and through blocks as many more as there are in a row. As the
        image decoder alone makes them, frames wait until theirs come: those of a chunk, and one for each block.
        """
        held: dict[FramesBlock, Held] = {}
        chunks, alone = iter(chunks), None  # what the image decoder makes of the frames that are still to come
        chunk = next(chunks, None)
        while chunk is not None:
            following = next(chunks, None)
            if self.brightness_area:
                own = self._alone(parts, chunk)
                alone = own if alone is None else torch.cat([alone, own])
            for (frames,) in self._onward(parts, 0, chunk[None], held, is_end=following is None, most=len(chunk)):
                if alone is None:
                    yield frames
                else:
                    yield self._joined(frames, alone[: len(frames)], chunk.shape[-2:])
                    alone = alone[len(frames) :]
            chunk = following

    @torch.no_grad()
    def _alone(self, parts: Sequence[Part], latents: Tensor) -> Tensor:
        """What the image decoder makes of each frame, `t z h w` -> `t c fh fw`."""
        for part in parts:
            latents = part(latents)
        return latents

    def _joined(self, frames: Tensor, alone: Tensor, latent_size: Sequence[int]) -> Tensor:
        """The image decoder's frames `t c h w` with the brightness of the others in what is smaller than an area.

        What is larger is the mean of areas, bilinear between their middles.
        """
        share = frames.new_tensor(BRIGHTNESS)[:, None, None]
        brighter = ((frames - alone) * share).sum(dim=1, keepdim=True)
        areas = F.adaptive_avg_pool2d(brighter, [math.ceil(side / self.brightness_area) for side in latent_size])
        on_the_whole = F.interpolate(areas, size=frames.shape[-2:], mode="bilinear", align_corners=False)
        return alone + brighter - on_the_whole

    def _onward(
        self, parts: Sequence[Part], place: int, x: Tensor, held: dict[FramesBlock, Held], is_end: bool, most: int
    ) -> Iterator[Tensor]:
        """What comes out of the decoder, `most` frames or fewer at a time, when `x` goes into its part `place`."""
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
            yield from self._onward(parts, place + 1, piece, held, is_end and number == len(pieces), most)
