"""Training with known frames, frame rates, shared noise, weights and single frames."""

import copy

import pytest
import torch

from ldm.data.batch import Batch, Clips
from ldm.diffusion.known_frames import KINDS, KnownFrames, fill_unknown
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentVideoDiffusion
from tests.conftest import relative_error
from tests.models.test_ddpm import NOT_BUILT, REFERENCE, UNET, make_batch, make_model

CONDITIONED = copy.deepcopy(UNET)
CONDITIONED["params"] |= {"in_channels": 9, "fps_embedding": True, "known_level_embedding": True}
ALL_KINDS = {"mixture": dict.fromkeys(KINDS, 1), "max_noise": 200}


def make_conditioned(**options) -> LatentVideoDiffusion:
    torch.manual_seed(0)
    options = {"trainable": REFERENCE, "learning_rate": 1e-3, "known_frames": ALL_KINDS} | options
    model = LatentVideoDiffusion(CONDITIONED, NOT_BUILT, NOT_BUILT, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


class Recorder(torch.nn.Module):
    """Stands for a network: records its inputs, returns a given answer."""

    takes_known_frames, out_channels = True, 4

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(self, x, timesteps, context, **conditions):
        self.calls.append((x, timesteps, context, conditions))
        return self.answer(x)


def recorded(model, batch, answer=lambda x: torch.zeros_like(x[..., :4, :, :])):
    model.unet = Recorder(answer)
    drawn = model.draw(batch)
    known = model.draw_known(batch, drawn[0])
    loss = model.error(*drawn, batch.context.float(), batch.fps, known)
    return drawn, known, loss, model.unet.calls[0]


def test_the_network_sees_noisy_latents_mask_and_known_latents():
    model, batch = make_conditioned(), make_batch(list(range(12)))
    (clean, noise, timesteps), known, _, (x, _, _, conditions) = recorded(model, batch)
    assert x.shape == (12, 5, 9, 8, 8)
    assert torch.equal(x[:, :, 4:5], known.mask)
    assert torch.equal(x[:, :, 5:], fill_unknown(known.latents, known.mask))
    shown = known.mask * clean + (1 - known.mask) * known.latents
    assert torch.allclose(x[:, :, :4], model.schedule.add_noise(shown, noise, timesteps), atol=1e-6)
    assert torch.equal(conditions["fps"], batch.fps) and torch.equal(conditions["known_level"], known.level)
    assert len(known.mask.flatten(1).sum(1).unique()) > 3  # several kinds of the mixture


def test_known_latents_are_clean_or_have_the_noise_of_their_level():
    model, batch = make_conditioned(), make_batch(list(range(16)))
    clean = model.draw(batch)[0]
    known = model.draw_known(batch, clean)
    is_clean = known.level == 0
    assert 0 < is_clean.sum() < 16
    assert torch.equal(known.latents[is_clean], clean[is_clean])
    for index in (~is_clean).nonzero().flatten():
        level = known.level[index]
        noise = (known.latents[index] - model.schedule.signal_scale[level] * clean[index]) / model.schedule.noise_scale[
            level
        ]
        assert abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.1


def test_known_latents_do_not_count_in_the_loss():
    model, batch = make_conditioned(), make_batch(list(range(12)))
    known = recorded(model, batch)[1]
    target = model.schedule.target(*model.draw(batch))
    right_where_made = target * known.mask + 100 * (1 - known.mask)
    assert recorded(model, batch, lambda x: right_where_made)[2].abs().max() < 1e-10
    wrong_by_two = recorded(model, batch, lambda x: target + 2)[2]
    assert torch.allclose(wrong_by_two, torch.full((12,), 4.0), rtol=1e-4)  # a mean, whatever the mask


def test_without_a_mixture_nothing_is_known():
    model, batch = make_conditioned(known_frames=None), make_batch([0, 1])
    _, known, _, (x, _, _, conditions) = recorded(model, batch)
    assert known is None
    assert torch.equal(x[:, :, 4:], torch.cat([torch.ones(2, 5, 1, 8, 8), torch.zeros(2, 5, 4, 8, 8)], dim=2))
    assert torch.equal(conditions["known_level"], torch.zeros(2, dtype=torch.long))


def test_known_frames_depend_on_the_clip_not_on_the_batch():
    model = make_conditioned()
    together, clean = make_batch([3, 8, 5]), None
    clean = model.draw(together)[0]
    all_three = model.draw_known(together, clean)
    for index, position in enumerate([3, 8, 5]):
        alone = model.draw_known(make_batch([position]), clean[index : index + 1])
        assert torch.equal(alone.mask[0], all_three.mask[index])
        assert torch.equal(alone.latents[0], all_three.latents[index])
        assert alone.level[0] == all_three.level[index]
    held_out = model.draw_known(together, clean, stream=3)
    assert not torch.equal(held_out.latents, all_three.latents)


def with_stills(batch: Batch, num: int, frames: int = 5) -> Batch:
    """The batch and `num` samples of single frames."""
    generator = torch.Generator().manual_seed(9)
    count = num * frames
    stills = Clips(
        torch.randn(count, 1, 8, 8, 8, generator=generator).half(),
        torch.randn(count, 7, 16, generator=generator).half(),
        torch.full((count,), 10.0),
        [1000 + index for index in range(count)],
        ["scene"] * count,
    )

    return Batch(batch.moments, batch.context, batch.fps, batch.positions, batch.keys, stills=stills)


def test_single_frames_are_images_and_share_the_weight_of_a_sample():
    model = make_conditioned()
    model.unet = Recorder(lambda x: torch.zeros_like(x[..., :4, :, :]))
    batch = with_stills(make_batch([0, 1]), num=1)
    errors, timesteps = model.batch_errors(batch)
    assert errors.shape == timesteps.shape == (2 + 5,)
    images, _, _, conditions = model.unet.calls[1]
    assert images.shape == (5, 9, 8, 8) and conditions["fps"] is None
    assert torch.equal(images[:, 4], torch.ones(5, 8, 8)) and not images[:, 5:].any()
    target = model.schedule.target(*model.draw(batch.stills, stream=4))
    assert torch.allclose(errors[2:], target.square().mean(dim=(1, 2, 3, 4)) / 5 / 3, rtol=1e-5)  # 1 of 3 samples
    alone = model.batch_errors(make_batch([0, 1]))[0]
    assert torch.allclose(errors[:2], alone * 2 / 3)


def test_single_frames_do_not_train_temporal_layers():
    model = make_conditioned()
    batch = with_stills(make_batch([]), num=2)
    model.batch_errors(batch)[0].sum().backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    over_time = {n for n, _ in model.named_parameters() if ".temporal." in n and "conditioning" not in n}
    assert moved and over_time and not moved & over_time


def test_min_snr_weighs_the_loss():
    plain, weighted = make_model(parameterization="v"), make_model(parameterization="v", min_snr_gamma=5)
    batch = make_batch([0, 1, 2])
    plain.log = weighted.log = lambda *_, **__: None
    drawn = plain.draw(batch)
    errors = plain.error(*drawn, batch.context.float())
    expected = (errors * plain.schedule.loss_weight(drawn[2], 5)).mean()
    assert torch.allclose(weighted.training_step(batch, 0), expected)
    assert torch.allclose(plain.training_step(batch, 0), errors.mean())
    assert not torch.allclose(expected, errors.mean())


def test_training_noise_is_of_the_configured_family():
    like = torch.zeros(40, 5, 8, 16, 16)
    batch = Batch(like, torch.zeros(40, 7, 16), torch.ones(40), list(range(40)), ["scene"] * 40)
    noise = make_model(noise={"kind": "mixed", "share": 0.4}).draw(batch)[1]
    correlation = torch.corrcoef(noise.transpose(0, 1).flatten(1))
    assert (correlation - (0.4 + 0.6 * torch.eye(5))).abs().max() < 0.02


def test_a_told_network_from_image_weights_starts_as_the_image_network(tmp_path):
    torch.manual_seed(1)
    image = make_model().unet
    path = tmp_path / "image.ckpt"
    tensors = {name: value for name, value in image.state_dict().items() if ".temporal." not in name}
    torch.save({f"model.diffusion_model.{name}": value for name, value in tensors.items()}, path)
    model = LatentVideoDiffusion(
        CONDITIONED, NOT_BUILT, NOT_BUILT, 1e-3, ckpt_path=str(path), trainable=REFERENCE, known_frames=ALL_KINDS
    )
    batch = make_batch([0, 1])
    clean, noise, timesteps = model.draw(batch)
    known = model.draw_known(batch, clean)
    with torch.no_grad():
        out = model(noise, timesteps, batch.context.float(), batch.fps, known)
        expected = image(noise, timesteps, batch.context.float(), enable_time=False)
    assert relative_error(out, expected) < 2e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known_frames": ALL_KINDS}, "known_frames: expected a network that takes known frames.*in_channels 9"),
        ({"min_snr_gamma": 0}, "min_snr_gamma: expected a number above 0 or null, found 0"),
        ({"noise": {"kind": "mixed"}}, "noise: expected a share above 0"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr: expected parameterization v or x0"),
        (
            {"zero_terminal_snr": True, "parameterization": "v", "min_snr_gamma": 5},
            "min_snr_gamma: expected null with zero_terminal_snr",
        ),
    ],
)
def test_incompatible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_model(**options)


def test_known_frames_cannot_be_noisier_than_the_schedule():
    with pytest.raises(UserError, match="max_noise: expected a diffusion step below 1000, found 1000"):
        make_conditioned(known_frames={"mixture": {"first": 1}, "max_noise": 1000})


def test_noise_on_known_frames_needs_a_network_that_is_told_of_it():
    deaf = copy.deepcopy(CONDITIONED)
    deaf["params"]["known_level_embedding"] = False
    with pytest.raises(UserError, match="max_noise: expected 0 for a network that is not conditioned"):
        LatentVideoDiffusion(deaf, NOT_BUILT, NOT_BUILT, 1e-3, trainable=REFERENCE, known_frames=ALL_KINDS)


@pytest.mark.parametrize("fill", ["blend", "zeros"])
def test_the_network_finds_between_known_frames_what_was_set(fill):
    mixture = {"mixture": {"ends": 1}, "fill": fill}
    _, known, _, (x, _, _, _) = recorded(make_conditioned(known_frames=mixture), make_batch([0, 1]))
    assert torch.equal(x[:, :, 5:], fill_unknown(known.latents, known.mask, fill))
    assert bool(x[:, 2, 5:].any()) == (fill == "blend")


def test_of_a_clip_of_one_frame_nothing_is_known():
    model = make_conditioned(known_frames={"mixture": {"pixels": 1}})
    model.unet = Recorder(lambda x: torch.zeros_like(x[..., :4, :, :]))
    model.batch_errors(make_batch([0, 1], frames=1))
    assert model.unet.calls[0][0][:, :, 4].min() == 1


def test_nothing_known_is_said_of_images_and_of_clips():
    for shape in ((2, 5, 4, 8, 8), (2, 4, 8, 8)):
        nothing = KnownFrames.nothing(torch.randn(shape))
        assert nothing.mask.shape == (*shape[:-3], 1, 8, 8) and nothing.mask.min() == 1
        assert not nothing.latents.any() and not nothing.level.any()
