"""The training command: flags, run folders, resuming, Ctrl-C, devices, and the messages for wrong input."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as command
from ldm.config import ConfigError
from ldm.data.shards import DatasetError
from ldm.errors import UserError
from ldm.runs.arguments import parse_arguments
from ldm.runs.folder import plan_run
from tests.toy_command import last, run
from tests.toy_run import ToyModel

ROOT = Path(__file__).parents[2]


def test_a_run_and_its_folder(toy, caplog):
    with caplog.at_level(logging.INFO, logger="ldm"):
        folder = run(toy, "-b", str(toy), "-t", "-f", "_post")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_toy_post", folder.name)
    now = folder.name.removesuffix("_toy_post")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    events = {name for name in names if "tfevents" in name}
    assert {name.split("/")[0] for name in events} == {"tensorboard"}
    assert names - events - {"tensorboard/hparams.yaml"} == {
        "checkpoints/last.ckpt", f"configs/{now}-project.yaml", f"configs/{now}-lightning.yaml", "run.json",
    }  # fmt: skip
    project = yaml.safe_load((folder / "configs" / f"{now}-project.yaml").read_text())
    assert set(project) == {"model", "data"} and project["data"]["params"]["frames"] == 3
    assert caplog.messages[0] == "trained: 5 parameters in 2 tensors; frozen: 20 parameters in 2 tensors"
    assert caplog.messages[1].startswith(f"{toy.parent / 'set'}: 3 scenes to train on")
    checkpoint = last(folder)
    assert checkpoint["global_step"] == 4 and checkpoint["ClipDataModule"] == {"consumed": 8}
    assert checkpoint["config"]["lightning"]["callbacks"]["average"] == {"params": {"decay": 0.9}}
    assert "model_ema.headweight" in checkpoint["state_dict"]
    scalars = EventAccumulator(str(folder / "tensorboard")).Reload().Tags()["scalars"]
    assert {"memory/peak", "val/loss"} <= set(scalars)


def test_the_command_line_beats_the_config_and_is_kept(toy):
    folder = run(toy, "-b", str(toy), "-t", "-n", "mine", "--max_steps", "6", "data.params.batch_size=3", "-s", "7")
    assert folder.name.endswith("_mine") and last(folder)["global_step"] == 6
    assert last(folder)["ClipDataModule"] == {"consumed": 18}
    assert last(folder)["config"]["lightning"]["trainer"]["max_steps"] == 6


@pytest.mark.slow
def test_resuming_in_place_equals_the_straight_run(toy):
    straight = run(toy, "-b", str(toy), "-t", "-n", "a", "--max_steps", "8")
    stopped = run(toy, "-b", str(toy), "-t", "-n", "b", "--max_steps", "3")
    command.main(["-r", str(stopped), "-t", "--max_steps", "5"])
    command.main(["-r", str(stopped / "checkpoints" / "last.ckpt"), "-t", "lightning.trainer.max_steps=8"])
    assert len(list((toy.parent / "logs").iterdir())) == 2, "no folder of its own"
    one, other = last(straight), last(stopped)
    assert other["global_step"] == 8 and one["ClipDataModule"] == other["ClipDataModule"]
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    buffers = [run["optimizer_states"][0]["state"][0]["momentum_buffer"] for run in (one, other)]
    assert torch.equal(*buffers)
    assert one["lr_schedulers"] == other["lr_schedulers"]


def test_without_t_everything_is_checked_and_nothing_written(toy, caplog):
    with caplog.at_level(logging.INFO, logger="ldm"):
        assert run(toy, "-b", str(toy)) is None
    assert caplog.messages[0] == "-t is left out: config, data and model are checked, and nothing is trained"
    assert caplog.messages[-1] == "config, data and model are in order; add -t to train"


def test_options_of_validation_checkpoints_and_default_callbacks(toy, caplog, recwarn):
    params = "{every_n_train_steps: 2, save_top_k: -1, filename: '{epoch:06}-{step:09}'}"
    options = [
        f"lightning.modelcheckpoint.params={params}",
        "lightning.callbacks.memory=null",
        "data.params.val_share=0",
    ]
    with caplog.at_level(logging.INFO, logger="ldm"):
        folder = run(toy, "-b", str(toy), "-t", "lightning.callbacks.memory=null", *options)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert [name.partition("-")[2] for name in names] == ["step=000000002.ckpt", "step=000000004.ckpt", ""]
    assert not [message for message in caplog.messages if message.startswith("memory")], "a default can be left out"
    assert [message for message in caplog.messages if message.startswith("step 4/4")]
    assert not [warning for warning in recwarn if "across ranks is zero" in str(warning.message)]


def test_learning_rate_is_the_config_s_unless_scaled(toy, caplog):
    assert last(run(toy, "-b", str(toy), "-t"))["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.001
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ldm"):
        folder = run(toy, "-b", str(toy), "-t", "-n", "scaled", "--scale_lr", "--accumulate_grad_batches", "3")
    assert caplog.messages[0].startswith("trained: "), "what is frozen comes first"
    assert caplog.messages[1] == "learning rate 0.006 = 0.001 x 3 accumulated x 1 devices x batch size 2"
    assert last(folder)["optimizer_states"][0]["param_groups"][0]["initial_lr"] == pytest.approx(0.001 * 3 * 2)


# ---- in a process of its own


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "main.py", "--trust-config", *map(str, arguments)], cwd=ROOT, text=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 0), ("SIGTERM", 143)])
def test_signal_saves_and_says_how_to_resume(toy, name, status):
    options = ["-l", toy.parent / "logs", "--max_steps", "1000000", "data.params.num_workers=1"]
    process = start("-b", toy, "-t", *options, start_new_session=True)
    text = ""
    for line in process.stdout:
        text += line
        if line.startswith("step 3/"):
            if name == "SIGTERM":
                os.killpg(process.pid, signal.SIGTERM)  # as a cluster does: DataLoader workers, too
            else:
                process.send_signal(signal.SIGINT)
            break
    text += process.communicate()[0]
    assert process.returncode == status and "Traceback" not in text, text
    assert ("Ctrl-C: finishing this step, then saving" in text) == (name == "SIGINT")
    folder = next((toy.parent / "logs").iterdir())
    by = " by SIGTERM" if name == "SIGTERM" else ""
    said = re.search(rf"stopped{by} after step (\d+); saved .*last.ckpt. Resume with: python main.py -r (\S+) -t", text)
    assert said and last(folder)["global_step"] == int(said[1]) and Path(said[2]) == folder


@pytest.mark.slow
def test_user_error_is_one_line_without_a_traceback(toy):
    process = start("-b", toy, "-t", "--accelerator", "cpu", "data.params.batchsize=2")
    text = process.communicate()[0]
    assert process.returncode == 1
    assert text.splitlines()[-1] == ("error: data.params.batchsize: nothing reads this key; did you mean 'batch_size'?")
    assert "Traceback" not in text


# ---- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_step", "3"], r"--max_step: there is no such flag; did you mean '--max_steps'\?"),
        (["--acceleratr=cpu"], r"--acceleratr=cpu: there is no such flag; did you mean '--accelerator'\?"),
        (["--resum", "x"], r"--resum: there is no such flag; did you mean '--resume'\?"),
        (["-t", "maybe"], r"expected yes or no, found 'maybe'"),
        (["-s", "x"], r"invalid int value: 'x'; --help lists all options$"),
        (["frames=3"], r"frames: nothing reads this key; accepted here: data, lightning, model, prepare"),
        (["--gpus", "one"], r'--gpus: expected GPU numbers with a comma \("0," or "0,1"\) or how many'),
        (["--gpus", ","], r"--gpus: expected GPU numbers"),
        (["--gpus", "0,", "--devices", "2"], r"--gpus and --devices exclude each other"),
        (["-r", "x", "-n", "y"], r"-n/--name and -r/--resume exclude each other"),
        (["-r", "nowhere"], r"-r nowhere: expected a run folder or a checkpoint file, found nothing"),
        (["data.params.frames=0"], r"data.params.frames: expected a whole number of at least 1, found 0"),
        (["data.params.frames=31"], r"no scene is long enough for 31 frames"),
        (["data.params.root=/nowhere"], r"/nowhere: there is no such folder"),
        (["lightning.trainer.precision=bf17"], r"precision: expected one of 32-true, .*, found 'bf17'"),
        (["--precision", "16-true"], r"precision: expected one of 32-true, 16-mixed, bf16-mixed, found '16-true'$"),
        (["--precision", "64"], r"precision: expected one of 32-true, 16-mixed, bf16-mixed, found 64$"),
        (["--scale_lr", "--devices", "all"], r"--devices: expected how many \(2\), .* or auto, found 'all'$"),
        (["lightning.trainer.profiler=fast"], r"lightning.trainer: .*profiler"),
        (["model.base_learning_rate=fast"], r"model.base_learning_rate: expected a number above 0, found 'fast'"),
        (["modell.params.x=1"], r"modell: nothing reads this key; did you mean 'model'"),
        (["data=null"], r"data: the config has no such section, which training needs"),
        (["-t", "yes", "data.params.frames"], r"data.params.frames: there is no such flag; overrides look like"),
    ],
)
def test_wrong_input_is_an_error_before_any_work(toy, arguments, message):
    with pytest.raises(UserError, match=message):
        run(toy, "-b", str(toy), *([] if "-t" in arguments else ["-t"]), *arguments)
    assert not (toy.parent / "logs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val_check_interval", "100"], r"^lightning.trainer: `val_check_interval` \(100\) must be less than"),
        (["--limit_val_batches", "0.01"], r"^lightning.trainer: You requested to check 0.01 of the `val_dataloader`"),
        (["lightning.callbacks.average.params.decay=2"], r"^WeightAverage: expected a decay"),
    ],
)
def test_user_errors_found_in_training(toy, arguments, message):
    with pytest.raises(UserError, match=message):
        run(toy, "-b", str(toy), "-t", *arguments)


def test_program_errors_keep_their_type(toy, monkeypatch):
    def mistake(*_):
        raise TypeError("of ours")

    monkeypatch.setattr(command, "build_callbacks", mistake)
    with pytest.raises(TypeError, match="of ours"):
        run(toy, "-b", str(toy), "-t")
    monkeypatch.undo()
    monkeypatch.setattr(ToyModel, "training_step", lambda *_: int("of ours"))
    with pytest.raises(ValueError, match="invalid literal"):
        run(toy, "-b", str(toy), "-t")


def test_two_runs_never_share_a_folder(toy):
    folder = run(toy, "-b", str(toy), "-t")
    again = plan_run(parse_arguments(["-b", str(toy), "-l", str(folder.parent)]))
    again.folder = folder
    with pytest.raises(UserError, match="another run of this name began in the same second"):
        again.save_config()


def test_required_arguments_and_sections(toy, tmp_path):
    with pytest.raises(UserError, match=r"expected --base CONFIG.yaml to start a run or -r"):
        command.main(["-t"])
    with pytest.raises(ConfigError, match=r"toi.yaml: no such config file; did you mean '.*toy.yaml'\?"):
        command.main(["-b", str(tmp_path / "toi.yaml"), "-t"])
    half = tmp_path / "half.yaml"
    half.write_text(yaml.safe_dump({"model": yaml.safe_load(toy.read_text())["model"]}))
    with pytest.raises(ConfigError, match="data: the config has no such section"):
        command.main(["-b", str(half), "-t"])


def test_error_in_a_worker_keeps_its_message():
    wrapped = DatasetError(
        "Caught DatasetError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
        "ldm.data.shards.DatasetError: 00000.tar: scene a is damaged\n"
    )
    assert str(command.without_traceback(wrapped)) == "00000.tar: scene a is damaged"
    plain = UserError("Caught nothing")
    assert command.without_traceback(plain) is plain
