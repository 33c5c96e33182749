"""`prepare.py --shard I/N`: each process does its share, and put together they are what one machine makes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ldm.data.preparing import sources
from ldm.data.preparing.footage import FootageError
from ldm.data.preparing.preparation import Preparation
from ldm.data.shards import DatasetError, PreparedSet
from ldm.errors import UserError
from tests.data.preparing.test_prepare import CONFIG, prepare, stand_in
from tests.made_clips import CAPTIONS, SETTINGS, contents, context_of, fill, the_set
from tests.made_footage import write_drive, write_truncated


@pytest.fixture
def encoders(monkeypatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "400")
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    """Five videos, one of them damaged and one a copy of another."""
    folder = tmp_path_factory.mktemp("footage")
    for seed, name in enumerate(("a.mp4", "c.mp4", "e.mp4")):
        write_drive(folder / name, num_frames=20, size=64, seed=seed)
    write_truncated(folder / "b.mp4")
    shutil.copy(folder / "a.mp4", folder / "d.mp4")
    return folder


@pytest.fixture
def run(footage, tmp_path, encoders):
    (tmp_path / "config.yaml").write_text(CONFIG)

    def prepare_into(name, *more):
        words = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / name)]
        prepare.main([str(footage), "--prompt", "x", *words, *more])
        return tmp_path / name

    return prepare_into


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1)])
def test_shares_in_any_order_end_with_the_bytes_of_one_machine(run, encoders, capsys, order):
    here = the_set(run("here"))
    encoders.clear()
    for number in order:
        there = run("there", "--shard", f"{number}/3")
        assert not (there / "index.jsonl").exists()
    assert f"Share {order[-1]}/3: " in capsys.readouterr().out
    encoders.clear()
    assert the_set(run("there")) == here
    assert encoders == [] and not (there / ".unfinished").exists()


def test_a_share_again_skips_and_another_division_knows_what_is_done(run, encoders, capsys):
    run("there", "--shard", "1/2")
    encoders.clear()
    run("there", "--shard", "1/2")
    assert encoders == []
    assert "Share 1/2: 0 prepared, 3 done before, 0 dropped" in capsys.readouterr().out
    run("there", "--shard", "1/1")
    assert the_set(run("there")) == the_set(run("here"))


def test_a_copy_is_known_by_the_first_name_whoever_prepared_it(run):
    run("there", "--shard", "4/5")  # d.mp4, which is a.mp4 again
    there = run("there")
    assert [scene.source for scene in PreparedSet(there).scenes] == ["a.mp4", "c.mp4", "e.mp4"]
    assert the_set(there) == the_set(run("here"))


def test_more_shares_than_videos(run, capsys):
    run("there", "--shard", "7/9")
    assert "Share 7/9: 0 prepared, 0 done before, 0 dropped" in capsys.readouterr().out


def test_drawn_clips_in_shares(tmp_path, encoders):
    (tmp_path / "config.yaml").write_text(CONFIG)

    def draw(name, *more):
        words = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / name), "--processes", "1"]
        prepare.main(["--world", "5", "--frames", "2", "--looks", "desert,snow", *words, *more])
        return contents(tmp_path / name)

    draw("there", "--shard", "2/2")
    draw("there", "--shard", "1/2")
    assert draw("there") == draw("here")


def test_shares_at_the_same_time(run):
    here = the_set(run("here"))
    children = []
    for share in ("1/2", "2/2"):
        child = os.fork()
        if child == 0:
            try:
                run("there", "--shard", share)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert the_set(run("there")) == here


def test_who_may_write_beside_whom(tmp_path):
    first = Preparation(tmp_path, SETTINGS, share=(1, 2))
    second = Preparation(tmp_path, SETTINGS, share=(2, 2))
    with pytest.raises(DatasetError, match=r"is writing here \(share 1-of-2\); wait until it ends"):
        Preparation(tmp_path, SETTINGS, share=(1, 2))
    with pytest.raises(DatasetError, match=r"another scripts/prepare.py is writing here; wait until it ends"):
        Preparation(tmp_path, SETTINGS)
    first.leave()
    second.leave()
    whole = Preparation(tmp_path, SETTINGS)
    with pytest.raises(DatasetError, match=r"another scripts/prepare.py is writing here; wait until it ends"):
        Preparation(tmp_path, SETTINGS, share=(1, 2))
    whole.leave()


def test_a_share_killed_while_all_is_put_together(tmp_path, original, monkeypatch):
    """Parts of two shares, and a first try at putting them together that ended after one shard."""
    for share, videos in (((1, 2), (0, 2)), ((2, 2), (1,))):
        making = Preparation(tmp_path / "a", SETTINGS, 6000, share)
        with monkeypatch.context() as patch:
            patch.setattr(Preparation, "finish", Preparation.leave)
            patch.setattr("tests.made_clips.Preparation", lambda *_, made=making: made)
            fill(tmp_path / "a", videos)
    making = Preparation(tmp_path / "a", SETTINGS, 6000)
    assert making.has_empty_context
    monkeypatch.setattr(making, "_commit", None)
    with pytest.raises(TypeError):
        making.finish()
    making.leave()
    assert len(Preparation(tmp_path / "a", SETTINGS, 6000).finish().scenes) == 6
    assert contents(tmp_path / "a") == contents(original)


@pytest.mark.parametrize("words", ["0/3", "4/3", "3", "a/b", "1/2/3", "-1/3", "1/0"])
def test_shares_that_cannot_be_meant(run, words):
    with pytest.raises(UserError, match=rf"--shard: expected I/N with I from 1 to N, such as 3/16, found '{words}'"):
        run("out", f"--shard={words}")


# ---- what is broken


def test_what_is_broken_is_remembered_and_tried_again_when_asked(run, encoders, capsys, monkeypatch):
    out = run("out")
    assert [json.loads(line)["source"] for line in (out / "broken.jsonl").read_text().splitlines()] == ["b.mp4"]
    before = the_set(out)
    encoders.clear()
    capsys.readouterr()
    run("out")
    assert encoders == [] and the_set(out) == before
    assert "after frame" in (shown := capsys.readouterr().out) and "--retry-broken tries again" in shown
    run("out", "--retry-broken")
    assert encoders == ["x"] and the_set(out) == before
    with monkeypatch.context() as patch:
        patch.setattr(sources, "find_scenes", healed)
        patch.setattr(sources, "read_frames", lambda path, fps, size: iter([sources.np.zeros((64, 64, 3), "u1")] * 4))
        run("out", "--retry-broken")
    assert (out / "broken.jsonl").read_text() == ""
    assert PreparedSet(out, verify=True).info.num_videos == 4


def healed(path, fps):
    return type("Scenes", (), {"scenes": [range(4)]})


def test_a_damaged_list_of_what_is_broken(folder):
    (folder / "broken.jsonl").write_text('{"source": 3}')
    with pytest.raises(
        DatasetError, match=r"broken.jsonl: corrupted, or written by another version .* choose a fresh --out"
    ):
        Preparation(folder, SETTINGS)


def test_a_part_that_was_written_elsewhere(tmp_path):
    there = Preparation(tmp_path / "there", SETTINGS, 6000, (1, 1))
    with there.video("v.mp4", "0" * 64, CAPTIONS) as part:
        part.drop(range(1), "a single frame between two cuts")
    note = (there.work / f"{'0' * 64}.json").read_text()
    here = Preparation(tmp_path / "here", SETTINGS)
    here.store_empty_context(context_of(-1))
    here.note_broken("v.mp4", "0" * 64, "its worker died")
    content = (there.work / f"{'0' * 64}.tar").read_bytes()
    with pytest.raises(FootageError):
        here.adopt(note, pieces_that_break(content))
    assert not (here.work / f"{'0' * 64}.tar").exists() and "0" * 64 not in here.reports
    assert here.adopt(note, [content[:100], content[100:]]) == there.reports["0" * 64]
    assert (here.work / f"{'0' * 64}.tar").read_bytes() == content and here.broken == {}


def pieces_that_break(content):
    yield content[:100]
    raise FootageError("the worker is gone")
