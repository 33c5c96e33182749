"""Weights of networks that take known frames: stored in one tensor by others, apart by us."""

from __future__ import annotations

import pytest
import torch

from ldm.checkpoint import (
    CheckpointError,
    has_temporal_layers,
    load_unet,
    load_weights,
    read_checkpoint,
    unet_node,
    unet_tensors,
)
from ldm.checkpoint.names import UNET_PREFIX, average_names
from ldm.checkpoint.shapes import FIRST, KNOWN, infer_unet_kwargs, join_known, split_known
from ldm.modules.unet import UNetModel
from tests.conftest import fill_by_rule
from tests.tiny_checkpoint import UNET, assert_same, image_state, image_weights, part, write_bare, write_safetensors

TOLD = {"in_channels": 9, "fps_embedding": True, "known_level_embedding": True}


def inpainting_state():
    """A tiny sd-v1-5-inpainting: the image model's tensors, nine input channels in the first of them."""
    state = part(image_state(), UNET_PREFIX)
    more = fill_by_rule({"more": (32, 5, 3, 3)})["more"]
    state[FIRST] = torch.cat([state[FIRST], more], dim=1)
    return {UNET_PREFIX + name: tensor for name, tensor in state.items()}


def filled(words):
    unet = UNetModel(**UNET | words)
    unet.load_state_dict(fill_by_rule({name: tensor.shape for name, tensor in unet.state_dict().items()}))
    return unet


def test_the_inpainting_variant_is_split(tmp_path):
    state = inpainting_state()
    path = write_safetensors(state, tmp_path / "inpainting.safetensors")
    unet = load_unet(path)
    assert (unet.in_channels, unet.takes_known_frames) == (9, True)
    assert_same(image_weights(unet), part(image_state(), UNET_PREFIX))
    assert torch.equal(unet.state_dict()[KNOWN], state[UNET_PREFIX + FIRST][:, 4:])
    assert not has_temporal_layers(unet_tensors(read_checkpoint(path)))  # more input channels are no sense of time


def test_split_and_join_are_opposites():
    whole = part(inpainting_state(), UNET_PREFIX)
    apart = split_known(whole)
    assert list(apart[FIRST].shape) == [32, 4, 3, 3] and list(apart[KNOWN].shape) == [32, 5, 3, 3]
    assert_same(join_known(apart), whole)
    assert_same(split_known(apart), apart)
    image = part(image_state(), UNET_PREFIX)
    assert_same(split_known(image), image)
    assert_same(join_known(image), image)


def test_averages_are_chosen_before_the_split(tmp_path):
    state = inpainting_state()
    names = average_names(part(state, UNET_PREFIX))
    averages = {names[name]: tensor + 1 for name, tensor in part(state, UNET_PREFIX).items()}
    checkpoint = read_checkpoint(write_bare(state | averages, tmp_path / "with-averages.ckpt"))
    assert torch.equal(unet_tensors(checkpoint)[KNOWN], state[UNET_PREFIX + FIRST][:, 4:] + 1)
    assert torch.equal(unet_tensors(checkpoint, use_average=False)[KNOWN], state[UNET_PREFIX + FIRST][:, 4:])


def test_weights_for_known_frames_need_a_network_that_takes_them(tmp_path):
    path = write_safetensors(inpainting_state(), tmp_path / "inpainting.safetensors")
    message = r"expected a network conditioned on known frames.*in_channels to 2 \* out_channels"
    with pytest.raises(CheckpointError, match=message):
        load_unet(path, UNET)
    with pytest.raises(CheckpointError, match=message):  # the way of training
        load_weights(UNetModel(**UNET), unet_tensors(read_checkpoint(path)), where=f"UNet from {path}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"in_channels": 9, "known_level_embedding": True}, "conditioned on the frame rate.*fps_embedding to true"),
        (
            {"in_channels": 9, "fps_embedding": True},
            "conditioned on the noise on known .*known_level_embedding to true",
        ),
    ],
)
def test_embeddings_need_a_network_that_has_them(tmp_path, words, message):
    path = write_bare(filled(TOLD).state_dict(), tmp_path / "told.ckpt")
    with pytest.raises(CheckpointError, match=message):
        load_unet(path, UNET | words)


def test_a_network_may_be_told_more_than_its_weights_were(tmp_path):
    path = write_safetensors(image_state(), tmp_path / "image.safetensors")
    for unet in (load_unet(path, UNET | TOLD), UNetModel(**UNET | TOLD)):
        load_weights(unet, unet_tensors(read_checkpoint(path)), where="here")
        assert not unet.state_dict()[KNOWN].any()
        assert_same(image_weights(unet), part(image_state(), UNET_PREFIX))
    video = write_bare(filled({}).state_dict(), tmp_path / "video.ckpt")
    assert not load_unet(video, UNET | TOLD).state_dict()["conditioning.temporal.fps.2.weight"].any()


def test_half_of_a_condition_is_an_error(tmp_path):
    state = filled(TOLD).state_dict()
    del state["conditioning.temporal.fps.2.bias"]
    path = write_bare(state, tmp_path / "torn.ckpt")
    for config in (None, UNET | TOLD):
        with pytest.raises(CheckpointError, match=r"1 missing: conditioning.temporal.fps.2.bias"):
            load_unet(path, config)


def test_a_checkpoint_has_all_that_its_own_config_asks_for(tmp_path):
    state = {UNET_PREFIX + name: tensor for name, tensor in filled(TOLD).state_dict().items()}
    del state[UNET_PREFIX + KNOWN]
    config = {"model": {"params": {"unet_config": {"target": "ldm.modules.unet.UNetModel", "params": UNET | TOLD}}}}
    torch.save({"state_dict": state, "config": config}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"1 missing: conditioning.temporal.known.weight"):
        load_unet(tmp_path / "last.ckpt")
    load_unet(tmp_path / "last.ckpt", UNET | TOLD)  # a config given by hand may add known frames


ONE_KIND = [{"temporal_attention": False}, {"temporal_kernel_size": None}]  # of the layers over time
ALL_KINDS = [{}, *ONE_KIND, {"temporal_changes_only": True}, ONE_KIND[1] | {"temporal_changes_only": True}]


@pytest.mark.parametrize("words", [{"in_channels": 9}, {"fps_embedding": True}, TOLD, *ALL_KINDS])
def test_the_tensors_tell_what_the_network_is_told(tmp_path, words):
    words = UNET | words
    state = filled(words).state_dict()
    expected = {"temporal_kernel_size": 3} | words | {"transformer_depth": 1}
    assert infer_unet_kwargs(state, num_heads=4) == expected
    checkpoint = read_checkpoint(write_bare(state, tmp_path / "bare.ckpt"))
    assert unet_node(checkpoint)["params"] == expected | {"num_heads": 8}
    assert_same(load_unet(checkpoint).state_dict(), state)
