"""State dicts of the encoders under CompVis's names, and the strict comparison of a state dict with a network.

A table maps module names in CompVis's naming to those in diffusers'; what follows the module (`.weight`, ...) is the
same in both. The UNet's tables are in `ldm.checkpoint.names`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor

from ldm.errors import CheckpointError

SHOWN_NAMES = 5
POSITION_IDS = "text_model.embeddings.position_ids"
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# How folders written before diffusers 0.17, the public Stable Diffusion ones among them, call the same four.
_OLD_VAE_ATTENTION = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def first_stage_table(num_levels: int, num_res_blocks: int) -> dict[str, str]:
    """Modules of CompVis's autoencoders, relative to `first_stage_model.` -> modules of diffusers' of the same kind."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    res_block = {part: part for part in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    for side in ("encoder", "decoder"):
        table |= nested(side, side, {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"})
        table |= nested(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", res_block)
        table |= nested(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _VAE_ATTENTION)
        table |= nested(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", res_block)
    for level in range(num_levels):
        up = num_levels - 1 - level
        for block in range(num_res_blocks):
            table |= nested(
                f"encoder.down.{level}.block.{block}", f"encoder.down_blocks.{level}.resnets.{block}", res_block
            )
            attention = f"encoder.down_blocks.{level}.attentions.{block}"
            table |= nested(f"encoder.down.{level}.attn.{block}", attention, _VAE_ATTENTION)
        for block in range(num_res_blocks + 1):
            table |= nested(f"decoder.up.{level}.block.{block}", f"decoder.up_blocks.{up}.resnets.{block}", res_block)
            attention = f"decoder.up_blocks.{up}.attentions.{block}"
            table |= nested(f"decoder.up.{level}.attn.{block}", attention, _VAE_ATTENTION)
        table[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        table[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    return table


def first_stage_from_diffusers(names: Collection[str]) -> dict[str, str]:
    """Each name of diffusers' AutoencoderKL, in its old or new spelling, -> CompVis's, relative to the first stage."""
    num_levels = len(numbers_after("encoder.down_blocks.", names))
    table = first_stage_table(num_levels, len(numbers_after("encoder.down_blocks.0.resnets.", names)))
    old = {}
    for side in ("encoder", "decoder"):
        old |= nested(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _OLD_VAE_ATTENTION)
    return renamed(names, inverse(table) | inverse(old))


def text_name(name: str) -> str:
    """A name of a CLIP text model, with or without the `text_model.` that transformers 5 leaves out -> with it."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def as_convolution(name: str, tensor: Tensor) -> Tensor:
    """A first-stage attention weight in CompVis's form, a 1x1 convolution (linear in diffusers); others unchanged."""
    is_attention = re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", name) is not None
    return tensor[..., None, None] if is_attention and tensor.ndim == 2 else tensor


def renamed(names: Iterable[str], table: dict[str, str]) -> dict[str, str]:
    """Each name -> the name whose leading module is replaced as `table` says; unknown ones stay as they are."""
    return {name: _replace_module(name, table) for name in names}


def _replace_module(name: str, table: dict[str, str]) -> str:
    module = name
    while "." in module:
        module = module.rpartition(".")[0]
        if module in table:
            return table[module] + name[len(module) :]
    return name


def nested(outer: str, other_outer: str, parts: dict[str, str]) -> dict[str, str]:
    return {f"{outer}.{part}": f"{other_outer}.{other}" for part, other in parts.items()}


def inverse(table: dict[str, str]) -> dict[str, str]:
    return {other: name for name, other in table.items()}


def numbers_after(prefix: str, names: Iterable[str]) -> set[int]:
    found = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    return {int(number) for number in found if number.isdigit()}


def account(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    *,
    where: str,
    may_miss: Callable[[str], bool] = lambda name: False,
    spelled: Callable[[Collection[str]], Mapping[str, str]] | None = None,
) -> None:
    """Compare names and shapes; a `CheckpointError` lists what is missing, what is unexpected and what does not fit.

    where: what is being filled and from where, for the message.
    may_miss: says of an expected name that it need not be there.
    spelled: gives the names that the message is to show, see `Checkpoint.spelled`.
    """
    missing = [name for name in expected if name not in found and not may_miss(name)]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} (expected {list(tensor.shape)}, found {list(found[name].shape)})"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if spelled is not None and missing + unexpected:
        names = spelled([*expected, *unexpected])
        missing, unexpected = ([names[name] for name in some] for some in (missing, unexpected))
    counts = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    problems = [f"{len(names)} {word}: {few(names)}" for word, names in counts if names]
    if problems:
        raise CheckpointError(
            f"{where}: the tensors in the file are not those of the network ({len(expected)} expected, {len(found)} "
            f"found); {'; '.join(problems)}. Check that the file and the config belong together."
        )


def few(names: Collection[str]) -> str:
    """The first names, for a message."""
    shown = ", ".join(name[:200] for name in list(names)[:SHOWN_NAMES])
    return shown + (", ..." if len(names) > SHOWN_NAMES else "")
