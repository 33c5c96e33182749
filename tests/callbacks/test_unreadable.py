"""Unreadable clips: retried, substituted independently of where a run was cut, listed, and too many are an error."""

from __future__ import annotations

import errno
import json
import logging
import os

import pytest
import pytorch_lightning as pl
import torch

from ldm.callbacks import AtomicCheckpointIO, LastCheckpoint, UnreadableClips
from ldm.callbacks import bad_clips as counting
from ldm.data import batch as clip_reading
from ldm.data.clips import ClipDataModule
from ldm.data.shards import DatasetError, PreparedSet
from ldm.errors import UserError
from tests.toy_run import ToyModel, last, make_prepared

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended", "ignore:This DataLoader will create"
)
BROKEN = "scene1"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(clip_reading, "FIRST_PAUSE", 0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four scenes, of which the second one's first four frames are corrupt."""
    folder = make_prepared(tmp_path_factory.mktemp("prepared") / "set", lengths=(12, 9, 30, 7))
    scene = next(scene for scene in PreparedSet(folder).scenes if scene.key == BROKEN)
    with (folder / scene.shard).open("r+b") as file:
        file.seek(scene.latents.offset + scene.latents.length - scene.num_frames * 32)
        file.write(b"\xff" * 4 * 32)
    return folder


def module(root, **options):
    settings = {"frames": 3, "batch_size": 2, "num_workers": 0, "val_share": 0.2, "verify": False, "seed": 5, **options}
    return ClipDataModule(str(root), **settings)


def run(root, folder, steps, resume=False, trainer=None, most=1.0, **options):
    torch.manual_seed(0)
    model, counts = ToyModel(learning_rate=0.001), UnreadableClips(str(folder), most=most)
    lightning = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, plugins=[AtomicCheckpointIO()],
        callbacks=[counts, LastCheckpoint(str(folder), {"name": "toy"}, every_n_steps=1000)], **(trainer or {}),
    )  # fmt: skip
    lightning.fit(model, module(root, **options), ckpt_path=last(folder) if resume else None, weights_only=True)
    return model, counts


def lines_of(folder):
    return [json.loads(line) for line in (folder / "unreadable.jsonl").read_text().splitlines()]


def test_the_substitute_depends_on_the_position_alone(root):
    one, other = module(root), module(root, batch_size=3)
    one.setup()
    other.setup()
    lost = {}
    for position in range(60):
        clip = one.train_clips[position]
        same = other.train_clips[position]
        assert torch.equal(clip.moments, same.moments) and clip.keys == same.keys
        assert clip.positions == [position] and clip.moments.isfinite().all()
        lost |= {position: clip.unreadable} if clip.unreadable else {}
        (described,) = one.train_clips.describe(clip)
        assert described["frames"] == [value % 100 for value in clip.moments[0, :, 0, 0, 0].int().tolist()]
        assert described["scene"] == clip.keys[0]
    assert 2 < len(lost) < 30
    for position, clips in lost.items():
        for clip in clips:
            assert clip.position == position and clip.about["scene"] == BROKEN and clip.about["frames"][0] < 4
            assert "scene1 (toy.mp4) is damaged: the bytes of frame" in clip.reason


def test_readable_positions_keep_their_clips(root, tmp_path):
    whole, corrupt = module(make_prepared(tmp_path / "set", lengths=(12, 9, 30, 7))), module(root)
    whole.setup()
    corrupt.setup()
    for position in range(40):
        clip, expected = corrupt.train_clips[position], whole.train_clips[position]
        assert torch.equal(clip.moments, expected.moments) != bool(clip.unreadable)


@pytest.mark.parametrize("image_share", [0.0, 0.5])
def test_resuming_after_a_kill_lists_each_clip_once(root, tmp_path, image_share):
    options = {"image_share": image_share, "frames": 2}
    straight, counts = run(root, tmp_path / "straight", 24, **options)
    run(root, tmp_path / "run", 10, num_workers=2, **options)
    checkpoint = last(tmp_path / "run").read_bytes()
    run(root, tmp_path / "run", 18, resume=True, **options)
    last(tmp_path / "run").write_bytes(checkpoint)  # killed after 18 steps, resumed from 10
    again, later = run(root, tmp_path / "run", 24, resume=True, **options)
    assert straight.losses[10:] == pytest.approx(again.losses, rel=0, abs=0, nan_ok=True)  # NaN for a batch of no clips
    found = lines_of(tmp_path / "straight")
    assert found == lines_of(tmp_path / "run") and len(found) > 3
    assert [line["step"] for line in found] == sorted(line["step"] for line in found)
    training = [line for line in found if not line["held_out"]]
    assert (counts.num_clips, counts.num_unreadable) == (later.num_clips, later.num_unreadable)
    assert counts.num_unreadable == len(training) and counts.num_clips >= 48
    if image_share:
        assert {len(line["frames"]) for line in training} == {1, 2}


def test_a_passing_read_error_is_retried(root, tmp_path, monkeypatch):
    failures = {"left": 2}
    preadv = os.preadv

    def failing(*arguments):
        if failures["left"]:
            failures["left"] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    data = module(make_prepared(tmp_path / "set"))
    data.setup()
    clip = data.train_clips[0]
    assert failures["left"] == 0 and clip.unreadable == []
    failures["left"] = 3
    clip = data.train_clips[0]
    assert [lost.reason for lost in clip.unreadable] == ["[Errno 5] Input/output error"], (
        "two retries, then a substitute"
    )


def test_pauses_double(root, monkeypatch):
    pauses = []
    monkeypatch.setattr(clip_reading, "FIRST_PAUSE", 0.5)
    monkeypatch.setattr(clip_reading.time, "sleep", pauses.append)
    data = module(root, retries=3)
    data.setup()
    position = next(position for position in range(60) if len(data.train_clips[position].unreadable) == 1)
    pauses.clear()
    _ = data.train_clips[position]
    assert pauses == [0.5, 1.0, 2.0]


def test_held_out_clips_are_replaced_by_the_next_and_listed_once(tmp_path):
    root = make_prepared(tmp_path / "set", lengths=(40,))
    data = module(root)
    data.setup()
    _, start, _ = data.val_clips.windows[0]
    scene = data.prepared.scenes[0]
    with (root / scene.shard).open("r+b") as file:
        file.seek(scene.latents.offset + scene.latents.length - (scene.num_frames - start) * 32)
        file.write(b"\xff" * 32)
    clips = [data.val_clips[position] for position in (0, 1)]
    assert torch.equal(clips[0].moments, clips[1].moments) and clips[0].unreadable and not clips[1].unreadable
    run(root, tmp_path / "run", 6, trainer={"val_check_interval": 2, "check_val_every_n_epoch": None})
    assert [(line["step"], line["position"], line["held_out"]) for line in lines_of(tmp_path / "run")] == [(2, 0, True)]


def test_too_many_are_an_error_that_shows_reasons(root, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(counting, "FEW", 20)
    message = r"at most 0.05 of the training clips.*found 2 of \d+;(.|\n)*is damaged"
    with pytest.raises(UserError, match=message) as found:
        with caplog.at_level(logging.WARNING, logger="ldm"):
            run(root, tmp_path, 60, most=0.05)
    assert "unreadable.jsonl lists them" in str(found.value)
    assert "raise lightning.callbacks.unreadable_clips.params.most" in str(found.value)
    assert len(lines_of(tmp_path)) == 2
    assert any("and was substituted" in message for message in caplog.messages)


def test_a_set_of_which_nothing_can_be_read_is_an_error(tmp_path):
    root = make_prepared(tmp_path / "set")
    data = module(root)
    data.setup()
    (root / "00000.tar").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"a clip that can be read among 10 tried for position 3, each 3 times"):
        _ = data.train_clips[3]


@pytest.mark.parametrize("most", [-0.1, 2, "all"])
def test_most_is_a_share(most):
    with pytest.raises(UserError, match="UnreadableClips: expected a share from 0 to 1 for most, found"):
        UnreadableClips("run", most=most)


def test_retries_are_a_number(root):
    with pytest.raises(DatasetError, match=r"data.params.retries: expected a whole number of at least 0, found -1"):
        module(root, retries=-1)
