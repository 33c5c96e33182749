"""Layers over time for the decoder of an image autoencoder, which stays as it is.

Decoded one by one, the frames of a clip flicker: each has its own guess at what its latents leave open. A decoder that
sees the neighbouring frames too makes one guess for all of them (Blattmann et al. 2023, "Align your Latents", section
3.1.1). Here residual blocks over three frames lie between the parts of the image decoder. Fresh ones change nothing,
pictures never pass through them, and the frames of a clip go through chunk by chunk, with the same result as at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.group_norm import GroupNorm32

DIGEST_BYTES = 32


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

    def forward(self, x: Tensor, held: tuple[Tensor, Tensor] | None, is_end: bool) -> tuple[Tensor, Any]:
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
        held = x[:, t:], seen[:, -2:]
        if t == 0:
            return x[:, :0], held
        around = torch.cat([seen[:, shift : shift + t] for shift in range(3)], dim=2)
        found = self.put(F.silu(self.gather(rearrange(around, "b t c h w -> (b t) c h w"))))
        return x[:, :t] + rearrange(found, "(b t) c h w -> b t c h w", b=b), held


class TemporalDecoder(nn.Module):
    """The blocks over time of one image decoder.

    ch, ch_mult: of the autoencoder's `ddconfig`.
    blocks: how many there are at each size of the picture, from that of the latents up; the last size of the decoder,
        where a block costs most, has none. A frame depends on as many frames before and after it as there are blocks.

    `made_for` is a digest of the image decoder that it was trained with, see `checkpoint_decoder`; zeros before.
    """

    def __init__(self, ch: int, ch_mult: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        widths = [ch * mult for mult in reversed(ch_mult)]
        channels = [widths[0], *widths][: len(widths)]  # after the middle, and after each size but the last
        is_list = isinstance(blocks, Sequence) and all(isinstance(num, int) and num >= 0 for num in blocks)
        if not is_list or len(blocks) > len(channels) or not sum(blocks):
            raise UserError(
                f"temporal decoder, blocks: expected up to {len(channels)} whole numbers, one for each size from that "
                f"of the latents up, not all 0, found {blocks!r}"
            )
        numbers = [*blocks, *[0] * (len(channels) - len(blocks))]
        self.places = nn.ModuleList(
            nn.ModuleList(FramesBlock(width) for _ in range(num)) for width, num in zip(channels, numbers, strict=True)
        )
        self.register_buffer("made_for", torch.zeros(DIGEST_BYTES, dtype=torch.uint8))

    def forward(self, parts: Sequence[Any], latents: Tensor) -> Tensor:
        """Whole clips, latents `b t z h w`, unscaled, -> frames, about [-1, 1], `b t c fh fw`.

        parts: of the image decoder, see `FirstStage.decoder_parts`.
        """
        return self._push(parts, latents, {}, is_end=True)

    def decode(self, parts: Sequence[Any], chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The latents of one clip chunk by chunk, `t z h w` each, -> its frames `t' c fh fw`, some chunks later.

        The frames are those of `forward` for the whole clip, but never more than a chunk of them are in the works.
        """
        held: dict[FramesBlock, Any] = {}
        chunks = iter(chunks)
        chunk = next(chunks, None)
        while chunk is not None:
            following = next(chunks, None)
            frames = self._push(parts, chunk[None], held, is_end=following is None)[0]
            if len(frames):
                yield frames
            chunk = following

    def _push(self, parts: Sequence[Any], latents: Tensor, held: dict[FramesBlock, Any], is_end: bool) -> Tensor:
        b, x = len(latents), latents
        for part, blocks in zip(parts, [*self.places, ()], strict=True):
            x = rearrange(part(rearrange(x, "b t c h w -> (b t) c h w")), "(b t) c h w -> b t c h w", b=b)
            for block in blocks:
                x, held[block] = block(x, held.get(block), is_end)
                if x.shape[1] == 0:
                    return x
        return x
