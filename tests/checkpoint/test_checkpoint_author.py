"""The author's later release: every name of it both ways, and its recorded clips."""

from __future__ import annotations

import json

import pytest
import torch
from einops import rearrange

from ldm.checkpoint import CheckpointError, load_unet, read_checkpoint, unet_node, unet_tensors
from ldm.checkpoint.names import (
    RELEASE_KWARGS,
    UNET_PREFIX,
    incompatible_kwargs,
    is_release,
    unet_from_release,
    unet_to_release,
)
from ldm.checkpoint.shapes import FIRST, KNOWN, infer_unet_kwargs, join_known, split_known
from ldm.modules.unet import UNetModel
from tests.conftest import GOLDENS, relative_error
from tests.tiny_checkpoint import assert_same, write_bare, write_safetensors
from tests.tiny_release import FULL, TINY, release_state, write_folder

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def keys() -> dict[str, list[int]]:
    return json.loads((GOLDENS / "author_release_keys.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    return {f"v{number}": write_folder(release_state(number), folder / f"v{number}") for number in (4, 9)}


def test_every_name_has_its_place_both_ways(keys):
    with torch.device("meta"):
        ours = UNetModel(**FULL | RELEASE_KWARGS).state_dict()
        theirs = {name: torch.empty(shape) for name, shape in keys.items()}
    names = unet_from_release(keys)
    found = {names[name]: tensor for name, tensor in theirs.items()}
    assert len(found) == len(keys) == 930
    shapes = {name: tensor.shape for name, tensor in split_known(found).items()}
    assert shapes == {name: tensor.shape for name, tensor in ours.items()}
    assert sum(tensor.numel() for tensor in found.values()) == 1_100_578_616
    assert infer_unet_kwargs(split_known(found)) == FULL
    back = unet_to_release(join_known(ours))
    assert {back[name]: list(tensor.shape) for name, tensor in join_known(ours).items()} == keys
    assert {back[names[name]] for name in keys} == set(keys)
    assert is_release(keys) and not is_release(ours)


@torch.no_grad()
@pytest.mark.parametrize("case", ["v4.f5", "v4.f6", "v9.f5", "v4.img"])
def test_recorded_clips(folders, goldens, case):
    golden = goldens("author_release")
    unet = load_unet(folders[case[:2]]).eval()
    x, eps = golden[f"{case}.x"], golden[f"{case}.eps"]
    if x.ndim == 5:
        x, eps = (rearrange(one, "b c t h w -> b t c h w") for one in (x, eps))
    found = unet(x, golden[f"{case}.t"], golden[f"{case}.context"])
    assert relative_error(found, eps) < TOLERANCE
    if case in ("v4.f5", "v4.img"):  # the switch is what it takes, for clips
        for module in unet.modules():
            if hasattr(module, "norm_over_clip"):
                module.norm_over_clip = False
        other = relative_error(unet(x, golden[f"{case}.t"], golden[f"{case}.context"]), eps)
        assert (other > 0.01) == (x.ndim == 5)


@pytest.mark.parametrize("form", ["folder", "unet folder", "safetensors", "bare"])
def test_every_form_is_read_and_told_back_bit_for_bit(folders, tmp_path, form):
    path, state = folders["v9"], release_state(9)
    if form == "unet folder":
        path /= "unet"
    elif form != "folder":
        write = write_safetensors if form == "safetensors" else write_bare
        path = write(state, tmp_path / f"release.{form}")
    checkpoint = read_checkpoint(path)
    assert checkpoint.kind == "author"
    assert unet_node(checkpoint) == {"target": "ldm.modules.unet.UNetModel", "params": TINY}
    ours = load_unet(checkpoint).state_dict()
    assert_same(ours, unet_tensors(checkpoint))
    joined = join_known(ours)
    back = unet_to_release(joined)
    told = {back[name]: tensor for name, tensor in joined.items()}
    assert set(told) == set(state)
    assert all(torch.equal(told[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "name",
    [
        "conv_in.spatial_conv.weight",
        "conv_in.temporal_conv.weight",
        "conv_out.spatial_conv.bias",
        "down_blocks.0.attentions.0.norm.weight",
        "down_blocks.1.downsamplers.0.conv.spatial_conv.weight",
        "down_blocks.2.resnets.0.conv_shortcut.temporal_conv.bias",
        "mid_block.attentions.0.transformer_blocks.0.attn_temporal.to_out.0.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "up_blocks.3.attentions.2.transformer_blocks.0.norm_temporal.bias",
        "time_embedding.linear_1.weight",
    ],
)
def test_a_missing_tensor_is_named_as_the_release_names_it(tmp_path, name):
    state = release_state(4)
    del state[name]
    folder = write_folder(state, tmp_path / "torn")
    with pytest.raises(CheckpointError, match=rf"torn: (the tensors in .*1 missing|.* found one without).* ?{name}\b"):
        load_unet(folder)


def test_a_stranger_is_named_too(tmp_path):
    state = release_state(4) | {"down_blocks.0.stranger.spatial_conv.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"1 unexpected: down_blocks\.0\.stranger"):
        load_unet(write_folder(state, tmp_path / "odd"))


def test_a_config_of_another_network_is_refused(folders):
    for words in (TINY | {"norm_over_clip": False}, TINY | {"temporal_attention": None}):
        with pytest.raises(CheckpointError, match="expected a network with norm_over_clip: true and temporal_att"):
            load_unet(folders["v9"], words)
    with pytest.raises(CheckpointError, match="conditioned on known frames"):
        load_unet(folders["v9"], TINY | {"in_channels": 4})
    grown = load_unet(folders["v4"], TINY).state_dict()  # four channels into nine: the others start as nothing
    assert not grown[KNOWN].any() and list(grown[FIRST].shape) == [32, 4, 3, 3]


def test_other_families_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="expected use_linear_projection = false"):
        load_unet(write_folder(release_state(4), tmp_path / "sd2", use_linear_projection=True))


def test_words_that_stand_against_the_form_of_the_release():
    assert incompatible_kwargs(TINY) == []
    assert incompatible_kwargs(TINY | {"temporal_attention": {"positions": False, "local": None}}) == []
    assert incompatible_kwargs({}) == [
        "norm_over_clip is false (there: true)",
        "temporal_attention.positions is true (there: false)",
    ]
    assert incompatible_kwargs(TINY | {"temporal_attention": False, "temporal_kernel_size": None}) == [
        "temporal_attention is false (there: true)",
        "temporal_kernel_size is null (there: 3)",
    ]
    attention = {"positions": False, "local": 5}
    words = {"temporal_attention": attention, "fps_embedding": True, "known_level_embedding": True, "num_heads": 4}
    assert incompatible_kwargs(TINY | words | {"temporal_kernel_size": 5, "temporal": False}) == [
        "temporal is false (there: true)",
        "temporal_attention.local is 5 (there: null)",
        "temporal_kernel_size is 5 (there: 3)",
        "fps_embedding is true (there: false)",
        "known_level_embedding is true (there: false)",
        "num_heads is 4 (there: 8)",
    ]


def test_full_names_of_its_tensors(folders):
    assert all(name.startswith(UNET_PREFIX) for name in read_checkpoint(folders["v4"]).tensors)
