"""Bundles: small float16 files in a folder that are one checkpoint, and what is refused of them."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ldm.checkpoint import load_first_stage, load_text_encoder, load_unet, read_checkpoint
from ldm.checkpoint import writing as checkpoint_bundling
from ldm.checkpoint.layouts import bundle_files, is_bundle
from ldm.checkpoint.names import FIRST_STAGE_PREFIX, TEXT_PREFIX, UNET_PREFIX, average_names
from ldm.checkpoint.reading import first_stage_tensors
from ldm.errors import UserError
from ldm.modules.encoders import CLIPTextEmbedder
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.record import hash_weights
from scripts.convert import main
from tests.tiny_checkpoint import CONFIG, TEXT, assert_same, part, video_state

FILES = ["autoencoder.safetensors", "config.yaml", "temporal.safetensors", "text_encoder.safetensors",
         "unet-1.safetensors"]  # fmt: skip


def run_config() -> dict:
    """As in the checkpoint of a run: with paths of the machine it ran on, and with how to sample."""
    config = copy.deepcopy(CONFIG)
    config["model"]["params"]["cond_stage_config"]["params"] |= {"ckpt_path": "/home/me/text.ckpt", "max_length": 32}
    config["model"]["params"]["ckpt_path"] = "/home/me/image.ckpt"
    data = {"target": "ldm.data.clips.ClipDataModule", "params": {"root": "/home/me/set", "frames": 5, "strides": [2]}}
    return {**config, "data": data, "prepare": {"fps": 8, "size": [32, 48]}, "sampling": {"steps": 4, "scale": 2.0}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run's checkpoint with averages, which differ from the weights."""
    weights = part(video_state(), UNET_PREFIX)
    names = average_names(weights)
    averages = {names[name]: 0.5 * tensor for name, tensor in weights.items()}
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    torch.save({"state_dict": video_state() | averages, "config": run_config()}, path)
    return path


@pytest.fixture(scope="module")
def original(trained) -> Path:
    folder = trained.parent / "drive"
    convert(trained, folder)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A bundle to be damaged."""
    return shutil.copytree(original, tmp_path / "drive")


def convert(source: Path, out: Path, *options: str) -> None:
    main(["--in", str(source), "--out", str(out), "--format", "bundle", *options])


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_every_network_comes_back_in_half_precision(trained, original):
    assert sorted(path.name for path in original.iterdir()) == FILES
    for path in original.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    halves = {name: tensor.half().float() for name, tensor in load_unet(trained).state_dict().items()}
    assert_same(load_unet(original).state_dict(), halves)  # the averages, then
    for load in (load_first_stage, load_text_encoder):
        halves = {name: tensor.half().float() for name, tensor in load(trained).state_dict().items()}
        assert_same(load(original).state_dict(), halves)
    assert load_text_encoder(original).max_length == 32
    temporal = load_file(original / "temporal.safetensors")
    assert all(".temporal." in name for name in temporal)
    assert not any(".temporal." in name for name in load_file(original / "unet-1.safetensors"))


def test_the_config_is_what_sampling_needs_without_paths(original):
    text = (original / "config.yaml").read_text()
    assert "/home/me" not in text and "learning_rate" not in text
    generator = ClipGenerator(original)
    assert generator.training.frames == 5 and generator.training.rates == (4.0,) and generator.training.size == (32, 48)
    assert generator.defaults == {"steps": 4, "scale": 2.0}


def test_sampling_words_of_the_command_line_come_first(trained, tmp_path):
    convert(trained, tmp_path / "x", "--sampling", "steps=7", "sampler=dpm++", "fps=12")
    assert ClipGenerator(tmp_path / "x").defaults == {"steps": 7, "scale": 2.0, "sampler": "dpm++", "fps": 12}


def test_a_text_encoder_of_its_own(trained, tmp_path):
    other = CLIPTextEmbedder(TEXT, random_seed=8).compvis_state_dict()
    torch.save({"state_dict": {TEXT_PREFIX + name: one for name, one in other.items()}}, tmp_path / "text.ckpt")
    convert(trained, tmp_path / "x", "--text", str(tmp_path / "text.ckpt"))
    name = "text_model.embeddings.token_embedding.weight"
    found = read_checkpoint(tmp_path / "x").tensors[TEXT_PREFIX + name]
    assert torch.equal(found, other[name].half())
    wide = CLIPTextEmbedder({**TEXT, "hidden_size": 32}, random_seed=8).compvis_state_dict()
    torch.save({"state_dict": {TEXT_PREFIX + name: one for name, one in wide.items()}}, tmp_path / "wide.ckpt")
    with pytest.raises(UserError, match=r"text encoder from .*wide.ckpt: .* of another shape"):
        convert(trained, tmp_path / "y", "--text", str(tmp_path / "wide.ckpt"))
    assert not (tmp_path / "y").exists()


def test_a_decoder_that_learned_on_alone(trained, tmp_path):
    state = {name: tensor.clone() for name, tensor in first_stage_tensors(read_checkpoint(trained)).items()}
    state["decoder.conv_out.bias"] += 1
    torch.save({"state_dict": state}, tmp_path / "sharper.ckpt")
    convert(trained, tmp_path / "x", "--decoder", str(tmp_path / "sharper.ckpt"))
    bias = load_file(tmp_path / "x" / "autoencoder.safetensors")[FIRST_STAGE_PREFIX + "decoder.conv_out.bias"]
    assert torch.equal(bias, state["decoder.conv_out.bias"].half())
    state["quant_conv.bias"] += 1
    torch.save({"state_dict": state}, tmp_path / "another.ckpt")
    with pytest.raises(UserError, match=r"another.ckpt: expected the autoencoder .* found another quant_conv.bias; tr"):
        convert(trained, tmp_path / "y", "--decoder", str(tmp_path / "another.ckpt"))


def test_the_unet_in_several_files_and_all_sizes_limited(trained, original, tmp_path, monkeypatch):
    image = (original / "unet-1.safetensors").stat().st_size
    monkeypatch.setattr(checkpoint_bundling, "MAX_IMAGE_PART", image // 3)
    convert(trained, tmp_path / "x")
    assert len(list((tmp_path / "x").glob("unet-*.safetensors"))) in (3, 4)
    assert_same(load_unet(tmp_path / "x").state_dict(), load_unet(original).state_dict())
    monkeypatch.setattr(checkpoint_bundling, "MAX_FILE", 1_000_000)
    with pytest.raises(UserError, match=r"autoencoder.safetensors: expected less than 1 MB, .* found 1.3 MB; write a"):
        convert(trained, tmp_path / "y")
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint_bundling, "MAX_TOTAL", 5_000_000)
    with pytest.raises(UserError, match=r"y: expected less than 5 MB of weights in a bundle, found 5.\d MB; write a"):
        convert(trained, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_other_files_stay_and_weights_among_them_count(trained, folder, monkeypatch):
    save_file({"judge": torch.zeros(1_000_000)}, folder / "judge.safetensors")
    (folder / "README.md").write_text("a card")
    monkeypatch.setattr(checkpoint_bundling, "MAX_IMAGE_PART", 1_000_000)
    with pytest.raises(UserError, match=r"--out: expected a new name, found .*drive, which exists; choose another, or"):
        convert(trained, folder)
    convert(trained, folder, "--overwrite")
    more = {path.name for path in folder.iterdir()} - {*FILES}
    assert more == {"judge.safetensors", "README.md", "unet-2.safetensors", "unet-3.safetensors"}
    monkeypatch.undo()
    convert(trained, folder, "--overwrite")  # in fewer files: the others are gone
    assert {path.name for path in folder.iterdir()} - {*FILES} == {"judge.safetensors", "README.md"}
    assert {path.name for path in bundle_files(folder)} == {*FILES}
    monkeypatch.setattr(checkpoint_bundling, "MAX_TOTAL", 6_000_000)
    with pytest.raises(UserError, match=r"found \d.\d MB, 4.0 MB of it weights that are there already; write a"):
        convert(trained, folder, "--overwrite")


def test_what_lies_beside_a_bundle_does_not_change_its_identity(folder):
    before = hash_weights(folder)
    (folder / "README.md").write_text("a card")
    assert hash_weights(folder) == before
    edit(folder, sampling={"steps": 5})
    assert hash_weights(folder) != before


# bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--half"], "--half: a bundle is always float16; leave it out"),
        (["--sampling", "12"], "--sampling: expected words such as steps=16, found '12'"),
        (["--sampling", "step=12"], "sampling.step: nothing reads this key; accepted here: frames, fps, window, steps"),
        (["--sampling", "steps=few"], "sampling.steps: expected a whole number, found 'few'"),
        (["--sampling", "steps=0"], "steps: expected 1 to 999, found 0"),
        (["--sampling", "sampler=dmp"], "sampler: expected a sampler's name, found 'dmp'"),
        (["--text", "nowhere.ckpt"], "nowhere.ckpt: expected a checkpoint"),
    ],
)
def test_bundles_that_are_not_written(trained, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        convert(trained, tmp_path / "x", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("word", "value"), [("--sampling", "steps=2"), ("--text", "x.ckpt"), ("--decoder", "x.ckpt")])
def test_options_of_bundles_belong_to_bundles(trained, tmp_path, word, value):
    with pytest.raises(UserError, match=f"{word}: belongs to --format bundle, found --format full; leave it out"):
        main(["--in", str(trained), "--out", str(tmp_path / "x.ckpt"), "--format", "full", word, value])


def test_a_part_that_is_not_there(tmp_path):
    state = {name: tensor for name, tensor in video_state().items() if not name.startswith(TEXT_PREFIX)}
    torch.save({"state_dict": state, "config": run_config()}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last.ckpt: expected the CLIP text encoder .* found none of its tensors"):
        convert(tmp_path / "last.ckpt", tmp_path / "x")
    config = run_config()
    del config["model"]["params"]["first_stage_config"]
    torch.save({"state_dict": video_state(), "config": config}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"first_stage_config: expected a node .* a bundle has all three networks"):
        convert(tmp_path / "last.ckpt", tmp_path / "x")


def test_a_bundle_without_one_of_its_files(folder):
    (folder / "temporal.safetensors").unlink()
    with pytest.raises(UserError, match=r"temporal.safetensors: expected weights, as config.yaml says, found no such"):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b""])
def test_a_file_that_is_not_the_one_of_the_bundle(folder, content):
    (folder / "unet-1.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"unet-1.safetensors: expected the weights that config.yaml was written for"):
        read_checkpoint(folder)


def test_a_tensor_in_two_files(folder):
    shutil.copy(folder / "unet-1.safetensors", folder / "unet-2.safetensors")
    weights = yaml.safe_load((folder / "config.yaml").read_text())["weights"]
    edit(folder, weights={**weights, "unet-2.safetensors": weights["unet-1.safetensors"]})
    with pytest.raises(UserError, match=r"unet-2.safetensors: expected each tensor in one file, found model.dif"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "config.yaml: expected YAML, found something else"),
        ("- 1", "found one without model and weights. Give a checkpoint file or another folder"),
        ("model: {}", "expected the config of a bundle, .* found one without weights"),
        ("model: {}\nweights: [x]", "expected at weights the names of .safetensors files in this folder"),
        ("model: {}\nweights: {../x.safetensors: a}", "expected at weights the names of .safetensors files in this"),
        ("model: {}\nweights: {x.ckpt: a}", "expected at weights the names of .safetensors files in this folder"),
    ],
)
def test_a_config_that_is_not_one(folder, text, message):
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_checkpoint(folder)


def test_a_strangers_bundle_names_no_other_class(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["params"]["unet_config"]["target"] = "subprocess.Popen"
    edit(folder, model=config["model"])
    with pytest.raises(UserError, match=r"unet_config.target: expected ldm.modules.unet.UNetModel, all that"):
        ClipGenerator(folder)


def test_a_folder_without_a_config_is_none(tmp_path):
    save_file({"judge": torch.zeros(3)}, tmp_path / "judge.safetensors")
    assert not is_bundle(tmp_path)
