"""A temporal decoder beside a checkpoint: in bundles, at the command line, in records, in evaluations; and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoint import read_checkpoint
from ldm.checkpoint.diffusers import write_diffusers
from ldm.checkpoint.encoders import digest_of
from ldm.checkpoint.names import FIRST_STAGE_PREFIX, TEMPORAL_DECODER_PREFIX
from ldm.errors import UserError
from ldm.experiments.sampled_rows import autoencode, autoencoder_identity
from ldm.modules.temporal_decoder import FramesBlock, TemporalDecoder
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.settings import ClipSettings
from ldm.video import from_uint8, to_uint8
from scripts import convert
from scripts.txt2vid import main
from tests.checkpoint.test_checkpoint_bundle import run_config
from tests.tiny_checkpoint import DDCONFIG, part, video_state

WORDS = {"ch": DDCONFIG["ch"], "ch_mult": DDCONFIG["ch_mult"], "blocks": [2, 1]}
NODE = {"target": "ldm.modules.temporal_decoder.TemporalDecoder", "params": WORDS}
QUICK = ["--steps", "2", "--frames", "5", "--H", "32", "--W", "32", "--device", "cpu"]


def write_decoder(path: Path, first_stage: dict[str, torch.Tensor]) -> Path:
    """What a training of a temporal decoder leaves."""
    torch.manual_seed(0)
    decoder = TemporalDecoder(**WORDS)
    for module in decoder.modules():
        if isinstance(module, FramesBlock):
            torch.nn.init.normal_(module.put.weight, std=0.4)
    decoder.made_for.copy_(digest_of(first_stage))
    state = {TEMPORAL_DECODER_PREFIX + name: tensor for name, tensor in decoder.state_dict().items()}
    params = {"ckpt_path": "/home/me/drive", "temporal_decoder_config": NODE}
    model = {"target": "ldm.models.temporal_decoder.TemporalDecoderTraining", "params": params}
    torch.save({"state_dict": state, "config": {"model": model}}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """`last.ckpt` of a run, `decoder.ckpt` for it, `other.ckpt` for another autoencoder, and the bundle `drive`."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.save({"state_dict": video_state(), "config": run_config()}, folder / "last.ckpt")
    first_stage = part(video_state(), FIRST_STAGE_PREFIX)
    write_decoder(folder / "decoder.ckpt", first_stage)
    write_decoder(folder / "other.ckpt", {name: tensor + 0.1 for name, tensor in first_stage.items()})
    make_bundle(folder / "last.ckpt", folder / "drive", "--temporal-decoder", str(folder / "decoder.ckpt"))
    return folder


def make_bundle(source: Path, out: Path, *words: str) -> None:
    convert.main(["--in", str(source), "--out", str(out), "--format", "bundle", *words])


def clip_of(generator: ClipGenerator, frames: int = 5, chunk: int = 4, seeds: tuple[int, ...] = (1,)) -> np.ndarray:
    generator.read_prompts(["a road"])
    settings = ClipSettings("a road", frames=frames, height=32, width=32, fps=4, steps=2, scale=1)
    return np.stack(generator.generate(settings, seeds, chunk)).astype(int)


@pytest.mark.slow
def test_a_bundle_carries_it_and_clips_are_decoded_with_it(files, tmp_path):
    assert {tensor.dtype for tensor in load_file(files / "drive" / "temporal_decoder.safetensors").values()} == {
        torch.float16, torch.uint8
    }  # fmt: skip
    together, alone = clip_of(ClipGenerator(files / "drive")), clip_of(
        ClipGenerator(files / "drive", temporal_decoder=False)
    )  # fmt: skip
    assert np.abs(together - alone).max() > 10
    make_bundle(files / "drive", tmp_path / "again")
    assert np.array_equal(clip_of(ClipGenerator(tmp_path / "again")), together)
    given = ClipGenerator(files / "last.ckpt", temporal_decoder=read_checkpoint(files / "decoder.ckpt"))
    assert np.abs(clip_of(given) - together).max() <= 2  # float32 in place of float16
    assert "/home/me" not in (files / "drive" / "config.yaml").read_text()


@pytest.mark.slow
def test_chunks_and_clips_beside_it_change_nothing_and_pictures_pass_it_by(files):
    generator = ClipGenerator(files / "drive")
    clips = clip_of(generator, seeds=(1, 2, 3))
    for chunk in (1, 3, 9):
        assert np.abs(clip_of(generator, chunk=chunk, seeds=(1, 2, 3)) - clips).max() <= 2
    assert np.abs(clip_of(generator, seeds=(2,))[0] - clips[1]).max() <= 2
    alone = ClipGenerator(files / "drive", temporal_decoder=False)
    assert np.array_equal(clip_of(generator, frames=1), clip_of(alone, frames=1))


def test_rows_of_an_evaluation_use_it_but_for_the_image_model(files):
    row, alone = ClipGenerator(files / "drive"), ClipGenerator(files / "drive", temporal_decoder=False)
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    moments = row.first_stage.encode(from_uint8(frames))
    latents = moments.chunk(2, dim=1)[0]
    expected = torch.cat(list(row.temporal_decoder.decode(row.first_stage.decoder_parts(), [latents])))
    assert np.abs(autoencode(row, frames).astype(int) - to_uint8(expected)).max() <= 1
    assert np.abs(autoencode(row, frames).astype(int) - autoencode(alone, frames)).max() > 10
    assert autoencoder_identity(row) != autoencoder_identity(alone)
    as_joined = autoencoder_identity(row)
    row.temporal_decoder.brightness_area = 0
    assert autoencoder_identity(row) != as_joined
    row.read_prompts(["a road"])
    alone.read_prompts(["a road"])
    settings = ClipSettings("a road", frames=2, height=32, width=32, fps=4, steps=1, scale=1)
    of_images = [generator.generate(settings, [1], images_only=True)[0] for generator in (row, alone)]
    assert np.array_equal(*of_images)


def test_a_clip_made_with_one_is_made_again(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("last.ckpt", "decoder.ckpt", "other.ckpt"):
        shutil.copy(files / name, name)
    main(["--prompt", "a road", *QUICK, "--ckpt", "last.ckpt", "--temporal-decoder", "decoder.ckpt", "--outdir", "."])
    record = json.loads(Path("00000.json").read_text())
    assert record["temporal_decoder"]["path"] == "decoder.ckpt" and len(record["temporal_decoder"]["sha256"]) == 64
    main(["--replay", "00000.mp4", "--outdir", "."])
    assert Path("00000.mp4").read_bytes() == Path("00001.mp4").read_bytes()
    with pytest.raises(UserError, match=r"other.ckpt: expected the temporal decoder .* give it with --temp"):
        main(["--replay", "00000.mp4", "--outdir", ".", "--temporal-decoder", "other.ckpt"])
    main(["--prompt", "a road", *QUICK, "--ckpt", "last.ckpt", "--outdir", "."])
    assert json.loads(Path("00002.json").read_text())["temporal_decoder"] is None
    with pytest.raises(UserError, match=r"of the clip, none, found sha256 .*; leave out --temporal-decoder"):
        main(["--replay", "00002.mp4", "--outdir", ".", "--temporal-decoder", "decoder.ckpt"])


def test_it_is_refused_beside_an_autoencoder_that_it_was_not_trained_with(files, tmp_path):
    message = r"temporal decoder from .*other.ckpt: expected one that was trained with this image autoencoder"
    with pytest.raises(UserError, match=message):
        make_bundle(files / "last.ckpt", tmp_path / "x", "--temporal-decoder", str(files / "other.ckpt"))
    with pytest.raises(UserError, match=message):
        clip_of(ClipGenerator(files / "last.ckpt", temporal_decoder=read_checkpoint(files / "other.ckpt")))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("last.ckpt", None, r"last.ckpt: expected the temporal decoder \(temporal_decoder.\*\), found none of its"),
        ("decoder.ckpt", "state_dict", r"temporal decoder from .*: the tensors .* are not those .*1 missing: places.0"),
        ("decoder.ckpt", "config", r"model.params.temporal_decoder_config in the config of a .*, found none"),
        ("decoder.ckpt", "word", r"decoder.ckpt: model.params.temporal_decoder_config.*colour_area: nothing reads"),
    ],
)
def test_what_is_no_temporal_decoder_is_refused(files, tmp_path, name, change, message):
    contents = torch.load(files / name)
    if change == "state_dict":
        del contents["state_dict"]["temporal_decoder.places.0.0.put.bias"]
    if change == "config":
        contents["config"]["model"]["params"] = {}
    if change == "word":
        contents["config"]["model"]["params"]["temporal_decoder_config"]["params"]["colour_area"] = 2
    torch.save(contents, tmp_path / name)
    with pytest.raises(UserError, match=message):
        make_bundle(files / "last.ckpt", tmp_path / "x", "--temporal-decoder", str(tmp_path / name))


def test_another_decoder_of_pictures_leaves_it_behind(files, tmp_path, capsys):
    first_stage = part(video_state(), FIRST_STAGE_PREFIX)
    sharper = {name: one * (1.1 if name.startswith("decoder.") else 1) for name, one in first_stage.items()}
    torch.save({"state_dict": {FIRST_STAGE_PREFIX + name: one.half() for name, one in sharper.items()}},
               tmp_path / "sharper.ckpt")  # fmt: skip
    make_bundle(files / "drive", tmp_path / "x", "--decoder", str(tmp_path / "sharper.ckpt"))
    assert "note: the temporal decoder was left out: it was trained with the decoder that" in capsys.readouterr().out
    assert ClipGenerator(tmp_path / "x").temporal_decoder is None


def test_other_layers_over_time_for_the_network_leave_it_where_it_is(files, tmp_path):
    motion = tmp_path / "motion.safetensors"
    convert.main(["--in", str(files / "last.ckpt"), "--out", str(motion), "--format", "temporal"])
    words = ["--in", str(motion), "--base", str(files / "drive"), "--format", "full", "--out", str(tmp_path / "x.ckpt")]
    convert.main(words)
    assert ClipGenerator(tmp_path / "x.ckpt").temporal_decoder is not None


def test_it_belongs_to_a_bundle_and_diffusers_has_no_place_for_it(files, tmp_path):
    with pytest.raises(UserError, match="--temporal-decoder: belongs to --format bundle, found --format full"):
        convert.main(
            ["--in", str(files / "last.ckpt"), "--out", str(tmp_path / "x.ckpt"), "--format", "full",
             "--temporal-decoder", str(files / "decoder.ckpt")]
        )  # fmt: skip
    notes = write_diffusers(read_checkpoint(files / "drive"), tmp_path / "diffusers")
    assert "the temporal decoder was left out: diffusers has no place for it" in notes
