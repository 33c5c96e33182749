"""The published runs and the three stories laid over them: what each trains at both scales, and the tiny ones run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import main as command
from ldm.checkpoint import identity, is_temporal, load_unet, read_checkpoint, unet_tensors
from ldm.config import build, check, load_config, to_container
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentVideoDiffusion
from ldm.modules.unet import UNetModel
from ldm.optim.parameter_groups import ParameterGroups
from ldm.runs.folder import RUN_TIME_VARIABLE
from tests.conftest import relative_error
from tests.tiny_checkpoint import DDCONFIG, TEXT, UNET, image_state, part, write_zip
from tests.toy_run import make_prepared

CONFIGS = Path(__file__).parents[2] / "configs"
TINY, LARGE = CONFIGS / "tiny" / "video.yaml", CONFIGS / "video-sd.yaml"
STORIES = {path.stem: path for path in (CONFIGS / "stories").glob("*.yaml")}
TRAINED = {
    (TINY, None): {"temporal", "spatial_attention", "time_embed", "convolutions"},
    (TINY, "image"): {"spatial_attention", "time_embed", "convolutions"},
    (TINY, "frozen"): {"temporal", "spatial_attention", "time_embed"},
    (TINY, "scratch"): {"temporal", "spatial_attention", "time_embed", "convolutions"},
    (LARGE, None): {"temporal", "time_embed", "convolutions"},
    (LARGE, "image"): {"time_embed", "convolutions"},
    (LARGE, "frozen"): {"temporal", "time_embed"},
    (LARGE, "scratch"): {"temporal", "spatial_attention", "time_embed", "convolutions"},
}


def merged(base, story, *overrides):
    return load_config([base] if story is None else [base, STORIES[story]], overrides)


def test_every_story_is_in_the_table():
    assert {story for _, story in TRAINED} - {None} == set(STORIES)


@pytest.mark.parametrize(("base", "story"), TRAINED, ids=lambda value: getattr(value, "stem", value))
def test_parts_that_are_built_and_trained(base, story):
    """At both scales, without memory for weights."""
    config = merged(base, story)
    check(config)
    params = to_container(config)["model"]["params"]
    with torch.device("meta"):
        unet = build(params["unet_config"], "model.params.unet_config")
    groups = ParameterGroups(unet, params["trainable"])
    assert {group.name for group in groups.groups if group.is_trained} == TRAINED[base, story]
    data = to_container(config)["data"]["params"]
    has_time = any(is_temporal(name) for name in unet.state_dict())
    assert has_time == (story != "image") == unet.takes_known_frames == (params["known_frames"] is not None)
    assert unet.has_fps_embedding == unet.has_known_level == has_time
    assert (data["frames"], data["strides"]) == ((1, [1]) if story == "image" else (5, [1, 2, 4]))
    expected = {"scratch": None, "frozen": "models/image.ckpt"}
    assert params["ckpt_path"] == expected.get(story, load_config([base]).model.params.ckpt_path)


def test_untrained_group_may_be_missing_and_a_misspelt_one_may_not():
    unet = UNetModel(**UNET, temporal=False)
    with pytest.raises(UserError, match=r"trainable.temporal: .* found one that no parameter has"):
        ParameterGroups(unet, {"temporal": True, "convolutions": True})
    with pytest.raises(UserError, match=r"trainable.convolution: .*did you mean 'convolutions'"):
        ParameterGroups(unet, {"time_embed": True, "convolution": False})


# ---- the large run, small: an image checkpoint of 4 channels


@pytest.fixture
def large(tmp_path):
    """The model of configs/video-sd.yaml on a checkpoint as small as `tiny_checkpoint`, and the words for it."""
    write_zip(image_state(), tmp_path / "image.ckpt")
    words = {
        name: UNET[name] for name in ("model_channels", "num_res_blocks", "channel_mult", "num_heads", "context_dim")
    }
    overrides = [
        f"model.params.ckpt_path={tmp_path / 'image.ckpt'}", "model.params.optimizer.name=adamw",
        *(f"model.params.unet_config.params.{name}={value}" for name, value in words.items()),
        f"model.params.unet_config.params.attention_resolutions={UNET['attention_resolutions']}",
    ]  # fmt: skip

    def make(story=None, *more):
        params = to_container(merged(LARGE, story, *overrides, *more))["model"]["params"]
        return LatentVideoDiffusion(**params, learning_rate=1e-5)

    return make


def test_the_reference_run_starts_as_stable_diffusion(large):
    image = UNetModel(**UNET, temporal=False).eval()
    image.load_state_dict(part(image_state(), "model.diffusion_model."))
    model = large().eval()
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(2, 5, 4, 8, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)
    timesteps = torch.tensor([30, 700])
    with torch.no_grad():
        found = model(noisy, timesteps, text, torch.tensor([10.0, 2.5]))
        frames = [image(frame, timesteps, text) for frame in noisy.unbind(1)]
    assert relative_error(found, torch.stack(frames, 1)) < 1e-5
    assert found.std() > 0.01


def test_from_scratch_reads_no_image_weights(large):
    torch.manual_seed(0)
    model = large("scratch", "model.params.ckpt_path=null")
    stored = part(image_state(), "model.diffusion_model.")
    assert not torch.equal(model.unet.state_dict()["time_embed.0.weight"], stored["time_embed.0.weight"])
    assert torch.count_nonzero(model.unet.state_dict()["out.2.weight"]) == 0, "a network that knows nothing predicts 0"


# ---- the tiny runs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`tiny(story, *words)` trains two steps of configs/tiny/video.yaml, made smaller still -> its checkpoint."""
    folder = tmp_path_factory.mktemp("stories")
    overrides = [
        "model.params.unet_config.params.model_channels=32", "model.params.unet_config.params.channel_mult=[1,2]",
        "model.params.unet_config.params.attention_resolutions=[2]", "model.params.unet_config.params.context_dim=16",
        "model.params.warmup_steps=0", "model.params.scale_factor=0.5",
        f"model.params.first_stage_config.params.ckpt_path={folder / 'first_stage.safetensors'}",
        *(f"model.params.first_stage_config.params.ddconfig.{word}={value}" for word, value in DDCONFIG.items()),
        *(f"model.params.cond_stage_config.params.text_config.{word}={value}" for word, value in TEXT.items()),
        f"data.params.root={folder / 'set'}", "data.params.batch_size=2", "lightning.trainer.precision=32-true",
        "lightning.trainer.val_check_interval=2", "lightning.callbacks.average.params.decay=0.5",
        "lightning.callbacks.samples.params.every_n_steps=2", "lightning.callbacks.samples.params.steps=1",
    ]  # fmt: skip
    params = to_container(load_config([TINY], overrides))["model"]["params"]
    node = params["first_stage_config"]
    torch.manual_seed(0)
    first_stage = build({**node, "params": {**node["params"], "ckpt_path": None}}, "first_stage_config")
    tensors = first_stage.compvis_state_dict()
    named = {f"first_stage_model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "first_stage.safetensors")
    text_encoder = build(params["cond_stage_config"], "cond_stage_config")
    prepared = {
        "moments_shape": [8, 4, 4], "context_shape": [77, 16], "scale_factor": 0.5, "size": [8, 8],
        "first_stage": identity(tensors), "text_encoder": identity(text_encoder.compvis_state_dict()),
    }  # fmt: skip
    make_prepared(folder / "set", lengths=(18, 20, 9, 40), **prepared)

    def train(story, *words):
        name = "-".join(["run", story or "reference", *(word.partition("=")[0] for word in words)])
        bases = [str(TINY)] + ([str(STORIES[story])] if story else [])
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(RUN_TIME_VARIABLE, raising=False)
            arguments = ["-t", "-l", str(folder), "-n", name, "--accelerator", "cpu"]
            command.main(["--base", *bases, *arguments, "lightning.trainer.max_steps=2", *overrides, *words])
        return next(folder.glob(f"*_{name}")) / "checkpoints" / "last.ckpt"

    return train


@pytest.fixture(scope="module")
def image(tiny):
    return tiny("image")


def raw(path):
    """The network's weights, not averaged."""
    return unet_tensors(read_checkpoint(path), use_average=False)


@pytest.mark.slow
def test_image_network_trains_on_single_frames(image):
    checkpoint = read_checkpoint(image)
    tensors = unet_tensors(checkpoint)
    assert not any(is_temporal(name) for name in tensors)
    assert checkpoint.config["data"]["params"]["frames"] == 1
    assert torch.count_nonzero(raw(image)["out.2.weight"]) > 0, "it has learned something"
    assert len(list((image.parents[1] / "images" / "samples").glob("*.gif"))) == 2


@pytest.mark.slow
def test_temporal_layers_train_with_frozen_convolutions(tiny, image):
    video = tiny("frozen", f"model.params.ckpt_path={image}")
    before, after = unet_tensors(read_checkpoint(image)), raw(video)
    unet = load_unet(video)
    groups = {group.name: group for group in ParameterGroups(unet, {"temporal": True}).groups}
    for name, _ in groups["convolutions"].parameters:
        assert torch.equal(before[name], after[name]), name
    moved = [name for name, _ in groups["spatial_attention"].parameters if not torch.equal(before[name], after[name])]
    assert moved and set(before) == {name for name in after if not is_temporal(name)}
    assert after["conditioning.temporal.known.weight"].abs().sum() > 0
    assert any(after[name].abs().sum() > 0 for name in after if ".temporal.to_out" in name)


@pytest.mark.slow
def test_temporal_layers_start_as_identity_on_the_image_network(tiny, image):
    """Before its first step, the second stage makes frame by frame what the first one made."""
    still = load_unet(image)
    params = read_checkpoint(tiny("frozen", f"model.params.ckpt_path={image}", "data.params.seed=24")).config["model"]
    model = LatentVideoDiffusion(**{**params["params"], "ckpt_path": str(image)}, learning_rate=1e-4).eval()
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(2, 5, 4, 4, 4, generator=generator), torch.randn(2, 7, 16, generator=generator)
    timesteps = torch.tensor([30, 700])
    with torch.no_grad():
        found = model(noisy, timesteps, text, torch.tensor([10.0, 2.5]))
        frames = [still(frame, timesteps, text) for frame in noisy.unbind(1)]
    assert relative_error(found, torch.stack(frames, 1)) < 1e-5 and found.std() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("story", ["scratch", None])
def test_all_layers_train_at_once(tiny, story):
    first = tiny(story)
    tensors = raw(first)
    assert torch.count_nonzero(tensors["out.2.weight"]) > 0
    identity_in_time = UNetModel(**UNET).state_dict()["input_blocks.0.0.temporal.weight"]
    assert not torch.equal(tensors["input_blocks.0.0.temporal.weight"], identity_in_time)
    rate = read_checkpoint(first).config["model"]["base_learning_rate"]
    assert rate == (1e-4 if story else 5e-4)


@pytest.mark.slow
def test_the_video_model_resumes_exactly_and_loads_again(tiny):
    straight, stopped = tiny(None, "lightning.trainer.max_steps=4"), tiny(None, "data.params.verify=true")
    command.main(["-r", str(stopped.parents[1]), "-t", "--max_steps", "4"])
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (straight, stopped))
    assert one.keys() == other.keys() and any(name.startswith("model_ema.diffusion_model") for name in one)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert len(list((straight.parents[1] / "images" / "samples").glob("00_*.gif"))) == 3, "at steps 0, 2 and 4"
    found = load_unet(straight)(torch.zeros(1, 3, 9, 4, 4), torch.tensor([5]), torch.zeros(1, 7, 16))
    assert found.shape == (1, 3, 4, 4, 4)
    with pytest.raises(UserError, match="prepared with another scale factor"):
        tiny(None, "model.params.scale_factor=0.7")


@pytest.mark.slow
def test_single_frames_beside_clips(tiny):
    checkpoint = read_checkpoint(tiny(None, "data.params.image_share=0.5"))
    assert checkpoint.config["data"]["params"]["image_share"] == 0.5
    assert torch.count_nonzero(unet_tensors(checkpoint)["out.2.weight"]) > 0
    with pytest.raises(UserError, match=r"image.ckpt: .*no such"):
        tiny("frozen")
