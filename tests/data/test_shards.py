"""Prepared clips on disk: layout, random reads and damage of every kind."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import webdataset
from pyarrow import parquet

from ldm.data import shards
from ldm.data.batch import Batch, ClipWindow, SceneRange, read_window, split_scenes
from ldm.data.preparing import preparation as preparation_module
from ldm.data.shards import DatasetError, PreparedSet, SceneEntry, Span, read_info
from ldm.data.shards.index import MEMBERS, SceneTable, keys_of, write_columns
from ldm.data.shards.writer import ShardWriter
from tests.made_clips import CAPTIONS, SETTINGS, context_of, fill, moments_of


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
    assert len(prepared._reader.files()) == 1


def with_index(folder, entries, fast):
    """Give a prepared folder these scenes; `fast`: the Parquet file that belongs to them, too."""
    lines = [entry.to_line().encode() for entry in entries]
    (folder / "index.jsonl").write_bytes(b"".join(lines))
    if fast:
        write_columns(folder, lines, entries)
    info = replace(read_info(folder), index_crc32=zlib.crc32(b"".join(lines)), num_scenes=len(entries))
    (folder / "dataset.json").write_text(info.to_json())


@pytest.mark.slow
def test_a_long_index_is_columns_and_entries_are_parsed_when_asked_for(folder):
    first = PreparedSet(folder).scenes[0]
    entries = [replace(first, key=f"{number:032x}") for number in range(20_000)]
    with_index(folder, entries, fast=True)
    tracemalloc.start()
    prepared = PreparedSet(folder)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert isinstance(prepared.scenes, SceneTable) and held < 200 * len(entries)
    assert prepared.scenes[19_999] == entries[-1] == prepared.scenes[-1] and prepared.scenes[2:4] == entries[2:4]
    assert keys_of(prepared.scenes) == [entry.key for entry in entries]
    training, held_out = split_scenes(prepared.scenes, [3], 0.1)
    assert len(training) + len(held_out) == 20_000 and 1_700 < len(held_out) < 2_300
    with_index(folder, entries, fast=False)  # the Parquet file of the same scenes still belongs to it
    (folder / "index.parquet").unlink()
    by_lines = PreparedSet(folder)
    assert isinstance(by_lines.scenes, list) and by_lines.scenes == entries


def test_the_columns_are_plain_and_other_programs_read_them(folder):
    table = parquet.read_table(folder / "index.parquet")
    scenes = PreparedSet(folder).scenes
    assert table["key"].to_pylist() == [scene.key for scene in scenes] and table["caption"][0].as_py() == "a drive"
    assert table["num_frames"].to_pylist() == [scene.num_frames for scene in scenes]


def test_a_parquet_file_that_does_not_belong_is_left_alone(folder, caplog):
    path, expected = folder / "index.parquet", list(PreparedSet(folder).scenes)
    table = parquet.read_table(path)
    half = table.slice(0, 3)
    others = {
        "another set": table.replace_schema_metadata({"index_crc32": "00000000"}),
        "fewer rows": half,
        "a column less": table.drop_columns(["end"]),
    }
    for name, other in others.items():
        parquet.write_table(other, path, compression="NONE", use_dictionary=False)
        with caplog.at_level("INFO", logger="ldm"):
            assert PreparedSet(folder).scenes == expected, name
        assert "index.parquet is not used, the lines of index.jsonl are read instead" in caplog.messages[-1]
    parquet.write_table(table, path, compression="snappy")  # could grow without bound
    assert isinstance(PreparedSet(folder).scenes, list)
    path.write_bytes(b"PAR1 no Parquet file")
    assert isinstance(PreparedSet(folder).scenes, list)


def test_a_parquet_file_that_contradicts_its_lines_is_an_error(folder):
    path = folder / "index.parquet"
    table = parquet.read_table(path)
    longer = pyarrow.array([number + 1 for number in table["num_frames"].to_pylist()])
    table = table.set_column(table.schema.get_field_index("num_frames"), "num_frames", longer)
    parquet.write_table(table, path, compression="NONE", use_dictionary=False)
    with pytest.raises(DatasetError, match=r"index.parquet: contradicts index.jsonl about scene .*; delete it"):
        PreparedSet(folder).scenes[0]


def test_one_more_array_per_scene(tmp_path, monkeypatch):
    """`MEMBERS` is all that writer, reader, checks and batches need to know of it."""
    monkeypatch.setitem(MEMBERS, "mask", lambda info: [1, *info.moments_shape[1:]])
    source = fill(tmp_path / "plain")
    masks = {}
    with ShardWriter(tmp_path / "plain" / "masked.tar", "masked.tar") as shard:
        entries = []
        for scene in source.scenes:
            about = {name: getattr(scene, name) for name in ("source", "start", "fps", "captions")}
            moments, contexts = source.read_moments(scene), list(source.read_context(scene))
            masks[scene.key] = np.full((scene.num_frames, 1, *moments.shape[2:]), 0.5, np.float16)
            entries.append(shard.add(scene.key, about, moments, contexts, {"mask": masks[scene.key]}))
    with_index(tmp_path / "plain", entries, fast=True)
    prepared = PreparedSet(tmp_path / "plain", verify=True)
    assert list(prepared.scenes) == entries and prepared.scenes[1].arrays.keys() == {"mask"}
    window = ClipWindow(SceneRange.whole(prepared.scenes)[1], 1, 2, 2, 0)
    batch = Batch.cat([read_window(prepared, window, position) for position in (3, 4)])
    assert batch.arrays["mask"].shape == (2, 2, 1, 4, 6) and batch.to("meta").arrays["mask"].is_meta
    assert torch.equal(batch.moments[0], torch.from_numpy(prepared.read_moments(prepared.scenes[1], 1, 2, 2)))
    plain = read_window(source, ClipWindow(SceneRange.whole(source.scenes)[1], 1, 2, 2, 0), 5)
    with pytest.raises(
        DatasetError, match=r"expected the same arrays with every scene of the set, found none and mask"
    ):
        Batch.cat([plain, batch])
    monkeypatch.delitem(MEMBERS, "mask")
    (tmp_path / "plain" / "index.parquet").unlink()
    with pytest.raises(DatasetError, match=r"line 1 is no scene .arrays: found"):
        PreparedSet(tmp_path / "plain")


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
