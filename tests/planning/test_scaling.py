"""Costs of many processes, computed from one step: compared with sums by hand, and the output of scripts/plan.py."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from ldm.errors import UserError
from ldm.planning.count import ALLOWANCE, AVERAGE, FROZEN, GRADIENTS, STATES, TRAINED, StepCount, StepShape
from ldm.planning.live_tensors import Peak
from ldm.planning.report import GPUModel
from ldm.planning.scaling import Machines, checkpoint_bytes, clip_bytes, in_parts, largest_block, scale
from ldm.runs.arguments import parse_arguments
from scripts import plan
from tests.planning.test_plan import config

ROOT = Path(__file__).parents[2]

OTHERS = "activations and buffers"


def count(states: int) -> StepCount:
    """A network of 100 trained numbers and 50 frozen ones, two clips; a step of 3000 operations."""
    sizes = {TRAINED: 400, FROZEN: 200, GRADIENTS: 400, STATES: states, AVERAGE: 400}
    always = {TRAINED: 400, FROZEN: 200, STATES: states, AVERAGE: 400}
    peaks = {
        "forward": Peak(1700 + states, always | {OTHERS: 700}),
        "backward": Peak(1900 + states, always | {GRADIENTS: 300, OTHERS: 600}),
    }
    return StepCount(StepShape(2, 5, 4, 4), sizes, 700, peaks, 0, 3000, 0, 100, 150)


def test_bytes_read_sent_saved_and_kept():
    machines = Machines(GPUModel("slow", 8, 1e-9), link=1.0, disk=1e-6)  # 1000 operations and bytes a second
    found = scale(4, machines, count(200), count(800), bytes_a_clip=60, block=10)
    assert found.loader == pytest.approx(4 * 2 * 60 / 3), "four processes, two clips each, in three seconds"
    assert found.sent == 2 * 3 / 4 * 400, "three quarters of the gradients to add up, and again to hand out"
    assert found.sent_parts == 3 * 3 / 4 * 400
    assert checkpoint_bytes(count(200)) == 1200 and found.saving == pytest.approx(1.2)
    assert found.memory == 1900 + 400 + ALLOWANCE[1], "in the forward pass, beside buffers for all gradients"
    assert found.memory_parts == pytest.approx((400 + 800 + 400) / 4 + 200 + 700 + 4 * 4 * 10 + ALLOWANCE[1])
    alone = scale(1, machines, count(200), count(800), bytes_a_clip=60, block=10)
    assert (alone.sent, alone.memory) == (0, 2100 + ALLOWANCE[1]) and alone.memory_parts == 2700 + ALLOWANCE[1]


def test_a_clip_and_a_block():
    tree = config()
    assert clip_bytes(tree, StepShape(2, 5, 8, 4)) == 2 * (5 * 8 * 8 * 4 + 77 * 32)
    block = largest_block(tree)
    assert 0 < block < largest_block(config(channel_mult=[1, 4]))


def test_parts_have_float32():
    tree = config()
    tree["model"]["params"] |= {
        "memory": {"weights": "split", "frozen": "bfloat16", "step_in_backward": True},
        "optimizer": {"name": "adamw8bit", "library": "torchao", "states_on": "host", "weight_decay": 0.1},
    }
    params = in_parts(tree)["model"]["params"]
    assert params["memory"] == {"weights": "float32", "frozen": "bfloat16", "step_in_backward": False}
    assert params["optimizer"] == {"name": "adamw", "states_on": "gpu", "weight_decay": 0.1}


def test_the_command_prints_it(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    tree = config()
    tree["data"] = {"target": "ldm.data.clips.ClipDataModule", "params": {"root": "none", "frames": 2, "batch_size": 3}}
    path.write_text(yaml.safe_dump(tree))
    plan.main(["--base", str(path), "--size", "64", "--processes", "1,8", "--card", "A100", "--link", "25"])
    lines = capsys.readouterr().out.splitlines()
    table = {line[:40].strip(): line[40:].split() for line in lines[lines.index("") :] if line.startswith("  ")}
    assert table["processes"] == ["1", "8"] and table["clips a step"] == ["3", "24"]
    assert table["ms at 25 GB a second"] is not None and table["ddp: sent by each, GB a step"][0] == "0.00"
    assert any(line.startswith("A100: a step of 3 x 2 frames of 8x8 latents takes") for line in lines)


def test_the_commands_in_the_docs_parse():
    lines = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    commands = [line for line in lines if "main.py --base" in line]
    assert len(commands) == 5
    for line in commands:
        options = parse_arguments(shlex.split(line.partition("main.py ")[2]))
        assert options.train and options.base == ["configs/video-sd.yaml"]
    plans = [line for line in lines if line.startswith("python scripts/plan.py")]
    assert [plan.parse_arguments(shlex.split(line)[2:]).processes for line in plans] == [[8, 64, 512], [8]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "8,x"], "--processes: expected numbers from 1, as 8,64,512, on GPUs, found '8,x'"),
        (["--processes", "0"], "--processes: expected numbers from 1"),
        (["--processes", "8", "--on", "processor"], "--processes: expected numbers from 1, as 8,64,512, on GPUs"),
        (["--processes", "8", "--link", "0"], "--link: expected GB a second above 0, found 0"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        plan.parse_arguments(["--base", "x.yaml", *arguments])


def test_figures_of_processes_without_them_get_a_note(capsys):
    plan.parse_arguments(["--base", "x.yaml", "--card", "A100", "--disk", "3"])
    expected = [f"note: --{name} has no effect without --processes" for name in ("gpu", "disk")]
    assert capsys.readouterr().out.splitlines() == expected
    plan.parse_arguments(["--base", "x.yaml", "--processes", "8", "--gpu", "A100", "--link", "3"])
    assert capsys.readouterr().out == ""
