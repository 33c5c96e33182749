"""The networks of a benchmark: ours, and public ones of other projects if they are installed.

All have the same widths and get the same clips, steps and captions; each keeps the heads, kernels, memory format and
text conditioning of its published form. None of their code is part of this project.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.unet import UNetModel

LATENT_CHANNELS, NUM_TOKENS, CONTEXT_DIM = 4, 77, 768
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """The common input of a comparison: channels of the levels, clips, frames, side of a latent, precision (`fp32`, or
    `bf16`: float32 weights under autocast)."""

    widths: tuple[int, ...]
    batch: int
    frames: int
    side: int
    precision: str

    def __str__(self) -> str:
        return f"{self.batch} x {self.frames} frames, {'/'.join(map(str, self.widths))}, {self.side}x{self.side}"

    @property
    def is_full_size(self) -> bool:
        """Whether the channels are those of Stable Diffusion v1."""
        return self.widths[0] == 320


@dataclass(frozen=True)
class Inputs:
    """Noisy latents and targets `b t c h w`, steps `b`, captions `b n d`."""

    latents: Tensor
    target: Tensor
    timesteps: Tensor
    context: Tensor

    @classmethod
    def draw(cls, case: Case, device: torch.device | str) -> Inputs:
        shape = (case.batch, case.frames, LATENT_CHANNELS, case.side, case.side)
        generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(42)
        latents, target = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
        context = torch.randn(case.batch, NUM_TOKENS, CONTEXT_DIM, device=device, generator=generator)
        return cls(latents, target, torch.arange(1, case.batch + 1, device=device) * 100, context)


@dataclass(frozen=True)
class Contestant:
    """A network: how it is built, and how it predicts `b t c h w`.

    lacks: what the others have and it does not; its time is not fully comparable.
    """

    title: str
    build: Callable[[Case], nn.Module]
    predict: Callable[[nn.Module, Inputs], Tensor]
    lacks: str = ""


def _ours(case: Case, temporal: bool = True) -> nn.Module:
    base = case.widths[0]
    if any(width % base for width in case.widths):
        raise UserError(f"widths: expected multiples of the first, {base}, found {case.widths}")
    return UNetModel(
        in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, model_channels=base, num_res_blocks=2,
        attention_resolutions=[2**level for level in range(len(case.widths) - 1)],
        channel_mult=[width // base for width in case.widths], num_heads=8, context_dim=CONTEXT_DIM, temporal=temporal,
        attention_backend="auto",
    )  # fmt: skip


def _of_clip(network: nn.Module, inputs: Inputs) -> Tensor:
    return network(inputs.latents, inputs.timesteps, inputs.context)


def _folded(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Frames as a batch of images, each with its step and caption."""
    frames = inputs.latents.shape[1]
    return (
        rearrange(inputs.latents, "b t c h w -> (b t) c h w"),
        repeat(inputs.timesteps, "b -> (b t)", t=frames),
        repeat(inputs.context, "b n d -> (b t) n d", t=frames),
    )


def _of_frames(network: nn.Module, inputs: Inputs) -> Tensor:
    out = network(*_folded(inputs))
    return rearrange(out, "(b t) c h w -> b t c h w", t=inputs.latents.shape[1])


def _down_and_up(kind: str, case: Case) -> dict[str, Any]:
    """diffusers' kwargs for the layout of Stable Diffusion v1: text at all levels but the last."""
    levels = len(case.widths)
    return {
        "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "block_out_channels": case.widths,
        "cross_attention_dim": CONTEXT_DIM, "sample_size": case.side, "layers_per_block": 2,
        "down_block_types": (f"CrossAttnDownBlock{kind}",) * (levels - 1) + (f"DownBlock{kind}",),
        "up_block_types": (f"UpBlock{kind}",) + (f"CrossAttnUpBlock{kind}",) * (levels - 1),
    }  # fmt: skip


def _unet2d(case: Case) -> nn.Module:
    return _import("diffusers").UNet2DConditionModel(**_down_and_up("2D", case), attention_head_dim=8)


def _unet2d_predict(network: nn.Module, inputs: Inputs) -> Tensor:
    out = network(*_folded(inputs), return_dict=False)[0]
    return rearrange(out, "(b t) c h w -> b t c h w", t=inputs.latents.shape[1])


def _unet3d(case: Case) -> nn.Module:
    # ModelScope's heads are 64 wide; narrow networks get eight heads, or the first transformer dominates.
    dim_head = 64 if case.is_full_size else case.widths[0] // 8
    return _import("diffusers").UNet3DConditionModel(**_down_and_up("3D", case), attention_head_dim=dim_head)


def _motion(case: Case) -> nn.Module:
    kwargs = {**_down_and_up("Motion", case), "motion_max_seq_length": max(32, case.frames), "num_attention_heads": 8}
    return _import("diffusers").UNetMotionModel(**kwargs, use_motion_mid_block=True)


def _unet3d_predict(network: nn.Module, inputs: Inputs) -> Tensor:
    clip = rearrange(inputs.latents, "b t c h w -> b c t h w")
    out = network(clip, inputs.timesteps, inputs.context, return_dict=False)[0]
    return rearrange(out, "b c t h w -> b t c h w")


def _motion_predict(network: nn.Module, inputs: Inputs) -> Tensor:
    clip = rearrange(inputs.latents, "b t c h w -> b c t h w")
    out = network(clip, inputs.timesteps, _folded(inputs)[2], return_dict=False)[0]
    return rearrange(out, "b c t h w -> b t c h w")


def _make_a_video(case: Case) -> nn.Module:
    levels, base = len(case.widths), case.widths[0]
    return _import("make_a_video_pytorch").SpaceTimeUnet(
        dim=base, channels=LATENT_CHANNELS, dim_mult=tuple(width // base for width in case.widths),
        self_attns=(True,) * (levels - 1) + (False,), temporal_compression=(False,) * levels,
        resnet_block_depths=(1,) * levels,
    )  # fmt: skip


def _video_diffusion(case: Case) -> nn.Module:
    base = case.widths[0]
    multiples = tuple(width // base for width in case.widths)
    return _import("video_diffusion_pytorch").Unet3D(dim=base, channels=LATENT_CHANNELS, dim_mults=multiples)


def _without_text(network: nn.Module, inputs: Inputs) -> Tensor:
    out = network(rearrange(inputs.latents, "b t c h w -> b c t h w"), inputs.timesteps.float())
    return rearrange(out, "b c t h w -> b t c h w")


CONTESTANTS = {
    "ours": Contestant("ours", _ours, _of_clip),
    "per_frame": Contestant(
        "ours without temporal layers, frame by frame", lambda case: _ours(case, False), _of_frames, "time"
    ),
    "unet2d": Contestant("diffusers UNet2DConditionModel, frame by frame", _unet2d, _unet2d_predict, "time"),
    "unet3d": Contestant("diffusers UNet3DConditionModel", _unet3d, _unet3d_predict),
    "motion": Contestant("diffusers UNetMotionModel", _motion, _motion_predict),
    "make_a_video": Contestant("make-a-video-pytorch SpaceTimeUnet", _make_a_video, _without_text, "text"),
    "video_diffusion": Contestant("video-diffusion-pytorch Unet3D", _video_diffusion, _without_text, "text"),
}
PEERS = tuple(name for name in CONTESTANTS if name != "ours")


def check_peers(names: Sequence[str]) -> tuple[str, ...]:
    """The names of the contestants, ours first. Raises UserError for an unknown one."""
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise UserError(f"--peers: expected some of {', '.join(PEERS)}, found {', '.join(unknown)}")
    return ("ours", *(name for name in dict.fromkeys(names) if name != "ours"))


def why_missing(name: str) -> str | None:
    """Why a contestant is not available; None if it is."""
    if name in ("ours", "per_frame"):
        return None
    packages = {"make_a_video": "make_a_video_pytorch", "video_diffusion": "video_diffusion_pytorch"}
    try:
        _import(packages.get(name, "diffusers"))
    except UserError as error:
        return str(error)
    return None


def _import(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{package}: not installed here ({reason}); pip install --no-deps {package.replace('_', '-')} and what it "
            "imports, or leave it out with --peers"
        ) from error
