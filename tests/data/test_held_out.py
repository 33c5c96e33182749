"""Which footage is held out, and the clips it is cut into: fixed, apart from training, at every stride."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.data.batch import split_scenes
from ldm.data.clips import ClipDataModule, HeldOutClips
from ldm.data.shards import PreparedSet
from tests.toy_run import make_prepared


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_prepared(tmp_path_factory.mktemp("prepared") / "set", lengths=(12, 9, 7, 30, 2))


def data_module(root, **changes):
    settings = {"frames": 3, "strides": (1, 2), "batch_size": 2, "num_workers": 0, "val_share": 0.2, "seed": 5}
    data = ClipDataModule(str(root), **{**settings, **changes})
    data.setup()
    return data


def test_held_out_clips_are_fixed_and_apart_from_training(root):
    data = data_module(root, val_share=0.4)
    held_out = {key for position in range(len(data.val_clips)) for key in data.val_clips[position].keys}
    trained = {key for position in range(100) for key in data.train_clips[position].keys}
    assert held_out and trained and not held_out & trained
    assert data.val_clips[0].context.unique().tolist() == [1.0], "the first caption, never dropped"


def test_one_scene_holds_out_its_last_frames(tmp_path):
    data = data_module(make_prepared(tmp_path / "one", lengths=(40,)), val_share=0.25)
    trained = torch.cat([data.train_clips[position].moments for position in range(200)])
    held_out = torch.cat([data.val_clips[position].moments for position in range(len(data.val_clips))])
    assert trained.max() == 29 and held_out.min() == 30 and held_out.max() == 39


def test_scenes_keep_their_side_when_footage_is_added(tmp_path):
    few = PreparedSet(make_prepared(tmp_path / "few", lengths=(9,) * 12)).scenes
    many = PreparedSet(make_prepared(tmp_path / "many", lengths=(9,) * 30)).scenes
    sides = [{part.scene.key for part in split_scenes(scenes, [3], 0.3)[1]} for scenes in (few, many)]
    assert sides[0] and sides[0] <= sides[1] and not (sides[1] - sides[0]) & {scene.key for scene in few}


def test_too_little_footage_to_hold_out_is_all_trained_on(tmp_path):
    data = data_module(make_prepared(tmp_path / "short", lengths=(4,)), batch_size=4)
    assert data.val_dataloader() == [] and len(data.train_clips) == 1
    assert len(list(data.train_dataloader())) == 1, "an epoch has a batch even where footage is short"
    assert next(iter(data.train_dataloader())).positions == [0, 1, 2, 3]


def test_short_scenes_are_counted(root):
    data = data_module(root, val_share=0)
    assert "4 scenes to train on" in data.summary and "1 too short for 3 frames" in data.summary


def test_held_out_windows_do_not_overlap(root):
    prepared = PreparedSet(root)
    _, held_out = split_scenes(prepared.scenes, [5], 0.4)
    clips = HeldOutClips(prepared, held_out, frames=3, strides=[2])
    frames = np.concatenate([clips[position].moments[0, :, 0, 0, 0].numpy() for position in range(len(clips))])
    assert len(set(frames.tolist())) == len(frames)
    with pytest.raises(IndexError):
        clips[len(clips)]


@pytest.mark.parametrize("lengths", [(40,), (12, 9, 7, 30, 2), (9,) * 12 + (40,), (60, 9, 9, 9, 9)])
@pytest.mark.parametrize("val_share", [0.05, 0.3])
def test_every_stride_is_held_out_at_its_frame_rate(tmp_path, lengths, val_share):
    data = data_module(make_prepared(tmp_path / "set", lengths), strides=(4, 1, 2), val_share=val_share)
    found = set()
    for clip in data.val_clips:
        frames = clip.moments[0, :, 0, 0, 0].tolist()
        stride = frames[1] - frames[0]
        assert frames[2] - frames[1] == stride and clip.fps.item() == 10 / stride
        found.add(stride)
    assert found == {1, 2, 4}
    trained = {value for n in range(400) for value in data.train_clips[n].moments[:, :, 0, 0, 0].flatten().tolist()}
    assert not trained & {value for clip in data.val_clips for value in clip.moments[:, :, 0, 0, 0].flatten().tolist()}
    assert {10.0, 5.0, 2.5} == {data.train_clips[n].fps.item() for n in range(400)}
    counts = [data.summary.count(f"at stride {stride}") for stride in (1, 2, 4)]
    assert counts == [1, 1, 1] and f"{len(data.val_clips)} clips: " in data.summary


def test_a_stride_no_scene_is_long_enough_for_shows_in_the_summary(tmp_path):
    data = data_module(make_prepared(tmp_path / "set", lengths=(9,) * 12), strides=(1, 8), val_share=0.3)
    assert "0 at stride 8" in data.summary and len(data.val_clips) > 0


def test_an_end_is_cut_off_only_for_what_the_held_out_scenes_are_too_short_for(tmp_path):
    scenes = PreparedSet(make_prepared(tmp_path / "set", lengths=(9,) * 12 + (40,))).scenes
    _, short = split_scenes(scenes, [3, 5], 0.3)
    training, held_out = split_scenes(scenes, [3, 5, 17], 0.3)
    assert short and held_out[: len(short)] == short
    (tail,) = held_out[len(short) :]
    assert (tail.scene.key, tail.start, tail.stop) == ("scene12", 23, 40)
    assert [part.stop for part in training if part.scene.key == "scene12"] == [23]
