"""The UNet against the numbers of the public one, and what time may and may not do to it."""

from copy import deepcopy

import pytest
import torch
from einops import rearrange

from ldm.errors import UserError
from ldm.modules.nn import timestep_embedding
from ldm.modules.unet import UNetModel
from tests.conftest import fill_by_rule, relative_error

SD_V1 = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "transformer_depth": 1,
    "context_dim": 768,
}
GOLDEN = SD_V1 | {"model_channels": 32, "context_dim": 24}


def golden_unet(temporal: bool = True, **options) -> UNetModel:
    """The UNet of the goldens: image weights by the rule, temporal ones as at the start."""
    torch.manual_seed(0)
    unet = UNetModel(**GOLDEN | {"temporal": temporal} | options)
    shapes = {name: value.shape for name, value in unet.state_dict().items() if ".temporal." not in name}
    unet.load_state_dict(unet.state_dict() | fill_by_rule(shapes))
    return unet.eval()


def random_time(unet: UNetModel) -> UNetModel:
    """Give every temporal weight a value, so that frames really mix."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if ".temporal." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return unet


def clip(num_frames: int, batch: int = 2, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, num_frames, 4, size, size, generator=generator)
    return x, torch.tensor([7, 981, 400, 3])[:batch], torch.randn(batch, 7, 24, generator=generator)


@pytest.fixture(scope="module")
def unet() -> UNetModel:
    return golden_unet()


def test_names_and_counts_are_those_of_stable_diffusion(golden_keys):
    with torch.device("meta"):
        video, image = UNetModel(**SD_V1), UNetModel(**SD_V1, temporal=False)
    expected = {
        name.removeprefix("model.diffusion_model."): tuple(shape)
        for name, (shape, _) in golden_keys["keys"].items()
        if name.startswith("model.diffusion_model.")
    }
    assert {name: tuple(value.shape) for name, value in image.state_dict().items()} == expected
    assert sum(p.numel() for p in image.parameters()) == 859_520_964
    assert sum(p.numel() for p in video.parameters()) == 1_100_564_216
    added = video.state_dict().keys() - image.state_dict().keys()
    assert len(added) == 244
    assert all(".temporal." in name for name in added)


@pytest.mark.parametrize("case", ["sd", "sd.rect", "sd.frac", "sd.small"])
def test_output_is_that_of_the_public_unet(unet, goldens, case):
    recorded = goldens("unet")
    x = recorded.get(f"{case}.x", recorded["sd.x"])
    timesteps = recorded.get(f"{case}.t", recorded["sd.t"])
    context = recorded.get(f"{case}.context", recorded["sd.context"])
    with torch.no_grad():
        assert relative_error(unet(x, timesteps, context), recorded[f"{case}.eps"]) <= 2e-5


def test_activations_are_those_of_the_public_unet(unet, goldens):
    recorded, seen = goldens("unet"), {}
    names = [name.removeprefix("sd.act.") for name in recorded if name.startswith("sd.act.")]
    hooks = [
        unet.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in names
    ]
    with torch.no_grad():
        unet(recorded["sd.x"], recorded["sd.t"], recorded["sd.context"])
    for hook in hooks:
        hook.remove()
    assert len(names) == 10
    for name in names:
        assert relative_error(seen[name], recorded[f"sd.act.{name}"]) <= 2e-5, name


@pytest.mark.parametrize(("case", "dim"), [("int", 32), ("frac", 320), ("odd", 33)])
def test_timestep_embedding(goldens, case, dim):
    recorded = goldens("unet")
    assert relative_error(timestep_embedding(recorded[f"temb.{case}.t"], dim), recorded[f"temb.{case}.out"]) <= 2e-5


@pytest.mark.parametrize("num_frames", [1, 5, 6, 16])
def test_day_zero_is_stable_diffusion_frame_by_frame(unet, num_frames):
    x, timesteps, context = clip(num_frames)
    unet, x, context = deepcopy(unet).double(), x.double(), context.double()
    with torch.no_grad():
        video = unet(x, timesteps, context)
        frames = [unet(x[:, index], timesteps, context) for index in range(num_frames)]
    assert (video - torch.stack(frames, dim=1)).abs().max() <= 1e-13 * video.abs().max()


def test_without_time_a_trained_network_is_the_image_network():
    unet, image = random_time(golden_unet()), golden_unet(temporal=False)
    x, timesteps, context = clip(5)
    with torch.no_grad():
        expected = torch.stack([image(frame, timesteps, context) for frame in x.unbind(1)], dim=1)
        assert relative_error(unet(x, timesteps, context, enable_time=False), expected) <= 2e-6
        assert relative_error(unet(x[:, :1], timesteps, context), expected[:, :1]) <= 2e-6
        assert relative_error(unet(x, timesteps, context), expected) > 1e-2


def test_frames_of_a_clip_mix_and_clips_do_not():
    unet = random_time(golden_unet())
    x, timesteps, context = clip(5)
    changed = x.clone()
    changed[0, 4] += 1
    with torch.no_grad():
        difference = (unet(changed, timesteps, context) - unet(x, timesteps, context)).abs().amax(dim=(2, 3, 4))
    assert (difference[0] > 1e-5).all()
    assert (difference[1] == 0).all()


@pytest.mark.parametrize("words", [{"temporal_attention": False}, {"temporal_kernel_size": None}], ids=str)
def test_one_kind_of_layers_over_time_alone(words):
    """It has no parameter of the other kind, the same names for its own, starts as the image network and mixes."""
    whole, part = set(golden_unet().state_dict()), set(golden_unet(**words).state_dict())
    attention = {name for name in whole if ".transformer_blocks." in name and ".temporal." in name}
    convolutions = {name for name in whole if ".temporal." in name} - attention
    left_out = attention if "temporal_attention" in words else convolutions
    assert whole - part == left_out and not part - whole and attention and convolutions
    x, timesteps, context = clip(5)
    changed = x.clone()
    changed[:, 4] += 1
    with torch.no_grad():
        image = golden_unet(temporal=False)
        frames = [image(frame, timesteps, context) for frame in x.unbind(1)]
        assert relative_error(golden_unet(**words)(x, timesteps, context), torch.stack(frames, 1)) <= 2e-6
        unet = random_time(golden_unet(**words))
        difference = (unet(changed, timesteps, context) - unet(x, timesteps, context)).abs().amax(dim=(2, 3, 4))
    assert (difference > 1e-5).all()


def test_the_caption_is_read_once_per_clip(unet):
    x, timesteps, context = clip(6)
    lengths = []
    hook = (
        unet.input_blocks[1][1]
        .transformer_blocks[0]
        .attn2.to_k.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[0]))
    )
    with torch.no_grad():
        unet(x, timesteps, context)
    hook.remove()
    assert lengths == [2]


def test_a_clip_gets_its_own_caption_and_step(unet):
    x, timesteps, context = clip(3)
    with torch.no_grad():
        together = unet(x, timesteps, context)
        alone = torch.cat([unet(x[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(2)])
    assert relative_error(together, alone) <= 2e-6


def test_recomputing_in_the_backward_pass_changes_nothing():
    gradients = []
    for use_checkpoint in (False, True):
        unet = random_time(golden_unet(use_checkpoint=use_checkpoint))
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_("attn1" not in name)
        unet(*clip(5)).square().mean().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters() if p.requires_grad})
    assert all(gradients[1][name] is not None for name in gradients[0])
    assert max(relative_error(gradients[1][name], value) for name, value in gradients[0].items()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    unet = random_time(golden_unet())
    x, timesteps, context = clip(5)
    with torch.no_grad():
        expected = unet(x, timesteps, context)
        half = unet.to(dtype)(x.to(dtype), timesteps, context.to(dtype))
    assert half.dtype == dtype
    assert relative_error(half.float(), expected) <= (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("backend", ["math"])
def test_back_ends_agree(backend):
    inputs = clip(5)
    with torch.no_grad():
        expected = random_time(golden_unet())(*inputs)
        assert relative_error(random_time(golden_unet(attention_backend=backend))(*inputs), expected) <= 2e-5


def test_a_fresh_network_predicts_zero():
    with torch.no_grad():
        assert UNetModel(**GOLDEN)(*clip(5)).abs().max() == 0


def test_clips_may_be_rectangular(unet):
    x, timesteps, context = clip(5)
    x = rearrange(x, "b t c (h1 h2) w -> b t c h1 (h2 w)", h1=8)
    wide = torch.cat([x, x.roll(1, -1)], dim=-1)
    with torch.no_grad():
        assert unet(wide, timesteps, context).shape == wide.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, c: (x[..., :7], t, c), "multiples of 8, found 8x7"),
        (lambda x, t, c: (x[:, :, :3], t, c), r"c = 4, found shape \(2, 5, 3, 8, 8\)"),
        (lambda x, t, c: (x, t, c[:1]), r"one caption a clip, context 2 n 24, found shape \(1, 7, 24\)"),
        (lambda x, t, c: (x, t, c[..., :8]), r"context 2 n 24, found shape \(2, 7, 8\)"),
    ],
)
def test_inputs_of_a_wrong_shape_are_refused(unet, change, message):
    with pytest.raises(UserError, match=message):
        unet(*change(*clip(5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal_kernel_size": 2}, "expected an odd number of frames .* found 2"),
        ({"temporal_kernel_size": None, "temporal_attention": False}, "temporal: expected convolutions or attention"),
        ({"model_channels": 48}, "model_channels: expected a multiple of 32 .* found 48"),
        ({"channel_mult": [1, 2], "num_heads": 24}, "multiple of 2 x num_heads = 48, found 1 x 32"),
        ({"attention_backend": "flash"}, "expected one of triton, math, sdpa, flash_attn, .*, auto, found 'flash'"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        UNetModel(**GOLDEN | options)
