"""Prompt files, and prompts that change along a clip: "0: a road at dawn | 40: a road at night".

Each part of a schedule names the frame, counted from 0, at which its prompt holds alone; embeddings are interpolated
linearly in between, and constant after the last part. Any other text is a plain prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from einops import einsum
from torch import Tensor

from ldm.errors import UserError

_NUMBER = re.compile("[0-9]{1,18}")
# Of other tools: (word:1.5), ((word)), [from:to:0.5], <lora:name:1>.
_SYNTAX = re.compile(r"\([^()]*:\s*[\d.]+\s*\)|\(\([^()]*\)\)|\[[^][]*:[^][]*\]|\[\[[^][]*\]\]|<\w+:[^<>]+>")
EXAMPLE = "'0: dawn road | 40: night road'"


@dataclass(frozen=True)
class PromptSchedule:
    """`prompts[i]` holds alone at frame `starts[i]`; `starts` increases from 0."""

    starts: tuple[int, ...]
    prompts: tuple[str, ...]

    def shares(self, frames: Sequence[int]) -> Tensor:
        """The weight of each prompt in the frames with these indices -> float32 `t p`; rows sum to 1."""
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
        """Interpolated embeddings `1 n d` for the frames with these indices -> `t n d`."""
        stacked = torch.cat([embeddings[prompt] for prompt in self.prompts])
        return einsum(self.shares(frames).to(stacked), stacked, "t p, p n d -> t n d")


def read_schedule(prompt: str, num_frames: int) -> PromptSchedule | None:
    """Parse a prompt for a clip of `num_frames` frames; None for a plain prompt.

    Raises UserError for a schedule that does not begin at frame 0, does not increase, or exceeds the clip. A single
    part is a schedule only at frame 0: "2001: a space odyssey" is a plain prompt.
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
            raise UserError(f"prompt schedule: expected one prompt per frame, found two for frame {after}")
        if after < before:
            raise UserError(f"prompt schedule: expected increasing frames, found {after} after {before}; reorder them")
    if starts[-1] >= num_frames:
        raise UserError(
            f"prompt schedule: expected frames 0 to {num_frames - 1} of the clip, found {starts[-1]}; set more "
            "--frames or an earlier frame"
        )
    return PromptSchedule(starts, tuple(text for _, text in parts))


def prompts_in(prompt: str, num_frames: int) -> tuple[str, ...]:
    """The texts to encode for a prompt, plain or a schedule."""
    schedule = read_schedule(prompt, num_frames)
    return (prompt,) if schedule is None else schedule.prompts


def odd_part(prompt: str) -> str | None:
    """The first malformed part of a prompt that begins like a schedule; None for other prompts."""
    parts = prompt.split("|")
    if len(parts) == 1 or not _part(parts[0]):
        return None
    return next((part.strip() for part in parts if not _part(part)), None)


def is_schedule(prompt: str) -> bool:
    """Whether a text has the form of a schedule of several prompts."""
    return "|" in prompt and all(map(_part, prompt.split("|")))


def unread_syntax(prompt: str) -> str | None:
    """The first expression of a prompt that other tools read as a command, such as "(word:1.5)"; None without any."""
    found = _SYNTAX.search(prompt)
    return None if found is None else found[0]


def _part(part: str) -> tuple[int, str] | None:
    """Frame and prompt; None if the part does not begin with a frame and a colon."""
    number, colon, text = part.partition(":")
    return (int(number.strip()), text.strip()) if colon and _NUMBER.fullmatch(number.strip()) else None


def read_prompt_lines(path: Path) -> list[tuple[int, str]]:
    """Number and text of each line of a prompt file, without empty lines and comments (#); raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: expected a text file with one prompt a line, found no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a text file in UTF-8, found other bytes ({error.reason})") from error
    numbered = enumerate(map(str.strip, lines), start=1)
    found = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not found:
        raise UserError(f"{path}: expected one prompt a line, found none")
    return found
