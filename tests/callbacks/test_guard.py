"""Steps that go wrong: they leave no trace in weights, averages and states, are counted and named, and end a run."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from ldm.callbacks import SkipBadSteps, WeightAverage
from ldm.callbacks import bad_steps as guard
from ldm.errors import UserError
from ldm.models.diffusion import ddpm
from ldm.optim import build_optimizer
from ldm.optim.per_weight import WeightByWeight, plain_parts
from ldm.optim.skippable import LEAST_LOSSES, StepGuard, skippable_step, skips_by_itself
from ldm.optim.stored_weights import StoredWeights
from tests.guard_runs import Spoil, Watch, as_on_a_card
from tests.memory_runs import make_model, words_of
from tests.toy_run import fit, last, make_prepared, read

BAD = 1  # optimiser steps before the one that goes wrong


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    shapes = {"moments_shape": [8, 4, 4], "context_shape": [3, 16]}
    return make_prepared(tmp_path_factory.mktemp("prepared") / "set", lengths=(12, 9, 7), **shapes)


@pytest.fixture
def no_encoders(monkeypatch):
    monkeypatch.setattr(ddpm, "encoder_tensors", lambda config: {})
    monkeypatch.setattr(ddpm, "check_prepared", lambda *_, **__: None)


@pytest.fixture
def on_a_card(monkeypatch):
    as_on_a_card(monkeypatch)


def run(root, folder, *switches, spoil, precision="bf16-mixed", steps=3, **words):
    model, average = make_model(words_of(*switches)), WeightAverage(decay=0.9, **words_of(*switches)["average"])
    watch, skipping = Watch(average), SkipBadSteps(str(folder), **words)
    callbacks = [spoil(model), skipping, average, watch]
    fit(root, folder, callbacks, model=model, steps=steps, precision=precision, gradient_clip_val=None)
    return model, watch, skipping, average


def nan_loss(model):
    return Spoil(model, {BAD}, loss=lambda value: value * float("nan"))


def bad_gradient(model):
    return Spoil(model, {BAD}, gradient=float("inf"))


@pytest.mark.parametrize(
    ("switches", "where"),
    [
        ((), "in host memory"),
        (("4 bits", "split weights", "step in backward"), "in host memory"),
        (("states on host", "average on cpu"), "on a card"),
        (("8 bits", "bfloat16 weights", "average in bfloat16"), "on a card"),
    ],
    ids=str,
)
def test_a_skipped_step_leaves_no_trace(root, tmp_path, no_encoders, request, switches, where):
    if where == "on a card":
        request.getfixturevalue("on_a_card")
    spoil = bad_gradient if where == "on a card" else nan_loss
    _, watch, skipping, average = run(root, tmp_path, *switches, spoil=spoil)
    assert len(watch.seen) == 4 and watch.changed(BAD) == []
    for step in (0, 2):
        kinds = {name.split()[0] for name in watch.changed(step)}
        assert kinds >= {"weight", "average"} and (step == 0 or "state" in kinds), step
    assert all(value.isfinite().all() for value in watch.seen[-1].values() if value.is_floating_point())
    assert (skipping.in_all, skipping.in_row) == (1, 0)
    assert average.num_updates == 2 == int(read(last(tmp_path))["state_dict"]["model_ema.num_updates"])
    (line,) = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert line["step"] == BAD + 1 and line["in_all"] == 1
    schedules = read(last(tmp_path))["lr_schedulers"][0]
    assert schedules["last_epoch"] == 3, "the skipped step keeps its turn"


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw4bit"])
@pytest.mark.parametrize("kept_as", [None, "bfloat16", "split"])
@pytest.mark.parametrize("words", [{}, {"in_backward": True}, {"states_on": "host"}], ids=str)
def test_every_optimiser_can_skip(on_a_card, name, kept_as, words):
    """Without the host: after a good step, one that is told to be none, with gradients that are no numbers."""
    if name != "adamw":
        pytest.importorskip("torchao")
    torch.manual_seed(0)
    network = torch.nn.Linear(128, 64)
    weights = StoredWeights(network, kept_as) if kept_as else None
    optimizer = build_optimizer([{"params": list(network.parameters()), "lr": 1e-2}], name, weights=weights, **words)
    assert skips_by_itself(optimizer)
    watch, trainer = Watch(), SimpleNamespace(optimizers=[optimizer])
    module = torch.nn.ModuleDict({"network": network})
    module.stored_weights = weights
    for number in (1.0, float("nan"), 1.0):
        optimizer.found_inf = torch.tensor(float(math.isnan(number)))
        for weight in network.parameters():
            gradient = torch.randn(weight.shape).to(weight) * number
            (weight * gradient).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.keep(trainer, module)
    assert watch.changed(0) == [] and len(watch.changed(1)) >= 4


def test_a_bad_gradient_in_a_backward_pass_that_updates_stops_it_there(root, tmp_path, no_encoders):
    """What lies before it in the backward pass has been updated, by sound gradients; from there on nothing is."""

    def spoil(model):
        weight = model.unet.get_parameter("input_blocks.0.0.temporal.weight")
        weight.register_hook(lambda gradient: gradient * float("nan") if model.global_step == BAD else gradient)
        return Spoil(model, set())

    model, watch, skipping, _ = run(root, tmp_path, "step in backward", spoil=spoil)
    assert skipping.in_all == 1
    changed = {name.removeprefix("weight unet.") for name in watch.changed(BAD) if name.startswith("weight")}
    assert "input_blocks.0.0.temporal.weight" not in changed and changed
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert not [name for name in watch.changed(BAD) if name.startswith("average")]


def test_training_is_identical_without_the_guard(root, tmp_path, no_encoders):
    """With clipping, whose norm is taken once."""
    results = []
    for name, callbacks in (("with", [SkipBadSteps(str(tmp_path))]), ("without", [])):
        model = make_model(words_of())
        fit(root, tmp_path / name, callbacks, model=model, precision="32-true", gradient_clip_val=0.01)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


# ---- parts


def test_spike_is_relative_to_the_mean_of_taken_steps():
    judge = StepGuard(5.0, 50, "cpu")
    norm = torch.ones(())
    for _ in range(LEAST_LOSSES - 1):
        assert not judge.verdict(torch.tensor(2.0), norm)[0]
    assert not judge.verdict(torch.tensor(100.0), norm)[0], "too few to compare with"
    mean = (2 * (LEAST_LOSSES - 1) + 100) / LEAST_LOSSES
    is_bad, loss, found_norm, found = judge.verdict(torch.tensor(5.01 * mean), norm).tolist()
    assert is_bad and (loss, found_norm, found) == pytest.approx((5.01 * mean, 1, mean))
    assert judge.verdict(torch.tensor(4.99 * mean), norm)[3] == pytest.approx(mean), "the bad one is not in the mean"
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)):
        before = judge.losses.clone()
        assert judge.verdict(torch.tensor(loss), torch.tensor(norm))[0] == 1
        assert torch.allclose(judge.losses, before, rtol=0, equal_nan=True)
    for _ in range(50):
        judge.verdict(torch.tensor(1.0), torch.ones(()))
    assert judge.verdict(torch.tensor(5.5), torch.ones(())).tolist()[::3] == [1, 1.0], "old losses are forgotten"
    assert not StepGuard(None, 1, "cpu").verdict(torch.tensor(1e30), torch.ones(()))[0]


@pytest.mark.parametrize("name", ["adamw8bit", "adamw4bit"])
def test_skippable_step_equals_torchao(name):
    pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(shape, generator=generator) for shape in ((64, 128), (7,))]
    sets = [[torch.nn.Parameter(draw.clone()) for draw in draws] for _ in range(2)]
    theirs, ours = (build_optimizer([{"params": weights, "lr": 1e-2}], name) for weights in sets)
    assert skips_by_itself(ours)
    for _ in range(3):
        for one, other in zip(*sets, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        theirs.step()
        ours.found_inf = torch.zeros(())
        ours.step()
        for other in sets[1]:
            other.grad = torch.full_like(other, float("nan"))
        ours.found_inf = torch.ones(())
        ours.step()
        for one, other in zip(*sets, strict=True):
            assert torch.equal(one, other)
            for key, value in theirs.state[one].items():
                for parts in zip(plain_parts(value), plain_parts(ours.state[other][key]), strict=True):
                    assert torch.equal(*parts), key


def test_skippable_step_compiles(monkeypatch):
    """As a card compiles it; here by the compiler that compiles nothing."""
    pytest.importorskip("torchao")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **words: compiled(function, backend="aot_eager", **words))
    weight = torch.nn.Parameter(torch.randn(32, 128))
    optimizer = build_optimizer([{"params": [weight], "lr": 1e-2}], "adamw4bit")
    for skip in (0.0, 1.0):
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        skippable_step(optimizer, torch.tensor(skip))
        assert torch.equal(weight, before) == bool(skip)
    assert optimizer.state[weight]["step"] == 1


def test_which_optimisers_wait_for_the_verdict():
    weight = torch.nn.Parameter(torch.zeros(1, device="meta"))
    groups = [{"params": [weight], "lr": 1e-3}]
    assert guard.must_wait(torch.optim.AdamW(groups)), "it cannot be told"
    assert not guard.must_wait(build_optimizer(groups, "adamw8bit"))
    assert not guard.must_wait(WeightByWeight(groups, lambda groups: build_optimizer(groups, "adamw8bit")))
    assert guard.must_wait(WeightByWeight(groups, torch.optim.SGD))
    assert guard.must_wait(build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1}], "adamw8bit"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"factor": 1}, "SkipBadSteps: expected a factor above 1, or null for none, found 1"),
        ({"factor": "high"}, "SkipBadSteps: expected a factor above 1, or null for none, found 'high'"),
        ({"window": 0}, "SkipBadSteps: expected window to be a whole number of at least 1, found 0"),
        ({"most_in_row": 0}, "expected most_in_row to be a whole number"),
        ({"most_in_all": 2.5}, r"expected most_in_all to be a whole number of at least 1, found 2.5"),
    ],
)
def test_invalid_options_are_errors(words, message):
    with pytest.raises(UserError, match=message):
        SkipBadSteps("run", **words)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("switches", [(), ("8 bits",), ("split weights",)], ids=" and ".join)
def test_gpu_is_never_synchronised(switches):
    model = make_model(words_of(*switches)).cuda()
    optimizer = model.configure_optimizers()["optimizer"]
    judge = StepGuard(20.0, 100, "cuda")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for turn in range(3):
        for weight in weights:
            weight.grad = torch.full_like(weight, float("nan") if turn == 2 else 1e-3)
        before = [weight.detach().clone() for weight in weights]
        torch.cuda.set_sync_debug_mode("error" if turn else "default")  # the first may set up what it likes
        try:
            norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])
            verdict = judge.verdict(norm * 0 + 1, norm)
            optimizer.found_inf = verdict[0]
            optimizer.step()
            copy, event = guard._async_copy_to_host(verdict)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        event.synchronize()
        assert copy[0] == (turn == 2)
        assert all(torch.equal(*pair) for pair in zip(before, weights, strict=True)) == (turn == 2)
