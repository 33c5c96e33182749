"""Training clips: what lies at a position, held-out footage, and exact resuming in the middle of an epoch."""

from __future__ import annotations

import logging
import os
import pickle
import signal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from ldm.callbacks import AtomicCheckpointIO, LastCheckpoint, StopRequested
from ldm.data import clips
from ldm.data.clips import ClipDataModule, check_prepared
from ldm.data.shards import DatasetError, PreparedSet
from ldm.data.stream import StreamOrder
from tests.toy_run import CONTEXT_SHAPE, IDENTITIES, ToyModel, make_prepared

# Lightning cannot see that the data module resumes exactly.
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_prepared(tmp_path_factory.mktemp("prepared") / "set", lengths=(12, 9, 7, 30, 2))


def data_module(root, **changes):
    settings = {"frames": 3, "strides": (1, 2), "batch_size": 2, "num_workers": 0, "val_share": 0.2, "seed": 5}
    return ClipDataModule(str(root), **{**settings, **changes})


def test_a_clip_depends_on_seed_and_position_alone(root):
    one, other = data_module(root), data_module(root, batch_size=3)
    reseeded = data_module(root, seed=6)
    for data in (one, other, reseeded):
        data.setup()
    backwards = {position: other.train_clips[position] for position in reversed(range(40))}
    differing = 0
    for position in range(40):
        clip, same, changed = one.train_clips[position], backwards[position], reseeded.train_clips[position]
        assert torch.equal(clip.moments, same.moments) and torch.equal(clip.context, same.context)
        assert clip.positions == [position]
        differing += not torch.equal(clip.moments, changed.moments)
    assert differing > 20


def test_clips_are_windows_of_one_scene_at_a_stride(root):
    data = data_module(root, caption_dropout=0.5)
    data.setup()
    steps, captions = set(), []
    for position in range(200):
        clip = data.train_clips[position]
        assert clip.moments.shape == (1, 3, 4, 2, 2) and clip.moments.dtype == torch.float16
        assert clip.context.shape == (1, *CONTEXT_SHAPE) and clip.fps.dtype == torch.float32
        frames = clip.moments[0, :, 0, 0, 0].tolist()
        assert int(frames[0]) // 100 == int(clip.keys[0].removeprefix("scene"))
        stride = frames[1] - frames[0]
        assert frames[2] - frames[1] == stride and frames[2] // 100 == frames[0] // 100
        assert clip.fps.item() == 10 / stride
        steps.add(stride)
        captions.append(clip.context[0, 0, 0].item())
    assert steps == {1, 2}
    assert {0, 1, 2} == set(captions), "both captions and the empty one"
    assert 70 < captions.count(0) < 130


def test_a_pass_visits_every_scene_long_ones_more_often(root):
    data = data_module(root, val_share=0)
    data.setup()
    keys = [data.train_clips[position].keys[0] for position in range(len(data.train_clips))]
    assert [keys.count(f"scene{index}") for index in range(5)] == [3, 2, 1, 9, 0]
    again = [data.train_clips[position].keys[0] for position in range(len(keys), 2 * len(keys))]
    assert sorted(again) == sorted(keys) and again != keys


# ---- resuming


def train(root, folder, *, steps, resume=None, accumulate=1, workers=0, at_batch=None, trainer=None, **changes):
    """Train the toy model; returns it after the run, however that ended."""
    torch.manual_seed(0)
    model, data = ToyModel(learning_rate=0.05), data_module(root, num_workers=workers, **changes)
    model.at_batch = at_batch or {}
    lightning = pl.Trainer(
        **{"max_steps": steps, "max_epochs": -1, "accelerator": "cpu", **(trainer or {})},
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[AtomicCheckpointIO()],
        callbacks=[LastCheckpoint(str(folder), {"name": "toy"}, every_n_steps=1000)],
    )
    try:
        lightning.fit(model, data, ckpt_path=resume, weights_only=True)
    except (StopRequested, RuntimeError):
        pass
    return model


@pytest.fixture(scope="module")
def straight_run(root, tmp_path_factory):
    """`straight_run(accumulate=1, **trainer)` -> the model after 12 steps without a stop; made once for each."""
    runs = {}

    def run(accumulate=1, **trainer):
        key = (accumulate, *trainer.items())
        if key not in runs:
            folder = tmp_path_factory.mktemp("straight")
            runs[key] = train(root, folder, steps=12, accumulate=accumulate, trainer=trainer)
        return runs[key]

    return run


def assert_same_run(straight, first, second, steps):
    """The steps that reached the weights, and the losses and weights, are those of a run that was not stopped."""
    begun_again = second.seen[0][0]
    kept = [(seen, loss) for seen, loss in zip(first.seen, first.losses, strict=True) if seen[0] < begun_again]
    resumed = kept + list(zip(second.seen, second.losses, strict=True))
    assert [seen for seen, _ in resumed] == straight.seen
    assert [loss for _, loss in resumed] == straight.losses
    assert straight.seen[-1][0] == steps - 1
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [1, 3, 7, 8, 10], ids=lambda stop: f"stop{stop}")
def test_resuming_is_exact_at_any_step(root, tmp_path, straight_run, accumulate, stop):
    """An epoch has 7 (3, when accumulating) steps here, so this stops inside epochs and at their ends."""
    trainer = {"val_check_interval": 2}
    straight = straight_run(accumulate, **trainer)
    first = train(root, tmp_path / "run", steps=stop, accumulate=accumulate, trainer=trainer)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    second = train(root, tmp_path / "run", steps=12, resume=last, accumulate=accumulate, trainer=trainer)
    assert_same_run(straight, first, second, 12)
    assert straight.validated and [step for step in straight.validated if step > stop] == [
        step for step in second.validated if step > stop
    ]


def test_resuming_is_exact_when_validation_counts_across_epochs(root, tmp_path, straight_run):
    trainer = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    straight = straight_run(**trainer)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    first = train(root, tmp_path / "run", steps=8, trainer=trainer)
    second = train(root, tmp_path / "run", steps=12, resume=last, trainer=trainer)
    assert_same_run(straight, first, second, 12)
    assert set(straight.validated) == {3, 6, 9, 12} and set(second.validated) == {9, 12}


def test_resuming_is_exact_with_workers_and_twice(root, tmp_path):
    straight = train(root, tmp_path / "straight", steps=17)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    first = train(root, tmp_path / "run", steps=5, workers=2)
    second = train(root, tmp_path / "run", steps=9, workers=2, resume=last)
    third = train(root, tmp_path / "run", steps=17, workers=2, resume=last)
    assert first.seen + second.seen + third.seen == straight.seen
    assert third.losses == straight.losses[9:]


@pytest.mark.parametrize("at_batch", [3, 4, 6, 10], ids=lambda batch: f"batch{batch}")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ctrl_c_saves_after_the_step_and_resumes_exactly(root, tmp_path, straight_run, accumulate, at_batch):
    trainer = {"val_check_interval": 2}
    straight = straight_run(accumulate, **trainer)
    interrupt = {at_batch: lambda: os.kill(os.getpid(), signal.SIGINT)}
    first = train(root, tmp_path / "run", steps=12, accumulate=accumulate, trainer=trainer, at_batch=interrupt)
    assert len(first.seen) == (at_batch // accumulate + 1) * accumulate, "the step under way is finished"
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    second = train(root, tmp_path / "run", steps=12, resume=last, accumulate=accumulate, trainer=trainer)
    assert len(first.seen) + len(second.seen) == len(straight.seen), "nothing is done twice"
    assert_same_run(straight, first, second, 12)


def test_ctrl_c_while_validating_saves_and_resumes_exactly(root, tmp_path, straight_run):
    trainer = {"val_check_interval": 2}
    straight = straight_run(**trainer)
    interrupt = {("validation", 4): lambda: os.kill(os.getpid(), signal.SIGINT)}
    first = train(root, tmp_path / "run", steps=12, trainer=trainer, at_batch=interrupt)
    assert len(first.seen) == 4
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    second = train(root, tmp_path / "run", steps=12, resume=last, trainer=trainer)
    assert_same_run(straight, first, second, 12)
    assert set(second.validated) == {6, 9, 11}, "what was validated before the stop is not validated again"


def fail():
    raise RuntimeError("out of memory, say")


@pytest.mark.parametrize("at_batch", [4, 5, 7, 11])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_crash_saves_whole_steps_and_resumes_exactly(root, tmp_path, straight_run, accumulate, at_batch):
    straight = straight_run(accumulate)
    first = train(root, tmp_path / "run", steps=12, accumulate=accumulate, at_batch={at_batch: fail})
    assert len(first.seen) == at_batch
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    second = train(root, tmp_path / "run", steps=12, resume=last, accumulate=accumulate)
    assert_same_run(straight, first, second, 12)


def test_small_batches_accumulated_are_the_stream_of_one_large_one(root, tmp_path):
    large = train(root, tmp_path / "large", steps=6, batch_size=4)
    small = train(root, tmp_path / "small", steps=6, batch_size=1, accumulate=4)
    assert [position for _, positions, _ in small.seen for position in positions] == list(range(24))
    assert [position for _, positions, _ in large.seen for position in positions] == list(range(24))
    for name, weight in large.state_dict().items():
        torch.testing.assert_close(weight, small.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_another_batch_size_goes_on_where_the_run_was(root, tmp_path):
    train(root, tmp_path / "run", steps=5)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    second = train(root, tmp_path / "run", steps=7, resume=last, batch_size=3)
    assert second.seen[0][1] == [10, 11, 12]


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "data.params.frames: expected a whole number of at least 1, found 0"),
        ({"frames": 2.5}, "data.params.frames: expected a whole number"),
        ({"batch_size": 0}, "data.params.batch_size: expected"),
        ({"num_workers": -1}, "data.params.num_workers: expected"),
        ({"strides": ()}, "data.params.strides: expected"),
        ({"strides": (2, 0)}, "data.params.strides: expected"),
        ({"caption_dropout": 1.5}, "data.params.caption_dropout: expected a share"),
        ({"val_share": 0.9}, "data.params.val_share: expected a share"),
    ],
)
def test_settings_that_cannot_be(root, changes, message):
    with pytest.raises(DatasetError, match=message):
        data_module(root, **changes)


def test_no_scene_is_long_enough(root):
    with pytest.raises(DatasetError, match=r"15 frames at stride 4.*reach over 57 frames; the longest of 5.*has 30"):
        data_module(root, frames=15, strides=(4, 8)).setup()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DatasetError, match="there is no such folder"):
        data_module(tmp_path / "nowhere").setup()


def test_a_flipped_byte_is_found_before_training(tmp_path):
    root = make_prepared(tmp_path / "set")
    shard = root / "00000.tar"
    content = bytearray(shard.read_bytes())
    content[PreparedSet(root).scenes[1].latents.offset + 200] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match=r"scene1 .* is damaged"):
        data_module(root).prepare_data()
    with pytest.raises(DatasetError, match=r"scene1 .* is damaged"):
        fit_nothing(root)
    data_module(root, verify=False).prepare_data()


def fit_nothing(root):
    trainer = pl.Trainer(fast_dev_run=True, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(ToyModel(learning_rate=0.1), data_module(root, num_workers=0))


def test_a_long_check_is_announced(root, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="ldm"):
        data_module(root).prepare_data()
        assert caplog.messages == []
        monkeypatch.setattr(clips, "LONG_READ", 100)
        data_module(root, verify=False).prepare_data()
        assert caplog.messages == []
        data_module(root).prepare_data()
    assert caplog.messages == [f"{root}: checking 0.0 GB; data.params.verify=false leaves this out"]


def test_clips_can_be_pickled(root):
    data = data_module(root)
    data.setup()
    once = data.train_clips[5]
    copy = pickle.loads(pickle.dumps(data.train_clips))
    for position in (5, 0, 60):
        assert torch.equal(copy[position].moments, data.train_clips[position].moments)
    assert copy[5].keys == once.keys


def test_the_order_of_a_pass_is_kept_while_it_is_needed():
    order = StreamOrder(seed=5, length=40)
    first = order(0)
    assert order(1) is not first and order(0) is first and sorted(order(1)) == list(range(40))
    assert len([order(turn) for turn in range(9)]) == 9
    assert order(0) is not first and np.array_equal(order(0), first), "only the last two are kept"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_stage": "c" * 64}, "another autoencoder: expected cccc.*found aaaa"),
        ({"text_encoder": "c" * 64}, "another text encoder"),
        ({"scale_factor": 1.0}, "another scale factor: expected 1.0, found 0.18215"),
        ({"latent_channels": 4}, "expected 4 latent channels.*found 2"),
        ({"context_dim": 768}, "expected 768 values per text token.*found 5"),
    ],
)
def test_a_set_prepared_for_another_model(root, changes, message):
    prepared = PreparedSet(root)
    fits = {**IDENTITIES, "scale_factor": 0.18215, "latent_channels": 2, "context_dim": 5}
    check_prepared(prepared, **fits)
    with pytest.raises(DatasetError, match=message):
        check_prepared(prepared, **{**fits, **changes})
