"""The share of the time that training waits for data: of a slow source, of a quick one, and in the log's lines."""

from __future__ import annotations

import logging
import time

import pytest
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from ldm.callbacks import DataWait, ProgressLines
from ldm.data.clips import ClipDataset
from tests.toy_run import ToyModel, fit, make_prepared

SLOW = 0.1  # seconds


@pytest.fixture
def root(tmp_path):
    return make_prepared(tmp_path / "prepared")


def slow_down(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    plain = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *values: time.sleep(SLOW) or plain(*values))


@pytest.mark.parametrize(("owner", "name", "low", "high"), [
    (ClipDataset, "__getitem__", 0.5, 1.0), (ToyModel, "training_step", 0.0, 0.5),
])  # fmt: skip
def test_share_of_a_slow_source_and_a_slow_step(root, tmp_path, monkeypatch, owner, name, low, high):
    slow_down(monkeypatch, owner, name)
    wait, logger, logged = DataWait(), CSVLogger(tmp_path), []
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step: logged.append(metrics.get("train/data_wait")))
    fit(root, tmp_path / "run", [wait], steps=8, logger=logger, log_every_n_steps=4)
    assert low < wait.share < high
    logged = [share for share in logged if share is not None]
    assert len(logged) == 2 and all(low < share < high for share in logged)


def test_progress_lines_have_the_share(root, tmp_path, monkeypatch, caplog):
    slow_down(monkeypatch, ClipDataset, "__getitem__")
    caplog.set_level(logging.INFO, "ldm")
    fit(root, tmp_path / "run", [DataWait(), ProgressLines(every_seconds=0)], steps=3)
    lines = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert "waiting" not in lines[0]  # the first batch is start-up
    assert all("% waiting for data" in line for line in lines[1:])


def test_other_loaders_are_ignored(root, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.data.stream.StreamLoader", DataLoader)
    wait = DataWait()
    fit(root, tmp_path / "run", [wait, ProgressLines(every_seconds=0)], steps=2)
    assert wait.share is None
