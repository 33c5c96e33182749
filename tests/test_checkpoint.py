"""Weights in, by every road, and back out under the public names."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ldm.checkpoint import (
    CheckpointError,
    encoder_tensors,
    first_stage_tensors,
    full_state_dict,
    identity,
    load_encoders,
    load_first_stage,
    load_text_encoder,
    load_unet,
    load_weights,
    read_checkpoint,
    text_tensors,
    unet_tensors,
    unet_words,
)
from ldm.checkpoint_names import FIRST_STAGE_PREFIX, TEXT_PREFIX, UNET_PREFIX, average_names
from ldm.config import ConfigError
from ldm.errors import UserError
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.modules.encoders import CLIPTextEmbedder, KLFirstStage
from ldm.modules.unet import UNetModel
from tests.conftest import GOLDENS, relative_error
from tests.tiny_checkpoint import CONFIG, DDCONFIG, TEXT, UNET, image_state, save_as_public, video_state

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


def part(state, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name].float(), tensor.float()), name


def image_weights(unet):
    return {name: tensor for name, tensor in unet.state_dict().items() if ".temporal." not in name}


def config_for(path, **changes):
    config = copy.deepcopy(CONFIG)
    config["model"]["params"] |= {"ckpt_path": str(path)} | changes
    return config


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
    assert unet_words(part(image, UNET_PREFIX)) == FULL_UNET


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


def write_zip(state, path):
    return save_as_public(state, path)


def write_legacy(state, path):
    return save_as_public(state, path, _use_new_zipfile_serialization=False)


def write_safetensors(state, path):
    save_file(state, path)
    return path


def write_bare(state, path):
    torch.save(state, path)
    return path


def write_new_numpy(state, path):
    import numpy as np  # noqa: PLC0415

    torch.save({"state_dict": state, "score": np.float64(0.5)}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("write", [write_zip, write_legacy, write_safetensors, write_bare, write_new_numpy])
def test_load_unet_from_every_kind_of_file(tmp_path, write, dtype):
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in image_state().items()
    }
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
    assert unet_words(UNetModel(**deeper).state_dict()) == deeper


def test_load_unet_of_the_inpainting_variant(tmp_path):
    unet = UNetModel(**UNET | {"in_channels": 9})
    state = {UNET_PREFIX + name: tensor for name, tensor in image_weights(unet).items()}
    loaded = load_unet(write_safetensors(state, tmp_path / "inpainting.safetensors"))
    assert loaded.in_channels == 9
    assert_same(image_weights(loaded), image_weights(unet))
    with pytest.raises(CheckpointError, match=r"1 of another shape: input_blocks.0.0.weight \(expected \[32, 4,"):
        load_unet(tmp_path / "inpainting.safetensors", UNET)


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
    assert (checkpoint.kind, checkpoint.config) == ("ours", CONFIG)
    assert_same(load_unet(tmp_path / "last.ckpt").state_dict(), part(video_state(), UNET_PREFIX))
    assert_same(load_first_stage(checkpoint).compvis_state_dict(), part(video_state(), FIRST_STAGE_PREFIX))
    assert_same(load_text_encoder(checkpoint).compvis_state_dict(), part(video_state(), TEXT_PREFIX))


def test_a_config_inside_a_file_builds_our_classes_only(tmp_path):
    config = copy.deepcopy(CONFIG)
    config["model"]["params"]["unet_config"] = {"target": "subprocess.Popen", "params": {"args": ["touch", "x"]}}
    torch.save({"state_dict": video_state(), "config": config}, tmp_path / "evil.ckpt")
    with pytest.raises(ConfigError, match=r"may only name classes of ldm, found 'subprocess.Popen'"):
        load_unet(tmp_path / "evil.ckpt")


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
    with pytest.raises(CheckpointError, match=r"found one without out.2.weight. Give its config"):
        load_unet(write_bare(state, tmp_path / "torn.ckpt"))
    state = image_state()
    name = UNET_PREFIX + "input_blocks.3.1.proj_in.weight"
    if name not in state:
        name = next(name for name in state if name.endswith("proj_in.weight"))
    state[name] = state[name][:, :, 0, 0].contiguous()
    with pytest.raises(CheckpointError, match=r"linear ones \(.*proj_in.weight \[64, 64\]\), as in Stable Diffusion 2"):
        load_unet(write_bare(state, tmp_path / "sd2.ckpt"))


@pytest.mark.parametrize("prefix", [UNET_PREFIX, FIRST_STAGE_PREFIX, TEXT_PREFIX])
def test_bare_state_dict_of_one_part(tmp_path, prefix):
    bare = {name: tensor.contiguous() for name, tensor in part(image_state(), prefix).items()}
    expected = {prefix + name: tensor for name, tensor in bare.items()}
    assert_same(read_checkpoint(write_safetensors(bare, tmp_path / "part.safetensors")).tensors, expected)


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
        ({"_class_name": "UNet3DConditionModel"}, "expected _class_name UNet2DConditionModel, found UNet3D"),
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
