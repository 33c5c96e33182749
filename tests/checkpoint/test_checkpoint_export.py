"""Folders out: the image part as diffusers loads it, and the form of the author's release."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

from ldm.checkpoint import CheckpointError, load_first_stage, load_text_encoder, load_unet, read_checkpoint
from ldm.checkpoint.diffusers import scheduler_of, write_author, write_diffusers
from ldm.checkpoint.names import CLASS_NAME, FIRST_STAGE_PREFIX, UNET_PREFIX, average_names
from ldm.checkpoint.writing import write_full
from ldm.config import ConfigError
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.modules.unet import UNetModel
from tests.conftest import fill_by_rule, relative_error
from tests.tiny_checkpoint import CONFIG, UNET, assert_same, image_state, image_weights, part, video_state, write_bare
from tests.tiny_release import release_state, write_folder

OFFLINE = {"local_files_only": True}


BLEND = (
    "in clips this network expects the blend of the known frames, not zeros, in the channels of known latents where "
    "nothing is known (model.params.known_frames.fill: blend), which the folder does not say"
)


def trained(path, words, known_frames=None):
    """A checkpoint of a run with all there is, averages among it."""
    shapes = {UNET_PREFIX + name: one.shape for name, one in UNetModel(**UNET | words).state_dict().items()}
    state = fill_by_rule(shapes) | image_state()
    names = average_names(part(state, UNET_PREFIX))
    state |= {names[name]: one * 1.1 for name, one in part(state, UNET_PREFIX).items()}
    config = copy.deepcopy(CONFIG)
    config["model"]["params"] |= {"scale_factor": 0.25, "parameterization": "v", "timesteps": 400}
    config["model"]["params"]["known_frames"] = known_frames
    config["model"]["params"]["unet_config"]["params"] = UNET | words
    torch.save({"state_dict": state, "config": config}, path)
    return path


@pytest.fixture(scope="module", params=[4, 9], ids=["text", "inpainting"])
def exported(request, tmp_path_factory):
    """A checkpoint, its diffusers folder and what was said of it."""
    folder = tmp_path_factory.mktemp("export")
    words = {"in_channels": 9, "fps_embedding": True, "known_level_embedding": True} if request.param == 9 else {}
    checkpoint = read_checkpoint(trained(folder / "last.ckpt", words))
    return checkpoint, folder / "pipeline", write_diffusers(checkpoint, folder / "pipeline")


@torch.no_grad()
def test_the_unet_gives_diffusers_what_it_gives_us(exported):
    checkpoint, folder, notes = exported
    assert notes == ["the temporal layers were left out: diffusers has no place for them"]
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet", **OFFLINE).eval()
    ours = load_unet(checkpoint).eval()
    assert theirs.config.in_channels == ours.in_channels
    x, context = torch.randn(1, 3, ours.in_channels, 8, 8), torch.randn(1, 5, 16)
    frames = ours(x, torch.tensor([300]), context, enable_time=False, known_level=torch.tensor([0]))
    if ours.has_known_level:  # or the rest would show nothing
        assert relative_error(ours(x, torch.tensor([300]), context, enable_time=False), frames) > 1e-2
    for index in range(3):
        expected = theirs(x[:, index], torch.tensor([300]), context).sample
        assert relative_error(frames[:, index], expected) < 2e-5


@torch.no_grad()
def test_the_encoders_and_the_scheduler_too(exported):
    checkpoint, folder, _ = exported
    vae = AutoencoderKL.from_pretrained(folder / "vae", **OFFLINE)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(vae.encode(pixels).latent_dist.parameters, load_first_stage(checkpoint).encode(pixels))
    assert vae.config.scaling_factor == 0.25
    ours = load_text_encoder(checkpoint)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", **OFFLINE)
    tokens = ours.tokenize(["a road"])
    assert torch.equal(text(tokens).last_hidden_state, ours.encode_tokens(tokens))
    names = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)  # what older versions look for
    config = DDIMScheduler.from_pretrained(folder / "scheduler", **OFFLINE).config
    assert (config.prediction_type, config.num_train_timesteps, config.clip_sample) == ("v_prediction", 400, False)


def test_the_folder_is_read_again(exported, tmp_path):
    checkpoint, folder, _ = exported
    again = read_checkpoint(folder)
    assert (again.kind, again.num_heads, again.scale_factor) == ("diffusers", 4, 0.25)
    ours, theirs = load_unet(checkpoint), load_unet(again)
    if ours.has_known_level:  # diffusers knows no such thing, so its level 0 is in with the timestep
        with torch.no_grad():
            ours.time_embed[2].bias += ours.conditioning["temporal"].known_level(torch.zeros(1))[0]
    assert_same(image_weights(theirs), image_weights(ours))
    node = CONFIG["model"]["params"]["cond_stage_config"]
    encoder = load_text_encoder(again, node)  # with the tokenizer in the folder
    assert encoder.tokenizer_path == str(folder)
    prompts = ["A photo, of a cat!", "", "éà 北京 <x>"]
    assert torch.equal(encoder.tokenize(prompts), load_text_encoder(checkpoint).tokenize(prompts))


def test_a_pipeline_of_diffusers(exported):
    checkpoint, folder, _ = exported
    index = json.loads((folder / "model_index.json").read_text())
    if load_unet(checkpoint).in_channels == 4:
        assert index["_class_name"] == "StableDiffusionPipeline"
    else:  # the other is slow to load, and loads alike
        assert index["_class_name"] == "StableDiffusionInpaintPipeline"
        pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder, **OFFLINE)
        assert pipeline.tokenizer("a road")["input_ids"][0] == 49406
        assert pipeline.unet.config.in_channels == 9


@pytest.mark.parametrize(
    ("words", "known_frames", "notes"),
    [
        ({"in_channels": 9}, {"mixture": {"first": 1}}, [BLEND]),
        ({"in_channels": 9}, {"mixture": {"first": 1}, "fill": "blend"}, [BLEND]),
        ({"in_channels": 9}, {"mixture": {"first": 1}, "fill": "zeros"}, []),
        ({"in_channels": 9}, None, []),
        ({}, {"mixture": {"first": 1}}, []),
    ],
)
def test_what_the_network_expects_where_nothing_is_known(tmp_path, monkeypatch, words, known_frames, notes):
    monkeypatch.setattr("ldm.checkpoint.diffusers._write_text_encoder", lambda *arguments: [])
    words = words | {"norm_over_clip": True, "temporal_attention": {"positions": False}, "num_heads": 8}
    checkpoint = read_checkpoint(trained(tmp_path / "last.ckpt", words, known_frames))
    assert write_diffusers(checkpoint, tmp_path / "pipeline")[1:] == notes
    assert write_author(checkpoint, tmp_path / "release") == notes


def test_words_of_known_frames_that_are_none(tmp_path):
    for words, message in ((7, "known_frames: expected a mapping, found 7"), ({"fill": "x"}, "found 'x'")):
        checkpoint = read_checkpoint(trained(tmp_path / "last.ckpt", {"in_channels": 9}, words))
        with pytest.raises(UserError, match=message):
            write_diffusers(checkpoint, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_half(tmp_path):
    write_diffusers(read_checkpoint(trained(tmp_path / "last.ckpt", {})), tmp_path / "half", half=True)
    for weights in (tmp_path / "half").glob("*/*.safetensors"):
        assert {one.dtype for one in load_file(weights).values()} == {torch.float16}, weights


def test_parts_that_are_not_there(tmp_path, monkeypatch):
    unet = {name: one for name, one in image_state().items() if name.startswith(UNET_PREFIX)}
    notes = write_diffusers(read_checkpoint(write_bare(unet, tmp_path / "unet.ckpt")), tmp_path / "out")
    assert notes == [
        "there is no image autoencoder in the input, so none was written",
        "there is no text encoder in the input, so none was written",
    ]
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["model_index.json", "scheduler", "unet"]
    first_stage = {name: one for name, one in image_state().items() if name.startswith(FIRST_STAGE_PREFIX)}
    with pytest.raises(CheckpointError, match="expected the UNet"):
        write_diffusers(read_checkpoint(write_bare(first_stage, tmp_path / "vae.ckpt")), tmp_path / "none")
    assert not (tmp_path / "none").exists()

    def missing(path=None):
        raise UserError("CLIP's tokenizer was not found")

    monkeypatch.setattr("ldm.modules.encoders.find_tokenizer", missing)
    torch.save({"state_dict": video_state(), "config": CONFIG}, tmp_path / "last.ckpt")
    notes = write_diffusers(read_checkpoint(tmp_path / "last.ckpt"), tmp_path / "mute")
    assert notes[1:] == ["the tokenizer was left out: CLIP's tokenizer was not found"]
    assert (tmp_path / "mute" / "text_encoder").is_dir() and not (tmp_path / "mute" / "tokenizer").exists()


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"timesteps": 300, "linear_start": 1e-4, "linear_end": 0.02},
        {"parameterization": "v", "zero_terminal_snr": True},
    ],
)
def test_the_scheduler_has_our_schedule(words):
    ours, theirs = NoiseSchedule(**words), scheduler_of(words | {"trainable": None, "noise": None})
    assert (theirs.alphas_cumprod - ours.alphas_cumprod).abs().max() < 2e-6
    assert theirs.config.timestep_spacing == ("trailing" if words.get("zero_terminal_snr") else "leading")


def test_a_schedule_that_is_none():
    with pytest.raises(ConfigError, match=r"model.params.timesteps: expected a whole number, found 'x'"):
        scheduler_of({"timesteps": "x"})
    with pytest.raises(UserError, match="parameterization: expected one of eps, x0, v, found 'w'"):
        scheduler_of({"parameterization": "w"})


@pytest.mark.parametrize("in_channels", [4, 9])
def test_the_release_goes_in_and_out_bit_for_bit(tmp_path, in_channels):
    state = release_state(in_channels)
    folder = write_folder(state, tmp_path / "release")
    write_full(read_checkpoint(folder), tmp_path / "ours.safetensors")
    notes = write_author(read_checkpoint(tmp_path / "ours.safetensors"), tmp_path / "again")
    assert notes == [
        "there is no image autoencoder in the input, so none was written",
        "there is no text encoder in the input, so none was written",
    ]
    tensors = load_file(tmp_path / "again" / "unet" / "diffusion_pytorch_model.safetensors")
    assert tensors.keys() == state.keys()
    assert all(torch.equal(one, state[name]) for name, one in tensors.items())
    config = json.loads((tmp_path / "again" / "unet" / "config.json").read_text())
    assert (config["_class_name"], config["in_channels"]) == (CLASS_NAME, in_channels)
    assert (config["block_out_channels"], config["attention_head_dim"]) == ([32, 64, 128, 128], 8)
    assert not (tmp_path / "again" / "model_index.json").exists()
    again = read_checkpoint(tmp_path / "again")
    assert again.kind == "author"
    assert_same(again.tensors, read_checkpoint(folder).tensors)


def test_networks_that_cannot_be_said_in_the_form_of_the_release(tmp_path):
    torch.save({"state_dict": video_state(), "config": CONFIG}, tmp_path / "last.ckpt")
    message = r"last.ckpt: expected .* cannot be written in its form: norm_over_clip is false \(there: true\); temp"
    with pytest.raises(CheckpointError, match=message):
        write_author(read_checkpoint(tmp_path / "last.ckpt"), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"in its form: it has no temporal layers; norm_over_clip is false"):
        write_author(read_checkpoint(write_bare(image_state(), tmp_path / "image.ckpt")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
