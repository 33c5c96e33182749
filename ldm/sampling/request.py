"""From the words of a command line, or of a record, to clips that can be made: defaults filled in, files read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.sampling.generator import ClipGenerator, describe_plan, rates_of
from ldm.sampling.given_frames import FACTORS, GivenFrames, space_out_video, start_from_picture, start_from_video
from ldm.sampling.prompts import odd_part, prompts_in
from ldm.sampling.settings import DEFAULT_FPS, DEFAULT_FRAMES, SD_V1_SIZE, ClipSettings, GivenFiles, Training
from ldm.sampling.stages import Plan

SOURCES = ("init_image", "init_video", "interpolate")  # a clip has one of them, or none


@dataclass(frozen=True)
class ClipRequest:
    """A clip that can be made: its settings, checked, what is given of it and from which files, and its plan."""

    settings: ClipSettings
    files: GivenFiles
    given: GivenFrames | None
    plan: Plan | None

    @property
    def prompts(self) -> list[str]:
        """All texts to be encoded."""
        return [*prompts_in(self.settings.prompt, self.settings.frames), self.settings.negative_prompt]

    def describe(self) -> list[str]:
        """How the clip is made, a line for each stage."""
        return describe_plan(self.plan, self.settings)


def read_request(options: Mapping[str, Any], generator: ClipGenerator) -> ClipRequest:
    """The clip that options ask for, those left out as the checkpoint suggests or as in training. Raises UserError."""
    trained = generator.training
    files, factor = _read_files(options)
    given_fps = options.get("fps")
    options = {**generator.defaults, **options}
    for what, path in asdict(files).items():
        if path is not None:
            generator.check_given(f"--{what.replace('_', '-')}")
    height, width = trained.size or (SD_V1_SIZE, SD_V1_SIZE)
    names = {field.name for field in fields(ClipSettings)} & set(options) - {"interpolate"}
    given = {
        "frames": trained.frames or DEFAULT_FRAMES,
        "fps": trained.fps or DEFAULT_FPS,
        "height": options.get("H", height),
        "width": options.get("W", width),
        "interpolate": factor,
        **{name: options[name] for name in names},
    }
    settings = ClipSettings(**given)
    if files.interpolate is None:
        settings = _with_windows(settings, trained, options)
        generator.check(settings)  # before files are opened
    else:
        generator.check(replace(settings, prompt=""))  # whose length, for a schedule, is not yet known
    frames = read_given(settings, files)
    if files.interpolate is not None:
        settings = replace(settings, frames=len(frames.shown), fps=frames.fps if given_fps is None else given_fps)
        settings = _with_windows(settings, trained, options)
    return ClipRequest(settings, files, frames, generator.plan(settings, frames))


def repeat_request(words: Mapping[str, Any], files: GivenFiles, generator: ClipGenerator) -> ClipRequest:
    """The clip of a record, whose `clip` and files are given; raises UserError."""
    settings = ClipSettings(**words)
    generator.check(settings)
    for what, path in asdict(files).items():
        if path is not None:
            generator.check_given(what)
    given = read_given(settings, files)
    if given is not None and len(given.shown) != settings.frames:
        raise UserError(
            f"clip.frames: expected {len(given.shown)}, as {files.interpolate} asks, found {settings.frames}"
        )
    return ClipRequest(settings, files, given, generator.plan(settings, given))


def read_given(settings: ClipSettings, files: GivenFiles) -> GivenFrames | None:
    """The frames in the files, for a clip of these settings; None where nothing is given. Raises UserError."""
    size = settings.height, settings.width
    if files.init_image is not None:
        return start_from_picture(files.init_image, files.mask, settings.frames, size)
    if files.init_video is not None:
        return start_from_video(files.init_video, files.mask, settings.frames, settings.fps, size, settings.overlap)
    if files.interpolate is not None:
        return space_out_video(files.interpolate, files.mask, settings.interpolate, size)
    return None


def notes(request: ClipRequest, generator: ClipGenerator) -> Iterator[str]:
    """What a user should know of a clip before waiting for it."""
    settings, trained = request.settings, generator.training
    if request.given is not None:
        yield from request.given.notes
    if (odd := odd_part(settings.prompt)) is not None:
        yield f"'{settings.prompt}' is taken as one plain prompt, since '{odd}' does not begin with a frame and a colon"
    if not trained.has_time:
        yield "this checkpoint has not been trained on time: every frame is a picture of its own"
    elif trained.frames is not None:
        at_once = min(settings.window or settings.frames, settings.frames)
        if at_once != trained.frames:
            yield f"clips of {at_once} frames: trained on {trained.frames}; any length works, far ones may drift"
    if generator.is_told_fps and trained.rates:
        high, low = trained.rates[0], trained.rates[-1]
        for fps in rates_of(request.plan, settings):
            if not 0.999 * low <= fps <= 1.001 * high:
                rates = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
                yield f"{fps:.3g} frames a second: trained on {rates}; motion may be wrong outside of that"
    if trained.max_known_noise is not None:
        yield from _notes_on_noise(settings.known_noise, trained.max_known_noise, request.plan)


def _notes_on_noise(level: int, most: int, plan: Plan | None) -> Iterator[str]:
    if level > most:
        yield f"noise of step {level} on known frames: trained on none beyond step {most}"
    if most and not level and _has_followers(plan):
        yield f"in several windows: --known-noise, here up to {most}, makes going on from earlier ones more robust"


def _has_followers(plan: Plan | None) -> bool:
    """Whether windows know frames that earlier ones made."""
    return plan is not None and any(window.known - plan.given for window in plan.windows)


def _read_files(options: Mapping[str, Any]) -> tuple[GivenFiles, int]:
    """The files of given frames and how many times the frames of a video there should be."""
    files = {name: options.get(name) for name in (*SOURCES, "mask")}
    sources = [f"--{name.replace('_', '-')}" for name in SOURCES if files[name] is not None]
    if len(sources) > 1:
        raise UserError(f"{sources[0]}: expected one way to give frames, found {' and '.join(sources)}; choose one")
    if files["mask"] is not None and not sources:
        raise UserError(
            "--mask: expected --init-image, --init-video or --interpolate beside it, from which what is black is kept, "
            "found none of them"
        )
    factor = 1
    if files["interpolate"] is not None:
        times, video = files["interpolate"]
        if not times.isdecimal() or int(times) not in FACTORS:
            raise UserError(
                f"--interpolate: expected a number of times from {FACTORS[0]} to {FACTORS[-1]} before the video, found "
                f"{times!r}"
            )
        if "frames" in options:
            raise UserError("--frames: cannot be given beside --interpolate, where the length follows from the video")
        factor, files["interpolate"] = int(times), Path(video)
    return GivenFiles(**files), factor


def _with_windows(settings: ClipSettings, trained: Training, options: Mapping[str, Any]) -> ClipSettings:
    """The settings with `window` and `overlap` filled in; pictures of their own need no more than one window."""
    length = trained.frames or DEFAULT_FRAMES
    if length == 1 or not trained.has_time:
        length = max(2, settings.frames)
    window = min(options.get("window", settings.frames if settings.frames <= 2 * length else length), settings.frames)
    third = max(2, options.get("window", length) // 3)
    return replace(settings, window=window, overlap=options.get("overlap", max(1, min(third, window - 1))))
