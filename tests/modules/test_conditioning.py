"""Known frames, frame rate and captions per frame: nothing at the start, and heard once trained."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.errors import UserError
from ldm.modules.backends import attend
from ldm.modules.nn import GroupNorm32
from ldm.modules.temporal import FrameWindow, TemporalAttention, attend_locally
from ldm.modules.unet import UNetModel
from tests.conftest import fill_by_rule, relative_error

WORDS = {
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 4,
    "context_dim": 16,
}
TOLD = {"in_channels": 9, "fps_embedding": True, "known_level_embedding": True}


def make(filled: bool = True, **words) -> UNetModel:
    unet = UNetModel(**{"in_channels": 4, **WORDS, **words})
    if filled:
        unet.load_state_dict(fill_by_rule({name: value.shape for name, value in unet.state_dict().items()}))
    return unet.requires_grad_(False)


def inputs(channels: int = 4, frames: int = 5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, frames, channels, 8, 8, generator=generator)
    return x, torch.tensor([7, 981]), torch.randn(2, 3, 16, generator=generator)


def test_a_network_that_is_told_more_starts_as_the_one_that_is_not():
    plain, told = make(), make(filled=False, **TOLD)
    missing, unexpected = told.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing and all(".temporal." in name for name in missing)
    x, timesteps, context = inputs(9)
    expected = plain(x[:, :, :4], timesteps, context)
    out = told(x, timesteps, context, fps=torch.tensor([5.0, 10.0]), known_level=torch.tensor([0, 100]))
    assert torch.equal(out, expected)
    assert out.shape == (2, 5, 4, 8, 8)


def test_names_of_what_it_is_told_are_temporal_and_leave_with_the_words():
    names = {name for name in make(False, **TOLD).state_dict() if name.startswith("conditioning.")}
    layers = [f"conditioning.temporal.{part}.{i}.{kind}" for part in ("fps", "known_level") for i in (0, 2)
              for kind in ("weight", "bias")]  # fmt: skip
    assert names == {"conditioning.temporal.known.weight", *layers}
    assert not any(name.startswith("conditioning") for name in make(False).state_dict())
    assert {n for n in make(False, in_channels=9).state_dict() if "conditioning" in n} == {
        "conditioning.temporal.known.weight"
    }


def test_known_latents_are_more_columns_of_the_first_convolution():
    """What a nine-channel checkpoint does with one weight."""
    unet = make(**TOLD)
    x, _timesteps, context = inputs(9)
    joined = torch.cat([unet.input_blocks[0][0].weight, unet.conditioning["temporal"].known.weight], dim=1)
    frames = x.flatten(0, 1)
    expected = torch.nn.functional.conv2d(frames, joined, unet.input_blocks[0][0].bias, padding=1)
    expected = unet.input_blocks[0][0].temporal(expected, 5)
    emb = torch.zeros(2, 128)
    assert relative_error(unet._first_block(frames, emb, context, 5), expected) < 1e-6


def test_each_thing_it_is_told_changes_what_it_says():
    unet = make(**TOLD)
    x, timesteps, context = inputs(9)
    told = {"fps": torch.tensor([5.0, 10.0]), "known_level": torch.tensor([3, 100])}
    before = unet(x, timesteps, context, **told)
    for change in (
        {"fps": torch.tensor([5.0, 20.0])},
        {"fps": None},
        {"known_level": torch.tensor([3, 300])},
        {"known_level": None},
    ):
        after = unet(x, timesteps, context, **told | change)
        if next(iter(change.values())) is not None:
            assert torch.allclose(after[0], before[0], atol=1e-5)  # the other clip was told the same as before
        assert relative_error(after[1], before[1]) > 1e-3, change


def test_images_have_no_frame_rate():
    unet = make(**TOLD)
    x, timesteps, context = inputs(9)
    for images, enable_time in ((x[:, 0], True), (x[:, :1], True), (x, False)):
        told = unet(images, timesteps, context, enable_time, fps=torch.tensor([5.0, 10.0]))
        assert torch.equal(told, unet(images, timesteps, context, enable_time))


def test_a_frame_rate_twice_as_high_is_a_step_of_the_same_length_everywhere():
    embedding = make(**TOLD).conditioning["temporal"].fps
    # Sinusoids of a * log2(fps): their products depend on the ratio of the rates alone.
    from ldm.modules.nn import timestep_embedding  # noqa: PLC0415
    from ldm.modules.unet import OCTAVE  # noqa: PLC0415

    waves = timestep_embedding(OCTAVE * torch.log2(torch.tensor([4.0, 8.0, 16.0])), embedding.channels)
    assert torch.allclose(waves[0] @ waves[1], waves[1] @ waves[2], atol=1e-3)


def test_a_caption_for_each_frame():
    unet = make()
    x, timesteps, context = inputs()
    same = context[:, None].expand(-1, 5, -1, -1)
    assert relative_error(unet(x, timesteps, same), unet(x, timesteps, context)) < 1e-5
    other = same.clone()
    other[:, 3] += 1
    flat = unet(x.flatten(0, 1), timesteps.repeat_interleave(5), other.flatten(0, 1))
    assert relative_error(unet(x, timesteps, other, enable_time=False).flatten(0, 1), flat) < 1e-5


def test_norms_over_the_clip_see_all_its_frames():
    norm = GroupNorm32(64)
    x = torch.randn(10, 64, 4, 4) * torch.arange(1, 11)[:, None, None, None]
    expected = torch.nn.functional.group_norm(
        x.view(2, 5, 64, 4, 4).transpose(1, 2), 32, norm.weight, norm.bias, norm.eps
    )
    over_clip = norm(x.contiguous(memory_format=torch.channels_last), 5)
    assert relative_error(over_clip, expected.transpose(1, 2).flatten(0, 1)) < 1e-5
    unet, other = make(norm_over_clip=True), make()
    x, timesteps, context = inputs()
    assert relative_error(unet(x, timesteps, context), other(x, timesteps, context)) > 1e-3
    assert torch.equal(unet(x[:, 0], timesteps, context), other(x[:, 0], timesteps, context))


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("sees_first", [False, True])
@pytest.mark.parametrize(("num_frames", "local"), [(65, 5), (17, 7), (6, 5), (9, 1), (4, 9)])
def test_local_attention_is_full_attention_with_a_banded_mask(backend, sees_first, num_frames, local):
    q, k, v = torch.randn(3, 6, 2, num_frames, 8, generator=torch.Generator().manual_seed(1))
    apart = (torch.arange(num_frames)[:, None] - torch.arange(num_frames)).abs()
    seen = apart <= local // 2
    if sees_first:
        seen[:, 0] = True
    expected = attend(q, k, v, "math", seen[None, None])
    out = attend_locally(q, k, v, FrameWindow(local, sees_first), backend)
    assert relative_error(out, expected) < 1e-5
    if num_frames > local:
        assert relative_error(out, attend(q, k, v)) > 1e-2  # which is another thing than seeing all


def test_a_local_layer_changes_only_with_the_frames_it_sees():
    layer = TemporalAttention(32, 2, local=5, sees_first=True)
    torch.nn.init.normal_(layer.to_out.weight)
    x = torch.randn(33, 4, 32, generator=torch.Generator().manual_seed(2))
    before = layer(x, 33)
    for frame, seen in ((20, {18, 19, 20, 21, 22}), (0, set(range(33)))):
        changed = x.clone()
        changed[frame] += torch.randn(4, 32)
        moved = (layer(changed, 33) - before).abs().amax(dim=(1, 2)) > 1e-5
        assert set(moved.nonzero().flatten().tolist()) == seen


def test_local_work_and_memory_grow_with_the_frames_and_not_with_their_square():
    work, memory = {}, {}
    for local in (5, None):
        layer = TemporalAttention(32, 2, "math", local=local)
        for num_frames in (17, 257):
            x = torch.randn(num_frames, 2, 32)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                layer(x, num_frames)
            work[local, num_frames] = counter.get_total_flops() / num_frames
            kept = []  # bytes for the backward pass
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
                layer(x, num_frames)
            memory[local, num_frames] = sum(kept) / num_frames
    assert 0.9 < work[5, 257] / work[5, 17] < 1.05
    assert 0.6 < memory[5, 257] / memory[5, 17] < 1.1
    assert work[None, 257] > 1.5 * work[5, 257] and memory[None, 257] > 2 * memory[5, 257]


def test_without_positions_frames_can_be_put_in_any_order():
    layer = TemporalAttention(32, 2, positions=False)
    torch.nn.init.normal_(layer.to_out.weight)
    x, order = torch.randn(7, 4, 32), torch.randperm(7)
    assert relative_error(layer(x[order], 7), layer(x, 7)[order]) < 1e-5
    with_positions = TemporalAttention(32, 2)
    with_positions.load_state_dict(layer.state_dict())
    assert relative_error(with_positions(x[order], 7), with_positions(x, 7)[order]) > 1e-2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"known_level_embedding": True}, r"known_level_embedding: expected a network that takes known frames"),
        ({"temporal_attention": {"local": 4}}, "local: expected an odd number of frames"),
        ({"temporal_attention": {"local": True}}, "local: expected an odd number of frames"),
        ({"temporal_attention": {"sees_first": True}}, "sees_first: means nothing without"),
        ({"temporal_attention": {"window": 5}}, "temporal_attention.window: expected one of local, sees_first"),
        ({"temporal_attention": {"positions": 1}}, "positions: expected true or false, found 1"),
    ],
)
def test_words_that_do_not_fit_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        make(False, **words)
