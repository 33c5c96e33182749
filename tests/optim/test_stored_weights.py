"""Weights in bfloat16 with and without their lower bits, and the optimisers over them."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from ldm.errors import UserError
from ldm.modules.nn import use_channels_last
from ldm.modules.unet import UNetModel
from ldm.optim import build_optimizer
from ldm.optim.per_weight import state_bytes
from ldm.optim.stored_weights import MemorySwitches, StoredWeights, joined, round_stochastically, split

STRANGE = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)  # NaN of other bits


@pytest.mark.parametrize("value", [1.2345, -3.0e-5, 0.999, 1e-39])
def test_random_rounding_is_right_on_average(value):
    values = torch.full((10**6,), value)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0)).double()
    assert len(rounded.unique()) == 2
    error = rounded - values.double()
    assert error.mean().abs() <= 3 * error.std() / 1000


def test_random_rounding_of_many_values_is_right_on_average():
    values = torch.randn(10**6, generator=torch.Generator().manual_seed(1))
    error = round_stochastically(values, torch.Generator().manual_seed(0)).double() - values.double()
    assert error.mean().abs() <= 3 * error.std() / 1000
    assert (error.abs() <= values.abs() * 2**-7).all()


def test_what_bfloat16_holds_is_not_rounded():
    values = torch.randn(1000).bfloat16().float()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    values = torch.cat([values, special])
    assert torch.equal(round_stochastically(values, torch.Generator()).float(), values)
    assert round_stochastically(STRANGE, torch.Generator()).isnan().all()


def test_split_bits_are_the_value():
    values = torch.randn(10**6, generator=torch.Generator().manual_seed(2)) * torch.logspace(-40, 37, 10**6)
    upper, lower = split(values)
    assert (upper.dtype, lower.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(joined(upper, lower).view(torch.int32), values.view(torch.int32))
    is_tie = values.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(upper[~is_tie], values.bfloat16()[~is_tie]) and is_tie.sum() < 100
    assert torch.equal(upper[is_tie].float().abs() > values[is_tie].abs(), torch.ones(int(is_tie.sum())).bool())
    upper, lower = split(STRANGE)
    assert upper.isnan().all() and joined(upper, lower).isnan().all()


def stepped(kind: str, steps: int, name: str = "adamw", seed: int = 0, rate: float = 1e-3, **options):
    """Weights in float32 after some steps on gradients that are bfloat16 numbers, and what made them."""
    torch.manual_seed(0)
    network = torch.nn.Linear(64, 96)
    stored = StoredWeights(network, kind, "float32", seed)
    groups = [{"params": list(network.parameters()), "lr": rate}]
    optimizer = build_optimizer(groups, name, weights=None if kind == "float32" else stored, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in network.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator).bfloat16().to(weight.dtype)
        optimizer.step()
    return [stored.full(weight) for weight in network.parameters()], network, optimizer


@pytest.mark.parametrize(("name", "steps"), [("adamw", 100), ("adamw8bit", 5), ("adamw4bit", 5)])
def test_split_weights_are_trained_as_float32_ones_bit_by_bit(name, steps):
    expected, *_ = stepped("float32", steps, name)
    found, network, _ = stepped("split", steps, name)
    assert network.weight.dtype == torch.bfloat16
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_random_rounding_keeps_what_nearest_rounding_loses():
    """Steps of a hundredth of the last place of bfloat16, all in one direction."""
    expected, start = stepped("float32", 200, rate=1e-5)[0][0], stepped("float32", 0)[0][0]
    found = stepped("bfloat16", 200, rate=1e-5)[0][0]
    moved, should = (found - start.bfloat16().float()).double().mean(), (expected - start).double().mean()
    assert (moved - should).abs() < 3 * (found - expected).double().std() / found.numel() ** 0.5
    nearest = (start.bfloat16() + torch.full_like(start, 1e-6).bfloat16()).float()
    assert torch.equal(nearest[start.abs() > 0.01], start.bfloat16().float()[start.abs() > 0.01])


def test_rounding_belongs_to_seed_weight_and_step():
    one, other, again = (stepped("bfloat16", 3, seed=seed)[0][0] for seed in (1, 2, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_vectors_and_frozen_weights():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).requires_grad_(False)
    network[1].requires_grad_(True)
    stored = StoredWeights(network, "split", "bfloat16")
    assert [weight.dtype for weight in network.parameters()] == [torch.bfloat16, torch.float32] * 2
    assert stored.num_bytes == 4 * 4 * 2 and not stored.state_dict()


# ---- states


@pytest.mark.parametrize(("name", "limit"), [("adamw8bit", 2.1), ("adamw4bit", 1.15), ("adamw", 8.0)])
@pytest.mark.parametrize("states_on", ["gpu", "host"])
def test_bytes_of_states_a_parameter(name, limit, states_on):
    """Of every kind of weight that the video network has, at a third of its width."""
    torch.manual_seed(0)
    unet = UNetModel(4, 4, 128, 1, [1], [1], num_heads=8, context_dim=128)
    groups = [{"params": list(unet.parameters()), "lr": 1e-3}]
    optimizer = build_optimizer(groups, name, states_on=states_on)
    for weight in unet.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    per_weight = state_bytes(optimizer) / sum(weight.numel() for weight in unet.parameters())
    assert limit / 1.15 <= per_weight <= limit + 1e-4


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_states_on_the_host_change_nothing(name):
    expected, found = (stepped("float32", 5, name, states_on=place)[0] for place in ("gpu", "host"))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_states_come_from_the_host_and_go_back_on_a_card(name):
    results = {}
    for place in ("gpu", "host"):
        weights = [torch.nn.Parameter(torch.ones(64, 128, device="cuda")) for _ in range(5)]
        optimizer = build_optimizer([{"params": weights, "lr": 1e-2}], name, states_on=place)
        for step in range(4):
            for index, weight in enumerate(weights):
                weight.grad = torch.full_like(weight, step + index - 2.5)
            optimizer.step()
        results[place] = [weight.detach().cpu() for weight in weights]
        if place == "host":
            kept = [state["exp_avg"] for state in optimizer.states().values()]
            assert {value.device.type for value in kept} == {"cpu"}
    for card, host in zip(results["gpu"], results["host"], strict=True):
        torch.testing.assert_close(host, card, rtol=1e-6, atol=0)


def test_eight_bits_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    expected, found = (stepped(kind, 5, "adamw8bit", library="bitsandbytes")[0] for kind in ("float32", "split"))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_second_library_stands_in_for_the_first(monkeypatch):
    class Stub(torch.optim.AdamW):
        pass

    module = type(sys)("bitsandbytes.optim")
    module.AdamW8bit = Stub
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", type(sys)("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    group = {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 1.0}
    assert isinstance(build_optimizer([group], "adamw8bit"), Stub)
    with pytest.raises(UserError, match=r"'adamw8bit' needs the package torchao, which does not .*pip install torchao"):
        build_optimizer([group], "adamw8bit", library="torchao")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"needs the package torchao.*, or bitsandbytes, which does not import here"):
        build_optimizer([group], "adamw8bit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamw8bit", "library": "apex"}, "library: expected torchao or bitsandbytes for adamw8bit, found 'a"),
        ({"name": "adamw4bit", "library": "bitsandbytes"}, "library: expected torchao for adamw4bit, found 'bitsandb"),
        ({"name": "adamw", "library": "torchao"}, "library: expected none for adamw, found 'torchao'"),
        ({"states_on": "disk"}, "optimizer.states_on: expected gpu or host, found 'disk'"),
    ],
)
def test_impossible_optimizers(options, message):
    with pytest.raises(UserError, match=message):
        build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}], **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"weight": "split"}, "model.params.memory: expected the keys weights, frozen, step_in_backward, found"),
        ("split", "model.params.memory: expected the keys weights, frozen, step_in_backward, found 'split'"),
        ({"weights": "float16"}, "memory.weights: expected one of float32, bfloat16, split, found 'float16'"),
        ({"frozen": "split"}, "memory.frozen: expected one of float32, bfloat16, found 'split'"),
        ({"step_in_backward": 1}, "memory.step_in_backward: expected true or false, found 1"),
    ],
)
def test_impossible_switches(words, message):
    with pytest.raises(UserError, match=message):
        MemorySwitches.of_config(words)


def test_gradients_that_are_not_yet_what_they_should_be():
    in_backward = MemorySwitches(step_in_backward=True)
    with pytest.raises(UserError, match="step_in_backward: expected one device, found 2"):
        in_backward.check_run("bf16-mixed", 1, None, 2)
    with pytest.raises(UserError, match=r"step_in_backward: expected .* bf16-mixed or 32-true, found 16-mixed, whose"):
        in_backward.check_run("16-mixed", 1, None, 1)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "split"])
def test_the_order_in_memory_changes_no_number(kind):
    """And states that were written in one order go on in the other."""

    def made(laid: bool) -> tuple[torch.nn.Module, StoredWeights, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = torch.nn.Conv2d(32, 64, 3)
        if laid:
            use_channels_last(network)
        stored = StoredWeights(network, kind)
        groups = [{"params": list(network.parameters()), "lr": 1e-3}]
        return network, stored, build_optimizer(groups, weights=None if kind == "float32" else stored)

    def step(network: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in network.parameters():
            gradient = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            weight.grad = torch.empty_like(weight).copy_(gradient)
        optimizer.step()

    runs = [made(False), made(True)]
    for number in range(3):
        for network, _, optimizer in runs:
            step(network, optimizer, number)
    runs[1][2].load_state_dict(copy.deepcopy(runs[0][2].state_dict()))  # torch shares what it loads
    for network, _, optimizer in runs:
        step(network, optimizer, 3)
    (plain, of_plain, _), (laid, of_laid, optimizer) = runs
    assert laid.weight.stride() != plain.weight.stride()
    assert torch.equal(of_laid.full(laid.weight), of_plain.full(plain.weight))
    assert optimizer.state[laid.weight]["exp_avg"].stride() == laid.weight.stride()
