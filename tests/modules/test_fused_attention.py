"""Attention over frames as one operator: its kernels against the mathematics, and what is known of it without a GPU."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from einops import rearrange
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ldm.errors import UserError
from ldm.modules import backends as attention_backends
from ldm.modules.backends import attend, attend_in_parts, check_backend, for_rows
from ldm.modules.backends import triton_op as fused_attention
from ldm.modules.backends.triton_op import temporal_attention, why_not
from ldm.modules.temporal import TemporalAttention, rotate_by_position
from tests.conftest import relative_error

HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_GPU = torch.cuda.is_available()


@pytest.fixture
def device(monkeypatch):
    """A card, or Triton's interpreter on the CPU."""
    pytest.importorskip("triton")
    if ON_GPU:
        return torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    loaded = sys.modules.get("ldm.modules.backends.triton_kernel")
    assert loaded is None or type(loaded._forward).__name__ == "InterpretedFunction", "the kernels were compiled before"
    return torch.device("cpu")


def by_the_formula(q, k, v, frames, heads, max_period, radius, sees_first):
    """softmax(q k' / sqrt(d)) v of each pixel and head, in float64."""
    num_pixels = q.shape[1]
    q, k, v = (rearrange(x.double(), "(b t) n (heads d) -> b n heads t d", t=frames, heads=heads) for x in (q, k, v))
    if max_period:
        speeds = max_period ** (-torch.arange(0, q.shape[-1], 2, dtype=torch.float64, device=q.device) / q.shape[-1])
        turn = torch.polar(torch.ones_like(speeds), torch.arange(frames, device=q.device)[:, None] * speeds)
        q, k = (torch.complex(*x.chunk(2, dim=-1)) * turn for x in (q, k))
        q, k = (torch.cat([x.real, x.imag], dim=-1) for x in (q, k))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if radius >= 0:
        place = torch.arange(frames, device=q.device)
        sees = ((place[:, None] - place).abs() <= radius) | (sees_first & (place == 0))
        logits = logits.masked_fill(~sees, -torch.inf)
    return rearrange(logits.softmax(-1) @ v, "b n heads t d -> (b t) n (heads d)", n=num_pixels)


CASES = {  # clips, frames, pixels, heads, channels of a head, longest period, radius, sees the first frame
    "pixels share a tile, the last one is not full": (2, 5, 7, 2, 8, 1e4, -1, False),
    "two frames": (1, 2, 9, 2, 40, 1e4, -1, False),
    "a full tile": (1, 16, 2, 1, 80, 1e4, -1, False),
    "a window and the first frame": (1, 25, 1, 1, 160, 1e4, 2, True),
    "a window without positions": (1, 64, 1, 1, 40, 0.0, 8, False),
    "a small odd half": (2, 3, 5, 3, 6, 0.0, -1, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_kernels_are_the_formula_read_through_any_strides(device, case, dtype, tolerance):
    clips, frames, pixels, heads, dim, *numbers = CASES[case]
    torch.manual_seed(0)
    beside = torch.randn(clips * frames, pixels, 3 * heads * dim, device=device).to(dtype).requires_grad_()
    grad = torch.randn(clips * frames, heads * dim, pixels, device=device).to(dtype).mT
    out = temporal_attention(*beside.chunk(3, dim=-1), frames, heads, *numbers)
    (found,) = torch.autograd.grad(out, beside, grad)
    exact = beside.detach().double().requires_grad_()
    expected = by_the_formula(*exact.chunk(3, dim=-1), frames, heads, *numbers)
    (gradient,) = torch.autograd.grad(expected, exact, grad.double())
    assert out.is_contiguous() and out.dtype == dtype
    assert relative_error(out.cpu().double(), expected.cpu()) <= tolerance
    assert relative_error(found.cpu().double(), gradient.cpu()) <= tolerance


@pytest.mark.parametrize("words", [{}, {"local": 3, "sees_first": True}, {"positions": False}])
def test_a_layer_says_the_same_by_the_kernel_and_by_mathematics(device, words):
    torch.manual_seed(0)
    layers = [TemporalAttention(16, 2, backend, **words).to(device) for backend in ("math", "triton")]
    layers[1].load_state_dict(layers[0].state_dict())
    torch.nn.init.normal_(layers[0].to_out.weight)
    layers[1].to_out.weight.data.copy_(layers[0].to_out.weight)
    x = torch.randn(12, 3, 16, device=device)
    outs = [layer(x, 6) for layer in layers]
    assert relative_error(outs[1], outs[0]) <= 1e-5
    for out in outs:
        out.square().sum().backward()
    for theirs, ours in zip(*(layer.parameters() for layer in layers), strict=True):
        assert relative_error(ours.grad, theirs.grad) <= 1e-4


def test_the_rotation_of_the_reference_is_that_of_the_network():
    x = torch.randn(1, 1, 2, 7, 8, dtype=torch.float64)
    q, k = (rearrange(y, "b n heads t d -> (b t) n (heads d)") for y in (x, x.flip(-1)))
    ours = attend(*(rotate_by_position(y[0]) for y in (x, x.flip(-1))), x[0], "math")
    theirs = by_the_formula(q, k, q, 7, 2, 1e4, -1, False)
    assert relative_error(rearrange(ours, "n heads t d -> t n (heads d)"), theirs) <= 1e-6


def test_without_a_gpu_its_shapes_and_operations_are_known():
    """On tensors without numbers: it keeps its three inputs for the backward pass, and costs as torch's own."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k, v = (torch.empty(10, 6, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        out = temporal_attention(q, k, v, 5, 2, 1e4, -1, False)
        assert [saved.shape for saved in out.grad_fn.saved_tensors] == [q.shape] * 3
        out.sum().backward()
    assert out.shape == q.shape and q.grad.shape == q.shape
    assert counter.get_total_flops() == 14 * q.numel() * 5


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"device": torch.device("cpu")}, "tensors are on 'cpu'"),
        ({"dtype": torch.float64}, "the tensors are torch.float64"),
        ({"num_frames": 65}, "there are 65 frames, the kernel takes 64"),
        ({"dim": 258}, "heads have 258 channels"),
        ({"dim": 256, "num_frames": 64, "dtype": torch.float32}, "bytes of shared memory"),
    ],
)
def test_where_the_kernel_cannot_be_used_it_says_why(what, reason, monkeypatch):
    monkeypatch.setattr(fused_attention, "is_installed", lambda: True)
    monkeypatch.setattr(fused_attention, "_shared_memory", lambda device: 99 * 1024)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sound = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "num_frames": 16, "dim": 40}
    assert why_not(**sound) is None
    assert reason in why_not(**{**sound, **what})


def test_a_kernel_asked_for_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(fused_attention, "is_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"'triton' cannot be used here: the tensors are on 'cpu'.*use 'auto'"):
        TemporalAttention(16, backend="triton")(torch.randn(4, 2, 16), 2)


def test_a_kernel_that_is_not_installed_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(attention_backends, "is_installed", lambda: False)
    with pytest.raises(UserError, match="'triton' cannot be used, its package is not installed"):
        check_backend("triton")
    check_backend("auto")


def test_auto_takes_mathematics_for_short_rows_and_never_the_interpreter(monkeypatch):
    full, half = torch.float32, torch.bfloat16
    assert for_rows("cpu", full, 5, 5, 40) == for_rows("cpu", half, 1280, 77, 40) == "math"
    assert for_rows("cpu", full, 256, 256, 40) == for_rows("cpu", half, 1024, 1024, 40) == "sdpa"
    assert for_rows("cpu", full, 256, 256, 8) == for_rows("cpu", half, 256, 256, 40) == "math"
    assert for_rows("cpu", half, 20_480, 77, 40) == for_rows("cpu", full, 20_480, 77, 8) == "sdpa"  # many to hold
    assert for_rows("cuda", half, 5, 5, 40) == "math"
    assert for_rows("cuda", half, 20_480, 77, 40) == "sdpa"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layer = TemporalAttention(16, backend="auto")
    assert not layer._is_fused(torch.zeros(5, 1, 16), 5)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_parts_is_attention(backend, masked):
    q, k, v = torch.randn(3, 7, 2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.ones(1, 2, 4, 4, dtype=torch.bool).tril() if masked else None
    whole = attend(q, k, v, backend, mask)
    for num_parts in (2, 3, 7):
        assert torch.allclose(attend_in_parts(q, k, v, backend, mask, num_parts), whole, atol=1e-6)


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["sdpa", "math", *(["triton"] if HAS_TRITON else [])])
def test_more_rows_than_a_grid_has_on_a_gpu(backend):
    layer = TemporalAttention(16, 2, backend).cuda()
    torch.nn.init.normal_(layer.to_out.weight)
    x = torch.randn(2, 70_000, 16, device="cuda")
    assert relative_error(layer(x, 2)[:, -5:], layer(x[:, -5:], 2)) <= 1e-3
