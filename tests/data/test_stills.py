"""Single frames in place of a share of the clips: what they are, where they come from, and exact resuming with them."""

from __future__ import annotations

import os
import pickle
import signal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from ldm.data.batch import Batch
from ldm.data.clips import ClipDataModule
from ldm.data.shards import DatasetError
from tests.data.test_clips import assert_same_run, train
from tests.toy_run import CONTEXT_SHAPE, ToyModel, make_prepared

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_prepared(tmp_path_factory.mktemp("prepared") / "set", lengths=(12, 9, 7, 30, 2))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Scenes of one frame, and one of two, of another set: keys and values collide with those of the clips."""
    return make_prepared(tmp_path_factory.mktemp("prepared") / "images", lengths=(1,) * 7 + (2,), num_captions=1)


def data_module(root, **changes):
    settings = {"frames": 3, "strides": (1, 2), "batch_size": 2, "num_workers": 0, "val_share": 0.2, "seed": 5}
    data = ClipDataModule(str(root), **{"image_share": 0.5, **settings, **changes})
    data.setup()
    return data


def values(batch):
    return batch.moments[:, :, 0, 0, 0]


def test_a_sample_is_a_clip_or_as_many_single_frames(root):
    data = data_module(root, caption_dropout=0.3)
    plain = data_module(root, image_share=0.0, caption_dropout=0.3)
    groups, captions, seen = 0, set(), set()
    for position in range(400):
        sample = data.train_clips[position]
        assert len(sample) == 1
        if sample.stills is None:
            assert torch.equal(sample.moments, plain.train_clips[position].moments), "clips are those of a run without"
            assert torch.equal(sample.context, plain.train_clips[position].context)
            continue
        groups += 1
        stills = sample.stills
        assert sample.moments.shape == (0, 3, 4, 2, 2) and sample.context.shape == (0, *CONTEXT_SHAPE)
        assert sample.moments.dtype == stills.moments.dtype == torch.float16 and sample.positions == sample.keys == []
        assert stills.moments.shape == (3, 1, 4, 2, 2) and stills.context.shape == (3, *CONTEXT_SHAPE)
        assert stills.positions == [3 * position, 3 * position + 1, 3 * position + 2] and stills.fps.shape == (3,)
        assert len(set(stills.keys)) == 3, "each from a scene of its own"
        assert [int(key.removeprefix("scene")) for key in stills.keys] == (values(stills)[:, 0] // 100).tolist()
        captions |= {context[0, 0].item() for context in stills.context}
        seen |= set(values(stills).flatten().tolist())
    assert 160 < groups < 240 and captions == {0.0, 1.0, 2.0}
    held_out = {value for clip in data.val_clips for value in values(clip).flatten().tolist()}
    parts = {100 * int(part.scene.key[5:]) + f for part in data.train_clips.slots for f in range(part.start, part.stop)}
    assert seen == parts, "every frame that is trained on, and no other"
    assert held_out and not seen & held_out


def test_a_sample_depends_on_seed_and_position_alone(root):
    one, other, reseeded = data_module(root), data_module(root, batch_size=4), data_module(root, seed=6)
    copy = pickle.loads(pickle.dumps(other.train_clips))
    backwards = {position: copy[position] for position in reversed(range(60))}
    kinds, differing = set(), 0
    for position in range(60):
        sample, same, changed = one.train_clips[position], backwards[position], reseeded.train_clips[position]
        kinds.add(((sample.stills is None), (changed.stills is None)))
        for mine, its in ((sample, same), (sample.stills, same.stills)):
            assert (mine is None) == (its is None)
            assert mine is None or (torch.equal(mine.moments, its.moments) and torch.equal(mine.context, its.context))
        if sample.stills is not None and changed.stills is not None:
            differing += not torch.equal(sample.stills.moments, changed.stills.moments)
    assert len(kinds) == 4 and differing > 5


def test_batches_of_both(root):
    data = data_module(root)
    samples = [data.train_clips[position] for position in range(12)]
    batch = Batch.cat(samples)
    groups = sum(sample.stills is not None for sample in samples)
    assert 0 < groups < 12 and len(batch) == 12 and len(batch.moments) == 12 - groups
    assert batch.stills.moments.shape == (3 * groups, 1, 4, 2, 2) and len(batch.stills) == 3 * groups
    assert len(set(batch.stills.positions)) == 3 * groups and len(batch.stills.keys) == 3 * groups
    assert len(Batch.cat([batch, batch])) == 24
    moved = batch.to("meta")
    assert moved.moments.is_meta and moved.stills.context.is_meta and moved.stills.keys == batch.stills.keys
    clips = Batch.cat([sample for sample in samples if sample.stills is None])
    assert clips.stills is None and len(clips) == 12 - groups and clips.to("meta").stills is None
    alone = Batch.cat([sample for sample in samples if sample.stills is not None])
    assert len(alone) == groups and alone.moments.shape == (0, 3, 4, 2, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a graphics card")
def test_batches_of_both_go_to_a_card_through_pinned_memory(root):
    batch = Batch.cat([data_module(root).train_clips[position] for position in range(12)]).pin_memory()
    assert batch.moments.is_pinned() and batch.stills.moments.is_pinned()
    alone = Batch.cat([sample for sample in map(data_module(root).train_clips.__getitem__, range(12)) if sample.stills])
    assert alone.pin_memory().to("cuda", non_blocking=True).stills.moments.is_cuda


def test_stills_of_another_folder(root, images):
    data = data_module(root, image_root=str(images))
    found = [data.train_clips[position] for position in range(200)]
    stills = Batch.cat([sample.stills for sample in found if sample.stills is not None])
    assert set(values(stills).flatten().tolist()) == {*np.arange(0, 800, 100), 701.0}
    assert max(values(sample).max() for sample in found if sample.stills is None) > 250, "clips are still of root"
    assert f"50% of the samples are 3 single frames each, out of 8 scenes of {images}" in data.summary
    data.prepare_data()


def test_more_frames_than_scenes(tmp_path):
    data = data_module(make_prepared(tmp_path / "one", lengths=(40,)), frames=5, image_share=1.0)
    assert data.train_clips[0].stills.moments.shape == (5, 1, 4, 2, 2)


@pytest.mark.parametrize("frames", [1, 3])
def test_single_frames_alone(images, frames):
    """Scenes of one frame will do then, and what is held out are single frames too."""
    data = data_module(images, image_share=1, frames=frames, val_share=0.3)
    samples = [data.train_clips[position] for position in range(50)]
    assert all(len(sample.stills) == frames and len(sample) == 1 for sample in samples)
    assert len(data.train_clips) == max(1, sum(part.num_frames for part in data.train_clips.stills.parts) // frames)
    assert {clip.moments.shape for clip in data.val_clips} == {(1, 1, 4, 2, 2)}
    held_out = [values(clip).item() for clip in data.val_clips]
    assert len(set(held_out)) == len(held_out), "once, whatever the strides"
    assert not set(held_out) & set(values(Batch.cat([sample.stills for sample in samples])).flatten().tolist())


# ---- training


class Toy(ToyModel):
    """Learns from clips and stills as LatentVideoDiffusion does: each sample counts the same."""

    def loss(self, batch):
        losses = [super(Toy, self).loss(part) * len(part.positions) for part in (batch,) if part.positions]
        if batch.stills is not None:
            groups = len(batch) - len(batch.positions)
            losses.append(super().loss(batch.stills) * groups)
        return torch.stack(losses).sum() / len(batch)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        step, positions, keys = self.seen[-1]
        stills = [] if batch.stills is None else batch.stills.positions
        self.seen[-1] = (step, [*positions, *stills[:: batch.moments.shape[1]]], keys + (batch.stills or batch).keys)
        return loss


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr("tests.data.test_clips.ToyModel", Toy)


MIXED = {"image_share": 0.5}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [1, 3, 7])
def test_resuming_is_exact(root, tmp_path, toy, accumulate, stop):
    straight = train(root, tmp_path / "straight", steps=10, accumulate=accumulate, **MIXED)
    first = train(root, tmp_path / "run", steps=stop, accumulate=accumulate, workers=2 if stop == 3 else 0, **MIXED)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    second = train(root, tmp_path / "run", steps=10, accumulate=accumulate, resume=last, **MIXED)
    assert_same_run(straight, first, second, 10)
    consumed = torch.load(last, weights_only=True)["ClipDataModule"]["consumed"]
    assert consumed == 10 * 2 * accumulate, "samples, whatever they are"


def test_ctrl_c_and_a_crash(root, tmp_path, toy):
    straight = train(root, tmp_path / "straight", steps=10, **MIXED)

    def crash():
        raise RuntimeError("out of memory, say")

    for name, stop in (("interrupted", lambda: os.kill(os.getpid(), signal.SIGINT)), ("crashed", crash)):
        first = train(root, tmp_path / name, steps=10, at_batch={4: stop}, **MIXED)
        last = tmp_path / name / "checkpoints" / "last.ckpt"
        second = train(root, tmp_path / name, steps=10, resume=last, **MIXED)
        assert_same_run(straight, first, second, 10)


def test_small_batches_accumulated_are_the_stream_of_one_large_one(root, tmp_path, toy):
    large = train(root, tmp_path / "large", steps=5, batch_size=4, **MIXED)
    small = train(root, tmp_path / "small", steps=5, batch_size=1, accumulate=4, **MIXED)
    for name, weight in large.state_dict().items():
        torch.testing.assert_close(weight, small.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_processes_divide_the_stream(root):
    """Two processes take turns at batches; together they see the positions that one sees with twice the batch."""

    class Trainer:
        accumulate_grad_batches, world_size, global_step, training = 1, 2, 0, True

        def __init__(self, rank):
            self.global_rank = rank

    seen = []
    for rank in (0, 1):
        data = data_module(root)
        data.trainer = Trainer(rank)
        batches = list(data.train_dataloader())
        for batch in batches:
            data.on_after_batch_transfer(batch, 0)
            data.trainer.global_step += 1
            stills = [] if batch.stills is None else batch.stills.positions
            seen += [*batch.positions, *(position // 3 for position in stills[::3])]
        assert data.consumed == 4 * len(batches)
    assert sorted(seen) == list(range(len(seen)))


# ---- bad input


@pytest.mark.parametrize(("strategy", "share", "is_refused"), [
    ("ddp", 0.5, True), ("ddp", 0.0, False), ("ddp_find_unused_parameters_true", 0.5, False), ("auto", 0.5, False),
])  # fmt: skip
def test_processes_that_would_wait_for_each_other_are_refused(root, strategy, share, is_refused):
    data = data_module(root, image_share=share)
    data.trainer = pl.Trainer(accelerator="cpu", devices=2 if "ddp" in strategy else 1, strategy=strategy, logger=False)
    if is_refused:
        with pytest.raises(
            DatasetError, match=r"image_share: with several .* --strategy ddp_find_unused_parameters_true"
        ):
            data.train_dataloader()
    else:
        assert len(data.train_dataloader()) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_share": -0.1}, "data.params.image_share: expected a share from 0 to 1, found -0.1"),
        ({"image_share": 1.5}, "data.params.image_share: expected a share from 0 to 1, found 1.5"),
        ({"image_share": 0, "image_root": "x"}, "data.params.image_root: expected data.params.image_share above 0"),
        ({"image_root": "nowhere"}, "nowhere: there is no such folder"),
    ],
)
def test_settings_that_cannot_be(root, changes, message):
    with pytest.raises(DatasetError, match=message):
        data_module(root, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_stage": "c" * 64}, "by another autoencoder than .*: expected aaaaaaaaaaaaaaaa, found cccc"),
        ({"text_encoder": "c" * 64}, "by another text encoder"),
        ({"scale_factor": 1.0}, "with another scale factor than .*: expected 0.18215, found 1.0"),
        ({"size": [32, 32]}, r"at another size than .*: expected \[16, 16\], found \[32, 32\]; prepare it again"),
        ({"moments_shape": [4, 4, 4]}, "with latents of another shape"),
        ({"context_shape": [4, 5], "num_tokens": 4}, "with embeddings of another shape"),
    ],
)
def test_images_prepared_in_another_way(root, tmp_path, changes, message):
    other = make_prepared(tmp_path / "other", lengths=(1, 1), **changes)
    with pytest.raises(DatasetError, match=f"data.params.image_root: {other} was prepared {message}"):
        data_module(root, image_root=str(other))


def test_a_damaged_image_folder_is_found_before_training(root, tmp_path):
    images = make_prepared(tmp_path / "images", lengths=(1, 1, 1))
    shard = images / "00000.tar"
    content = bytearray(shard.read_bytes())
    data = data_module(root, image_root=str(images))
    content[data.train_clips.stills.prepared.scenes[1].latents.offset + 150] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match=r"images/00000.tar: scene scene1 .* is damaged"):
        data.prepare_data()
