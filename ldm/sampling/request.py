"""From options or a record to a clip that can be sampled: defaults, given files, plan, notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.sampling.denoisers import overlapping_windows
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.given_frames import FACTORS, GivenFrames, space_out_video, start_from_picture, start_from_video
from ldm.sampling.prompts import is_schedule, odd_part, prompts_in, unread_syntax
from ldm.sampling.settings import DEFAULT_FPS, DEFAULT_FRAMES, SD_V1_SIZE, ClipSettings, GivenFiles, TrainingClips
from ldm.sampling.stages import ClipPlan

SOURCES = ("init_image", "init_video", "interpolate")  # a clip has at most one of them
# File of given frames -> the kind of known frames that trains the network for it.
TRAINED_BY = {"init_image": "first", "init_video": "previous", "interpolate": "every", "mask": "pixels"}


@dataclass(frozen=True)
class ClipRequest:
    """Checked settings of a clip, its given frames and their files, its plan, and the options that it was read from."""

    settings: ClipSettings
    files: GivenFiles
    given: GivenFrames | None
    plan: ClipPlan | None
    options: Mapping[str, Any] = field(default_factory=dict)  # without the checkpoint's defaults

    @property
    def prompts(self) -> list[str]:
        """All texts to encode."""
        return [*prompts_in(self.settings.prompt, self.settings.frames), self.settings.negative_prompt]

    @property
    def rates(self) -> list[float]:
        """The distinct frame rates of all windows, highest first."""
        spacings = {1} if self.plan is None else {stage.spacing for stage in self.plan.stages}
        return [self.settings.fps / spacing for spacing in sorted(spacings)]

    def describe(self) -> list[str]:
        """How the clip is sampled, one line per stage."""
        settings = self.settings
        if self.plan is not None:
            return self.plan.describe(settings.fps)
        num = len(overlapping_windows(settings.frames, settings.window or settings.frames, settings.overlap))
        windows = "one window" if num == 1 else f"{num} overlapping windows of {settings.window}"
        return [f"{settings.frames} frames at {settings.fps:.3g} fps in {windows}"]


def read_request(options: Mapping[str, Any], generator: ClipGenerator) -> ClipRequest:
    """The clip of some options; missing ones are as the checkpoint suggests, or as in training. Raises UserError."""
    training = generator.training
    files, factor = _read_files(options)
    explicit, options = options, {**generator.defaults, **options}
    for name, path in asdict(files).items():
        if path is not None:
            generator.check_given(flag(name))
    height, width = training.size or (SD_V1_SIZE, SD_V1_SIZE)
    names = {field.name for field in fields(ClipSettings)} & set(options) - {"interpolate"}
    values = {
        "frames": training.frames or DEFAULT_FRAMES,
        "fps": training.fps or DEFAULT_FPS,
        "height": options.get("H", height),
        "width": options.get("W", width),
        "interpolate": factor,
        **{name: options[name] for name in names},
    }
    settings = ClipSettings(**values)
    if files.interpolate is None:
        settings = _with_windows(settings, training, options)
        generator.check(settings)  # before files are opened
    else:
        generator.check(replace(settings, prompt=""))  # a schedule is checked when the length is known
    given = read_given(settings, files)
    if files.interpolate is not None:
        settings = replace(settings, frames=len(given.shown), fps=explicit.get("fps", given.fps))
        settings = _with_windows(settings, training, options)
    return ClipRequest(settings, files, given, generator.plan(settings, given), explicit)


def repeat_request(clip: Mapping[str, Any], files: GivenFiles, generator: ClipGenerator) -> ClipRequest:
    """The clip of a record, from its `clip` and files; raises UserError."""
    settings = ClipSettings(**clip)
    generator.check(settings)
    for name, path in asdict(files).items():
        if path is not None:
            generator.check_given(name)
    given = read_given(settings, files)
    if given is not None and len(given.shown) != settings.frames:
        raise UserError(
            f"clip.frames: expected {len(given.shown)} to match {files.interpolate}, found {settings.frames}"
        )
    return ClipRequest(settings, files, given, generator.plan(settings, given))


def read_given(settings: ClipSettings, files: GivenFiles) -> GivenFrames | None:
    """Read given frames for a clip; None if there are none. Raises UserError."""
    size = settings.height, settings.width
    if files.init_image is not None:
        return start_from_picture(files.init_image, files.mask, settings.frames, size)
    if files.init_video is not None:
        return start_from_video(files.init_video, files.mask, settings.frames, settings.fps, size, settings.overlap)
    if files.interpolate is not None:
        return space_out_video(files.interpolate, files.mask, settings.interpolate, size)
    return None


def flag(name: str) -> str:
    """The command-line option of a setting."""
    return f"--{name.replace('_', '-')}"


def notes(request: ClipRequest, generator: ClipGenerator) -> Iterator[str]:
    """What the user should know before waiting for a clip."""
    settings, training = request.settings, generator.training
    if request.given is not None:
        yield from request.given.notes
    yield from _notes_on_prompts(request)
    yield from _without_effect(request)
    if not training.has_time:
        yield "this checkpoint has no trained temporal layers: its frames are independent images"
    else:
        yield from _notes_on_length(settings, training.frames)
        yield from _notes_on_rates(request, generator)
    if training.known_kinds is not None:
        for name, kind in TRAINED_BY.items():
            if getattr(request.files, name) is not None and kind not in training.known_kinds:
                yield f"{flag(name)}: training had no such known frames ({kind}); the network may ignore them"
    if training.max_known_noise is not None:
        yield from _notes_on_noise(settings.known_noise, training.max_known_noise, request.plan)


def _notes_on_prompts(request: ClipRequest) -> Iterator[str]:
    settings = request.settings
    if (odd := odd_part(settings.prompt)) is not None:
        yield f"'{settings.prompt}' is read as one plain prompt: '{odd}' does not begin with a frame and a colon"
    for text in request.prompts:
        if (syntax := unread_syntax(text)) is not None:
            yield f"'{syntax}' is read as plain text: words of a prompt have no weights, and it loads no files"
    if is_schedule(settings.negative_prompt):
        yield f"--negative-prompt is one text for all frames: '{settings.negative_prompt}' is read as plain text"


def _without_effect(request: ClipRequest) -> Iterator[str]:
    """Options that were given and change nothing in this clip."""
    settings, plan = request.settings, request.plan
    is_single = settings.frames <= (settings.window or settings.frames)
    continues = plan is not None and any(window.known - plan.given for window in plan.windows)
    for name, is_unused, reason in (
        ("negative_prompt", settings.negative_prompt and settings.scale == 1, "at scale 1; set --scale above 1"),
        ("known_noise", settings.known_noise and not continues, "where no window continues an earlier one"),
        ("overlap", is_single and request.files.init_video is None, "in a clip of one window"),
        ("motion_scale", settings.motion_scale != 1 and settings.frames == 1, "on a single frame"),
        ("fps", settings.frames == 1, "on a single frame"),
    ):
        if name in request.options and is_unused:
            yield f"{flag(name)} has no effect {reason}"


def _notes_on_length(settings: ClipSettings, trained: int | None) -> Iterator[str]:
    length = min(settings.window or settings.frames, settings.frames)
    if trained is not None and length != trained:
        windows = f"windows of {length} frames" if length > 1 else "a single frame"
        yield f"{windows}: trained on {trained}; motion may drift at other lengths"


def _notes_on_rates(request: ClipRequest, generator: ClipGenerator) -> Iterator[str]:
    training = generator.training
    if not training.rates or request.settings.frames == 1:
        return
    high, low = training.rates[0], training.rates[-1]
    rates = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    if generator.has_fps_embedding:
        for fps in request.rates:
            if not 0.999 * low <= fps <= 1.001 * high:
                yield f"{fps:.3g} frames a second: trained on {rates}; motion may be wrong at other rates"
    elif not 0.999 * low <= request.settings.fps <= 1.001 * high:
        yield (
            f"{request.settings.fps:.3g} frames a second: trained on {rates} and not conditioned on the rate; motion "
            f"plays at {request.settings.fps / high:.3g} times its speed"
        )


def _notes_on_noise(level: int, max_level: int, plan: ClipPlan | None) -> Iterator[str]:
    if level > max_level:
        yield f"noise of step {level} on known frames: trained up to step {max_level}"
    continues = plan is not None and any(window.known - plan.given for window in plan.windows)
    if max_level and not level and continues:
        yield f"several windows: --known-noise, up to {max_level}, makes continuations more robust to errors"


def _read_files(options: Mapping[str, Any]) -> tuple[GivenFiles, int]:
    """The files of given frames and the interpolation factor, 1 for none."""
    files = {name: options.get(name) for name in (*SOURCES, "mask")}
    sources = [flag(name) for name in SOURCES if files[name] is not None]
    if len(sources) > 1:
        raise UserError(f"{sources[0]}: expected one source of given frames, found {' and '.join(sources)}; choose one")
    if files["mask"] is not None and not sources:
        raise UserError("--mask: expected --init-image, --init-video or --interpolate with it, found none of them")
    factor = 1
    if files["interpolate"] is not None:
        times, video = files["interpolate"]
        if not times.isdecimal() or int(times) not in FACTORS:
            raise UserError(
                f"--interpolate: expected a factor of {FACTORS[0]} to {FACTORS[-1]} before the video, found {times!r}"
            )
        if "frames" in options:
            raise UserError("--frames: expected no value with --interpolate, which sets the length; leave it out")
        factor, files["interpolate"] = int(times), Path(video)
    return GivenFiles(**files), factor


def _with_windows(settings: ClipSettings, training: TrainingClips, options: Mapping[str, Any]) -> ClipSettings:
    """Fill in `window` and `overlap`; independent images need a single window."""
    length = training.frames or DEFAULT_FRAMES
    if length == 1 or not training.has_time:
        length = max(2, settings.frames)
    window = min(options.get("window", settings.frames if settings.frames <= 2 * length else length), settings.frames)
    third = max(2, options.get("window", length) // 3)
    return replace(settings, window=window, overlap=options.get("overlap", max(1, min(third, window - 1))))
