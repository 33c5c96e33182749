"""The switches that save memory in real training runs: schedules, averages, checkpoints, resuming, refusals."""

from __future__ import annotations

import logging

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger

from ldm.callbacks import ComputeCount, MemoryReport, WeightAverage
from ldm.callbacks.average import average_key
from ldm.checkpoint import load_unet
from ldm.errors import UserError
from ldm.models.diffusion import ddpm
from ldm.optim.per_weight import plain_parts
from tests.conftest import relative_error
from tests.memory_runs import UNET, make_model, words_of
from tests.toy_run import fit, last, make_prepared, read

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    shapes = {"moments_shape": [8, 4, 4], "context_shape": [3, 16]}
    return make_prepared(tmp_path_factory.mktemp("prepared") / "set", lengths=(12, 9, 7), **shapes)


@pytest.fixture(autouse=True)
def no_encoders(monkeypatch):
    """The footage was prepared by none, and none is written into checkpoints."""
    monkeypatch.setattr(ddpm, "encoder_tensors", lambda config: {})
    monkeypatch.setattr(ddpm, "check_prepared", lambda *_, **__: None)


def run(root, folder, *switches, steps=4, callbacks=(), precision="bf16-mixed", resume=False, **trainer):
    model = make_model(words_of(*switches))
    where = last(folder) if resume else None
    return fit(root, folder, callbacks, model=model, steps=steps, resume=where, precision=precision, **trainer)


def masters(model):
    return {name: model.stored_weights.full(weight) for name, weight in model.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches",
    [
        (),
        ("8 bits", "step in backward"),
        ("4 bits", "split weights"),
        ("8 bits", "bfloat16 weights", "step in backward", "frozen bfloat16", "average in bfloat16"),
        ("states on host", "split weights", "step in backward", "average on cpu"),
    ],
    ids=lambda switches: " and ".join(switches) or "plain",
)
def test_a_resumed_run_is_the_straight_one(root, tmp_path, switches):
    words = words_of(*switches)["average"]
    straight, again = WeightAverage(decay=0.9, **words), WeightAverage(decay=0.9, **words)
    expected = masters(run(root, tmp_path / "straight", *switches, callbacks=[straight]))
    run(root, tmp_path / "run", *switches, steps=2, callbacks=[WeightAverage(decay=0.9, **words)])
    found = masters(run(root, tmp_path / "run", *switches, callbacks=[again], resume=True))
    assert_same(found, expected)
    assert_same(again.averages, straight.averages)
    one, other = (read(last(tmp_path / name))["optimizer_states"][0]["state"] for name in ("straight", "run"))
    assert one.keys() == other.keys() and len(one) > 20
    for place, state in one.items():
        for name, value in state.items():
            for parts in zip(plain_parts(value), plain_parts(other[place][name]), strict=True):
                assert torch.equal(*parts), (place, name)


@pytest.mark.slow
def test_steps_in_the_backward_pass_are_those_after_it(root, tmp_path):
    """With warmup, average, and operations counted meanwhile, which see none of the optimiser's."""

    class Watch(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            kept.append(sum(weight.grad is not None for weight in pl_module.parameters()))

    results, kept = {}, []
    for switches in ((), ("step in backward",)):
        average, compute = WeightAverage(decay=0.9), ComputeCount()
        model = run(root, tmp_path / "-".join(switches), *switches, callbacks=[average, compute, Watch()])
        results[switches] = masters(model), average.averages, compute.tflop
    assert kept[:4] == [sum(weight.requires_grad for weight in model.parameters())] * 4 and kept[4:] == [0] * 4
    (weights, averages, tflop), (others, other_averages, other_tflop) = results.values()
    assert_same(weights, others)
    assert_same(averages, other_averages)
    assert tflop == other_tflop


@pytest.mark.slow
@pytest.mark.parametrize("later", [("8 bits", "split weights", "step in backward"), ("8 bits", "states on host")])
def test_switches_may_change_when_a_run_goes_on(root, tmp_path, later):
    """And change back: states and weights mean the same, however they are kept."""
    expected = masters(run(root, tmp_path / "plain", "8 bits", steps=4))
    run(root, tmp_path / "run", "8 bits", steps=2)
    run(root, tmp_path / "run", *later, steps=3, resume=True)
    found = masters(run(root, tmp_path / "run", "8 bits", steps=4, resume=True))
    worst = max(relative_error(found[name], value) for name, value in expected.items())
    assert worst < (1e-3 if "split weights" in later else 1e-12)


def test_checkpoints_of_split_weights_are_float32(root, tmp_path):
    model = run(root, tmp_path, "split weights", "frozen bfloat16")
    tensors = read(last(tmp_path))["state_dict"]
    unet = load_unet(last(tmp_path), UNET).state_dict()
    lost = 0
    for name, weight in model.unet.named_parameters():
        full = model.stored_weights.full(weight)
        if weight.requires_grad:
            assert tensors[PREFIX + name].dtype == torch.float32 and torch.equal(tensors[PREFIX + name], full), name
            lost += int((full != full.bfloat16()).sum())
        assert torch.equal(unet[name], full), name
    assert lost > 1000, "the checkpoint holds more than bfloat16 does"


def test_checkpoints_of_bfloat16_weights_are_read(root, tmp_path):
    model = run(root, tmp_path, "bfloat16 weights", callbacks=[WeightAverage(decay=0.9, dtype="bfloat16")])
    tensors = read(last(tmp_path))["state_dict"]
    name, weight = next((n, w) for n, w in model.named_parameters() if w.requires_grad and w.ndim > 1)
    assert tensors[PREFIX + name.removeprefix("unet.")].dtype == tensors[average_key(name)].dtype == torch.bfloat16
    unet = load_unet(last(tmp_path), UNET, use_average=False)
    assert torch.equal(unet.get_parameter(name.removeprefix("unet.")), weight.float())


def test_a_backward_pass_that_fails_is_not_saved(root, tmp_path, caplog):
    class Break(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.global_step == 2:
                weight = pl_module.unet.get_parameter("input_blocks.0.0.temporal.weight")
                weight.register_hook(lambda gradient: 1 / 0)

    with pytest.raises(ZeroDivisionError), caplog.at_level(logging.WARNING, logger="ldm"):
        run(root, tmp_path, "step in backward", callbacks=[Break()])
    assert any("step 2 is not saved: it was not complete" in message for message in caplog.messages)
    assert not last(tmp_path).exists()


@pytest.mark.parametrize(
    ("switch", "trainer", "message"),
    [
        ("step in backward", {"accumulate_grad_batches": 2}, "step_in_backward.*accumulate_grad_batches: 1, found 2"),
        ("step in backward", {"gradient_clip_val": 1.0}, "step_in_backward.*gradient_clip_val: null, found 1: weights"),
        ("split weights", {"precision": "32-true"}, "memory.weights: split needs .*precision: bf16-mixed, found 32-tr"),
        ("frozen bfloat16", {"precision": "32-true"}, "memory.frozen: bfloat16 needs .*: bf16-mixed, found 32-true"),
    ],
)
def test_what_excludes_each_other_is_said_before_training(root, tmp_path, switch, trainer, message):
    with pytest.raises(UserError, match=message):
        run(root, tmp_path, switch, **trainer)
    assert not last(tmp_path).exists()


@pytest.mark.parametrize(
    ("switches", "bytes_a_weight"),
    [
        (("frozen bfloat16", "8 bits"), (4, 2, 4)),
        (("bfloat16 weights", "8 bits", "step in backward"), (2, 4, 0)),
        (("split weights", "8 bits"), (4, 4, 2)),
    ],
)
def test_the_memory_report_counts_what_is_stored(root, tmp_path, switches, bytes_a_weight):
    class Kept(DummyLogger):
        def __init__(self):
            super().__init__()
            self.values = {}

        def log_metrics(self, metrics, step=None):
            self.values |= {name: value * 2**20 for name, value in metrics.items()}

    logger, average = Kept(), WeightAverage(decay=0.9)
    model = run(root, tmp_path, *switches, steps=1, callbacks=[MemoryReport(), average], logger=logger)
    values, count = logger.values, {True: 0, False: 0}
    for weight in model.unet.parameters():
        count[weight.requires_grad] += weight.numel()
    trained, frozen, gradients = bytes_a_weight
    assert values["memory/weights_trained"] == pytest.approx(count[True] * trained, rel=0.05)
    assert values["memory/weights_frozen"] == pytest.approx(count[False] * frozen, rel=0.05)
    assert values["memory/average"] == count[True] * 4 == average.num_bytes
    assert 0 < values["memory/optimiser_states"] < 8 * count[True]
    if gradients:
        assert values["memory/gradients"] == pytest.approx(count[True] * gradients, rel=0.05)
    else:
        assert values["memory/gradients"] == max(w.nbytes for w in model.unet.parameters() if w.requires_grad)
