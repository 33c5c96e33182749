"""Which switches are proposed where a step does not fit, and the output."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from ldm.callbacks.reports import advice
from ldm.config import load_config, to_container
from ldm.errors import UserError
from ldm.planning import count as training_step
from ldm.planning.count import GIB, StepCount
from ldm.planning.live_tensors import Peak
from ldm.planning.proposals import SWITCHES, check_switches, needed, propose, with_switches
from scripts import plan
from tests.planning.test_plan import ROOT, SHAPE, config


def counted(config: dict) -> StepCount:
    """10 GiB less an invented saving for each switch."""
    params = config["model"]["params"]
    unet, memory = params["unet_config"]["params"], params.get("memory") or {}
    saved = {
        0.5: memory.get("frozen") == "bfloat16", 2.0: unet.get("use_checkpoint"), 1.0: unet.get("feed_forward_frames"),
        0.25: unet.get("inputs_on_host"), 1.5: memory.get("weights") in ("split", "bfloat16"),
        0.75: memory.get("step_in_backward"), 1.25: params["optimizer"]["name"] != "adamw",
        0.1: params["optimizer"].get("states_on") == "host",
    }  # fmt: skip
    peak = Peak(int((10 - sum(gib for gib, is_on in saved.items() if is_on)) * GIB), {}, "backward", "")
    sizes = dict.fromkeys((training_step.TRAINED, training_step.STATES, training_step.AVERAGE), 0)
    return StepCount(SHAPE, sizes, 0, {"backward": peak}, 0, 1, 0, 1, 1)


def keys(switches: list) -> set[str]:
    return {key.rpartition(".")[2] for switch in switches for key, _ in switch.overrides}


def test_the_gentlest_switches_are_proposed():
    settings = config("bf16-mixed")
    free = {"name", "frozen"}
    assert keys(propose(settings, 9.5, counted).switches) == free
    assert keys(propose(settings, 7.5, counted).switches) == free | {"use_checkpoint"}
    found = propose(settings, 6.3, counted)
    assert keys(found.switches) == free | {"use_checkpoint", "feed_forward_frames"}
    assert needed(found.count) <= 6.3 < needed(counted(with_switches(settings, found.switches[:-1])))
    # Less work where that is enough: the feed-forward in parts turns out not to be needed beside split weights.
    assert keys(propose(settings, 5.8, counted).switches) == free | {"use_checkpoint", "weights"}


def test_switches_that_a_config_has_or_excludes_are_not_proposed():
    settings = config("32-true")
    assert not {"frozen", "weights"} & keys(propose(settings, 6.3, counted).switches)
    settings = config("bf16-mixed", {"weights": "bfloat16"}, use_checkpoint=True)
    settings["model"]["params"]["optimizer"]["name"] = "adamw4bit"
    assert not {"weights", "use_checkpoint", "name"} & keys(propose(settings, 5.3, counted).switches)
    settings = config("bf16-mixed")
    settings["lightning"]["trainer"]["accumulate_grad_batches"] = 2
    with pytest.raises(UserError, match=r"--vram 4: nothing fits: with every switch a step of 2 x 4 frames"):
        propose(settings, 4, counted)


def test_all_switches_together_are_a_valid_config():
    settings = to_container(load_config([ROOT / "configs/video-sd.yaml"]))
    check_switches(with_switches(settings, SWITCHES))


def test_two_gigabytes_are_too_few():
    with pytest.raises(
        UserError, match=r"--vram 2: nothing fits.* still needs 3\.6 GiB, .* the smallest GPU that fits has 4 GB"
    ):
        propose(config("bf16-mixed"), 2, counted)


def test_out_of_memory_proposes_switches(monkeypatch):
    monkeypatch.setattr("ldm.callbacks.reports.count_step", lambda changed, shape: counted(changed))
    text = "\n".join(advice(config("bf16-mixed"), SHAPE, 7.5))
    assert "model.params.unet_config.params.use_checkpoint=true" in text
    assert "nothing fits" in advice(config("bf16-mixed"), SHAPE, 2)[0]


@pytest.fixture
def small(tmp_path) -> Path:
    settings = config("bf16-mixed")
    settings["data"]["params"]["root"] = str(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_script_counts(small, capsys):
    plan.main(["--base", str(small), "--size", "64", "--vram", "8"])
    text = capsys.readouterr().out
    assert (
        "2 x 4 frames of 8x8 latents, on a GPU\nlatents of 64x64 pixels\n" in text and "fits into 8 GB as it is" in text
    )


def test_proposed_overrides_and_yaml_can_be_pasted(small, capsys, monkeypatch):
    monkeypatch.setattr(plan, "count_step", lambda changed, shape, machine: counted(changed))
    plan.main(["--base", str(small), "--vram", "6.3"])
    text = capsys.readouterr().out
    assert "does not fit into 6.3 GB: 11.0 are needed" in text and "fits, with 6.2 GB needed" in text
    command = next(line for line in text.splitlines() if line.startswith("python main.py"))
    assert command.endswith("model.params.unet_config.params.feed_forward_frames=1")
    merged = small.with_name("fit.yaml")
    merged.write_text(text.partition("or as a file to merge onto the config:\n\n")[2].partition("\nthen (")[0])
    plan.main(["--base", str(small), str(merged), "--vram", "6.3"])
    assert "fits into 6.3 GB as it is" in capsys.readouterr().out
    plan.main(["--base", str(small), "--vram", "6.3", *shlex.split(command)[7:]])
    assert "fits into 6.3 GB as it is" in capsys.readouterr().out
    with pytest.raises(UserError, match="--vram 2: nothing fits"):
        plan.main(["--base", str(small), "--vram", "2"])
