"""Training in many processes, here on the processor: the same losses, each clip once, whatever their number."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from ldm.data.stream import HeldOutSampler
from ldm.errors import UserError
from ldm.optim.stored_weights import MemorySwitches
from ldm.runs import launch as distributed_launch
from ldm.runs.distributed import Parts, Replicas, strategy_options
from ldm.runs.launch import agree_on, as_launched
from tests.conftest import relative_error
from tests.process_runs import SET, Command, Job, Team, free_port, last
from tests.toy_run import ToyModel, make_prepared, toy_config

FSDP = {"strategy": "fsdp"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(make_prepared(tmp_path_factory.mktemp("prepared") / "set", (12, 9, 30, 7, 14), **SET))


@pytest.fixture(scope="module")
def teams():
    """Teams of 1, 2 and 3 processes, started when they are first asked for."""
    started = {}

    def team(size):
        if size not in started or started[size].is_stopped:
            started[size] = Team(size)
        return started[size]

    yield team
    for one in started.values():
        one.stop()


@pytest.fixture(scope="module")
def straight(root, teams, tmp_path_factory):
    """Twenty steps of one process with batches of two."""
    folder = tmp_path_factory.mktemp("straight")
    return teams(1).run(Job(root, str(folder), steps=20, batch_size=2))[0], last(folder)


def positions(results):
    return sorted(position for result in results for position in result.positions)


def differences(one, other):
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


def joined(tensors):
    return torch.cat([tensor.flatten().float() for tensor in tensors.values()])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_two_processes_equal_one_with_twice_the_batch(root, teams, tmp_path, straight, strategy):
    alone, checkpoint = straight
    both = teams(2).run(Job(root, str(tmp_path), steps=20, trainer={"strategy": strategy}))
    for result in both:
        assert max(differences(alone.losses, result.losses)) < 1e-6
        assert alone.held_out.keys() == result.held_out.keys()
        worst = max(abs(value - result.held_out[name]) / value for name, value in alone.held_out.items())
        assert worst < 1e-5
    assert max(differences(alone.losses, alone.losses[1:] + alone.losses[:1])) > 0.01, "they do differ by the step"
    assert positions(both) == list(range(40)) and not set(both[0].positions) & set(both[1].positions)
    found = last(tmp_path)
    assert found.keys() == checkpoint.keys() and found["TameClips"] == checkpoint["TameClips"] == {"consumed": 40}
    assert found["state_dict"].keys() == checkpoint["state_dict"].keys()
    # All together: of what a norm takes out again the gradient is but rounding, of which Adam makes whole steps.
    assert relative_error(*(joined(tree["state_dict"]) for tree in (found, checkpoint))) < 1e-3
    one, other = (state["optimizer_states"][0] for state in (checkpoint, found))
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for name in ("exp_avg", "exp_avg_sq"):
        moments = ({place: state[name] for place, state in tree["state"].items()} for tree in (other, one))
        assert relative_error(*map(joined, moments)) < 1e-4


@pytest.mark.slow
def test_fsdp_halves_memory_and_clips_the_global_norm(root, teams, tmp_path):
    """Weights, optimiser states and averages take half as much in each of two processes; a norm bounds gradients of
    them all together; and sample videos, which the first one writes, take them all."""
    whole_job = Job(root, str(tmp_path / "whole"), steps=3, trainer={"gradient_clip_val": 0.01}, videos=True)
    parts_job = replace(whole_job, folder=str(tmp_path / "parts"), trainer=FSDP | whole_job.trainer)
    (whole, _), parts = teams(2).run(whole_job), teams(2).run(parts_job)
    found = [sorted((tmp_path / kind / "images" / "samples").glob("*.gif")) for kind in ("whole", "parts")]
    assert [path.name[:12] for path in found[0]] == ["00_gs-000000", "00_gs-000002"]
    assert [path.read_bytes() for path in found[0]] == [path.read_bytes() for path in found[1]]
    for result in parts:
        assert max(differences(whole.losses, result.losses)) < 1e-5
        shares = [own / all_of_it for own, all_of_it in zip(result.kept, whole.kept, strict=True)]
        assert all(abs(share - 0.5) < 0.02 for share in shares), shares
    moments = [last(tmp_path / kind)["optimizer_states"][0]["state"] for kind in ("whole", "parts")]
    norms = [joined({place: state["exp_avg"] for place, state in states.items()}).norm().item() for states in moments]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] <= 0.01 * (1 - 0.9**3) * 1.001


@pytest.mark.slow
def test_fsdp_with_uneven_shards(root, teams, tmp_path):
    """Of 32 rows three processes have 11, 11 and 10, of one row only the first has any; a checkpoint has them all."""
    teams(3).run(Job(root, str(tmp_path / "three"), steps=1, trainer=FSDP, average=False))
    teams(1).run(Job(root, str(tmp_path / "one"), steps=1, batch_size=3, average=False))
    found, wanted = (last(tmp_path / name) for name in ("three", "one"))
    for name, weight in wanted["state_dict"].items():
        assert found["state_dict"][name].shape == weight.shape
        assert found["state_dict"][name].untyped_storage().nbytes() == weight.nbytes, "nothing that was filled up"
    states = [tree["optimizer_states"][0]["state"] for tree in (found, wanted)]
    moments = [joined({place: state["exp_avg"] for place, state in tree.items()}) for tree in states]
    assert relative_error(*moments) < 1e-4


KNOWN = {"known_frames": {"mixture": {"nothing": 1, "first": 1, "every": 1}, "max_noise": 200}}
INPUTS = {"in_channels": 9, "known_level_embedding": True, "fps_embedding": True}
SMALLER = {"use_checkpoint": True, "feed_forward_frames": 1, "inputs_on_host": True}
SAVING = {"memory": {"weights": "split", "frozen": "bfloat16"}, "optimizer": {"name": "adamw8bit", "states_on": "host"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "unet", "trainer", "bound"),
    [
        (KNOWN, INPUTS | {"use_checkpoint": True}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, 1e-6),
        (KNOWN | SAVING, INPUTS | SMALLER, {"precision": "bf16-mixed"}, 5e-3),
        (KNOWN | {"memory": {"weights": "bfloat16"}}, INPUTS, {"precision": "bf16-mixed"}, 5e-3),
        (KNOWN, INPUTS | SMALLER, FSDP | {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, 1e-6),
        (KNOWN | {"memory": {"frozen": "bfloat16"}}, INPUTS | SMALLER, FSDP | {"precision": "bf16-mixed"}, 5e-3),
    ],
    ids=["accumulation", "split", "bfloat16", "parts", "parts in bfloat16"],
)
def test_two_processes_with_memory_options(root, teams, tmp_path, model, unet, trainer, bound):
    job = Job(root, str(tmp_path / "two"), steps=4, model=model, unet=unet, trainer=trainer)
    both = teams(2).run(job)
    alone = teams(1).run(replace(job, folder=str(tmp_path / "one"), batch_size=2))[0]
    assert len(alone.losses) == 4 and both[0].losses == both[1].losses
    assert max(differences(alone.losses, both[0].losses)) < bound


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_clip_once_per_epoch(root, teams, tmp_path, size):
    job = Job(root, str(tmp_path), steps=40 // size, model=None, average=False)
    seen = positions(teams(size).run(job))
    assert seen == list(range(40 // size * size)), "none twice, none left out"


@pytest.mark.slow
def test_resume_with_two_one_and_two_processes(root, teams, tmp_path, straight):
    """The same global batch; first with weights in parts, then whole on one, then whole on two."""
    path, losses, seen = str(tmp_path / "checkpoints" / "last.ckpt"), [], []
    for size, steps, strategy in ((2, 4, "fsdp"), (1, 9, "auto"), (2, 12, "ddp"), (2, 14, "fsdp")):
        trainer = {"strategy": strategy}
        resume = path if seen else None
        results = teams(size).run(
            Job(root, str(tmp_path), steps=steps, batch_size=2 // size, resume=resume, trainer=trainer)
        )
        losses += results[0].losses
        seen += positions(results)
    assert seen == list(range(28))
    assert max(differences(losses, straight[0].losses[:14])) < 1e-6


@pytest.mark.slow
def test_resume_with_another_number_of_batches_per_epoch(root, teams, tmp_path):
    """A batch per process of one clip: epochs have twice as many batches with one process, and end half-way."""
    path, seen = str(tmp_path / "checkpoints" / "last.ckpt"), []
    for size, steps in ((2, 3), (1, 15), (2, 21), (1, 26)):
        job = Job(root, str(tmp_path), steps=steps, resume=path if seen else None, model=None, average=False)
        seen += positions(teams(size).run(job))
    assert seen == list(range(3 * 2 + 12 + 6 * 2 + 5))


@pytest.mark.slow
def test_validation_with_uneven_batches(root, teams, tmp_path):
    trainer = {"val_check_interval": 1}
    job = Job(root, str(tmp_path / "three"), steps=1, trainer=trainer)
    three = teams(3).run(job)
    one = teams(1).run(replace(job, folder=str(tmp_path / "one"), batch_size=3))[0]
    for result in three:
        assert result.held_out == pytest.approx(one.held_out, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_each_held_out_clip_has_one_process(size, batch_size):
    for length in range(1, 12):
        samplers = [HeldOutSampler(range(length), batch_size, size, rank) for rank in range(size)]
        indices = [index for sampler in samplers for index in sampler]
        assert sorted(index for index in indices if index >= 0) == list(range(length))
        assert len({-(-len(sampler) // batch_size) for sampler in samplers}) == 1, "as many batches each"


# ---- the command, as torchrun and srun start it


def on_two_machines(starter):
    """The environment of the processes, one on each of two machines, which here are one."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if starter == "torchrun":
        same = {"TORCHELASTIC_RUN_ID": "here", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        return [same | meeting | {"RANK": str(rank), "GROUP_RANK": str(rank)} for rank in (0, 1)]
    if starter == "by hand":
        return [meeting | {"NODE_RANK": str(rank)} for rank in (0, 1)]
    same = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    same |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train"}
    return [same | meeting | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["torchrun", "srun", "by hand"])
def test_started_on_two_machines(tmp_path, teams, starter):
    arguments = ["-b", str(toy_config(tmp_path)), "-t", "-l", str(tmp_path / "logs"), "--max_steps", "3"]
    arguments += ["data.params.batch_size=1"]
    arguments += ["--num_nodes", "2"] if starter == "by hand" else []
    levels = teams(2).run(Command(arguments, on_two_machines(starter)))
    assert levels == [logging.INFO, logging.WARNING], "one of them talks"
    (folder,) = (tmp_path / "logs").iterdir()
    assert last(folder)["ClipDataModule"] == {"consumed": 6} and len(list(folder.rglob("*tfevents*"))) == 1
    assert len(list((folder / "configs").glob("*-project.yaml"))) == 1


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"devices": 4}, "trainer.devices: expected 1, because srun started 2 processes, 1 on each .*, found 4"),
        ({}, {"num_nodes": 1}, "trainer.num_nodes: expected 2, because srun started 2 processes"),
        ({"SLURM_STEP_ID": None}, {}, "expected 2 processes of this command, started by srun, found one"),
        ({"SLURM_NTASKS_PER_NODE": None}, {}, "SLURM: expected --ntasks-per-node with --nodes, found --ntasks 2 alone"),
    ],
)
def test_arguments_that_contradict_the_launch_are_errors(monkeypatch, changes, arguments, message):
    for name, value in (on_two_machines("srun")[0] | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        as_launched(arguments, arguments.get("devices", 1))


def test_launch_sets_devices_and_nodes(monkeypatch):
    assert as_launched({"accelerator": "cpu"}, 1) == {"accelerator": "cpu", "devices": 1}
    for name, value in on_two_machines("torchrun")[1].items():
        monkeypatch.setenv(name, value)
    assert as_launched({}, 1) == {"devices": 1, "num_nodes": 2}


def test_missing_master_address_is_an_error(monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(UserError, match=r"--num_nodes 2: expected NODE_RANK, MASTER_ADDR .*, found no MASTER_ADDR"):
        agree_on("now", 2)


def test_unreachable_machine_is_an_error(monkeypatch):
    monkeypatch.setattr(distributed_launch, "PATIENCE", timedelta(seconds=0.5))
    for name, value in (on_two_machines("torchrun")[0]).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_ADDR, MASTER_PORT: expected 2 processes to connect at 127.0.0.1:\d+"):
        agree_on("now")


# ---- what is chosen, and what is refused


def stand_in(memory=None, **optimizer):
    return SimpleNamespace(memory=MemorySwitches.of_config(memory), optimizer_options=optimizer, has_static_graph=True)


@pytest.mark.parametrize(
    ("words", "image_share", "static", "unused"),
    [
        ({}, 0, True, False),
        ({"strategy": "ddp"}, 0, True, False),
        ({"accumulate_grad_batches": 2}, 0, False, False),
        ({}, 0.2, False, True),
        ({"strategy": "ddp_find_unused_parameters_true"}, 0, False, True),
    ],
)
def test_ddp_options(words, image_share, static, unused):
    data = SimpleNamespace(image_share=image_share, frames=5)
    chosen = strategy_options(words, 2, stand_in(), data)["strategy"]
    assert isinstance(chosen, Replicas) and chosen._ddp_kwargs == {
        "static_graph": static, "find_unused_parameters": unused, "gradient_as_bucket_view": True,
    }  # fmt: skip
    assert strategy_options(words, 1, stand_in(), data) == {"strategy": "auto"}


def test_fsdp_options():
    words = strategy_options(FSDP | {"precision": "bf16-mixed"}, 8, stand_in(), SimpleNamespace(image_share=0))
    assert isinstance(words.pop("strategy"), Parts) and words == {"inference_mode": False}


@pytest.mark.parametrize(
    ("words", "model", "image_share", "message"),
    [
        ({"strategy": "deepspeed"}, stand_in(), 0, "strategy: expected one of auto, ddp, .*, fsdp, found 'deepspeed'"),
        (FSDP, ToyModel(0.1), 0, "fsdp: ToyModel cannot be sharded; use ddp"),
        (FSDP | {"precision": "16-mixed"}, stand_in(), 0, "precision bf16-mixed or 32-true, found 16-mixed"),
        (FSDP, stand_in(), 0.2, "fsdp needs data.params.image_share: 0, found 0.2"),
        (FSDP, stand_in({"weights": "split"}), 0, "fsdp needs model.params.memory.weights: float32, found split"),
        (FSDP, stand_in({"step_in_backward": True}), 0, "memory.step_in_backward: false, found true"),
        (FSDP, stand_in(name="adamw8bit"), 0, "fsdp needs model.params.optimizer.name: adamw, found adamw8bit"),
        (FSDP, stand_in(states_on="host"), 0, "fsdp needs model.params.optimizer.states_on: gpu, found host"),
    ],
)
def test_unsupported_strategy_is_an_error(words, model, image_share, message):
    with pytest.raises(UserError, match=message):
        strategy_options(words, 2, model, SimpleNamespace(image_share=image_share))


def test_step_in_backward_needs_one_device():
    with pytest.raises(UserError, match="step_in_backward: expected one device, found 2"):
        MemorySwitches(step_in_backward=True).check_run("32-true", 1, None, 2)
