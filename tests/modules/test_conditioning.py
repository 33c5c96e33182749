"""Known frames, frame rate and captions per frame: without effect before training, with one afterwards."""

import pytest
import torch

from ldm.modules.nn import GroupNorm32, timestep_embedding
from ldm.modules.unet import OCTAVE, UNetModel
from tests.conftest import draw, fill_by_rule, relative_error

pytestmark = pytest.mark.numeric
SIZES = {
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 4,
    "context_dim": 16,
}
CONDITIONED = {"in_channels": 9, "fps_embedding": True, "known_level_embedding": True}


def make(filled: bool = True, **options) -> UNetModel:
    unet = UNetModel(**{"in_channels": 4, **SIZES, **options})
    if filled:
        unet.load_state_dict(fill_by_rule({name: value.shape for name, value in unet.state_dict().items()}))
    return unet.double().requires_grad_(False)


@pytest.fixture(scope="module")
def conditioned() -> UNetModel:
    return make(**CONDITIONED)


@pytest.fixture(scope="module")
def plain() -> UNetModel:
    return make()


def inputs(channels: int = 4, frames: int = 5):
    return draw(2, frames, channels, 8, 8).double(), torch.tensor([7, 981]), draw(2, 3, 16, seed=1).double()


def test_an_untrained_conditioned_network_equals_the_plain_one(plain):
    network = make(filled=False, **CONDITIONED)
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing and all(".temporal." in name for name in missing)
    x, timesteps, context = inputs(9)
    expected = plain(x[:, :, :4], timesteps, context)
    out = network(x, timesteps, context, fps=torch.tensor([5.0, 10.0]), known_level=torch.tensor([0, 100]))
    assert torch.equal(out, expected)
    assert out.shape == (2, 5, 4, 8, 8)


def test_conditions_have_temporal_names_and_none_when_left_out(conditioned, plain):
    names = {name for name in conditioned.state_dict() if name.startswith("conditioning.")}
    layers = [f"conditioning.temporal.{part}.{i}.{kind}" for part in ("fps", "known_level") for i in (0, 2)
              for kind in ("weight", "bias")]  # fmt: skip
    assert names == {"conditioning.temporal.known.weight", *layers}
    assert not any(name.startswith("conditioning") for name in plain.state_dict())
    assert {n for n in make(False, in_channels=9).state_dict() if "conditioning" in n} == {
        "conditioning.temporal.known.weight"
    }


def test_known_latents_are_more_columns_of_the_first_convolution(conditioned):
    """What a nine-channel checkpoint does with one weight."""
    x, _timesteps, context = inputs(9)
    first, known = conditioned.input_blocks[0][0], conditioned.conditioning["temporal"].known
    frames = x.flatten(0, 1)
    joined = torch.cat([first.weight, known.weight], dim=1)
    expected = first.temporal(torch.nn.functional.conv2d(frames, joined, first.bias, padding=1), 5)
    assert relative_error(conditioned._first_block(frames, torch.zeros(2, 128), context, 5), expected) <= 1e-13


@pytest.mark.parametrize("change", [{"fps": [5.0, 20.0]}, {"fps": None}, {"known_level": [3, 300]},
                                    {"known_level": None}], ids=str)  # fmt: skip
def test_each_condition_changes_its_own_clip(conditioned, change):
    x, timesteps, context = inputs(9)
    given = {"fps": torch.tensor([5.0, 10.0]), "known_level": torch.tensor([3, 100])}
    before = conditioned(x, timesteps, context, **given)
    (name, values), *_ = change.items()
    after = conditioned(x, timesteps, context, **given | {name: values and torch.tensor(values)})
    if values:
        assert relative_error(after[0], before[0]) <= 1e-13
    assert relative_error(after[1], before[1]) > 1e-3


def test_images_have_no_frame_rate(conditioned):
    x, timesteps, context = inputs(9)
    for images, enable_time in ((x[:, 0], True), (x[:, :1], True), (x, False)):
        out = conditioned(images, timesteps, context, enable_time, fps=torch.tensor([5.0, 10.0]))
        assert torch.equal(out, conditioned(images, timesteps, context, enable_time))


def test_doubling_the_frame_rate_is_the_same_step_everywhere(conditioned):
    """Products of the sinusoids of a * log2(fps) depend on the ratio of the rates alone; angles are float32."""
    channels = conditioned.conditioning["temporal"].fps.channels
    waves = timestep_embedding(OCTAVE * torch.log2(torch.tensor([4.0, 8.0, 16.0])), channels)
    assert torch.allclose(waves[0] @ waves[1], waves[1] @ waves[2], atol=1e-3)


def test_a_caption_for_each_frame(plain):
    x, timesteps, context = inputs()
    same = context[:, None].expand(-1, 5, -1, -1)
    assert relative_error(plain(x, timesteps, same), plain(x, timesteps, context)) <= 1e-13
    other = same.clone()
    other[:, 3] += 1
    flat = plain(x.flatten(0, 1), timesteps.repeat_interleave(5), other.flatten(0, 1))
    assert relative_error(plain(x, timesteps, other, enable_time=False).flatten(0, 1), flat) <= 1e-13


def test_norms_over_the_clip_see_all_its_frames(plain):
    norm = GroupNorm32(64).double()
    x = draw(10, 64, 4, 4).double() * torch.arange(1, 11)[:, None, None, None]
    expected = torch.nn.functional.group_norm(
        x.view(2, 5, 64, 4, 4).transpose(1, 2), 32, norm.weight, norm.bias, norm.eps
    )
    over_clip = norm(x.contiguous(memory_format=torch.channels_last), 5)
    assert relative_error(over_clip, expected.transpose(1, 2).flatten(0, 1)) <= 1e-13
    unet = make(norm_over_clip=True)
    x, timesteps, context = inputs()
    assert relative_error(unet(x, timesteps, context), plain(x, timesteps, context)) > 1e-3
    assert torch.equal(unet(x[:, 0], timesteps, context), plain(x[:, 0], timesteps, context))
