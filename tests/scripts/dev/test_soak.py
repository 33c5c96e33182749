"""The soak test runs, and it would find leaks."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest

from ldm.errors import UserError
from scripts.dev import soak
from scripts.dev.soak import Sample

LEAKING = """
import sys, time
kept, files = [], []
for step in range(1, 41):
    kept.append(bytearray(2**20)); kept[-1][::4096] = b"x" * 256
    files.append(open("/dev/null"))
    print(f"step {step}/40", flush=True)
    time.sleep(0.05)
"""


def sample(second: float, **changes: float) -> Sample:
    words = {"memory": 100.0, "memory_of_children": 50.0, "files": 9, "threads": 3, "children": 2, **changes}
    return Sample(second, int(second) + 1, **words)


@pytest.mark.slow
def test_a_short_run_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    """Drawing, preparing, training with samples, validation and checkpoints; growth is for longer ones."""
    monkeypatch.setattr(soak, "find_growth", lambda samples: [])
    words = ["--steps", "8", "--occasions", "4", "--every", "0.01", "--out", str(tmp_path / "run")]
    soak.main([*words, "--json", str(tmp_path / "soak.json")])
    said = capsys.readouterr().out
    assert "processes left behind: 0" in said and "files left behind: none" in said
    assert "8 steps in" in said and "all 2 verdicts good" in said
    found = json.loads((tmp_path / "soak.json").read_text())
    assert max(one["children"] for one in found["samples"]) >= 1, "child processes were seen"
    assert [one["is_good"] for one in found["verdicts"]] == [True] * 2
    (run,) = (tmp_path / "run" / "logs").iterdir()
    assert (run / "checkpoints" / "last.ckpt").is_file() and len(list((run / "images" / "samples").glob("*.gif"))) == 3


def test_constant_resources_pass():
    """Bumps at samples and validation, and the start and the end, do not count."""
    samples = [sample(second, memory=100 + 30 * (second % 10 == 0)) for second in range(200)]
    samples = [sample(0, memory=5), *samples, sample(199, memory=900, files=50)]
    assert [verdict.is_good for verdict in soak.find_growth(samples)] == [True] * 5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("memory", "memory of the process: 1"),
        ("memory_of_children", "memory of its children: 5"),
        ("files", "open files: at most"),
        ("threads", "threads: at most"),
        ("children", "children: at most"),
    ],
)
def test_growth_is_bad(name, text):
    start = getattr(sample(0), name)
    samples = [sample(second, **{name: type(start)(start * (1 + second / 200))}) for second in range(200)]
    bad = [verdict.text for verdict in soak.find_growth(samples) if not verdict.is_good]
    assert len(bad) == 1 and bad[0].startswith(text)


def test_a_leak_in_a_process_is_found(tmp_path):
    samples, status, left = soak.watch([sys.executable, "-c", LEAKING], tmp_path / "log", 0.01, dict(os.environ))
    assert status == 0 and not left
    bad = [verdict.text for verdict in soak.find_growth(samples) if not verdict.is_good]
    assert [text.partition(":")[0] for text in bad] == ["memory of the process", "open files"]


def test_leftover_processes_and_files_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "LINGER", 0)
    code = "import subprocess, time; subprocess.Popen(['sleep', '3']); print('step 1/2', flush=True); time.sleep(0.5)"
    *_, left = soak.watch([sys.executable, "-c", code], tmp_path / "log", 0.05, dict(os.environ))
    assert len(left) == 1
    deadline = time.monotonic() + 20
    while soak.is_alive(next(iter(left))) and time.monotonic() < deadline:
        time.sleep(0.1)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "half").write_bytes(b"")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / ".last.ckpt.partial").write_bytes(b"")
    found = soak.find_leftovers(tmp_path, set(os.listdir(soak.SHARED_MEMORY)))
    assert sorted(os.path.basename(path) for path in found) == [".last.ckpt.partial", "half"]


def test_a_short_run_is_an_error():
    assert (
        "expected at least 20 samples of the training, found 3"
        in soak.find_growth([sample(i) for i in range(4)])[0].text
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps and --minutes: expected at least 1 and more than 0"),
        (["--minutes", "-1"], "--steps and --minutes: expected at least 1 and more than 0"),
        (["--occasions", "0"], "--occasions and --every: expected at least 1 and more than 0"),
        (["--out", "."], r"--out \.: expected a new or an empty folder, found something there"),
    ],
)
def test_invalid_options(words, message):
    with pytest.raises(UserError, match=message):
        soak.parse_arguments(words)
