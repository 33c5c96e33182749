"""Configs: merging, building, published CompVis files, and a clear message for every mistake."""

from __future__ import annotations

import importlib.util
import textwrap
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf

from ldm.config import (
    MOVED,
    ConfigError,
    accepted_names,
    build,
    check,
    find_target,
    load_config,
    nearest,
    to_container,
)
from ldm.config.schema import fits, trusting
from ldm.data.clips import ClipDataModule

CONFIGS = Path(__file__).parents[2] / "configs"

VIDEO = """
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentVideoDiffusion
  params:
    ckpt_path: null
    unet_config:
      target: ldm.modules.unet.UNetModel
      params: {in_channels: 4, out_channels: 4, model_channels: 32, num_res_blocks: 1, attention_resolutions: [2]}
    first_stage_config: {target: ldm.modules.encoders.KLFirstStage, params: {ddconfig: {ch: 32}, embed_dim: 4}}
    cond_stage_config: {target: ldm.modules.encoders.CLIPTextEmbedder}
data:
  target: ldm.data.clips.ClipDataModule
  params: {root: prepared, frames: 5, batch_size: 2}
lightning:
  trainer: {max_steps: 10, gradient_clip_val: 1.0}
  callbacks:
    samples: {target: ldm.callbacks.VideoLogger, params: {prompts: [a road]}}
    average: {params: {decay: 0.99}}
"""

# As published with Stable Diffusion v1.
COMPVIS = """
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False
    scheduler_config:
      target: ldm.lr_scheduler.LambdaLinearScheduler
      params:
        warm_up_steps: [ 10000 ]
        cycle_lengths: [ 10000000000000 ]
        f_start: [ 1.e-6 ]
        f_max: [ 1. ]
        f_min: [ 1. ]
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [ 4, 2, 1 ]
        num_res_blocks: 2
        channel_mult: [ 1, 2, 4, 4 ]
        num_heads: 8
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: 768
        use_checkpoint: True
        legacy: False
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig: {double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
                   ch_mult: [1, 2, 4, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


def test_files_and_overrides_merge_from_left_to_right(write):
    second = write("data: {params: {frames: 7, strides: [1, 2]}}", "second.yaml")
    config = load_config([write(VIDEO), second], ["model.base_learning_rate=1e-5", "data.params.strides=[3]"])
    assert config.data.params == {"root": "prepared", "frames": 7, "batch_size": 2, "strides": [3]}
    assert config.model.base_learning_rate == 1e-5
    check(config)


def test_values_are_yaml(write):
    config = load_config(
        [write(VIDEO)], ["data.params.val_share=0", "data.params.verify=false", "model.params.ckpt_path=null"]
    )
    assert config.data.params.val_share == 0 and config.data.params.verify is False
    assert config.model.params.ckpt_path is None


def test_build_constructs_with_what_the_code_supplies():
    node = {"target": "ldm.data.clips.ClipDataModule", "params": {"root": "somewhere", "strides": [1, 2]}}
    data = build(OmegaConf.create(node), "data", frames=3)
    assert isinstance(data, ClipDataModule) and (data.frames, data.strides) == (3, (1, 2))
    assert "batch_size" in accepted_names(node, "data")
    with pytest.raises(ConfigError, match=r"data.params.strides: the program sets this itself"):
        build(node, "data", frames=3, strides=[1])


def test_interpolations_are_resolved(write):
    config = load_config([write(VIDEO)], ["data.params.seed=${data.params.frames}"])
    assert to_container(config)["data"]["params"]["seed"] == 5
    with pytest.raises(ConfigError, match="nowhere"):
        load_config([write(VIDEO)], ["data.params.seed=${nowhere}"])


PLANS = [CONFIGS / "drive/ablations.yaml", CONFIGS / "drive/known.yaml", *(CONFIGS / "compare").glob("*.yaml")]
PRESETS = [path for path in CONFIGS.glob("*.yaml") if path.stem != "video-sd"]  # see test_presets
MERGED = [CONFIGS / "drive/decoder.yaml", *PRESETS, *(CONFIGS / "stories").glob("*.yaml")]  # another config
WHOLE = sorted(set(CONFIGS.rglob("*.yaml")) - set(PLANS) - set(MERGED))


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_every_config_of_the_project_is_sound(path):
    check(load_config([path]))


def test_decoder_config_merges_onto_its_autoencoder():
    config = load_config([CONFIGS / "drive/autoencoder.yaml", CONFIGS / "drive/decoder.yaml"])
    check(config)
    assert config.model.params.decoder_only and config.model.params.ddconfig.ch == 32


# ---- mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modell.x=1", r"modell: nothing reads this key; did you mean 'model'\?"),
        ("model.base_learning_rat=1", r"model.base_learning_rat: nothing reads.*'base_learning_rate'"),
        ("model.params.ckptpath=x", r"model.params.ckptpath: nothing reads.*'ckpt_path'"),
        ("model.params.unet_config.params.num_head=8", r"unet_config.params.num_head: nothing.*'num_heads'"),
        ("model.params.unet_config.parms.num_heads=8", r"model.params.unet_config.parms: nothing.*'params'"),
        ("data.params.batchsize=3", r"data.params.batchsize: nothing reads.*did you mean 'batch_size'\?"),
        ("lightning.trainer.max_step=3", r"lightning.trainer.max_step: nothing reads.*'max_steps'"),
        ("lightning.trainer.callbacks=x", r"lightning.trainer.callbacks: nothing reads"),
        ("lightning.callback.x=3", r"lightning.callback: nothing reads.*'callbacks'"),
        ("lightning.callbacks.samples.params.prompt=x", r"callbacks.samples.params.prompt: nothing.*'prompts'"),
        ("lightning.callbacks.average.params.dekay=1", r"callbacks.average.params.dekay: nothing.*'decay'"),
        ("lightning.callbacks.sample.params.x=1", r"lightning.callbacks.sample: needs a `target`.*samples"),
        ("lightning.callbacks.samples.params.folder=x", r"params.folder: the program sets this itself; leave it out"),
        ("model.params.learning_rate=1", r"model.params.learning_rate: the program sets this itself"),
        ("data.target=ldm.data.clips.ClipDataModul", r"no class 'ClipDataModul'; did you mean 'ClipDataModule'"),
        ("data.target=ldm.data.clip.ClipDataModule", r"target: there is no module 'ldm.data.clip'.*ldm.data.clips"),
        ("data.target=ClipDataModule", r"data.target: expected a dotted name"),
        ("data.target=os.system", r"data.target: expected a class of ldm.models, .*, found 'os.system'; nothing was b"),
        ("data.target=ldm.data.shards.writer.ShardWriter", r"found 'ldm.data.shards.writer.ShardWriter'; nothing was"),
        ("data.target=null", r"data: needs a `target`"),
        ("data.params=5", r"data.params: expected a mapping of arguments of ldm.data.clips.ClipDataModule, found 5"),
        ("data=5", r"data: expected a mapping, found 5"),
        ("model=abc", r"model: expected a mapping, found 'abc'"),
        ("lightning.trainer=5", r"lightning.trainer: expected a mapping, found 5"),
        ("lightning.callbacks=x", r"lightning.callbacks: expected a mapping, found 'x'"),
        ("lightning.callbacks=[x]", r"lightning.callbacks=\[x\]: Cannot merge incompatible container types"),
        ("prepare=[64]", r"prepare: expected a mapping"),
    ],
)
def test_misspelt_key_or_target_is_an_error_with_the_nearest_name(write, override, message):
    with pytest.raises(ConfigError, match=message):
        check(load_config([write(VIDEO)], [override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("unet_config.params.num_heads=abc", "unet_config.params.num_heads: expected a whole number, found 'abc'"),
        ("unet_config.params.num_heads=4.5", "num_heads: expected a whole number, found 4.5"),
        ("unet_config.params.num_heads=true", "num_heads: expected a whole number, found True"),
        ("unet_config.params.num_heads=null", "num_heads: expected a whole number, found None"),
        ("unet_config.params.channel_mult=3", "channel_mult: expected a list, each a whole number, found 3"),
        ("unet_config.params.channel_mult=[1,x]", r"channel_mult: expected .* a whole number, found \[1, 'x'\]"),
        ("unet_config.params.temporal=1", "temporal: expected true or false, found 1"),
        ("unet_config.params.dropout=x", "dropout: expected a number, found 'x'"),
        ("unet_config.params.attention_backend=1", "attention_backend: expected a string, found 1"),
        ("first_stage_config.params.ddconfig=1", "ddconfig: expected a mapping, found 1"),
        ("warmup_steps=abc", "model.params.warmup_steps: expected a whole number, found 'abc'"),
        ("scale_factor=abc", "model.params.scale_factor: expected a number or null, found 'abc'"),
        ("trainable={temporal: x}", "trainable: expected a mapping, each value true or false or a number or null"),
    ],
)
def test_value_of_the_wrong_type_is_an_error(write, override, message):
    with pytest.raises(ConfigError, match=message):
        check(load_config([write(VIDEO)], [f"model.params.{override}"]))


def test_values_of_the_right_type_pass(write):
    words = ["dropout=0", "channel_mult=[1, 2]", "temporal=false"]
    check(load_config([write(VIDEO)], [f"model.params.unet_config.params.{word}" for word in words]))
    check(load_config([write(VIDEO)], ["lightning.modelcheckpoint.params={every_n_train_steps: 5, save_last: link}"]))
    build(
        {"target": "ldm.data.clips.ClipDataModule", "params": {"strides": OmegaConf.create([1])}},
        "data",
        root="x",
        frames=3,
    )
    assert fits("unknown kinds pass", Literal["link"])


def test_missing_parameters_are_named(write):
    text = VIDEO.replace("params: {root: prepared, frames: 5, batch_size: 2}", "params: {batch_size: 2}")
    with pytest.raises(ConfigError, match=r"data.params: .*ClipDataModule needs root, frames, which the config does"):
        check(load_config([write(text)]))


def test_section_without_a_target_is_an_error(write):
    message = "data: needs a `target`, the dotted name of the class to build"
    with pytest.raises(ConfigError, match=message):
        check(load_config([write("data: {params: {frames: 3}}")]))
    for node in ({"params": {"frames": 3}}, {"target": None}, {"target": 5}, 5, None):
        with pytest.raises(ConfigError, match=message):
            build(node, "data")


def test_missing_package_is_an_error(write, tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import surely_not_installed\nclass Needy: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"needy.Needy needs the package 'surely_not_installed'"):
        with trusting():
            check(load_config([write("data: {target: needy.Needy}")]))


def test_broken_files(write, tmp_path):
    write(VIDEO, "video.yaml")
    with pytest.raises(ConfigError, match=r"vide.yaml: no such config file; did you mean '.*video.yaml'\?"):
        load_config([tmp_path / "vide.yaml"])
    with pytest.raises(ConfigError, match=r"no such config file"):
        load_config([tmp_path / "nowhere" / "x.yaml"])
    with pytest.raises(ConfigError, match=r"bad.yaml: not readable as YAML: (.|\n)*line 2"):
        load_config([write("model: {params: [1\ndata: }", "bad.yaml")])
    with pytest.raises(ConfigError, match=r"list.yaml: expected a mapping with the keys model, data"):
        load_config([write("- 1\n- 2", "list.yaml")])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"binary.yaml: not readable as YAML"):
        load_config([tmp_path / "binary.yaml"])
    with pytest.raises(ConfigError, match=r"model.params.ckpt_path"):
        load_config([write(VIDEO.replace("ckpt_path: null", "ckpt_path: ???"))])


@pytest.mark.parametrize("override", ["data.params.frames", "=5", "--frames=3"])
def test_override_without_key_or_value_is_an_error(write, override):
    with pytest.raises(ConfigError, match="is not of the form key=value"):
        load_config([write(VIDEO)], [override])


def test_override_that_is_not_yaml_is_an_error(write):
    with pytest.raises(ConfigError, match=r"data.params.strides=\[1,"):
        load_config([write(VIDEO)], ["data.params.strides=[1,"])


def test_kwargs_of_a_constructor_are_not_accepted(write):
    """TensorBoardLogger takes **kwargs, in which a misspelt key would go unnoticed."""
    check(load_config([write(VIDEO)], ["lightning.logger.params.log_graph=false"]))
    with pytest.raises(ConfigError, match=r"logger.params.foo: nothing reads this key; accepted here: .*name"):
        check(load_config([write(VIDEO)], ["lightning.logger.params.foo=1"]))


def test_target_must_be_where_the_class_is_defined(write):
    home = "torch.utils.data.dataset"
    message = f"data.target: 'Dataset' is defined in `{home}`; use target `{home}.Dataset`"
    with pytest.raises(ConfigError, match=message):
        check(load_config([write(VIDEO)], ["data.target=ldm.data.clips.Dataset"]))


def test_nearest_lists_all_names_without_a_close_one():
    assert nearest("zzz", ["one", "two"]) == "accepted here: one, two"
    assert nearest("zzz", []) == "accepted here: nothing"


# ---- moved classes


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_every_old_module_has_a_new_one(old, new):
    assert importlib.util.find_spec(old) is None, "a module that still exists has not moved"
    assert importlib.util.find_spec(new) is not None and new not in MOVED


def test_moved_target_gets_its_new_name(write):
    old = VIDEO.replace("ldm.callbacks.VideoLogger", "ldm.callbacks.videos.VideoLogger")
    config = load_config([write(old)], ["lightning.callbacks.guard={target: ldm.callbacks.guard.SkipBadSteps}"])
    check(config)
    assert config.lightning.callbacks.samples.target == "ldm.callbacks.samples.VideoLogger"
    assert config.lightning.callbacks.guard.target == "ldm.callbacks.bad_steps.SkipBadSteps"
    inside_a_checkpoint = {"target": "ldm.data.drive_frames.DriveFrameDataModule"}  # read without load_config
    assert find_target(inside_a_checkpoint, "data").__module__ == "ldm.data.world.frames"
    with pytest.raises(
        ConfigError, match=r"ldm.callbacks.samples has no class 'VideoLoger'; did you mean 'VideoLogger'"
    ):
        check(load_config([write(VIDEO)], ["lightning.callbacks.samples.target=ldm.callbacks.videos.VideoLoger"]))


# ---- CompVis


def test_the_published_config_loads_as_it_is(write):
    config = load_config([write(COMPVIS)])
    check(config)
    params = config.model.params
    assert config.model.target == "ldm.models.diffusion.ddpm.LatentVideoDiffusion"
    assert params.unet_config.target == "ldm.modules.unet.UNetModel"
    assert params.first_stage_config.target == "ldm.modules.encoders.KLFirstStage"
    assert params.cond_stage_config.target == "ldm.modules.encoders.CLIPTextEmbedder"
    assert set(params) == {
        "linear_start", "linear_end", "timesteps", "scale_factor", "warmup_steps",
        "unet_config", "first_stage_config", "cond_stage_config",
    }  # fmt: skip
    assert params.warmup_steps == 10000
    assert set(params.unet_config.params) == {
        "in_channels", "out_channels", "model_channels", "attention_resolutions", "num_res_blocks", "channel_mult",
        "num_heads", "transformer_depth", "context_dim", "use_checkpoint",
    }  # fmt: skip
    assert set(params.first_stage_config.params) == {"embed_dim", "ddconfig"}


def test_the_inpainting_config_loads_as_it_is(write):
    text = COMPVIS.replace("ddpm.LatentDiffusion", "ddpm.LatentInpaintDiffusion")
    text = text.replace("conditioning_key: crossattn", "conditioning_key: hybrid\n    finetune_keys: null")
    text = text.replace("        in_channels: 4\n        out_channels", "        in_channels: 9\n        out_channels")
    config = load_config([write(text)])
    check(config)
    assert config.model.params.unet_config.params.in_channels == 9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "use_ema: False",
            "use_ema: True",
            r"model.params.use_ema: True is not supported.*lightning.callbacks.average",
        ),
        ("cond_stage_trainable: false", "cond_stage_trainable: true", r"model.params.cond_stage_trainable: True"),
        ("conditioning_key: crossattn", "conditioning_key: concat", r"model.params.conditioning_key: 'concat'"),
        ("use_spatial_transformer: True", "use_spatial_transformer: False", r"params.use_spatial_transformer: False"),
        ("legacy: False", "legacy: False\n        num_classes: 1000", r"unet_config.params.num_classes: 1000"),
        ("target: torch.nn.Identity", "target: x.Perceptual", r"first_stage_config.params.lossconfig"),
        ("f_min: [ 1. ]", "f_min: [ 0.1 ]", r"scheduler_config: expected a linear warm-up"),
        ("warm_up_steps: [ 10000 ]", "warm_up_steps: 10000", r"scheduler_config: expected a linear warm-up"),
        ("target: torch.nn.Identity", "abc: 1", r"first_stage_config.params.lossconfig: \{'abc': 1\} is not supported"),
    ],
)
def test_dropped_compvis_key_with_another_value_is_an_error(write, old, new, message):
    assert old in COMPVIS
    with pytest.raises(ConfigError, match=message):
        load_config([write(COMPVIS.replace(old, new))])


def test_compvis_section_that_is_not_a_mapping_is_an_error(write):
    head = "model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: "
    for params, message in (
        ("[1]}", r"model.params: expected a mapping, found \[1\]"),
        ("{scheduler_config: 5}}", "model.params.scheduler_config: expected a mapping, found 5"),
        ("{scheduler_config: {params: 5}}}", "model.params.scheduler_config.params: expected a mapping, found 5"),
        ("{unet_config: {target: x.Y, params: 5}}}", "model.params.unet_config.params: expected a mapping, found 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config([write(head + params)])


def test_compvis_keys_are_errors_in_other_configs(write):
    with pytest.raises(ConfigError, match=r"model.params.image_size: nothing reads"):
        check(load_config([write(VIDEO)], ["model.params.image_size=64"]))


def test_misspelt_compvis_key_is_an_error(write):
    with pytest.raises(ConfigError, match=r"model.params.linear_strat: nothing reads.*'linear_start'"):
        check(load_config([write(COMPVIS.replace("linear_start", "linear_strat"))]))
