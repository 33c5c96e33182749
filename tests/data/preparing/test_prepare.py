"""`scripts/prepare.py` end to end on drawn footage: what is kept, what is dropped and why, and going on after a kill.

Stand-ins take the place of the encoders: a mean over 8x8 pixels, a hash of the caption.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm import checkpoint
from ldm.data.preparing import sources
from ldm.data.preparing.footage import FootageError, read_frames
from ldm.data.shards import DatasetError, PreparedSet
from ldm.data.shards.writer import ShardWriter
from ldm.errors import UserError, run_command
from ldm.video import from_uint8, write_mp4
from tests.made_footage import draw_drive, write_audio, write_drive, write_numbered, write_truncated

ROOT = Path(__file__).parents[3]
CONFIG = """
model:
  params:
    cond_stage_config: {params: {max_length: 6}}
prepare: {fps: 10, size: 64}
"""


def load_script():
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "scripts" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare"] = module
    spec.loader.exec_module(module)
    return module


prepare = load_script()


class MeanFirstStage(nn.Module):
    """Latents are the mean colour of 8x8 pixels (and grey), all of variance e^-5."""

    def encode(self, pixels):
        colour = nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([colour, colour.mean(1, keepdim=True), torch.full_like(colour, -5), -5 + 0 * colour[:, :1]], 1)

    def decode(self, latents):
        return nn.functional.interpolate(latents[:, :3], scale_factor=8)


class HashTextEncoder(nn.Module):
    """A caption is a random table that depends on its words; it holds six of them."""

    def encode(self, prompts):
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        return torch.stack([torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def truncated(self, prompt):
        return " ".join(prompt.split()[6:]) or None


def stand_in(patch, weight: float = 1.0) -> list[str]:
    """Replace the encoders; returns a list that grows by one whenever they are built."""
    built = []
    tensors = {"first_stage_model.w": torch.tensor([weight]), "cond_stage_model.transformer.w": torch.ones(1)}
    patch.setattr(checkpoint, "encoder_tensors", lambda config: tensors)
    encoders = (MeanFirstStage(), HashTextEncoder())
    patch.setattr(checkpoint, "load_encoders", lambda config: built.append("x") or encoders)
    patch.setattr(checkpoint, "latent_scale", lambda config: 0.5)
    patch.setattr(prepare, "check", lambda config: None)
    return built


@pytest.fixture
def encoders(monkeypatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "400")
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    """Two videos: one of three scenes, 31 + 24 + 40 frames at 25 a second, and one of a single scene."""
    folder = tmp_path_factory.mktemp("footage")
    scenes = [draw_drive(length, 128, seed) for length, seed in [(31, 1), (24, 2), (40, 5)]]
    write_mp4(folder / "b_cuts.mp4", np.concatenate(scenes), fps=25)
    (folder / "more").mkdir()
    write_drive(folder / "more" / "a_drive.mp4", num_frames=30, size=128, seed=3)
    return folder


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def run(footage, out, config, *more) -> None:
    prepare.main([str(footage), "--out", str(out), "--config", str(config), *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_scenes_are_stored_as_the_encoders_see_them(footage, tmp_path, config, encoders, capsys):
    run(footage, tmp_path / "out", config, "--prompt", "a drive")
    prepared = PreparedSet(tmp_path / "out", verify=True)
    assert [(scene.source, scene.start, scene.num_frames) for scene in prepared.scenes] == [
        ("b_cuts.mp4", 0, 13), ("b_cuts.mp4", 13, 9), ("b_cuts.mp4", 22, 16), ("more/a_drive.mp4", 0, 12),
    ]  # fmt: skip
    frames = list(read_frames(footage / "b_cuts.mp4", 10, 64))[13:22]
    expected = MeanFirstStage().encode(from_uint8(frames)).half().numpy()
    assert np.array_equal(prepared.read_moments(prepared.scenes[1]), expected)
    for context, caption in [(prepared.read_context(prepared.scenes[0])[0], "a drive"), (prepared.empty_context, "")]:
        assert np.array_equal(context, HashTextEncoder().encode([caption])[0].half().numpy())
    info = prepared.info
    assert (info.size, info.fps, info.scale_factor, info.num_tokens) == ([64, 64], 10.0, 0.5, 6)
    assert info.first_stage == checkpoint.identity({"w": torch.ones(1)})
    output = capsys.readouterr().out
    assert "Videos: 2 prepared, 0 done before, 0 dropped." in output
    assert "scenes: 4, videos: 2, frames: 50, 5 s at 10 frames a second, 64x64 pixels" in output


def test_a_second_run_skips_what_is_done_without_building_an_encoder(footage, tmp_path, config, encoders, capsys):
    run(footage, tmp_path / "out", config, "--prompt", "a drive")
    before = contents(tmp_path / "out")
    run(footage, tmp_path / "out", config, "--prompt", "a drive")
    assert len(encoders) == 1
    assert contents(tmp_path / "out") == before
    output = capsys.readouterr().out
    assert "Videos: 0 prepared, 2 done before" in output
    assert output.count("b_cuts.mp4") >= 2  # the table lists them again


def test_flags_win_over_the_config_and_overrides_reach_it(footage, tmp_path, config, encoders):
    run(footage, tmp_path / "a", config, "--prompt", "x", "--fps", "5", "--size", "64x128")
    run(footage, tmp_path / "b", config, "prepare.fps=5", "--prompt", "x", "prepare.size=64x128")
    assert PreparedSet(tmp_path / "a").info.size == [64, 128]
    assert PreparedSet(tmp_path / "a").info.fps == 5
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_long_scenes_are_stored_in_pieces(footage, tmp_path, config, encoders, monkeypatch):
    run(footage, tmp_path / "whole", config, "--prompt", "x")
    monkeypatch.setattr(sources, "MAX_SCENE_FRAMES", 6)
    monkeypatch.setattr(sources, "CHUNK_PIXELS", 4 * 64 * 64)
    run(footage, tmp_path / "pieces", config, "--prompt", "x")
    whole, pieces = PreparedSet(tmp_path / "whole"), PreparedSet(tmp_path / "pieces")
    assert [(scene.start, scene.num_frames) for scene in pieces.scenes[:3]] == [(0, 4), (4, 4), (8, 5)]
    joined = np.concatenate([pieces.read_moments(scene) for scene in pieces.scenes[:3]])
    assert np.array_equal(joined, whole.read_moments(whole.scenes[0]))


def test_a_folder_of_good_and_bad_goes_on_and_says_why(footage, tmp_path, config, encoders, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("good.mp4", "same.mp4"):
        (folder / name).write_bytes((footage / "more" / "a_drive.mp4").read_bytes())
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video at all\n" * 9)
    write_audio(folder / "audio.mp4")
    write_truncated(folder / "truncated.mp4")
    write_numbered(folder / "one.mp4", 1, "25")
    write_numbered(folder / "slow.mp4", 20, "5")
    write_mp4(folder / "tiny.mp4", np.zeros((9, 4, 4, 3), np.uint8), fps=10)
    run(folder, tmp_path / "out", config, "--prompt", "x")
    assert {scene.source for scene in PreparedSet(tmp_path / "out").scenes} == {"good.mp4"}
    lines = capsys.readouterr().out.splitlines()
    for name, reason in {
        "same.mp4": "the same bytes as good.mp4",
        "empty.mp4": "the file is empty",
        "text.mp4": "expected a video, found 171 bytes that ffmpeg cannot read",
        "audio.mp4": "found only audio",
        "truncated.mp4": "corrupted or truncated",
        "one.mp4": "found a single frame",
        "slow.mp4": "10 frames a second were asked for, the footage has 5",
        "tiny.mp4": "4x4 pixels are too few",
    }.items():
        assert any(name in line and reason in line for line in lines), (name, reason)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.touch(), "the file is empty"),
        (write_truncated, "corrupted or truncated"),
        (write_audio, "found only audio"),
        (lambda path: write_numbered(path, 1, "25"), "a single frame"),
        (lambda path: write_mp4(path, np.zeros((9, 4, 4, 3), np.uint8), 10), "4x4 pixels are too few"),
        (lambda path: path.write_text("text " * 99), "ffmpeg cannot read"),
    ],
)
def test_nothing_kept_is_a_failure_with_the_reason(tmp_path, config, encoders, capsys, make, reason):
    make(tmp_path / "bad.mp4")
    out = tmp_path / "out"
    assert run_command(lambda: run(tmp_path / "bad.mp4", out, config, "--prompt", "x")) == 1
    streams = capsys.readouterr()
    assert reason in streams.out
    assert "error: no scene was kept; the table above gives the reasons" in streams.err
    assert contents(out) == {}
    write_drive(tmp_path / "good.mp4", num_frames=20, size=64)
    run(tmp_path / "good.mp4", out, config, "--prompt", "x", "--fps", "5")  # the folder is not spent


def test_stretches_that_are_too_short_are_listed(tmp_path, config, encoders, capsys):
    parts = [draw_drive(30, 64, 1), 255 - draw_drive(2, 64, 2) // 2, draw_drive(30, 64, 3)]
    write_mp4(tmp_path / "flash.mp4", np.concatenate(parts), fps=25)
    run(tmp_path / "flash.mp4", tmp_path / "out", config, "--prompt", "x")
    assert "frames 12-12: a single frame between two cuts" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "videos.jsonl").read_text())
    assert report["dropped"] == [{"start": 12, "stop": 13, "reason": "a single frame between two cuts"}]
    assert sum(scene.num_frames for scene in PreparedSet(tmp_path / "out").scenes) == report["num_frames"] == 24


def test_values_that_are_no_numbers_are_dropped(footage, tmp_path, config, encoders, monkeypatch, capsys):
    monkeypatch.setattr(MeanFirstStage, "decode", None)
    encode = MeanFirstStage.encode
    monkeypatch.setattr(MeanFirstStage, "encode", lambda self, pixels: encode(self, pixels) * 1e6)
    with pytest.raises(UserError, match="no scene was kept"):
        run(footage, tmp_path / "out", config, "--prompt", "x")
    assert "the autoencoder returned infinite values or NaN" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["500", "64x100", "32"])
def test_sizes_must_be_multiples_of_64(footage, tmp_path, config, encoders, size):
    nearest = {"500": "512x512", "64x100": "64x128", "32": "64x64"}[size]
    with pytest.raises(UserError, match=f"--size: expected multiples of 64, found {size}; the nearest is {nearest}"):
        run(footage, tmp_path / "out", config, "--prompt", "x", "--size", size)
    assert not (tmp_path / "out").exists()


def test_senseless_arguments(footage, tmp_path, config, encoders):
    for arguments, message in [
        (["--size", "big"], "--size: expected a number of pixels or HEIGHTxWIDTH, found 'big'"),
        (["--fps", "0"], "--fps: expected frames per second above 0, found 0"),
        (["--fps", "-3"], "--fps: expected frames per second above 0, found -3"),
        (["--fps", "ten"], r"argument --fps: invalid float value: 'ten'; --help lists all options"),
        (["prepare.sise=64"], r"prepare.sise: expected the keys fps and size"),
    ]:
        with pytest.raises(UserError, match=message):
            run(footage, tmp_path / "out", config, "--prompt", "x", *arguments)
    with pytest.raises(UserError, match="--prompt: expected a caption, found only spaces"):
        run(footage, tmp_path / "out", config, "--prompt", " ")
    with pytest.raises(FootageError, match="nowhere: there is no such file or folder"):
        run(tmp_path / "nowhere", tmp_path / "out", config, "--prompt", "x")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FootageError, match="nothing: expected a folder with videos"):
        run(tmp_path / "nothing", tmp_path / "out", config, "--prompt", "x")
    assert not (tmp_path / "out").exists()


def test_captions_from_a_text_file_beside_the_video(footage, tmp_path, config, encoders, capsys):
    (tmp_path / "v").mkdir()
    for seed, name in enumerate(("one.mp4", "two.mp4")):
        write_drive(tmp_path / "v" / name, num_frames=20, size=64, seed=seed)
    (tmp_path / "v" / "one.txt").write_text("a road\n\n  two   lanes \na road\n")
    run(tmp_path / "v", tmp_path / "out", config)
    prepared = PreparedSet(tmp_path / "out")
    assert [(scene.source, scene.captions) for scene in prepared.scenes] == [("one.mp4", ["a road", "two lanes"])]
    assert np.array_equal(prepared.read_context(prepared.scenes[0])[1],
                          HashTextEncoder().encode(["two lanes"])[0].half().numpy())  # fmt: skip
    assert "no caption: give one to all videos (--prompt TEXT), put a text file" in capsys.readouterr().out


def test_no_caption_anywhere_names_the_three_ways(footage, tmp_path, config, encoders):
    with pytest.raises(UserError, match=r"none of the 2 videos has a caption: .*--prompt.*drive.txt.*--captions FILE"):
        run(footage, tmp_path / "out", config)
    assert encoders == []


def test_captions_from_a_table(footage, tmp_path, config, encoders, capsys):
    table = tmp_path / "captions.csv"
    rows = ["\ufefffile,caption", 'b_cuts.mp4,"three roads, cut"', "more/a_drive.mp4,one", "a_drive.mp4,no", "z.mp4,-"]
    table.write_text("\n".join(rows))
    run(footage, tmp_path / "out", config, "--captions", str(table))
    found = {scene.source: scene.captions for scene in PreparedSet(tmp_path / "out").scenes}
    assert found == {"b_cuts.mp4": ["three roads, cut"], "more/a_drive.mp4": ["one"]}
    assert "names files that were not given: a_drive.mp4, z.mp4" in capsys.readouterr().out


def test_a_caption_of_500_words_says_what_was_cut(footage, tmp_path, config, encoders, capsys):
    caption = " ".join(f"word{number}" for number in range(500))
    run(footage / "more", tmp_path / "out", config, "--prompt", caption)
    output = " ".join(capsys.readouterr().out.split())
    assert "warning: the caption 'word0 word1" in output
    assert "(500 words) is too long for the text encoder; this was cut: 'word6 word7" in output
    assert "word499'" in output
    assert PreparedSet(tmp_path / "out").scenes[0].captions == [caption]


def test_other_encoders_settings_or_captions_never_mix(footage, tmp_path, config, encoders, monkeypatch):
    out = tmp_path / "out"
    run(footage, out, config, "--prompt", "x")
    before = contents(out)
    with pytest.raises(DatasetError, match=r"other settings \(fps was 10.0, now 5.0\), .* choose a fresh --out"):
        run(footage, out, config, "--prompt", "x", "--fps", "5")
    with pytest.raises(DatasetError, match=r"was prepared with the captions \['x'\], now they are \['y'\]"):
        run(footage, out, config, "--prompt", "y")
    stand_in(monkeypatch, weight=2.0)
    with pytest.raises(DatasetError, match=r"other settings \(first_stage was \w{16}, now \w{16}\)"):
        run(footage, out, config, "--prompt", "x")
    (out / ".unfinished" / "lock").unlink(missing_ok=True)
    assert {name: found for name, found in contents(out).items() if ".unfinished" not in name} == before


def test_preview_shows_the_stored_clips(footage, tmp_path, config, encoders):
    run(footage, tmp_path / "out", config, "--prompt", "a drive", "--preview")
    sheet = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    assert sheet.shape == (4 * (20 + 64 + 4) + 4, 5 * 68 + 4, 3)
    frame = list(read_frames(footage / "b_cuts.mp4", 10, 64))[12]  # the last of the first scene
    shown = sheet[24:88, 4 * 68 + 4 : 4 * 68 + 68].astype(float)
    assert np.abs(shown.reshape(8, 8, 8, 8, 3).mean((1, 3)) - frame.reshape(8, 8, 8, 8, 3).mean((1, 3))).max() < 2
    built = len(encoders)
    run(footage, tmp_path / "out", config, "--prompt", "a drive", "--preview")  # of a finished folder
    assert len(encoders) == built + 1


def test_a_full_disk_leaves_what_was_there(footage, tmp_path, config, encoders, monkeypatch, capsys):
    out = tmp_path / "out"
    run(footage / "more", out, config, "--prompt", "x")
    before = contents(out)

    def full(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "shard")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", full)
        assert run_command(lambda: run(footage, out, config, "--prompt", "x")) == 1
    assert "error: the disk is full while writing shard" in capsys.readouterr().err
    assert {name: found for name, found in contents(out).items() if ".unfinished" not in name} == before
    run(footage / "b_cuts.mp4", out, config, "--prompt", "x")
    assert len(PreparedSet(out, verify=True).scenes) == 4


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import pytest
from tests.data.preparing import test_prepare
patch = pytest.MonkeyPatch()
test_prepare.stand_in(patch)
test_prepare.sources.CHUNK_PIXELS = 4 * 64 * 64
encode, left = test_prepare.MeanFirstStage.encode, [{after}]
def dying(self, pixels):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, pixels)
test_prepare.MeanFirstStage.encode = dying
test_prepare.prepare.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_in_the_second_video_and_repeated_gives_the_same_bytes(footage, tmp_path, config, encoders, monkeypatch):
    arguments = [str(footage), "--out", str(tmp_path / "killed"), "--config", str(config), "--prompt", "x"]
    program = KILLED.format(root=str(ROOT), after=13)
    killed = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "killed" / ".unfinished").glob("*.json"))) == 2  # settings and the first video
    assert list((tmp_path / "killed" / ".unfinished").glob(".*.partial"))  # half of the second
    with pytest.raises(DatasetError, match=r"expected dataset.json in it, found none"):
        PreparedSet(tmp_path / "killed")
    monkeypatch.setattr(sources, "CHUNK_PIXELS", 4 * 64 * 64)
    run(footage, tmp_path / "killed", config, "--prompt", "x")
    run(footage, tmp_path / "straight", config, "--prompt", "x")
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    assert os.listdir(tmp_path / "killed").count(".unfinished") == 0
