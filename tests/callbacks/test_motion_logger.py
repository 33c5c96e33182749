"""What is measured while training: how sampled clips move, beside the data's, and how much has been computed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from ldm.callbacks import ComputeCount, MotionLogger, WeightAverage, compute, motion
from ldm.callbacks import samples as sampling
from ldm.errors import UserError
from ldm.evaluation.motion import MEASURES, Reading
from tests.toy_run import CONTEXT_SHAPE, ToyModel, ToyVideoModel, fit, last, read


@pytest.fixture
def loaded(monkeypatch):
    """Stand-ins for the encoders, whose frames show their latents, coarse in red and fine in green, and for measures:
    the means of these (roadside and road) and the number of frames (smoothness)."""
    loaded = []

    class Text(torch.nn.Module):
        def encode(self, prompts):
            return torch.stack([torch.full(CONTEXT_SHAPE, float(len(prompt))) for prompt in prompts])

        def truncated(self, prompt):
            return prompt[9:] or None

    class FirstStage(torch.nn.Module):
        def decode(self, latents):
            shown = latents.mean(dim=1, keepdim=True)
            return torch.cat([shown / 400, shown, shown], dim=1).repeat(1, 1, 8, 8)

    def measure(self, frames, prompt):
        red, green, _ = (float(value) / 127.5 - 1 for value in frames.mean(axis=(0, 1, 2)))
        values = {"roadside_expansion": 400 * red, "road_expansion": green, "smoothness": float(len(frames))}
        return SimpleNamespace(readings={name: Reading(values.get(name)) for name in MEASURES})

    monkeypatch.setattr(motion, "load_text_encoder_of", lambda config: loaded.append("text") or Text())
    monkeypatch.setattr(sampling, "load_first_stage_of", lambda config: loaded.append("first stage") or FirstStage())
    monkeypatch.setattr(motion.MetricSet, "measure", measure)
    monkeypatch.setattr(motion, "BUNDLED_CLASSIFIER", Path("none"))
    return loaded


def record(folder, tag="motion"):
    return json.loads((folder / f"{tag}.json").read_text())


def logged(folder, tag):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_samples_are_measured_beside_the_data(root, tmp_path, loaded, caplog):
    model, logger = ToyVideoModel(), TensorBoardLogger(tmp_path, name="", version="tensorboard")
    callback = MotionLogger({}, str(tmp_path), every_n_steps=3, num_clips=5, steps=2, scale=2.0)
    with caplog.at_level(logging.INFO, logger="ldm"):
        fit(root, tmp_path, [ComputeCount(), WeightAverage(), callback], model=model, steps=7, logger=logger)
    assert loaded == ["first stage"] * 5, "the data once, then at the start, at 3, at 6 and at the end"
    assert set(model.modes) == {(False, False)} and model.unet.training
    found = record(tmp_path)
    assert [occasion["step"] for occasion in found["occasions"]] == [0, 3, 6, 7]
    tflop = [occasion["tflop"] for occasion in found["occasions"]]
    assert tflop[0] == 0 and tflop[1] > 0 and tflop[2] == pytest.approx(2 * tflop[1])
    assert found["settings"]["captions"] == ["a road"] * 5 and found["settings"]["fps"] == 10
    assert len(found["data"]["scenes"]) == len(found["data"]["values"]["speed"]) <= 5
    of_data = found["data"]["values"]["roadside_expansion"]
    middles = [100 * int(part.scene.key[-1]) + start + 1 for part, start, _ in callback._clips.windows]
    assert of_data == pytest.approx(middles, abs=2), "frame f of scene s shows 100 s + f"
    first = found["occasions"][0]["values"]
    assert len(set(first["road_expansion"])) == 5, "every clip from noise of its own"
    assert first["smoothness"] == [3] * 5 and first["speed"] == [None] * 5
    mean = sum(first["road_expansion"]) / 5
    assert logged(tmp_path, "motion/road_expansion")[0] == (0, pytest.approx(mean))
    mean = sum(of_data) / len(of_data)
    assert logged(tmp_path, "motion_data/roadside_expansion") == [(step, pytest.approx(mean)) for step in (0, 3, 6, 7)]
    assert not any("speed" in tag for tag in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"])
    assert any(message.startswith("motion at step 3: roadside expansion ") for message in caplog.messages)


def test_the_averaged_weights_are_measured_and_the_same_noise_each_time(root, tmp_path, loaded):
    model = ToyVideoModel()
    model.at_batch = {1: lambda: model.unet.scale.data.add_(1.0)}
    average = WeightAverage(decay=0.999)
    fit(root, tmp_path, [average, MotionLogger({}, str(tmp_path), every_n_steps=1, num_clips=2, steps=2)], model=model)
    means = [sum(occasion["values"]["road_expansion"]) for occasion in record(tmp_path)["occasions"]]
    assert means[0] == means[1], "the same noise and captions: only the weights count"
    assert len(set(means[1:])) > 1, "the average follows"


def test_prompts_are_taken_in_turn_at_a_rate_and_length_of_their_own(root, tmp_path, loaded, caplog):
    callback = MotionLogger(
        {}, str(tmp_path), prompts=["a road", "a road in fog"], num_clips=3, frames=4, fps=5, at_start=False, steps=2,
        tag="still",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="ldm"):
        fit(root, tmp_path, [callback], model=ToyVideoModel(), steps=1)
    assert caplog.messages == ["the prompt 'a road in fog...' is longer than the text encoder holds; cut: ' fog'"]
    found = record(tmp_path, "still")
    assert found["settings"]["captions"] == ["a road", "a road in fog", "a road"]
    assert callback._context[:, 0, 0].tolist() == [6, 13, 6]
    assert [occasion["values"]["smoothness"] for occasion in found["occasions"]] == [[4, 4, 4]]
    assert found["data"]["values"]["smoothness"][0] == 4 and callback._clips.windows[0][2] == 2
    assert found["occasions"][0]["tflop"] is None, "nothing counted it"


@pytest.mark.slow
def test_resumed_run_continues_its_record(root, tmp_path, loaded):
    def train(steps, resume=None, **changes):
        callback = MotionLogger({}, str(tmp_path), every_n_steps=2, num_clips=2, steps=2, **changes)
        fit(root, tmp_path, [ComputeCount(), callback], model=ToyVideoModel(), steps=steps, resume=resume)

    train(3)
    before = record(tmp_path)
    later = {**before, "occasions": [*before["occasions"], {**before["occasions"][-1], "step": 9}]}
    (tmp_path / "motion.json").write_text(json.dumps(later))
    loaded.clear()
    train(5, resume=last(tmp_path))
    after = record(tmp_path)
    assert [occasion["step"] for occasion in after["occasions"]] == [0, 2, 3, 4, 5], "what a lost session did is gone"
    assert after["occasions"][:3] == before["occasions"] and after["data"] == before["data"]
    assert loaded == ["first stage"] * 2, "the data is not measured again"
    counts = [occasion["tflop"] for occasion in after["occasions"]]
    assert counts[4] == pytest.approx(counts[1] * 5 / 2), "the count goes on"
    with pytest.raises(UserError, match=r"motion.json: expected clips .* same settings, found another fps"):
        train(6, resume=last(tmp_path), fps=5)


def test_clips_without_texture_have_no_number(root, tmp_path, loaded, monkeypatch, caplog):
    monkeypatch.undo()
    grey = SimpleNamespace(to=lambda device: grey, decode=lambda latents: torch.zeros(len(latents), 3, 32, 32))
    monkeypatch.setattr(sampling, "load_first_stage_of", lambda config: grey)
    with caplog.at_level(logging.INFO, logger="ldm"):
        fit(root, tmp_path, [MotionLogger({}, str(tmp_path), num_clips=1, steps=2)], model=ToyVideoModel(), steps=1)
    assert "motion at step 0: no metric is defined; " in caplog.text
    assert set(map(tuple, record(tmp_path)["occasions"][0]["values"].values())) == {(None,)}


@pytest.mark.slow
def test_text_alignment_of_captions(root, tmp_path, loaded, monkeypatch):
    """Judged by a stand-in that sees snow in every frame; a judge that joins later has the data measured again."""
    monkeypatch.undo()
    noise = SimpleNamespace(to=lambda device: noise, decode=lambda latents: torch.randn(len(latents), 3, 64, 64))
    judge = SimpleNamespace(looks=("fog", "snow"), accuracy=1.0, name="judge", predict=lambda frames: np.ones(3, int))
    text = SimpleNamespace(
        truncated=lambda prompt: None, encode=lambda prompts: torch.zeros(len(prompts), *CONTEXT_SHAPE)
    )
    monkeypatch.setattr(sampling, "load_first_stage_of", lambda config: noise)
    monkeypatch.setattr(motion, "load_text_encoder_of", lambda config: text)
    monkeypatch.setattr(motion, "load_style_classifier", lambda path: judge)

    def train(steps, **words):
        prompts = ["snow road drive", "fog road drive", "a road"]
        callback = MotionLogger({}, str(tmp_path), prompts=prompts, num_clips=3, steps=2, every_n_steps=1, **words)
        fit(root, tmp_path, [callback], model=ToyVideoModel(), steps=steps, resume=last(tmp_path) if words else None)
        return record(tmp_path)

    monkeypatch.setattr(motion, "BUNDLED_CLASSIFIER", Path("none"))
    found = train(1)
    assert "text_agreement" not in found["measures"] | found["data"]["values"]
    found = train(2, judge="judge.safetensors")
    assert found["measures"]["text_agreement"] == {"title": "text alignment", "better": 1, "places": 2}
    assert found["occasions"][-1]["values"]["text_agreement"] == [1, 0, None]
    assert set(found["data"]["values"]["text_agreement"]) == {None}, "'a road' names no look"


def test_training_scenes_without_held_out_ones(root):
    data = fit_data(root, val_share=0)
    assert not len(data.val_clips)
    found = motion._spread_clips(data, 3, 10.0, 6)
    assert len({part.scene.key for part, _, _ in found.windows}) > 1 and len(found) == 6


def fit_data(root, **changes):
    data = motion.ClipDataModule(str(root), frames=3, num_workers=0, **changes)
    data.setup()
    return data


def test_invalid_settings_are_errors(root, tmp_path, loaded):
    for words, message in (
        ({"every_n_steps": 0}, "every_n_steps 0"),
        ({"num_clips": 0}, "num_clips 0"),
        ({"frames": 1}, "frames 1"),
        ({"prompts": []}, "at least one prompt"),
        ({"tag": "a/b"}, "tag: expected letters, digits, _ and -, found 'a/b'"),
    ):
        with pytest.raises(UserError, match=message):
            MotionLogger({}, str(tmp_path), **words)
    for words, message in (
        ({"fps": 8}, r"fps: expected the prepared frame rate or a whole part of it \(10, 5, 3.33333, ...\), found 8"),
        ({"fps": 20}, "whole part of it .* found 20"),
        ({"fps": -1}, "whole part of it .* found -1"),
        ({"frames": 300}, "no held-out scene of .* is long enough for 300 frames at 10 a second"),
        ({"sampler": "dim"}, r"did you mean 'ddim'\?"),
        ({"steps": 0}, "steps: expected 1 to 999, found 0"),
    ):
        with pytest.raises(UserError, match=message):
            fit(root, tmp_path, [MotionLogger({}, str(tmp_path), **words)], model=ToyVideoModel())
    with pytest.raises(UserError, match="MotionLogger: ToyModel generates no videos"):
        fit(root, tmp_path, [MotionLogger({}, str(tmp_path))])


def test_only_the_first_process_measures(root, tmp_path, loaded):
    callback = MotionLogger({}, str(tmp_path))
    other = SimpleNamespace(is_global_zero=False, global_step=0)
    callback.on_fit_start(other, ToyVideoModel())
    callback.on_train_start(other, ToyVideoModel())
    callback.on_train_end(SimpleNamespace(is_global_zero=False, global_step=1), ToyVideoModel())
    assert loaded == [] and not list(tmp_path.iterdir())


# ---- compute


def counted(model, batch):
    with FlopCounterMode(display=False) as counter:
        model.loss(batch).backward()
    return counter.get_total_flops()


def test_operations_are_those_of_forward_and_backward_of_every_batch(root, tmp_path):
    count, logger = ComputeCount(), TensorBoardLogger(tmp_path, name="", version="tensorboard")
    fit(root, tmp_path, [count], steps=6, logger=logger, accumulate_grad_batches=2, log_every_n_steps=3)
    data = fit_data(root, batch_size=2)
    batch = motion.ClipDataModule.train_dataloader(data).collate_fn([data.train_clips[0], data.train_clips[1]])
    flop = counted(ToyModel(learning_rate=0.05), batch)
    assert flop > 0 and count.tflop * 1e12 == pytest.approx(12 * flop), "two batches to a step"
    assert [step for step, _ in logged(tmp_path, "train/tflop")] == [3, 6]
    assert logged(tmp_path, "train/tflop")[0][1] == pytest.approx(6 * flop / 1e12)
    assert read(last(tmp_path))["callbacks"]["ComputeCount"]["flop"] == 12 * flop


class Growing(ToyModel):
    """Computes as much again from some batch on, in passes of its own."""

    def __init__(self, after: int) -> None:
        super().__init__(learning_rate=0.05)
        self.automatic_optimization, self.after, self.passes = False, after, 0

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, batch.positions, batch.keys))
        for _ in range(2 if len(self.seen) > self.after else 1):
            self.passes += 1
            self.manual_backward(self.loss(batch))
        self.optimizers().step()


def test_all_passes_of_a_step_count_and_again_later(root, tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "RECOUNT", 4)
    one, count = ComputeCount(), ComputeCount()
    fit(root, tmp_path / "one", [one], model=Growing(after=100), steps=1)
    model = Growing(after=4)
    fit(root, tmp_path / "two", [count], model=model, steps=8)
    assert model.passes == 12 and count.tflop == pytest.approx(12 * one.tflop)


def test_batches_of_other_shapes_are_counted_apart(root):
    data = fit_data(root, batch_size=3)
    count, model = ComputeCount(), ToyModel(learning_rate=0.05)
    trainer = SimpleNamespace(world_size=2, global_step=0, loggers=[], log_every_n_steps=1)
    flops = []
    for numbers in ([0, 1], [2], [3, 4], [5]):
        batch = data.collate([data.train_clips[number] for number in numbers])
        count.on_train_batch_start(trainer, model, batch, 0)
        model.loss(batch).backward()
        count.on_after_backward(trainer, model)
        count.on_train_batch_end(trainer, model, None, batch, 0)
        flops.append(count.tflop)
    two, one = flops[0], flops[1] - flops[0]
    assert two == pytest.approx(2 * one) and flops[3] == pytest.approx(2 * (two + one))
    batch = data.collate([data.train_clips[0]])
    assert two == pytest.approx(4 * counted(model, batch) / 1e12), "of two processes, with two clips each"


def test_an_error_in_a_step_ends_the_counting(root, tmp_path):
    def fail():
        raise RuntimeError("broken")

    model = ToyModel(learning_rate=0.05)
    model.at_batch = {0: fail}
    count = ComputeCount()
    with pytest.raises(RuntimeError, match="broken"):
        fit(root, tmp_path, [count], model=model)
    assert count._counter is None
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_uncounted_steps_are_reported(root, tmp_path, caplog):
    fit(root, tmp_path, [], steps=2)
    with caplog.at_level(logging.WARNING, logger="ldm"):
        fit(root, tmp_path, [ComputeCount()], steps=3, resume=last(tmp_path))
    assert "train/tflop omits the first 2 steps, which were not counted" in caplog.messages
