"""The benchmark with toy networks: output, record, error messages, and its parts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types

import pytest
import torch

from ldm.data.shards import PreparedSet
from ldm.errors import UserError
from scripts.dev.benchmark import main
from scripts.dev.benchmarking import child, kernels, sections
from scripts.dev.benchmarking.child import MARK, answer, ask_child
from scripts.dev.benchmarking.contestants import CONTESTANTS, Case, Inputs, why_missing
from scripts.dev.benchmarking.kernels import trace
from scripts.dev.benchmarking.loading import CAN_EVICT, compare_loaders, our_clips, webdataset_clips, write_shards
from scripts.dev.benchmarking.rows import GOALS, BenchmarkRow, goal_rows, rows_of, table_rows
from scripts.dev.benchmarking.sections import Cap, try_to_fit
from scripts.dev.benchmarking.steps import TrainingStep, count_flop
from scripts.dev.benchmarking.timing import Budget, Seconds, matmul_peak, ratios, take_turns
from scripts.dev.tables import table_of

CPU = torch.device("cpu")
TINY = Case((32, 32), 2, 3, 4, "fp32")
UNLIMITED = Budget(None)


@pytest.fixture
def run(tmp_path, capsys):
    def call(*words: str) -> tuple[dict, str]:
        path = tmp_path / "out/record.json"
        main([*words, "--out", str(path)])
        return json.loads(path.read_text()), capsys.readouterr().out

    return call


@pytest.mark.slow
def test_a_run_prints_tables_and_writes_a_record(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "make_a_video_pytorch", None)  # not installed
    monkeypatch.setattr(kernels, "TURN_FLOP", 1e6)
    options = "train kernels --tiny --device cpu --precision fp32 --rounds 2 --peers unet2d make_a_video"
    record, printed = run(*options.split())
    rows = rows_of(record)
    by_name = {row.name: row for row in rows if row.section == "train"}
    ours, theirs = by_name["ours"], by_name[CONTESTANTS["unet2d"].title]
    assert ours.seconds.times == 2 and ours.ratio is None and theirs.ratio > 0
    assert ours.flop > 0 and 0 < ours.share < 1.5
    absent = by_name["make-a-video-pytorch SpaceTimeUnet"]
    assert absent.seconds is None and "make_a_video_pytorch: not installed here" in absent.note
    assert not any(row.found for row in rows), "goals do not apply to toy networks"
    assert len([row for row in rows if row.section == "kernels"]) == 9
    assert record["device"] == "cpu" and record["date"] and record["peaks"]["fp32"] > 0
    for text in ("fastest matrix product", "| goal |", "not installed here", "GFLOP, counted"):
        assert text in printed
    path = tmp_path / "out/record.json"
    assert "| ours |" in table_of(path, "train")
    assert record["date"] in table_of(path, "run")
    with pytest.raises(UserError, match=r"record.json#memory: expected run, goals or a measured section"):
        table_of(path, "memory")


def test_a_list_has_no_numbers(run, tmp_path):
    record, printed = run("--device", "cuda", "--list")
    assert record["date"] is None and "2 x 64" in json.dumps(record) + printed
    assert all(row.seconds is None for row in rows_of(record))
    sections = [row["section"] for row in record["rows"]]
    assert sections[0] == "train" and sections.index("memory") < sections.index("kernels")
    table = table_of(tmp_path / "out/record.json", "goals")
    assert "| step of 2 x 5 frames, no checkpointing | at most 0.09 s | 0.07 s |  |  |" in table
    assert "none yet" in table_of(tmp_path / "out/record.json", "run")


def test_jobs_without_time_are_left_out(run):
    record, printed = run("kernels", "--tiny", "--device", "cpu", "--precision", "fp32", "--minutes", "0.01")
    assert [row["name"] for row in record["rows"]] == ["left out"]
    assert "more than the time left" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("speed", r"sections: expected some of train, sample, .*, found speed"),
        ("train --peers sora", r"--peers: expected some of .*unet3d.*, found sora"),
        ("train --rounds 0", r"--rounds: expected a number above 0, found 0"),
        ("--minutes -1", r"--minutes: expected a number above 0"),
        ("memory --vram 8", r"--base and --vram: expected both or neither"),
        ("memory data.params.frames=64", r"data.params.frames=64: expected --base, whose config"),
        ("train --precision fp8", r"invalid choice: 'fp8'"),
    ],
)
def test_bad_options_are_errors(words, message):
    with pytest.raises(UserError, match=message):
        main([*words.split(), "--device", "cpu"])


def test_a_missing_gpu_is_an_error():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"--device: expected cpu or a device this machine has, found 'cuda'"):
            main(["memory", "--device", "cuda"])
    with pytest.raises(UserError, match=r"--vram: expected an NVIDIA GPU to cap, found none"):
        main(["memory", "--base", "configs/tiny/video.yaml", "--vram", "8", "--device", "cpu"])
    with pytest.raises(UserError, match=r"memory: expected an NVIDIA GPU"):
        list(try_to_fit(Cap(8, ("configs/tiny/video.yaml",), ()), CPU, UNLIMITED))


def test_a_cap_that_is_too_small_proposes_what_fits(monkeypatch):
    found = {"error": "out of memory", "is_out_of_memory": True, "peak_bytes": 2**33}
    monkeypatch.setattr(sections, "ask_child", lambda *_: found)
    proposal = types.SimpleNamespace(
        overrides=[("model.params.memory.step_in_backward", True), ("model.params.memory.weights", "bfloat16")],
        count=types.SimpleNamespace(peak=types.SimpleNamespace(total=4 * 2**30)),
    )
    monkeypatch.setattr(sections, "propose", lambda *_: proposal)
    cap = Cap(8, ("configs/tiny/video.yaml",), ("data.params.frames=64",), "cuda fit 2x64")
    (row,) = try_to_fit(cap, torch.device("cuda"), UNLIMITED)
    assert row.name == "does not fit" and row.seconds is None
    assert "model.params.memory.step_in_backward=true model.params.memory.weights=bfloat16" in row.note
    assert not GOALS["cuda fit 2x64"].is_met(row.found["cuda fit 2x64"])
    assert "does not fit" in table_rows([row])[1]
    (row,) = try_to_fit(cap, torch.device("cuda"), Budget(0.1))
    assert row.note.endswith("scripts/plan.py --base configs/tiny/video.yaml --vram 8 data.params.frames=64")
    assert "8 GB" in row.case


def test_a_cap_that_is_large_enough(monkeypatch):
    answer = {"seconds": [9.0, 9.0, 2.0, 2.0], "peak_bytes": 5 * 2**30}
    monkeypatch.setattr(sections, "ask_child", lambda *_: answer)
    cap = Cap(8, ("configs/video-sd.yaml",), (), "cuda fit 2x5")
    (row,) = try_to_fit(cap, torch.device("cuda"), UNLIMITED)
    assert row.name == "fits" and row.seconds.median == 2 and "5.00 GiB" in row.note
    assert GOALS["cuda fit 2x5"].is_met(row.found["cuda fit 2x5"])


def test_the_cap_is_the_memory_of_a_smaller_gpu_less_the_context(monkeypatch):
    given = []
    gpu = types.SimpleNamespace(total_memory=100 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: given.append(share))
    child.cap_memory(8, CPU)
    child.cap_memory(None, CPU)
    assert given == [pytest.approx(0.074)]


@pytest.mark.slow
def test_steps_of_a_whole_config():
    request = {
        "base": ["configs/tiny/video.yaml"], "device": "cpu", "side": 8, "steps": 3,
        "overrides": ["data.params.frames=3", "data.params.batch_size=1"],
    }  # fmt: skip
    found = answer(request)
    assert len(found["seconds"]) == 3 and min(found["seconds"]) > 0
    assert found["flop"] > 1e6 and math.isfinite(found["loss"]) and found["peak_bytes"] > 2**20
    found = answer({**request, "overrides": ["model.params.memory={weights: float7}"]})
    assert "float7" in found["error"]


def test_a_child_that_fails_returns_one_line(monkeypatch):
    done = types.SimpleNamespace(stdout="", stderr="Traceback ...\nKilled\n", returncode=-9)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert ask_child({}, 5) == {"error": "ended with status -9: Killed"}
    done.stdout = f"noise\n{MARK}{json.dumps({'peak_bytes': 7})}\n"
    assert ask_child({}, 5) == {"peak_bytes": 7}

    def too_slow(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("python", 5)

    monkeypatch.setattr(subprocess, "run", too_slow)
    assert ask_child({}, 5) == {"error": "no answer within 5 seconds"}


def test_out_of_memory_in_a_child_is_no_traceback(monkeypatch):
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(child, "TrainingStep", out_of_memory)
    found = answer({"contestant": "ours", "case": vars(TINY), "device": "cpu", "steps": 1})
    assert found["is_out_of_memory"] and found["error"] == "out of memory"


def test_a_contestant_that_does_not_fit_is_left_out(monkeypatch):
    build = TrainingStep.__init__

    def init(step: TrainingStep, name: str, *rest: object) -> None:
        if name == "per_frame":
            raise torch.OutOfMemoryError("CUDA out of memory")
        build(step, name, *rest)

    monkeypatch.setattr(sections.TrainingStep, "__init__", init)
    rows = list(sections.compare_steps(TINY, ["ours", "per_frame"], CPU, 1, UNLIMITED, 1e12))
    assert [row.name for row in rows] == ["ours", CONTESTANTS["per_frame"].title]
    assert rows[0].seconds is not None and rows[1].note == "does not fit beside the others"


@pytest.mark.parametrize("name", ["ours", "per_frame", "unet2d", "unet3d", "motion"])
def test_contestants_predict_the_shape_of_their_input_and_train(name):
    step = TrainingStep(name, TINY, CPU)
    with torch.no_grad():
        out = step.contestant.predict(step.network, step.inputs)
    assert out.shape == step.inputs.latents.shape
    before = [weight.clone() for weight in step.network.parameters()]
    step()
    assert any(not torch.equal(*pair) for pair in zip(before, step.network.parameters(), strict=True))


def test_all_get_the_same_clips_and_equal_networks_count_the_same():
    first, second = Inputs.draw(TINY, CPU), Inputs.draw(TINY, CPU)
    assert torch.equal(first.latents, second.latents) and torch.equal(first.context, second.context)
    step = TrainingStep("per_frame", TINY, CPU)
    ours, per_frame, theirs = (count_flop(name, TINY, step) for name in ("ours", "per_frame", "unet2d"))
    assert per_frame == theirs != ours  # the first two are the same network


def test_a_network_that_reads_values_is_counted_by_its_step(monkeypatch):
    def looks(network: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        assert inputs.latents.sum().item() < 1e9
        return CONTESTANTS["per_frame"].predict(network, inputs)

    plain = count_flop("per_frame", TINY, TrainingStep("per_frame", TINY, CPU))
    looking = sections.CONTESTANTS["per_frame"].__class__("looking", CONTESTANTS["per_frame"].build, looks)
    monkeypatch.setitem(CONTESTANTS, "looking", looking)
    counted = count_flop("looking", TINY, TrainingStep("looking", TINY, CPU))
    assert counted == pytest.approx(plain, rel=0.1)  # attention on CPUs is not counted


def test_a_broken_peer_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "video_diffusion_pytorch", None)
    assert "pip install --no-deps video-diffusion-pytorch" in why_missing("video_diffusion")
    assert why_missing("unet3d") is None and why_missing("per_frame") is None


def test_tasks_run_in_turns():
    calls = []
    tasks = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = take_turns(tasks, 4, CPU, UNLIMITED)
    assert "".join(calls) == "abcbcacababc"
    assert {name: len(found) for name, found in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert len(take_turns(tasks, 4, CPU, Budget(1e-9))["a"]) == 1


def test_ratios_are_those_of_rounds():
    """A slow round slows both."""
    assert ratios({"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 2.0]}, "ours") == {"theirs": 0.5}
    assert Seconds.of([3.0, 1.0, 2.0]) == Seconds(2.0, 1.5, 2.5, 3)
    assert matmul_peak(CPU, torch.float32) > 1e6


@pytest.mark.parametrize(("key", "value", "met"), [
    ("cpu unet3d", 0.64, True), ("cpu unet3d", 0.66, False),
    ("cpu clips", 901.0, True), ("cpu clips", 899.0, False),
])  # fmt: skip
def test_goals(key, value, met):
    row = BenchmarkRow("train", "2 x 5 frames, bf16", "a network", found={key: value})
    assert ("not met" in next(row.verdicts())) is not met
    cells = next(line for line in goal_rows([row], "cpu") if line[0] == GOALS[key].title)
    assert cells[-1] == ("yes" if met else "no")
    assert not any(line[0] == GOALS["cuda step 5"].title for line in goal_rows([row], "cpu"))


def test_the_kernels_with_the_largest_shares():
    rows = list(trace(TINY, CPU))
    assert len(rows) == 3 and all("::" in row.name and row.note.endswith("of the step") for row in rows)


def test_both_loaders_read_the_written_shards(tmp_path):
    root = tmp_path / "prepared"
    assert write_shards(root, 20, 11, side=4) > 20 * 11 * 8 * 4 * 4 * 2
    prepared = PreparedSet(root, verify=True)
    assert len(prepared.scenes) == 20 and len({scene.shard for scene in prepared.scenes}) == 2
    ours = list(our_clips(root, 5, 2, 0))
    assert len(ours) == 10 and ours[0].moments.shape == (2, 5, 8, 4, 4)
    for whole, num in ((False, 20), (True, 40)):
        clips = list(webdataset_clips(root, 5, 2, 0, whole))
        assert sum(len(moments) for moments, _ in clips) == num
        assert clips[0][0].shape == (2, 5, 8, 4, 4) and clips[0][1].shape == (2, 77, 768)


@pytest.mark.skipif(not CAN_EVICT, reason="no posix_fadvise")
def test_loaders_side_by_side(monkeypatch):
    monkeypatch.setattr("scripts.dev.benchmarking.loading.WORKERS", 1)
    rows = list(compare_loaders(32, 11, 4, 0.2, 1, UNLIMITED))
    assert [row.rate > 0 for row in rows] == [True] * 3
    assert "cold cache" in rows[0].case and rows[0].found.keys() == {"cpu clips"}
    assert rows[1].found == {"cpu webdataset": pytest.approx(1 / rows[1].ratio)}


def test_a_system_without_posix_fadvise_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.dev.benchmarking.loading.CAN_EVICT", False)
    with pytest.raises(UserError, match=r"loader: expected a system with posix_fadvise"):
        list(compare_loaders(4, 11, 4, 0.2, 1, UNLIMITED))
