"""The noise schedule: noise level of each diffusion step, prediction target and loss weight. Sampling is not here.

Equation numbers: Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (DDPM); velocity target: Salimans & Ho
2022, "Progressive Distillation" (section 3, appendix D).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.errors import UserError

PARAMETERIZATIONS = ("eps", "x0", "v")
MAX_TIMESTEPS = 100_000


class NoiseSchedule(nn.Module):
    """Variance-preserving schedule with CompVis's "linear" betas, linear in sqrt(beta), computed in float64.

    timesteps: number of diffusion steps, 1 to 100,000.
    linear_start, linear_end: first and last beta, 0 < start <= end < 1.
    parameterization: prediction target: "eps" the noise, "x0" the clean latents, "v" the velocity.
    zero_terminal_snr: the last step is pure noise, as at the start of sampling (Lin et al. 2023, "Common Diffusion
        Noise Schedules and Sample Steps are Flawed", algorithm 1); not with "eps".

    The buffers are float32 and not persistent; `compvis_buffers` gives them under their public names for a checkpoint.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        timesteps: int = 1000,
        linear_start: float = 0.00085,
        linear_end: float = 0.012,
        parameterization: str = "eps",
        zero_terminal_snr: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= timesteps <= MAX_TIMESTEPS:
            expected = "at least 1" if timesteps < 1 else f"at most {MAX_TIMESTEPS:,}"
            raise UserError(f"timesteps: expected {expected}, found {timesteps}")
        if not 0 < linear_start <= linear_end < 1:
            raise UserError(
                f"linear_start, linear_end: expected 0 < start <= end < 1, found {linear_start} and {linear_end}"
            )
        if parameterization not in PARAMETERIZATIONS:
            raise UserError(
                f"parameterization: expected one of {', '.join(PARAMETERIZATIONS)}, found '{parameterization}'"
            )
        if zero_terminal_snr and (parameterization == "eps" or timesteps < 2):
            raise UserError(
                "zero_terminal_snr: expected parameterization v or x0 (the last step is pure noise, from which eps "
                f"recovers no latents) and 2 timesteps or more, found '{parameterization}' and {timesteps}"
            )
        self.num_timesteps = timesteps
        self.zero_terminal_snr = zero_terminal_snr
        self.linear_start = linear_start
        self.linear_end = linear_end
        self.parameterization = parameterization
        cumprod = (1 - self.betas64()).cumprod(0)
        self.register_buffer("alphas_cumprod", cumprod.float(), persistent=False)
        self.register_buffer("signal_scale", cumprod.sqrt().float(), persistent=False)
        self.register_buffer("noise_scale", (1 - cumprod).sqrt().float(), persistent=False)

    def betas64(self) -> Tensor:
        """The variances beta_t of the forward process -> float64 `num_timesteps`."""
        roots = torch.linspace(self.linear_start**0.5, self.linear_end**0.5, self.num_timesteps, dtype=torch.float64)
        betas = roots**2
        return _with_zero_terminal_snr(betas) if self.zero_terminal_snr else betas

    def scales_at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the latents and of the noise at `timesteps`, clamped to the schedule: `b` -> float32 `b`, `b`.

        Between two steps the ratio noise / signal is linear, as in the Euler sampler.
        """
        steps = timesteps.float().clamp(0, self.num_timesteps - 1)
        below = steps.floor().long()
        above = (below + 1).clamp(max=self.num_timesteps - 1)
        part = steps - below
        ratios = self.noise_scale / self.signal_scale.clamp_min(1e-6)
        ratio = torch.lerp(ratios[below], ratios[above], part)
        signal, noise = (1 + ratio.square()).rsqrt(), ratio * (1 + ratio.square()).rsqrt()
        is_step = part == 0
        signal = torch.where(is_step, self.signal_scale[below], signal)
        return signal, torch.where(is_step, self.noise_scale[below], noise)

    def loss_weight(self, timesteps: Tensor, min_snr_gamma: float | None) -> Tensor:
        """Weight of the squared error of the network's output at `timesteps`: `b` -> `b`.

        min_snr_gamma: weights the error in the clean latents by min(SNR, gamma) (Hang et al. 2023, "Efficient Diffusion
            Training via Min-SNR Weighting Strategy", section 3.4); None: 1.
        """
        signal, noise = self.signal_scale[timesteps].square(), self.noise_scale[timesteps].square()
        if min_snr_gamma is None:
            return torch.ones_like(signal)
        weight = torch.minimum(signal / noise, torch.full_like(signal, min_snr_gamma))
        if self.parameterization == "x0":
            return weight
        # An error e of the output is an error e * noise / signal ("eps") or e * noise ("v") of the clean latents.
        return weight * (noise / signal if self.parameterization == "eps" else noise)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """A sample of q(x_t | x_0) (DDPM eq. 4): `b ...`, `b ...`, `b` -> `b ...`."""
        return _over(self.signal_scale, timesteps, clean) * clean + _over(self.noise_scale, timesteps, clean) * noise

    def velocity_factor(self, timesteps: Tensor) -> Tensor:
        """Squared error of the velocity per squared error of the network's output at `timesteps`: `b` -> `b`."""
        if self.parameterization == "v":
            return torch.ones_like(self.signal_scale[timesteps])
        scale = self.signal_scale if self.parameterization == "eps" else self.noise_scale
        return scale[timesteps].square().reciprocal()

    def with_level(self, known: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Known latents noised to diffusion steps `levels`, 0 for no noise: `b ...`, `b ...`, `b` -> `b ...`."""
        is_clean = (levels == 0).view(-1, *[1] * (known.ndim - 1))
        return torch.where(is_clean, known, self.add_noise(known, noise, levels))

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The training target of the network at `timesteps`: `b ...` -> `b ...`."""
        if self.parameterization == "eps":
            return noise
        if self.parameterization == "x0":
            return clean
        return _over(self.signal_scale, timesteps, clean) * noise - _over(self.noise_scale, timesteps, clean) * clean

    def to_noise(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that follows from a network output: `b ...` -> `b ...`."""
        signal, noise = _over(self.signal_scale, timesteps, noisy), _over(self.noise_scale, timesteps, noisy)
        if self.parameterization == "eps":
            return output
        if self.parameterization == "x0":
            return (noisy - signal * output) / noise
        return noise * noisy + signal * output

    def compvis_buffers(self) -> dict[str, Tensor]:
        """The twelve schedule tensors of a CompVis checkpoint, float32 `num_timesteps` each, by public name."""
        betas = self.betas64()
        alphas = 1 - betas
        cumprod = alphas.cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), cumprod[:-1]])
        posterior_variance = betas * (1 - previous) / (1 - cumprod)  # DDPM eq. 7
        buffers = {
            "betas": betas,
            "alphas_cumprod": cumprod,
            "alphas_cumprod_prev": previous,
            "sqrt_alphas_cumprod": cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - cumprod).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - cumprod).log(),
            "sqrt_recip_alphas_cumprod": (1 / cumprod).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / cumprod - 1).sqrt(),
            "posterior_variance": posterior_variance,
            "posterior_log_variance_clipped": posterior_variance.clamp_min(1e-20).log(),
            "posterior_mean_coef1": betas * previous.sqrt() / (1 - cumprod),
            "posterior_mean_coef2": (1 - previous) * alphas.sqrt() / (1 - cumprod),
        }
        return {name: value.float() for name, value in buffers.items()}


def _over(values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """Look up `values` at `timesteps` and shape the result `b 1 1 ...` to broadcast over `like`."""
    return values[timesteps].view(-1, *[1] * (like.ndim - 1))


def _with_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose cumulative signal scale keeps its first value and ends at zero, float64 `num_timesteps`."""
    roots = (1 - betas).cumprod(0).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    cumprod = roots**2
    return 1 - torch.cat([cumprod[:1], cumprod[1:] / cumprod[:-1]])


def checked_gamma(gamma: float | None, zero_terminal_snr: bool) -> float | None:
    """`min_snr_gamma` of a config, unchanged. Raises `UserError` unless it is a positive number or None."""
    if gamma is not None and zero_terminal_snr:
        raise UserError(
            "model.params.min_snr_gamma: expected null with zero_terminal_snr: at the last step the weight min(SNR, "
            "gamma) is 0 and nothing is learned; leave out one of them"
        )
    if gamma is not None and (isinstance(gamma, bool) or not isinstance(gamma, int | float) or gamma <= 0):
        raise UserError(f"model.params.min_snr_gamma: expected a number above 0 or null, found {gamma!r}")
    return gamma
