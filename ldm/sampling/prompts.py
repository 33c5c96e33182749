"""Prompts that change along a clip: "0: a road at dawn | 40: a road at night".

Each part names the frame, counted from 0, where its prompt has taken over; between two such frames the embeddings are
blended linearly, after the last one nothing changes any more. Anything not wholly of this form is a plain prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import einsum
from torch import Tensor

from ldm.errors import UserError

_NUMBER = re.compile("[0-9]{1,18}")
EXAMPLE = "'0: dawn road | 40: night road'"


@dataclass(frozen=True)
class PromptSchedule:
    """`prompts[i]` alone holds at frame `starts[i]`; `starts` begins with 0 and rises."""

    starts: tuple[int, ...]
    prompts: tuple[str, ...]

    def shares(self, frames: Sequence[int]) -> Tensor:
        """How much of each prompt is in each of the frames, by number -> float32 `t p`; each frame's add up to 1."""
        shares = torch.zeros(len(frames), len(self.starts))
        for row, frame in zip(shares, frames, strict=True):
            last = sum(start <= frame for start in self.starts) - 1
            row[last] = 1
            if last + 1 < len(self.starts):
                begin, end = self.starts[last : last + 2]
                row[last + 1] = (frame - begin) / (end - begin)
                row[last] -= row[last + 1]
        return shares

    def context(self, embeddings: Mapping[str, Tensor], frames: Sequence[int]) -> Tensor:
        """The blended embeddings `1 n d` of the frames, by number -> `t n d`."""
        stacked = torch.cat([embeddings[prompt] for prompt in self.prompts])
        return einsum(self.shares(frames).to(stacked), stacked, "t p, p n d -> t n d")


def read_schedule(prompt: str, num_frames: int) -> PromptSchedule | None:
    """The schedule that a prompt for a clip of `num_frames` frames spells out; None for a plain prompt.

    Raises UserError for a schedule that does not begin at frame 0, does not rise, or goes past the end. One part alone
    is a schedule only if it begins at 0, so that "2001: a space odyssey" stays a prompt.
    """
    parts = [_part(part) for part in prompt.split("|")]
    if not all(parts) or (len(parts) == 1 and parts[0][0] != 0):
        return None
    starts = tuple(start for start, _ in parts)
    if starts[0] != 0:
        raise UserError(
            f"prompt schedule: expected the first prompt at frame 0, as in {EXAMPLE}, found frame {starts[0]}"
        )
    for before, after in pairwise(starts):
        if after == before:
            raise UserError(f"prompt schedule: expected one prompt for a frame, found two for frame {after}")
        if after < before:
            raise UserError(f"prompt schedule: expected frames that rise, found {after} after {before}; reorder them")
    if starts[-1] >= num_frames:
        raise UserError(
            f"prompt schedule: expected frames from 0 to {num_frames - 1}, as the clip has {num_frames}, found "
            f"{starts[-1]}; ask for more --frames or an earlier frame"
        )
    return PromptSchedule(starts, tuple(text for _, text in parts))


def prompts_in(prompt: str, num_frames: int) -> tuple[str, ...]:
    """The texts to encode for a prompt, plain or a schedule."""
    schedule = read_schedule(prompt, num_frames)
    return (prompt,) if schedule is None else schedule.prompts


def odd_part(prompt: str) -> str | None:
    """The first part that keeps a prompt which begins like a schedule from being one; None for any other prompt."""
    parts = prompt.split("|")
    if len(parts) == 1 or not _part(parts[0]):
        return None
    return next((part.strip() for part in parts if not _part(part)), None)


def _part(part: str) -> tuple[int, str] | None:
    """Frame and prompt; None for what does not begin with a frame and a colon."""
    number, colon, text = part.partition(":")
    return (int(number.strip()), text.strip()) if colon and _NUMBER.fullmatch(number.strip()) else None
