"""`last.ckpt`: whole or not at all, on signals, at the end, and read without running anything."""

from __future__ import annotations

import errno
import logging
import os
import signal

import pytest
import pytorch_lightning as pl
import torch

from ldm.callbacks import AtomicCheckpointIO, LastCheckpoint, StopRequested
from ldm.data.clips import ClipDataModule
from ldm.errors import UserError, run_command
from ldm.optim import build_optimizer
from ldm.optim.per_weight import state_bytes
from tests.toy_run import ToyModel, fit, last, read


class FullDisk:
    """A file that takes some bytes and then says that the disk is full."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.file.name))
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 3000, 100_000])
def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(tmp_path, monkeypatch, capsys, room):
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint({"step": 1, "weight": torch.zeros(100)}, path)
    real_open = type(path).open

    def full_open(self, mode="r", *arguments, **options):
        file = real_open(self, mode, *arguments, **options)
        return FullDisk(file, room) if "w" in mode else file

    monkeypatch.setattr(type(path), "open", full_open)

    def save():
        io.save_checkpoint({"step": 2, "weight": torch.randn(100_000)}, path)

    with pytest.raises(OSError, match="No space left on device"):
        save()
    assert run_command(save) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert io.load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_while_training_keeps_the_old_checkpoint(root, tmp_path, monkeypatch):
    fit(root, tmp_path, [], steps=2)

    def no_room(checkpoint, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", no_room)
    with pytest.raises(OSError, match="No space left"):
        fit(root, tmp_path, [], steps=4, resume=last(tmp_path))
    assert read(last(tmp_path))["global_step"] == 2


def test_checkpoints_are_read_without_running_anything(tmp_path):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    torch.save({"callback": print}, path)
    with pytest.raises(UserError, match=r"last.ckpt: expected a checkpoint written by main.py.*resume from another"):
        io.load_checkpoint(path, weights_only=False)
    io.save_checkpoint({"weight": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cannot be read .*It may be half copied"):
        io.load_checkpoint(path)
    with pytest.raises(UserError, match=r"nothing.ckpt: there is no such checkpoint"):
        io.load_checkpoint(tmp_path / "nothing.ckpt")


def test_eight_bit_optimiser_states_are_resumed(tmp_path):
    pytest.importorskip("torchao")
    weight = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = build_optimizer([{"params": [weight], "lr": 1e-3}], "adamw8bit")
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]["exp_avg"]
    assert state_bytes(optimizer) < 2.4 * weight.numel() < 2 * state.nbytes, "what it really takes"
    io = AtomicCheckpointIO()
    io.save_checkpoint(optimizer.state_dict(), tmp_path / "last.ckpt")
    again = io.load_checkpoint(tmp_path / "last.ckpt")["state"][0]["exp_avg"]
    assert torch.equal(again.codes, state.codes)


def test_last_checkpoint_every_so_many_steps_and_at_the_end(root, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="ldm"):
        data = ClipDataModule(str(root), frames=3, batch_size=2, num_workers=0)
        callback = LastCheckpoint(str(tmp_path), {"name": "toy"}, every_n_steps=3)
        pl.Trainer(
            max_steps=7, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback],
            enable_model_summary=False,
        ).fit(ToyModel(learning_rate=0.05), data)  # fmt: skip
    assert [record.args[1] for record in caplog.records if record.msg.startswith("saved")] == [3, 6, 7]
    checkpoint = read(last(tmp_path))
    assert checkpoint["config"] == {"name": "toy"} and checkpoint["global_step"] == 7
    with pytest.raises(UserError, match="every_n_steps of at least 1, found 0"):
        LastCheckpoint(str(tmp_path), {}, every_n_steps=0)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_cluster_signals_save_and_stop(root, tmp_path, name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    model = ToyModel(learning_rate=0.05)
    model.at_batch = {2: lambda: os.kill(os.getpid(), number)}
    with pytest.raises(StopRequested, match=rf"stopped by {name} after step 3; saved .*last.ckpt") as stopped:
        fit(root, tmp_path, [], model=model, steps=5)
    assert stopped.value.signal == number and signal.getsignal(number) is before
    assert read(last(tmp_path))["global_step"] == 3


def test_ctrl_c_stops_and_a_second_one_at_once(root, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    model = ToyModel(learning_rate=0.05)
    model.at_batch = {2: lambda: os.kill(os.getpid(), signal.SIGINT)}
    with pytest.raises(StopRequested, match=r"stopped after step 3; saved .*last.ckpt"):
        fit(root, tmp_path / "once", [], model=model)
    assert read(last(tmp_path / "once"))["global_step"] == 3
    assert signal.getsignal(signal.SIGINT) is before

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    model = ToyModel(learning_rate=0.05)
    model.at_batch = {2: twice}
    with pytest.raises(SystemExit):
        fit(root, tmp_path / "twice", [], model=model)
    assert not last(tmp_path / "twice").exists()
    signal.signal(signal.SIGINT, before)


def test_nothing_is_saved_before_the_first_step(root, tmp_path):
    def mistake():
        raise UserError("no")

    model = ToyModel(learning_rate=0.05)
    model.at_batch = {0: mistake}
    with pytest.raises(UserError):
        fit(root, tmp_path, [], model=model)
    assert not last(tmp_path).exists()


def test_nothing_is_written_in_a_dry_run(root, tmp_path):
    fit(root, tmp_path, [], fast_dev_run=True)
    assert not tmp_path.exists() or not list(tmp_path.iterdir())
