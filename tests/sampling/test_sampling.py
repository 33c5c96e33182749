"""Sampling: an exact denoiser gives back the truth, diffusers' pipelines agree, seeds belong to samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from einops import rearrange, repeat
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.sampling.denoisers import GuidedDenoiser
from ldm.sampling.loop import (
    SAMPLERS,
    build_scheduler,
    check_size,
    decode_chunks,
    decode_video,
    initial_noise,
    sample,
    set_steps,
)
from tests.conftest import relative_error

pytestmark = pytest.mark.numeric

SHAPE = (2, 3, 4, 8, 8)


class ExactDenoiser:
    """Knows the clean latents; answers in the parameterization of the schedule, at fractional steps too."""

    def __init__(self, schedule: NoiseSchedule, clean: torch.Tensor) -> None:
        self.schedule, self.clean, self.calls = schedule, clean, 0
        # Fractional steps as the Euler scheduler means them: linear in sigma between whole ones.
        self.sigmas = (1 / schedule.alphas_cumprod.double() - 1).sqrt().numpy()

    def __call__(self, latents, timesteps):
        self.calls += 1
        sigma = torch.tensor(np.interp(timesteps.double().numpy(), np.arange(len(self.sigmas)), self.sigmas))
        assert not sigma.isnan().any()
        sigma = sigma.view(-1, 1, 1, 1, 1)
        alpha, noisy, clean = 1 / (1 + sigma**2), latents.double(), self.clean.double()
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        return {"eps": noise, "x0": clean, "v": velocity}[self.schedule.parameterization].float()


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_exact_denoiser_gives_back_the_truth(name, parameterization, steps):
    schedule = NoiseSchedule(parameterization=parameterization)
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    denoiser, scheduler = ExactDenoiser(schedule, clean), build_scheduler(name, schedule)
    latents = sample(denoiser, scheduler, noise, steps)
    expected = clean
    if name in ("ddim", "plms"):  # they stop at alphas_cumprod[0]: a little of the noise they found stays
        first = schedule.alphas_cumprod[int(scheduler.timesteps[0])]
        last = schedule.alphas_cumprod[0]
        noise_found = (noise - first.sqrt() * clean) / (1 - first).sqrt()
        expected = last.sqrt() * clean + (1 - last).sqrt() * noise_found
    assert relative_error(latents, expected) < (2e-4 if steps > 1 else 1e-3)
    assert denoiser.calls == steps + (name == "plms" and steps > 1)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
def test_ddim_grid_is_that_of_compvis(goldens, steps):
    golden = goldens("schedule")
    scheduler = build_scheduler("ddim", NoiseSchedule())
    timesteps = set_steps(scheduler, steps).flip(0)
    assert timesteps.tolist() == golden[f"ddim.t.{steps}"].tolist()
    previous = [int(t) - 1000 // steps for t in timesteps]
    final = scheduler.final_alpha_cumprod
    alphas_prev = torch.stack([scheduler.alphas_cumprod[t] if t >= 0 else final for t in previous])
    sigmas = torch.stack([scheduler._get_variance(int(t), p) for t, p in zip(timesteps, previous, strict=True)]).sqrt()
    assert relative_error(scheduler.alphas_cumprod[timesteps], golden[f"ddim.alphas.{steps}"]) < 2e-5
    assert relative_error(alphas_prev, golden[f"ddim.alphas_prev.{steps}"]) < 2e-5
    if steps > 1:
        assert relative_error(sigmas, golden[f"ddim.sigmas.{steps}.eta1"]) < 2e-4  # 1 - alpha cancels in float32


def test_no_sampler_visits_a_step_twice_or_leaves_the_schedule():
    for name in SAMPLERS:
        for steps in (2, 3, 27, 101, 333, 501, 999):
            timesteps = set_steps(build_scheduler(name, NoiseSchedule()), steps)
            assert 0 <= timesteps.min() and timesteps.max() <= 999
            assert len(timesteps.unique()) == steps


# diffusers' pipelines


@pytest.fixture(scope="module")
def pipeline_parts():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(3, 3, block_out_channels=(32,), latent_channels=4)
    config = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return {"unet": unet.eval(), "vae": vae, "text_encoder": CLIPTextModel(config), "tokenizer": None}


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize(("name", "steps"), [("ddim", 5), ("ddim", 7), ("ddim", 20), ("plms", 7), ("plms", 20)])
def test_agrees_with_the_pipeline_of_diffusers(pipeline_parts, name, steps, scale):
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    settings |= {"set_alpha_to_one": False, "steps_offset": 1}
    theirs = DDIMScheduler(clip_sample=False, **settings)
    if name == "plms":
        theirs = PNDMScheduler(skip_prk_steps=True, **settings)
    pipeline = StableDiffusionPipeline(
        **pipeline_parts, scheduler=theirs, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    noise = initial_noise(1, 3, 4, 8, 8, generator)
    context, uncond = torch.randn(2, 1, 7, 16, generator=generator)
    expected = pipeline(
        prompt_embeds=context.expand(3, -1, -1), negative_prompt_embeds=uncond.expand(3, -1, -1), latents=noise[0],
        num_inference_steps=steps, guidance_scale=scale, output_type="latent",
    ).images  # fmt: skip

    def unet(latents, timesteps, context):
        frames = latents.shape[1]
        output = pipeline_parts["unet"](
            rearrange(latents, "b t c h w -> (b t) c h w"),
            repeat(timesteps, "b -> (b t)", t=frames),
            repeat(context, "b n d -> (b t) n d", t=frames),
        ).sample
        return rearrange(output, "(b t) c h w -> b t c h w", t=frames)

    latents = sample(GuidedDenoiser(unet, context, uncond, scale), build_scheduler(name, NoiseSchedule()), noise, steps)
    assert latents.shape == (1, 3, 4, 8, 8)
    assert relative_error(latents[0], expected) < 1e-4


def test_guidance_puts_the_batch_without_caption_first():
    seen = {}

    def unet(latents, timesteps, context):
        seen["shape"], seen["timesteps"] = latents.shape, timesteps.tolist()
        return context.mean((1, 2)).view(-1, 1, 1, 1, 1).expand_as(latents)

    denoiser = GuidedDenoiser(unet, torch.full((2, 3, 5), 2.0), torch.full((1, 3, 5), 0.5), scale=4.0)
    output = denoiser(torch.zeros(SHAPE), torch.tensor([3, 3]))
    assert output.unique().item() == 0.5 + 4.0 * (2.0 - 0.5)
    assert seen == {"shape": (4, *SHAPE[1:]), "timesteps": [3] * 4}


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_motion_guidance_extrapolates_from_independent_frames(scale: float):
    seen = []

    def unet(latents, timesteps, context, enable_time=True, known_level=None):
        seen.append((len(latents), enable_time, known_level is not None))
        value = context.mean((1, 2)).view(-1, 1, 1, 1, 1) + (10.0 if enable_time else 7.0)
        return value.expand_as(latents)

    unet.has_known_level = True
    captions = torch.full((2, 3, 5), 2.0), torch.full((1, 3, 5), 0.5)
    denoiser = GuidedDenoiser(unet, *captions, scale, motion_scale=3.0)
    output = denoiser(torch.zeros(SHAPE), torch.tensor([3, 3]), torch.tensor([5, 5]))
    assert output.unique().item() == 10.5 + scale * 1.5 + 2 * (12.0 - 9.0)
    assert seen == [(2 if scale == 1 else 4, True, True), (2, False, True)]
    still = denoiser(torch.zeros(2, 1, *SHAPE[2:]), torch.tensor([3, 3]))
    assert still.unique().item() == 10.5 + scale * 1.5 and len(seen) == 3  # a single frame has no motion


def test_a_caption_for_each_frame():
    def unet(latents, timesteps, context):
        return latents + context.mean((-2, -1)).view(*latents.shape[:2], 1, 1, 1)

    context = torch.arange(6.0).view(2, 3, 1, 1).expand(2, 3, 7, 5)
    for uncond in (torch.ones(1, 7, 5), torch.ones(2, 7, 5), torch.ones(1, 3, 7, 5)):
        guided = GuidedDenoiser(unet, context, uncond, 2.0)
        output = guided(torch.zeros(SHAPE), torch.tensor([3, 3]))
        assert torch.equal(output[:, :, 0, 0, 0], 1 + 2 * (context[..., 0, 0] - 1))
        part = guided.of_frames(slice(1, 3))(torch.zeros(2, 2, *SHAPE[2:]), torch.tensor([3, 3]))
        assert torch.equal(part, output[:, 1:3])
    same = GuidedDenoiser(unet, torch.zeros(2, 7, 5))
    assert same.of_frames(slice(0, 1)) is same


@pytest.mark.parametrize(("uncond", "scale"), [(None, 7.5), (torch.zeros(1, 3, 5), 1.0)])
def test_without_guidance_the_network_sees_the_batch_once(uncond, scale):
    sizes = []

    def unet(latents, timesteps, context):
        sizes.append(len(latents))
        return latents

    GuidedDenoiser(unet, torch.ones(2, 3, 5), uncond, scale)(torch.zeros(SHAPE), torch.tensor([3, 3]))
    assert sizes == [2]


def test_the_network_runs_in_the_dtype_of_its_captions():
    dtypes = []

    def unet(latents, timesteps, context):
        dtypes.append(latents.dtype)
        return latents

    output = GuidedDenoiser(unet, torch.ones(2, 3, 5, dtype=torch.bfloat16))(torch.zeros(SHAPE), torch.tensor([3, 3]))
    assert dtypes == [torch.bfloat16] and output.dtype == torch.float32


# noise and seeds


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_noise_of_a_sample_depends_on_its_seed_alone():
    batch = initial_noise(3, 5, 4, 8, 8, seeded(7, 8, 9))
    assert torch.equal(batch[1:2], initial_noise(1, 5, 4, 8, 8, seeded(8)))
    assert torch.equal(initial_noise(1, 9, 4, 8, 8, seeded(8))[:, :5], batch[1:2])
    assert not torch.equal(batch[0], batch[1])
    assert abs(batch.std() - 1) < 0.05


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_sample_does_not_depend_on_its_batch(eta):
    schedule = NoiseSchedule()

    def denoiser(latents, timesteps):
        return latents * 0.5 + 0.1

    def run(seeds):
        generators = seeded(*seeds)
        noise = initial_noise(len(seeds), 3, 4, 8, 8, generators)
        return sample(denoiser, build_scheduler("ddim", schedule), noise, 5, generators, eta=eta)

    assert torch.equal(run([3, 4])[1:], run([4]))


def test_eta_adds_noise_and_progress_counts():
    done = []
    noise = initial_noise(1, 2, 4, 8, 8, torch.Generator().manual_seed(0))
    schedule = NoiseSchedule()
    still = sample(ExactDenoiser(schedule, noise), build_scheduler("ddim", schedule), noise, 4)
    noisy = sample(
        lambda x, t: 0.9 * x, build_scheduler("ddim", schedule), noise, 4, torch.Generator().manual_seed(1),
        progress=lambda *count: done.append(count), eta=1.0,
    )  # fmt: skip
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not torch.equal(still, noisy)


class Doubling(nn.Module):
    """A decoder that repeats every latent pixel twice and notes how many frames it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = []

    def decode(self, latents):
        self.sizes.append(len(latents))
        return latents[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_decoding_in_pieces_changes_nothing():
    latents = 0.2 * torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, pieces = Doubling(), Doubling()
    expected = decode_video(whole, latents, scale_factor=0.5, chunk=100)
    assert torch.equal(decode_video(pieces, latents, scale_factor=0.5, chunk=4), expected)
    assert whole.sizes == [10] and pieces.sizes == [4, 4, 2]
    assert expected.shape == (2, 5, 3, 16, 16) and expected.abs().max() <= 1
    assert torch.allclose(expected[1, 2, :, ::2, ::2], (latents[1, 2, :3] / 0.5).clamp(-1, 1))


def test_a_chunk_is_decoded_when_it_is_asked_for():
    latents = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    first_stage, done = Doubling(), []
    chunks = decode_chunks(first_stage, latents, 0.5, 4, lambda *state: done.append(state))
    assert first_stage.sizes == []
    assert len(next(chunks)) == 4 and first_stage.sizes == [4]
    rest = list(chunks)
    assert [len(chunk) for chunk in rest] == [4, 2] and done == [(4, 10), (8, 10), (10, 10)]
    assert torch.equal(torch.cat(rest), decode_video(Doubling(), latents[None], 0.5)[0, 4:])


def test_decoding_keeps_no_gradients():
    first_stage = nn.Conv2d(4, 3, 1)
    first_stage.decode = first_stage.forward
    assert not next(decode_chunks(first_stage, torch.zeros(1, 4, 8, 8), 1.0)).requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_scheduler("dmp++", NoiseSchedule()), r"sampler: .*found 'dmp\+\+'; did you mean 'dpm\+\+'"),
        (lambda: set_steps(build_scheduler("ddim", NoiseSchedule()), 0), "steps: expected 1 to 999, found 0"),
        (lambda: set_steps(build_scheduler("ddim", NoiseSchedule()), 1000), "expected 1 to 999, found 1000"),
        (lambda: set_steps(build_scheduler("dpm++", NoiseSchedule()), 1000), "does not fit into the 1000"),
        (lambda: initial_noise(1, 0, 4, 8, 8, torch.Generator()), "frames: expected at least 1, found 0"),
        (lambda: initial_noise(3, 2, 4, 8, 8, seeded(1, 2)), "each of the 3 samples, found 2"),
        (lambda: check_size(512, 500, 64), "width: expected a multiple of 64 pixels, found 500; the nearest is 512"),
        (lambda: check_size(512, 4160, 64), "width: expected at most 4096 pixels, found 4160"),
        (lambda: build_scheduler("zzz", NoiseSchedule()), "found 'zzz'; accepted here: ddim, dpm"),
        (lambda: check_size(0, 512, 64), "height: expected a multiple of 64 pixels, found 0"),
        (lambda: decode_video(Doubling(), torch.zeros(SHAPE), 1.0, chunk=0), "decode chunk: expected at least 1"),
        (lambda: decode_chunks(Doubling(), torch.zeros(SHAPE[1:]), 1.0, chunk=0), "decode chunk: expected at least 1"),
        (
            lambda: sample(None, build_scheduler("euler", NoiseSchedule()), torch.zeros(SHAPE), 3, eta=0.5),
            "only the sampler ddim adds noise",
        ),
        (
            lambda: sample(None, build_scheduler("ddim", NoiseSchedule()), torch.zeros(SHAPE), 3, eta=1.5),
            "eta: expected 0 to 1, found 1.5",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_an_error(call, message):
    with pytest.raises(UserError, match=message):
        call()
