"""What a user gives to sampling beside a prompt: a picture, a video, a mask -> frames and masks of the clip's size.

Pictures of any size and mode become upright RGB; videos are brought to a rate and size as footage is prepared. Nothing
here knows a network: frames are uint8 RGB `t h w 3`, masks say of each pixel whether it is to be made.
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
from ldm.video import MAX_PIXELS, check_pixels

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # others start programs (EPS) or are no pictures
FEW_PIXELS, PIXELS_A_BYTE = 2**22, 128  # a picture with more pixels than either allows is a bomb
MAX_FRAMES = 10_000  # of a clip
FACTORS = range(2, 65)  # by which the frames of a video can be multiplied
MADE = 128  # grey levels from here on are to be made, so that a mask survives JPEG and H.264

A_PICTURE = "a picture can begin a clip: give it to --init-image"

Size = tuple[int, int]  # height, width in pixels


def read_picture(path: Path | str) -> Image.Image:
    """The picture in a file, upright, 8-bit RGB; what is transparent lies on black, as in video.

    Takes every mode Pillow reads: grey of 8 and 16 bits, palettes, alpha, CMYK; of an animation the first picture.
    Raises UserError when the file is missing, no picture, damaged or cut short.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is amiss is either an error or no matter
            with Image.open(path, formats=FORMATS) as opened:
                _check_size(*opened.size, Path(path))
                upright = ImageOps.exif_transpose(opened)
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected a picture, found no such file") from error
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path}: expected a picture (PNG, JPEG, WebP, TIFF, ...), found something else; videos go to --init-video "
            "and --interpolate"
        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: expected a picture of at most {MAX_PIXELS:,} pixels ({error})") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        if getattr(error, "errno", None) is not None:
            raise UserError(f"{path}: expected a picture, found what cannot be opened ({error.strerror})") from error
        raise UserError(
            f"{path}: expected a picture, found a damaged one ({error}); copy or download it again"
        ) from error
    return _as_rgb(upright, path)


def _check_size(width: int, height: int, path: Path) -> None:
    """Raise UserError for more pixels than `MAX_PIXELS`, and for many in a file of few bytes."""
    check_pixels(width, height, path)
    num_bytes = path.stat().st_size
    if width * height > max(FEW_PIXELS, PIXELS_A_BYTE * num_bytes):
        raise UserError(
            f"{path}: expected a byte for every {PIXELS_A_BYTE} pixels of a large picture, found {width}x{height} in "
            f"{num_bytes:,} bytes; make it smaller"
        )


def _as_rgb(picture: Image.Image, path: Path | str) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        levels = np.asarray(picture)
        if picture.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise UserError(
                f"{path}: expected levels of grey from 0 to 65535, found numbers of 32 bits from {levels.min():g} "
                f"to {levels.max():g}; store it with 8 or 16 bits"
            )
        picture = Image.fromarray((levels / 257).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return picture.convert("RGB")


def fit_picture(
    picture: Image.Image, size: Size, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """The middle of a picture, as much of it as has the shape of `size`, in that size: uint8 `h w ...`."""
    return np.asarray(ImageOps.fit(picture, size[::-1], resampling))


def describe_fit(picture: Image.Image, size: Size) -> str | None:
    """What `fit_picture` takes away from a picture or enlarges much, in words; None if it does neither."""
    (width, height), words = picture.size, []
    cover = max(size[0] / height, size[1] / width)
    kept_width, kept_height = round(size[1] / cover), round(size[0] / cover)
    if (kept_width, kept_height) != (width, height):
        words.append(f"of its {width}x{height} pixels the middle {kept_width}x{kept_height} are taken")
    if cover > MAX_ENLARGEMENT:
        words.append(f"it is enlarged {cover:.3g} times and will look soft")
    return ", ".join(words) or None


def read_last_frames(path: Path | str, fps: float, size: Size, count: int) -> np.ndarray:
    """The last `count` frames of a video at `fps` a second, `count h w 3`: those that a continuation begins with.

    Raises UserError for a shorter video, and FootageError as `read_frames` does.
    """
    info = _probe_frames(path)
    last = deque(read_frames(path, _rate(info, fps), size), maxlen=count)
    if len(last) < count:
        found = f"a single frame; {A_PICTURE}, or" if len(last) == 1 else f"{len(last)};"
        raise UserError(
            f"{path}: expected a video of at least {count} frames at {fps:g} a second, since that many begin the new "
            f"clip (--overlap), found {found} give a longer video or a smaller --overlap"
        )
    return np.stack(last)


def read_first_frames(path: Path | str, fps: float, size: Size, count: int) -> np.ndarray:
    """The first `count` frames of a video at `fps` a second, or as many as it has."""
    return np.stack(list(islice(read_frames(path, _rate(probe(path), fps), size), count)))


def read_every_frame(path: Path | str, size: Size, factor: int) -> tuple[np.ndarray, float]:
    """All frames of a video at its own rate, `t h w 3`, to be multiplied by `factor`, and that rate a second.

    Raises UserError for a single frame, for a factor outside of 2 to 64, and where more than 10,000 frames would come
    of it.
    """
    if factor not in FACTORS:
        raise UserError(f"--interpolate: expected a factor of {FACTORS[0]} to {FACTORS[-1]}, found {factor}")
    info = _probe_frames(path)
    limit = (MAX_FRAMES - 1) // factor + 1
    frames = list(islice(read_frames(path, info.rate, size), limit + 1))
    if len(frames) < 2:
        raise UserError(
            f"{path}: expected a video of at least 2 frames to find others between them, found a single frame; "
            f"{A_PICTURE}"
        )
    if len(frames) > limit:
        raise UserError(
            f"{path}: expected at most {limit} frames, of which {factor} times as many make {MAX_FRAMES}, found more; "
            "cut it into pieces or ask for a smaller factor"
        )
    return np.stack(frames), info.fps


def _probe_frames(path: Path | str) -> VideoInfo:
    """`probe`, for footage that a clip goes on from."""
    try:
        return probe(path)
    except FootageError as error:
        if str(error).endswith("found a single frame"):
            raise UserError(f"{error}; {A_PICTURE}") from error
        raise


def _rate(info: VideoInfo, fps: float) -> float | Fraction:
    """`fps`, or the footage's own rate where that is meant: 3.3333 as a file says it is not 10/3."""
    return info.rate if abs(fps / info.rate - 1) < 1e-3 else fps


def read_mask(path: Path | str, num_frames: int, size: Size, source: Size | None = None) -> np.ndarray:
    """Where a clip is to be made: bool `t h w`, with t = 1 for a picture, which is meant for all frames.

    White is to be made, black is kept; levels of grey count as the nearer one.

    size: of the clip; the mask must have it, or else `source`: the size of the picture given with it, before that was
        cropped; such a mask is cropped in the same way.
    num_frames: how many a mask that is a video must have.

    Raises UserError.
    """
    grey = _grey_frames(Path(path), num_frames)
    first = next(grey)
    found = first.size[::-1]
    if found not in (size, source):
        expected = f"{size[1]}x{size[0]} pixels, as the clip has,"
        if source not in (None, size):
            expected += f" or {source[1]}x{source[0]}, as the picture,"
        raise UserError(f"{path}: expected a mask of {expected} found {found[1]}x{found[0]}")
    made = [_fit_mask(frame, size) for frame in (first, *grey)]
    if len(made) not in (1, num_frames):
        raise UserError(
            f"{path}: expected a picture or a video of {num_frames} frames, as the clip has, found "
            f"{'more' if len(made) > num_frames else len(made)}"
        )
    return np.stack(made)


def _grey_frames(path: Path, num_frames: int) -> Iterator[Image.Image]:
    """The picture in a file or the frames of a video, as they are, one more than `num_frames` at most."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            _check_size(*opened.size, Path(path))
            is_picture = _is_single(opened)
    except UserError:
        raise
    except UnidentifiedImageError:
        is_picture = False
    except (OSError, SyntaxError, Image.DecompressionBombError):
        is_picture = True  # a missing or damaged one: reading it says so
    if is_picture:
        yield read_picture(path).convert("L")
        return
    info = probe(path)
    for frame in islice(read_frames(path, info.rate, (info.height, info.width)), num_frames + 1):
        yield Image.fromarray(frame).convert("L")


def _is_single(picture: Image.Image) -> bool:
    """Whether there is no second picture in it; those of an endless GIF are not counted."""
    try:
        picture.seek(1)
    except EOFError:
        return True
    return False


def _fit_mask(grey: Image.Image, size: Size) -> np.ndarray:
    made = grey.point(lambda level: 255 * (level >= MADE))
    if made.size == size[::-1]:
        return np.asarray(made) > 0
    return fit_picture(made, size, Image.Resampling.BOX) > 0  # made where any pixel below it is


@dataclass(frozen=True)
class GivenFrames:
    """What is known of a clip before any of it is made.

    pictures: uint8 `m h w 3`. shown: for each frame of the clip the number of the picture it shows; None: not given.
    made: bool `1 h w` or `t h w`, True where given frames are to be made all the same; None for nowhere.
    notes: what a user should know of how the files were used. fps: the clip's, where it follows from a video.
    """

    pictures: np.ndarray
    shown: list[int | None]
    made: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    fps: float | None = None

    def __post_init__(self) -> None:
        if len(self.wholly_known()) == len(self.shown):
            raise UserError(
                f"given frames: expected something to make, found all {len(self.shown)} frames of the clip given; ask "
                "for more --frames, or give a --mask with something white in it"
            )

    def wholly_known(self) -> list[int]:
        """The frames of the clip that are given without any part to be made."""
        has_white = [False] if self.made is None else self.made.any(axis=(1, 2)).tolist()
        return [
            frame
            for frame, picture in enumerate(self.shown)
            if picture is not None and not has_white[frame % len(has_white)]
        ]

    def latent_mask(self, downsampling: int) -> np.ndarray:
        """Where latents are to be made, bool `t h/f w/f`: one is known only if all its pixels are."""
        made = np.zeros((1, *self.pictures.shape[1:3]), bool) if self.made is None else self.made
        made = reduce(made, "t (h y) (w x) -> t h w", "max", y=downsampling, x=downsampling)
        is_given = np.array([picture is not None for picture in self.shown])
        return made | ~is_given[:, None, None]


def start_from_picture(path: Path | str, mask: Path | str | None, num_frames: int, size: Size) -> GivenFrames:
    """A picture as the first frame of a clip; with a mask, in every frame where that is black."""
    picture = read_picture(path)
    made = None if mask is None else read_mask(mask, num_frames, size, picture.size[::-1])
    note = describe_fit(picture, size)
    shown = [0] + [None if made is None else 0] * (num_frames - 1)
    notes = (f"{path}: {note}",) if note else ()
    return GivenFrames(fit_picture(picture, size)[None], shown, made, notes=notes)


def start_from_video(
    path: Path | str, mask: Path | str | None, num_frames: int, fps: float, size: Size, overlap: int
) -> GivenFrames:
    """The last `overlap` frames of a video as the first of a clip; with a mask, its first ones where that is black."""
    if mask is not None:
        made = read_mask(mask, num_frames, size)
        pictures = read_first_frames(path, fps, size, num_frames)
    elif overlap < 1:
        raise UserError(
            f"--overlap: expected at least 1, since that many of the last frames of {path} begin the clip, found "
            f"{overlap}"
        )
    elif overlap < num_frames:
        pictures, made = read_last_frames(path, fps, size, overlap), None
    else:
        raise UserError(
            f"--frames: expected more than {overlap}, since that many of the last frames of {path} begin the clip "
            f"(--overlap), found {num_frames}"
        )
    return GivenFrames(pictures, [*range(len(pictures)), *[None] * (num_frames - len(pictures))], made)


def space_out_video(path: Path | str, mask: Path | str | None, factor: int, size: Size) -> GivenFrames:
    """Every frame of a video as every `factor`-th of a clip, whose length and rate follow from it."""
    pictures, fps = read_every_frame(path, size, factor)
    num_frames = (len(pictures) - 1) * factor + 1
    shown = [None if frame % factor else frame // factor for frame in range(num_frames)]
    return GivenFrames(pictures, shown, None if mask is None else read_mask(mask, num_frames, size), fps=fps * factor)
