"""The schedule against recorded numbers, and what it makes of an exact prediction."""

import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.schedule import NoiseSchedule
from tests.conftest import relative_error


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
def test_the_exact_output_gives_back_the_noise(parameterization):
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
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule(**arguments)
