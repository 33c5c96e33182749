"""Spikes of the toy model's loss: skipped, counted, written down, resumed, and the same in several processes."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket

import pytest
import pytorch_lightning as pl
import torch

from ldm.callbacks import BadStepsError, SkipBadSteps, WeightAverage
from tests.guard_runs import Spoil, Watch, as_on_a_card
from tests.toy_run import ToyModel, fit, last, make_prepared, read


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Losses on this set make steps 25, 26 and 31 spikes, and no others."""
    return make_prepared(tmp_path_factory.mktemp("toy") / "set", lengths=(12, 9, 30, 7))


@pytest.fixture
def on_a_card(monkeypatch):
    as_on_a_card(monkeypatch)


def toy_run(root, folder, *, steps=30, spoil=(), loss=None, resume=None, model=None, trainer=None, **words):
    model = model or ToyModel(learning_rate=0.001, momentum=0)
    skipping = SkipBadSteps(str(folder), **words)
    spoiler = Spoil(model, set(spoil), loss or (lambda value: value * 1000))
    fit(
        root, folder, [spoiler, skipping], model=model, steps=steps, resume=last(folder) if resume else None,
        max_epochs=-1, **(trainer or {}),
    )  # fmt: skip
    return model, skipping


def lines_of(folder):
    return [json.loads(line) for line in (folder / "skipped_steps.jsonl").read_text().splitlines()]


def test_a_spike_is_skipped_and_its_clips_are_named(root, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="ldm"):
        model, skipping = toy_run(root, tmp_path, spoil=(3, 24))
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


def test_frames_are_those_of_the_clip(root, tmp_path):
    """In this set a frame's value is its number."""
    kept = []

    class Keep(ToyModel):
        def training_step(self, batch, batch_idx):
            kept.append([moments[:, 0, 0, 0].int() % 100 for moments in batch.moments])
            return super().training_step(batch, batch_idx)

    model = Keep(learning_rate=0.001)
    toy_run(root, tmp_path, steps=3, spoil=(1,), loss=lambda value: value * float("nan"), model=model)
    (line,) = lines_of(tmp_path)
    assert [clip["frames"] for clip in line["clips"]] == [frames.tolist() for frames in kept[1]]
    assert line["loss"] == "nan" and line["reason"] == "the loss is nan" and line["mean_of_recent"] == "nan"


@pytest.mark.parametrize(
    ("words", "found"), [({"most_in_row": 3}, "3 skipped steps in a row, found 3"), ({"most_in_all": 4}, "4 .* in all")]
)
def test_too_many_end_the_run_and_the_last_good_checkpoint_stays(root, tmp_path, words, found):
    toy_run(root, tmp_path, steps=4)
    before = last(tmp_path).read_bytes()
    bad = {5, 6, 7} if "most_in_row" in words else {4, 6, 8, 10}
    with pytest.raises(BadStepsError, match=rf"expected fewer than {found}.*skipped_steps.jsonl names"):
        toy_run(root, tmp_path, spoil=bad, loss=lambda value: value * float("inf"), resume=True, **words)
    assert last(tmp_path).read_bytes() == before
    assert [entry.name for entry in last(tmp_path).parent.iterdir()] == ["last.ckpt"]
    assert [line["step"] for line in lines_of(tmp_path)] == [step + 1 for step in sorted(bad)]


def test_gpu_verdict_is_read_a_step_later(root, tmp_path, on_a_card, monkeypatch):
    class Fused(ToyModel):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.head.parameters(), lr=0.01, fused=True)

    model = Fused(learning_rate=0.01)
    nan = float("nan")
    with pytest.raises(BadStepsError, match="in a row, found 2"):
        toy_run(root, tmp_path, spoil=(4, 5), loss=lambda value: value * nan, model=model, most_in_row=2)
    assert len(model.seen) == 7 and model.seen[-1][0] == 6, "one more step was on its way"
    last_step = Fused(learning_rate=0.01)
    with pytest.raises(BadStepsError, match="in a row, found 1"):
        toy_run(root, tmp_path, steps=3, spoil=(2,), loss=lambda value: value * nan, model=last_step, most_in_row=1)


def test_counts_losses_and_lines_are_resumed(root, tmp_path):
    bad, loss = (25, 26, 31), None
    _, straight = toy_run(root, tmp_path / "straight", steps=40, spoil=bad, loss=loss, window=30)
    toy_run(root, tmp_path / "run", steps=26, spoil=bad, loss=loss, window=30)
    checkpoint = last(tmp_path / "run").read_bytes()
    toy_run(root, tmp_path / "run", steps=33, spoil=bad, loss=loss, resume=True, window=30)
    last(tmp_path / "run").write_bytes(checkpoint)  # killed after 33 steps, taken up from 26
    _, again = toy_run(root, tmp_path / "run", steps=40, spoil=bad, loss=loss, resume=True, window=30)
    assert (straight.in_all, straight.in_row) == (again.in_all, again.in_row) == (3, 0)
    assert torch.equal(straight._judge.losses, again._judge.losses)
    assert lines_of(tmp_path / "straight") == lines_of(tmp_path / "run")
    kept = [read(last(tmp_path / name))["skipped_steps"] for name in ("straight", "run")]
    assert torch.equal(kept[0]["losses"], kept[1]["losses"])


def test_one_bad_micro_batch_skips_the_step(root, tmp_path):
    model, watch = ToyModel(learning_rate=0.01), Watch()
    spoiler = Spoil(model, {1}, lambda value: value * float("nan"), micro_batch=0)
    skipping = SkipBadSteps(str(tmp_path))
    fit(root, tmp_path, [spoiler, skipping, watch], model=model, steps=3, accumulate_grad_batches=2)
    assert watch.changed(1) == [] and watch.changed(0) and watch.changed(2)
    assert [clip["position"] for clip in lines_of(tmp_path)[0]["clips"]] == [4, 5, 6, 7]


def test_numbers_go_to_the_loggers(root, tmp_path):
    values = []

    class Kept(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            values.extend([(step, metrics)] if "train/skipped_steps" in metrics else [])

    model = ToyModel(learning_rate=0.001)
    spoiler = Spoil(model, {2}, lambda value: value * float("nan"))
    words = {"model": model, "steps": 4, "logger": Kept(), "log_every_n_steps": 2}
    fit(root, tmp_path, [spoiler, SkipBadSteps(str(tmp_path))], **words)
    assert [(step, metrics["train/skipped_steps"]) for step, metrics in values] == [(2, 0), (4, 1)]
    assert values[0][1]["train/gradient_norm"] > 0


def test_manual_optimisation_is_not_guarded(root, tmp_path):
    class Manual(ToyModel):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    skipping = SkipBadSteps(str(tmp_path))
    fit(root, tmp_path, [skipping, WeightAverage(decay=0.5)], model=Manual(learning_rate=0.01), steps=3)
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


@pytest.mark.slow
def test_processes_skip_together(root, tmp_path):
    """The loss of the second one alone is a spike; the file names the clips of both."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.toy_run"])
    team = [context.Process(target=work, args=(rank, port, str(root), str(tmp_path))) for rank in range(2)]
    for process in team:
        process.start()
    for process in team:
        process.join()
    assert [process.exitcode for process in team] == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["in_all"] == 1
        assert found["changed"][1] == 0 < found["changed"][0] and found["changed"][2]
    (line,) = lines_of(tmp_path)
    assert [clip["position"] for clip in line["clips"]] == [24, 25, 26, 27]
