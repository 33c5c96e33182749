"""Clips of any length from a network that makes short ones: keyframes, frames in between, continuations.

A plan says which frames are made when. The keyframes come first, so far apart that they fill about one window; where
there are more, the next window goes on from the last frames of the one before. Then every gap between two keyframes is
filled by a window that knows them, at four times the frame rate, and again, until all frames are there: 5 -> 17 -> 65
frames (Singer et al. 2022, "Make-A-Video", section 3.3, interpolates so; the scheme of one network that is told the
frame rate and which frames are known is that of Harvey et al. 2022, "Flexible Diffusion Modeling of Long Videos").
Every frame is made once and none in vain, and no window is longer than the network's. Given frames that lie closer
together than the keyframes are continued at their own rate first, so that the keyframes go on with their motion. How a
window is made, and any network, is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.sampling.denoisers import KnownLatents, check_overlap

MAX_FRAMES = 10_000
FACTOR = 4  # of the frame rate, from one stage to the next


@dataclass(frozen=True)
class Window:
    """What the network makes at a time: `frames` of the clip, evenly spaced, of which it is told those in `known`."""

    frames: range
    known: frozenset[int]

    @property
    def made(self) -> list[int]:
        """The frames that come of it."""
        return [frame for frame in self.frames if frame not in self.known]


@dataclass(frozen=True)
class Stage:
    """Windows that, one after the other, bring `frames` of the clip into being, every `frames.step`-th from the first.

    name: for the user. num_before: frames of the stage before, if this one makes those in between; else 0.
    """

    name: str
    frames: range
    windows: tuple[Window, ...]
    num_before: int = 0

    @property
    def spacing(self) -> int:
        """The clip's frame rate divided by the one that the windows have."""
        return self.frames.step

    def describe(self, fps: float) -> str:
        """One line; fps: of the clip."""
        before = f"{self.num_before} -> " if self.num_before else ""
        frames = "1 frame" if len(self.frames) == 1 else f"{len(self.frames)} frames"
        windows = "1 window" if len(self.windows) == 1 else f"{len(self.windows)} windows"
        return f"{self.name}: {before}{frames} at {fps / self.spacing:.3g} fps in {windows}"


@dataclass(frozen=True)
class Plan:
    """How a clip of `num_frames` frames is made; those in `given` are there from the start."""

    num_frames: int
    given: frozenset[int]
    stages: tuple[Stage, ...]

    @property
    def windows(self) -> list[Window]:
        """All windows in the order in which they are made; each is sampled on its own, in all diffusion steps."""
        return [window for stage in self.stages for window in stage.windows]

    @property
    def num_evaluations(self) -> int:
        """Frames that go through the network in one diffusion step of every window."""
        return sum(len(window.frames) for window in self.windows)

    def describe(self, fps: float) -> list[str]:
        """A line for each stage, for the user to read before it starts, and one for all where they are several."""
        lines = [stage.describe(fps) for stage in self.stages]
        if len(self.windows) > 1:
            num_made = self.num_frames - len(self.given)
            share = self.num_evaluations / num_made
            lines.append(f"together: {len(self.windows)} windows, {share:.2f} frames of them for each one made")
        return lines


def plan_stages(
    frames: int, window: int, overlap: int, max_levels: int = 0, given: Iterable[int] = (), factor: int = FACTOR
) -> Plan:
    """The plan of a clip of `frames` frames for a network that makes up to `window` of them at a time.

    overlap: frames that a continuation knows of what it continues, 1 to window - 1.
    max_levels: how often the frame rate of the clip may be divided by `factor` without falling below the lowest one
        the network was trained on; see `count_levels`. With 0 everything is made by continuation.
    given: frames that are wholly known, by number.
    factor: a window too small for it takes 2, and one of 2 frames continues only.

    Raises UserError for what cannot be planned.
    """
    given = _check(frames, window, overlap, given)
    widest = factor**max_levels
    factor = factor if factor < window else 2
    spacings = [1]
    # One window of keyframes and one that goes on from it are as good as one window, and cheaper than more stages.
    while window > factor and _count(frames, spacings[-1]) > max(window, 2 * window - overlap):
        if spacings[-1] * factor > widest:
            break
        spacings.append(spacings[-1] * factor)
    return _plan(frames, window, overlap, spacings[::-1], given)


def plan_interpolation(frames: int, times: int, window: int, overlap: int, given: Iterable[int] | None = None) -> Plan:
    """The plan of a clip of which every `times`-th frame, from the first to the last, is given.

    frames: of the clip, (number of given ones - 1) * times + 1.
    times: a product of factors that fit the window, each up to window - 1.
    given: those that are wholly known; None: every `times`-th. With a mask of pixels there may be none.

    Raises UserError for what cannot be planned.
    """
    if times < 2:
        raise UserError(f"interpolate: expected a number of times from 2, found {times}")
    if frames < times + 1 or (frames - 1) % times:
        raise UserError(
            f"interpolate: expected at least 2 frames to put others in between, {times} times as many, found "
            f"{(frames - 1) // times + 1}"
        )
    given = _check(frames, window, overlap, range(0, frames, times) if given is None else given)
    spacings = [times]
    for factor in _factors(times, window):
        spacings.append(spacings[-1] // factor)
    return _plan(frames, window, overlap, spacings, given)


def count_levels(fps: float, lowest_fps: float, factor: int = FACTOR) -> int:
    """How often `fps` can be divided by `factor` without falling below `lowest_fps`, that of the widest stride."""
    levels = 0
    while fps / factor ** (levels + 1) >= 0.999 * lowest_fps:  # 9.99 frames a second are 10
        levels += 1
    return levels


def _check(frames: int, window: int, overlap: int, given: Iterable[int]) -> frozenset[int]:
    if not 1 <= frames <= MAX_FRAMES:
        raise UserError(f"frames: expected 1 to {MAX_FRAMES}, found {frames}")
    if frames > window:
        check_overlap(window, overlap)
    given = frozenset(given)
    if outside := sorted(given - set(range(frames))):
        raise UserError(f"given frames: expected numbers from 0 to {frames - 1}, found {outside[0]}")
    return given


def _factors(times: int, window: int) -> list[int]:
    """Factors of `times` that fit a window, 4 first, then 2, then odd ones; the first is that of the coarsest stage."""
    factors, rest = [], times
    for factor in (4, 2, *range(3, window, 2)):
        while factor < window and rest % factor == 0:
            factors.append(factor)
            rest //= factor
    if rest > 1:
        possible = [near for near in range(2, 2 * times) if _splits(near, window)]
        if not possible:
            raise UserError(f"window: expected at least 3 frames to put frames in between, found {window}")
        nearest = sorted(possible, key=lambda near: abs(near - times))[:2]
        raise UserError(
            f"interpolate: expected a product of numbers up to {window - 1}, which fit a window of {window} frames, "
            f"found {times}; the nearest: {', '.join(map(str, sorted(nearest)))}. A window of {rest + 1} allows {times}"
        )
    return factors


def _splits(times: int, window: int) -> bool:
    for factor in range(2, window):
        while times % factor == 0:
            times //= factor
    return times == 1


def _count(frames: int, spacing: int) -> int:
    """Frames 0, spacing, 2 * spacing, ... of a clip."""
    return (frames - 1) // spacing + 1


def _plan(frames: int, window: int, overlap: int, spacings: Sequence[int], given: frozenset[int]) -> Plan:
    """Stages from the widest spacing to 1; those for which nothing is left to do are left out."""
    there = set(given)
    stages, before = list(_begin(frames, window, overlap, spacings, there)), None
    for spacing in spacings:
        places = range(0, frames, spacing)
        if before is None:
            name, windows = "keyframes" if spacing > 1 else "frames", _continue(places, there, window, overlap)
        else:
            name, windows = "in between", _fill(places, before.step // spacing, there, window, overlap)
        if windows := tuple(windows):
            stages.append(Stage(name, places, windows, 0 if before is None else len(before)))
        before = places
    return Plan(frames, given, tuple(stages))


def _begin(frames: int, window: int, overlap: int, spacings: Sequence[int], there: set[int]) -> Iterator[Stage]:
    """From spacing 1 up, a window that goes on from the first frames, wherever a wider spacing sees only one of them.

    One frame shows no motion; two of the wider spacing, made with all those known that were given, do.
    """
    for wider, spacing in reversed(list(pairwise(spacings))):
        places = range(0, frames, spacing)
        num_there = _count_first(places, there)
        if num_there >= 2 and _count_first(range(0, frames, wider), there) < 2:
            first = max(0, num_there - overlap)
            frames_there = places[: first + window]
            yield Stage("beginning", frames_there, (_window(frames_there[first:], there),))


def _count_first(places: range, there: set[int]) -> int:
    """How many places, from the first on, are there without a gap."""
    return next((index for index, place in enumerate(places) if place not in there), len(places))


def _window(frames: range, there: set[int]) -> Window:
    """A window that makes what is not there yet; from then on it is."""
    window = Window(frames, frozenset(there.intersection(frames)))
    there.update(frames)
    return window


def _continue(places: range, there: set[int], window: int, overlap: int) -> Iterator[Window]:
    """Windows from left to right; each knows up to `overlap` frames that lie before the first it has to make."""
    for index, place in enumerate(places):
        if place not in there:
            first = max(0, index - overlap)
            yield _window(places[first : first + window], there)


def _fill(places: range, factor: int, there: set[int], window: int, overlap: int) -> Iterator[Window]:
    """Windows over the gaps between every `factor`-th of the places, as many gaps as fit, and over what lies beyond."""
    last, gap = len(places) - 1, 0
    num_gaps = last // factor
    while gap < num_gaps:
        if there.issuperset(places[gap * factor : (gap + 1) * factor]):
            gap += 1
            continue
        first, gap = gap * factor, min(gap + (window - 1) // factor, num_gaps)
        end = last if gap == num_gaps and last - first < window else gap * factor
        yield _window(places[first : end + 1], there)
    beyond = last - num_gaps * factor
    yield from _continue(places, there, window, min(overlap, window - beyond))


@dataclass(frozen=True)
class WindowTask:
    """What is asked for one window of a clip.

    frames: the places `t` of its frames in the clip, evenly spaced; known: which of their latents are known.
    spacing: the clip's frame rate divided by that of the window.
    noise: start noise `b t c h w` on the clip's device.
    progress: to be called with (done, total) diffusion steps.
    """

    frames: range
    spacing: int
    noise: Tensor
    known: KnownLatents
    progress: Callable[[int, int], None]


@torch.no_grad()
def sample_plan(
    plan: Plan,
    sample_window: Callable[[WindowTask], Tensor],
    draw_noise: Callable[[int], Tensor],
    given: KnownLatents | None = None,
    known_noise: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Make a clip as planned -> scaled latents `b t c h w`, float32, with every given one as it was, bit for bit.

    sample_window: returns the latents `b t c h w` of a window, the known ones among them untouched.
    draw_noise: start noise of a clip of so many frames, `b t c h w`, on the CPU; asked once for each stage, whose
        windows take their frames out of it. Drawn from one generator per sample, from which whatever noise a window
        needs later is drawn too, it makes a sample depend on its seed and the plan alone, not on its batch.
    given: what is known of the whole clip, `b` or 1 of them; its level is not read.
    known_noise: diffusion step of the noise put on all known frames of a window, as in training, if the network made
        any of them itself (Ho et al. 2021, "Cascaded Diffusion Models", section 4); 0 for none.
    progress: called with (done, total) diffusion steps of all windows.
    """
    whole = set() if given is None else set(given.whole_frames())
    assert plan.given <= whole, "the plan takes frames as given that are not"
    clip = None if given is None else given.known_part().to(device, torch.float32)
    num_done, num_windows = 0, len(plan.windows)
    for stage in plan.stages:
        noise = draw_noise(len(stage.frames))
        if clip is None:
            clip = torch.zeros(len(noise), plan.num_frames, *noise.shape[2:], device=device)
        elif len(clip) != len(noise):
            clip = clip.expand(len(noise), -1, -1, -1, -1).clone()
        for window in stage.windows:

            def shown(done: int, total: int, num_done: int = num_done) -> None:
                if progress:
                    progress(num_done * total + done, num_windows * total)

            inside = slice(window.frames[0] // stage.spacing, window.frames[-1] // stage.spacing + 1)
            known = _known_in(window, plan.given, clip, given)
            known = replace(known, level=known_noise if window.known - plan.given else 0)
            start = noise[:, inside].to(device)
            made = sample_window(WindowTask(window.frames, stage.spacing, start, known, shown))
            clip[:, window.made] = made[:, [window.frames.index(frame) for frame in window.made]].to(clip)
            num_done += 1
    assert clip is not None, "a plan without windows has given frames"
    return clip


def _known_in(window: Window, given_frames: frozenset[int], clip: Tensor, given: KnownLatents | None) -> KnownLatents:
    """What is known of a window's frames: what was given of them, and what was made before."""
    latents = clip[:, window.frames.start : window.frames.stop : window.frames.step]
    if given is None:
        mask = latents.new_ones(len(latents), len(window.frames), 1, *latents.shape[-2:])
    else:
        mask = given.mask[:, window.frames.start : window.frames.stop : window.frames.step].to(latents)
        mask = mask.expand(len(latents), -1, -1, -1, -1).clone()
    for index, frame in enumerate(window.frames):
        if frame in window.known:
            mask[:, index] = 0
    return KnownLatents(latents, mask)
