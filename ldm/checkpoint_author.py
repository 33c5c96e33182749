"""The author's later public release, a diffusers folder with a `UNetPseudo3DConditionModel`: its names and words.

Its image layers are called as diffusers calls them but for `spatial_conv`, its temporal layers `temporal_conv`,
`attn_temporal` and `norm_temporal`. The norms of its residual blocks take their statistics over the clip, and its
attention over frames knows no positions. Pure tables made of strings: no tensor is touched here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ldm.checkpoint_names import unet_from_diffusers, unet_to_diffusers

CLASS_NAME = "UNetPseudo3DConditionModel"
# What its network is, beside what shapes tell, in the words of `UNetModel`.
WORDS = {"norm_over_clip": True, "temporal_attention": {"positions": False}}
NUM_HEADS = 8  # of the attention over frames, which shares the number of the others there

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


def words_against(words: Mapping[str, Any]) -> list[str]:
    """What keeps a network with these words of `UNetModel` from being written in the form of the release."""
    attention = words.get("temporal_attention")
    has_attention = attention is not False
    attention = attention if isinstance(attention, Mapping) else {"positions": has_attention}
    wanted = {
        "temporal": (words.get("temporal", True), True),
        "temporal_attention": (has_attention, True),
        "norm_over_clip": (words.get("norm_over_clip", False), True),
        "temporal_attention.positions": (attention.get("positions", True), False),
        "temporal_attention.local": (attention.get("local"), None),
        "temporal_kernel_size": (words.get("temporal_kernel_size", 3), 3),
        "temporal_changes_only": (words.get("temporal_changes_only", False), False),
        "fps_embedding": (words.get("fps_embedding", False), False),
        "known_level_embedding": (words.get("known_level_embedding", False), False),
        "num_heads": (words.get("num_heads", 8), NUM_HEADS),
    }
    return [
        f"{word} is {json.dumps(found)} (there: {json.dumps(there)})"
        for word, (found, there) in wanted.items()
        if found != there
    ]


def _plain(name: str) -> str:
    """The release's name without its own words: diffusers' where it is an image layer's."""
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
