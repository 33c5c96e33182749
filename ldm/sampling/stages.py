"""Clips of any length from a network that samples short ones: keyframes, in-betweens, continuations.

A plan lists which frames are sampled when. Keyframes come first, spaced to fill about one window; more of them are
continued from the last frames of the window before. Then windows that know two neighbouring keyframes fill the gap at
four times the frame rate, repeatedly, until all frames exist: 5 -> 17 -> 65 (interpolation as in Singer et al. 2022,
"Make-A-Video", section 3.3; one network conditioned on frame rate and known frames as in Harvey et al. 2022, "Flexible
Diffusion Modeling of Long Videos"). Every frame is sampled once, and no window exceeds the network's. Given frames
closer together than the keyframes are first continued at their own rate, and the keyframes continue their motion.
Networks and sampling of a window are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.sampling.denoisers import KnownLatents, check_overlap
from ldm.sampling.settings import MAX_FRAMES

FACTOR = 4  # of the frame rate, from one stage to the next


@dataclass(frozen=True)
class FrameWindow:
    """One call of the network: evenly spaced `frames` of the clip, of which those in `known` are conditions."""

    frames: range
    known: frozenset[int]

    @property
    def made(self) -> list[int]:
        """The frames that this window adds."""
        return [frame for frame in self.frames if frame not in self.known]


@dataclass(frozen=True)
class Stage:
    """Windows that in order make `frames` of the clip, every `frames.step`-th from the first.

    name: for the user. num_before: frames of the stage before if this one interpolates, otherwise 0.
    """

    name: str
    frames: range
    windows: tuple[FrameWindow, ...]
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
class ClipPlan:
    """The stages of a clip of `num_frames` frames, of which those in `given` are known from the start."""

    num_frames: int
    given: frozenset[int]
    stages: tuple[Stage, ...]

    @property
    def windows(self) -> list[FrameWindow]:
        """All windows in sampling order; each runs through all diffusion steps."""
        return [window for stage in self.stages for window in stage.windows]

    @property
    def num_evaluations(self) -> int:
        """Frames evaluated by the network in one diffusion step of every window."""
        return sum(len(window.frames) for window in self.windows)

    def describe(self, fps: float) -> list[str]:
        """One line per stage, and a total if there are several windows. fps: of the clip."""
        lines = [stage.describe(fps) for stage in self.stages]
        if len(self.windows) > 1:
            num_made = self.num_frames - len(self.given)
            share = self.num_evaluations / num_made
            lines.append(f"total: {len(self.windows)} windows, {share:.2f} frames evaluated per new frame")
        return lines


def plan_stages(
    frames: int, window: int, overlap: int, max_levels: int = 0, given: Iterable[int] = (), factor: int = FACTOR
) -> ClipPlan:
    """Plan a clip of `frames` frames for a network that samples up to `window` frames together.

    overlap: known frames at the start of a continuation, 1 to window - 1.
    max_levels: how often the clip's frame rate can be divided by `factor` within the rates of training, see
        `count_levels`; 0: continuation only.
    given: indices of wholly known frames.
    factor: 2 if the window is too small for it; a window of 2 frames only continues.

    Raises UserError for an impossible plan.
    """
    given = _check(frames, window, overlap, given)
    widest = factor**max_levels
    factor = factor if factor < window else 2
    spacings = [1]
    # Two windows of keyframes, the second a continuation, are as good as one and cheaper than another stage.
    while window > factor and _count(frames, spacings[-1]) > max(window, 2 * window - overlap):
        if spacings[-1] * factor > widest:
            break
        spacings.append(spacings[-1] * factor)
    return _plan(frames, window, overlap, spacings[::-1], given)


def plan_interpolation(
    frames: int, times: int, window: int, overlap: int, given: Iterable[int] | None = None
) -> ClipPlan:
    """Plan a clip of which every `times`-th frame, from the first to the last, is given.

    frames: of the clip, (number of given frames - 1) * times + 1.
    times: a product of factors up to window - 1.
    given: indices of wholly known frames, possibly none under a mask of pixels; None: every `times`-th.

    Raises UserError for an impossible plan.
    """
    if times < 2:
        raise UserError(f"interpolate: expected a factor of at least 2, found {times}")
    if frames < times + 1 or (frames - 1) % times:
        raise UserError(
            f"interpolate: expected at least 2 given frames, each {times} frames after the last, found "
            f"{(frames - 1) // times + 1}"
        )
    given = _check(frames, window, overlap, range(0, frames, times) if given is None else given)
    spacings = [times]
    for factor in _factors(times, window):
        spacings.append(spacings[-1] // factor)
    return _plan(frames, window, overlap, spacings, given)


def count_levels(fps: float, lowest_fps: float, factor: int = FACTOR) -> int:
    """How often `fps` can be divided by `factor` and stay at or above `lowest_fps`, that of the widest stride."""
    levels = 0
    while fps / factor ** (levels + 1) >= 0.999 * lowest_fps:  # tolerates 9.99 for 10
        levels += 1
    return levels


def _check(frames: int, window: int, overlap: int, given: Iterable[int]) -> frozenset[int]:
    if not 1 <= frames <= MAX_FRAMES:
        raise UserError(f"frames: expected 1 to {MAX_FRAMES}, found {frames}")
    if frames > window:
        check_overlap(window, overlap)
    given = frozenset(given)
    if outside := sorted(given - set(range(frames))):
        raise UserError(f"given frames: expected indices from 0 to {frames - 1}, found {outside[0]}")
    return given


def _factors(times: int, window: int) -> list[int]:
    """Factors of `times` that fit a window, coarsest stage first: 4, then 2, then odd ones."""
    factors, rest = [], times
    for factor in (4, 2, *range(3, window, 2)):
        while factor < window and rest % factor == 0:
            factors.append(factor)
            rest //= factor
    if rest > 1:
        possible = [near for near in range(2, 2 * times) if _splits(near, window)]
        if not possible:
            raise UserError(f"window: expected at least 3 frames for interpolation, found {window}")
        nearest = sorted(possible, key=lambda near: abs(near - times))[:2]
        raise UserError(
            f"interpolate: expected a product of factors up to {window - 1}, as a window of {window} frames allows, "
            f"found {times}; use {' or '.join(map(str, sorted(nearest)))}, or a window of at least {rest + 1}"
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


def _plan(frames: int, window: int, overlap: int, spacings: Sequence[int], given: frozenset[int]) -> ClipPlan:
    """Stages from the widest spacing to 1, without empty ones."""
    there = set(given)
    stages, before = list(_begin(frames, window, overlap, spacings, there)), None
    for spacing in spacings:
        grid = range(0, frames, spacing)
        if before is None:
            name, windows = "keyframes" if spacing > 1 else "frames", _continue(grid, there, window, overlap)
        else:
            name, windows = "in between", _fill(grid, before.step // spacing, there, window, overlap)
        if windows := tuple(windows):
            stages.append(Stage(name, grid, windows, 0 if before is None else len(before)))
        before = grid
    return ClipPlan(frames, given, tuple(stages))


def _begin(frames: int, window: int, overlap: int, spacings: Sequence[int], there: set[int]) -> Iterator[Stage]:
    """From spacing 1 up, a window that continues the first given frames if the wider spacing contains only one of them.

    One frame shows no motion; with this window the wider spacing knows two.
    """
    for wider, spacing in reversed(list(pairwise(spacings))):
        grid = range(0, frames, spacing)
        num_there = _count_first(grid, there)
        if num_there >= 2 and _count_first(range(0, frames, wider), there) < 2:
            first = max(0, num_there - overlap)
            begun = grid[: first + window]
            yield Stage("beginning", begun, (_window(begun[first:], there),))


def _count_first(grid: range, there: set[int]) -> int:
    """How many of the frames exist before the first gap."""
    return next((index for index, frame in enumerate(grid) if frame not in there), len(grid))


def _window(frames: range, there: set[int]) -> FrameWindow:
    """A window over `frames`; adds them to `there`."""
    window = FrameWindow(frames, frozenset(there.intersection(frames)))
    there.update(frames)
    return window


def _continue(grid: range, there: set[int], window: int, overlap: int) -> Iterator[FrameWindow]:
    """Windows from left to right; each knows up to `overlap` frames before the first missing one."""
    for index, frame in enumerate(grid):
        if frame not in there:
            first = max(0, index - overlap)
            yield _window(grid[first : first + window], there)


def _fill(grid: range, factor: int, there: set[int], window: int, overlap: int) -> Iterator[FrameWindow]:
    """Windows over the gaps between every `factor`-th frame, as many as fit, and over the frames after the last."""
    last, gap = len(grid) - 1, 0
    num_gaps = last // factor
    while gap < num_gaps:
        if there.issuperset(grid[gap * factor : (gap + 1) * factor]):
            gap += 1
            continue
        first, gap = gap * factor, min(gap + (window - 1) // factor, num_gaps)
        end = last if gap == num_gaps and last - first < window else gap * factor
        yield _window(grid[first : end + 1], there)
    beyond = last - num_gaps * factor
    yield from _continue(grid, there, window, min(overlap, window - beyond))


@dataclass(frozen=True)
class WindowTask:
    """One window to sample.

    frames: indices of its frames in the clip; known: which of their latents are known.
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
    plan: ClipPlan,
    sample_window: Callable[[WindowTask], Tensor],
    draw_noise: Callable[[int], Tensor],
    given: KnownLatents | None = None,
    known_noise: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample a clip as planned -> scaled latents `b t c h w`, float32, given ones bit for bit.

    sample_window: returns the latents `b t c h w` of a window, known ones unchanged.
    draw_noise: start noise `b t c h w` for a number of frames, on the CPU; called once per stage, whose windows take
        their frames from it. With one generator per sample, also for later noise, a sample depends on its seed and the
        plan alone.
    given: known latents of the whole clip, batch `b` or 1; its level is not read.
    known_noise: diffusion step of the noise on all known frames of a window, as in training, if any of them was
        sampled (Ho et al. 2021, "Cascaded Diffusion Models", section 4); 0 for none.
    progress: called with (done, total) diffusion steps of all windows.
    """
    whole = set() if given is None else set(given.whole_frames())
    assert plan.given <= whole, "the plan expects given frames that are missing"
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
            known = _known_in(window, clip, given)
            known = replace(known, level=known_noise if window.known - plan.given else 0)
            start = noise[:, inside].to(device)
            made = sample_window(WindowTask(window.frames, stage.spacing, start, known, shown))
            clip[:, window.made] = made[:, [window.frames.index(frame) for frame in window.made]].to(clip)
            num_done += 1
    assert clip is not None, "a plan without windows needs given frames"
    return clip


def _known_in(window: FrameWindow, clip: Tensor, given: KnownLatents | None) -> KnownLatents:
    """Known latents of a window: given ones, and frames sampled before."""
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
