"""The script that looks for inputs nobody thought of: it runs, and it would notice."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import strategies as st

from ldm.errors import UserError
from scripts.dev import fuzz
from scripts.dev.fuzz_inputs import READERS, Reader

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_command(tmp_path):
    words = ["scripts/dev/fuzz.py", "--readers", "index,checkpoint,config", "--inputs", "30", "--save", str(tmp_path)]
    found = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    assert lines[-1].endswith("inputs, 0 kinds of failures")
    assert [line.partition(":")[0] for line in lines if "inputs in" in line] == ["index", "checkpoint", "config"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", READERS)
def test_samples_are_sound(name, tmp_path):
    for content in READERS[name].samples():
        READERS[name].read(content, tmp_path)


def greedy(content: bytes, folder: Path) -> None:
    if content == b"much":
        bytes(80 * 2**20)
    elif content == b"slow":
        time.sleep(5)
    elif content == b"deep":
        raise RecursionError
    elif content == b"bad":
        raise UserError(f"{folder}/a: expected 3, found 4")
    elif content != b"fine":
        raise KeyError(content)


def test_what_is_no_message_is_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    reader = Reader("greedy", greedy, lambda: [b"fine"], st.binary())
    trial = fuzz.Trial(reader, tmp_path, tmp_path / "saved", traced=True)
    tracemalloc.start()
    try:
        for content in (b"fine", b"bad", b"bad", b"much", b"slow", b"deep", b"odd", b"odder"):
            trial(content)
    finally:
        tracemalloc.stop()
    assert (trial.tally.inputs, dict(trial.tally.refused)) == (8, {"/a: expected ,": 2})
    kinds = {kind: path.read_bytes() for kind, path in trial.tally.failed.items()}
    assert kinds.pop("KeyError") == b"odd" and kinds.pop("TooSlowError") == b"slow"
    assert kinds.pop("RecursionError") == b"deep"
    assert list(kinds.values()) == [b"much"] and "took 8" in next(iter(kinds))
    assert "KeyError: b'odd'" in capsys.readouterr().out
    assert "8 inputs in 1 s, 2 refused in 1 ways, 6 read" in fuzz.report("greedy", trial.tally, 1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--readers", "index,x"], "--readers: expected some of index, .*, found 'x'"),
        (["--inputs", "0"], "--inputs and --minutes: expected at least 1 and more than 0"),
        (["--engine", "atheris"], "--engine atheris: expected one of --readers, found several"),
    ],
)
def test_words_that_cannot_be_meant(words, message):
    with pytest.raises(UserError, match=message):
        fuzz.parse_arguments(words)
