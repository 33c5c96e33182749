"""The encoders out of one checkpoint file, and how they are recognised again."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import (
    CheckpointError,
    encoder_tensors,
    first_stage_tensors,
    identity,
    latent_scale,
    load_encoders,
    load_first_stage,
    load_text_encoder,
    read_checkpoint,
    text_tensors,
    unet_tensors,
)
from ldm.checkpoint.names import FIRST_STAGE_PREFIX, TEXT_PREFIX, UNET_PREFIX
from ldm.modules.encoders import CLIPTextEmbedder
from tests.tiny_checkpoint import (
    CONFIG,
    DDCONFIG,
    TEXT,
    assert_same,
    config_for,
    image_state,
    part,
    save_as_public,
    video_state,
    write_bare,
    write_safetensors,
    write_zip,
)


@pytest.fixture(scope="module")
def public_ckpt(tmp_path_factory):
    return save_as_public(image_state(), tmp_path_factory.mktemp("public") / "sd-v1-4.ckpt")


def test_first_stage_with_its_training_loss(tmp_path):
    path = write_bare(image_state() | {"first_stage_model.loss.logvar": torch.zeros([])}, tmp_path / "vae.ckpt")
    first_stage = load_first_stage(path, CONFIG["model"]["params"]["first_stage_config"])
    assert_same(first_stage.compvis_state_dict(), part(image_state(), FIRST_STAGE_PREFIX))
    assert not first_stage.training and not any(parameter.requires_grad for parameter in first_stage.parameters())


@pytest.mark.parametrize("spelling", ["text_model.", ""])
def test_text_encoder_in_both_spellings(tmp_path, spelling):
    old = TEXT_PREFIX + "text_model."
    state = {name.replace(old, TEXT_PREFIX + spelling): tensor for name, tensor in image_state().items()}
    encoder = load_text_encoder(write_bare(state, tmp_path / "a.ckpt"), CONFIG["model"]["params"]["cond_stage_config"])
    expected = CLIPTextEmbedder(TEXT, random_seed=3)
    assert torch.equal(encoder.encode(["a road"]), expected.encode(["a road"]))
    assert all(name.startswith("text_model.") for name in encoder.compvis_state_dict())


def test_parts_that_are_not_there(tmp_path):
    unet_only = {name: tensor for name, tensor in image_state().items() if name.startswith(UNET_PREFIX)}
    checkpoint = read_checkpoint(write_bare(unet_only, tmp_path / "unet.ckpt"))
    with pytest.raises(CheckpointError, match=r"expected the CLIP text encoder \(cond_stage_model.transformer"):
        text_tensors(checkpoint)
    with pytest.raises(CheckpointError, match=r"expected the image autoencoder \(first_stage_model"):
        first_stage_tensors(checkpoint)
    checkpoint.tensors = part(image_state(), "cond_stage_model.")
    with pytest.raises(CheckpointError, match=r"expected the UNet \(model.diffusion_model"):
        unet_tensors(checkpoint)


def test_encoders_of_a_video_config(public_ckpt):
    config = config_for(public_ckpt)
    first_stage, text_encoder = load_encoders(OmegaConf.create(config))
    assert_same(first_stage.compvis_state_dict(), part(image_state(), FIRST_STAGE_PREFIX))
    assert_same(text_encoder.compvis_state_dict(), part(image_state(), TEXT_PREFIX))
    encoders = {name: tensor for name, tensor in image_state().items() if name.startswith(("first_", "cond_"))}
    assert_same(encoder_tensors(OmegaConf.create(config)), encoders)


def test_encoders_from_their_own_files(tmp_path, public_ckpt):
    other = {name: tensor + 1 for name, tensor in part(image_state(), FIRST_STAGE_PREFIX).items()}
    write_bare(other, tmp_path / "kl.ckpt")
    config = config_for(public_ckpt)
    config["model"]["params"]["first_stage_config"]["params"]["ckpt_path"] = str(tmp_path / "kl.ckpt")
    config["model"]["params"]["cond_stage_config"]["params"]["random_seed"] = 11
    first_stage, text_encoder = load_encoders(config)
    assert_same(first_stage.compvis_state_dict(), other)
    seeded = CLIPTextEmbedder(TEXT, random_seed=11).compvis_state_dict()
    assert_same(text_encoder.compvis_state_dict(), seeded)
    stored = encoder_tensors(config)
    assert_same(part(stored, FIRST_STAGE_PREFIX), other)
    assert_same(part(stored, TEXT_PREFIX), seeded)
    # In a training checkpoint the seeded encoder is read like any other.
    torch.save({"state_dict": video_state() | stored, "config": config}, tmp_path / "last.ckpt")
    assert_same(load_text_encoder(tmp_path / "last.ckpt").compvis_state_dict(), seeded)
    assert_same(load_first_stage(tmp_path / "last.ckpt").compvis_state_dict(), other)


def test_encoders_without_weights_or_nodes(public_ckpt):
    with pytest.raises(CheckpointError, match=r"first_stage_config: expected the path of its weights .* found neither"):
        load_encoders(CONFIG)
    config = config_for(public_ckpt)
    del config["model"]["params"]["cond_stage_config"]
    with pytest.raises(CheckpointError, match=r"model.params.cond_stage_config: expected a node with target and"):
        encoder_tensors(config)


def test_encoder_tensors_are_checked(public_ckpt):
    params = {"ddconfig": DDCONFIG | {"ch": 64}, "embed_dim": 4}
    wider = {"target": "ldm.modules.encoders.KLFirstStage", "params": params}
    with pytest.raises(CheckpointError, match=r"first stage from .*of another shape: encoder.conv_in.weight"):
        encoder_tensors(config_for(public_ckpt, first_stage_config=wider))


@pytest.mark.parametrize("write", [write_zip, write_safetensors])
def test_tensors_stay_mapped_to_their_own_part_of_the_file(tmp_path, write):
    path = write(image_state(), tmp_path / "weights")
    tensors = encoder_tensors(config_for(path))
    torch.save(tensors, tmp_path / "copy.ckpt")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert (tmp_path / "copy.ckpt").stat().st_size < 1.2 * size + 100_000


def test_identity_is_that_of_the_values(tmp_path, public_ckpt):
    checkpoint = read_checkpoint(public_ckpt)
    first_stage = load_first_stage(checkpoint, CONFIG["model"]["params"]["first_stage_config"])
    text_encoder = load_text_encoder(checkpoint, CONFIG["model"]["params"]["cond_stage_config"])
    assert identity(first_stage_tensors(checkpoint)) == identity(first_stage.compvis_state_dict())
    assert identity(text_tensors(checkpoint)) == identity(text_encoder.compvis_state_dict())
    tensors = encoder_tensors(config_for(public_ckpt))
    assert identity(part(tensors, TEXT_PREFIX)) == identity(text_encoder.compvis_state_dict())
    half = {name: tensor.half() for name, tensor in first_stage.compvis_state_dict().items()}
    first_stage.load_compvis_state_dict(half)
    assert identity(half) == identity(first_stage.compvis_state_dict()) != identity(first_stage_tensors(checkpoint))
    assert identity({"a": torch.zeros(2)}) != identity({"b": torch.zeros(2)})
    assert len(identity({})) == 64


def test_latent_scale(tmp_path, public_ckpt):
    assert latent_scale(config_for(public_ckpt, scale_factor=0.5)) == 0.5
    config = config_for(public_ckpt)
    del config["model"]["params"]["scale_factor"]
    assert latent_scale(config) == 0.18215
    write_bare(image_state() | {"scale_factor": torch.tensor(0.25)}, tmp_path / "scaled.ckpt")
    assert latent_scale(config_for(tmp_path / "scaled.ckpt", scale_factor=None)) == 0.25
    with pytest.raises(CheckpointError, match=r"scale_factor: expected a number, since .*sd-v1-4.ckpt does not say"):
        latent_scale(config_for(public_ckpt, scale_factor=None))
