"""What a clip is to be, and what its checkpoint was trained on, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.config.schema import ConfigError, check_values, mapping_at
from ldm.video import parse_size

SD_V1_SIZE, DEFAULT_FRAMES, DEFAULT_FPS = 512, 5, 10.0
PRECISIONS = {"full": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ClipSettings:
    """All that decides how a clip looks, the seed, the checkpoint and given frames aside.

    prompt: plain, or a schedule as in `prompts`. height, width: pixels. fps: playback rate, which the network is told
    if it asks. scale: of the guidance, 1 for none; it pushes away from `negative_prompt`. motion_scale: of the guidance
    away from frames by themselves, 1 for none. eta: noise between DDIM steps. window: frames made at once, None for
    all. overlap: frames that windows share. known_noise: diffusion step of the noise on known frames. interpolate: how
    many times the frames of the video given for it.
    """

    prompt: str
    frames: int
    height: int
    width: int
    fps: float
    negative_prompt: str = ""
    steps: int = 50
    sampler: str = "ddim"
    scale: float = 7.5
    eta: float = 0.0
    window: int | None = None
    overlap: int = 0
    known_noise: int = 0
    interpolate: int = 1
    motion_scale: float = 1.0


# What a config may say at `sampling`: defaults of these, for people who sample from its checkpoint.
DEFAULTS = {
    "frames": int, "fps": float, "window": int, "steps": int, "sampler": str, "scale": float, "motion_scale": float,
}  # fmt: skip


def sampling_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a clip that a whole config gives at `sampling`, their kinds checked; raises `ConfigError`."""
    found = mapping_at("sampling", config.get("sampling"))
    for word in found:
        if word not in DEFAULTS:
            raise ConfigError(f"sampling.{word}: nothing reads this key; accepted here: {', '.join(DEFAULTS)}")
    check_values(found, DEFAULTS, "sampling")
    return dict(found)


@dataclass(frozen=True)
class GivenFiles:
    """Where given frames come from; None where nothing is given."""

    init_image: Path | None = None
    init_video: Path | None = None
    interpolate: Path | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Training:
    """What a checkpoint says of the clips it was trained on; None where it says nothing.

    rates: frames a second, one for each stride, the highest first. max_known_noise: diffusion step of the most noise on
    known frames.
    """

    frames: int | None
    rates: tuple[float, ...]
    size: tuple[int, int] | None  # height, width
    has_time: bool
    max_known_noise: int | None = None

    @property
    def fps(self) -> float | None:
        """The highest rate."""
        return self.rates[0] if self.rates else None

    @classmethod
    def of_config(cls, config: Mapping[str, Any], has_time: bool) -> Training:
        """What a whole config says, its values checked; raises `ConfigError`."""
        data, prepare = (mapping_at(name, config.get(name)) for name in ("data", "prepare"))
        params = mapping_at("data.params", data.get("params"))
        model = mapping_at("model.params", mapping_at("model", config.get("model")).get("params"))
        found = {"frames": params.get("frames"), "strides": params.get("strides", 1)}
        check_values(found, {"frames": int | None, "strides": int | Sequence[int]}, "data.params")
        check_values({"fps": prepare.get("fps")}, {"fps": float | None}, "prepare")
        strides = [found["strides"]] if isinstance(found["strides"], int) else found["strides"]
        fps, size = prepare.get("fps"), prepare.get("size")
        if fps is not None and not 0 < fps < float("inf"):
            raise ConfigError(f"prepare.fps: expected frames a second above 0, found {fps!r}")
        known = mapping_at("model.params.known_frames", model.get("known_frames"))
        check_values({"max_noise": known.get("max_noise", 0)}, {"max_noise": int}, "model.params.known_frames")
        return cls(
            found["frames"],
            tuple(sorted({fps / max(1, stride) for stride in strides or [1]}, reverse=True)) if fps else (),
            None if size is None else parse_size(size, "prepare.size"),
            has_time,
            known.get("max_noise", 0) if known else None,
        )
