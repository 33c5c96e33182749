"""Group norm on a processor: exact whatever lies how in memory, and by our own sums where torch's take their time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.modules import nn as group_norm
from ldm.modules.nn import GroupNorm32, NarrowGroups
from tests.conftest import relative_error


def make(channels):
    norm = GroupNorm32(channels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    return norm


def activations(*shape, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 3
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def calls(monkeypatch):
    """Grows whenever our own sums are used."""
    found, plain = [], NarrowGroups.apply
    monkeypatch.setattr(group_norm.NarrowGroups, "apply", lambda *words: found.append(words[0].shape) or plain(*words))
    return found


def test_derivatives_are_those_of_differences():
    x = activations(2, 12, 3, 2, dtype=torch.float64).requires_grad_()
    weight, bias = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).unbind()
    inputs = (x, weight.requires_grad_(), bias.requires_grad_(), 4, 1e-5)
    assert torch.autograd.gradcheck(NarrowGroups.apply, inputs)
    assert torch.allclose(NarrowGroups.apply(*inputs), F.group_norm(x, 4, weight, bias, 1e-5), atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "is_own"),
    [((3, 64, 16, 16), True), ((3, 128, 20, 13), True), ((3, 160, 16, 16), False), ((3, 64, 8, 8), False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_group_norm_both_ways(shape, is_own, dtype, calls):
    norm, x = make(shape[1]), activations(*shape, dtype=dtype).requires_grad_()
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = norm(x)
    out.backward(gradient)
    assert bool(calls) == is_own and out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    found = [out, x.grad, norm.weight.grad, norm.bias.grad]
    exact, wide = make(shape[1]).double(), x.detach().double().contiguous().requires_grad_()
    wanted = F.group_norm(wide, 32, exact.weight, exact.bias, exact.eps)
    wanted.backward(gradient.double())
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    for one, other in zip(found, [wanted, wide.grad, exact.weight.grad, exact.bias.grad], strict=True):
        assert relative_error(one, other) < bound


@pytest.mark.parametrize("channels", [64, 320])
def test_groups_whose_values_are_nearly_alike(channels):
    norm, noise = make(channels), activations(2, channels, 16, 16)
    x = 100 + noise * 1e-2
    wanted = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    assert relative_error(norm(x), wanted) < 1e-4
    plain = F.group_norm(x, 32, norm.weight, norm.bias, norm.eps)
    assert relative_error(plain, wanted) > 1e-4, "as torch has it, it is not as good"


def test_what_lies_in_the_usual_order_goes_to_torch(calls):
    make(64)(activations(2, 64, 16, 16).contiguous())
    assert not calls
