"""One file of everything: what it holds, how it is read back, and where it may be written."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint import SD_V1_FIRST_STAGE, CheckpointError, load_unet, read_checkpoint
from ldm.checkpoint import writing as checkpoint_writing
from ldm.checkpoint.encoders import prefixed
from ldm.checkpoint.files import read_file
from ldm.checkpoint.names import FIRST_STAGE_PREFIX, TEXT_PREFIX, UNET_PREFIX, average_names
from ldm.checkpoint.writing import check_output, full_config, replacing_folder, save_tensors, write_full, write_temporal
from ldm.config import ConfigError
from ldm.errors import UserError
from ldm.modules.encoders import CLIPTextEmbedder, KLFirstStage
from ldm.modules.state_dicts import POSITION_IDS
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

SUFFIXES = ("ckpt", "safetensors")


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    """A checkpoint as training writes it: averages, a config with paths, and the state of an optimiser."""
    state = video_state()
    names = average_names(part(state, UNET_PREFIX))
    state |= {names[name]: one + 1 for name, one in part(state, UNET_PREFIX).items() if ".temporal." in name}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    config = copy.deepcopy(CONFIG) | {"prepare": {"fps": 10, "size": [64, 64]}}
    config["model"]["params"]["ckpt_path"] = "/home/somebody/model.ckpt"
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    torch.save({"state_dict": state, "config": config, "optimizer_states": [{"step": torch.zeros(9)}]}, path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_everything_is_there_and_read_back(last, tmp_path, suffix):
    checkpoint = read_checkpoint(last)
    write_full(checkpoint, tmp_path / f"full.{suffix}")
    again = read_checkpoint(tmp_path / f"full.{suffix}")
    assert again.kind == "ours"
    assert again.tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(again.tensors[name], one) for name, one in checkpoint.tensors.items())
    assert all(again.tensors[name].dtype == one.dtype for name, one in checkpoint.tensors.items())
    assert again.own_config == checkpoint.config  # the paths of somebody's disk are gone
    assert again.config["prepare"] == {"fps": 10, "size": [64, 64]}
    assert_same(load_unet(again).state_dict(), load_unet(checkpoint).state_dict())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_half(last, tmp_path, suffix):
    write_full(read_checkpoint(last), tmp_path / f"half.{suffix}", half=True)
    tensors = read_checkpoint(tmp_path / f"half.{suffix}").tensors
    assert tensors["betas"].dtype == torch.float32
    for name, one in read_checkpoint(last).tensors.items():
        if one.dtype == torch.float32 and name != "betas" and not name.startswith(("alphas", "sqrt", "log", "post")):
            assert torch.equal(tensors[name], one.half()), name
    whole, half = (path.stat().st_size for path in (last, tmp_path / f"half.{suffix}"))
    assert 0.45 * whole < half < 0.55 * whole
    write_temporal(read_checkpoint(last), tmp_path / "motion.safetensors", half=True)
    assert {one.dtype for one in read_checkpoint(tmp_path / "motion.safetensors").tensors.values()} == {torch.float16}


def test_numbers_too_large_for_half(tmp_path):
    state = image_state()
    state[UNET_PREFIX + "out.2.bias"] = torch.full((4,), 1e5)
    checkpoint = read_checkpoint(write_safetensors(state, tmp_path / "big.safetensors"))
    with pytest.raises(CheckpointError, match=r"out.2.bias hold numbers too large for float16. Leave out --half"):
        write_full(checkpoint, tmp_path / "half.ckpt", half=True)
    assert not (tmp_path / "half.ckpt").exists()


def test_a_file_without_a_config_gets_one(tmp_path):
    folder = write_folder(release_state(9), tmp_path / "release")
    write_full(read_checkpoint(folder), tmp_path / "release.safetensors")
    again = read_checkpoint(tmp_path / "release.safetensors")
    assert again.kind == "ours"
    assert "first_stage_config" not in again.config["model"]["params"]
    unet = load_unet(again)  # what no shape tells, its config does
    assert unet.norm_over_clip and unet.takes_known_frames
    assert_same(unet.state_dict(), load_unet(folder).state_dict())


def test_sd_v1s_own_encoders_are_recognised(tmp_path):
    checkpoint = read_checkpoint(save_as_public(image_state(), tmp_path / "sd.ckpt"))
    assert {"first_stage_config", "cond_stage_config"}.isdisjoint(full_config(checkpoint)["model"]["params"])
    with torch.device("meta"):
        first_stage = KLFirstStage(**SD_V1_FIRST_STAGE["params"]).compvis_state_dict()
        text = CLIPTextEmbedder().compvis_state_dict()
    text = {name: one for name, one in text.items() if name != POSITION_IDS}  # as files of today
    unet = {name: one for name, one in checkpoint.tensors.items() if name.startswith(UNET_PREFIX)}
    checkpoint.tensors = unet | prefixed(FIRST_STAGE_PREFIX, first_stage) | prefixed(TEXT_PREFIX, text)
    params = full_config(checkpoint)["model"]["params"]
    assert params["first_stage_config"] == SD_V1_FIRST_STAGE
    assert params["cond_stage_config"]["target"] == "ldm.modules.encoders.CLIPTextEmbedder"
    assert (params["scale_factor"], params["timesteps"], params["parameterization"]) == (0.18215, 1000, "eps")


def test_a_config_in_the_metadata_is_believed_as_little_as_any(tmp_path):
    config = copy.deepcopy(CONFIG)
    config["model"]["params"]["unet_config"] = {"target": "subprocess.Popen", "params": {"args": ["touch", "x"]}}
    save_file(image_state(), tmp_path / "evil.safetensors", {"config": json.dumps(config)})
    message = r"evil.safetensors, model.params.unet_config.target: expected ldm.modules.unet.UNetModel.*nothing was b"
    with pytest.raises(ConfigError, match=message):
        load_unet(tmp_path / "evil.safetensors")


@pytest.mark.parametrize("text", ["{half", "[1]", '"words"', '{"width": 3}'])
def test_what_others_put_into_the_metadata_is_theirs(tmp_path, text):
    save_file(image_state(), tmp_path / "foreign.safetensors", {"config": text, "modelspec.title": "x"})
    checkpoint = read_checkpoint(tmp_path / "foreign.safetensors")
    assert (checkpoint.kind, checkpoint.config) == ("compvis", None)


def test_tensors_that_share_memory(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "same": whole, "row": whole[1], "turned": whole.T}
    save_tensors(tensors, tmp_path / "shared.safetensors", {})
    contents = read_file(tmp_path / "shared.safetensors")
    assert_same(contents["state_dict"], tensors)
    assert contents["metadata"] == {"format": "pt"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_stood_there_stays_when_writing_fails(last, tmp_path, monkeypatch, suffix):
    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    path = tmp_path / f"full.{suffix}"
    path.write_text("before")
    monkeypatch.setattr(checkpoint_writing, "save_file", fail)
    monkeypatch.setattr(checkpoint_writing.torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        write_full(read_checkpoint(last), path)
    assert [one.name for one in tmp_path.iterdir()] == [path.name] and path.read_text() == "before"


def test_a_disk_without_room(last, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for write in (write_full, write_temporal):
        with pytest.raises(UserError, match=r"full.safetensors: expected room for 0.0\d GB, found 0.00 GB free"):
            write(read_checkpoint(last), tmp_path / "full.safetensors")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    for content in ("one", "two"):
        with replacing_folder(tmp_path / "deep" / "out") as partial:
            (partial / "file").write_text(content)
            assert not (tmp_path / "deep" / "out" / content).exists()
        assert (tmp_path / "deep" / "out" / "file").read_text() == content
    with pytest.raises(RuntimeError, match="half way"), replacing_folder(tmp_path / "deep" / "out") as partial:
        (partial / "file").write_text("three")
        raise RuntimeError("half way")
    assert (tmp_path / "deep" / "out" / "file").read_text() == "two"
    assert [one.name for one in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("out", "form", "message"),
    [
        ("x.bin", "full", r"expected a file name ending in .ckpt or .safetensors for full, found .*x.bin"),
        ("x.ckpt", "temporal", r"expected a file name ending in .safetensors for temporal"),
        ("x.ckpt", "diffusers", r"expected the name of a folder for diffusers, found .*x.ckpt; leave out .ckpt"),
        ("in.ckpt", "full", r"expected another place than the input's"),
        ("in-folder/x.ckpt", "full", r"expected another place than the input's"),
        (".", "author", r"expected another place than the input's"),
        ("there.ckpt", "full", r"expected a new name, found .*there.ckpt, which exists; .* add --overwrite"),
        ("folder.ckpt", "full", r"expected a file or nothing yet, found a folder"),
        ("file", "diffusers", r"expected a folder or nothing yet, found a file"),
        ("pipeline", "diffusers", r"expected a new name, found .*pipeline, which exists"),
        ("home", "author", r"expected a new folder or one of diffusers' layout, found .* with photos, work in it"),
    ],
)
def test_places_that_will_not_do(tmp_path, out, form, message):
    for name in ("in.ckpt", "there.ckpt", "file"):
        (tmp_path / name).touch()
    for name in ("in-folder", "folder.ckpt", "pipeline/unet", "home/unet", "home/photos", "home/work"):
        (tmp_path / name).mkdir(parents=True)
    inputs = [tmp_path / "in.ckpt", tmp_path / "in-folder"]
    with pytest.raises(UserError, match=f"--out: {message}"):
        check_output(tmp_path / out, form, inputs, overwrite=False)
    is_mere_caution = "which exists" in message
    if is_mere_caution:
        check_output(tmp_path / out, form, inputs, overwrite=True)
    else:
        with pytest.raises(UserError, match=f"--out: {message}"):
            check_output(tmp_path / out, form, inputs, overwrite=True)


def test_places_that_will_do(tmp_path):
    (tmp_path / "empty").mkdir()
    for out, form in (("new/x.ckpt", "full"), ("x.safetensors", "temporal"), ("empty", "diffusers"), ("a/b", "author")):
        check_output(tmp_path / out, form, [tmp_path / "in.ckpt"], overwrite=False)
