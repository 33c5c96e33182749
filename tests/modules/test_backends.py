"""Attention back ends: each against the formula in float64, which one is chosen, and why one cannot be used."""

from __future__ import annotations

import copy
import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ldm.errors import UserError
from ldm.modules.backends import (
    BACKENDS,
    attend,
    check_backend,
    choose,
    choosing_for_gpu,
    few_frames,
    in_parts,
    num_launches,
    options,
    triton_op,
)
from ldm.modules.backends.interface import Case, Frames
from ldm.modules.backends.triton_op import temporal_attention, why_not
from ldm.modules.temporal import MAX_PERIOD, TemporalAttention, rotate_by_position
from tests.conftest import draw, relative_error

pytestmark = pytest.mark.numeric
HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_GPU = torch.cuda.is_available()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def formula(q, k, v, frames: Frames) -> torch.Tensor:
    """softmax(q k' / sqrt(d)) v of each pixel and head, rotated by complex numbers, in float64."""
    t, num_pixels = frames.num_frames, q.shape[1]
    shape = {"t": t, "heads": frames.num_heads}
    q, k, v = (rearrange(x.double(), "(b t) n (heads d) -> b n heads t d", **shape) for x in (q, k, v))
    if frames.max_period:
        speeds = frames.max_period ** (-torch.arange(0, q.shape[-1], 2).double().to(q.device) / q.shape[-1])
        turn = torch.polar(torch.ones_like(speeds), torch.arange(t, device=q.device)[:, None] * speeds)
        q, k = (torch.complex(*x.chunk(2, dim=-1)) * turn for x in (q, k))
        q, k = (torch.cat([x.real, x.imag], dim=-1) for x in (q, k))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if frames.radius >= 0:
        index = torch.arange(t, device=q.device)
        sees = ((index[:, None] - index).abs() <= frames.radius) | (frames.sees_first & (index == 0))
        logits = logits.masked_fill(~sees, -torch.inf)
    return rearrange(logits.softmax(-1) @ v, "b n heads t d -> (b t) n (heads d)", n=num_pixels)


def check(run, joined: torch.Tensor, frames: Frames, tolerance: float, slope: torch.Tensor) -> None:
    """`run` and its gradients against the formula, on strided parts of one tensor; both relative, L2."""
    joined = joined.requires_grad_()
    out = run(*joined.chunk(3, dim=-1), frames)
    (found,) = torch.autograd.grad(out, joined, slope)
    exact = joined.detach().double().requires_grad_()
    expected = formula(*exact.chunk(3, dim=-1), frames)
    (gradient,) = torch.autograd.grad(expected, exact, slope.double())
    assert out.is_contiguous() and out.dtype == joined.dtype
    assert relative_error(out.cpu(), expected.cpu()) <= tolerance
    assert relative_error(found.cpu(), gradient.cpu()) <= tolerance


def test_formula_rotates_as_the_network_does():
    x = draw(1, 2, 7, 8).double()
    q, k = (rearrange(y, "b heads t d -> (b t) 1 (heads d)") for y in (x, x.flip(-1)))
    ours = attend(rotate_by_position(x), rotate_by_position(x.flip(-1)), x, "math")
    theirs = formula(q, k, q, Frames(7, 2, MAX_PERIOD))
    # Angles are float32: up to 6 rad with an error of half a ulp, 2.4e-7.
    assert relative_error(rearrange(ours, "1 heads t d -> t 1 (heads d)"), theirs) <= 1e-6


@pytest.fixture
def device(monkeypatch):
    """A GPU, or Triton's interpreter on the CPU."""
    pytest.importorskip("triton")
    if ON_GPU:
        return CUDA
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    loaded = sys.modules.get("ldm.modules.backends.triton_kernel")
    assert loaded is None or type(loaded._forward).__name__ == "InterpretedFunction", "the kernels were compiled before"
    return CPU


CASES = {  # clips, pixels, channels of a head, frames
    "pixels share a tile, the last one is not full": (2, 7, 8, Frames(5, 2, 1e4)),
    "two frames": (1, 9, 40, Frames(2, 2, 1e4)),
    "a full tile": (1, 2, 80, Frames(16, 1, 1e4)),
    "a window and the first frame": (1, 1, 160, Frames(25, 1, 1e4, 2, True)),
    "a window without positions": (1, 1, 40, Frames(64, 1, 0.0, 8)),
    "a small odd half": (2, 5, 6, Frames(3, 3, 0.0)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_triton_kernels_compute_the_formula_for_any_strides(device, case, dtype, tolerance):
    clips, pixels, dim, frames = CASES[case]
    rows, width = clips * frames.num_frames, frames.num_heads * dim
    joined, slope = draw(rows, pixels, 3 * width), draw(rows, width, pixels, seed=1)
    check(triton_op.run, joined.to(device, dtype), frames, tolerance, slope.to(device, dtype).mT)


@pytest.mark.parametrize("num_frames", [2, 5, 8])
@pytest.mark.parametrize("max_period", [MAX_PERIOD, 0.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_few_frames_compute_the_formula(num_frames, max_period, dtype, tolerance):
    """bfloat16 is rounded once, at the end: by at most 2**-9 of each number."""
    joined, slope = draw(2 * num_frames, 6, 3 * 64).to(dtype), draw(2 * num_frames, 6, 64, seed=1).to(dtype)
    check(few_frames.run, joined, Frames(num_frames, 8, max_period), tolerance, slope)


@pytest.mark.parametrize("changes_only", [True, False])
@pytest.mark.parametrize(
    ("backend", "options"),
    [("few_frames", {}), ("few_frames", {"positions": False}), ("triton", {}), ("triton", {"positions": False}),
     ("triton", {"local": 3, "sees_first": True})],
)  # fmt: skip
def test_layer_agrees_with_matrix_products(request, backend, options, changes_only):
    """Output and gradients as close to float64 as those of the products, which round as much."""
    where = request.getfixturevalue("device") if backend == "triton" else CPU
    layers = [TemporalAttention(64, 8, name, **options) for name in (backend, "math")]
    torch.nn.init.normal_(layers[0].to_out.weight, std=0.1)
    layers[1].load_state_dict(layers[0].state_dict())
    layers = [layer.to(where) for layer in (*layers, copy.deepcopy(layers[1]).double())]
    x, found = draw(10, 6, 64).to(where), []
    for layer in layers:
        layer.changes_only = changes_only
        given = x.to(layer.to_q.weight.dtype, copy=True).requires_grad_()
        out = layer(given, 5)
        found.append([out, *torch.autograd.grad(out.square().sum(), [given, *layer.parameters()])])
    for ours, theirs, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) <= max(1e-6, 2 * relative_error(theirs, exact))


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_parts_equals_attention(backend, masked):
    q, k, v = draw(3, 7, 2, 4, 8).double().unbind(0)
    mask = torch.ones(1, 2, 4, 4, dtype=torch.bool).tril() if masked else None
    whole = attend(q, k, v, backend, mask)
    assert relative_error(whole, attend(q, k, v, "math", mask)) <= 1e-6  # its softmax is float32
    for num_parts in (2, 3, 7):
        assert relative_error(in_parts(BACKENDS[backend].run, q, k, v, mask, num_parts), whole) <= 1e-7


@pytest.mark.parametrize(("batch", "heads"), [(1, 8), (8191, 8), (8192, 8), (40_960, 8), (20_000, 5)])
def test_large_batches_are_launched_in_parts_that_fit(batch, heads):
    parts = torch.empty(batch, 0).chunk(num_launches(batch, heads))
    assert len(parts) == num_launches(batch, heads)
    assert all(len(part) * heads <= 65_535 for part in parts)
    assert len(parts) == 1 or len(parts[0]) * (len(parts) - 1) * heads < batch * heads


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["sdpa", "math", *(["triton"] if HAS_TRITON else [])])
def test_more_rows_than_a_grid_has_on_a_gpu(backend):
    layer = TemporalAttention(16, 2, backend).cuda()
    torch.nn.init.normal_(layer.to_out.weight)
    x = torch.randn(2, 70_000, 16, device="cuda")
    assert relative_error(layer(x, 2)[:, -5:], layer(x[:, -5:], 2)) <= 1e-3


def name_of(backend) -> str | None:
    return next((name for name, one in BACKENDS.items() if one is backend), None)


def auto_for_rows(device: torch.device, dtype: torch.dtype, num_queries: int, num_keys: int, dim: int) -> str:
    case = Case(device, dtype, 8, num_queries, num_keys, dim)
    assert choose("triton", case) is choose("auto", case)  # a back end for frames alone
    assert name_of(choose("sdpa", case)) == "sdpa"
    return name_of(choose("auto", case))


def test_auto_takes_products_for_short_rows():
    full, half = torch.float32, torch.bfloat16
    assert auto_for_rows(CPU, full, 5, 5, 40) == auto_for_rows(CPU, half, 1280, 77, 40) == "math"
    assert auto_for_rows(CPU, full, 256, 256, 40) == auto_for_rows(CPU, half, 1024, 1024, 40) == "sdpa"
    assert auto_for_rows(CPU, full, 256, 256, 8) == auto_for_rows(CPU, half, 256, 256, 40) == "math"
    assert auto_for_rows(CPU, half, 20_480, 77, 40) == auto_for_rows(CPU, full, 20_480, 77, 8) == "sdpa"  # many weights
    assert auto_for_rows(CUDA, half, 5, 5, 40) == "math"
    assert auto_for_rows(CUDA, half, 20_480, 77, 40) == "sdpa"


FEW = Case(CPU, torch.float32, 1024, 5, 5, 8)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (FEW, "few_frames"),
        (FEW._replace(dtype=torch.bfloat16), "few_frames"),
        (FEW._replace(num_rows=511), None),
        (FEW._replace(dim=80), None),
        (FEW._replace(num_keys=16), None),
        (FEW._replace(is_masked=True), None),
        (FEW._replace(device=torch.device("meta")), None),
        (FEW._replace(device=CUDA), "triton"),
        (FEW._replace(device=CUDA, num_keys=65), None),
    ],
    ids=str,
)
def test_auto_over_frames(case, expected, monkeypatch):
    monkeypatch.setattr(triton_op, "is_installed", lambda: True)
    monkeypatch.setattr(triton_op, "_shared_memory", lambda device: 99 * 1024)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # never by itself
    assert name_of(choose("auto", case, over_frames=True)) == expected
    assert choose("sdpa", case, over_frames=True) is choose("math", case, over_frames=True) is None


def test_a_layer_runs_the_chosen_entry_of_the_registry(monkeypatch):
    calls = []
    entry = BACKENDS["few_frames"]
    run = replace(entry, run=lambda *arguments: calls.append(arguments[3]) or entry.run(*arguments))
    monkeypatch.setitem(BACKENDS, "few_frames", run)
    TemporalAttention(64, 8, "auto")(torch.zeros(10, 64, 64), 5)
    TemporalAttention(64, 8, "auto", local=3)(torch.zeros(10, 64, 64), 5)
    assert calls == [Frames(5, 8, MAX_PERIOD)]


def test_memory_is_counted_as_on_a_gpu_with_triton():
    case = FEW._replace(device=torch.device("meta"), num_keys=64)
    with choosing_for_gpu():
        assert name_of(choose("auto", case, over_frames=True)) == "triton"
        assert choose("auto", case._replace(num_keys=65), over_frames=True) is None
        assert choose("sdpa", case, over_frames=True) is None
    assert choose("auto", case, over_frames=True) is None


def test_triton_operator_has_shapes_and_costs_without_a_gpu():
    """On tensors without values: it keeps its three inputs for the backward pass, and costs as torch's own."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k, v = (torch.empty(10, 6, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        out = temporal_attention(q, k, v, 5, 2, 1e4, -1, False)
        assert [saved.shape for saved in out.grad_fn.saved_tensors] == [q.shape] * 3
        out.sum().backward()
    assert out.shape == q.shape and q.grad.shape == q.shape
    assert counter.get_total_flops() == 14 * q.numel() * 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": CPU}, "tensors are on 'cpu'"),
        ({"dtype": torch.float64}, "the tensors are torch.float64"),
        ({"num_keys": 65}, "there are 65 frames, the kernel takes at most 64"),
        ({"dim": 258}, "heads have 258 channels"),
        ({"dim": 256, "num_keys": 64, "dtype": torch.float32}, "bytes of shared memory .* the GPU has 101376"),
    ],
)
def test_triton_says_why_it_cannot_be_used(change, reason, monkeypatch):
    monkeypatch.setattr(triton_op, "is_installed", lambda: True)
    monkeypatch.setattr(triton_op, "_shared_memory", lambda device: 99 * 1024)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sound = Case(CUDA, torch.bfloat16, 8, 16, 16, 40)
    assert why_not(sound) is why_not(None) is None
    with pytest.raises(UserError, match=f"'triton' cannot be used here: .*{reason}.*; or use 'auto', 'sdpa' or 'math'"):
        choose("triton", sound._replace(**change), over_frames=True)


@pytest.mark.parametrize("backend", ["flash_attn", "xformers", "triton"])
def test_a_missing_package_is_an_error_at_once(backend, monkeypatch):
    monkeypatch.setattr(triton_op, "is_installed", lambda: False)
    for name in ("flash_attn", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"'{backend}' cannot be used here: .*pip install .*; or use 'auto'"):
        check_backend(backend)
    check_backend("auto")


@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
def test_packages_for_gpus_refuse_other_tensors(backend, monkeypatch):
    for name in ("flash_attn", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, sys)
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(UserError, match="it needs an NVIDIA GPU, the tensors are on 'cpu'"):
        attend(q, q, q, backend)
    reason = BACKENDS[backend].why_not(Case(CUDA, torch.float32, 8, 16, 16, 40))
    assert reason is None if backend == "xformers" else "float16 or bfloat16, the tensors are torch.float32" in reason


def test_options_of_configs():
    assert set(options()) == {"auto", "sdpa", "math", "flash_attn", "xformers", "triton"}
    assert set(options(takes_mask=True)) == {"auto", "sdpa", "math", "triton"}
