"""Given frames: an image, a video, a mask -> uint8 RGB frames `t h w 3` and masks of the clip's size.

Images of any size and mode become upright RGB; videos are resampled like prepared footage. Networks are not here.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
from einops import reduce
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.data.preparing.footage import MAX_ENLARGEMENT, FootageError, VideoInfo, probe, read_frames
from ldm.errors import UserError
from ldm.sampling.settings import MAX_FRAMES
from ldm.video import MAX_PIXELS, check_pixels

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # others start programs (EPS) or are no images
FEW_PIXELS, PIXELS_A_BYTE = 2**22, 128  # an image above both limits is a decompression bomb
FACTORS = range(2, 65)  # of interpolation
MADE = 128  # grey levels from here on count as white, which survives JPEG and H.264

A_PICTURE = "for an image use --init-image"

Size = tuple[int, int]  # height, width in pixels


def read_picture(path: Path | str) -> Image.Image:
    """The image in a file, upright, 8-bit RGB, transparency on black.

    Every mode of Pillow: grey of 8 and 16 bits, palettes, alpha, CMYK; of an animation the first frame. Raises
    UserError for a missing, corrupt or truncated file, and for one that is no image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # every real problem is an error below
            with Image.open(path, formats=FORMATS) as opened:
                _check_size(*opened.size, Path(path))
                upright = ImageOps.exif_transpose(opened)
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected an image, found no such file") from error
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path}: expected an image (PNG, JPEG, WebP, TIFF, ...), found another format; for a video use "
            "--init-video or --interpolate"
        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: expected an image of at most {MAX_PIXELS:,} pixels ({error})") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        if getattr(error, "errno", None) is not None:
            raise UserError(
                f"{path}: expected an image, found a file that cannot be opened ({error.strerror})"
            ) from error
        raise UserError(
            f"{path}: expected an image, found a corrupt one ({error}); copy or download it again"
        ) from error
    return _as_rgb(upright, path)


def _check_size(width: int, height: int, path: Path) -> None:
    """Raise UserError for more pixels than `MAX_PIXELS`, or than a file of this size can plausibly hold."""
    check_pixels(width, height, path)
    num_bytes = path.stat().st_size
    if width * height > max(FEW_PIXELS, PIXELS_A_BYTE * num_bytes):
        raise UserError(
            f"{path}: expected at most {PIXELS_A_BYTE} pixels a byte in a large image, found {width}x{height} in "
            f"{num_bytes:,} bytes; make it smaller"
        )


def _as_rgb(picture: Image.Image, path: Path | str) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        levels = np.asarray(picture)
        if picture.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise UserError(
                f"{path}: expected grey levels from 0 to 65535, found 32-bit values from {levels.min():g} to "
                f"{levels.max():g}; store it with 8 or 16 bits"
            )
        picture = Image.fromarray((levels / 257).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return picture.convert("RGB")


def fit_picture(
    picture: Image.Image, size: Size, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """The largest centre crop with the aspect ratio of `size`, resized to it: uint8 `h w ...`."""
    return np.asarray(ImageOps.fit(picture, size[::-1], resampling))


def describe_fit(picture: Image.Image, size: Size) -> str | None:
    """How `fit_picture` crops or strongly enlarges an image, for the user; None if it does neither."""
    (width, height), effects = picture.size, []
    cover = max(size[0] / height, size[1] / width)
    kept_width, kept_height = round(size[1] / cover), round(size[0] / cover)
    if (kept_width, kept_height) != (width, height):
        effects.append(f"cropped from {width}x{height} to the central {kept_width}x{kept_height} pixels")
    if cover > MAX_ENLARGEMENT:
        effects.append(f"enlarged {cover:.3g} times, which looks soft")
    return ", ".join(effects) or None


def read_last_frames(path: Path | str, fps: float, size: Size, count: int) -> np.ndarray:
    """The last `count` frames of a video at `fps` a second, `count h w 3`, with which a continuation begins.

    Raises UserError for a shorter video, and FootageError like `read_frames`.
    """
    info = _probe_frames(path)
    last = deque(read_frames(path, _rate(info, fps), size), maxlen=count)
    if len(last) < count:
        found = f"a single frame; {A_PICTURE}, or" if len(last) == 1 else f"{len(last)};"
        raise UserError(
            f"{path}: expected a video of at least {count} frames at {fps:g} a second (--overlap), found {found} give "
            "a longer video or a smaller --overlap"
        )
    return np.stack(last)


def read_first_frames(path: Path | str, fps: float, size: Size, count: int) -> np.ndarray:
    """Up to `count` first frames of a video at `fps` a second."""
    return np.stack(list(islice(read_frames(path, _rate(probe(path), fps), size), count)))


def read_every_frame(path: Path | str, size: Size, factor: int) -> tuple[np.ndarray, float]:
    """All frames of a video at its own rate, `t h w 3`, and that rate.

    Raises UserError for a single frame, a factor outside 2 to 64, and more than 10,000 frames after interpolation.
    """
    if factor not in FACTORS:
        raise UserError(f"--interpolate: expected a factor of {FACTORS[0]} to {FACTORS[-1]}, found {factor}")
    info = _probe_frames(path)
    limit = (MAX_FRAMES - 1) // factor + 1
    frames = list(islice(read_frames(path, info.rate, size), limit + 1))
    if len(frames) < 2:
        raise UserError(
            f"{path}: expected a video of at least 2 frames to interpolate, found a single frame; {A_PICTURE}"
        )
    if len(frames) > limit:
        raise UserError(
            f"{path}: expected at most {limit} frames, {MAX_FRAMES} after interpolation by {factor}, found more; cut "
            "the video or use a smaller factor"
        )
    return np.stack(frames), info.fps


def _probe_frames(path: Path | str) -> VideoInfo:
    """`probe`, with advice for a single frame."""
    try:
        return probe(path)
    except FootageError as error:
        if str(error).endswith("found a single frame"):
            raise UserError(f"{error}; {A_PICTURE}") from error
        raise


def _rate(info: VideoInfo, fps: float) -> float | Fraction:
    """`fps`, or the footage's own rate if `fps` is that rate rounded: 3.3333 for 10/3."""
    return info.rate if abs(fps / info.rate - 1) < 1e-3 else fps


def read_mask(path: Path | str, num_frames: int, size: Size, source: Size | None = None) -> np.ndarray:
    """Where a clip is sampled: bool `t h w`, with t = 1 for an image, which applies to all frames.

    White is sampled, black is kept; grey counts as the nearer of both.

    size: of the clip and the mask. source: the size of the given image before cropping; a mask of that size is cropped
        in the same way.
    num_frames: of a mask that is a video.

    Raises UserError.
    """
    grey = _grey_frames(Path(path), num_frames)
    first = next(grey)
    found = first.size[::-1]
    if found not in (size, source):
        expected = f"{size[1]}x{size[0]} pixels like the clip"
        if source not in (None, size):
            expected += f" or {source[1]}x{source[0]} like the image"
        raise UserError(f"{path}: expected a mask of {expected}, found {found[1]}x{found[0]}")
    made = [_fit_mask(frame, size) for frame in (first, *grey)]
    if len(made) not in (1, num_frames):
        raise UserError(
            f"{path}: expected an image or a video of {num_frames} frames like the clip, found "
            f"{'more' if len(made) > num_frames else len(made)}"
        )
    return np.stack(made)


def _grey_frames(path: Path, num_frames: int) -> Iterator[Image.Image]:
    """The image in a file, or up to `num_frames` + 1 frames of a video, at their own size."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            _check_size(*opened.size, Path(path))
            is_picture = _is_single(opened)
    except UserError:
        raise
    except UnidentifiedImageError:
        is_picture = False
    except (OSError, SyntaxError, Image.DecompressionBombError):
        is_picture = True  # missing or corrupt: read_picture raises
    if is_picture:
        yield read_picture(path).convert("L")
        return
    info = probe(path)
    for frame in islice(read_frames(path, info.rate, (info.height, info.width)), num_frames + 1):
        yield Image.fromarray(frame).convert("L")


def _is_single(picture: Image.Image) -> bool:
    """Whether there is one frame; looks no further than the second, as a GIF may be endless."""
    try:
        picture.seek(1)
    except EOFError:
        return True
    return False


def _fit_mask(grey: Image.Image, size: Size) -> np.ndarray:
    made = grey.point(lambda level: 255 * (level >= MADE))
    if made.size == size[::-1]:
        return np.asarray(made) > 0
    return fit_picture(made, size, Image.Resampling.BOX) > 0  # sampled where any source pixel is


@dataclass(frozen=True)
class GivenFrames:
    """The known frames of a clip.

    pictures: uint8 `m h w 3`. shown: for each frame of the clip the index of its picture; None: not given.
    made: bool `1 h w` or `t h w`, True where given frames are sampled again; None for nowhere.
    notes: for the user, how files were cropped or enlarged. fps: of the clip, if a video determines it.
    """

    pictures: np.ndarray
    shown: list[int | None]
    made: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    fps: float | None = None

    def __post_init__(self) -> None:
        if len(self.wholly_known()) == len(self.shown):
            raise UserError(
                f"given frames: expected at least one frame to sample, found all {len(self.shown)} given; set more "
                "--frames, or give a --mask with white in it"
            )

    def wholly_known(self) -> list[int]:
        """Indices of frames that are given in every pixel."""
        has_white = [False] if self.made is None else self.made.any(axis=(1, 2)).tolist()
        return [
            frame
            for frame, picture in enumerate(self.shown)
            if picture is not None and not has_white[frame % len(has_white)]
        ]

    def latent_mask(self, downsampling: int) -> np.ndarray:
        """Where latents are sampled, bool `t h/f w/f`; a latent is known only if all its pixels are."""
        made = np.zeros((1, *self.pictures.shape[1:3]), bool) if self.made is None else self.made
        made = reduce(made, "t (h y) (w x) -> t h w", "max", y=downsampling, x=downsampling)
        is_given = np.array([picture is not None for picture in self.shown])
        return made | ~is_given[:, None, None]


def start_from_picture(path: Path | str, mask: Path | str | None, num_frames: int, size: Size) -> GivenFrames:
    """An image as the first frame of a clip; with a mask, in every frame where the mask is black."""
    picture = read_picture(path)
    made = None if mask is None else read_mask(mask, num_frames, size, picture.size[::-1])
    note = describe_fit(picture, size)
    shown = [0] + [None if made is None else 0] * (num_frames - 1)
    notes = (f"{path}: {note}",) if note else ()
    return GivenFrames(fit_picture(picture, size)[None], shown, made, notes=notes)


def start_from_video(
    path: Path | str, mask: Path | str | None, num_frames: int, fps: float, size: Size, overlap: int
) -> GivenFrames:
    """The last `overlap` frames of a video at the start of a clip; with a mask, its first frames where it is black."""
    if mask is not None:
        made = read_mask(mask, num_frames, size)
        pictures = read_first_frames(path, fps, size, num_frames)
    elif overlap < 1:
        raise UserError(f"--overlap: expected at least 1 frame of {path} to begin the clip, found {overlap}")
    elif overlap < num_frames:
        pictures, made = read_last_frames(path, fps, size, overlap), None
    else:
        raise UserError(
            f"--frames: expected more than the {overlap} frames of {path} that begin the clip (--overlap), found "
            f"{num_frames}"
        )
    return GivenFrames(pictures, [*range(len(pictures)), *[None] * (num_frames - len(pictures))], made)


def space_out_video(path: Path | str, mask: Path | str | None, factor: int, size: Size) -> GivenFrames:
    """Every frame of a video as every `factor`-th frame of a clip, whose length and rate follow."""
    pictures, fps = read_every_frame(path, size, factor)
    num_frames = (len(pictures) - 1) * factor + 1
    shown = [None if frame % factor else frame // factor for frame in range(num_frames)]
    return GivenFrames(pictures, shown, None if mask is None else read_mask(mask, num_frames, size), fps=fps * factor)
