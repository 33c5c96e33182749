"""Attention over few frames by sums over maps: what it computes, its gradients, and when it is taken."""

import copy

import pytest
import torch

from ldm.modules import temporal
from ldm.modules.backends.cpu import attend_over_few_frames, is_suited
from ldm.modules.temporal import MAX_PERIOD, TemporalAttention

HEADS = 8


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def in_float64(q, k, v, num_frames: int, max_period: float) -> torch.Tensor:
    """The same as written in a textbook, pixel by pixel and head by head."""
    frames, tokens, width = q.shape
    dim = width // HEADS
    out = torch.zeros_like(q)
    for clip in range(frames // num_frames):
        rows = slice(clip * num_frames, (clip + 1) * num_frames)
        for head in range(HEADS):
            part = slice(head * dim, (head + 1) * dim)
            for token in range(tokens):
                queries, keys, values = (x[rows, token, part] for x in (q, k, v))
                if max_period:
                    queries, keys = (temporal.rotate_by_position(x, max_period) for x in (queries, keys))
                weights = (queries @ keys.T * dim**-0.5).softmax(-1)
                out[rows, token, part] = weights @ values
    return out


@pytest.mark.parametrize("num_frames", [2, 5, 8])
@pytest.mark.parametrize("max_period", [MAX_PERIOD, 0.0])
def test_it_is_attention_and_so_are_its_gradients(num_frames, max_period):
    inputs = [drawn(2 * num_frames, 6, 64, seed=seed).requires_grad_() for seed in range(3)]
    gradient = drawn(2 * num_frames, 6, 64, seed=3)
    expected = in_float64(*inputs, num_frames, max_period)
    wanted = torch.autograd.grad(expected, inputs, gradient)
    single = [x.detach().float().requires_grad_() for x in inputs]
    found = attend_over_few_frames(*single, num_frames, HEADS, max_period)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    for mine, theirs in zip(torch.autograd.grad(found, single, gradient.float()), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=5e-6)


def test_bfloat16_is_rounded_once_at_the_end():
    inputs = [drawn(10, 64, 64, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    exact = in_float64(*(x.double() for x in inputs), 5, MAX_PERIOD)
    found = attend_over_few_frames(*inputs, 5, HEADS, MAX_PERIOD)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("changes_only", [True, False])
def test_the_layer_takes_it_and_gives_what_matrix_products_give(monkeypatch, positions, changes_only):
    torch.manual_seed(0)
    few, plain = (TemporalAttention(64, HEADS, backend, positions=positions) for backend in ("auto", "math"))
    torch.nn.init.normal_(few.to_out.weight, std=0.1)
    plain.load_state_dict(few.state_dict())
    few.changes_only = plain.changes_only = changes_only
    calls = []
    monkeypatch.setattr(temporal, "attend_over_few_frames", lambda *a: calls.append(a[3]) or attend_over_few_frames(*a))
    x = drawn(10, 64, 64, dtype=torch.float32).requires_grad_()
    outs = [layer(x, 5) for layer in (few, plain)]
    assert calls == [5]
    torch.testing.assert_close(*outs, rtol=0, atol=2e-6)
    in_double = copy.deepcopy(plain).double(), x.detach().double().requires_grad_()
    mine, theirs, exact = (
        torch.autograd.grad(layer(given, 5).square().sum(), [given, *layer.parameters()])
        for layer, given in ((few, x), (plain, x), in_double)
    )
    for one, other, right in zip(mine, theirs, exact, strict=True):  # as near to the exact gradient as those are
        assert (one - right).abs().max() <= max(1e-5, 2 * (other - right).abs().max())


def test_it_is_left_alone_where_matrix_products_are_faster():
    q = torch.zeros(10, 64, 64)
    assert is_suited(q, 5, HEADS)
    assert not is_suited(q[:, :8], 5, HEADS)  # few rows
    assert not is_suited(torch.zeros(10, 64, 640), 5, HEADS)  # wide heads
    assert not is_suited(torch.zeros(32, 64, 64), 16, HEADS)  # many frames
    assert not is_suited(torch.zeros(10, 64, 64, device="meta"), 5, HEADS)


def test_local_attention_goes_another_way(monkeypatch):
    monkeypatch.setattr(temporal, "attend_over_few_frames", lambda *a: pytest.fail("it knows no windows"))
    layer = TemporalAttention(64, HEADS, "auto", local=3)
    assert layer(drawn(10, 64, 64, dtype=torch.float32), 5).shape == (10, 64, 64)
