"""Weights out of the folders that diffusers writes."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ldm.checkpoint import CheckpointError, load_first_stage, load_text_encoder, load_unet
from ldm.errors import UserError
from ldm.modules.encoders import CLIPTextEmbedder
from tests.conftest import relative_error
from tests.tiny_checkpoint import (
    CONFIG,
    TEXT,
    UNET,
    assert_same,
    image_weights,
)


@pytest.fixture
def diffusers_folder(tmp_path):
    """A pipeline folder made by diffusers and transformers themselves, with the modules that are in it."""
    unet = UNet2DConditionModel(
        layers_per_block=1,
        block_out_channels=[32, 64],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=16,
        attention_head_dim=4,
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        latent_channels=4,
    ).eval()
    text = CLIPTextEmbedder(TEXT, random_seed=5)
    unet.save_pretrained(tmp_path / "pipeline" / "unet")
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    text.network.save_pretrained(tmp_path / "pipeline" / "text_encoder")
    return tmp_path / "pipeline", unet, vae, text


@torch.no_grad()
def test_diffusers_folder(diffusers_folder):
    folder, unet, vae, text = diffusers_folder
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    timesteps = torch.tensor([7, 981])
    ours = load_unet(folder).eval()  # four heads, which only config.json tells
    assert relative_error(ours(x, timesteps, context), unet(x, timesteps, context).sample) < 2e-5
    first_stage = load_first_stage(folder, CONFIG["model"]["params"]["first_stage_config"])
    pixels = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    assert relative_error(first_stage.encode(pixels), vae.encode(pixels).latent_dist.parameters) < 2e-5
    text_encoder = load_text_encoder(folder, CONFIG["model"]["params"]["cond_stage_config"])
    assert torch.equal(text_encoder.encode(["a road"]), text.encode(["a road"]))
    assert_same(image_weights(load_unet(folder / "unet")), image_weights(ours))  # one part by itself
    single = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert_same(image_weights(load_unet(single, UNET)), image_weights(ours))


def test_partial_diffusers_folder(diffusers_folder):
    folder = diffusers_folder[0]
    for name in ("vae", "text_encoder"):
        (folder / name).rename(folder / f"not-{name}")
    load_unet(folder)
    with pytest.raises(CheckpointError, match="expected the image autoencoder"):
        load_first_stage(folder)


def test_diffusers_folder_own_tokenizer_is_used(diffusers_folder):
    folder = diffusers_folder[0]
    (folder / "tokenizer").mkdir()
    with pytest.raises(UserError, match=r"tokenizer .*pipeline: expected a folder with vocab.json"):
        load_text_encoder(folder, CONFIG["model"]["params"]["cond_stage_config"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_linear_projection": True}, "expected use_linear_projection = false.*found true"),
        ({"attention_head_dim": [5, 10]}, r"one number of attention heads for all levels, found \[5, 10\]"),
        ({"class_embed_type": "timestep"}, "expected class_embed_type = null"),
        ({"_class_name": "UNet3DConditionModel"}, r"expected _class_name UNet2DConditionModel or \w+, found UNet3D"),
    ],
)
def test_diffusers_folder_of_another_family(diffusers_folder, change, message):
    path = diffusers_folder[0] / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_unet(diffusers_folder[0])


def test_diffusers_folder_with_missing_or_broken_files(diffusers_folder, tmp_path):
    folder = diffusers_folder[0]
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected the weights in diffusion_pytorch_model.safetensors, found no"):
        load_unet(folder)
    (folder / "unet" / "config.json").write_text("{half")
    with pytest.raises(CheckpointError, match=r"config.json: expected JSON, found something else"):
        load_unet(folder)
    (folder / "unet" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"expected a JSON object, found list"):
        load_unet(folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: expected the unet's config, found no such file"):
        load_unet(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"expected a diffusers folder with unet/.* found nothing"):
        load_unet(empty)
