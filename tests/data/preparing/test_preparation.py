"""A prepared folder in the making: what never mixes, growing, and being killed or out of disk at any moment."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest

from ldm.data.preparing.preparation import Preparation
from ldm.data.shards import DatasetError, PreparedSet
from ldm.data.shards.writer import ShardWriter
from tests.made_clips import CAPTIONS, SETTINGS, contents, context_of, fill


@pytest.mark.parametrize(
    "change", [{"first_stage": "c" * 64}, {"fps": 8.0}, {"size": [128, 64]}, {"scale_factor": 1.0}, {"num_tokens": 77}]
)
def test_other_settings_never_mix(folder, tmp_path, change):
    (name,) = change
    before = contents(folder)
    with pytest.raises(DatasetError, match=rf"prepared with other settings \({name} was .* fresh --out"):
        Preparation(folder, replace(SETTINGS, **change))
    assert contents(folder) == before
    Preparation(tmp_path / "begun", SETTINGS)  # nothing stored yet, and already theirs
    with pytest.raises(DatasetError, match=f"other settings \\({name} was"):
        Preparation(tmp_path / "begun", replace(SETTINGS, **change))


def test_other_captions_never_mix(folder):
    making = Preparation(folder, SETTINGS)
    with pytest.raises(DatasetError, match=r"v1.mp4 was prepared with the captions .* now they are \['x'\]"):
        making.done(f"{1:064x}", "v1.mp4", ["x"])


def test_a_damaged_folder_is_not_added_to(folder, tmp_path):
    (folder / "index.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"expected index.jsonl beside"):
        Preparation(folder, SETTINGS)
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="expected a folder to write into, found a file"):
        Preparation(tmp_path / "file", SETTINGS)


def test_one_process_at_a_time(tmp_path):
    first = Preparation(tmp_path, SETTINGS)
    with pytest.raises(DatasetError, match=r"another scripts/prepare.py is writing here"):
        Preparation(tmp_path, SETTINGS)
    first.finish()
    assert Preparation(tmp_path, SETTINGS).finish() is None


def test_again_changes_nothing_and_more_videos_are_added(tmp_path):
    fill(tmp_path / "a", videos=range(2))
    before = contents(tmp_path / "a")
    fill(tmp_path / "a", videos=range(2))
    assert contents(tmp_path / "a") == before
    grown = fill(tmp_path / "a", videos=range(4))
    assert len(grown.scenes) == 8
    assert [scene.source for scene in PreparedSet(tmp_path / "a", verify=True).scenes[::2]] == [
        "v0.mp4", "v1.mp4", "v2.mp4", "v3.mp4",
    ]  # fmt: skip
    after = contents(tmp_path / "a")
    assert all(after[name] == content for name, content in before.items() if name.startswith("shard"))
    reports = [json.loads(line) for line in after["videos.jsonl"].splitlines()]
    assert [report["num_frames"] for report in reports] == [10, 11, 12, 13]
    assert reports[0]["dropped"] == [{"start": 4, "stop": 5, "reason": "a single frame between two cuts"}]


class Killed(BaseException):
    """Stands for the moment after which nothing runs any more."""


def test_killed_before_or_after_any_rename_and_repeated_gives_the_same_bytes(tmp_path, original, monkeypatch):
    rename = os.replace
    moments = 0
    for after in (False, True):
        for limit in range(100):
            left = limit

            def dying(source, target, after=after):
                nonlocal left
                if left == 0 and not after:
                    raise Killed
                rename(source, target)
                if left == 0:
                    raise Killed
                left -= 1

            out = tmp_path / f"{after}-{limit}"
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", dying)
                try:
                    fill(out)
                except Killed:
                    moments += 1
                    (out / ".dataset.json.partial").touch()  # what a real kill leaves lying
                    (out / ".unfinished" / ".x.tar.partial").touch()
                else:
                    break
            assert len(fill(out).scenes) == 6
            assert contents(out) == contents(original)
    assert moments > 20


@pytest.mark.parametrize("limit", [0, 3, 9])
def test_a_full_disk_loses_nothing(tmp_path, original, monkeypatch, limit):
    out = tmp_path / "a"
    fill(out, videos=range(1))
    before = contents(out)
    write, left = ShardWriter._write, limit

    def full(self, *arguments):
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(out))
        left -= 1
        return write(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(ShardWriter, "_write", full)
        fill(out, videos=range(6))
    left_behind = contents(out)
    assert all(left_behind[name] == content for name, content in before.items())
    assert not [name for name in left_behind if name.endswith(".partial")]
    assert len(PreparedSet(out, verify=True).scenes) == 2
    assert len(fill(out, videos=range(6)).scenes) == 12


def test_nothing_kept_leaves_nothing_behind_for_other_encoders(tmp_path):
    making = Preparation(tmp_path, SETTINGS)
    making.store_empty_context(context_of(1))
    with making.video("v.mp4", "0" * 64, CAPTIONS) as part:
        part.drop(range(1), "a single frame between two cuts")
    assert making.finish() is None
    assert contents(tmp_path) == {}
    prepared = fill(tmp_path, settings=replace(SETTINGS, text_encoder="c" * 64))
    assert np.array_equal(prepared.empty_context, context_of(-1)), "not that of the first text encoder"


@pytest.mark.parametrize("content", ["{", "[]", '{"fps": 10.0}', "3", "\udcff"])
@pytest.mark.parametrize("name", ["settings.json", f"{'0' * 64}.json", "../videos.jsonl"])
def test_damaged_working_files_say_what_to_do_and_cost_nothing_finished(folder, name, content):
    path = folder / ".unfinished" / name
    making = Preparation(folder, SETTINGS)
    making._lock.close()
    if name == "settings.json":
        for finished in folder.glob("*.*"):
            finished.unlink() if finished.is_file() else None
    path.write_bytes(content.encode(errors="surrogateescape"))
    before = contents(folder)
    advice = "choose a fresh --out" if "videos" in name else "delete the folder .*.unfinished .*, or choose a fresh"
    with pytest.raises(
        DatasetError, match=f"{path.name}: corrupted, or written by another version of this project .*; {advice}"
    ):
        Preparation(folder, SETTINGS)
    kept = contents(folder)
    assert {key: kept[key] for key in before if "settings" not in key} == {
        key: value for key, value in before.items() if "settings" not in key
    }
