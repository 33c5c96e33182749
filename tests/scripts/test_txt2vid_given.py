"""scripts/txt2vid.py with given frames, stages and windows: every use, with small networks."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import full_state_dict, read_checkpoint
from ldm.checkpoint.writing import write_temporal
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.modules.encoders import CLIPTextEmbedder, KLFirstStage
from ldm.modules.tokenizer import find_tokenizer
from ldm.modules.unet import UNetModel
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.given_frames import start_from_picture
from ldm.sampling.options import clip_parser, parse_arguments
from ldm.sampling.record import hash_given
from ldm.sampling.request import read_request
from ldm.sampling.settings import ClipSettings, GivenFiles
from ldm.video import read_video, write_mp4
from scripts.txt2vid import main
from tests.conftest import fill_by_rule
from tests.made_footage import draw_drive
from tests.tiny_checkpoint import CONFIG, DDCONFIG, TEXT, UNET, image_state, video_state

TOLD = {"in_channels": 9, "fps_embedding": True, "known_level_embedding": True}
CLIPS = {
    "data": {"target": "ldm.data.clips.ClipDataModule", "params": {"root": "x", "frames": 5, "strides": [1, 4]}},
    "prepare": {"fps": 8, "size": [16, 24]},
}


def config_of(words: dict, **params) -> dict:
    config = copy.deepcopy(CONFIG) | copy.deepcopy(CLIPS)
    config["model"]["params"] |= params
    config["model"]["params"]["unet_config"]["params"] = UNET | words
    return config


def save_told(path: Path, words: dict = TOLD, **params) -> Path:
    """A checkpoint of a network that is told known frames, their noise and the rate; of 5 frames, at 2 or 8 fps."""
    state = full_state_dict(
        UNetModel(**UNET | words), KLFirstStage(DDCONFIG, 4), CLIPTextEmbedder(TEXT, random_seed=3), NoiseSchedule()
    )
    ruled = {name: value.shape for name, value in state.items() if name.startswith(("model.", "first_"))}
    torch.save({"state_dict": state | fill_by_rule(ruled), "config": config_of(words, **params)}, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """told.ckpt and plain.ckpt (4 channels), road.png, slow.mp4 (3 frames, 2 a second), drive.mp4 (9, 8 a second)."""
    place = tmp_path_factory.mktemp("given")
    save_told(place / "told.ckpt", known_frames={"mixture": {"first": 1}, "max_noise": 300})
    torch.save({"state_dict": video_state(), "config": config_of({})}, place / "plain.ckpt")
    drive = draw_drive(9, 32, seed=0)
    write_mp4(place / "drive.mp4", drive, 8)
    write_mp4(place / "slow.mp4", drive[:3], 2)
    Image.fromarray(drive[0]).save(place / "road.png")
    mask = np.zeros((16, 24), np.uint8)
    mask[8:] = 255
    Image.fromarray(mask).save(place / "mask.png")
    return place


@pytest.fixture(scope="module")
def read_once():
    """Files and vocabulary that are read by many tests."""
    return functools.cache(read_checkpoint), functools.cache(find_tokenizer)


@pytest.fixture
def run(tmp_path, place, capsys, monkeypatch, read_once):
    """`run(*words)` samples with told.ckpt, unless words say otherwise, and returns what was printed."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("scripts.txt2vid.read_checkpoint", read_once[0])
    monkeypatch.setattr("ldm.modules.encoders.find_tokenizer", read_once[1])

    def call(*words: str) -> str:
        weights = [] if {"--ckpt", "--base", "--temporal", "--replay"} & set(words) else ["--ckpt", "told.ckpt"]
        if "--replay" not in words:
            weights += ["--steps", "1", "--scale", "1"]
        if not {"--prompt", "--replay", "--from-file"} & set(words):
            weights += ["--prompt", "a road"]
        main([*words, *weights, "--outdir", str(tmp_path), "--device", "cpu"])
        return " ".join(capsys.readouterr().out.split())

    return call


def last_record(folder: Path) -> dict:
    return json.loads(max(folder.glob("*.json")).read_text())


# Options, number of frames that come of them, and what is printed.
WAYS = [
    ("", 5, "plan: frames: 5 frames at 8 fps in 1 window"),
    ("--frames 13", 13, "plan: keyframes: 4 frames at 2 fps in 1 window in between: 4 -> 13 frames"),
    ("--init-image road.png", 5, "note: road.png: cropped from 32x32 to the central 32x21 pixels"),
    ("--interpolate 4 slow.mp4", 9, "plan: in between: 3 -> 9 frames at 8 fps in 1 window"),
    ("--init-video drive.mp4 --frames 11", 11, "in between: 3 -> 11 frames at 8 fps"),
    ("--init-image road.png --mask mask.png --fps 4", 5, "plan: frames: 5 frames at 4 fps"),
    ("--init-video drive.mp4 --mask mask.png --frames 4", 4, "plan: frames: 4 frames at 8 fps"),
    ("--frames 7 --window 4 --known-noise 9 --overlap 1", 7, "note: windows of 4 frames: trained on 5"),
]


@pytest.mark.slow
def test_every_use_and_its_replay(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a road {options}\n" for options, _, _ in WAYS))
    out = run("--from-file", str(prompts))
    for number, (_, num_frames, said) in enumerate(WAYS):
        assert said in out
        assert len(read_video(tmp_path / f"{number:05}.mp4")[0]) == num_frames
        assert json.loads((tmp_path / f"{number:05}.json").read_text())["clip"]["frames"] == num_frames
    for number in (3, 4, 5):
        run("--replay", str(tmp_path / f"{number:05}.mp4"))
        for suffix in ("mp4", "gif", "png", "json"):
            again = max(tmp_path.glob(f"*.{suffix}"))
            assert again.read_bytes() == (tmp_path / f"{number:05}.{suffix}").read_bytes()


def test_networks_without_such_channels_make_long_clips_in_overlapping_windows(run, tmp_path):
    out = run("--ckpt", "plain.ckpt", "--frames", "11")
    assert "plan: 11 frames at 8 fps in 3 overlapping windows of 5" in out and "note" not in out
    assert len(read_video(tmp_path / "00000.mp4")[0]) == 11


@pytest.mark.slow
def test_given_frames_come_back_bit_for_bit_and_steer_the_rest(place):
    generator = ClipGenerator(place / "told.ckpt")
    generator.read_prompts(["a road", ""])
    made = {}
    for name, words in {
        "text": {}, "first": {"init_image": place / "road.png"}, "ends": {"interpolate": ("4", place / "slow.mp4")},
        "continued": {"init_video": place / "drive.mp4"},
        "part": {"init_image": place / "road.png", "mask": place / "mask.png"},
    }.items():  # fmt: skip
        length = {} if name == "ends" else {"frames": 9}
        request = read_request({"prompt": "a road", "steps": 2, **length, **words}, generator)
        made[name] = generator.make_latents(request.settings, [1, 2], request.given)
        assert made[name].shape == (2, 9, 4, 8, 12)
        if request.given is not None:
            known = generator.encode(request.given)
            is_known = (known.mask == 0).expand(2, -1, 4, -1, -1)
            assert is_known.float().mean() > 0.05
            assert torch.equal(made[name][is_known], known.latents.expand(2, -1, -1, -1, -1)[is_known])
            assert not torch.equal(made[name][~is_known], made["text"][~is_known])
        assert not torch.equal(made[name][0], made[name][1])


@pytest.mark.slow
def test_the_frame_rate_is_told_and_a_schedule_of_one_prompt_is_that_prompt(place):
    generator = ClipGenerator(place / "told.ckpt")
    generator.read_prompts(["a road", "a house", ""])
    latents = {}
    for name, words in {
        "plain": {}, "slow": {"fps": 2.0}, "same": {"prompt": "0: a road | 3: a road"},
        "changing": {"prompt": "0: a road | 3: a house"}, "other": {"prompt": "a house"},
    }.items():  # fmt: skip
        request = read_request({"prompt": "a road", "frames": 13, "steps": 1, **words}, generator)
        latents[name] = generator.make_latents(request.settings, [1])
    torch.testing.assert_close(latents["same"], latents["plain"], rtol=1e-4, atol=1e-4)
    for name in ("slow", "changing", "other"):
        assert (latents[name] - latents["plain"]).abs().max() > 1e-3
    assert not torch.equal(latents["changing"], latents["other"])


def test_schedule_target_and_noise_are_those_of_the_training(tmp_path, run):
    words = {"parameterization": "v", "zero_terminal_snr": True, "noise": {"kind": "mixed", "share": 0.5}}
    generator = ClipGenerator(save_told(tmp_path / "v.ckpt", **words))
    assert generator.schedule.parameterization == "v" and generator.schedule.zero_terminal_snr
    assert generator.schedule.alphas_cumprod[-1] == 0
    assert (generator.noise.kind, generator.noise.share) == ("mixed", 0.5)
    with pytest.raises(
        UserError, match=r"sampler: expected one that can start from pure noise.*found plms; use one of"
    ):
        run("--ckpt", str(tmp_path / "v.ckpt"), "--sampler", "plms")
    run("--ckpt", str(tmp_path / "v.ckpt"), "--eta", "0.5")


@pytest.mark.slow
def test_records_from_before_there_were_given_frames_still_replay(run, tmp_path):
    run("--ckpt", "plain.ckpt", "--frames", "12", "--window", "12")
    record = last_record(tmp_path)
    for word in ("window", "overlap", "known_noise", "interpolate"):
        del record["clip"][word]
    del record["given"], record["temporal"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert "12 frames at 8 fps in one window" in run("--replay", str(tmp_path / "old.json"))
    for suffix in ("gif", "png"):
        assert (tmp_path / f"00000.{suffix}").read_bytes() == (tmp_path / f"00001.{suffix}").read_bytes()


@pytest.mark.slow
def test_temporal_layers_are_put_into_any_base(run, tmp_path, place):
    write_temporal(read_checkpoint(place / "told.ckpt"), tmp_path / "motion.safetensors")
    for name, factor in (("base", 1.0), ("other", 1.1)):
        state = {key: factor * tensor for key, tensor in image_state().items()}
        torch.save({"state_dict": state, "config": config_of({})}, tmp_path / f"{name}.ckpt")
    weights = ["--base", str(tmp_path / "base.ckpt"), "--temporal", str(tmp_path / "motion.safetensors")]
    out = run(*weights, "--init-image", "road.png")
    assert "base.ckpt with " in out
    assert last_record(tmp_path)["temporal"]["path"].endswith("motion.safetensors")
    run("--replay", str(tmp_path / "00000.json"))
    sheets = [np.asarray(Image.open(tmp_path / f"{number:05}.png"), np.int16) for number in (0, 1)]
    assert abs(sheets[0] - sheets[1]).max() <= 1  # bytes of a clip differ on processors whose sums are not always alike
    weights[1] = str(tmp_path / "other.ckpt")
    assert "motion.safetensors was trained on other image weights" in run(*weights)
    with pytest.raises(UserError, match=r"other.ckpt: expected the checkpoint of the clip.*--base and --temporal"):
        run("--replay", str(tmp_path / "00000.json"), "--base", str(tmp_path / "other.ckpt"))
    with pytest.raises(UserError, match="--ckpt: expected none with --base and --temporal"):
        run(*weights, "--ckpt", "told.ckpt")
    for word, missing in (("--base", "--temporal"), ("--temporal", "--base")):
        with pytest.raises(UserError, match=f"{word}: expected {missing} with it, found none"):
            run(word, "told.ckpt")


def test_notes_on_unusual_settings(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a road --fps 20\na road --known-noise 400\n0: a | 3 b\n")
    out = run("--from-file", str(tmp_path / "prompts.txt"))
    assert "note: 20 frames a second: trained on 2 to 8; motion may be wrong at other rates" in out
    assert "note: noise of step 400 on known frames: trained up to step 300" in out
    assert "note: '0: a | 3 b' is read as one plain prompt: '3 b' does not begin with a frame" in out


def test_the_uses_shown_by_help_are_understood(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    uses = [line.split("--prompt", 1)[1] for line in text.splitlines() if '--prompt "a forest road"' in line]
    assert len(uses) == 4
    for use in uses:
        words = ["--prompt", "a forest road", *use.replace('"a forest road"', "").split()]
        assert parse_arguments(words).prompt == "a forest road"
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    options = {option for action in clip_parser()._actions for option in action.option_strings}
    assert options <= set(shown)


@pytest.mark.parametrize("words", [["--init-image", "road.png"], ["--init-video", "drive.mp4"],
                                   ["--interpolate", "4", "slow.mp4"]])  # fmt: skip
def test_a_network_without_such_channels_says_which_have_them(run, words):
    message = rf"{words[0]}: expected a network that takes known frames.*trained with model.params.known_frames"
    with pytest.raises(UserError, match=message):
        run("--ckpt", "plain.ckpt", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init-image", "gone.png"], r"gone.png: expected an image, found no such file"),
        (["--init-image", "drive.mp4"], r"drive.mp4: expected an image .*for a video use --init-video"),
        (["--init-image", "road.png", "--frames", "1"], "expected at least one frame to sample, found all 1 given"),
        (["--init-image", "road.png", "--init-video", "drive.mp4"], "expected one source of given frames, found"),
        (["--init-video", "gone.mp4"], r"gone.mp4: there is no such file"),
        (["--init-video", "road.png"], "road.png: expected a video of at least 2 frames at 8"),
        (["--init-video", "slow.mp4"], "8 frames a second were asked for, the footage has 2; ask for at most that"),
        (["--init-video", "slow.mp4", "--fps", "2", "--frames", "9", "--overlap", "4"], "at least 4 frames .*found 3"),
        (["--init-video", "drive.mp4", "--overlap", "5"], r"--frames: expected more than the 5 .*, found 5"),
        (["--init-video", "drive.mp4", "--overlap", "-1"], "overlap: expected at least 1 frame, found -1"),
        (["--interpolate", "1", "slow.mp4"], "--interpolate: expected a factor of 2 to 64 before the v"),
        (["--interpolate", "slow.mp4", "4"], "--interpolate: expected a factor .*found 'slow.mp4'"),
        (["--interpolate", "4", "road.png"], r"road.png: expected a video of at least 2 frames .*found a single"),
        (["--interpolate", "11", "slow.mp4"], "expected a product of factors up to 4, .*use 9 or 12"),
        (["--interpolate", "4", "slow.mp4", "--frames", "9"], "--frames: expected no value with --interpolate"),
        (["--interpolate", "4"], "--interpolate: expected 2 arguments"),
        (["--mask", "mask.png"], "--mask: expected --init-image, --init-video or --interpolate with it"),
        (["--init-image", "road.png", "--mask", "road.png", "--H", "64"], None),
        (["--init-image", "mask.png", "--mask", "road.png"], r"road.png: expected a mask of 24x16 .* found 32x32"),
        (["--known-noise", "1000"], r"expected a diffusion step from 0 \(none\) to 999, found 1000"),
        (["--known-noise", "5", "--ckpt", "plain.ckpt"], "expected a network with known_level_embedding"),
        (["--frames", "13", "--window", "1"], "window: expected at least 2 frames"),
        (["--frames", "13", "--window", "0"], "window: expected at least 2 frames to sample together, found 0"),
        (["--frames", "13", "--overlap", "5"], "overlap: expected 1 to 4 frames"),
        (["--frames", "13", "--overlap", "5", "--ckpt", "plain.ckpt"], "overlap: expected 1 to 4 frames"),
        (["--prompt", "0: a | 5: b"], "prompt schedule: expected frames 0 to 4 of the clip, found 5"),
        (["--prompt", "0: a | 3: b | 2: c"], "prompt schedule: expected increasing frames, found 2 after 3"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_anything_is_written(run, tmp_path, words, message):
    if message is None:  # the mask has the size of the picture, which is not the clip's
        run(*words)
        return
    with pytest.raises(UserError, match=message):
        run(*words)
    assert not list(tmp_path.iterdir())


def test_replay_needs_the_same_given_files(run, tmp_path, place):
    Image.open(place / "road.png").save(tmp_path / "a.png")
    run("--init-image", str(tmp_path / "a.png"))
    replay = ["--replay", str(tmp_path / "00000.json")]
    with pytest.raises(UserError, match="--init-video: expected no setting of the clip with --replay"):
        run(*replay, "--init-video", "drive.mp4")
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(
        UserError, match=r"a.png: expected the --init-image of the clip, sha256 \w{64}, found sha256 \w{64}"
    ):
        run(*replay)
    (tmp_path / "a.png").unlink()
    with pytest.raises(
        UserError, match=r"a.png: expected the --init-image of the clip, found no such file; restore it"
    ):
        run(*replay)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("given", {"sound": {"path": "a", "sha256": "b"}}, "given.sound: expected one of init_image, init_video"),
        ("given", {"mask": {"path": "a"}}, "given.mask: expected path and sha256, found"),
        ("given", {"mask": {"path": "a", "sha256": 3}}, "given.mask.sha256: expected a string, found 3"),
        ("given", None, "given: expected a mapping, found None"),
        ("temporal", {"path": "a"}, "temporal: expected path and sha256"),
        ("clip", {"window": 0}, "window: expected at least 2 frames to sample together, found 0"),
        ("clip", {"overlap": -3}, "overlap: expected at least 1 frame, found -3"),
        ("clip", {"window": "all"}, "clip.window: expected a whole number or null"),
        ("clip", {"interpolate": 8}, "clip.frames: expected 17 to match slow.mp4, found 9"),
        ("clip", {"interpolate": 900}, "--interpolate: expected a factor of 2 to 64, found 900"),
    ],
)
def test_replay_refuses_a_malformed_record(run, tmp_path, place, part, value, message):
    clip = ClipSettings("a road", frames=9, height=16, width=24, fps=8, window=9, overlap=2, interpolate=4)
    record = {
        "clip": asdict(clip), "given": hash_given(GivenFiles(interpolate=Path("slow.mp4"))), "seed": 42,
        "batch": {"seeds": [42], "index": 0}, "checkpoint": {"path": "told.ckpt", "sha256": "0" * 64},
        "temporal": None, "config": None, "precision": "full", "decode_chunk": 4,
        "machine": {"device": "cpu: x", "threads": 1}, "versions": {}, "command": "",
    }  # fmt: skip
    record[part] = record["clip"] | value if part == "clip" else value
    (tmp_path / "odd.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        run("--replay", str(tmp_path / "odd.json"))


def test_the_settings_of_a_clip_are_checked_without_the_command_too(place):
    generator = ClipGenerator(place / "plain.ckpt")
    given = start_from_picture(place / "road.png", None, 5, (16, 24))
    settings = ClipSettings("a road", frames=5, height=16, width=24, fps=8)
    with pytest.raises(UserError, match="given frames: expected a network that takes known frames"):
        generator.make_latents(settings, [1], given)
