"""Prepared clips on disk: layout, random reads and damage of every kind."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ldm.data import shards
from ldm.data.preparing import preparation as preparation_module
from ldm.data.shards import DatasetError, PreparedSet, SceneEntry, Span
from ldm.data.shards.writer import ShardWriter
from tests.made_clips import CAPTIONS, SETTINGS, contents, context_of, fill, moments_of


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def test_what_was_written_is_read_back(original):
    prepared = PreparedSet(original, verify=True)
    assert [(scene.source, scene.start, scene.num_frames) for scene in prepared.scenes] == [
        ("v0.mp4", 0, 4), ("v0.mp4", 5, 6), ("v1.mp4", 0, 4), ("v1.mp4", 5, 7), ("v2.mp4", 0, 4), ("v2.mp4", 5, 8),
    ]  # fmt: skip
    scene = prepared.scenes[3]
    moments = moments_of(1, 12)[5:]
    assert np.array_equal(prepared.read_moments(scene), moments)
    assert prepared.read_moments(scene).dtype == np.float16
    for start, count, stride in [(0, 1, 1), (2, 5, 1), (6, 1, 3), (0, 3, 3), (1, 3, 2)]:
        expected = moments[start : start + count * stride : stride]
        assert np.array_equal(prepared.read_moments(scene, start, count, stride), expected)
    assert np.array_equal(prepared.read_moments(scene, 1, None, 2), moments[1::2])
    assert np.array_equal(prepared.read_context(scene), np.stack([context_of(0), context_of(1)]))
    assert np.array_equal(prepared.empty_context, context_of(-1))
    assert scene.captions == CAPTIONS
    info = prepared.info
    assert (info.num_videos, info.num_scenes, info.num_frames, info.latent_channels) == (3, 6, 33, 4)
    assert (info.moments_shape, info.context_shape, info.fps) == ([8, 4, 6], [5, 7], 10.0)


@pytest.mark.parametrize("window", [(-1, 1, 1), (0, 5, 1), (3, 2, 1), (0, 2, 4), (0, 0, 1), (0, 1, 0), (4, None, 1)])
def test_frames_outside_a_scene_are_refused(original, window):
    prepared = PreparedSet(original)
    with pytest.raises((IndexError, ValueError)):
        prepared.read_moments(prepared.scenes[0], *window)


def test_only_the_wanted_bytes_are_read(original, monkeypatch):
    prepared = PreparedSet(original)
    lengths = []
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, to, offset: lengths.append(len(to[0])) or read(file, to, offset))
    prepared.read_moments(prepared.scenes[1], 1, 3)
    prepared.read_moments(prepared.scenes[1], 0, 2, 3)
    frame = 8 * 4 * 6 * 2
    assert lengths == [3 * frame, frame, frame]


def test_shards_are_plain_tars_in_webdataset_convention(original):
    prepared = PreparedSet(original)
    names = sorted({scene.shard for scene in prepared.scenes})
    assert len(names) > 1  # they are limited in size
    assert names == [f"shard-{number:06d}.tar" for number in range(len(names))]
    for scene in prepared.scenes:
        with tarfile.open(original / scene.shard) as tar:
            member = tar.getmember(f"{scene.key}.latents.npy")
            assert (member.offset_data, member.size) == (scene.latents.offset, scene.latents.length)
            assert (member.mtime, member.mode, member.uid, member.uname) == (0, 0o444, 0, "prepare")
            assert zlib.crc32(tar.extractfile(member).read()) == scene.latents.crc32
            about = json.load(tar.extractfile(f"{scene.key}.json"))
            assert about["captions"] == CAPTIONS
            assert about["num_frames"] == scene.num_frames
    samples = list(webdataset.WebDataset([str(original / n) for n in names], shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [scene.key for scene in prepared.scenes]
    assert np.array_equal(samples[1]["latents.npy"], prepared.read_moments(prepared.scenes[1]))
    assert np.array_equal(samples[1]["context.npy"], context_of(0))
    assert np.array_equal(samples[1]["context.1.npy"], context_of(1))


def test_keys_depend_on_everything_that_shapes_a_scene(tmp_path):
    keys = {scene.key for scene in fill(tmp_path / "a").scenes}
    assert len(keys) == 6
    changes = {"first_stage": "c" * 64, "text_encoder": "c" * 64, "scale_factor": 1.0, "fps": 5.0, "size": [64, 128]}
    for name, value in changes.items():
        other = fill(tmp_path / name, settings=replace(SETTINGS, **{name: value}))
        assert not keys & {scene.key for scene in other.scenes}


def test_a_set_can_be_pickled_and_read_in_another_process(original):
    prepared = PreparedSet(original)
    expected = prepared.read_moments(prepared.scenes[0])
    copy = pickle.loads(pickle.dumps(prepared))
    assert np.array_equal(copy.read_moments(copy.scenes[0]), expected)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(prepared.read_moments(prepared.scenes[0]), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_few_files_are_open_at_a_time(original, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 1)
    prepared = PreparedSet(original, verify=True)
    assert len({scene.shard for scene in prepared.scenes}) > 1
    assert len(prepared._reader._files) == 1


def test_opening_a_hundred_thousand_scenes_takes_about_a_second(tmp_path, original):
    scene = PreparedSet(original).scenes[0]
    line = scene.to_line()
    lines = [line.replace(scene.key, f"{n:032x}") for n in range(100_000)]
    for name, content in contents(original).items():
        (tmp_path / name).write_bytes(content)
    index = "".join(lines).encode()
    (tmp_path / "index.jsonl").write_bytes(index)
    info = replace(PreparedSet(original).info, index_crc32=zlib.crc32(index))
    (tmp_path / "dataset.json").write_text(info.to_json())
    start = time.process_time()
    assert len(PreparedSet(tmp_path).scenes) == 100_000
    assert time.process_time() - start < 6  # about 1 s on a quiet machine


def test_a_flipped_byte_is_found_where_it_is_read(folder):
    prepared = PreparedSet(folder)
    scene = prepared.scenes[1]
    frame = 8 * 4 * 6 * 2
    data = scene.latents.offset + scene.latents.length - scene.num_frames * frame
    flip(folder / scene.shard, data + 2 * frame + 17)
    where = rf"{scene.shard}: scene {scene.key} \(v0.mp4\) is damaged: "
    assert len(prepared.read_moments(scene, 0, 2)) == 2  # frames beside it are fine
    for window in [(0, None, 1), (1, 2, 1), (0, 2, 2)]:
        with pytest.raises(DatasetError, match=where + "the bytes of frame 2 do not match the crc32"):
            prepared.read_moments(scene, *window)
    with pytest.raises(DatasetError, match=where + "bytes"):
        prepared.verify(scene)
    with pytest.raises(DatasetError, match=where):
        PreparedSet(folder, verify=True)
    flip(folder / scene.shard, scene.contexts[1].offset + 130)
    with pytest.raises(DatasetError, match=where):
        prepared.read_context(scene)


def test_a_truncated_or_missing_shard(folder):
    prepared = PreparedSet(folder)
    last = prepared.scenes[-1]
    path = folder / last.shard
    content = path.read_bytes()
    path.write_bytes(content[: last.latents.offset + 100])
    with pytest.raises(DatasetError, match=rf"{last.shard}: the shard is cut short: .* \(scene {last.key} is there\)"):
        PreparedSet(folder)
    with pytest.raises(DatasetError, match=rf"{last.shard}: cut short: scene {last.key} needs"):
        prepared.read_moments(last)
    path.unlink()
    with pytest.raises(DatasetError, match=f"{last.shard}: the shard is missing"):
        PreparedSet(folder)
    with pytest.raises(DatasetError, match=f"{last.shard}: the shard is missing, scene {last.key}"):
        PreparedSet.read_moments(pickle.loads(pickle.dumps(prepared)), last)


def edit_info(folder: Path, **changes) -> None:
    info = json.loads((folder / "dataset.json").read_text()) | changes
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in info.items() if v is not None}))


def test_folders_that_are_not_whole(folder, tmp_path):
    with pytest.raises(DatasetError, match="nowhere: there is no such folder; give a folder that"):
        PreparedSet(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DatasetError, match=r"bare: expected dataset.json in it, found none"):
        PreparedSet(tmp_path / "bare")
    index = (folder / "index.jsonl").read_bytes()
    (folder / "index.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"expected index.jsonl beside dataset.json, found none"):
        PreparedSet(folder)
    (folder / "index.jsonl").write_bytes(index[:-200])
    with pytest.raises(DatasetError, match=r"not the index that dataset.json was written with"):
        PreparedSet(folder)
    edit_info(folder, index_crc32=zlib.crc32(index[:-200]))
    with pytest.raises(DatasetError, match=r"index.jsonl: line 6 is no scene \(.*\); prepare into a fresh folder"):
        PreparedSet(folder)


def test_a_contradicting_index(folder):
    lines = (folder / "index.jsonl").read_bytes().splitlines(keepends=True)
    entry = SceneEntry.from_line(lines[2])
    entry.num_frames += 1
    index = b"".join([*lines[:2], entry.to_line().encode(), *lines[3:]])
    (folder / "index.jsonl").write_bytes(index)
    edit_info(folder, index_crc32=zlib.crc32(index))
    with pytest.raises(DatasetError, match=f"the line of scene {entry.key} contradicts itself"):
        PreparedSet(folder)


def test_other_versions_and_broken_descriptions(folder):
    edit_info(folder, schema_version=7)
    with pytest.raises(DatasetError, match="expected schema version 1, found 7"):
        PreparedSet(folder)
    edit_info(folder, schema_version=1, fps=None)
    with pytest.raises(DatasetError, match=r"these fields are missing or unknown: fps; prepare .* into a fresh folder"):
        PreparedSet(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match="expected JSON with a schema_version"):
        PreparedSet(folder)


def test_the_empty_prompt_must_be_there_and_whole(folder):
    flip(folder / "empty.npy", 140)
    with pytest.raises(DatasetError, match="the embedding of the empty prompt is missing or damaged"):
        PreparedSet(folder)
    (folder / "empty.npy").unlink()
    with pytest.raises(DatasetError, match="the embedding of the empty prompt is missing or damaged"):
        PreparedSet(folder)


def test_a_set_made_with_another_autoencoder(original):
    prepared = PreparedSet(original)
    prepared.check_encoders("a" * 64, "b" * 64, 0.18215)
    with pytest.raises(DatasetError, match=f"prepared with another autoencoder: expected {'f' * 16}, found {'a' * 16}"):
        prepared.check_encoders("f" * 64, "b" * 64, 0.18215)
    with pytest.raises(DatasetError, match="another text encoder"):
        prepared.check_encoders("a" * 64, "f" * 64, 0.18215)
    with pytest.raises(DatasetError, match=r"another scale factor: expected 1.0, found 0.18215"):
        prepared.check_encoders("a" * 64, "b" * 64, 1.0)


def test_arrays_must_be_float16(tmp_path):
    with ShardWriter(tmp_path / "a.tar", "a.tar") as shard, pytest.raises(TypeError, match="float16"):
        shard.add("k", {}, np.zeros((2, 8, 4, 4), np.float32), [])


def test_index_lines_round_trip():
    entry = SceneEntry("k", "s", "v", 3, 2, 10.0, ["ä\u2028"], Span(1, 2, 3), "0" * 16, [Span(4, 5, 6)])
    assert SceneEntry.from_line(entry.to_line()) == entry
    assert entry.to_line().count("\n") == 1
    assert preparation_module.SHARD_BYTES == 256 * 2**20
