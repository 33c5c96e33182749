"""The names of Stable Diffusion v1's tensors: CompVis's, which we use everywhere, and diffusers'.

Pure tables made of strings: no tensor is touched here. A table maps the name of a module in CompVis's naming to its
name in diffusers'; what follows the module's name (`.weight`, `.temporal.bias`, ...) is the same in both.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ldm.modules.state_dicts import inverse, nested, numbers_after, renamed

UNET_PREFIX = "model.diffusion_model."
FIRST_STAGE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
TEMPORAL_DECODER_PREFIX = "temporal_decoder."
AVERAGE_PREFIX = "model_ema."
AVERAGE_COUNTERS = ("model_ema.decay", "model_ema.num_updates")

SCHEDULE_NAMES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
# Written by CompVis's code only under some of its options; nothing here needs them.
OPTIONAL_NAMES = ("scale_factor", "logvar", "lvlb_weights", "cond_ids")

_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass(frozen=True)
class UNetLayout:
    """How many blocks a UNet has and which levels have transformers: all that its names depend on."""

    num_levels: int
    num_res_blocks: int
    attention_levels: frozenset[int]

    @classmethod
    def of_compvis(cls, names: Collection[str]) -> UNetLayout:
        """The layout that CompVis names, relative to `model.diffusion_model.`, belong to."""
        last = max(numbers_after("input_blocks.", names), default=0)
        blocks = range(1, last + 1)
        downs = [index for index in blocks if _has(f"input_blocks.{index}.0.op.", names)]
        num_res_blocks = downs[0] - 1 if downs else last
        with_attention = {index for index in blocks if _has(f"input_blocks.{index}.1.", names)}
        levels = frozenset((index - 1) // (num_res_blocks + 1) for index in with_attention)
        return cls(len(downs) + 1, num_res_blocks, levels)

    @classmethod
    def of_diffusers(cls, names: Collection[str]) -> UNetLayout:
        """The layout that the names of diffusers' UNet2DConditionModel belong to."""
        levels = numbers_after("down_blocks.", names)
        num_res_blocks = len(numbers_after("down_blocks.0.resnets.", names))
        with_attention = {level for level in levels if _has(f"down_blocks.{level}.attentions.", names)}
        return cls(len(levels), num_res_blocks, frozenset(with_attention))

    def first_block(self, level: int) -> str:
        """CompVis's name of the first residual block of `level` on the way down."""
        return f"input_blocks.{1 + level * (self.num_res_blocks + 1)}.0"


def unet_table(layout: UNetLayout) -> dict[str, str]:
    """Modules of the UNet, relative to `model.diffusion_model.` -> modules of UNet2DConditionModel."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    table |= nested("middle_block.0", "mid_block.resnets.0", _RES_BLOCK)
    table |= nested("middle_block.2", "mid_block.resnets.1", _RES_BLOCK)
    index = 1
    for level in range(layout.num_levels):
        for block in range(layout.num_res_blocks):
            table |= nested(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{block}", _RES_BLOCK)
            if level in layout.attention_levels:
                table[f"input_blocks.{index}.1"] = f"down_blocks.{level}.attentions.{block}"
            index += 1
        if level + 1 < layout.num_levels:
            table[f"input_blocks.{index}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            index += 1
    index = 0
    for up, level in enumerate(reversed(range(layout.num_levels))):
        has_attention = level in layout.attention_levels
        for block in range(layout.num_res_blocks + 1):
            table |= nested(f"output_blocks.{index}.0", f"up_blocks.{up}.resnets.{block}", _RES_BLOCK)
            if has_attention:
                table[f"output_blocks.{index}.1"] = f"up_blocks.{up}.attentions.{block}"
            if level > 0 and block == layout.num_res_blocks:
                table[f"output_blocks.{index}.{1 + has_attention}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
            index += 1
    return table


def unet_from_diffusers(names: Collection[str]) -> dict[str, str]:
    """Each name of a UNet2DConditionModel -> CompVis's name, relative to `model.diffusion_model.`.

    A name that such a UNet does not have stays as it is, for the accounting that follows to find.
    """
    return renamed(names, inverse(unet_table(UNetLayout.of_diffusers(names))))


def unet_to_diffusers(names: Collection[str]) -> dict[str, str]:
    """Each CompVis name of a UNet, relative to `model.diffusion_model.`, -> its name in a UNet2DConditionModel."""
    return renamed(names, unet_table(UNetLayout.of_compvis(names)))


def average_name(name: str) -> str:
    """The name of the average of a parameter, as CompVis calls both: its dots are deleted."""
    return AVERAGE_PREFIX + name.replace(".", "")


def average_names(names: Iterable[str]) -> dict[str, str]:
    """Each UNet name, relative to `model.diffusion_model.`, -> the name of its average, whose dots are deleted.

    The names of averages cannot be read backwards: this table, made from the network's names, is the way to do it.
    """
    table = {name: average_name(f"diffusion_model.{name}") for name in names}
    assert len(set(table.values())) == len(table), "two parameters of the UNet share the name of their average"
    return table


def _has(prefix: str, names: Iterable[str]) -> bool:
    return any(name.startswith(prefix) for name in names)


class Kind(StrEnum):
    """What a checkpoint is; the naming of its UNet follows from it."""

    OURS = "ours", "a checkpoint of this project"
    COMPVIS = "compvis", "Stable Diffusion v1 in CompVis's names"
    DIFFUSERS = "diffusers", "Stable Diffusion v1 in diffusers' names"
    AUTHOR = "author", "the author's later release"
    TEMPORAL = "temporal", "temporal layers alone"

    description: str

    def __new__(cls, name: str, description: str) -> Kind:
        kind = str.__new__(cls, name)
        kind._value_, kind.description = name, description
        return kind

    @property
    def has_folder(self) -> bool:
        """Whether it may come as a folder in diffusers' layout, with a tokenizer of its own."""
        return self in (Kind.DIFFUSERS, Kind.AUTHOR)

    def spelled(self, names: Collection[str]) -> dict[str, str]:
        """Names of a UNet, relative to `model.diffusion_model.` -> the names in files of this kind."""
        if self is Kind.AUTHOR:
            return unet_to_release(names)
        return unet_to_diffusers(names) if self is Kind.DIFFUSERS else {name: name for name in names}


CLASS_NAME = "UNetPseudo3DConditionModel"
# Kwargs of `UNetModel` for the release's network that shapes do not give.
RELEASE_KWARGS = {"norm_over_clip": True, "temporal_attention": {"positions": False}}
NUM_HEADS = 8  # of temporal attention; spatial attention has as many there

# Parts of a name there and here; the first that fits counts.
_PARTS = (
    (".spatial_conv.", "."),
    (".temporal_conv.", ".temporal."),
    (".attn_temporal.to_out.0.", ".temporal.to_out."),
    (".norm_temporal.", ".temporal.norm."),
    (".attn_temporal.", ".temporal."),
)
_CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv", "conv_out")


def is_release(names: Iterable[str]) -> bool:
    """Whether these are names of the release's UNet."""
    return any(".spatial_conv." in name for name in names)


def unet_from_release(names: Collection[str]) -> dict[str, str]:
    """Each name of the release's UNet -> ours, relative to `model.diffusion_model.`; unknown ones stay as they are."""
    plain = {name: _plain(name) for name in names}
    table = unet_from_diffusers(plain.values())
    return {name: table[other] for name, other in plain.items()}


def unet_to_release(names: Collection[str]) -> dict[str, str]:
    """Each name of our UNet, relative to `model.diffusion_model.`, -> the release's."""
    return {name: _release_name(other) for name, other in unet_to_diffusers(names).items()}


def incompatible_kwargs(kwargs: Mapping[str, Any]) -> list[str]:
    """The kwargs of a `UNetModel` that the release's network does not have, described."""
    attention = kwargs.get("temporal_attention")
    has_attention = attention is not False
    attention = attention if isinstance(attention, Mapping) else {"positions": has_attention}
    wanted = {
        "temporal": (kwargs.get("temporal", True), True),
        "temporal_attention": (has_attention, True),
        "norm_over_clip": (kwargs.get("norm_over_clip", False), True),
        "temporal_attention.positions": (attention.get("positions", True), False),
        "temporal_attention.local": (attention.get("local"), None),
        "temporal_kernel_size": (kwargs.get("temporal_kernel_size", 3), 3),
        "temporal_changes_only": (kwargs.get("temporal_changes_only", False), False),
        "fps_embedding": (kwargs.get("fps_embedding", False), False),
        "known_level_embedding": (kwargs.get("known_level_embedding", False), False),
        "num_heads": (kwargs.get("num_heads", 8), NUM_HEADS),
    }
    return [
        f"{key} is {json.dumps(found)} (there: {json.dumps(there)})"
        for key, (found, there) in wanted.items()
        if found != there
    ]


def _plain(name: str) -> str:
    """The release's name in our spelling of temporal layers, diffusers' for image layers."""
    for there, here in _PARTS:
        if there in name:
            return name.replace(there, here)
    return name


def _release_name(name: str) -> str:
    if ".transformer_blocks." in name:
        for there, here in _PARTS[2:]:
            if here in name:
                return name.replace(here, there)
    module, _, last = name.rpartition(".")
    if module.endswith(".temporal"):
        return f"{module.removesuffix('.temporal')}.temporal_conv.{last}"
    return f"{module}.spatial_conv.{last}" if module.rpartition(".")[2] in _CONVOLUTIONS else name
