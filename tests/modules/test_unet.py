"""The UNet against the numbers of the public one, and what temporal layers may change.

In float64 where kernels of float32 differ between CPUs; then only the recorded numbers are rounded.
"""

from copy import deepcopy

import pytest
import torch
from einops import rearrange

from ldm.errors import UserError
from ldm.modules.nn import timestep_embedding
from ldm.modules.unet import UNetModel
from tests.conftest import draw, fill_by_rule, relative_error

pytestmark = pytest.mark.numeric
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
SMALL = GOLDEN | {"channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [1, 2], "num_heads": 4}


def make(sizes=SMALL, trained: bool = False, dtype=torch.float64, **options) -> UNetModel:
    """Image weights by the rule of the goldens; temporal ones as initialised, or random if `trained`."""
    torch.manual_seed(0)
    unet = UNetModel(**sizes | options)
    shapes = {name: value.shape for name, value in unet.state_dict().items() if ".temporal." not in name}
    unet.load_state_dict(unet.state_dict() | fill_by_rule(shapes))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if ".temporal." in name and trained:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return unet.to(dtype).requires_grad_(False)


def clip(num_frames: int, batch: int = 2, size: int = 8, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    x, context = draw(batch, num_frames, 4, size, size, seed=2), draw(batch, 7, 24, seed=3)
    return x.to(dtype), torch.tensor([7, 981, 400, 3])[:batch], context.to(dtype)


def frame_by_frame(unet: UNetModel, x, timesteps, context) -> torch.Tensor:
    return torch.stack([unet(frame, timesteps, context) for frame in x.unbind(1)], dim=1)


@pytest.fixture(scope="module")
def golden() -> UNetModel:
    return make(GOLDEN)


@pytest.fixture(scope="module")
def unet() -> UNetModel:
    return make()


@pytest.fixture(scope="module")
def trained() -> UNetModel:
    return make(trained=True)


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
def test_output_and_activations_are_those_of_the_public_unet(golden, goldens, case):
    recorded, seen = goldens("unet"), {}
    x, timesteps, context = (recorded.get(f"{case}.{name}", recorded[f"sd.{name}"]) for name in ("x", "t", "context"))
    names = [name.removeprefix(f"{case}.act.") for name in recorded if name.startswith(f"{case}.act.")]
    hooks = [
        golden.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in names
    ]
    assert relative_error(golden(x.double(), timesteps, context.double()), recorded[f"{case}.eps"]) <= 2e-5
    for hook in hooks:
        hook.remove()
    assert len(names) == (10 if case == "sd" else 0)
    for name in names:
        assert relative_error(seen[name], recorded[f"sd.act.{name}"]) <= 2e-5, name


@pytest.mark.parametrize(("case", "dim"), [("int", 32), ("frac", 320), ("odd", 33)])
def test_timestep_embedding(goldens, case, dim):
    recorded = goldens("unet")
    assert relative_error(timestep_embedding(recorded[f"temb.{case}.t"], dim), recorded[f"temb.{case}.out"]) <= 2e-5


@pytest.mark.parametrize("num_frames", [1, 5, 6, 16])
def test_an_untrained_video_network_is_stable_diffusion_frame_by_frame(golden, num_frames):
    x, timesteps, context = clip(num_frames)
    video = golden(x, timesteps, context)
    assert (video - frame_by_frame(golden, x, timesteps, context)).abs().max() <= 1e-13 * video.abs().max()


def test_without_time_a_trained_network_is_the_image_network(trained):
    x, timesteps, context = clip(5)
    expected = frame_by_frame(make(temporal=False), x, timesteps, context)
    assert relative_error(trained(x, timesteps, context, enable_time=False), expected) <= 1e-13
    assert relative_error(trained(x[:, :1], timesteps, context), expected[:, :1]) <= 1e-13
    assert relative_error(trained(x, timesteps, context), expected) > 1e-2


@pytest.mark.parametrize("options", [{}, {"temporal_attention": False}, {"temporal_kernel_size": None}], ids=str)
def test_frames_of_a_clip_mix_and_clips_do_not(unet, options):
    """Also with one kind of temporal layers alone, which has no parameter of the other kind."""
    network = make(trained=True, **options)
    names, part = set(unet.state_dict()), set(network.state_dict())
    attention = {name for name in names if ".transformer_blocks." in name and ".temporal." in name}
    convolutions = {name for name in names if ".temporal." in name} - attention
    left_out = {"temporal_attention": attention, "temporal_kernel_size": convolutions}
    assert names - part == left_out.get(next(iter(options), None), set()) and not part - names
    assert attention and convolutions
    x, timesteps, context = clip(5)
    assert relative_error(make(**options)(x, timesteps, context), frame_by_frame(unet, x, timesteps, context)) <= 1e-13
    changed = x.clone()
    changed[0, 4] += 1
    difference = (network(changed, timesteps, context) - network(x, timesteps, context)).abs().amax(dim=(2, 3, 4))
    assert (difference[0] > 1e-5).all()
    assert (difference[1] == 0).all()


def test_each_clip_has_its_own_caption_and_step_and_the_caption_is_projected_once(unet):
    x, timesteps, context = clip(3)
    lengths = []
    to_k = unet.input_blocks[1][1].transformer_blocks[0].attn2.to_k
    hook = to_k.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[0]))
    together = unet(x, timesteps, context)
    hook.remove()
    assert lengths == [2]
    alone = torch.cat([unet(x[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(2)])
    assert relative_error(together, alone) <= 1e-13


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float32, 1e-5)])
def test_lower_precision_stays_close(trained, dtype, bound):
    """Bounds in roundings of one number: 13 of bfloat16, 20 of float16, 170 of float32."""
    x, timesteps, context = clip(5)
    out = deepcopy(trained).to(dtype)(x.to(dtype), timesteps, context.to(dtype))
    assert out.dtype == dtype
    assert relative_error(out, trained(x, timesteps, context)) <= bound


def test_back_ends_agree(trained):
    """The softmax of the products is float32."""
    assert relative_error(make(trained=True, attention_backend="math")(*clip(5)), trained(*clip(5))) <= 2e-6


def test_a_fresh_network_predicts_zero_for_rectangular_clips_too():
    x, timesteps, context = clip(5)
    x = rearrange(x, "b t c (h1 h2) w -> b t c h1 (h2 w)", h1=8)
    wide = torch.cat([x, x.roll(1, -1)], dim=-1)
    out = UNetModel(**SMALL).double()(wide, timesteps, context)
    assert out.shape == wide.shape and out.abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, c: (x[..., :7], t, c), "multiples of 2, found 8x7"),
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
        ({"known_level_embedding": True}, r"known_level_embedding: expected a network that takes known frames"),
        ({"temporal_attention": {"local": 4}}, "local: expected an odd number of frames"),
        ({"temporal_attention": {"local": True}}, "local: expected an odd number of frames"),
        ({"temporal_attention": {"sees_first": True}}, "sees_first: means nothing without"),
        ({"temporal_attention": {"window": 5}}, "temporal_attention.window: expected one of local, sees_first"),
        ({"temporal_attention": {"positions": 1}}, "positions: expected true or false, found 1"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(UserError, match=message), torch.device("meta"):
        UNetModel(**GOLDEN | options)
