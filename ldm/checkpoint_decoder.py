"""The temporal decoder of a checkpoint: its tensors, its config, and whether it belongs to an image autoencoder.

It lies in checkpoints of its own training, and in bundles and whole models beside the image decoder that it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import identity
from ldm.checkpoint_config import DECODER_PLACE
from ldm.checkpoint_encoders import opened, own_node, plain
from ldm.checkpoint_names import TEMPORAL_DECODER_PREFIX
from ldm.checkpoint_reading import Checkpoint, CheckpointError, account, part_tensors
from ldm.config import ConfigError, build
from ldm.modules.temporal_decoder import TemporalDecoder

DECODER_PATH = f"model.params.{DECODER_PLACE}"
DECODING = ("decoder.", "post_quant_conv.", "quantize.")  # what of an image autoencoder decodes


def has_temporal_decoder(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds one."""
    return any(name.startswith(TEMPORAL_DECODER_PREFIX) for name in checkpoint.tensors)


def temporal_decoder_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Its tensors, names relative to `temporal_decoder.`; `CheckpointError` where there are none."""
    return part_tensors(checkpoint, TEMPORAL_DECODER_PREFIX, "temporal decoder (temporal_decoder.*)")


def temporal_decoder_node(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `temporal_decoder_config` inside the checkpoint; `CheckpointError` where there is none."""
    node = own_node(checkpoint, DECODER_PLACE)
    if node is None:
        raise CheckpointError(
            f"{checkpoint.path}: expected {DECODER_PATH} in the config of a checkpoint with a temporal decoder, found "
            "none. Take the file that its training wrote."
        )
    return node


def load_temporal_decoder(source: Checkpoint | str | Path, first_stage: Mapping[str, Tensor]) -> TemporalDecoder:
    """The temporal decoder of a checkpoint, frozen, in evaluation mode, float32.

    first_stage: the tensors of the image autoencoder whose latents it is to decode. Raises `CheckpointError` where
    tensors are missing, unexpected or of other shapes, and where it was trained with another image decoder.
    """
    checkpoint = opened(source)
    tensors, node = temporal_decoder_tensors(checkpoint), plain(temporal_decoder_node(checkpoint))
    where = f"temporal decoder from {checkpoint.path}"
    try:
        with torch.device("meta"):
            outline = build(node, DECODER_PATH)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    account(outline.state_dict(), tensors, where=where)
    decoder = build(node, DECODER_PATH)
    decoder.load_state_dict(tensors)
    if not torch.equal(decoder.made_for, digest_of(first_stage)):
        raise CheckpointError(
            f"{where}: expected one that was trained with this image autoencoder, found one that was trained with "
            "another decoder of pictures. Take the autoencoder that its training started from, or leave it out."
        )
    return decoder.requires_grad_(False).eval()


def digest_of(first_stage: Mapping[str, Tensor]) -> Tensor:
    """What `TemporalDecoder.made_for` says of an image autoencoder: a sha256 of what decodes in it, 32 bytes, uint8.

    Of its weights as float16, in which bundles carry them.
    """
    decoding = {name: tensor.half() for name, tensor in first_stage.items() if name.startswith(DECODING)}
    return torch.tensor(list(bytes.fromhex(identity(decoding))), dtype=torch.uint8)
