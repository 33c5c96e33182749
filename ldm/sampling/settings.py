"""Settings of a clip, and the clips that a checkpoint was trained on, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.config.schema import ConfigError, check_values, mapping_at
from ldm.video import parse_size

SD_V1_SIZE, DEFAULT_FRAMES, DEFAULT_FPS = 512, 5, 10.0
MAX_FRAMES = 10_000  # of a clip
PRECISIONS = {"full": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ClipSettings:
    """Everything that determines a clip, except seed, checkpoint and given frames; the `clip` of a record.

    prompt: plain, or a schedule as in `prompts`. height, width: pixels. fps: playback rate, also an input of networks
    with `fps_embedding`. scale: classifier-free guidance away from `negative_prompt`, 1 for none. motion_scale:
    guidance away from independent frames, 1 for none. eta: noise between DDIM steps. window: frames sampled together,
    None for all. overlap: frames that windows share. known_noise: diffusion step of the noise on known frames.
    interpolate: frame rate of the clip divided by that of the given video.
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


# Keys that a config may have at `sampling`: defaults for the checkpoint's users.
DEFAULTS = {
    "frames": int, "fps": float, "window": int, "steps": int, "sampler": str, "scale": float, "motion_scale": float,
}  # fmt: skip


def sampling_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The checked `sampling` section of a whole config; raises `ConfigError`."""
    found = mapping_at("sampling", config.get("sampling"))
    for key in found:
        if key not in DEFAULTS:
            raise ConfigError(f"sampling.{key}: nothing reads this key; accepted here: {', '.join(DEFAULTS)}")
    check_values(found, DEFAULTS, "sampling")
    return dict(found)


@dataclass(frozen=True)
class GivenFiles:
    """Files of given frames; None where nothing is given."""

    init_image: Path | None = None
    init_video: Path | None = None
    interpolate: Path | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class TrainingClips:
    """The clips that a checkpoint was trained on; None for what its config does not say.

    rates: frames a second, one for each stride, highest first. has_time: whether there are temporal layers.
    max_known_noise: diffusion step of the strongest noise on known frames. known_kinds: of known frames in training.
    """

    frames: int | None
    rates: tuple[float, ...]
    size: tuple[int, int] | None  # height, width
    has_time: bool
    max_known_noise: int | None = None
    known_kinds: tuple[str, ...] | None = None

    @property
    def fps(self) -> float | None:
        """The highest rate."""
        return self.rates[0] if self.rates else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], has_time: bool) -> TrainingClips:
        """Read a whole config and check its values; raises `ConfigError`."""
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
        mixture = mapping_at("model.params.known_frames.mixture", known.get("mixture"))
        return cls(
            found["frames"],
            tuple(sorted({fps / max(1, stride) for stride in strides or [1]}, reverse=True)) if fps else (),
            None if size is None else parse_size(size, "prepare.size"),
            has_time,
            known.get("max_noise", 0) if known else None,
            tuple(kind for kind, weight in mixture.items() if weight) if mixture else None,
        )
