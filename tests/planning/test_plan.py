"""The count of a training step: compared with real steps, its table, and its errors."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.callbacks.reports import PlanReport
from ldm.config import build
from ldm.diffusion.known_frames import KnownFrames
from ldm.errors import UserError
from ldm.planning import count as training_step
from ldm.planning.count import CPU, GPU, StepCount, StepShape, count_step, latent_size, measure_optimizer, shape_of
from ldm.planning.live_tensors import LiveTensors, gpu_autocast
from ldm.planning.report import GPUS, table
from scripts import plan
from tests.toy_run import make_prepared

ROOT = Path(__file__).parents[2]
UNET = {
    "in_channels": 9, "out_channels": 4, "model_channels": 64, "num_res_blocks": 1, "attention_resolutions": [2],
    "channel_mult": [1, 2], "num_heads": 4, "context_dim": 32, "fps_embedding": True, "known_level_embedding": True,
}  # fmt: skip
SHAPE = StepShape(2, 4, 16, 16)


def config(precision: str = "32-true", memory: dict | None = None, average: bool = False, **unet: object) -> dict:
    params = {
        "unet_config": {"target": "ldm.modules.unet.UNetModel", "params": UNET | unet},
        "first_stage_config": {
            "target": "ldm.modules.encoders.KLFirstStage",
            "params": {
                "embed_dim": 4,
                "ddconfig": {"z_channels": 4, "ch": 32, "ch_mult": [1, 1, 2, 4], "num_res_blocks": 1},
            },
        },
        "cond_stage_config": {"target": "ldm.modules.encoders.CLIPTextEmbedder"},
        "trainable": {"temporal": True, "convolutions": True, "time_embed": True},
        "known_frames": {"mixture": {"nothing": 1, "first": 1}},
        "optimizer": {"name": "adamw"},
        "memory": memory,
    }
    callbacks = {"average": {"params": {"decay": 0.99}}} if average else {}
    return {
        "model": {"base_learning_rate": 1e-4, "target": training_step.MODEL, "params": params},
        "data": {
            "target": "ldm.data.clips.ClipDataModule",
            "params": {"root": "nowhere", "frames": 4, "batch_size": 2},
        },
        "lightning": {"trainer": {"precision": precision}, "callbacks": callbacks},
    }


@cache
def count_of(precision: str, memory: tuple[tuple[str, object], ...] = (), **unet: object) -> StepCount:
    """On a GPU; counted once for all tests."""
    return count_step(config(precision, dict(memory), **unet), SHAPE)


def real_model(settings: dict) -> nn.Module:
    torch.manual_seed(0)
    params = settings["model"]["params"] | {"scale_factor": 1.0}
    return build({"target": training_step.MODEL, "params": params}, "model", learning_rate=1e-4)


def real_loss(model: nn.Module, shape: StepShape = SHAPE) -> torch.Tensor:
    sizes = (shape.clips, shape.frames, 4, shape.height, shape.width)
    steps = torch.zeros(shape.clips, dtype=torch.long)
    known = KnownFrames(torch.ones(*sizes[:2], 1, *sizes[3:]), torch.randn(sizes), steps)
    return model.error(torch.randn(sizes), torch.randn(sizes), steps, torch.randn(shape.clips, 77, 32),
                       torch.ones(shape.clips), known).sum()  # fmt: skip


def profiled_peak(model: nn.Module, half: bool) -> int:
    """Most bytes in use over forward and backward pass by the allocator's own account, weights included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = real_loss(model)
        loss.backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most + sum(weight.nbytes for weight in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("half", "unet"),
    [(True, {}), (False, {"use_checkpoint": True, "feed_forward_frames": 2})],
    ids=["half", "switches"],
)
def test_counted_bytes_are_those_of_a_real_step(half, unet):
    settings = config("bf16-mixed" if half else "32-true", **unet, attention_resolutions=[1, 2])
    count = count_step(settings, SHAPE, CPU)
    counted = max(
        count.peaks[phase].total - count.peaks[phase].kinds["optimiser states"] for phase in ("forward", "backward")
    )
    assert counted == pytest.approx(profiled_peak(real_model(settings), half), rel=0.05)


@pytest.mark.slow
def test_the_same_tracker_finds_the_same_on_tensors_with_values():
    settings = config(use_checkpoint=True)
    model = real_model(settings)
    live = LiveTensors(model, torch.device("cpu"))
    live.label("weights", [*model.parameters(), *model.buffers()])
    with live.during("forward"):
        loss = real_loss(model)
    with live.during("backward"):
        loss.backward()
    count = count_step(settings, SHAPE, CPU)
    real, fake = live.peak, count.peaks[live.peak.phase]
    assert fake.total - fake.kinds["optimiser states"] == pytest.approx(real.total, rel=0.01)
    assert fake.module == real.module
    assert live.flop == count.flop and live.flop_again == count.again > 0


@pytest.mark.slow
def test_work_is_what_the_flop_counter_counts():
    settings = config(attention_backend="math")
    model = real_model(settings)
    with FlopCounterMode(display=False) as counter:
        real_loss(model).backward()
    count = count_step(settings, SHAPE, CPU)
    assert count.flop == counter.get_total_flops() and count.again == 0


def test_storages_count_until_the_last_reference_is_gone():
    live = LiveTensors(nn.Linear(2, 2), torch.device("cpu"))
    with live.during("here"):
        x = torch.empty(1000)
        view = x[:10]
        assert live.live == 4000
        del x
        assert live.live == 4000
        del view
        assert live.live == 0
        torch.empty(500, dtype=torch.float64)
    assert live.peaks["here"].total == 4000 and live.live == 0


def test_the_peak_is_named_by_module_also_in_the_backward_pass():
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat(1, 50).exp().sum(1, keepdim=True)

    network = nn.Sequential(nn.Linear(8, 8), Wide(), nn.Linear(1, 1))
    live = LiveTensors(network, torch.device("cpu"))
    with live.during("forward"):
        loss = network(torch.ones(64, 8, requires_grad=True)).sum()
    with live.during("backward"):
        loss.backward()
    assert live.peaks["forward"].module == live.peaks["backward"].module == "1"


def test_autocast_on_meta_tensors_acts_as_on_a_gpu():
    with gpu_autocast(), torch.device("meta"):
        linear, norm = nn.Linear(8, 8), nn.LayerNorm(8)
        x = torch.empty(2, 8)
        assert linear(x).dtype == torch.float32
        with torch.autocast("meta", torch.bfloat16):
            y = linear(x)
            assert y.dtype == torch.bfloat16 and torch.is_autocast_enabled("meta")
            assert norm(y).dtype == torch.float32  # a CPU would stay in half precision
            q = torch.empty(1, 2, 300, 8, dtype=torch.bfloat16)
            attended = nn.functional.scaled_dot_product_attention(q, q, q)
        assert attended.shape == q.shape and attended.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="meta"):
        torch.autocast("meta", torch.bfloat16)


@pytest.mark.slow
def test_a_gpu_keeps_casts_of_trained_weights_until_autocast_ends():
    plain, cast = count_of("32-true"), count_of("bf16-mixed")
    assert cast.held < 0.8 * plain.held
    assert cast.sizes == plain.sizes and cast.flop == plain.flop


@pytest.mark.slow
def test_each_switch_saves_its_bytes():
    base = count_of("bf16-mixed", use_checkpoint=True)
    trained = base.num_trained

    def with_memory(**options: object) -> StepCount:
        return count_of("bf16-mixed", tuple(options.items()), use_checkpoint=True)

    assert base.sizes["gradients"] == 4 * trained and base.sizes["optimiser states"] == pytest.approx(8 * trained)
    assert base.sizes["average"] == 0
    halved = with_memory(weights="bfloat16", frozen="bfloat16", step_in_backward=True)
    split = with_memory(weights="split")
    assert halved.sizes["trained weights"] == pytest.approx(2 * trained, rel=0.02)
    assert split.sizes["trained weights"] == pytest.approx(4 * trained, rel=0.02)
    assert split.sizes["gradients"] == pytest.approx(2 * trained, rel=0.02)
    assert halved.sizes["frozen weights"] == pytest.approx(base.sizes["frozen weights"] / 2, rel=0.02)
    assert halved.sizes["gradients"] < split.sizes["gradients"] / 5 and "optimiser step" not in halved.peaks
    unchecked = count_of("bf16-mixed")
    assert unchecked.held > 2 * base.held and unchecked.again == 0 < base.again
    on_host = count_of("bf16-mixed", use_checkpoint=True, inputs_on_host=True)
    assert on_host.held < base.held and on_host.on_host > 0 == base.on_host


def test_averages_and_states_in_host_memory():
    settings = config("bf16-mixed", average=True)
    here = count_step(settings, SHAPE)
    settings["model"]["params"]["optimizer"] = {"name": "adamw", "states_on": "host"}
    settings["lightning"]["callbacks"]["average"]["params"] |= {"device": "cpu", "dtype": "bfloat16"}
    there = count_step(settings, SHAPE)
    assert here.sizes["average"] == 4 * here.num_trained and here.on_host == 0
    assert there.sizes["average"] == pytest.approx(2 * here.num_trained, rel=0.02)
    assert there.on_host == there.sizes["average"] + there.sizes["optimiser states"]
    assert there.peak.total < here.peak.total - here.sizes["average"]


@pytest.mark.parametrize(("name", "most"), [("adamw8bit", 2.1), ("adamw4bit", 1.15), ("adamw", 8.0)])
def test_bytes_of_states_are_those_of_a_real_step(name, most):
    pytest.importorskip("torchao")
    found = measure_optimizer({"name": name}, "float32", False)
    assert most - 0.1 < found.states_each <= most and found.states_small == 8
    assert found.states(10**6) == pytest.approx(10**6 * found.states_each, rel=1e-3)
    assert found.states(100) == 800
    assert found.scratch([10**6, 10**6]) == 0  # one kernel on a GPU
    rounded = measure_optimizer({"name": name}, "bfloat16", True)
    assert rounded.one_by_one and 10 * 10**6 < rounded.scratch([10**6, 10]) < 24 * 10**6


def test_shape_follows_the_config_and_the_prepared_clips(tmp_path):
    settings = config()
    assert shape_of(settings) == StepShape(2, 4, 64, 64)
    assert shape_of(settings | {"prepare": {"size": "256x384"}}) == StepShape(2, 4, 32, 48)
    assert shape_of(settings, (128, 128)) == StepShape(2, 4, 16, 16)
    kind = {"moments_shape": [8, 4, 6], "size": [32, 48], "context_shape": [77, UNET["context_dim"]]}
    settings["data"]["params"]["root"] = str(make_prepared(tmp_path / "set", **kind))
    assert shape_of(settings) == StepShape(2, 4, 4, 6)
    assert latent_size(settings)[2] == f"as prepared in {tmp_path / 'set'}"
    settings["data"]["params"]["frames"] = 0
    with pytest.raises(UserError, match=r"data\.params\.frames: expected a whole number of at least 1, found 0"):
        shape_of(settings)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context_shape": [77, 64]}, "expected 32 values per text token, .* found 64"),
        ({"moments_shape": [6, 4, 4]}, "expected 4 latent channels, .* found 3"),
        ({"scale_factor": 0.9}, "expected the scale factor 0.18215, found 0.9"),
        ({"moments_shape": [8, 8, 8]}, r"expected an autoencoder of 8 pixels per latent, found latents of 8 x 8"),
    ],
)
def test_clips_that_training_would_refuse_are_not_counted(tmp_path, change, reason):
    settings, kind = config(), {"moments_shape": [8, 4, 4], "size": [32, 32], "context_shape": [77, 32]}
    settings["data"]["params"]["root"] = str(make_prepared(tmp_path / "set", **{**kind, **change}))
    assert shape_of(settings) == StepShape(2, 4, 64, 64)
    origin = latent_size(settings)[2]
    assert re.search(rf"^of 512x512 pixels; not as in .*set, which training would refuse: {reason}", origin)


def test_a_broken_set_is_not_counted(tmp_path):
    settings = config()
    settings["data"]["params"]["root"] = str(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    assert latent_size(settings)[:2] == (64, 64) and "would refuse: " in latent_size(settings)[2]


def test_the_table_is_complete():
    count = count_of("bf16-mixed", use_checkpoint=True)
    text = "\n".join(table(count, GPU))
    for phrase in ("trained weights", "frozen weights", "gradients", "optimiser states", "average", "activations held",
                  "peak of live tensors", "the GPU needs", "recomputed blocks", "RTX 3090", "H200"):  # fmt: skip
        assert phrase in text
    assert count.peak.module.removeprefix("unet.") in text and "RTX" not in "\n".join(table(count, CPU))


def test_floors_are_those_of_the_nominal_peaks():
    seconds = {gpu.name: gpu.floor_seconds(int(27.2e12)) for gpu in GPUS}
    assert seconds["RTX 3090"] == pytest.approx(0.383, abs=0.001)
    assert seconds["RTX 4090"] == pytest.approx(0.165, abs=0.001)


def run_of(model: nn.Module) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The attributes of a trainer and a module that the callback reads."""
    module = SimpleNamespace(device=torch.device("cpu"), parameters=model.parameters)
    return SimpleNamespace(is_global_zero=True, global_step=0), module


@pytest.mark.slow
def test_a_run_logs_the_count_and_the_measured_peak(caplog):
    caplog.set_level("INFO")
    settings = config()
    trainer, module = run_of(nn.Linear(2, 2))
    report = PlanReport(settings, least_parameters=0)
    report.on_fit_start(trainer, module)
    report.on_train_start(trainer, module)
    report.on_train_batch_end(trainer, module, None, None, 0)
    assert "peak of live tensors" in caplog.text and "measured" not in caplog.text.rpartition("peak of live")[2]
    trainer.global_step = 1
    report.on_train_batch_end(trainer, module, None, None, 0)
    trainer.global_step = 2
    report.on_train_batch_end(trainer, module, None, None, 1)
    assert len(re.findall(r"peak: counted [\d.]+ GiB, measured [\d.]+ GiB of the whole process", caplog.text)) == 1


def test_small_networks_and_other_models_are_not_counted_and_a_failed_count_stops_nothing(caplog):
    trainer, module = run_of(nn.Linear(2, 2))
    other = {"model": {"target": "ldm.models.autoencoder.ImageAutoencoder"}}
    for report in (PlanReport(other, least_parameters=0), PlanReport(config())):
        report.on_fit_start(trainer, module)
        assert report.count is None and not caplog.records
    broken = PlanReport(config(channel_mult=[1, 2, 3.5]), least_parameters=0)
    broken.on_fit_start(trainer, module)
    assert broken.count is None and "could not be counted" in caplog.text


def test_other_models_are_refused():
    with pytest.raises(
        UserError, match=r"model\.target: expected .*LatentVideoDiffusion, whose steps are counted, found 'Other'"
    ):
        count_step({"model": {"target": "Other"}}, SHAPE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vram", "0"], "--vram: expected the memory of a GPU in GB, found 0"),
        (["--vram", "8", "--on", "processor"], "--vram and --on cpu exclude each other"),
        (["--size", "big"], "--size: expected a number of pixels"),
        (["model.params.memory.step_in_backward=true"], "gradient_clip_val"),
        (["lightning.trainer.accumulate_grad_batches=4", "model.params.memory.step_in_backward=true"], "accumulate"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        plan.main(["--base", str(ROOT / "configs/video-sd.yaml"), *arguments])
