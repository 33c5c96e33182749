"""The schedule against recorded numbers and diffusers; conversions of targets."""

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from tests.conftest import relative_error

pytestmark = pytest.mark.numeric


def test_buffers_are_those_of_the_public_code(goldens):
    expected = {name.removeprefix("buf."): value for name, value in goldens("schedule").items() if name[:4] == "buf."}
    expected.pop("lvlb_weights")  # a loss weight, never saved
    actual = NoiseSchedule().compvis_buffers()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 2e-5, name


def test_betas_are_linear_in_their_root(goldens):
    assert relative_error(NoiseSchedule(1000).betas64(), goldens("schedule")["betas64.linear"]) <= 1e-12


def test_alphas_cumprod_at_the_published_steps():
    schedule = NoiseSchedule()
    expected = torch.tensor([0.99914998, 0.99829602, 0.27633268, 0.00471670, 0.00466010])
    assert torch.allclose(schedule.alphas_cumprod[[0, 1, 500, 998, 999]], expected, rtol=1e-6)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_noise_follows_from_the_target(parameterization):
    schedule = NoiseSchedule(parameterization=parameterization)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 5, 4, 8, 8, generator=generator).unbind(0)
    timesteps = torch.tensor([0, 500, 999])
    noisy = schedule.add_noise(clean, noise, timesteps)
    output = schedule.target(clean, noise, timesteps)
    assert torch.allclose(schedule.to_noise(output, noisy, timesteps), noise, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": 0}, "timesteps: expected at least 1, found 0"),
        ({"linear_start": 0.02}, "expected 0 < start <= end < 1, found 0.02 and 0.012"),
        ({"parameterization": "epsilon"}, "expected one of eps, x0, v, found 'epsilon'"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr: expected parameterization v or x0"),
        ({"zero_terminal_snr": True, "parameterization": "v", "timesteps": 1}, "2 timesteps or more, found 'v' and 1"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule(**arguments)


def test_the_last_step_of_a_zero_terminal_snr_schedule_is_pure_noise():
    """And the betas are those of the paper's algorithm, as diffusers has it."""
    schedule = NoiseSchedule(parameterization="v", zero_terminal_snr=True)
    assert schedule.alphas_cumprod[-1] == 0 and schedule.noise_scale[-1] == 1
    assert torch.isclose(schedule.alphas_cumprod[0], NoiseSchedule().alphas_cumprod[0], rtol=1e-6)
    assert (schedule.alphas_cumprod.diff() < 0).all()
    oracle = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    assert torch.allclose(schedule.alphas_cumprod, oracle.alphas_cumprod, atol=1e-6)
    clean, noise = torch.randn(2, 1, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    last = torch.tensor([999])
    assert torch.equal(schedule.add_noise(clean, noise, last), noise)
    assert torch.equal(schedule.target(clean, noise, last), -clean)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_min_snr_weights_errors_of_clean_latents_equally_for_each_target(parameterization, gamma):
    schedule = NoiseSchedule(parameterization=parameterization)
    timesteps = torch.tensor([0, 300, 999])
    clean, noise = torch.randn(2, 3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    noisy = schedule.add_noise(clean, noise, timesteps)
    output = schedule.target(clean, noise, timesteps) + 0.1  # an output that is off
    noise_off = schedule.to_noise(output, noisy, timesteps)
    signal, scale = (value[timesteps].view(-1, 1, 1, 1, 1) for value in (schedule.signal_scale, schedule.noise_scale))
    clean_off = (noisy - scale * noise_off) / signal
    snr = (schedule.signal_scale / schedule.noise_scale)[timesteps].square()
    expected = (clean_off - clean).square().mean(dim=(1, 2, 3, 4)) * snr.clamp(max=gamma)
    error = (output - schedule.target(clean, noise, timesteps)).square().mean(dim=(1, 2, 3, 4))
    weight = schedule.loss_weight(timesteps, gamma)
    assert torch.allclose(error * weight, expected, rtol=1e-3)
    assert torch.equal(schedule.loss_weight(timesteps, None), torch.ones(3))
    assert (weight < 1.0001 * max(gamma, 1)).all()


def test_scales_between_steps_are_linear_in_the_ratio():
    schedule = NoiseSchedule()
    signal, noise = schedule.scales_at(torch.tensor([0.0, 500.0, 500.25, 999.0, 1200.0]))
    whole = torch.tensor([0, 500, 999, 999])
    assert torch.equal(signal[[0, 1, 3, 4]], schedule.signal_scale[whole])
    assert torch.equal(noise[[0, 1, 3, 4]], schedule.noise_scale[whole])
    sigmas = (schedule.noise_scale / schedule.signal_scale)[[500, 501]]
    assert torch.isclose(noise[2] / signal[2], torch.lerp(*sigmas, 0.25), rtol=1e-5)
    assert torch.isclose(noise[2] ** 2 + signal[2] ** 2, torch.tensor(1.0))


def test_level_zero_leaves_known_latents_unchanged():
    schedule = NoiseSchedule()
    known, noise = torch.randn(2, 2, 5, 4, 8, 8).unbind(0)
    out = schedule.with_level(known, noise, torch.tensor([0, 200]))
    assert torch.equal(out[0], known[0])
    assert torch.equal(out[1], schedule.add_noise(known, noise, torch.tensor([0, 200]))[1])


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_velocity_factor_converts_errors(parameterization):
    schedule = NoiseSchedule(parameterization=parameterization)
    steps = torch.tensor([0, 500, 999])
    clean, noise = torch.randn(2, 3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    noisy = schedule.add_noise(clean, noise, steps)
    noise_off = schedule.to_noise(schedule.target(clean, noise, steps) + 0.1, noisy, steps)
    signal, scale = (
        value[steps].double().view(-1, 1, 1, 1, 1) for value in (schedule.signal_scale, schedule.noise_scale)
    )
    velocity = signal * noise - scale * clean
    velocity_off = signal * noise_off - scale * (noisy - scale * noise_off) / signal
    error = (velocity_off - velocity).square().mean(dim=(1, 2, 3, 4))
    assert torch.allclose(error.float(), 0.1**2 * schedule.velocity_factor(steps), rtol=1e-3)
