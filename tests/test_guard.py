"""Steps that go wrong: they leave no trace in weights, averages and states, are counted and named, and end a run."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import socket
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from ldm.callbacks import BadStepsError, SkipBadSteps, WeightAverage, guard
from ldm.errors import UserError
from ldm.models.diffusion import ddpm, optimizers
from ldm.models.diffusion.host_states import plain_parts
from ldm.models.diffusion.optimizers import build_optimizer
from ldm.models.diffusion.quantised_step import step_unless
from ldm.models.diffusion.step_judge import LEAST, StepJudge, skips_by_itself
from ldm.models.diffusion.stored_weights import StoredWeights
from ldm.models.diffusion.weight_by_weight import WeightByWeight
from tests.memory_runs import make_model, words_of
from tests.toy_run import ToyModel, fit, last, make_prepared, read

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
BAD = 1  # optimiser steps before the one that goes wrong


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    shapes = {"moments_shape": [8, 4, 4], "context_shape": [3, 16]}
    return make_prepared(tmp_path_factory.mktemp("prepared") / "set", lengths=(12, 9, 7), **shapes)


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    return make_prepared(tmp_path_factory.mktemp("toy") / "set", lengths=(12, 9, 30, 7))


@pytest.fixture
def no_encoders(monkeypatch):
    monkeypatch.setattr(ddpm, "encoder_tensors", lambda config: {})
    monkeypatch.setattr(ddpm, "check_prepared", lambda *_, **__: None)


@pytest.fixture
def on_a_card(monkeypatch):
    """What is done where weights are on a card: the optimiser is told, and the host reads a step later."""

    def fused(groups, words):
        return torch.optim.AdamW(groups, fused=True, **words)

    monkeypatch.setattr(guard, "must_wait", lambda optimizer: not skips_by_itself(optimizer))
    monkeypatch.setattr(optimizers, "_adamw", fused)


class Spoil(pl.Callback):
    """Spoils some steps: `loss` or `gradient` becomes what a function says; comes before the guard."""

    def __init__(self, model, steps, loss=None, gradient=None, micro_batch=None):
        self.steps, self.gradient, self.micro_batch = steps, gradient, micro_batch
        self.batch_idx = 0
        if loss is not None:
            plain = model.training_step

            def training_step(batch, batch_idx):
                value = plain(batch, batch_idx)
                is_meant = micro_batch is None or batch_idx % 2 == micro_batch
                return loss(value) if model.global_step in steps and is_meant else value

            model.training_step = training_step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradient is not None and trainer.global_step in self.steps:
            weight = next(weight for weight in pl_module.parameters() if weight.grad is not None)
            weight.grad.view(-1)[0] = self.gradient


class Watch(pl.Callback):
    """Keeps, after each step, everything that a step changes."""

    def __init__(self, average=None):
        self.average, self.seen = average, []

    def on_train_start(self, trainer, pl_module):
        self.keep(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.seen):
            self.keep(trainer, pl_module)

    def keep(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        found = {f"weight {name}": weight.detach().clone() for name, weight in pl_module.named_parameters()}
        stored = getattr(pl_module, "stored_weights", None)
        if stored is not None:
            found |= {f"low bits {name}": part.clone() for name, part in stored.named_buffers()}
        if self.average is not None:
            found |= {f"average {name}": value.clone() for name, value in self.average.averages.items()}
        states = optimizer.states() if isinstance(optimizer, WeightByWeight) else optimizer.state
        for place, state in enumerate(states.values()):
            for name, value in state.items():
                for number, part in enumerate(plain_parts(torch.as_tensor(value))):
                    found[f"state {place} {name} {number}"] = part.clone()
        self.seen.append(found)

    def changed(self, step):
        """Names of what step number `step`, from 0, changed."""
        before, after = self.seen[step : step + 2]
        return [name for name, value in before.items() if not torch.equal(value, after[name])]


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
def test_every_optimiser_can_be_told(on_a_card, name, kept_as, words):
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


def test_numbers_are_those_without_the_guard(root, tmp_path, no_encoders):
    """With clipping, whose norm is taken once."""
    results = []
    for name, callbacks in (("with", [SkipBadSteps(str(tmp_path))]), ("without", [])):
        model = make_model(words_of())
        fit(root, tmp_path / name, callbacks, model=model, precision="32-true", gradient_clip_val=0.01)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


# ---- spikes, counts and files, on the toy


def toy_run(toy_root, folder, *, steps=30, spoil=(), loss=None, resume=None, model=None, trainer=None, **words):
    model = model or ToyModel(learning_rate=0.001, momentum=0)
    skipping = SkipBadSteps(str(folder), **words)
    spoiler = Spoil(model, set(spoil), loss or (lambda value: value * 1000))
    fit(
        toy_root, folder, [spoiler, skipping], model=model, steps=steps, resume=last(folder) if resume else None,
        max_epochs=-1, **(trainer or {}),
    )  # fmt: skip
    return model, skipping


def lines_of(folder):
    return [json.loads(line) for line in (folder / "skipped_steps.jsonl").read_text().splitlines()]


def test_a_spike_is_skipped_and_its_clips_are_named(toy_root, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="ldm"):
        model, skipping = toy_run(toy_root, tmp_path, spoil=(3, 24))
    assert skipping.in_all == 1, "there was nothing to compare the first one with"
    (line,) = lines_of(tmp_path)
    step, positions, keys = model.seen[24]
    assert step == 24 and line["step"] == 25
    assert [clip["position"] for clip in line["clips"]] == positions
    assert [clip["scene"] for clip in line["clips"]] == keys
    assert line["clips"][0]["source"] == "toy.mp4" and len(line["clips"][0]["frames"]) == 3
    assert {clip["caption"] for clip in line["clips"]} <= {"a road", ""}
    assert line["loss"] > 20 * line["mean_of_recent"] > 0 and line["factor"] == 20
    assert line["gradient_norm"] > 0 and line["largest_weight"]["name"].startswith("head.")
    assert line["learning_rates"] == [0.001] and "above 20 times" in line["reason"]
    assert any(message.startswith("step 25 was skipped: the loss is") for message in caplog.messages)


def test_frames_are_those_of_the_clip(toy_root, tmp_path):
    """In this set a frame's value is its number."""
    kept = []

    class Keep(ToyModel):
        def training_step(self, batch, batch_idx):
            kept.append([moments[:, 0, 0, 0].int() % 100 for moments in batch.moments])
            return super().training_step(batch, batch_idx)

    model = Keep(learning_rate=0.001)
    toy_run(toy_root, tmp_path, steps=3, spoil=(1,), loss=lambda value: value * float("nan"), model=model)
    (line,) = lines_of(tmp_path)
    assert [clip["frames"] for clip in line["clips"]] == [frames.tolist() for frames in kept[1]]
    assert line["loss"] == "nan" and line["reason"] == "the loss is nan" and line["mean_of_recent"] == "nan"


@pytest.mark.parametrize(
    ("words", "found"), [({"most_in_row": 3}, "3 skipped steps in a row, found 3"), ({"most_in_all": 4}, "4 .* in all")]
)
def test_too_many_end_the_run_and_the_last_good_checkpoint_stays(toy_root, tmp_path, words, found):
    toy_run(toy_root, tmp_path, steps=4)
    before = last(tmp_path).read_bytes()
    bad = {5, 6, 7} if "most_in_row" in words else {4, 6, 8, 10}
    with pytest.raises(BadStepsError, match=rf"expected fewer than {found}.*skipped_steps.jsonl names"):
        toy_run(toy_root, tmp_path, spoil=bad, loss=lambda value: value * float("inf"), resume=True, **words)
    assert last(tmp_path).read_bytes() == before
    assert [entry.name for entry in last(tmp_path).parent.iterdir()] == ["last.ckpt"]
    assert [line["step"] for line in lines_of(tmp_path)] == [step + 1 for step in sorted(bad)]


def test_a_card_is_asked_a_step_later_and_ends_the_run_too(toy_root, tmp_path, on_a_card, monkeypatch):
    class Fused(ToyModel):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.head.parameters(), lr=0.01, fused=True)

    model = Fused(learning_rate=0.01)
    nan = float("nan")
    with pytest.raises(BadStepsError, match="in a row, found 2"):
        toy_run(toy_root, tmp_path, spoil=(4, 5), loss=lambda value: value * nan, model=model, most_in_row=2)
    assert len(model.seen) == 7 and model.seen[-1][0] == 6, "one more step was on its way"
    last_step = Fused(learning_rate=0.01)
    with pytest.raises(BadStepsError, match="in a row, found 1"):
        toy_run(
            toy_root, tmp_path, steps=3, spoil=(2,), loss=lambda value: value * nan, model=last_step, most_in_row=1
        )


def test_counts_and_losses_are_resumed_and_lines_are_neither_lost_nor_doubled(toy_root, tmp_path):
    bad, loss = (25, 26, 31), None
    _, straight = toy_run(toy_root, tmp_path / "straight", steps=40, spoil=bad, loss=loss, window=30)
    toy_run(toy_root, tmp_path / "run", steps=26, spoil=bad, loss=loss, window=30)
    checkpoint = last(tmp_path / "run").read_bytes()
    toy_run(toy_root, tmp_path / "run", steps=33, spoil=bad, loss=loss, resume=True, window=30)
    last(tmp_path / "run").write_bytes(checkpoint)  # killed after 33 steps, taken up from 26
    _, again = toy_run(toy_root, tmp_path / "run", steps=40, spoil=bad, loss=loss, resume=True, window=30)
    assert (straight.in_all, straight.in_row) == (again.in_all, again.in_row) == (3, 0)
    assert torch.equal(straight._judge.losses, again._judge.losses)
    assert lines_of(tmp_path / "straight") == lines_of(tmp_path / "run")
    kept = [read(last(tmp_path / name))["skipped_steps"] for name in ("straight", "run")]
    assert torch.equal(kept[0]["losses"], kept[1]["losses"])


def test_one_bad_micro_batch_skips_the_step(toy_root, tmp_path):
    model, watch = ToyModel(learning_rate=0.01), Watch()
    spoiler = Spoil(model, {1}, lambda value: value * float("nan"), micro_batch=0)
    skipping = SkipBadSteps(str(tmp_path))
    fit(toy_root, tmp_path, [spoiler, skipping, watch], model=model, steps=3, accumulate_grad_batches=2)
    assert watch.changed(1) == [] and watch.changed(0) and watch.changed(2)
    assert [clip["position"] for clip in lines_of(tmp_path)[0]["clips"]] == [4, 5, 6, 7]


def test_numbers_go_to_the_loggers(toy_root, tmp_path):
    values = []

    class Kept(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            values.extend([(step, metrics)] if "train/skipped_steps" in metrics else [])

    model = ToyModel(learning_rate=0.001)
    spoiler = Spoil(model, {2}, lambda value: value * float("nan"))
    words = {"model": model, "steps": 4, "logger": Kept(), "log_every_n_steps": 2}
    fit(toy_root, tmp_path, [spoiler, SkipBadSteps(str(tmp_path))], **words)
    assert [(step, metrics["train/skipped_steps"]) for step, metrics in values] == [(2, 0), (4, 1)]
    assert values[0][1]["train/gradient_norm"] > 0


def test_a_model_that_steps_by_itself_is_left_alone(toy_root, tmp_path):
    class Manual(ToyModel):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    skipping = SkipBadSteps(str(tmp_path))
    fit(toy_root, tmp_path, [skipping, WeightAverage(decay=0.5)], model=Manual(learning_rate=0.01), steps=3)
    assert skipping.in_all == 0 and last(tmp_path).exists()


# ---- several processes


def work(rank: int, port: int, root: str, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    model, watch = ToyModel(learning_rate=0.01), Watch()
    # finite, and so are its gradients: the others know of it by the mean of the losses
    spoiler = Spoil(model, {6} if rank else set(), lambda value: value * 1000)
    skipping = SkipBadSteps(folder, window=4)
    fit(root, folder, [spoiler, skipping, watch], model=model, steps=8, devices=2, strategy="ddp", max_epochs=-1)
    found = {"changed": [len(watch.changed(step)) for step in (5, 6, 7)], "in_all": skipping.in_all}
    torch.save(found, f"{folder}/{rank}.pt")


def test_processes_skip_together(toy_root, tmp_path):
    """The loss of the second one alone is a spike; the file names the clips of both."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.toy_run"])
    team = [context.Process(target=work, args=(rank, port, str(toy_root), str(tmp_path))) for rank in range(2)]
    for process in team:
        process.start()
    for process in team:
        process.join(120)
    assert [process.exitcode for process in team] == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["in_all"] == 1
        assert found["changed"][1] == 0 < found["changed"][0] and found["changed"][2]
    (line,) = lines_of(tmp_path)
    assert [clip["position"] for clip in line["clips"]] == [24, 25, 26, 27]


# ---- parts


def test_the_judge_compares_with_the_mean_of_steps_that_were_taken():
    judge = StepJudge(5.0, 50, "cpu")
    norm = torch.ones(())
    for _ in range(LEAST - 1):
        assert not judge.verdict(torch.tensor(2.0), norm)[0]
    assert not judge.verdict(torch.tensor(100.0), norm)[0], "too few to compare with"
    mean = (2 * (LEAST - 1) + 100) / LEAST
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
    assert not StepJudge(None, 1, "cpu").verdict(torch.tensor(1e30), torch.ones(()))[0]


@pytest.mark.parametrize("name", ["adamw8bit", "adamw4bit"])
def test_the_step_that_can_be_called_off_is_torchaos(name):
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


def test_that_step_makes_a_graph(monkeypatch):
    """As a card compiles it; here by the compiler that compiles nothing."""
    pytest.importorskip("torchao")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **words: compiled(function, backend="aot_eager", **words))
    weight = torch.nn.Parameter(torch.randn(32, 128))
    optimizer = build_optimizer([{"params": [weight], "lr": 1e-2}], "adamw4bit")
    for skip in (0.0, 1.0):
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        step_unless(optimizer, torch.tensor(skip))
        assert torch.equal(weight, before) == bool(skip)
    assert optimizer.state[weight]["step"] == 1


def test_who_has_to_wait():
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
def test_words_that_cannot_be_meant(words, message):
    with pytest.raises(UserError, match=message):
        SkipBadSteps("run", **words)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("switches", [(), ("8 bits",), ("split weights",)], ids=" and ".join)
def test_a_card_never_waits_for_a_verdict(switches):
    model = make_model(words_of(*switches)).cuda()
    optimizer = model.configure_optimizers()["optimizer"]
    judge = StepJudge(20.0, 100, "cuda")
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
            copy, event = guard._on_its_way(verdict)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        event.synchronize()
        assert copy[0] == (turn == 2)
        assert all(torch.equal(*pair) for pair in zip(before, weights, strict=True)) == (turn == 2)
