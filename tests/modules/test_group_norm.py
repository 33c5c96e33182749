"""Group norm on a CPU: exact in every memory layout, and by sums over pixels where torch is slow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.modules.nn import GroupNorm32, NarrowGroups
from tests.conftest import draw, relative_error

pytestmark = pytest.mark.numeric


def make(channels):
    norm = GroupNorm32(channels)
    norm.weight.data, norm.bias.data = draw(2, channels).unbind()
    return norm


def activations(*shape, dtype=torch.float32):
    return (draw(*shape, seed=1) + 3).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def calls(monkeypatch):
    """Grows with each use of our own sums."""
    found, plain = [], NarrowGroups.apply
    monkeypatch.setattr(NarrowGroups, "apply", lambda *inputs: found.append(inputs[0].shape) or plain(*inputs))
    return found


def test_derivatives_are_those_of_differences():
    x = activations(2, 12, 3, 2, dtype=torch.float64).requires_grad_()
    weight, bias = draw(2, 12, seed=2).double().unbind()
    inputs = (x, weight.requires_grad_(), bias.requires_grad_(), 4, 1e-5)
    assert torch.autograd.gradcheck(NarrowGroups.apply, inputs)
    assert torch.allclose(NarrowGroups.apply(*inputs), F.group_norm(x, 4, weight, bias, 1e-5), atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "is_own"),
    [((3, 64, 16, 16), True), ((3, 128, 20, 13), True), ((3, 160, 16, 16), False), ((3, 64, 8, 8), False)],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_output_and_gradients_are_those_of_float64(shape, is_own, dtype, bound, calls):
    """Within 17 roundings of float32, one of bfloat16."""
    norm, x = make(shape[1]), activations(*shape, dtype=dtype).requires_grad_()
    gradient = draw(*shape, seed=2).to(dtype)
    out = norm(x)
    out.backward(gradient)
    assert bool(calls) == is_own and out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    exact, wide = make(shape[1]).double(), x.detach().double().contiguous().requires_grad_()
    wanted = F.group_norm(wide, 32, exact.weight, exact.bias, exact.eps)
    wanted.backward(gradient.double())
    found, expected = [out, x.grad, norm.weight.grad, norm.bias.grad], [wanted, wide.grad, exact.weight.grad]
    for one, other in zip(found, [*expected, exact.bias.grad], strict=True):
        assert relative_error(one, other) < bound


@pytest.mark.parametrize("channels", [64, 320])
def test_groups_of_nearly_equal_values(channels):
    """A spread of 1e-2 about 100: float32 rounds the input itself by 4e-6 of 1e-2."""
    norm, x = make(channels), 100 + activations(2, channels, 16, 16) * 1e-2
    wanted = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    assert relative_error(norm(x), wanted) < 1e-4


def test_contiguous_activations_go_to_torch(calls):
    make(64)(activations(2, 64, 16, 16).contiguous())
    assert not calls
