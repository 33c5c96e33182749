"""Clips made as planned: conditions of each window, results, and samples that depend on their seed alone."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from ldm.diffusion.noise import NoiseFamily
from ldm.diffusion.schedule import NoiseSchedule
from ldm.modules.unet import UNetModel
from ldm.sampling.denoisers import GuidedDenoiser, KnownDenoiser, KnownLatents
from ldm.sampling.loop import build_scheduler, initial_noise, sample
from ldm.sampling.stages import plan_stages, sample_plan


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
            else:
                assert task.known.mask[:, index].all()
                self.made[frame] = number
        return task.known.restore(made)


def test_windows_know_earlier_frames_and_change_none():
    plan, windows, shown = plan_stages(50, 5, 2, 2), NumberedWindows(), []
    clip = sample_plan(plan, windows, noise_of(1, 2), known_noise=7, progress=lambda *state: shown.append(state))
    assert clip.shape == (2, 50, 4, 4, 4)
    assert [clip[0, frame, 0, 0, 0].item() for frame in range(50)] == [windows.made[frame] for frame in range(50)]
    assert [task.spacing for task in windows.tasks] == [s.spacing for s in plan.stages for _ in s.windows]
    assert [task.known.level for task in windows.tasks] == [0] + [7] * (len(windows.tasks) - 1)
    assert shown == [(done, 2 * len(plan.windows)) for done in range(1, 2 * len(plan.windows) + 1)]


def test_given_frames_are_returned_bit_for_bit():
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
        left.append(task.known.mask[..., :2].sum())
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
