"""Pictures, videos and masks given to sampling: every kind is brought to the clip's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.data.preparing.footage import FootageError
from ldm.errors import UserError
from ldm.sampling.given_frames import (
    GivenFrames,
    describe_fit,
    fit_picture,
    read_every_frame,
    read_first_frames,
    read_last_frames,
    read_mask,
    read_picture,
    space_out_video,
    start_from_picture,
    start_from_video,
)
from ldm.video import write_gif, write_mp4
from tests.made_footage import draw_drive, number_of, write_numbered, write_truncated

RAMP = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None] * 4, (64, 32))  # dark above, bright below


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("grey.png", Image.fromarray(RAMP.copy())),
        ("grey.jpg", Image.fromarray(RAMP.copy())),
        ("deep.png", Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("deep.tif", Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("wide.tif", Image.fromarray(RAMP.astype(np.int32) * 257)),
        ("palette.png", Image.fromarray(RAMP.copy()).convert("P")),
        ("palette.gif", Image.fromarray(RAMP.copy()).convert("P")),
        ("rgb.webp", Image.fromarray(RAMP.copy()).convert("RGB")),
        ("cmyk.tif", Image.fromarray(RAMP.copy()).convert("RGB").convert("CMYK")),
        ("opaque.png", Image.fromarray(RAMP.copy()).convert("RGBA")),
        ("alpha.png", Image.fromarray(RAMP.copy()).convert("LA")),
    ],
)
def test_a_picture_of_any_mode_looks_the_same(tmp_path, name, picture):
    picture.save(tmp_path / name)
    found = read_picture(tmp_path / name)
    assert found.mode == "RGB" and found.size == (32, 64)
    assert np.abs(np.asarray(found).astype(int) - RAMP[..., None]).max() <= 4


def test_transparency_becomes_black(tmp_path):
    pixels = np.full((4, 4, 4), 200, np.uint8)
    pixels[..., 3] = [0, 255, 255, 128]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.asarray(read_picture(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 200, 200, 100]
    palette = Image.fromarray(RAMP.copy()).convert("P")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 63)))
    assert np.asarray(read_picture(tmp_path / "p.png"))[63].max() == 0


def test_a_rotated_picture_is_turned_upright(tmp_path):
    turned = Image.fromarray(np.rot90(RAMP, 1).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned.save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = np.asarray(read_picture(tmp_path / "a.jpg"))
    assert found.shape == (64, 32, 3)
    assert found[0].mean() < 20 and found[-1].mean() > 230


def test_centre_crop_and_its_note():
    picture = Image.fromarray(np.arange(96, dtype=np.uint8)[None].repeat(32, 0))
    fitted = fit_picture(picture, (32, 32))
    assert np.array_equal(fitted[0], np.arange(32, 64))
    assert describe_fit(picture, (32, 32)) == "cropped from 96x32 to the central 32x32 pixels"
    assert describe_fit(picture, (16, 48)) is None
    assert describe_fit(picture, (128, 384)) == "enlarged 4 times, which looks soft"
    assert describe_fit(picture, (96, 96)).endswith("central 32x32 pixels, enlarged 3 times, which looks soft")


def test_last_first_and_every_frame(tmp_path):
    write_numbered(tmp_path / "a.mp4", 20, "20")
    last = read_last_frames(tmp_path / "a.mp4", 10, (64, 64), 3)
    assert [number_of(frame) for frame in last] == [14, 16, 18]
    assert len(read_first_frames(tmp_path / "a.mp4", 10, (64, 64), 99)) == 10
    first = read_first_frames(tmp_path / "a.mp4", 20, (64, 64), 4)
    assert [number_of(frame) for frame in first] == [0, 1, 2, 3]
    every, fps = read_every_frame(tmp_path / "a.mp4", (64, 64), 4)
    assert [number_of(frame) for frame in every] == list(range(20)) and fps == 20


def test_a_rate_that_no_number_spells_is_the_footages_own(tmp_path):
    write_mp4(tmp_path / "a.mp4", draw_drive(7, 64, seed=0), fps=10 / 3)
    assert len(read_last_frames(tmp_path / "a.mp4", 10 / 3, (64, 64), 7)) == 7
    assert len(read_last_frames(tmp_path / "a.mp4", 3.3334, (64, 64), 7)) == 7


def test_masks_of_pictures_and_videos(tmp_path):
    grey = np.zeros((32, 64), np.uint8)
    grey[:, 32:] = 255
    grey[:, 40:] = 127
    Image.fromarray(grey).save(tmp_path / "m.png")
    made = read_mask(tmp_path / "m.png", 5, (32, 64))
    assert made.shape == (1, 32, 64) and made.dtype == bool
    assert made[0, 0].nonzero()[0].tolist() == list(range(32, 40))
    frames = np.stack([np.roll(grey // 255 * 255, 8 * t, 1) for t in range(4)])[..., None].repeat(3, -1)
    write_mp4(tmp_path / "m.mp4", frames, 10)
    made = read_mask(tmp_path / "m.mp4", 4, (32, 64))
    assert made.shape == (4, 32, 64)
    assert made[3, 0].nonzero()[0].tolist() == list(range(56, 64))
    write_gif(tmp_path / "m.gif", frames, 10)
    assert read_mask(tmp_path / "m.gif", 4, (32, 64)).shape == (4, 32, 64)


def test_a_mask_is_cropped_as_the_picture_was(tmp_path):
    grey = np.zeros((32, 96), np.uint8)
    grey[:, 41] = 255
    Image.fromarray(grey).save(tmp_path / "m.png")
    made = read_mask(tmp_path / "m.png", 5, (16, 16), source=(32, 96))
    assert made[0, 0].nonzero()[0].tolist() == [4]  # a single white column among those of the pixel


def test_a_latent_pixel_is_kept_only_if_all_its_pixels_are_and_are_given():
    made = np.zeros((3, 4, 8), bool)
    made[0, 3, 2] = made[1, 0, 7] = True
    given = GivenFrames(np.zeros((2, 4, 8, 3), np.uint8), [0, 1, None], made)
    latent = given.latent_mask(2)
    assert latent.shape == (3, 2, 4)
    assert np.argwhere(latent[:2]).tolist() == [[0, 1, 1], [1, 0, 3]]
    assert latent[2].all()
    assert given.wholly_known() == []
    whole = GivenFrames(np.zeros((1, 4, 8, 3), np.uint8), [0, None])
    assert whole.wholly_known() == [0] and not whole.latent_mask(2)[0].any() and whole.latent_mask(2)[1].all()


def test_a_picture_begins_a_clip_or_is_kept_where_the_mask_is_black(tmp_path):
    Image.new("RGB", (96, 32), (9, 9, 9)).save(tmp_path / "a.png")
    given = start_from_picture(tmp_path / "a.png", None, 4, (16, 16))
    assert given.pictures.shape == (1, 16, 16, 3) and given.shown == [0, None, None, None]
    assert given.notes == (f"{tmp_path / 'a.png'}: cropped from 96x32 to the central 32x32 pixels",)
    half = np.zeros((16, 16), np.uint8)
    half[8:] = 255
    Image.fromarray(half).save(tmp_path / "m.png")
    given = start_from_picture(tmp_path / "a.png", tmp_path / "m.png", 4, (16, 16))
    assert given.shown == [0, 0, 0, 0] and given.wholly_known() == []
    assert given.latent_mask(4).tolist() == [[[False] * 4] * 2 + [[True] * 4] * 2] * 4


def test_a_video_is_continued_kept_in_part_or_spaced_out(tmp_path):
    write_numbered(tmp_path / "a.mp4", 6, "10")
    given = start_from_video(tmp_path / "a.mp4", None, 5, 10, (64, 64), 2)
    assert [number_of(frame) for frame in given.pictures] == [4, 5] and given.shown == [0, 1, None, None, None]
    Image.new("L", (64, 64), 255).save(tmp_path / "m.png")
    given = start_from_video(tmp_path / "a.mp4", tmp_path / "m.png", 8, 10, (64, 64), 2)
    assert [number_of(frame) for frame in given.pictures] == [0, 1, 2, 3, 4, 5]
    assert given.shown == [0, 1, 2, 3, 4, 5, None, None] and given.latent_mask(2).all()
    given = space_out_video(tmp_path / "a.mp4", None, 3, (64, 64))
    assert len(given.shown) == 16 and given.shown[:4] == [0, None, None, 1] and given.shown[-1] == 5
    assert given.fps == 30 and given.wholly_known() == [0, 3, 6, 9, 12, 15]


def write_bad_pictures(folder):
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    content = (folder / "whole.png").read_bytes()
    (folder / "short.png").write_bytes(content[: len(content) // 2])
    Image.effect_noise((64, 64), 50).save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    (folder / "short.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(folder / "wide.tif")
    write_mp4(folder / "film.mp4", draw_drive(3, 64, seed=0), 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "expected an image, found no such file"),
        ("short.png", r"expected an image, found a corrupt one \(.+\); copy or download it again"),
        ("short.jpg", r"expected an image, found a corrupt one \(.+\); copy or download it again"),
        (
            "text.png",
            r"expected an image \(PNG, JPEG, WebP, TIFF, ...\), found another format; for a video use --init-",
        ),
        ("empty.png", r"expected an image \(PNG, JPEG, WebP, TIFF, ...\), found another format"),
        ("folder.png", r"expected an image, found a file that cannot be opened \(Is a directory\)"),
        ("float.tif", r"expected grey levels from 0 to 65535, found 32-bit values from 0.5 to 0.5; store it"),
        ("wide.tif", "expected grey levels from 0 to 65535, found 32-bit values from 70000 to 70000; store it"),
        ("film.mp4", "found another format; for a video use --init-video or --interpolate"),
    ],
)
def test_bad_image_is_an_error(tmp_path, name, message):
    write_bad_pictures(tmp_path)
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        read_picture(tmp_path / name)


def test_a_picture_too_large_to_be_true_is_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr("ldm.video.MAX_PIXELS", 200)
    with pytest.raises(UserError, match=r"a.png: expected an image of at most 200 pixels, found 64x64; make"):
        read_picture(tmp_path / "a.png")


def test_bad_video_is_an_error(tmp_path):
    write_mp4(tmp_path / "a.mp4", draw_drive(5, 64, seed=0), 10)
    write_mp4(tmp_path / "one.mp4", draw_drive(1, 64, seed=0), 10)
    write_truncated(tmp_path / "short.mp4")
    with pytest.raises(UserError, match=r"a.mp4: expected a video of at least 6 frames at 10 .*--overlap\), found 5"):
        read_last_frames(tmp_path / "a.mp4", 10, (64, 64), 6)
    with pytest.raises(FootageError, match=r"20 frames a second were asked for, the footage has 10"):
        read_last_frames(tmp_path / "a.mp4", 20, (64, 64), 2)
    with pytest.raises(FootageError, match=r"short.mp4: the file is corrupted or truncated"):
        read_last_frames(tmp_path / "short.mp4", 10, (64, 64), 2)
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    for name in ("one.mp4", "one.png"):
        message = rf"{name}: expected a video.* found a single frame; for an image use --init-image"
        with pytest.raises(UserError, match=message):
            read_every_frame(tmp_path / name, (64, 64), 4)
        with pytest.raises(UserError, match=message):
            read_last_frames(tmp_path / name, 10, (64, 64), 2)
    for factor in (1, 65, -2):
        with pytest.raises(UserError, match=f"--interpolate: expected a factor of 2 to 64, found {factor}"):
            read_every_frame(tmp_path / "a.mp4", (64, 64), factor)


def test_a_video_is_not_multiplied_beyond_ten_thousand_frames(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.sampling.given_frames.MAX_FRAMES", 9)
    write_mp4(tmp_path / "a.mp4", draw_drive(5, 64, seed=0), 10)
    assert len(read_every_frame(tmp_path / "a.mp4", (64, 64), 2)[0]) == 5  # 9 frames
    with pytest.raises(
        UserError, match=r"a.mp4: expected at most 3 frames, 9 after interpolation by 3, found more; cut the"
    ):
        read_every_frame(tmp_path / "a.mp4", (64, 64), 3)


def test_masks_of_another_size_or_length_are_refused(tmp_path):
    Image.new("L", (64, 32)).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m.png: expected a mask of 32x64 pixels like the clip, found 64x32"):
        read_mask(tmp_path / "m.png", 5, (64, 32))
    with pytest.raises(UserError, match=r"of 32x64 pixels like the clip or 9x8 like the image, found 64x32"):
        read_mask(tmp_path / "m.png", 5, (64, 32), source=(8, 9))
    write_mp4(tmp_path / "m.mp4", draw_drive(4, 64, seed=0), 10)
    for num_frames, found in ((5, "4"), (3, "more")):
        with pytest.raises(UserError, match=f"m.mp4: expected an image or a video of {num_frames} .*found {found}"):
            read_mask(tmp_path / "m.mp4", num_frames, (64, 64))
    with pytest.raises(UserError, match=r"missing.png: expected an image, found no such file"):
        read_mask(tmp_path / "missing.png", 5, (64, 64))
    (tmp_path / "text.png").write_text("no mask")
    with pytest.raises(FootageError, match=r"text.png: expected a video, found 7 bytes that ffmpeg cannot read"):
        read_mask(tmp_path / "text.png", 5, (64, 64))


def test_clip_with_all_frames_given_is_an_error(tmp_path):
    write_mp4(tmp_path / "a.mp4", draw_drive(5, 64, seed=0), 10)
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    with pytest.raises(
        UserError, match=r"--frames: expected more than the 3 frames of .*a.mp4 .*\(--overlap\), found 3"
    ):
        start_from_video(tmp_path / "a.mp4", None, 3, 10, (64, 64), 3)
    with pytest.raises(UserError, match=r"--overlap: expected at least 1 frame of .*a.mp4 to begin the clip, found 0"):
        start_from_video(tmp_path / "a.mp4", None, 5, 10, (64, 64), 0)
    with pytest.raises(UserError, match="expected at least one frame to sample, found all 5 given; set more"):
        start_from_video(tmp_path / "a.mp4", tmp_path / "black.png", 5, 10, (64, 64), 3)
    with pytest.raises(UserError, match="expected at least one frame to sample, found all 1 given"):
        start_from_picture(tmp_path / "black.png", None, 1, (64, 64))
