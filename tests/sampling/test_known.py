"""Known frames in sampling: inputs of the network, its samples, and known latents returned bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from einops import rearrange
from torch import Generator

from ldm.diffusion.known_frames import fill_unknown
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.sampling.denoisers import (
    GuidedDenoiser,
    KnownDenoiser,
    KnownLatents,
    check_known_level,
    check_takes_known_frames,
)
from ldm.sampling.loop import SAMPLERS, build_scheduler, initial_noise, sample

pytestmark = pytest.mark.numeric

PARAMETERIZATIONS = ("eps", "x0", "v")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def seeded(*seeds):
    return [Generator().manual_seed(seed) for seed in seeds]


class Listener:
    """A network that keeps what it was told."""

    has_known_level = has_fps_embedding = True

    def __init__(self):
        self.calls = []

    def __call__(self, latents, timesteps, context, fps=None, known_level=None):
        noisy, mask, known = latents.split([4, 1, 4], dim=2)
        self.calls.append({"noisy": noisy, "mask": mask, "known": known, "timesteps": timesteps, "level": known_level})
        self.calls[-1]["fps"] = fps
        return noisy.sin()


def some_known(b=2, frames=5):
    """The first frame, and of the third one the left half."""
    mask = torch.ones(b, frames, 1, 4, 4)
    mask[:, 0], mask[:, 2, ..., :2] = 0, 0
    return KnownLatents(randn(b, frames, 4, 4, 4, seed=4), mask)


def noisy_known():
    return replace(some_known(), level=5)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_known_latents_come_back_bit_for_bit(name, parameterization):
    schedule, known, noise = NoiseSchedule(parameterization=parameterization), some_known(), randn(2, 5, 4, 4, 4)
    denoiser = KnownDenoiser(GuidedDenoiser(Listener(), torch.zeros(2, 1, 1)), schedule, known, noise)
    latents = sample(denoiser, build_scheduler(name, schedule), noise, 6)
    is_known = (known.mask == 0).expand_as(latents)
    assert torch.equal(latents[is_known], known.latents[is_known])
    assert not torch.isin(latents[~is_known], known.latents).any() and latents.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_known_changes_nothing(name):
    schedule, noise, network = NoiseSchedule(), randn(2, 5, 4, 4, 4), Listener()
    denoiser = KnownDenoiser(
        GuidedDenoiser(network, torch.zeros(2, 1, 1)), schedule, KnownLatents.nothing(noise), noise
    )
    latents = sample(denoiser, build_scheduler(name, schedule), noise, 4)
    plain = sample(lambda noisy, timesteps: noisy.sin(), build_scheduler(name, schedule), noise, 4)
    assert torch.equal(latents, plain)
    for call in network.calls:
        assert (call["mask"] == 1).all() and not call["known"].any() and call["level"].tolist() == [0, 0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_inputs_of_the_network(name):
    schedule, known, noise, network = NoiseSchedule(), some_known(), randn(2, 5, 4, 4, 4), Listener()
    guided = GuidedDenoiser(network, torch.zeros(2, 1, 1), torch.ones(1, 1, 1), 2.0, fps=torch.tensor([5.0, 20.0]))
    sample(KnownDenoiser(guided, schedule, known, noise), build_scheduler(name, schedule), noise, 6)
    steps = set()
    for call in network.calls:
        assert len(call["noisy"]) == 4  # with and without captions
        assert call["level"].tolist() == [0] * 4 and call["fps"].tolist() == [5, 20, 5, 20]
        step = call["timesteps"][:1]
        steps.add(step.item())
        if step == step.round():  # as training does it
            expected = schedule.add_noise(known.latents, noise, step.long().expand(2))
        else:
            signal, scale = schedule.scales_at(step)
            expected = signal * known.latents + scale * noise
        for half in range(2):
            part = {key: call[key][2 * half : 2 * half + 2] for key in ("noisy", "mask", "known")}
            assert torch.equal(part["mask"], known.mask)
            assert torch.equal(part["known"], fill_unknown(known.latents, known.mask))
            is_known = (known.mask == 0).expand_as(noise)
            assert torch.allclose(part["noisy"][is_known], expected[is_known], atol=1e-5)
    assert len(steps) == 6


def test_the_start_of_sampling_is_the_noise_where_nothing_is_known():
    schedule, known, noise, network = NoiseSchedule(), some_known(), randn(2, 5, 4, 4, 4), Listener()
    denoiser = KnownDenoiser(GuidedDenoiser(network, torch.zeros(2, 1, 1)), schedule, known, noise)
    sample(denoiser, build_scheduler("ddim", schedule), noise, 3)
    to_be_made = (known.mask == 1).expand_as(noise)
    assert torch.equal(network.calls[0]["noisy"][to_be_made], noise[to_be_made])


def test_known_latents_of_a_level_are_noised_once():
    schedule, noise, network, level = NoiseSchedule(), randn(2, 5, 4, 4, 4), Listener(), 200
    clip, mask = randn(2, 5, 4, 4, 4, seed=4), torch.ones(2, 5, 1, 4, 4)
    mask[:, [0, 2, 4]] = 0
    known = KnownLatents(clip, mask, level)
    denoiser = KnownDenoiser(GuidedDenoiser(network, torch.zeros(2, 1, 1)), schedule, known, noise, seeded(1, 2))
    latents = sample(denoiser, build_scheduler("dpm++", schedule), noise, 4)
    told = network.calls[0]["known"]
    drawn = torch.stack([torch.randn(5, 4, 4, 4, generator=generator) for generator in seeded(1, 2)])
    noised = schedule.add_noise(clip, drawn, torch.tensor([level, level]))
    assert torch.equal(told[:, [0, 2, 4]], noised[:, [0, 2, 4]]) and not torch.equal(noised, clip)
    for call in network.calls:
        assert torch.equal(call["known"], told) and call["level"].tolist() == [level, level]
        step = call["timesteps"].long()
        expected = schedule.add_noise(told, noise, step)  # the noise of the level, and on it that of the step
        assert torch.allclose(call["noisy"][:, [0, 2, 4]], expected[:, [0, 2, 4]], atol=1e-6)
    assert torch.equal(latents[:, [0, 2, 4]], clip[:, [0, 2, 4]])


def test_the_guess_between_known_frames_is_as_noisy_as_they_are():
    noise, network = randn(1, 3, 4, 4, 4), Listener()
    known = KnownLatents.placed(torch.ones(1, 2, 4, 4, 4), [0, 2], 3)
    known = replace(known, level=300)
    denoiser = KnownDenoiser(GuidedDenoiser(network, torch.zeros(1, 1, 1)), NoiseSchedule(), known, noise, seeded(0))
    denoiser(noise, torch.tensor([500]))
    told = network.calls[0]["known"]
    assert (told[:, [0, 2]] != 1).all()
    assert torch.allclose(told[:, 1], told[:, [0, 2]].mean(dim=1))


def test_a_network_trained_on_zeros_between_known_frames_finds_zeros():
    noise, network = randn(1, 3, 4, 4, 4), Listener()
    known = KnownLatents.placed(randn(1, 2, 4, 4, 4, seed=2), [0, 2], 3)
    guided = GuidedDenoiser(network, torch.zeros(1, 1, 1))
    KnownDenoiser(guided, NoiseSchedule(), known, noise, fill="zeros")(noise, torch.tensor([500]))
    assert not network.calls[0]["known"][:, 1].any() and network.calls[0]["known"][:, [0, 2]].all()


def test_a_single_frame_has_no_rate():
    network = Listener()
    guided = GuidedDenoiser(network, torch.zeros(1, 1, 1), fps=torch.tensor([10.0]))
    for frames in (1, 2):
        guided(torch.zeros(1, frames, 9, 4, 4), torch.tensor([5]))
    assert network.calls[0]["fps"] is None and network.calls[1]["fps"].tolist() == [10]


def test_network_without_embeddings_gets_no_conditions():
    guided = GuidedDenoiser(lambda latents, timesteps, context: latents, torch.zeros(1, 1, 1), fps=torch.ones(1))
    guided(torch.zeros(1, 2, 9, 4, 4), torch.tensor([5]), torch.tensor([0]))


class GaussianNetwork:
    """Knows that frames are normal with this covariance, each pixel for itself; answers as the best denoiser would.

    Of the known latents it looks at mask and level alone, of the noisy ones at those that are to be made.
    """

    has_known_level = True

    def __init__(self, schedule, covariance):
        self.schedule, self.covariance = schedule, covariance.double()

    def __call__(self, latents, timesteps, context, known_level):
        noisy, mask, known = (part.double() for part in latents.split([4, 1, 4], dim=2))
        is_known = mask[0, :, 0, 0, 0] == 0
        mean, covariance = self.given(known[:, is_known], is_known, int(known_level[0]))
        signal, scale = (value[0].double() for value in self.schedule.scales_at(timesteps))
        x = rearrange(noisy[:, ~is_known], "b t c h w -> t (b c h w)")
        seen = signal**2 * covariance + scale**2 * torch.eye(len(covariance))
        clean = mean + signal * covariance @ torch.linalg.solve(seen, x - signal * mean)
        noise = (x - signal * clean) / scale
        answer = {"eps": noise, "x0": clean, "v": signal * noise - scale * clean}[self.schedule.parameterization]
        output = torch.full_like(noisy, 1e3)  # nonsense where it is not asked
        output[:, ~is_known] = rearrange(answer, "t (b c h w) -> b t c h w", b=len(noisy), c=4, h=noisy.shape[-2])
        return output.float()

    def given(self, known, is_known, level):
        """Mean `t p` and covariance of the frames to be made, for `p` pixels, from known ones `b t c h w`."""
        c = self.covariance
        signal, scale = 1.0, 0.0
        if level:
            signal, scale = (value[0].item() for value in self.schedule.scales_at(torch.tensor([level])))
        seen = signal**2 * c[is_known][:, is_known] + scale**2 * torch.eye(int(is_known.sum()))
        across = torch.linalg.solve(seen, signal * c[is_known][:, ~is_known])
        mean = across.T @ rearrange(known, "b t c h w -> t (b c h w)")
        return mean, c[~is_known][:, ~is_known] - signal * across.T @ c[is_known][:, ~is_known]


COVARIANCE = 0.9 ** (torch.arange(5)[:, None] - torch.arange(5)[None]).abs().double()


@pytest.mark.parametrize(("parameterization", "places"), [("eps", [0]), ("x0", [0, 4]), ("v", [0, 2, 4])])
@pytest.mark.parametrize("name", SAMPLERS)
def test_exact_denoiser_samples_the_conditional_distribution(name, parameterization, places):
    """In-betweening, first frame and continuation of frames that are Gaussian, so that the right answer is known."""
    schedule = NoiseSchedule(parameterization=parameterization)
    network, b, size = GaussianNetwork(schedule, COVARIANCE), 2, 32
    root = torch.linalg.cholesky(COVARIANCE).float()
    clip = torch.einsum("ts,bschw->btchw", root, randn(b, 5, 4, size, size, seed=3))
    known = KnownLatents.placed(clip[:, places], places, 5)
    noise = randn(b, 5, 4, size, size, seed=1)
    denoiser = KnownDenoiser(GuidedDenoiser(network, torch.zeros(b, 1, 1)), schedule, known, noise)
    latents = sample(denoiser, build_scheduler(name, schedule), noise, 50)
    is_known = torch.zeros(5, dtype=torch.bool)
    is_known[places] = True
    mean, covariance = network.given(clip[:, is_known].double(), is_known, 0)
    rest = rearrange(latents[:, ~is_known], "b t c h w -> t (b c h w)").double() - mean
    assert rest.mean(1).abs().max() < 0.06  # of 8192 pixels
    assert torch.allclose(rest @ rest.T / rest.shape[1], covariance, atol=0.06)


def test_noise_on_known_frames_is_taken_into_account():
    """The frames made fit to the noisy frames that the network was shown, as far as noisy frames say anything."""
    schedule, level, size = NoiseSchedule(parameterization="v", zero_terminal_snr=True), 300, 48
    network = GaussianNetwork(schedule, COVARIANCE)
    root = torch.linalg.cholesky(COVARIANCE).float()
    clip = torch.einsum("ts,bschw->btchw", root, randn(1, 5, 4, size, size, seed=3))
    known = KnownLatents.placed(clip[:, [0, 4]], [0, 4], 5)
    known = replace(known, level=level)
    noise = randn(1, 5, 4, size, size, seed=1)
    denoiser = KnownDenoiser(GuidedDenoiser(network, torch.zeros(1, 1, 1)), schedule, known, noise, seeded(7))
    latents = sample(denoiser, build_scheduler("dpm++", schedule), noise, 50)
    frames = rearrange(latents, "1 t c h w -> t (c h w)").double()
    assert torch.equal(latents[:, [0, 4]], clip[:, [0, 4]])
    assert torch.allclose((frames @ frames.T / frames.shape[1])[1:4, 1:4], COVARIANCE[1:4, 1:4], atol=0.06)
    signal, scale = (value.item() for value in schedule.scales_at(torch.tensor([level])))
    seen = signal**2 * COVARIANCE[[0, 4]][:, [0, 4]] + scale**2 * torch.eye(2)
    weights = torch.linalg.solve(seen, signal * COVARIANCE[[0, 4]][:, 1:4])
    expected = signal * weights.T @ COVARIANCE[[0, 4]][:, [0, 4]]  # covariance of frames made with clean known ones
    assert torch.allclose((frames @ frames.T / frames.shape[1])[1:4][:, [0, 4]], expected, atol=0.06)


def test_a_sample_does_not_depend_on_its_batch():
    def make(seeds, clip):
        schedule, generators = NoiseSchedule(), seeded(*seeds)
        noise = initial_noise(len(seeds), 3, 4, 4, 4, generators)
        known = KnownLatents.placed(clip, [0], 3)
        known = replace(known, level=50)
        denoiser = GuidedDenoiser(Listener(), torch.zeros(len(seeds), 1, 1))
        denoiser = KnownDenoiser(denoiser, schedule, known, noise, generators)
        return sample(denoiser, build_scheduler("ddim", schedule), noise, 4, generators, eta=0.5)

    clip = randn(2, 1, 4, 4, 4, seed=9)
    assert torch.equal(make([3, 4], clip)[1:], make([4], clip[1:]))


def test_latents_are_placed_in_a_clip():
    frames = randn(1, 2, 4, 4, 4)
    known = KnownLatents.placed(frames, [0, 3], 5)
    assert known.whole_frames() == [0, 3] and torch.equal(known.latents[:, [0, 3]], frames)
    assert torch.equal(known.restore(torch.zeros(2, 5, 4, 4, 4))[1, 3], frames[0, 1])
    mask = torch.zeros(1, 1, 1, 4, 4)
    mask[..., 1] = 1
    partly = KnownLatents.placed(frames, [0, 3], 5, mask)
    assert partly.whole_frames() == [] and partly.mask[0, 3, 0, :, 1].all() and not partly.mask[0, 3, 0, :, 0].any()
    assert not partly.known_part()[..., 1].any() and torch.equal(
        partly.known_part()[:, 3, :, :, 0], frames[:, 1, ..., 0]
    )
    assert KnownLatents.nothing(frames).whole_frames() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_takes_known_frames(False, "--init-image"), "--init-image: expected .* in_channels 9 .* windows"),
        (lambda: check_known_level(-1, NoiseSchedule()), r"a diffusion step from 0 \(none\) to 999, found -1"),
        (lambda: check_known_level(1000, NoiseSchedule()), "to 999, found 1000"),
        (
            lambda: KnownDenoiser(None, NoiseSchedule(), noisy_known(), randn(2, 5, 4, 4, 4), seeded(1)),
            "generator: expected one, or one for each of the 2 samples, found 1",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_an_error(call, message):
    with pytest.raises(UserError, match=message):
        call()
    check_takes_known_frames(True, "--init-image")
