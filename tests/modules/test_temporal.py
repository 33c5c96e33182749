"""Temporal layers: the recorded pseudo-3D convolution, initialisation, attention over any number of frames, windows.

In float64 where kernels of float32 differ between CPUs; angles and softmax stay float32.
"""

import math

import pytest
import torch
from einops import rearrange, repeat
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.errors import UserError
from ldm.modules.backends import attend
from ldm.modules.nn import use_channels_last
from ldm.modules.temporal import (
    FrameWindow,
    PseudoConv3d,
    TemporalAttention,
    TemporalConv,
    attend_locally,
    check_window,
    rotate_by_position,
    see_changes_only,
)
from tests.conftest import draw, fill_by_rule, golden_tensor, relative_error

pytestmark = pytest.mark.numeric
CONVOLUTIONS = {"k3": (6, 10, 3, 3), "k3t5": (6, 6, 3, 5), "k7t3": (4, 8, 7, 3)}


def golden_conv(name: str) -> PseudoConv3d:
    """The recorded layer, whose parts were called spatial_conv and temporal_conv."""
    in_channels, out_channels, kernel_size, temporal_kernel_size = CONVOLUTIONS[name]
    conv = PseudoConv3d(in_channels, out_channels, kernel_size, temporal_kernel_size=temporal_kernel_size)
    for prefix, part in {"spatial_conv.": conv, "temporal_conv.": conv.temporal}.items():
        for parameter in ("weight", "bias"):
            value = getattr(part, parameter)
            value.data = golden_tensor(prefix + parameter, tuple(value.shape))
    return conv.double()


def run(conv: PseudoConv3d, x: torch.Tensor, enable_time: bool = True) -> torch.Tensor:
    """Apply to the recorded layout `b c t h w`, with the memory format the network uses."""
    num_frames = x.shape[2]
    folded = rearrange(x.double(), "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
    return rearrange(conv(folded, num_frames if enable_time else None), "(b t) c h w -> b c t h w", t=num_frames)


@pytest.mark.parametrize("frames", [1, 5, 6])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_pseudo_conv_is_the_recorded_one(goldens, name, frames):
    recorded, conv = goldens("pseudo3d"), golden_conv(name)
    x = recorded[f"pconv.{name}.f{frames}.x"]
    assert relative_error(run(conv, x), recorded[f"pconv.{name}.f{frames}.out"]) <= 2e-5
    assert relative_error(run(conv, x, enable_time=False), recorded[f"pconv.{name}.f{frames}.no_time"]) <= 2e-5
    if frames == 5:
        assert relative_error(conv(x[:, :, 2].double()), recorded[f"pconv.{name}.image.out"]) <= 2e-5
    nn.init.dirac_(conv.temporal.weight)
    nn.init.zeros_(conv.temporal.bias)
    assert relative_error(run(conv, x), recorded[f"pconv.{name}.f{frames}.at_init"]) <= 2e-5


@pytest.mark.parametrize(("kernel_size", "changes_only"), [(5, False), (3, True)])
def test_temporal_conv_is_initialised_to_the_exact_identity(kernel_size, changes_only):
    conv, x = TemporalConv(8, kernel_size), draw(10, 8, 4, 4)
    see_changes_only(conv, changes_only)
    assert torch.equal(conv(x, 5), x)


def test_temporal_conv_copies_nothing_in_channels_last_memory(monkeypatch):
    conv, x = TemporalConv(8), draw(10, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    seen, plain = [], nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda x, *_, **__: seen.append(x.data_ptr()) or plain(x, *_, **__))
    assert conv(x, 5).is_contiguous(memory_format=torch.channels_last)
    assert seen == [x.data_ptr()]


@pytest.mark.parametrize("size", [0, 2, 4])
def test_even_kernels_are_refused(size):
    with pytest.raises(UserError, match=f"expected an odd number of frames .* found {size}"):
        PseudoConv3d(4, 4, temporal_kernel_size=size)
    with pytest.raises(UserError, match=f"expected an odd number of pixels, found {size}"):
        PseudoConv3d(4, 4, size)


def filled_attention(**options) -> TemporalAttention:
    layer = TemporalAttention(32, 2, **options)
    layer.load_state_dict(fill_by_rule({name: value.shape for name, value in layer.state_dict().items()}))
    return layer.double().requires_grad_(False)


def test_attention_is_initialised_to_zero():
    assert TemporalAttention(32)(draw(10, 6, 32), 5).abs().max() == 0


def test_attention_is_the_textbook_formula():
    """Against a loop over clips, pixels and heads that writes softmax(q k' / sqrt(d)) v and complex rotations out."""
    layer, frames, dim = filled_attention(), 5, 16
    x = draw(2 * frames, 3, 32).double()
    normed = layer.norm(x)
    expected = torch.zeros_like(x)
    speeds = torch.tensor([10000 ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones(frames, dim // 2).double(), torch.arange(frames)[:, None] * speeds)

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
    assert relative_error(layer(x, frames), layer.to_out(expected)) <= 1e-6


def test_rotation_counts_distance_alone():
    q = draw(1, 16, seed=1).double().expand(9, 16)
    products = rotate_by_position(q) @ rotate_by_position(q).T
    assert torch.allclose(products[0, :5], products[4, 4:], atol=1e-5)  # angles up to 8 rad in float32


def test_order_of_frames_matters_with_positions_alone():
    x, order = draw(7, 4, 32).double(), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    without, with_positions = filled_attention(positions=False), filled_attention()
    assert relative_error(without(x[order], 7), without(x, 7)[order]) <= 1e-13
    for index in (order, torch.arange(6, -1, -1)):
        assert relative_error(with_positions(x[index], 7), with_positions(x, 7)[index]) > 1e-2


@pytest.mark.parametrize("frames", [1, 2, 6, 60, 300])
def test_attention_is_defined_for_every_length(frames):
    out = filled_attention()(draw(frames, 2, 32).double(), frames)
    assert out.shape == (frames, 2, 32) and out.isfinite().all()


def test_a_width_that_cannot_be_rotated_is_refused():
    with pytest.raises(UserError, match=r"multiple of 16 \(2 x 8 heads.*found 24"):
        TemporalAttention(24)


def test_layers_that_see_changes_only_treat_equal_frames_as_images():
    conv, attention = TemporalConv(8).double(), TemporalAttention(16, num_heads=2).double()
    see_changes_only(nn.ModuleList([conv, attention]))
    assert conv.bias is None and attention.to_out.bias is None
    for parameter in (*conv.parameters(), *attention.parameters()):
        nn.init.normal_(parameter)
    still = repeat(draw(2, 8, 3, 4).double(), "b c h w -> (b t) c h w", t=5)
    assert relative_error(conv(still, 5), still) <= 1e-13
    tokens = repeat(draw(2, 6, 16).double(), "b n c -> (b t) n c", t=5)
    assert attention(tokens, 5).abs().max() <= 1e-12
    moving = draw(10, 8, 3, 4).double()
    assert (conv(moving, 5) - moving).abs().mean() > 0.1
    assert attention(draw(10, 6, 16).double(), 5).abs().mean() > 0.1


def test_channels_last_kernels_keep_values_and_the_layout_of_gradients():
    """In float32, as torch has no such kernel in float64: sums of up to 160 terms, so 160 roundings."""
    plain, laid = (PseudoConv3d(8, 16) for _ in range(2))
    laid.load_state_dict(plain.state_dict())
    use_channels_last(laid)
    x = draw(10, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    outs = [conv(x, 5) for conv in (plain, laid)]
    for out in outs:
        out.square().sum().backward()
    assert relative_error(outs[1], outs[0]) <= 1e-5
    for kernel, of_plain in ((laid.weight, plain.weight), (laid.temporal.weight, plain.temporal.weight)):
        assert torch.equal(kernel, of_plain)
        as_2d = kernel if kernel.ndim == 4 else kernel.unsqueeze(-1)
        assert as_2d.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
        assert kernel.grad.stride() == kernel.stride()
        assert relative_error(kernel.grad, of_plain.grad) <= 1e-5
    strides = laid.weight.stride()
    laid.load_state_dict(plain.state_dict())
    assert laid.weight.stride() == strides


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("sees_first", [False, True])
@pytest.mark.parametrize(("num_frames", "local"), [(65, 5), (17, 7), (6, 5), (9, 1), (4, 9)])
def test_local_attention_is_full_attention_with_a_banded_mask(backend, sees_first, num_frames, local):
    q, k, v = draw(3, 6, 2, num_frames, 8, seed=1).double()
    seen = (torch.arange(num_frames)[:, None] - torch.arange(num_frames)).abs() <= local // 2
    if sees_first:
        seen[:, 0] = True
    out = attend_locally(q, k, v, FrameWindow(local, sees_first), backend)
    assert relative_error(out, attend(q, k, v, "math", seen[None, None])) <= 1e-6
    if num_frames > local:
        assert relative_error(out, attend(q, k, v)) > 1e-2  # not attention to all


def test_a_local_layer_changes_only_with_the_frames_it_sees():
    layer, x = filled_attention(local=5, sees_first=True), draw(33, 4, 32).double()
    before = layer(x, 33)
    for frame, seen in ((20, {18, 19, 20, 21, 22}), (0, set(range(33)))):
        changed = x.clone()
        changed[frame] += draw(4, 32, seed=3)
        moved = (layer(changed, 33) - before).abs().amax(dim=(1, 2)) > 0
        assert set(moved.nonzero().flatten().tolist()) == seen


def test_local_work_and_memory_are_linear_in_the_frames():
    work, memory = {}, {}
    for local in (5, None):
        layer = TemporalAttention(32, 2, "math", local=local)
        for num_frames in (17, 257):
            x = draw(num_frames, 2, 32)
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


def test_windows_need_a_back_end_that_can_leave_frames_out():
    assert check_window(3, True, "math") == FrameWindow(3, True)
    with pytest.raises(UserError, match=r"attention_backend to be one of triton, math, sdpa, auto, .*found 'xformers'"):
        check_window(3, False, "xformers")
