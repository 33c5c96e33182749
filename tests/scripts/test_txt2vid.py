"""scripts/txt2vid.py: clips and records from one checkpoint, and identical bytes from a record."""

from __future__ import annotations

import copy
import errno
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.errors import UserError, run_command
from ldm.sampling.settings import ClipSettings
from ldm.video import read_metadata, read_video, write_mp4
from scripts.txt2vid import main
from tests.tiny_checkpoint import CONFIG, config_for, image_state, save_as_public, video_state

ROOT = Path(__file__).parents[2]
QUICK = ["--steps", "2", "--H", "32", "--W", "48"]


def training_config(frames: int = 5) -> dict:
    data = {"target": "ldm.data.clips.ClipDataModule", "params": {"root": "prepared", "frames": frames, "strides": [2]}}
    return {**copy.deepcopy(CONFIG), "data": data, "prepare": {"fps": 8, "size": [32, 48]}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """What a training run leaves: weights of all three networks and the config, in one file."""
    path = tmp_path_factory.mktemp("run") / "logs" / "2026-01-01T00-00-00_tiny" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": video_state(), "config": training_config(), "global_step": 3}, path)
    return path


@pytest.fixture
def run(tmp_path, checkpoint, capsys):
    """`run(*words)` samples into a folder and returns what was printed; the checkpoint is given unless words do."""

    def call(*words: str) -> str:
        files = [] if "--ckpt" in words or "--replay" in words else ["--ckpt", str(checkpoint)]
        main([*words, *files, "--outdir", str(tmp_path), "--device", "cpu"])
        return " ".join(capsys.readouterr().out.split())

    return call


def records(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_a_clip_becomes_four_files_that_agree(run, tmp_path):
    out = run("--prompt", "a road", "--frames", "6", "--steps", "2", "--scale", "3")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"00000.{s}" for s in ("gif", "json", "mp4", "png")]
    frames, fps = read_video(tmp_path / "00000.mp4")
    assert frames.shape == (6, 32, 48, 3) and fps == 4  # 8 a second while preparing, every second one in training
    assert frames.std() > 1
    gif, sheet = Image.open(tmp_path / "00000.gif"), Image.open(tmp_path / "00000.png")
    assert gif.n_frames == 6 and gif.info["duration"] == 250
    assert sheet.width >= 6 * 48 and sheet.height >= 32
    (record,) = records(tmp_path)
    assert record == read_metadata(tmp_path / "00000.mp4")
    assert record["clip"] == {
        "prompt": "a road", "negative_prompt": "", "frames": 6, "height": 32, "width": 48, "fps": 4.0, "steps": 2,
        "sampler": "ddim", "scale": 3.0, "eta": 0.0, "window": 6, "overlap": 2, "known_noise": 0, "interpolate": 1,
        "motion_scale": 1.0,
    }  # fmt: skip
    assert record["seed"] == 42 and len(record["checkpoint"]["sha256"]) == 64
    assert record["versions"]["torch"] == torch.__version__ and "--frames 6" in record["command"]
    assert "windows of 6 frames: trained on 5" in out and "00000.mp4" in out


def test_defaults_are_those_of_the_training(run, tmp_path):
    out = run("--prompt", "a road", "--steps", "1", "--scale", "1")
    clip = records(tmp_path)[0]["clip"]
    assert (clip["frames"], clip["height"], clip["width"], clip["fps"]) == (5, 32, 48, 4.0)
    assert "note" not in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "mp4"])
def test_replay_makes_the_same_bytes(run, tmp_path, kind):
    run("--prompt", "a road", *QUICK, "--n_samples", "2", "--eta", "0.5", "--seed", "7", "--precision", "bf16")
    run("--replay", str(tmp_path / f"00001.{kind}"))
    for suffix in ("mp4", "gif", "png", "json"):
        original, replayed = ((tmp_path / f"{stem}.{suffix}").read_bytes() for stem in ("00001", "00002"))
        assert original == replayed
    assert (tmp_path / "00000.mp4").read_bytes() != (tmp_path / "00001.mp4").read_bytes()


@pytest.mark.slow
def test_seeds_count_on_and_numbers_too(run, tmp_path):
    run("--prompt", "a road", *QUICK, "--frames", "1", "--n_samples", "2", "--n_iter", "2", "--seed", "10")
    run("--prompt", "a road", *QUICK, "--frames", "1", "--seed", "11")
    assert [record["seed"] for record in records(tmp_path)] == [10, 11, 12, 13, 11]
    (tmp_path / "00001.mp4").unlink()
    run("--prompt", "a road", *QUICK, "--frames", "1")
    assert (tmp_path / "00005.mp4").exists() and not (tmp_path / "00001.mp4").exists()


def test_prompt_file_has_options_on_each_line(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "# a comment\n\na dog's life -- in snow --seed 3 --frames 2\n"
        "a road --sampler dpm++ --negative-prompt 'rain, fog' --scale 2\n"
    )
    run("--from-file", str(prompts), *QUICK, "--frames", "1", "--seed", "9")
    first, second = records(tmp_path)
    assert (first["clip"]["prompt"], first["seed"], first["clip"]["frames"]) == ("a dog's life -- in snow", 3, 2)
    assert (second["clip"]["prompt"], second["seed"], second["clip"]["frames"]) == ("a road", 9, 1)
    assert (second["clip"]["sampler"], second["clip"]["negative_prompt"]) == ("dpm++", "rain, fog")


def test_public_image_checkpoint_samples_independent_images(run, tmp_path):
    public, config = tmp_path / "sd.ckpt", tmp_path / "config.yaml"
    save_as_public(image_state(), public)
    torch.save({"state_dict": image_state(), "scale_factor": 0.25}, tmp_path / "scaled.ckpt")
    words = config_for(tmp_path / "scaled.ckpt", scale_factor=None)  # to be measured: the record holds the number
    OmegaConf.save(OmegaConf.create(words), config)
    out = run("--prompt", "a road", "--ckpt", str(public), "--config", str(config), *QUICK, "--frames", "2")
    assert "has no trained temporal layers" in out
    assert records(tmp_path)[0]["config"]["model"]["params"]["scale_factor"] == 0.25
    (tmp_path / "scaled.ckpt").unlink()
    run("--replay", str(tmp_path / "00000.mp4"))  # the config travels in the record
    assert (tmp_path / "00000.mp4").read_bytes() == (tmp_path / "00001.mp4").read_bytes()


def test_the_end_of_a_long_prompt_is_named(run):
    out = run("--prompt", "road " * 75 + "over the hills and far away", *QUICK, "--frames", "1")
    assert "no effect: 'over the hills and far away'" in out


def test_the_newest_run_is_taken_and_named(run, tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parents[3])
    main(["--prompt", "a road", *QUICK, "--frames", "1", "--outdir", str(tmp_path)])
    assert records(tmp_path)[0]["checkpoint"]["path"] == str(checkpoint.relative_to(checkpoint.parents[3]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the arguments --prompt --from-file --replay is required; --help lists all options"),
        (["--prompt", "x", "--frames", "0"], "frames: expected 1 to 10000, found 0"),
        (["--prompt", "x", "--frames", "-1"], "frames: expected 1 to 10000, found -1"),
        (["--prompt", "x", "--frames", "10001"], "frames: expected 1 to 10000, found 10001"),
        (["--prompt", "x", "--frames", "six"], "--frames: invalid int value: 'six'"),
        (["--prompt", "x", "--H", "30"], "height: expected a multiple of 4 pixels, found 30; the nearest is 32"),
        (["--prompt", "x", "--sampler", "dmp++"], r"found 'dmp\+\+'; did you mean 'dpm\+\+'"),
        (["--prompt", "x", "--H", "40000"], "height: expected at most 4096 pixels, found 40000"),
        (["--prompt", "x", "--steps", "0"], "steps: expected 1 to 999, found 0"),
        (["--prompt", "x", "--steps", "1001"], "steps: expected 1 to 999, found 1001"),
        (["--prompt", "x", "--sampler", "plms", "--eta", "1"], "only the sampler ddim adds noise"),
        (["--prompt", "x", "--fps", "0"], "fps: expected more than 0"),
        (["--prompt", "x", "--n_samples", "0"], "--n_samples: expected at least 1, found 0"),
        (["--prompt", "x", "--seed", "-1"], "--seed: expected a whole number from 0"),
        (["--prompt", "x", "--decode-chunk", "0"], "--decode-chunk: expected at least 1 frame"),
        (["--prompt", "x", "--step", "3"], "unrecognized arguments: --step 3"),
        (["--prompt", "x", "--ckpt", "nowhere.ckpt"], "nowhere.ckpt: expected a checkpoint"),
        (["--prompt", "x", "--config", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["--from-file", "nowhere.txt"], "nowhere.txt: expected a text file with one prompt a line"),
        (["--replay", "nowhere.json"], "nowhere.json: there is no such file"),
        (["--replay", "nowhere.mp4"], "nowhere.mp4: there is no such file"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(run, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(*words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one prompt a line, found none"),
        ("a road\n--frames 3\n", "line 2: expected a prompt before the options"),
        ("a road --frame 3\n", "line 1: unrecognized arguments: --frame 3"),
        ("a road --ckpt x\n", "line 1: unrecognized arguments: --ckpt x"),
        ("a road --negative-prompt 'rain\n", r"line 1: the options do not parse \(No closing quotation\): .--neg"),
        (b"\xff\xfe\x00", "expected a text file in UTF-8"),
    ],
)
def test_bad_prompt_files_are_refused_with_the_line(run, tmp_path, text, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        run("--from-file", str(path))


def test_replay_refuses_another_checkpoint_and_other_settings(run, tmp_path, checkpoint):
    run("--prompt", "a road", *QUICK, "--frames", "1")
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": video_state(), "config": training_config(frames=6)}, other)
    expected = records(tmp_path)[0]["checkpoint"]["sha256"]
    with pytest.raises(UserError, match=rf"sha256 {expected}.*found sha256 [0-9a-f]{{64}}"):
        run("--replay", str(tmp_path / "00000.json"), "--ckpt", str(other))
    with pytest.raises(UserError, match=r"--steps: expected no setting of the clip with --replay"):
        run("--replay", str(tmp_path / "00000.json"), "--steps", "3")


@pytest.mark.parametrize("text", ["no json", "[]", '{"clip": {}}'])
def test_replay_of_another_file_is_an_error(run, tmp_path, text):
    path = tmp_path / "clip.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"clip.json: expected the (JSON|record) of a clip"):
        run("--replay", str(path))


def test_replay_notes_why_bytes_may_differ(run, tmp_path):
    run("--prompt", "a road", *QUICK, "--frames", "1")
    record = records(tmp_path)[0]
    record["versions"]["torch"] = "1.0"
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert "note: made with torch 1.0, replayed with" in run("--replay", str(tmp_path / "old.json"))


def evil(place: str, folder: Path) -> dict:
    """A config that would write a file in `folder` if it were built."""
    config = training_config()
    config["model"]["params"][place] = {"target": "subprocess.Popen", "params": {"args": ["touch", str(folder / "x")]}}
    return config


@pytest.mark.parametrize("place", ["unet_config", "first_stage_config", "cond_stage_config"])
def test_untrusted_checkpoint_and_record_run_nothing(run, tmp_path, place):
    torch.save({"state_dict": video_state(), "config": evil(place, tmp_path)}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=rf"evil.ckpt, model.params.{place}.target: expected ldm"):
        run("--prompt", "a road", *QUICK, "--ckpt", str(tmp_path / "evil.ckpt"))
    run("--prompt", "a road", *QUICK, "--frames", "1")
    record = records(tmp_path)[0]
    record["config"] = evil(place, tmp_path)
    (tmp_path / "bad.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"bad.json, model.params.{place}.target: expected ldm"):
        run("--replay", str(tmp_path / "bad.json"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("clip.mood", "dark", "clip: expected the keys prompt, .*, not mood"),
        ("clip.frames", "two", "clip.frames: expected a whole number, found 'two'"),
        ("clip.prompt", None, "clip.prompt: expected a string, found None"),
        ("checkpoint", "last.ckpt", "checkpoint: expected a mapping, found 'last.ckpt'"),
        ("checkpoint.sha256", 5, "checkpoint.sha256: expected a string, found 5"),
        ("batch.index", 4, "batch.index: expected an index of the seeds, found 4"),
        ("batch.seeds", [2**64], r"batch.seeds: expected whole numbers from 0 to 2\^63"),
        ("seed", 41, "seed: expected the seed at batch.index, found 41"),
        ("precision", "fp8", "precision: expected one of full, bf16, fp16, found 'fp8'"),
        ("decode_chunk", 0, "decode_chunk: expected at least 1, found 0"),
        ("machine.threads", 0, "machine.threads: expected 1 to 4096, found 0"),
        ("machine.device", "meta: x", "--device: expected cpu or a device this machine has, found 'meta'"),
        ("versions", {"torch": 2}, "versions: expected a mapping, each value a string"),
        ("config", [], r"config: expected a mapping or null, found \[\]"),
        ("more", 1, "record: expected the keys .*, not more"),
    ],
)
def test_replay_refuses_a_malformed_record(tmp_path, checkpoint, place, value, message):
    record = json.loads(json.dumps(a_record(checkpoint)))
    part, _, word = place.rpartition(".")
    (record[part] if part else record)[word] = value
    (tmp_path / "clip.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        main(["--replay", str(tmp_path / "clip.json")])


def a_record(checkpoint: Path) -> dict:
    return {
        "clip": asdict(ClipSettings("a road", frames=1, height=32, width=48, fps=4)), "seed": 42,
        "batch": {"seeds": [42], "index": 0}, "checkpoint": {"path": str(checkpoint), "sha256": "0" * 64},
        "config": None, "precision": "full", "decode_chunk": 4, "machine": {"device": "cpu: x", "threads": 1},
        "versions": {}, "command": "",
    }  # fmt: skip


def test_settings_beside_replay_are_an_error(tmp_path, checkpoint):
    (tmp_path / "clip.json").write_text(json.dumps(a_record(checkpoint)))
    for word, value in (("decode-chunk", "7"), ("precision", "bf16"), ("config", "x.yaml"), ("frames", "2")):
        with pytest.raises(
            UserError, match=f"--{word}: expected no setting of the clip .*use only --ckpt, .* --temporal-decoder"
        ):
            main(["--replay", str(tmp_path / "clip.json"), f"--{word}", value])


def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.txt2vid.hash_weights", None)  # not reached
    (tmp_path / "file").touch()
    for outdir in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(UserError, match=rf"--outdir: expected a folder to write to, found {outdir} \(\w"):
            main(["--prompt", "a road", "--ckpt", str(checkpoint), "--device", "cpu", "--outdir", str(outdir)])


def test_a_full_disk_ends_with_a_message_and_leaves_earlier_clips(checkpoint, tmp_path, monkeypatch, capsys):
    def write(path, *values):
        if path.stem == "00001":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_mp4(path, *values)

    monkeypatch.setattr("ldm.sampling.record.write_mp4", write)
    words = ["--prompt", "a road", *QUICK, "--frames", "1", "--n_iter", "3", "--ckpt", str(checkpoint)]
    assert run_command(lambda: main([*words, "--device", "cpu", "--outdir", str(tmp_path)])) == 1
    assert "error: the disk is full while writing" in capsys.readouterr().err
    assert len(read_video(tmp_path / "00000.mp4")[0]) == 1 and len(records(tmp_path)) == 1


@pytest.mark.slow
def test_a_device_that_is_not_there_is_refused(capsys):
    for name in ("cuda:99", "meta", "cpu:0", "xla", ""):
        with pytest.raises(UserError, match=f"expected cpu or a device this machine has, found '{name}'"):
            main(["--prompt", "a road", "--device", name])


@pytest.mark.slow
def test_as_a_command_it_ends_with_a_message_and_a_status(tmp_path):
    words = [sys.executable, str(ROOT / "scripts" / "txt2vid.py"), "--prompt", "a road", "--ckpt", "nowhere.ckpt"]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert "error: nowhere.ckpt: expected a checkpoint" in found.stderr and not list(tmp_path.iterdir())
