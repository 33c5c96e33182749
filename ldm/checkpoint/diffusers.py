"""Checkpoints out as folders in diffusers' layout: the image part for diffusers, or the form of the author's release.

diffusers' own classes say what such a folder looks like; nothing here is read from the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer

from ldm.checkpoint import has_temporal_layers, latent_scale, load_first_stage, unet_node, unet_tensors
from ldm.checkpoint import names as checkpoint_author
from ldm.checkpoint.encoders import SD_V1_SCALE, build_text_encoder, has_temporal_decoder
from ldm.checkpoint.names import FIRST_STAGE_PREFIX, TEXT_PREFIX, unet_to_diffusers
from ldm.checkpoint.reading import Checkpoint, CheckpointError
from ldm.checkpoint.shapes import KNOWN, join_known
from ldm.checkpoint.temporal import MODEL_WORDS
from ldm.checkpoint.writing import check_room, halved, replacing_folder, save_tensors
from ldm.config import build
from ldm.config.schema import mapping_at
from ldm.diffusion.known_frames import fill_of_config
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.modules.encoders import KLFirstStage
from ldm.modules.state_dicts import POSITION_IDS, account
from ldm.modules.temporal import is_temporal
from ldm.modules.unet import Embedding

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULE_WORDS = ("timesteps", "linear_start", "linear_end", "parameterization", "zero_terminal_snr")
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
KNOWN_LEVEL, TIME_BIAS = "conditioning.temporal.known_level.", "time_embed.2.bias"
# What a pipeline may have besides and this one lacks.
LEFT_OUT = ("feature_extractor", "image_encoder", "safety_checker")


def write_diffusers(checkpoint: Checkpoint, folder: Path, half: bool = False) -> list[str]:
    """The image part as a pipeline that diffusers' `from_pretrained` loads; returns what was left out, in words.

    Running averages take the place of weights. A network that takes known frames becomes an inpainting pipeline, whose
    known latents carry no noise.
    half: float16 in place of float32.
    """
    tensors = _with_clean_known_frames(unet_tensors(checkpoint))
    notes = ["the temporal layers were left out: diffusers has no place for them"] * has_temporal_layers(tensors)
    image = join_known({name: tensor for name, tensor in tensors.items() if not is_temporal(name) or name == KNOWN})
    config = unet_config(unet_node(checkpoint)["params"])
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
    names = unet_to_diffusers(image)
    image = {names[name]: tensor for name, tensor in image.items()}
    account(network.state_dict(), image, where=f"diffusers' UNet from {checkpoint.path}")
    config = {"_class_name": "UNet2DConditionModel", **config}
    return notes + _write_folder(checkpoint, folder, image, config, half)


def write_author(checkpoint: Checkpoint, folder: Path, half: bool = False) -> list[str]:
    """The video network in the form of the author's release; as `write_diffusers`.

    Raises `CheckpointError` for a network that cannot be said in it.
    """
    words = unet_node(checkpoint)["params"]
    tensors = unet_tensors(checkpoint)
    against = checkpoint_author.incompatible_kwargs(words)
    if not has_temporal_layers(tensors):
        against.insert(0, "it has no temporal layers")
    if against:
        raise CheckpointError(
            f"{checkpoint.path}: expected a network of the kind of the author's release, found one that cannot be "
            f"written in its form: {'; '.join(against)}. Write it with --format full or diffusers."
        )
    tensors = join_known(tensors)
    names = checkpoint_author.unet_to_release(tensors)
    config = {"_class_name": checkpoint_author.CLASS_NAME, **unet_config(words)}
    tensors = {names[name]: tensor for name, tensor in tensors.items()}
    return _write_folder(checkpoint, folder, tensors, config, half)


def unet_config(words: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of diffusers' UNet2DConditionModel for the image part of a `UNetModel` of these words."""
    multipliers = words.get("channel_mult", (1, 2, 4, 4))
    attends = [2**level in words["attention_resolutions"] for level in range(len(multipliers))]
    return {
        "sample_size": 64,
        "in_channels": words["in_channels"],
        "out_channels": words["out_channels"],
        "block_out_channels": [words["model_channels"] * multiplier for multiplier in multipliers],
        "layers_per_block": words["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attends)],
        "cross_attention_dim": words.get("context_dim", 768),
        "transformer_layers_per_block": words.get("transformer_depth", 1),
        "attention_head_dim": words.get("num_heads", 8),  # diffusers' word for their number
    }


def scheduler_of(words: Mapping[str, Any]) -> DDIMScheduler:
    """diffusers' DDIM with the noise schedule that the words of a model say, set as Stable Diffusion v1 is sampled."""
    words = {word: words.get(word, default) for word, default in MODEL_WORDS.items()}
    schedule = {word: words[word] for word in SCHEDULE_WORDS}
    build({"target": "ldm.diffusion.schedule.NoiseSchedule", "params": schedule}, "model")  # checks them
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if words["zero_terminal_snr"] else {}
    return DDIMScheduler(
        num_train_timesteps=words["timesteps"],
        beta_start=words["linear_start"],
        beta_end=words["linear_end"],
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=PREDICTIONS[words["parameterization"]],
        **zero,
    )


def _with_clean_known_frames(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's tensors with what level 0 of the noise on known frames adds to every timestep in the bias of those."""
    parts = {
        name.removeprefix(KNOWN_LEVEL): one.float() for name, one in tensors.items() if name.startswith(KNOWN_LEVEL)
    }
    if not parts:
        return dict(tensors)
    embedding = Embedding(*reversed(parts["0.weight"].shape))
    embedding.load_state_dict(parts)
    with torch.no_grad():
        bias = tensors[TIME_BIAS].float() + embedding(torch.zeros(1))[0]
    return {**tensors, TIME_BIAS: bias.to(tensors[TIME_BIAS])}


def _notes_of_known_frames(params: Mapping[str, Any]) -> list[str]:
    """What users of a network that takes known frames must know, by the words of its model."""
    words = params.get("known_frames")
    if fill_of_config(words if words is None else mapping_at("model.params.known_frames", words)) != "blend":
        return []
    return [
        "in clips this network expects the blend of the known frames, not zeros, in the channels of known latents "
        "where nothing is known (model.params.known_frames.fill: blend), which the folder does not say"
    ]


def _write_folder(
    checkpoint: Checkpoint, folder: Path, unet: Mapping[str, Tensor], config: Mapping[str, Any], half: bool
) -> list[str]:
    """The UNet's tensors and config, and the other parts of the checkpoint beside them; what was left out, in words."""
    unet = halved(unet, checkpoint.path) if half else unet
    others = {name: one for name, one in checkpoint.tensors.items() if not name.startswith("model")}
    check_room(folder, {**unet, **others})
    own = checkpoint.config
    params = own["model"]["params"] if own else {}
    notes = _notes_of_known_frames(params) if config["in_channels"] != config["out_channels"] else []
    notes += ["the temporal decoder was left out: diffusers has no place for it"] * has_temporal_decoder(checkpoint)
    with replacing_folder(folder) as partial:
        (partial / "unet").mkdir()
        save_tensors(unet, partial / "unet" / WEIGHTS, {})
        _write_json(partial / "unet" / "config.json", {**config, "_diffusers_version": diffusers.__version__})
        scheduler_of(params).save_pretrained(partial / "scheduler")
        notes += _write_first_stage(checkpoint, partial, half) + _write_text_encoder(checkpoint, partial, half)
        if config["_class_name"] != checkpoint_author.CLASS_NAME:
            _write_index(partial, takes_known_frames=config["in_channels"] != config["out_channels"])
    return notes


def _write_first_stage(checkpoint: Checkpoint, folder: Path, half: bool) -> list[str]:
    if not any(name.startswith(FIRST_STAGE_PREFIX) for name in checkpoint.tensors):
        return ["there is no image autoencoder in the input, so none was written"]
    first_stage = load_first_stage(checkpoint)
    if not isinstance(first_stage, KLFirstStage):
        return ["the image autoencoder was left out: diffusers' Stable Diffusion takes none with a codebook"]
    own = checkpoint.config
    scale = latent_scale(own) if own else checkpoint.scale_factor or SD_V1_SCALE
    first_stage.network.register_to_config(scaling_factor=scale)
    (first_stage.network.half() if half else first_stage.network).save_pretrained(folder / "vae")
    return []


def _write_text_encoder(checkpoint: Checkpoint, folder: Path, half: bool) -> list[str]:
    if not any(name.startswith(TEXT_PREFIX) for name in checkpoint.tensors):
        return ["there is no text encoder in the input, so none was written"]
    text_encoder = build_text_encoder(checkpoint)
    tensors = text_encoder.compvis_state_dict()  # the spelling that every version of transformers reads
    del tensors[POSITION_IDS]
    tensors = halved(tensors, checkpoint.path) if half else tensors
    (folder / "text_encoder").mkdir()
    save_tensors(tensors, folder / "text_encoder" / "model.safetensors", {})
    text_encoder.network.config.architectures = ["CLIPTextModel"]
    text_encoder.network.config.save_pretrained(folder / "text_encoder")
    try:
        _write_tokenizer(text_encoder.tokenizer, folder / "tokenizer")
    except UserError as error:
        return [f"the tokenizer was left out: {error}"]
    return []


def _write_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """As transformers writes it, and the two files beside it that others, and ours, read."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_atomically(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    write_atomically(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")


def _write_index(folder: Path, takes_known_frames: bool) -> None:
    """`model_index.json`, which makes a pipeline of the parts that are there."""
    pipeline = "StableDiffusionInpaintPipeline" if takes_known_frames else "StableDiffusionPipeline"
    parts = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    index |= {name: part if (folder / name).is_dir() else [None, None] for name, part in parts.items()}
    index |= {name: [None, None] for name in LEFT_OUT} | {"requires_safety_checker": False}
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(contents, indent=2, sort_keys=True) + "\n")
