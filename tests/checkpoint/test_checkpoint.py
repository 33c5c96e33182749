"""Weights in, by every road, and back out under the public names."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import (
    CheckpointError,
    encoder_tensors,
    full_state_dict,
    latent_scale,
    load_encoders,
    load_first_stage,
    load_text_encoder,
    load_unet,
    load_weights,
    read_checkpoint,
)
from ldm.checkpoint.names import FIRST_STAGE_PREFIX, TEXT_PREFIX, UNET_PREFIX, average_names
from ldm.checkpoint.shapes import infer_unet_kwargs
from ldm.config import ConfigError
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.modules.encoders import CLIPTextEmbedder, KLFirstStage
from ldm.modules.unet import UNetModel
from tests.conftest import GOLDENS
from tests.tiny_checkpoint import (
    CONFIG,
    UNET,
    assert_same,
    image_state,
    image_weights,
    part,
    save_as_public,
    video_state,
    write_bare,
    write_legacy,
    write_safetensors,
    write_zip,
)

FULL_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2, 1],
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "transformer_depth": 1,
    "context_dim": 768,
}
FULL_DDCONFIG = {
    "z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def public_ckpt(tmp_path_factory):
    return save_as_public(image_state(), tmp_path_factory.mktemp("public") / "sd-v1-4.ckpt")


def test_every_key_of_stable_diffusion_v1_is_accounted_for():
    keys = json.loads((GOLDENS / "sd_v1_keys.json").read_text())
    schedule = NoiseSchedule()
    with torch.device("meta"):
        parts = UNetModel(**FULL_UNET), KLFirstStage(FULL_DDCONFIG, 4), CLIPTextEmbedder()
        state = full_state_dict(*parts, schedule)
    image = {name: tensor for name, tensor in state.items() if ".temporal." not in name}
    assert len(image) == 1143
    assert {name: list(tensor.shape) for name, tensor in image.items()} == {
        name: shape for name, (shape, _) in keys["keys"].items()
    }
    names = average_names(part(image, UNET_PREFIX))
    shapes = {names[name]: list(tensor.shape) for name, tensor in part(image, UNET_PREFIX).items()}
    counters = {"model_ema.decay": [], "model_ema.num_updates": []}
    assert shapes | counters == {name: shape for name, (shape, _) in keys["ema_keys"].items()}
    assert infer_unet_kwargs(part(image, UNET_PREFIX)) == FULL_UNET


def test_public_file_defeats_torch_but_not_us(public_ckpt):
    named = set(torch.serialization.get_unsafe_globals_in_checkpoint(public_ckpt))
    lightning = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    assert named == {lightning, "numpy.core.multiarray.scalar", "numpy.dtype"}
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
        torch.load(public_ckpt, weights_only=True)
    checkpoint = read_checkpoint(public_ckpt)
    assert (checkpoint.kind, checkpoint.config) == ("compvis", None)
    assert_same(checkpoint.tensors, image_state())
    with pytest.raises(pickle.UnpicklingError):  # the stand-ins are gone again
        torch.load(public_ckpt, weights_only=True)


def write_new_numpy(state, path):
    import numpy as np  # noqa: PLC0415

    torch.save({"state_dict": state, "score": np.float64(0.5)}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("write", [write_zip, write_legacy, write_safetensors, write_bare, write_new_numpy])
def test_load_unet_from_every_kind_of_file(tmp_path, write, dtype):
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in image_state().items()}
    unet = load_unet(write(state, tmp_path / "weights"), UNET)
    assert_same(image_weights(unet), part(state, UNET_PREFIX))
    fresh = UNetModel(**UNET).state_dict()
    for name, tensor in unet.state_dict().items():
        assert tensor.dtype == torch.float32
        if name.endswith("temporal.weight") and tensor.ndim == 3:
            assert torch.equal(tensor, fresh[name])  # the Dirac start


@pytest.mark.parametrize("form", ["words", "node", "dict", "dictconfig", "yaml", "compvis yaml"])
def test_load_unet_with_a_given_config(tmp_path, public_ckpt, form):
    config = {"words": UNET, "node": CONFIG["model"]["params"]["unet_config"], "dict": CONFIG}.get(form, CONFIG)
    if form == "dictconfig":
        config = OmegaConf.create(config)
    if "yaml" in form:
        config = copy.deepcopy(CONFIG)
        if form == "compvis yaml":
            config["model"]["target"] = "ldm.models.diffusion.ddpm.LatentDiffusion"
            config["model"]["params"]["unet_config"] = {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": UNET | {"image_size": 32, "use_spatial_transformer": True, "legacy": False},
            }
        OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
        config = str(tmp_path / "config.yaml")
    assert_same(image_weights(load_unet(public_ckpt, config)), part(image_state(), UNET_PREFIX))


def test_load_unet_reads_the_architecture_from_the_shapes(public_ckpt):
    assert_same(image_weights(load_unet(public_ckpt)), part(image_state(), UNET_PREFIX))
    deeper = UNET | {"transformer_depth": 2, "num_res_blocks": 2, "channel_mult": [1, 2, 2], "temporal_kernel_size": 5}
    deeper |= {"attention_resolutions": [4, 1], "in_channels": 9, "num_heads": 8}
    assert infer_unet_kwargs(UNetModel(**deeper).state_dict()) == deeper


def with_averages(state, only=lambda name: True):
    names = average_names(part(state, UNET_PREFIX))
    averages = {names[name]: tensor + 1 for name, tensor in part(state, UNET_PREFIX).items() if only(name)}
    return state | averages | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def test_averages_are_taken_where_the_file_has_them(tmp_path):
    state = image_state()
    path = write_bare(with_averages(state), tmp_path / "full.ckpt")
    expected = part(state, UNET_PREFIX)
    assert_same(image_weights(load_unet(path)), {name: tensor + 1 for name, tensor in expected.items()})
    assert_same(image_weights(load_unet(path, use_average=False)), expected)
    path = write_bare(with_averages(video_state(), lambda name: ".temporal." in name), tmp_path / "ours.ckpt")
    found = load_unet(path).state_dict()
    for name, tensor in part(video_state(), UNET_PREFIX).items():
        assert torch.equal(found[name], tensor + 1 if ".temporal." in name else tensor)


def test_counters_left_over_from_averages_are_tolerated(tmp_path):
    state = image_state() | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    path = write_bare(state, tmp_path / "emaonly.ckpt")
    assert_same(image_weights(load_unet(path)), part(state, UNET_PREFIX))
    path = write_bare(state | {"model_ema.diffusion_modelstranger": torch.zeros(1)}, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=r"1 averaged tensors belong to no weight .* model_ema.diffusion_modelst"):
        load_unet(path)


def test_our_own_checkpoint_needs_nothing_else(tmp_path):
    torch.save({"state_dict": video_state(), "config": CONFIG}, tmp_path / "last.ckpt")
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    assert (checkpoint.kind, checkpoint.own_config) == ("ours", CONFIG)
    assert_same(load_unet(tmp_path / "last.ckpt").state_dict(), part(video_state(), UNET_PREFIX))
    assert_same(load_first_stage(checkpoint).compvis_state_dict(), part(video_state(), FIRST_STAGE_PREFIX))
    assert_same(load_text_encoder(checkpoint).compvis_state_dict(), part(video_state(), TEXT_PREFIX))


LOADERS = {
    "unet_config": load_unet,
    "first_stage_config": load_first_stage,
    "cond_stage_config": load_text_encoder,
}


@pytest.mark.parametrize(
    "target", ["subprocess.Popen", "ldm.data.shards.writer.TarWriter", "scripts.dev.rehearsal.Run", None]
)
@pytest.mark.parametrize("place", LOADERS)
def test_a_config_inside_a_file_builds_three_classes_only(tmp_path, place, target):
    config = copy.deepcopy(CONFIG)
    config["model"]["params"][place] = {"target": target, "params": {"args": ["touch", str(tmp_path / "x")]}}
    torch.save({"state_dict": video_state(), "config": config}, tmp_path / "evil.ckpt")
    checkpoint = read_checkpoint(tmp_path / "evil.ckpt")
    message = rf"evil.ckpt, model.params.{place}.target: expected ldm\..*, found .*; nothing was built"
    for read in (LOADERS[place], lambda checkpoint: checkpoint.config):
        with pytest.raises(ConfigError, match=message):
            read(checkpoint)
    assert not (tmp_path / "x").exists()
    LOADERS[place](checkpoint, CONFIG["model"]["params"][place])  # with a config of one's own it can be used


def test_a_config_inside_a_file_names_no_other_file(tmp_path):
    config = copy.deepcopy(CONFIG)
    params = config["model"]["params"]
    params["ckpt_path"] = params["first_stage_config"]["params"]["ckpt_path"] = "/nowhere.ckpt"
    params["cond_stage_config"]["params"] |= {"ckpt_path": "/nowhere.ckpt", "tokenizer": "/nowhere"}
    torch.save({"state_dict": video_state(), "config": config}, tmp_path / "nosy.ckpt")
    checkpoint = read_checkpoint(tmp_path / "nosy.ckpt")
    assert "nowhere" in str(checkpoint.own_config) and "nowhere" not in str(checkpoint.config)
    for load in LOADERS.values():
        load(checkpoint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "x"}, "odd.ckpt, model: expected a mapping, found 'x'"),
        ({"model": {"params": 5}}, "odd.ckpt, model.params: expected a mapping, found 5"),
        ({"model": {"params": {"unet_config": 5}}}, "odd.ckpt, model.params.unet_config: expected a mapping, found 5"),
    ],
)
def test_a_malformed_config_inside_a_file(tmp_path, config, message):
    torch.save({"state_dict": video_state(), "config": config}, tmp_path / "odd.ckpt")
    with pytest.raises(ConfigError, match=message):
        load_unet(tmp_path / "odd.ckpt")
    load_unet(tmp_path / "odd.ckpt", UNET)


def test_a_config_without_a_model_says_where():
    for config, message in (
        ({"model": None}, "model.params.first_stage_config: expected a node with target and params"),
        ({"model": {"params": None}}, "model.params.first_stage_config: expected a node with target and params"),
        ({"model": "x"}, "model: expected a mapping, found 'x'"),
        ({"model": {"params": [1]}}, r"model.params: expected a mapping, found \[1\]"),
    ):
        for read in (encoder_tensors, load_encoders, latent_scale):
            with pytest.raises(UserError, match=message):
                read(config)


@pytest.mark.parametrize("registered", [True, False])
def test_quantised_optimiser_states_are_left_on_the_disk(tmp_path, registered):
    subclass_8bit = pytest.importorskip("torchao.optim.subclass_8bit")
    state = {"exp_avg": subclass_8bit.OptimState8bit.zeros((64, 64)), "step": torch.tensor(3.0)}
    contents = {"state_dict": video_state(), "config": CONFIG, "optimizer_states": [{"state": {0: state}}]}
    torch.save(contents, tmp_path / "last.ckpt")
    known = torch.serialization.get_safe_globals()
    try:
        if not registered:  # as on a machine without torchao
            torch.serialization.clear_safe_globals()
            with pytest.raises(pickle.UnpicklingError):
                torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert_same(read_checkpoint(tmp_path / "last.ckpt").tensors, video_state())
    finally:
        torch.serialization.add_safe_globals(known)


def test_half_of_the_temporal_layers_is_an_error(tmp_path):
    state = video_state()
    del state[UNET_PREFIX + "out.2.temporal.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: out.2.temporal.weight"):
        load_unet(write_bare(state, tmp_path / "torn.ckpt"), UNET)


def test_accounting_lists_names(tmp_path):
    state = image_state()
    for name in ("out.0.weight", "out.2.bias"):
        del state[UNET_PREFIX + name]
    state[UNET_PREFIX + "stranger.weight"] = torch.zeros(3)
    state[UNET_PREFIX + "out.2.weight"] = torch.zeros(4, 4, 3, 3)
    path = write_bare(state, tmp_path / "odd.ckpt")
    message = (
        r"UNet from .*odd.ckpt.*2 missing: out.0.weight, out.2.bias; 1 unexpected: stranger.weight; 1 of another "
        r"shape: out.2.weight \(expected \[4, 32, 3, 3\], found \[4, 4, 3, 3\]\).*config belong together"
    )
    with pytest.raises(CheckpointError, match=message):
        load_unet(path, UNET)


def test_long_lists_are_cut_and_nothing_is_copied():
    module = torch.nn.Linear(2, 2)
    before = module.weight.clone()
    tensors = {f"name{index}": torch.zeros(1) for index in range(9)} | {"weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"here: .*1 missing: bias; 9 unexpected: name0, .*name4, \.\.\."):
        load_weights(module, tensors, where="here")
    assert torch.equal(module.weight, before)


def test_unet_without_its_shapes_and_of_other_families(tmp_path):
    state = image_state()
    del state[UNET_PREFIX + "out.2.weight"]
    with pytest.raises(CheckpointError, match=r"torn.ckpt: expected a UNet .* found one without out.2.weight. Give"):
        load_unet(write_bare(state, tmp_path / "torn.ckpt"))
    state = image_state()
    name = UNET_PREFIX + "input_blocks.3.1.proj_in.weight"
    state[name] = state[name][:, :, 0, 0].contiguous()
    with pytest.raises(CheckpointError, match=r"linear ones \(.*proj_in.weight \[64, 64\]\), as in Stable Diffusion 2"):
        load_unet(write_bare(state, tmp_path / "sd2.ckpt"))


@pytest.mark.parametrize("prefix", [UNET_PREFIX, FIRST_STAGE_PREFIX, TEXT_PREFIX])
def test_bare_state_dict_of_one_part(tmp_path, prefix):
    bare = {name: tensor.contiguous() for name, tensor in part(image_state(), prefix).items()}
    expected = {prefix + name: tensor for name, tensor in bare.items()}
    assert_same(read_checkpoint(write_safetensors(bare, tmp_path / "part.safetensors")).tensors, expected)
