"""Temporal layers: the recorded pseudo-3D convolution, the identity at the start, and attention over any length."""

import math

import pytest
import torch
from einops import rearrange, repeat
from torch import nn

from ldm.errors import UserError
from ldm.modules.nn import use_channels_last
from ldm.modules.temporal import PseudoConv3d, TemporalAttention, TemporalConv, see_changes_only
from tests.conftest import fill_by_rule, golden_tensor, relative_error

CONVOLUTIONS = {"k3": (6, 10, 3, 3), "k3t5": (6, 6, 3, 5), "k7t3": (4, 8, 7, 3)}


def golden_conv(name: str) -> PseudoConv3d:
    """The recorded layer; in it the parts were called spatial_conv and temporal_conv, and time was as wide as space."""
    in_channels, out_channels, kernel_size, temporal_kernel_size = CONVOLUTIONS[name]
    conv = PseudoConv3d(in_channels, out_channels, kernel_size, temporal_kernel_size=temporal_kernel_size)
    recorded = {"spatial_conv.": conv, "temporal_conv.": conv.temporal}
    for prefix, part in recorded.items():
        for parameter in ("weight", "bias"):
            value = getattr(part, parameter)
            value.data = golden_tensor(prefix + parameter, tuple(value.shape))
    return conv


def run(conv: PseudoConv3d, x: torch.Tensor, enable_time: bool = True) -> torch.Tensor:
    """Apply to the recorded layout `b c t h w`, with the memory format the network uses."""
    num_frames = x.shape[2]
    folded = rearrange(x, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
    return rearrange(conv(folded, num_frames if enable_time else None), "(b t) c h w -> b c t h w", t=num_frames)


@pytest.mark.parametrize("frames", [1, 5, 6])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_pseudo_conv_is_the_recorded_one(goldens, name, frames):
    recorded, conv = goldens("pseudo3d"), golden_conv(name)
    x = recorded[f"pconv.{name}.f{frames}.x"]
    assert relative_error(run(conv, x), recorded[f"pconv.{name}.f{frames}.out"]) <= 2e-5
    assert relative_error(run(conv, x, enable_time=False), recorded[f"pconv.{name}.f{frames}.no_time"]) <= 2e-5
    torch.nn.init.dirac_(conv.temporal.weight)
    torch.nn.init.zeros_(conv.temporal.bias)
    assert relative_error(run(conv, x), recorded[f"pconv.{name}.f{frames}.at_init"]) <= 2e-5


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_pseudo_conv_on_images(goldens, name):
    recorded = goldens("pseudo3d")
    image = recorded[f"pconv.{name}.f5.x"][:, :, 2]
    assert relative_error(golden_conv(name)(image), recorded[f"pconv.{name}.image.out"]) <= 2e-5


def test_temporal_conv_starts_as_the_exact_identity():
    x = torch.randn(10, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(TemporalConv(8, 5)(x, 5), x)


def test_temporal_conv_copies_nothing_in_channels_last_memory():
    conv, x = TemporalConv(8), torch.randn(10, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    seen = []
    original = torch.nn.functional.conv2d
    try:
        torch.nn.functional.conv2d = lambda view, *rest, **options: (
            seen.append(view.data_ptr()),
            original(view, *rest, **options),
        )[1]
        out = conv(x, 5)
    finally:
        torch.nn.functional.conv2d = original
    assert seen == [x.data_ptr()]
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [0, 2, 4])
def test_even_kernels_are_refused(size):
    with pytest.raises(UserError, match=f"expected an odd number of frames .* found {size}"):
        PseudoConv3d(4, 4, temporal_kernel_size=size)
    with pytest.raises(UserError, match=f"expected an odd number of pixels, found {size}"):
        PseudoConv3d(4, 4, size)


def filled_attention(dim: int = 32, num_heads: int = 2) -> TemporalAttention:
    layer = TemporalAttention(dim, num_heads)
    layer.load_state_dict(fill_by_rule({name: value.shape for name, value in layer.state_dict().items()}))
    return layer


def test_attention_starts_as_zero():
    x = torch.randn(10, 6, 32, generator=torch.Generator().manual_seed(0))
    assert TemporalAttention(32)(x, 5).abs().max() == 0


def test_attention_is_the_textbook_formula():
    """Against a loop over clips, pixels and heads that writes softmax(q k' / sqrt(d)) v and complex rotations out."""
    layer, frames, dim = filled_attention(), 5, 16
    x = torch.randn(2 * frames, 3, 32, generator=torch.Generator().manual_seed(0))
    normed = layer.norm(x)
    expected = torch.zeros_like(x)
    speeds = torch.tensor([10000 ** (-2 * i / dim) for i in range(dim // 2)])
    turn = torch.polar(torch.ones(frames, dim // 2), torch.arange(frames)[:, None] * speeds)

    def rotated(y):
        pairs = torch.complex(y[:, : dim // 2].contiguous(), y[:, dim // 2 :].contiguous()) * turn
        return torch.cat([pairs.real, pairs.imag], dim=1)

    for start in (0, frames):
        for pixel in range(3):
            tokens = normed[start : start + frames, pixel]
            for head in (slice(0, dim), slice(dim, 2 * dim)):
                q, k, v = (project(tokens)[:, head] for project in (layer.to_q, layer.to_k, layer.to_v))
                weights = (rotated(q) @ rotated(k).T / math.sqrt(dim)).softmax(-1)
                expected[start : start + frames, pixel, head] = weights @ v
    assert relative_error(layer(x, frames), layer.to_out(expected)) <= 1e-5


def test_position_counts_distance_and_not_place():
    """Two equal frames apart from all others answer alike wherever the pair stands, and order matters."""
    layer = filled_attention()
    x = torch.randn(7, 1, 32, generator=torch.Generator().manual_seed(0))
    forwards, backwards = layer(x, 7), layer(x.flip(0), 7).flip(0)
    assert relative_error(forwards, backwards) > 1e-2
    q = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)).expand(9, 16)
    from ldm.modules.temporal import rotate_by_position  # noqa: PLC0415

    products = rotate_by_position(q) @ rotate_by_position(q).T
    assert torch.allclose(products[0, :5], products[4, 4:], atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 6, 60, 300])
def test_attention_is_defined_for_every_length(frames):
    out = filled_attention()(torch.randn(frames, 2, 32), frames)
    assert out.shape == (frames, 2, 32)
    assert out.isfinite().all()


def test_a_width_that_cannot_be_rotated_is_refused():
    with pytest.raises(UserError, match=r"multiple of 16 \(2 x 8 heads.*found 24"):
        TemporalAttention(24)


def test_layers_that_see_changes_only_treat_equal_frames_as_images_whatever_is_learned():
    torch.manual_seed(0)
    conv, attention = TemporalConv(8), TemporalAttention(16, num_heads=2)
    see_changes_only(nn.ModuleList([conv, attention]))
    assert conv.bias is None and attention.to_out.bias is None
    for parameter in (*conv.parameters(), *attention.parameters()):
        nn.init.normal_(parameter)
    still = repeat(torch.randn(2, 8, 3, 4), "b c h w -> (b t) c h w", t=5)
    assert torch.allclose(conv(still, 5), still, atol=1e-5)
    tokens = repeat(torch.randn(2, 6, 16), "b n c -> (b t) n c", t=5)
    assert attention(tokens, 5).abs().max() < 1e-5
    moving = torch.randn(10, 8, 3, 4)
    assert (conv(moving, 5) - moving).abs().mean() > 0.1
    assert attention(torch.randn(10, 6, 16), 5).abs().mean() > 0.1


def test_a_convolution_that_sees_changes_only_still_starts_as_the_identity():
    conv = TemporalConv(8)
    see_changes_only(conv)
    moving = torch.randn(10, 8, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(conv(moving, 5), moving)


def test_kernels_lie_as_activations_do_and_so_do_their_gradients():
    torch.manual_seed(0)
    plain, laid = (PseudoConv3d(8, 16) for _ in range(2))
    laid.load_state_dict(plain.state_dict())
    use_channels_last(laid)
    x = torch.randn(10, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    outs = [conv(x, 5) for conv in (plain, laid)]
    for out in outs:
        out.square().sum().backward()
    assert relative_error(outs[1], outs[0]) < 1e-5
    for kernel, of_plain in ((laid.weight, plain.weight), (laid.temporal.weight, plain.temporal.weight)):
        assert torch.equal(kernel, of_plain)
        as_2d = kernel if kernel.ndim == 4 else kernel.unsqueeze(-1)
        assert as_2d.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
        assert kernel.grad.stride() == kernel.stride()
        assert relative_error(kernel.grad, of_plain.grad) < 1e-5
    strides = laid.weight.stride()
    laid.load_state_dict(plain.state_dict())
    assert laid.weight.stride() == strides
