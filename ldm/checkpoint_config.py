"""Configs that come inside files people exchange, checkpoints and records of clips: what such a config may say.

It may shape the networks of a model, each of a class of ours, and nothing more. It names no other class, so that no
file can start a program, and no other file: weights come from the checkpoint itself, words from where tokenizers are
searched for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.config_text import check_plain
from ldm.config_values import ConfigError, check_sizes, mapping_at

UNET = "ldm.modules.unet.UNetModel"
FIRST_STAGE = "ldm.modules.encoders.KLFirstStage"
VQ_FIRST_STAGE = "ldm.modules.encoders.VQFirstStage"
TEXT = "ldm.modules.encoders.CLIPTextEmbedder"
TEMPORAL_DECODER = "ldm.modules.temporal_decoder.TemporalDecoder"
DECODER_PLACE = "temporal_decoder_config"  # the one network that a model may do without
CLASSES = {
    "unet_config": (UNET,),
    "first_stage_config": (FIRST_STAGE, VQ_FIRST_STAGE),
    "cond_stage_config": (TEXT,),
    DECODER_PLACE: (TEMPORAL_DECODER,),
}
PATHS = ("ckpt_path", "tokenizer")


def confined(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config found in the file `where`, without paths; `ConfigError` where a network is of a class not ours."""
    try:
        check_plain(config)
    except ValueError as error:
        raise ConfigError(f"{where}: expected the config of a network, found what is none: {error}") from None
    model = mapping_at(f"{where}, model", config.get("model"))
    params = _without_paths(mapping_at(f"{where}, model.params", model.get("params")))
    for place, targets in CLASSES.items():
        if params.get(place) is not None:
            path = f"{where}, model.params.{place}"
            node = mapping_at(path, params[place])
            if node.get("target") not in targets:
                raise ConfigError(
                    f"{path}.target: expected {' or '.join(targets)}, all that the config inside such a file may name "
                    f"here, found {node.get('target')!r}; nothing was built. Give your own config with --config"
                )
            check_sizes(node.get("params"), f"{path}.params", is_network=True)
            params[place] = {"target": node["target"], "params": _without_paths(mapping_at(path, node.get("params")))}
    return {**config, "model": {**model, "params": params}}


def _without_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key not in PATHS}
