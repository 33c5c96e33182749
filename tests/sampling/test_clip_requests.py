"""What becomes of options before anything is made (`ldm/sampling/request.py`): defaults, plans, notes, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.request import ClipRequest, notes, read_request
from ldm.video import write_mp4
from tests.made_footage import draw_drive
from tests.scripts.test_txt2vid_given import TOLD, config_of, save_told
from tests.tiny_checkpoint import image_state, video_state

NOISY = {"known_frames": {"mixture": {"first": 1}, "max_noise": 300}}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> ClipGenerator:
    """A network of windows of 5 frames at 2 or 8 a second, that is told known frames and the rate."""
    return ClipGenerator(save_told(tmp_path_factory.mktemp("told") / "told.ckpt", **NOISY))


def of_images(path: Path, state: dict, words: dict | None = None) -> ClipGenerator:
    """A checkpoint trained on single frames."""
    config = config_of(words or {})
    config["data"]["params"] |= {"frames": 1, "strides": [1]}
    torch.save({"state_dict": state, "config": config}, path)
    return ClipGenerator(path)


def ask(generator: ClipGenerator, **words) -> ClipRequest:
    return read_request({"prompt": "a road", **words}, generator)


def test_a_schedule_goes_with_a_clip_whose_length_follows_from_a_video(told, tmp_path):
    write_mp4(tmp_path / "a.mp4", draw_drive(9, 32, seed=0), 2)
    words = {"interpolate": ("4", tmp_path / "a.mp4")}
    request = ask(told, prompt="0: a | 20: b", **words)
    assert request.settings.frames == 33 and request.prompts == ["a", "b", ""]
    with pytest.raises(UserError, match=r"prompt schedule: expected frames 0 to 32 of the clip, found 33"):
        ask(told, prompt="0: a | 33: b", **words)


@pytest.mark.parametrize("frames", [1, 2, 3, 40])
def test_a_network_of_pictures_makes_any_number_in_one_window(tmp_path, frames):
    generator = of_images(tmp_path / "image.ckpt", image_state(), {"temporal": False})
    request = ask(generator, frames=frames)
    assert request.settings.window == frames
    assert request.describe() == [f"{frames} frames at 8 fps in one window"]
    assert any("its frames are independent images" in note for note in notes(request, generator))
    assert ask(generator, frames=40, window=10).settings.window == 10


def test_layers_over_time_that_saw_single_frames_get_the_whole_clip_too(tmp_path):
    generator = of_images(tmp_path / "video.ckpt", video_state())
    request = ask(generator, frames=9)
    assert request.settings.window == 9
    assert list(notes(request, generator)) == ["windows of 9 frames: trained on 1; motion may drift at other lengths"]


def test_channels_for_known_pixels_are_not_time(tmp_path):
    words = {"temporal": False, "in_channels": 9}
    unet = save_told(tmp_path / "whole.ckpt", words)
    generator = of_images(tmp_path / "inpainting.ckpt", torch.load(unet, weights_only=True)["state_dict"], words)
    assert generator.takes_known_frames and not generator.training.has_time
    assert any("its frames are independent images" in note for note in notes(ask(generator), generator))


def test_network_without_fps_embedding_has_no_keyframes(told, tmp_path):
    assert {stage.spacing for stage in ask(told, frames=40).plan.stages} == {1, 4}
    untold = ClipGenerator(save_told(tmp_path / "untold.ckpt", TOLD | {"fps_embedding": False}))
    request = ask(untold, frames=40)
    assert [stage.spacing for stage in request.plan.stages] == [1] and len(request.plan.windows) > 2


def test_noise_on_known_frames_is_suggested_once_where_windows_follow_each_other(told, tmp_path):
    def suggestions(generator: ClipGenerator, **words) -> list[str]:
        return [note for note in notes(ask(generator, **words), generator) if "--known-noise" in note]

    assert suggestions(told, frames=40) == [
        "several windows: --known-noise, up to 300, makes continuations more robust to errors"
    ]
    assert ask(told, frames=40).settings.known_noise == 0
    Image.new("RGB", (24, 16)).save(tmp_path / "a.png")
    assert suggestions(told) == suggestions(told, init_image=tmp_path / "a.png") == []
    assert suggestions(told, frames=40, known_noise=100) == []
    assert suggestions(ClipGenerator(save_told(tmp_path / "clean.ckpt")), frames=40) == []


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"negative_prompt": "rain", "scale": 1}, "--negative-prompt has no effect at scale 1; set --scale above 1"),
        ({"known_noise": 100}, "--known-noise has no effect where no window continues an earlier one"),
        ({"overlap": 2}, "--overlap has no effect in a clip of one window"),
        ({"frames": 1, "motion_scale": 2}, "--motion-scale has no effect on a single frame"),
        ({"frames": 1, "fps": 30}, "--fps has no effect on a single frame"),
        ({"negative_prompt": "0: a | 2: b"}, "--negative-prompt is one text for all frames: '0: a | 2: b' is read as"),
        ({"prompt": "a (wet:1.5) road"}, "'(wet:1.5)' is read as plain text"),
        ({"prompt": "0: a | 2: ((wet)) road"}, "'((wet))' is read as plain text"),
        ({"negative_prompt": "[rain:snow:0.5]"}, "'[rain:snow:0.5]' is read as plain text"),
        ({"prompt": "a road <lora:wet:0.8>"}, "'<lora:wet:0.8>' is read as plain text"),
    ],
)
def test_an_option_without_effect_gets_a_note(told, options, note):
    found = list(notes(ask(told, **options), told))
    assert any(line.startswith(note) for line in found), found
    assert not any("rate" in line or "frames a second" in line for line in found)


def test_options_with_an_effect_get_no_note(told):
    """Those of the table above where they count; brackets of plain writing."""
    options = {"negative_prompt": "rain", "scale": 2.0, "frames": 13, "window": 5, "overlap": 2, "known_noise": 100}
    request = ask(told, prompt="a road (wet) [2024], 3:00", **options, motion_scale=2.0, fps=8.0)
    assert list(notes(request, told)) == []


def test_known_frames_outside_of_training_get_a_note(told, tmp_path):
    """`told` has first frames in its mixture and nothing else."""
    Image.new("RGB", (24, 16)).save(tmp_path / "a.png")
    Image.new("L", (24, 16), 255).save(tmp_path / "mask.png")
    write_mp4(tmp_path / "a.mp4", draw_drive(9, 32, seed=0), 8)

    def kinds(**files) -> list[str]:
        return [note.partition(":")[0] for note in notes(ask(told, **files), told) if "no such known frames" in note]

    image = {"init_image": tmp_path / "a.png"}
    assert kinds() == kinds(**image) == []
    assert kinds(**image, mask=tmp_path / "mask.png") == ["--mask"]
    assert kinds(init_video=tmp_path / "a.mp4") == ["--init-video"]
    assert kinds(interpolate=("2", tmp_path / "a.mp4")) == ["--interpolate"]


def test_a_rate_that_only_plays_faster_gets_a_note(tmp_path):
    untold = ClipGenerator(save_told(tmp_path / "untold.ckpt", TOLD | {"fps_embedding": False}))
    assert list(notes(ask(untold, fps=24.0), untold)) == [
        "24 frames a second: trained on 2 to 8 and not conditioned on the rate; motion plays at 3 times its speed"
    ]
    assert list(notes(ask(untold, fps=8.0), untold)) == []


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_guidance_must_be_finite(told, scale):
    with pytest.raises(UserError, match=rf"scale: expected a finite number, found {scale}; set --scale"):
        ask(told, scale=scale)
    with pytest.raises(UserError, match=rf"motion scale: expected a finite number, found {scale}; set --motion-scale"):
        ask(told, motion_scale=scale)


@pytest.mark.parametrize("window", [1, 0, -3])
def test_window_below_two_frames_is_an_error(told, window):
    for frames in (5, 13):
        with pytest.raises(UserError, match=f"window: expected at least 2 frames to sample together, found {window}"):
            ask(told, frames=frames, window=window)


def test_a_continuation_without_overlap_is_refused(told, tmp_path):
    write_mp4(tmp_path / "a.mp4", draw_drive(9, 32, seed=0), 8)
    with pytest.raises(UserError, match=r"--overlap: expected at least 1 frame of .*a.mp4 to begin the clip, found 0"):
        ask(told, init_video=tmp_path / "a.mp4", overlap=0)
