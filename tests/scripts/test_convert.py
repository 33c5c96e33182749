"""The command that turns one kind of checkpoint into another."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import load_unet, read_checkpoint
from ldm.checkpoint.names import UNET_PREFIX, average_names
from ldm.checkpoint.temporal import base_identity
from ldm.errors import UserError, run_command
from scripts.convert import main
from tests.tiny_checkpoint import (
    CONFIG,
    assert_same,
    image_state,
    part,
    save_as_public,
    video_state,
    write_safetensors,
)
from tests.tiny_release import release_state, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`last.ckpt` of a run, `release/`, and an image model to put temporal layers into."""
    folder = tmp_path_factory.mktemp("convert")
    torch.save({"state_dict": video_state(), "config": CONFIG}, folder / "last.ckpt")
    other = {name: one * 1.1 if name.startswith(UNET_PREFIX) else one for name, one in image_state().items()}
    write_safetensors(other, folder / "other.safetensors")
    write_folder(release_state(9), folder / "release")
    return folder


def convert(source, out, form, *options):
    main(["--in", str(source), "--out", str(out), "--format", form, *map(str, options)])


def test_there_and_back(folder, tmp_path, capsys):
    convert(folder / "last.ckpt", tmp_path / "motion.safetensors", "temporal")
    told = capsys.readouterr().out
    assert "last.ckpt: a checkpoint of this project, 443 tensors, 2.7 M parameters, 11.0 MB\n" in told
    assert "motion.safetensors: temporal layers alone, 78 tensors, 0.3 M parameters, 1.1 MB (10% of" in told
    assert f"image weights of the UNet: sha256 {base_identity(read_checkpoint(folder / 'last.ckpt'))}\n" in told
    motion = tmp_path / "motion.safetensors"
    convert(motion, tmp_path / "same.ckpt", "full", "--base", folder / "last.ckpt")
    assert "note:" not in capsys.readouterr().out
    assert_same(load_unet(tmp_path / "same.ckpt").state_dict(), load_unet(folder / "last.ckpt").state_dict())
    convert(motion, tmp_path / "merged.safetensors", "full", "--base", folder / "other.safetensors")
    told = capsys.readouterr().out
    assert "base: " in told and "other.safetensors: Stable Diffusion v1 in CompVis's names" in told
    assert "note: " in told and "was trained on other image weights than those of" in told
    merged = read_checkpoint(tmp_path / "merged.safetensors")
    other = read_checkpoint(folder / "other.safetensors").tensors
    for name, tensor in merged.tensors.items():
        assert torch.equal(tensor, (video_state() if ".temporal." in name else other)[name])


def test_the_release_through_one_file_and_back(folder, tmp_path, capsys):
    convert(folder / "release", tmp_path / "ours.ckpt", "full")
    told = capsys.readouterr().out
    assert "release: the author's later release, 930 tensors" in told and "ours.ckpt: a checkpoint of this" in told
    assert "the image autoencoder of the input is not" not in told
    convert(tmp_path / "ours.ckpt", tmp_path / "again", "author")
    assert "again: the author's later release, 930 tensors" in capsys.readouterr().out
    found = [read_checkpoint(one).tensors for one in (folder / "release", tmp_path / "again")]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    convert(folder / "release", tmp_path / "motion.safetensors", "temporal")
    assert "note: the input does not say what was trained" in capsys.readouterr().out


def test_the_image_part_for_diffusers_and_back(folder, tmp_path, capsys):
    convert(folder / "last.ckpt", tmp_path / "pipeline", "diffusers")
    assert "note: the temporal layers were left out" in capsys.readouterr().out
    convert(tmp_path / "pipeline", tmp_path / "image.safetensors", "full", "--half")
    told = capsys.readouterr().out
    assert "pipeline: Stable Diffusion v1 in diffusers' names" in told
    assert "note: the encoders are of other sizes than Stable Diffusion v1's" in told
    found = read_checkpoint(tmp_path / "image.safetensors")
    assert found.config["model"]["params"]["unet_config"]["params"]["num_heads"] == 4  # no shape tells
    for name, tensor in found.tensors.items():
        if name.startswith(UNET_PREFIX):
            assert torch.equal(tensor, image_state()[name].half())


def test_a_public_file(folder, tmp_path, capsys):
    save_as_public(image_state(), tmp_path / "sd-v1-4.ckpt")
    convert(tmp_path / "sd-v1-4.ckpt", tmp_path / "sd.safetensors", "full")
    assert "sd-v1-4.ckpt: Stable Diffusion v1 in CompVis's names, 365 tensors" in capsys.readouterr().out
    assert_same(read_checkpoint(tmp_path / "sd.safetensors").tensors, image_state())


@pytest.mark.parametrize(
    ("source", "out", "form", "options", "message"),
    [
        ("nowhere.ckpt", "x.ckpt", "full", [], "nowhere.ckpt: expected a checkpoint"),
        ("last.ckpt", "last.ckpt", "full", ["--overwrite"], "--out: expected another place than the input's"),
        ("last.ckpt", "x", "full", [], "--out: expected a file name ending in .ckpt or .safetensors"),
        ("last.ckpt", "other.safetensors", "temporal", [], "which exists; choose another, or add --overwrite"),
        ("last.ckpt", "x.ckpt", "full", ["--base", "other.safetensors"], "--base: belongs to a file of temporal"),
        ("motion.safetensors", "x.ckpt", "full", [], "--base: .* holds temporal layers alone; give the image model"),
        ("motion.safetensors", "x.safetensors", "temporal", ["--base", "last.ckpt"], "is a file of temp.* already"),
        ("motion.safetensors", "x.ckpt", "full", ["--base", "release"], "expected to be put into a network with"),
        ("trained.ckpt", "x.safetensors", "temporal", [], "found that convolutions were trained as well"),
        ("last.ckpt", "x", "author", [], "cannot be written in its form: norm_over_clip is false"),
        ("other.safetensors", "x.safetensors", "temporal", [], "expected a network with temporal layers, found"),
        ("torn", "x.ckpt", "full", [], "found one without conv_out.spatial_conv.weight"),
        ("motion.safetensors", "x.ckpt", "full", ["--base", "torn"], "found one without conv_out.spatial_conv.weight"),
        ("motion.safetensors", "x.ckpt", "full", ["--base", "motion.safetensors"], "expected a whole UNet, found temp"),
    ],
)
def test_mistakes(folder, tmp_path, monkeypatch, source, out, form, options, message):
    monkeypatch.chdir(folder)
    if source == "motion.safetensors" and not Path(source).exists():
        convert("last.ckpt", source, "temporal")
    if source == "trained.ckpt":
        config = copy.deepcopy(CONFIG)
        config["model"]["params"]["trainable"] = {"temporal": True, "convolutions": True}
        torch.save({"state_dict": video_state(), "config": config}, source)
    if source == "torn" and not Path(source).exists():
        state = release_state(4)
        del state["conv_out.spatial_conv.weight"]
        write_folder(state, Path(source))
    out = out if (folder / out).exists() else tmp_path / out
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match=message):
        convert(source, out, form, *options)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


FORMATS = [("x.ckpt", "full"), ("x.safetensors", "temporal"), ("x", "diffusers"), ("x", "author")]


@pytest.mark.parametrize(
    "name",
    [
        "attentions.0.transformer_blocks.0.attn2.to_q.weight",
        "mid_block.resnets.1.norm2.bias",
        "attn_temporal.to_k.weight",
        "conv1.temporal_conv.bias",
        "down_blocks.1.downsamplers.0.conv.spatial_conv.weight",
    ],
)
@pytest.mark.parametrize(("out", "form"), FORMATS)
def test_a_release_without_one_of_its_tensors(tmp_path, out, form, name):
    state = release_state(4)
    lost = next(one for one in state if name in one)
    del state[lost]
    write_folder(state, tmp_path / "torn")
    with pytest.raises(UserError, match=rf"torn: .*{re.escape(lost)}"):
        convert(tmp_path / "torn", tmp_path / out, form)
    assert [one.name for one in tmp_path.iterdir()] == ["torn"]


@pytest.mark.slow
@pytest.mark.parametrize(("out", "form"), FORMATS)
def test_a_run_without_one_of_its_tensors_or_with_one_of_another_shape(tmp_path, out, form):
    query = "middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    names = average_names(part(video_state(), UNET_PREFIX))
    averages = {names[name]: one for name, one in part(video_state(), UNET_PREFIX).items()}
    for changes, message in (
        ({UNET_PREFIX + query: None}, f"1 missing: {query}"),
        ({UNET_PREFIX + query: torch.zeros(3, 4)}, f"1 of another shape: {query}"),
        (averages | {names[query]: torch.zeros(3, 4)}, f"1 of another shape: {query}"),
        (averages | {UNET_PREFIX + query: torch.zeros(3, 4)}, f"1 of another shape: {query}"),
        ({UNET_PREFIX + "out.2.temporal.bias": None}, "1 missing: out.2.temporal.bias"),
        ({UNET_PREFIX + "out.3.bias": torch.zeros(3)}, "1 unexpected: out.3.bias"),
    ):
        state = {name: one for name, one in (video_state() | changes).items() if one is not None}
        torch.save({"state_dict": state, "config": CONFIG}, tmp_path / "last.ckpt")
        with pytest.raises(UserError, match=rf"UNet from .*last.ckpt: the tensors in the file are not .*{message}"):
            convert(tmp_path / "last.ckpt", tmp_path / out, form)
        assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_words_of_the_command_line(capsys):
    for words, message in (
        (["--in", "a.ckpt", "--out", "b.ckpt"], "the following arguments are required: --format; --help lists all"),
        (["--in", "a", "--out", "b", "--format", "onnx"], "argument --format: invalid choice: 'onnx'"),
    ):
        with pytest.raises(UserError, match=message):
            main(words)
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert "temporal   the temporal layers alone" in told and max(map(len, told.splitlines())) <= 120


def test_what_is_there_is_replaced_when_asked(folder, tmp_path, capsys):
    for out, form in (("x.safetensors", "full"), ("pipeline", "diffusers")):
        convert(folder / "last.ckpt", tmp_path / out, form)
        with pytest.raises(UserError, match=r"which exists; choose another, or add --overwrite"):
            convert(folder / "other.safetensors", tmp_path / out, form)
        convert(folder / "last.ckpt", tmp_path / out, form, "--overwrite", "--half")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["pipeline", "x.safetensors"]
    assert read_checkpoint(tmp_path / "pipeline").tensors[UNET_PREFIX + "out.2.bias"].dtype == torch.float16


def test_as_a_program(folder, tmp_path, capsys):
    assert run_command(lambda: convert(folder / "last.ckpt", tmp_path / "x.txt", "full")) == 1
    assert capsys.readouterr().err == (
        f"error: --out: expected a file name ending in .ckpt or .safetensors for full, found {tmp_path / 'x.txt'}\n"
    )
    assert run_command(lambda: convert(folder / "last.ckpt", tmp_path / "x.ckpt", "full")) == 0
