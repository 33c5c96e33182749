"""Plans: every frame is made once, from frames that are there, in windows that fit; the work grows with the clip."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Generator

from ldm.errors import UserError
from ldm.models.diffusion.known import KnownDenoiser, KnownLatents
from ldm.models.diffusion.noise import NoiseFamily
from ldm.models.diffusion.sampling import GuidedDenoiser, build_scheduler, initial_noise, sample
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.models.diffusion.stages import Plan, count_levels, plan_interpolation, plan_stages, sample_plan
from ldm.modules.unet import UNetModel

SETTINGS = [
    (window, overlap, levels)
    for window in (2, 3, 4, 5, 6, 9, 16, 17)
    for overlap in {1, window // 2, window - 1}
    for levels in (0, 1, 2, 3)
]


def check(plan: Plan, window: int) -> None:
    """What has to be true of every plan."""
    there, before = set(plan.given), None
    for stage in plan.stages:
        assert stage.frames == range(0, plan.num_frames, stage.spacing)[: len(stage.frames)]
        for one in stage.windows:
            assert 1 <= len(one.frames) <= window
            assert one.frames.step == stage.spacing
            assert one.known == there & set(one.frames)
            assert one.made and not there & set(one.made)
            assert one.known or not there or plan.given  # nothing but the first window starts from nothing
            there |= set(one.made)
        assert there >= set(stage.frames)
        if stage.name != "beginning":
            assert len(stage.frames) == len(range(0, plan.num_frames, stage.spacing))
            assert before is None or (before.step % stage.spacing == 0 and stage.num_before == len(before))
            before = stage.frames
    assert there == set(range(plan.num_frames))


@pytest.mark.parametrize(("window", "overlap", "levels"), SETTINGS)
def test_every_frame_is_made_once_from_frames_that_are_there(window, overlap, levels):
    for frames in (*range(1, 60), *range(61, 301, 9)):
        plan = plan_stages(frames, window, overlap, levels)
        check(plan, window)
        assert max(stage.spacing for stage in plan.stages) <= 4**levels
        assert plan.num_evaluations == sum(len(one.known) + len(one.made) for one in plan.windows)
        if frames <= window:
            assert [list(one.frames) for one in plan.windows] == [list(range(frames))]
        elif window > 4 and levels == 3:  # the keyframes fit one window and a continuation
            assert len(plan.stages[0].frames) <= 2 * window or plan.stages[0].spacing == 64


@pytest.mark.parametrize("frames", range(1, 301))
def test_every_length(frames):
    for window, overlap, levels in ((5, 2, 2), (16, 4, 1)):
        check(plan_stages(frames, window, overlap, levels), window)


@pytest.mark.parametrize(
    "given", [{0}, {0, 1}, set(range(9)), {0, 49}, {7, 8, 30}, set(range(0, 50, 3)), set(range(50))]
)
def test_given_frames_are_used_and_never_made(given):
    for window, overlap, levels in SETTINGS:
        plan = plan_stages(50, window, overlap, levels, given)
        made = [frame for one in plan.windows for frame in one.made]
        assert sorted(made) == sorted(set(range(50)) - given)
        check(plan, window)


def test_five_frames_become_seventeen_and_sixty_five():
    plan = plan_stages(65, 5, 1, max_levels=2)
    assert [len(stage.frames) for stage in plan.stages] == [5, 17, 65]
    assert [len(stage.windows) for stage in plan.stages] == [1, 4, 16]
    assert plan.stages[0].windows[0].frames == range(0, 65, 16) and not plan.stages[0].windows[0].known
    assert plan.stages[2].windows[3].frames == range(12, 17) and plan.stages[2].windows[3].known == {12, 16}
    assert plan.describe(10) == [
        "keyframes: 5 frames at 0.625 fps in 1 window",
        "in between: 5 -> 17 frames at 2.5 fps in 4 windows",
        "in between: 17 -> 65 frames at 10 fps in 16 windows",
        "together: 21 windows, 1.62 frames of them for each one made",
    ]


def test_a_larger_window_fills_several_gaps():
    plan = plan_stages(65, 17, 4, max_levels=2)
    assert [list(one.frames)[:: len(one.frames) - 1] for one in plan.stages[-1].windows] == [
        [0, 16], [16, 32], [32, 48], [48, 64],
    ]  # fmt: skip
    assert plan.stages[-1].windows[1].known == {16, 20, 24, 28, 32}


def test_the_lowest_frame_rate_of_training_bounds_the_keyframes():
    keyframes = plan_stages(181, 5, 2, max_levels=1).stages[0]
    assert keyframes.spacing == 4 and len(keyframes.frames) == 46
    assert list(keyframes.windows[1].frames) == [12, 16, 20, 24, 28] and keyframes.windows[1].known == {12, 16}
    assert [count_levels(*rates) for rates in ((10, 10), (10, 2.5), (8, 2.5), (9.99, 2.5), (10, 0.625), (2, 5))] == [
        0, 1, 0, 1, 2, 0,
    ]  # fmt: skip


def test_frames_beyond_the_last_keyframe_are_continued():
    """12 = 2 x 4 + 1 + 3: nothing is made that the clip has no use for."""
    last = plan_stages(12, 5, 1, max_levels=1).windows[-1]
    assert list(last.frames) == [8, 9, 10, 11] and last.known == {8}
    wide = plan_stages(46, 16, 4, max_levels=1).windows[-1]
    assert list(wide.frames) == list(range(36, 46)) and wide.known == {36, 40, 44}


def test_keyframes_go_on_with_the_motion_of_given_frames():
    """Two neighbours are given; the keyframes see the first of them alone, until frames are made that they do see."""
    plan = plan_stages(65, 5, 2, max_levels=2, given=[0, 1])
    assert [(list(one.frames), sorted(one.known)) for one in plan.windows[:3]] == [
        ([0, 1, 2, 3, 4], [0, 1]), ([0, 4, 8, 12, 16], [0, 4]), ([0, 16, 32, 48, 64], [0, 16]),
    ]  # fmt: skip
    assert [stage.name for stage in plan.stages] == ["beginning"] * 2 + ["keyframes"] + ["in between"] * 2
    assert plan.describe(10)[0] == "beginning: 5 frames at 10 fps in 1 window"
    assert plan.num_evaluations == plan_stages(65, 5, 2, max_levels=2).num_evaluations
    for given in ([0], [0, 16], range(17), [3, 4]):  # no motion, or one that the keyframes see
        assert plan_stages(65, 5, 2, max_levels=2, given=given).stages[0].name == "keyframes"
    assert plan_stages(65, 5, 2, max_levels=2, given=range(9)).windows[0].frames == range(4, 24, 4)


@pytest.mark.parametrize(("window", "overlap", "levels"), [(5, 1, 1), (5, 2, 1), (5, 2, 2), (16, 4, 1), (17, 4, 2)])
def test_work_is_linear_in_the_length(window, overlap, levels):
    lengths = np.array([33, 65, 97, 129, 181, 257, 401, 1000])
    work = np.array([plan_stages(int(n), window, overlap, levels).num_evaluations for n in lengths]) / lengths
    assert work.max() < 1.15 * work.min()


@pytest.mark.parametrize(("window", "factor"), [(5, 4), (17, 4), (4, 2), (3, 2)])
def test_a_small_window_doubles_instead(window, factor):
    spacings = [stage.spacing for stage in plan_stages(65, window, 1, max_levels=2).stages]
    assert spacings[-1] == 1 and all(a == factor * b for a, b in pairwise(spacings))


# interpolation


@pytest.mark.parametrize(
    ("times", "window", "spacings"),
    [
        (2, 5, [1]),
        (4, 5, [1]),
        (8, 5, [2, 1]),
        (16, 17, [4, 1]),
        (3, 5, [1]),
        (6, 5, [3, 1]),
        (12, 5, [3, 1]),
        (5, 6, [1]),
    ],
)
def test_interpolation_by_factors_that_fit(times, window, spacings):
    for num_given in (2, 3, 7):
        plan = plan_interpolation((num_given - 1) * times + 1, times, window, overlap=1)
        assert [stage.spacing for stage in plan.stages] == spacings
        assert plan.given == set(range(0, plan.num_frames, times))
        assert all({one.frames[0], one.frames[-1]} <= one.known for one in plan.windows)
        check(plan, window)


def test_interpolation_under_a_mask_makes_the_given_frames_first():
    plan = plan_interpolation(17, 4, 5, overlap=2, given=())
    assert plan.stages[0].spacing == 4 and plan.stages[0].windows[0].made == [0, 4, 8, 12, 16]
    check(plan, 5)


# making a clip


def seeded(*seeds):
    return [Generator().manual_seed(seed) for seed in seeds]


def noise_of(*seeds, family=None):
    generators = seeded(*seeds)
    return lambda frames: initial_noise(len(seeds), frames, 4, 4, 4, generators, family)


class NumberedWindows:
    """Makes latents that say when they were made, and checks what it is told."""

    def __init__(self, clip_given=None):
        self.tasks, self.made, self.given = [], {}, clip_given or {}

    def __call__(self, task):
        self.tasks.append(task)
        number = float(len(self.tasks))
        task.progress(1, 2)
        task.progress(2, 2)
        made = torch.full_like(task.noise, number)
        for index, frame in enumerate(task.frames):
            if frame in self.given or frame in self.made:
                expected = self.given.get(frame, self.made.get(frame))
                assert not task.known.mask[:, index].any()
                assert (task.known.latents[:, index] == expected).all()
                is_noised = frame not in self.given
                assert (task.known.made[:, index] == is_noised).all()
            else:
                assert task.known.mask[:, index].all()
                self.made[frame] = number
        return task.known.restore(made)


def test_windows_are_told_what_was_made_before_and_nothing_made_is_changed():
    plan, windows, shown = plan_stages(50, 5, 2, 2), NumberedWindows(), []
    clip = sample_plan(plan, windows, noise_of(1, 2), known_noise=7, progress=lambda *state: shown.append(state))
    assert clip.shape == (2, 50, 4, 4, 4)
    assert [clip[0, frame, 0, 0, 0].item() for frame in range(50)] == [windows.made[frame] for frame in range(50)]
    assert [task.spacing for task in windows.tasks] == [s.spacing for s in plan.stages for _ in s.windows]
    assert [task.known.level for task in windows.tasks] == [0] + [7] * (len(windows.tasks) - 1)
    assert shown == [(done, 2 * len(plan.windows)) for done in range(1, 2 * len(plan.windows) + 1)]


def test_given_frames_come_back_bit_for_bit_and_stay_clean():
    frames = torch.arange(3.0).view(1, 3, 1, 1, 1) / 3 + 0.1
    given = KnownLatents.placed(frames.expand(1, 3, 4, 4, 4), [0, 1, 20], 33)
    windows = NumberedWindows({frame: value.item() for frame, value in zip([0, 1, 20], frames.flatten(), strict=True)})
    plan = plan_stages(33, 5, 2, 1, given=given.whole_frames())
    clip = sample_plan(plan, windows, noise_of(1, 2, 3), given, known_noise=50)
    assert clip.shape[0] == 3 and torch.equal(clip[1, [0, 1, 20]], given.latents[0, [0, 1, 20]])
    assert windows.tasks[0].known.level == 0 and windows.tasks[1].known.level == 50


def test_a_mask_of_pixels_holds_in_every_window():
    latents = torch.randn(1, 17, 4, 4, 4, generator=Generator().manual_seed(0))
    mask = torch.ones(1, 17, 1, 4, 4)
    mask[..., :2] = 0
    mask[:, 5] = 0
    given = KnownLatents(latents, mask)
    assert given.whole_frames() == [5]
    left = []

    def sample_window(task):
        left.append(task.known.mask[..., :2].sum() + task.known.made[..., :2].sum())
        return task.known.restore(torch.zeros_like(task.noise))

    clip = sample_plan(plan_stages(17, 5, 1, 1, [5]), sample_window, noise_of(1), given, known_noise=9)
    assert torch.equal(clip[..., :2], latents[..., :2]) and torch.equal(clip[:, 5], latents[:, 5])
    assert not clip[:, [0, 4, 6, 16], :, :, 2:].any() and sum(left) == 0


def test_all_given_needs_no_network():
    given = KnownLatents.placed(torch.ones(1, 9, 4, 4, 4), range(9), 9)
    plan = plan_stages(9, 5, 1, 1, range(9))
    assert plan.describe(10) == [] and torch.equal(sample_plan(plan, None, None, given), given.latents)


def test_windows_of_a_stage_share_one_noise_of_the_family():
    """The keyframe between two windows has one noise; the noise of frames far apart is as alike as the family says."""
    windows, family = NumberedWindows(), NoiseFamily("mixed", share=0.6)

    def draw(frames):
        return initial_noise(1, frames, 4, 64, 64, generator, family)

    generator = Generator().manual_seed(3)
    sample_plan(plan_stages(33, 5, 1, 1), windows, draw)
    last_stage = [task for task in windows.tasks if task.spacing == 1]
    assert torch.equal(last_stage[0].noise[:, -1], last_stage[1].noise[:, 0])
    first, last = last_stage[0].noise[0, 0].flatten(), last_stage[-1].noise[0, -1].flatten()
    assert abs(torch.corrcoef(torch.stack([first, last]))[0, 1] - 0.6) < 0.02
    assert not torch.equal(windows.tasks[0].noise[:, 0], last_stage[0].noise[:, 0])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    unet = UNetModel(
        9, 4, 32, 1, [1], channel_mult=(1,), num_heads=2, context_dim=8, fps_embedding=True, known_level_embedding=True
    )
    with torch.no_grad():
        for parameter in unet.parameters():  # what is zero at the start counts too
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet.eval().requires_grad_(False)


def make(network, plan, seeds, given=None, known_noise=0, eta=0.0):
    """A clip from the real network, wired as a program would."""
    schedule, generators, rates = NoiseSchedule(parameterization="v"), seeded(*seeds), []
    context = torch.ones(len(seeds), 3, 8)

    def sample_window(task):
        rates.append(10 / task.spacing)
        denoiser = GuidedDenoiser(network, context, 0 * context, 2.0, fps=torch.full((len(seeds),), 10 / task.spacing))
        denoiser = KnownDenoiser(denoiser, schedule, task.known, task.noise, generators)
        scheduler = build_scheduler("ddim", schedule)
        return sample(denoiser, scheduler, task.noise, 2, generators, task.progress, eta, NoiseFamily())

    clip = sample_plan(
        plan, sample_window, lambda frames: initial_noise(len(seeds), frames, 4, 4, 4, generators), given, known_noise
    )
    return clip, rates


def test_the_real_network_follows_a_plan(network):
    start = torch.randn(1, 2, 4, 4, 4, generator=Generator().manual_seed(5))
    given = KnownLatents.placed(start, [0, 1], 11)
    plan = plan_stages(11, 5, 2, 1, given.whole_frames())
    clip, rates = make(network, plan, [1, 2], given, known_noise=30, eta=0.5)
    assert clip.isfinite().all() and torch.equal(clip[:, :2], start.expand(2, -1, -1, -1, -1))
    assert rates == [10 / stage.spacing for stage in plan.stages for _ in stage.windows] == [10.0, 2.5, 10.0, 10.0]
    alone, _ = make(network, plan, [2], given, known_noise=30, eta=0.5)
    assert torch.allclose(clip[1:], alone, atol=1e-4)  # a batch changes rounding alone
    assert not torch.allclose(clip[0], clip[1], atol=1e-2)
    clean, _ = make(network, plan, [2], given, known_noise=0, eta=0.5)
    assert not torch.allclose(clean, alone, atol=1e-4)


def test_a_clip_of_one_window_is_what_it_was_without_a_plan(network):
    schedule, context = NoiseSchedule(parameterization="v"), torch.ones(1, 3, 8)
    clip, _ = make(network, plan_stages(4, 5, 1, 1), [8], eta=0.5)
    generators = seeded(8)
    noise = initial_noise(1, 4, 4, 4, 4, generators)
    guided = GuidedDenoiser(network, context, 0 * context, 2.0, fps=torch.tensor([10.0]))
    denoiser = KnownDenoiser(guided, schedule, KnownLatents.nothing(noise), noise)
    assert torch.equal(sample(denoiser, build_scheduler("ddim", schedule), noise, 2, generators, eta=0.5), clip)


# bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_stages(0, 5, 1), "frames: expected 1 to 10000, found 0"),
        (lambda: plan_stages(-1, 5, 1), "frames: expected 1 to 10000, found -1"),
        (lambda: plan_stages(10_001, 5, 1), "frames: expected 1 to 10000, found 10001"),
        (lambda: plan_stages(2, 1, 1), "window: expected at least 2 frames, .* found 1"),
        (lambda: plan_stages(2, 0, 1), "window: expected at least 2 frames, .* found 0"),
        (lambda: plan_stages(9, 5, 5), "overlap: expected 1 to 4 frames, fewer than the 5 of a window, found 5"),
        (lambda: plan_stages(9, 5, 0), "overlap: expected 1 to 4 frames, .* found 0"),
        (lambda: plan_stages(9, 5, 1, given=[9]), "given frames: expected numbers from 0 to 8, found 9"),
        (lambda: plan_interpolation(1, 4, 5, 1), "interpolate: expected at least 2 frames .* found 1"),
        (lambda: plan_interpolation(5, 1, 5, 1), "interpolate: expected a number of times from 2, found 1"),
        (lambda: plan_interpolation(4, 3, 2, 1), "window: expected at least 3 frames to put frames .* found 2"),
        (
            lambda: plan_interpolation(15, 14, 5, 1),
            "a product of numbers up to 4, .* found 14; the nearest: 12, 16. A window of 8 allows 14",
        ),
        (
            lambda: plan_stages(6, 5, 1).check_network(False),
            "6 frames in stages: expected a network that takes known frames, .* in_channels 9 .* Overlapping windows",
        ),
        (lambda: plan_stages(5, 5, 1, given=[0]).check_network(False), "given frames: expected a network that takes"),
    ],
)  # fmt: skip
def test_bad_input_is_told_apart(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_one_window_from_nothing_suits_every_network():
    plan_stages(5, 5, 1).check_network(takes_known_frames=False)
    plan_stages(300, 5, 1, 1).check_network(takes_known_frames=True)
    assert plan_stages(1, 1, 1).describe(10) == ["frames: 1 frame at 10 fps in 1 window"]
