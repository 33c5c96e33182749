"""Overlapping windows: the mean of what they predict, the plain denoiser where one window is enough."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Generator

from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.sampling.denoisers import GuidedDenoiser, KnownDenoiser, KnownLatents, WindowedDenoiser, overlapping_windows
from ldm.sampling.loop import build_scheduler, sample

pytestmark = pytest.mark.numeric


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def mixing_network(latents, timesteps, context):
    """Every frame depends on all frames it is given, on its place among them and on the captions."""
    frames = latents.shape[1]
    place = torch.arange(frames, dtype=torch.float32).view(1, -1, 1, 1, 1) / frames
    caption = context.mean((-2, -1))
    caption = caption.view(*caption.shape, *[1] * (5 - caption.ndim))
    return (latents.mean(1, keepdim=True) + place * latents + caption).sin()


def test_every_window_is_full_and_the_last_one_ends_with_the_clip():
    for window in (2, 3, 5, 16):
        for overlap in range(1, window):
            for frames in range(1, 60):
                windows = overlapping_windows(frames, window, overlap)
                assert windows[0].start == 0 and windows[-1].stop == frames
                assert {one.stop - one.start for one in windows} == {min(frames, window)}
                steps = [after.start - before.start for before, after in pairwise(windows)]
                assert all(step == window - overlap for step in steps[:-1])
                assert all(0 < step <= window - overlap for step in steps)


@pytest.mark.parametrize(("frames", "window", "overlap"), [(11, 5, 2), (12, 5, 4), (13, 4, 1)])
@pytest.mark.parametrize("per_frame", [False, True])
def test_overlapping_predictions_are_averaged(frames, window, overlap, per_frame):
    latents, timesteps = randn(2, frames, 4, 3, 3), torch.tensor([5, 5])
    context, uncond = randn(*((2, frames) if per_frame else (2,)), 6, 8, seed=1), randn(1, 6, 8, seed=2)
    guided = GuidedDenoiser(mixing_network, context, uncond, 3.0)
    output = WindowedDenoiser(guided.of_frames, window, overlap)(latents, timesteps)

    predictions = [[] for _ in range(frames)]
    starts = [*range(0, frames - window, window - overlap), frames - window]
    for start in starts:
        captions = context[:, start : start + window] if per_frame else context
        alone = GuidedDenoiser(mixing_network, captions, uncond, 3.0)
        prediction = alone(latents[:, start : start + window], timesteps)
        for index in range(window):
            predictions[start + index].append(prediction[:, index])
    expected = torch.stack([torch.stack(each).mean(0) for each in predictions], dim=1)
    assert torch.allclose(output, expected, atol=1e-6)
    assert not torch.allclose(output, guided(latents, timesteps), atol=1e-3)


def test_one_window_is_the_plain_denoiser():
    latents, context = randn(1, 5, 4, 3, 3), randn(1, 5, 6, 8, seed=1)
    guided, schedule = GuidedDenoiser(mixing_network, context), NoiseSchedule()
    plain = sample(guided, build_scheduler("unipc", schedule), latents, 6)
    windowed = sample(WindowedDenoiser(guided.of_frames, 5, 2), build_scheduler("unipc", schedule), latents, 6)
    assert torch.equal(plain, windowed)


def test_the_network_never_sees_more_than_a_window():
    seen = []

    def network(latents, timesteps, context):
        seen.append(latents.shape[1])
        return latents

    guided = GuidedDenoiser(network, torch.zeros(1, 2, 3))
    sample(WindowedDenoiser(guided.of_frames, 5, 1), build_scheduler("ddim", NoiseSchedule()), randn(1, 41, 4, 2, 2), 3)
    assert seen == [5] * 30  # ten windows in each of three steps


def test_known_frames_in_overlapping_windows():
    """A network with channels for known frames, in overlapping windows: they are cut like the noisy latents."""
    levels = []

    class Network:
        has_known_level = True

        def __call__(self, latents, timesteps, context, known_level):
            levels.append(known_level.tolist())
            noisy, mask, known = latents.split([4, 1, 4], dim=2)
            return 0.5 * noisy + mask * known

    clip, noise = randn(1, 12, 4, 2, 2), randn(1, 12, 4, 2, 2, seed=1)
    known = KnownLatents.placed(clip[:, [0, 11]], [0, 11], 12, None)
    guided = GuidedDenoiser(Network(), torch.zeros(1, 2, 3))
    denoiser = KnownDenoiser(WindowedDenoiser(guided.of_frames, 5, 2), NoiseSchedule(), known, noise)
    result = sample(denoiser, build_scheduler("euler", NoiseSchedule()), noise, 3)
    assert torch.equal(result[:, [0, 11]], clip[:, [0, 11]]) and set(map(tuple, levels)) == {(0,)}


@pytest.mark.parametrize(
    ("window", "overlap", "message"),
    [
        (5, 5, "overlap: expected 1 to 4 frames, .* found 5"),
        (5, 0, "overlap: expected 1 to 4 frames, .* found 0"),
        (1, 1, "window: expected at least 2 frames to sample together, found 1"),
    ],
)
def test_impossible_windows_are_an_error(window, overlap, message):
    with pytest.raises(UserError, match=message):
        overlapping_windows(9, window, overlap)
