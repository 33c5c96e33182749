"""Taking up a run: from the newest whole checkpoint, as the same run, and what is said where it is another."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess

import pytest
import torch
import yaml

import main as command
from ldm.config import CALLBACKS
from ldm.errors import UserError
from ldm.runs import identity as run_identity
from ldm.runs.arguments import parse_arguments
from ldm.runs.folder import plan_run
from ldm.runs.identity import config_changes, data_identity, git_revision, model_identity, model_source
from tests.toy_command import last, run
from tests.toy_run import make_prepared


def test_folders_that_cannot_be_resumed(toy, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"expected .*last.ckpt of a run, or its configs, found neither"):
        plan_run(parse_arguments(["-r", str(tmp_path / "run"), "-t"]))
    torch.save({}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"expected the run's configs in .*configs, found none"):
        plan_run(parse_arguments(["-r", str(tmp_path / "run"), "-t"]))
    (tmp_path / "stray.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="expected a file in the checkpoints folder of a run"):
        plan_run(parse_arguments(["-r", str(tmp_path / "stray.ckpt"), "-t"]))


def test_flags_that_change_nothing_in_a_resumed_run_get_a_note(toy, caplog):
    folder = run(toy, "-b", str(toy), "-t", "-s", "7")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ldm"):
        plan_run(parse_arguments(["-r", str(folder), "-t", "-s", "7"]))
        assert caplog.messages == []
        plan_run(parse_arguments(["-r", str(folder), "-l", "there", "-f", "x", "-s", "8", "--scale_lr"]))
    flags = [message.split()[1] for message in caplog.messages if "has no effect with -r" in message]
    assert flags == ["-l/--logdir", "-f/--postfix", "-s/--seed", "--scale_lr"]


def test_corrupt_checkpoint_is_skipped_for_the_previous_one(toy, caplog):
    folder = run(toy, "-b", str(toy), "-t", "lightning.callbacks.last_checkpoint.params.every_n_steps=1")
    path = folder / "checkpoints" / "last.ckpt"
    wanted = {**last(folder)["state_dict"]}
    path.write_bytes(path.read_bytes()[:1500])
    caplog.clear()
    command.main(["-r", str(folder), "-t"])
    assert caplog.messages[0].startswith(f"{path} is corrupt or half written: ")
    assert caplog.messages[1] == f"{folder / 'checkpoints' / 'last-1.ckpt'} is used: it is the newest whole checkpoint"
    assert last(folder)["global_step"] == 4
    assert all(torch.equal(weight, wanted[name]) for name, weight in last(folder)["state_dict"].items())
    for torn in (folder / "checkpoints").iterdir():
        torn.write_bytes(torn.read_bytes()[:1500])
    with pytest.raises(UserError, match=r"expected a whole checkpoint in .*found none \(last.ckpt: .*; last-1.ckpt: "):
        command.main(["-r", str(folder), "-t"])
    with pytest.raises(UserError, match=r"last.ckpt: expected a checkpoint written by main.py.*half copied"):
        command.main(["-r", str(path), "-t"])


def test_run_killed_before_it_saved_starts_over_with_its_seed(toy, caplog):
    folder = run(toy, "-b", str(toy), "-t", "-s", "7", "--scale_lr")
    path = folder / "checkpoints" / "last.ckpt"
    wanted = last(folder)
    path.unlink()
    caplog.clear()
    command.main(["-r", str(folder), "-t"])
    assert caplog.messages[0].endswith("has no checkpoint: the run ended before it saved, and starts over")
    found = last(folder)
    assert torch.equal(found["state_dict"]["head.weight"], wanted["state_dict"]["head.weight"])
    assert found["between_steps"]["generators"][0]["torch"].equal(wanted["between_steps"]["generators"][0]["torch"])
    assert [session["seed"] for session in json.loads((folder / "run.json").read_text())["sessions"]] == [7, 7]


# ---- the same run


def record(folder):
    return json.loads((folder / "run.json").read_text())


def test_run_folder_records_identity_and_sessions(toy):
    folder = run(toy, "-b", str(toy), "-t")
    found = record(folder)
    assert found["config"]["data"]["params"]["frames"] == 3 and found["model"] == {}
    assert found["data"]["root"]["num_scenes"] == 4 and found["data"]["root"]["index_crc32"] > 0
    (session,) = found["sessions"]
    assert session["from"] is None and session["versions"]["torch"] == torch.__version__
    assert set(session) == {"began", "from", "changed", "seed", "scale_lr", "versions", "git", "machine"}
    command.main(["-r", str(folder), "-t", "--max_steps", "5", "data.params.num_workers=1"])
    assert [each["from"] for each in record(folder)["sessions"]] == [None, str(folder / "checkpoints" / "last.ckpt")]
    assert record(folder)["sessions"][1]["changed"] == [], "how long and by how many processes makes no other run"


@pytest.mark.slow
def test_changed_config_is_an_error_unless_allowed(toy, caplog):
    folder = run(toy, "-b", str(toy), "-t")
    words = ["-r", str(folder), "-t", "--max_steps", "5", "data.params.frames=4", "model.params.momentum=0.5"]
    message = (
        r"-r .*_toy: expected the config that the run has been trained with, found another: "
        r"data.params.frames was 3, now 4; model.params.momentum was absent, now 0.5. .* --allow config"
    )
    with pytest.raises(UserError, match=message):
        command.main(words)
    assert len(list((folder / "configs").iterdir())) == 2 and len(record(folder)["sessions"]) == 1, "nothing is written"
    command.main([*words, "--allow", "config"])
    assert last(folder)["global_step"] == 5
    assert "config changed: data.params.frames was 3, now 4" in caplog.messages
    assert record(folder)["sessions"][1]["changed"][0] == "data.params.frames was 3, now 4"
    command.main(["-r", str(folder), "-t", "--max_steps", "6"])  # it is the run's own now


@pytest.mark.slow
def test_changed_data_is_an_error_unless_allowed(toy):
    folder = run(toy, "-b", str(toy), "-t")
    shutil.move(toy.parent / "set", toy.parent / "moved")
    command.main(["-r", str(folder), "-t", "--max_steps", "5", f"data.params.root={toy.parent / 'moved'}"])
    shutil.rmtree(toy.parent / "moved")
    make_prepared(toy.parent / "moved", lengths=(12, 9, 30, 8, 11))
    message = (
        r"expected the data that the run has been trained with, found another: root.num_scenes was 4, now 5; "
        r"root.num_frames was 58, now 70; root.index_crc32 was \d+, now \d+. .* --allow data"
    )
    with pytest.raises(UserError, match=message):
        command.main(["-r", str(folder), "-t", "--max_steps", "6"])
    with pytest.raises(UserError, match=message):
        command.main(["-r", str(folder), "-t", "--max_steps", "6", "--allow", "config,model"])
    command.main(["-r", str(folder), "-t", "--max_steps", "6", "--allow", "config,data"])
    assert last(folder)["global_step"] == 6


def test_changed_base_model_is_an_error_and_a_missing_one_is_not_needed(tmp_path):
    path, checkpoint = tmp_path / "sd.ckpt", tmp_path / "last.ckpt"
    path.write_bytes(b"weights")
    model = {"params": {"ckpt_path": str(path), "first_stage_config": {"params": {"ckpt_path": None}}}}
    before = model_identity(model)
    assert list(before) == ["model.params.ckpt_path"] and before["model.params.ckpt_path"]["bytes"] == 7
    assert model_identity(model, before) == before
    record, now = ({"data": {}, "model": each, "sessions": []} for each in (before, model_identity(model)))
    assert run_identity.check_record(tmp_path, record, now, ()) == []
    path.write_bytes(b"others!")
    now = {"data": {}, "model": model_identity(model, before)}
    message = r"expected the base model .*: model.params.ckpt_path was [0-9a-f]{60}, now [0-9a-f]{60}. .*--allow model"
    with pytest.raises(UserError, match=message):
        run_identity.check_record(tmp_path, record, now, ("config", "data"))
    assert len(run_identity.check_record(tmp_path, record, now, ("model",))) == 1
    assert model_source(model, model, checkpoint) == model
    path.unlink()
    assert model_identity(model, before) == before, "the run has what it began with"
    found = model_source(model, model, checkpoint)
    assert found["params"]["ckpt_path"] == str(checkpoint) and model["params"]["ckpt_path"] == str(path)
    other = {"params": {"ckpt_path": "other.ckpt"}}
    assert model_source(model, other, checkpoint) == model == model_source(model, model, None)


def test_config_changes_that_affect_the_weights():
    before = yaml.safe_load("""
        model: {target: M, params: {ckpt_path: a.ckpt, width: 3}}
        data: {target: D, params: {root: here, num_workers: 2, batch_size: 2}}
        lightning: {trainer: {max_steps: 5, precision: bf16-mixed}, callbacks: {average: {params: {decay: 0.9}}}}
    """)
    now = yaml.safe_load("""
        model: {target: M, params: {ckpt_path: b.ckpt, width: 4}}
        data: {target: D, params: {root: there, num_workers: 0, batch_size: 1}}
        lightning: {trainer: {max_steps: 9, devices: 2}, callbacks: {average: null, samples: {params: {steps: 9}}}}
    """)
    assert config_changes(before, before) == []
    assert config_changes(before, now) == [
        "model.params.width was 3, now 4", "data.params.batch_size was 2, now 1",
        "lightning.trainer.precision was bf16-mixed, now absent",
        "lightning.callbacks.average.params.decay was 0.9, now absent",
        "lightning.callbacks.average.target was ldm.callbacks.average.WeightAverage, now absent",
    ]  # fmt: skip


LOGGING = {  # name in the config -> node; the first are defaults
    "last_checkpoint": {}, "memory": {}, "plan": {}, "learning_rates": {}, "unreadable_clips": {}, "data_wait": {},
    "progress": {}, "samples": {"params": {"steps": 9}}, "motion": {"target": "ldm.callbacks.MotionLogger"},
    "compute": {"target": "ldm.callbacks.ComputeCount"},
    "pictures": {"target": "ldm.models.autoencoder.ReconstructionLogger"},
}  # fmt: skip
TRAINING = {
    "skip_bad_steps": {"params": {"factor": 9}}, "average": {"params": {"decay": 0.5}},
    "compiled": {"target": "ldm.callbacks.CompileNetwork"}, "unknown": {"target": "nowhere.Callback"},
}  # fmt: skip


@pytest.mark.parametrize("name", [*LOGGING, *TRAINING])
def test_logging_callback_may_change_on_resume_and_a_training_one_may_not(name):
    node = (LOGGING | TRAINING)[name]
    changed = {**node, "params": {"any": 1}}
    configs = [
        {"lightning": {"callbacks": callbacks}} for callbacks in ({}, {name: node}, {name: changed}, {name: None})
    ]
    found = [bool(config_changes(one, other)) for one in configs for other in configs if one is not other]
    assert (not any(found)) if name in LOGGING else any(found)
    if name in TRAINING:
        assert config_changes(configs[1], configs[2]) and config_changes(configs[1], configs[3])


def test_every_default_callback_says_whether_it_changes_the_training():
    assert set(CALLBACKS) <= set(LOGGING | TRAINING)


def test_full_and_old_names_of_a_callback_are_equal():
    nodes = [{}] + [{"target": f"ldm.callbacks.{name}"} for name in ("SkipBadSteps", "bad_steps.SkipBadSteps")]
    nodes.append({"target": "ldm.callbacks.guard.SkipBadSteps"})
    configs = [{"lightning": {"callbacks": {"skip_bad_steps": node}}} for node in nodes]
    assert not any(config_changes(configs[0], other) for other in configs)


def test_footage_is_identified_by_names_sizes_and_ends(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    params = {"videos": str(tmp_path), "size": 64, "seed": 23}
    before = data_identity(None, params)
    assert before["videos"]["files"] == 2 and before["videos"]["bytes"] == 10_000
    assert data_identity(None, params) == before
    (tmp_path / "b.mp4").write_bytes(b"b.mp5" * 1000)
    assert data_identity(None, params) != before
    assert data_identity(None, {"videos": [str(tmp_path / "a.mp4")]})["videos"]["files"] == 1
    assert data_identity(None, {"seed": 3, "looks": ["desert"]}) == {}


def test_the_git_revision_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run_identity, "ROOT", tmp_path)
    assert git_revision() is None
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    found = git_revision()
    assert len(found["revision"]) == 40 and found["changed"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-r", "x", "--allow", "data,modell"], r"--allow: expected some of config, data, model, found 'modell'"),
        (["-b", "x", "--allow", "data"], r"--allow: expected with -r/--resume, found without it"),
    ],
)
def test_wrong_allow_is_an_error(words, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(words)


def test_invalid_record_is_an_error(toy):
    folder = run(toy, "-b", str(toy), "-t")
    (folder / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run.json: expected the record that main.py wrote, found something else"):
        command.main(["-r", str(folder), "-t"])
