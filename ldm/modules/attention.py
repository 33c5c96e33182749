"""The transformer blocks of Stable Diffusion v1's UNet, under their public parameter names, with temporal attention.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix E.2.1. Shapes as in
`temporal.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.backends import attend
from ldm.modules.nn import AttentionProjections, GroupNorm32, at_each_pixel, zeroed
from ldm.modules.recompute import Run, in_chunks, run_directly
from ldm.modules.temporal import TemporalAttention


class GEGLU(nn.Module):
    """Gated linear unit with an exact GELU gate (Shazeer 2020), value before gate: `... d` -> `... d'`."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, then a linear layer: `... d` -> `... d`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The public code has dropout at index 1, at rate zero in every Stable Diffusion v1 model.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(AttentionProjections):
    """Attention of a frame's tokens to the caption of the clip, or to each other with a `context_dim` of None."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        num_heads: int = 8,
        dim_head: int = 64,
        backend: str = "sdpa",
    ) -> None:
        super().__init__()
        inner_dim = num_heads * dim_head
        context_dim = query_dim if context_dim is None else context_dim
        self.num_heads = num_heads
        self.backend = backend
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`(b t) n c`, `b m d` -> `(b t) n c`; keys and values are computed once per clip."""
        batch, num_tokens = (x if context is None else context).shape[0], x.shape[1]
        q, k, v = self.project(x, context)
        q = rearrange(q, "(b t) n (heads d) -> b heads (t n) d", b=batch, heads=self.num_heads)
        k, v = (rearrange(y, "b m (heads d) -> b heads m d", heads=self.num_heads) for y in (k, v))
        x = attend(q, k, v, self.backend)
        return self.to_out(rearrange(x, "b heads (t n) d -> (b t) n (heads d)", n=num_tokens))


class BasicTransformerBlock(nn.Module):
    """Self-attention within the frame, cross-attention to the text, attention over frames, feed-forward; all residual.

    temporal: options of `TemporalAttention` besides dim and back end; None: the block has none.
    feed_forward_frames: number of frames per call of the feed-forward, see `recompute.in_chunks`; None: all.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dim_head: int,
        context_dim: int | None = None,
        temporal: Mapping[str, Any] | None = None,
        feed_forward_frames: int | None = None,
        backend: str = "sdpa",
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, num_heads, dim_head, backend)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, num_heads, dim_head, backend)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.temporal = None if temporal is None else TemporalAttention(dim, backend=backend, **temporal)
        self.feed_forward_frames = feed_forward_frames
        self.run_part: Run = run_directly

    def forward(self, x: Tensor, context: Tensor | None = None, num_frames: int | None = None) -> Tensor:
        """`(b t) n c`, `b m d` -> `(b t) n c`."""
        x = self.run_part(self._within_frames, x)
        x = self.run_part(self._to_text, x, context)
        if num_frames is not None and self.temporal is not None:
            x = self.run_part(self._across_frames, x, num_frames)
        return self.run_part(self._feed_forward, x)

    def _within_frames(self, x: Tensor) -> Tensor:
        return self.attn1(self.norm1(x)) + x

    def _to_text(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.attn2(self.norm2(x), context) + x

    def _across_frames(self, x: Tensor, num_frames: int) -> Tensor:
        return self.temporal(x, num_frames) + x

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self.feed_forward_frames is None:
            return self._feed_forward_whole(x)
        weights = [*self.norm3.parameters(), *self.ff.parameters()]
        return in_chunks(self._feed_forward_whole, weights, x, self.feed_forward_frames)

    def _feed_forward_whole(self, x: Tensor) -> Tensor:
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of each frame, residual; initialised to the identity."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        dim_head: int,
        depth: int = 1,
        context_dim: int | None = None,
        temporal: Mapping[str, Any] | None = None,
        feed_forward_frames: int | None = None,
        backend: str = "sdpa",
    ) -> None:
        super().__init__()
        inner_dim = num_heads * dim_head
        block = (inner_dim, num_heads, dim_head, context_dim, temporal, feed_forward_frames, backend)
        self.norm = GroupNorm32(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, inner_dim, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(*block) for _ in range(depth)])
        self.proj_out = zeroed(nn.Conv2d(inner_dim, channels, 1))
        self.run_part: Run = run_directly

    def run_parts_by(self, run: Run) -> None:
        """Call its parts (projections, each attention, feed-forward) by `run`, see `recompute`."""
        for part in (self, *self.transformer_blocks):
            part.run_part = run

    def forward(self, x: Tensor, context: Tensor | None = None, num_frames: int | None = None) -> Tensor:
        """`(b t) c h w`, `b m d` -> `(b t) c h w`."""
        residual, height = x, x.shape[-2]
        x = self.run_part(self._to_tokens, x)
        for block in self.transformer_blocks:
            x = block(x, context, num_frames)
        return self.run_part(self._to_pixels, x, height) + residual

    def _to_tokens(self, x: Tensor) -> Tensor:
        return rearrange(at_each_pixel(self.proj_in, self.norm(x)), "bt c h w -> bt (h w) c")

    def _to_pixels(self, x: Tensor, height: int) -> Tensor:
        return at_each_pixel(self.proj_out, rearrange(x, "bt (h w) c -> bt c h w", h=height))
