"""Sampling with the noise of training: schedules that end in pure noise, and noise that frames have in common."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from einops import rearrange

from ldm.diffusion.noise import NoiseFamily
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.sampling.loop import SAMPLERS, build_scheduler, initial_noise, sample, set_steps
from tests.conftest import relative_error
from tests.sampling.test_sampling import SHAPE, ExactDenoiser, seeded

pytestmark = pytest.mark.numeric

# zero terminal SNR

ZERO_SNR_SAMPLERS = [name for name in SAMPLERS if name != "plms"]


@pytest.mark.parametrize("parameterization", ["x0", "v"])
@pytest.mark.parametrize("name", ZERO_SNR_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 61, 122, 130])
def test_sampling_begins_in_pure_noise_where_the_schedule_does(name, parameterization, steps):
    schedule = NoiseSchedule(parameterization=parameterization, zero_terminal_snr=True)
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    scheduler = build_scheduler(name, schedule)
    latents = sample(ExactDenoiser(schedule, clean), scheduler, noise, steps)
    assert scheduler.timesteps[0] == 999
    assert relative_error(latents, clean) < 1e-3


@pytest.mark.parametrize("name", ZERO_SNR_SAMPLERS)
def test_every_grid_from_pure_noise_has_its_steps_and_stays_in_the_schedule(name):
    """Also where counting down in floats goes one step too far, as for 61 and 122."""
    scheduler = build_scheduler(name, NoiseSchedule(parameterization="v", zero_terminal_snr=True))
    for steps in range(1, 1000):
        timesteps = set_steps(scheduler, steps)
        assert len(timesteps) == scheduler.num_inference_steps == steps
        assert timesteps[0] == 999 and (timesteps.diff() < 0).all()
        assert 0 <= timesteps[-1] <= 1000 / steps
        assert name == "ddim" or len(scheduler.sigmas) == steps + 1


@pytest.mark.parametrize("name", ZERO_SNR_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 16, 50, 130, 999])
def test_a_grid_from_pure_noise_is_that_of_diffusers_where_that_fits(name, steps):
    ours, theirs = (build_scheduler(name, NoiseSchedule(parameterization="v", zero_terminal_snr=True)) for _ in "ab")
    set_steps(ours, steps)
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.timesteps.dtype == theirs.timesteps.dtype
    if name != "ddim":
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-6)


@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_from_pure_noise_is_that_of_diffusers_where_the_grid_is(steps):
    schedule = NoiseSchedule(parameterization="v", zero_terminal_snr=True)
    theirs = DDIMScheduler(
        trained_betas=NoiseSchedule().betas64().tolist(), prediction_type="v_prediction", clip_sample=False,
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    def denoiser(latents, timesteps):
        return (latents * (1 + timesteps[0] / 1000)).sin()

    for eta in (0.0, 0.8):
        theirs.set_timesteps(steps)
        latents, generator = noise, torch.Generator().manual_seed(2)
        for timestep in theirs.timesteps:
            output = denoiser(latents, timestep[None])
            latents = theirs.step(output, timestep, latents, eta=eta, generator=generator).prev_sample
        ours = sample(
            denoiser, build_scheduler("ddim", schedule), noise, steps, torch.Generator().manual_seed(2), eta=eta
        )
        assert relative_error(ours, latents) < 2e-4


def test_a_sampler_that_cannot_begin_in_pure_noise_names_those_that_can():
    schedule = NoiseSchedule(parameterization="v", zero_terminal_snr=True)
    with pytest.raises(UserError, match=r"start from pure noise.*found plms; use one of ddim, dpm\+\+, unipc, euler"):
        build_scheduler("plms", schedule)


# noise that frames have in common


def correlations(noise):
    """Of neighbouring frames, `b t c h w`, each pair alone."""
    frames = rearrange(noise, "b t c h w -> t (b c h w)")
    return torch.corrcoef(frames).diagonal(1)


FAMILIES = [NoiseFamily("mixed", 0.7), NoiseFamily("progressive", 0.7), NoiseFamily("mixed", 0.5, offset=0.3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_of_the_noise_family(family):
    noise = initial_noise(2, 4, 4, 96, 96, seeded(5, 6), family)
    assert torch.equal(noise[1], family.draw(4, 4, 96, 96, torch.Generator().manual_seed(6)))
    if not family.offset:
        assert (correlations(noise) - family.share).abs().max() < 0.01


def test_noise_without_a_family_is_what_it_was():
    assert torch.equal(
        initial_noise(1, 3, 4, 8, 8, seeded(4), NoiseFamily()),
        torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(4)),
    )


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("kind", ["independent", "mixed", "progressive"])
def test_noise_between_steps_is_of_the_same_family(kind, zero_terminal_snr):
    """A network that answers nothing at all makes of latents a multiple of them, to which the noise is added."""
    family = NoiseFamily(kind, 0.0 if kind == "independent" else 0.6)
    schedule = NoiseSchedule(parameterization="v", zero_terminal_snr=zero_terminal_snr)
    generators, seen = seeded(1), []
    noise = initial_noise(1, 4, 4, 96, 96, generators, family)

    def denoiser(latents, timesteps):
        seen.append(latents)
        return torch.zeros_like(latents)

    sample(denoiser, build_scheduler("ddim", schedule), noise, 4, generators, eta=1.0, family=family)
    for before, after in pairwise(seen):
        added = after - (after * before).mean() / before.square().mean() * before
        assert added.std() > 0.03 and (correlations(added) - family.share).abs().max() < 0.01


def test_noise_between_steps_of_independent_frames_is_what_it_was():
    def run(family):
        generators = seeded(3, 4)
        noise = initial_noise(2, 3, 4, 8, 8, generators, family)
        scheduler = build_scheduler("ddim", NoiseSchedule())
        return sample(lambda latents, timesteps: 0.9 * latents, scheduler, noise, 5, generators, None, 0.5, family)

    assert torch.equal(run(None), run(NoiseFamily()))
    mixed = run(NoiseFamily("mixed", 0.5))
    assert not torch.equal(mixed, run(None))
