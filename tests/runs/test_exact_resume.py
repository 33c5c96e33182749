"""A run that is stopped at any moment goes on as if it had not been: states, generators, held-out losses, logs."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import TensorBoardLogger

from ldm.callbacks import AtomicCheckpointIO, ComputeCount, LastCheckpoint, WeightAverage
from ldm.callbacks.resuming import cut_logs, generators, set_generators
from ldm.data.clips import ClipDataModule
from ldm.errors import UserError
from ldm.optim import build_optimizer
from ldm.optim.stored_weights import StoredWeights
from ldm.runs import last_checkpoints
from ldm.runs.last_checkpoints import LAST, check_room, corruption, kept, num_bytes, publish
from scripts.dev.torture import leaves, logged, unlike
from tests.toy_run import ToyModel, last, make_prepared, read


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_prepared(tmp_path_factory.mktemp("prepared") / "set", lengths=(12, 9, 7, 30))


class DrawingModel(ToyModel):
    """One that draws from every generator a process shares, as dropout does."""

    def __init__(self):
        super().__init__(learning_rate=0.001)
        self.dropout = torch.nn.Dropout(0.5)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        factor = self.dropout(torch.ones(8)).mean() + random.random() + np.random.random()
        self.log("train/drawn", factor, batch_size=len(batch))
        return loss * factor


def run(root, folder, *, steps, every=3, resume=None, model=None, also=(), **words):
    """Train with everything that logs; `every`: steps between checkpoints, of which all are kept."""
    model = model or DrawingModel()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)  # whatever the process was doing before
    saving = LastCheckpoint(str(folder), {"name": "toy"}, every_n_steps=every, keep_last=100)
    callbacks = [WeightAverage(decay=0.9), LearningRateMonitor("step"), *also, saving]
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=TensorBoardLogger(folder, name="", version="tb"),
        enable_progress_bar=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()], callbacks=callbacks,
        log_every_n_steps=1, val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0, **words,
    )  # fmt: skip
    data = ClipDataModule(str(root), frames=3, batch_size=2, num_workers=0, val_share=0.2)
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_from_any_checkpoint_equals_the_straight_run(root, tmp_path, accumulate):
    """As after a kill: what lies in the folder is of later steps. An epoch has 6 steps here, or 3."""
    words = {"steps": 13, "every": 1, "accumulate_grad_batches": accumulate}
    run(root, tmp_path / "straight", also=[ComputeCount()], **words)
    wanted = dict(leaves(read(last(tmp_path / "straight")))), logged(tmp_path / "straight" / "tb")
    assert {("val/loss", step, 0) for step in (3, 7, 11)} <= set(wanted[1]) or accumulate == 2
    for step in (1, 3, 4, 6, 8, 12):
        folder = tmp_path / f"from{step}"
        shutil.copytree(tmp_path / "straight", folder)
        checkpoint = next(path for path in kept(folder / "checkpoints") if read(path)["global_step"] == step)
        for events in (folder / "tb").iterdir():  # written before this session began
            os.utime(events, (1, 1))
        run(root, folder, resume=checkpoint, also=[ComputeCount()], **words)
        found = dict(leaves(read(last(folder)))), logged(folder / "tb")
        assert unlike("checkpoint", wanted[0], found[0]) is None, step
        assert unlike("logged", wanted[1], found[1]) is None, step


def test_run_that_never_saved_starts_over_without_old_logs(root, tmp_path):
    run(root, tmp_path / "straight", steps=3)
    (tmp_path / "killed" / "tb").mkdir(parents=True)
    for path in (tmp_path / "straight" / "tb").iterdir():
        shutil.copy(path, tmp_path / "killed" / "tb" / "events.out.tfevents.1.here.2.0")
        os.utime(tmp_path / "killed" / "tb" / "events.out.tfevents.1.here.2.0", (1, 1))
    run(root, tmp_path / "killed", steps=3)
    logs = [logged(tmp_path / name / "tb") for name in ("straight", "killed")]
    assert unlike("logged", *logs) is None and logs[0]


def test_error_in_a_step_saves_the_previous_step(root, tmp_path):
    run(root, tmp_path / "straight", steps=8)
    model = DrawingModel()

    def fail():
        torch.rand(5)
        raise RuntimeError("something")

    model.at_batch = {5: fail}
    with pytest.raises(RuntimeError, match="something"):
        run(root, tmp_path / "failed", steps=8, every=100, model=model)
    assert read(last(tmp_path / "failed"))["global_step"] == 5
    run(root, tmp_path / "failed", steps=8, resume=last(tmp_path / "failed"))
    ends = [dict(leaves(read(last(tmp_path / name)))) for name in ("straight", "failed")]
    assert unlike("checkpoint", *ends) is None
    assert unlike("logged", *(logged(tmp_path / name / "tb") for name in ("straight", "failed"))) is None


def test_error_in_validation_saves_nothing(root, tmp_path, caplog):
    model = ToyModel(learning_rate=0.05)

    def fail():
        raise RuntimeError("something")

    model.at_batch = {("validation", 4): fail}
    with pytest.raises(RuntimeError, match="something"), caplog.at_level(logging.WARNING, logger="ldm"):
        run(root, tmp_path, steps=8, every=3, model=model)
    assert read(last(tmp_path))["global_step"] == 3
    assert "step 4 is not saved: it was not complete. The last good one is of step 3" in caplog.messages


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw4bit"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_quantised_optimiser_states_resume_exactly(tmp_path, name, stored):
    if name != "adamw":
        pytest.importorskip("torchao")

    def begin():
        torch.manual_seed(0)
        module = torch.nn.Linear(256, 64)
        weights = StoredWeights(module, stored, "float32", 5) if stored != "float32" else None
        return module, build_optimizer([{"params": list(module.parameters()), "lr": 1e-3}], name, weights=weights)

    def steps(module, optimizer, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for weight in module.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator).to(weight)
            optimizer.step()

    straight = begin()
    steps(*straight, range(6))
    stopped = begin()
    steps(*stopped, range(3))
    state = {"module": stopped[0].state_dict(), "optimizer": stopped[1].state_dict()}
    AtomicCheckpointIO().save_checkpoint(state, tmp_path / LAST)
    state = AtomicCheckpointIO().load_checkpoint(tmp_path / LAST)
    again = begin()
    again[0].load_state_dict(state["module"])
    again[1].load_state_dict(state["optimizer"])
    steps(*again, range(3, 6))
    ends = [dict(leaves([part.state_dict() for part in each])) for each in (straight, again)]
    assert unlike("end", *ends) is None


def test_random_generators_are_restored(monkeypatch):
    states = generators()
    drawn = [random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()]
    random.random(), np.random.rand(), torch.rand(1)
    set_generators(states)
    assert drawn == [random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()]


# ---- the last good ones


def save(path, step, size=100):
    AtomicCheckpointIO().save_checkpoint({"step": step, "weight": torch.full((size,), float(step))}, path)


def steps_in(folder):
    return [(path.name, read(path)["step"]) for path in kept(folder)]


def test_the_last_checkpoints_are_kept(tmp_path):
    for step in range(1, 5):
        save(tmp_path / ".fresh.ckpt", step)
        publish(tmp_path / ".fresh.ckpt", tmp_path, keep=3)
    assert steps_in(tmp_path) == [("last.ckpt", 4), ("last-1.ckpt", 3), ("last-2.ckpt", 2)]
    save(tmp_path / ".fresh.ckpt", 5)
    publish(tmp_path / ".fresh.ckpt", tmp_path, keep=1)
    assert steps_in(tmp_path) == [("last.ckpt", 5)] and len(list(tmp_path.iterdir())) == 1


def test_corrupt_checkpoint_displaces_no_whole_one(tmp_path):
    for step in (1, 2):
        save(tmp_path / ".fresh.ckpt", step)
        publish(tmp_path / ".fresh.ckpt", tmp_path, keep=2)
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:900])
    save(tmp_path / ".fresh.ckpt", 3)
    publish(tmp_path / ".fresh.ckpt", tmp_path, keep=2)
    assert steps_in(tmp_path) == [("last.ckpt", 3), ("last-1.ckpt", 1)]


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_between_any_two_renames_leaves_a_whole_one(tmp_path, monkeypatch, links):
    class Killed(BaseException):
        pass

    real = {name: getattr(os, name) for name in ("replace", "link", "unlink")}
    calls = {"left": 0}

    def call(name):
        def counted(*arguments, **options):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Killed
            if name == "link" and not links:
                raise OSError(errno.EPERM, "no hard links")
            return real[name](*arguments, **options)

        return counted

    fake = SimpleNamespace(**{**vars(os), **{name: call(name) for name in real}})
    monkeypatch.setattr(last_checkpoints, "os", fake)
    for number in range(1, 6):
        folder = tmp_path / str(number)
        for step in (1, 2, 3, 4):
            save(folder / ".fresh.ckpt", step)
            calls["left"] = number if step == 4 else 0
            try:
                publish(folder / ".fresh.ckpt", folder, keep=3)
            except Killed:
                pass
        found = steps_in(folder)
        assert found[0][1] >= 3 and found[1][1] >= 2, "the newest, and one before it"
        calls["left"] = 0
        save(folder / ".fresh.ckpt", 5)
        publish(folder / ".fresh.ckpt", folder, keep=3)
        assert steps_in(folder)[0] == ("last.ckpt", 5) and len(steps_in(folder)) == 3


def test_corruption_is_found_anywhere_in_the_file(tmp_path):
    path = tmp_path / LAST
    save(path, 1, size=5000)
    whole = path.read_bytes()
    assert corruption(path) is None
    path.write_bytes(whole[: len(whole) // 2])
    assert "corrupt or truncated" in corruption(path)
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    path.write_bytes(changed)
    assert "does not match its checksum" in corruption(path)
    path.write_bytes(b"")
    assert corruption(path) is not None


# ---- a full disk


def test_free_space_is_checked_before_writing(tmp_path, monkeypatch):
    weight = torch.zeros(1000)
    checkpoint = {"a": weight, "b": [weight.view(10, 100), {"c": torch.zeros(3, dtype=torch.int64)}]}
    assert num_bytes(checkpoint) == 4000 + 24
    check_room(tmp_path / LAST, checkpoint)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 2**20))
    check_room(tmp_path / LAST, checkpoint)
    message = r"expected 8.0 MiB of free space for the next checkpoint, found 5.0 MiB: the disk is full. Nothing was"
    with pytest.raises(UserError, match=message):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(2**20)}, tmp_path / LAST)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_logged_and_training_continues(root, tmp_path, monkeypatch, caplog):
    model, usage = ToyModel(learning_rate=0.05), shutil.disk_usage
    model.at_batch = {
        4: lambda: monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0)),
        8: lambda: monkeypatch.setattr(shutil, "disk_usage", usage),
    }
    with caplog.at_level(logging.ERROR, logger="ldm"):
        run(root, tmp_path, steps=9, every=3, model=model)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("step 6 is not saved: ") and caplog.messages[0].endswith("is of step 3")
    assert [read(path)["global_step"] for path in kept(tmp_path / "checkpoints")] == [9, 3]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="the disk is full"):
        run(root, tmp_path, steps=12, resume=last(tmp_path))
    assert read(last(tmp_path))["global_step"] == 9


# ---- logs


def test_logs_are_cut_where_the_checkpoint_ends(tmp_path, caplog):
    names = ("events.out.tfevents.1", "events.out.tfevents.2", "events.out.tfevents.3", "metrics.csv", "notes.txt")
    for name in names:
        (tmp_path / name).write_bytes(b"0123456789")
        os.utime(tmp_path / name, (1, 1))
    os.utime(tmp_path / names[2], (100, 100))
    with caplog.at_level(logging.WARNING, logger="ldm"):
        assert cut_logs(tmp_path, {names[0]: 4, "metrics.csv": 12}, began=50) == 6 + 10
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {names[0]: 4, names[2]: 10, "metrics.csv": 10, "notes.txt": 10}, "this session's own are left alone"
    assert "metrics.csv: expected 12 bytes of logs, found 10: some steps are missing" in caplog.text
