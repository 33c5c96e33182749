"""Prepared sets behind an address: the same clips as from a folder, whatever the server does; the cache; errors."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from ldm.config.schema import trusting
from ldm.data.clips import ClipDataModule
from ldm.data.preparing.upload import upload
from ldm.data.shards import DatasetError, PreparedSet
from ldm.data.shards import address as remote
from ldm.data.shards import remote as remote_shards
from ldm.data.shards.address import Address, place_of
from ldm.data.shards.remote import BlockCache, RemoteShardReader
from ldm.errors import UserError
from tests.made_server import serving
from tests.toy_run import ToyModel

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def hurried(monkeypatch, tmp_path):
    """Short waits, small blocks and a cache of the test's own."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.005)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(remote_shards, "BLOCK", 512)
    monkeypatch.setenv("VIDEO_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIDEO_SD_CACHE_GB", "0.00002")


def everything(prepared: PreparedSet) -> list[np.ndarray]:
    found = [prepared.empty_context]
    for scene in prepared.scenes:
        found += [prepared.read_moments(scene), prepared.read_moments(scene, 0, 2, 3), prepared.read_context(scene)]
    return found


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


# ---- what is an address


@pytest.mark.parametrize("path", ["prepared", "/data/a:b", "s3:/x", "./https:", "C:x"])
def test_plain_paths_stay_plain_paths(path):
    assert place_of(path) == Path(path) and isinstance(place_of(path), Path)


def test_a_file_address_is_the_path_it_means(original):
    assert place_of(f"file://{original}") == original
    assert type(PreparedSet(f"file://{original}")._reader) is type(PreparedSet(original)._reader)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("git://repo", "expected an address of abfs, .*, found git; give --trust-config if"),
        ("s3://a::http://b", "expected a single address"),
        ("file://relative", "expected a single address"),
    ],
)
def test_addresses_that_a_config_may_not_name(text, message):
    with pytest.raises(DatasetError, match=message):
        PreparedSet(text)


def test_trust_opens_other_kinds():
    with trusting():
        assert place_of("sftp://host/set") == Address("sftp://host/set")


def test_secrets_are_not_shown_and_names_go_before_the_signature():
    shard = Address("https://me:word@host/set?sig=abc") / "shard-000000.tar"
    assert shard.text == "https://me:word@host/set/shard-000000.tar?sig=abc"
    assert str(shard) == "https://host/set/shard-000000.tar"


# ---- reading


def test_the_same_arrays_as_from_the_folder(original):
    with serving(original) as server:
        prepared = PreparedSet(server.address, verify=True)
        assert_same(everything(prepared), everything(PreparedSet(original)))
        assert isinstance(prepared._reader, RemoteShardReader)


def test_index_and_description_are_read_once_and_blocks_come_from_the_cache(original, monkeypatch):
    monkeypatch.setenv("VIDEO_SD_CACHE_GB", "0.01")
    with serving(original) as server:
        prepared = PreparedSet(server.address)
        before = len(server.asked)
        first = everything(prepared)
        asked = server.asked[before:]
        assert asked and not [path for path in asked if not path.endswith(".tar")]
        assert_same(everything(pickle.loads(pickle.dumps(prepared))), first)  # a process that remembers nothing
        assert len(server.asked) == before + len(asked)


def test_neighbouring_blocks_are_one_request_and_a_window_with_gaps_too(original):
    with serving(original) as server:
        prepared = PreparedSet(server.address)
        longest = max(prepared.scenes, key=lambda scene: scene.num_frames)
        before = len(server.asked)
        prepared.read_moments(longest, 0, 4)
        assert len(server.asked) == before + 1
        prepared = PreparedSet(server.address)
        shutil.rmtree(os.environ["VIDEO_SD_CACHE"])
        before = len(server.asked)
        prepared.read_moments(longest, 0, 3, 2)
        assert len(server.asked) == before + 1


def test_who_reads_on_and_on_finds_the_next_blocks_there(original, monkeypatch):
    monkeypatch.setattr(remote_shards, "BLOCK", 64)
    monkeypatch.setenv("VIDEO_SD_CACHE_GB", "0")
    with serving(original) as server:
        prepared = PreparedSet(server.address)
        reader, scene = prepared._reader, prepared.scenes[0]
        before = len(server.asked)
        pieces = [reader.read(scene, 64 * block, 64) for block in range(40)]
        assert b"".join(pieces) == (original / scene.shard).read_bytes()[: 40 * 64]
        assert len(server.asked) - before < 12  # four alone, then eight at a time


@pytest.mark.slow
def test_training_on_a_bad_server_sees_every_clip_unharmed(original, tmp_path, monkeypatch):
    """Each way to go wrong, for 5% of the requests; readers in processes of their own; the losses of a local run."""
    monkeypatch.setattr(remote, "ANSWER_WITHIN", 0.25)
    monkeypatch.setenv("VIDEO_SD_CACHE_GB", "0")
    monkeypatch.setattr(remote_shards, "KEPT_BLOCKS", 1)

    def losses(root, workers):
        torch.manual_seed(0)
        data = ClipDataModule(str(root), frames=2, strides=(1, 2), batch_size=2, num_workers=workers, val_share=0)
        model = ToyModel(learning_rate=0.05, width=8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pl.Trainer(max_steps=60, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
                       enable_progress_bar=False, enable_model_summary=False).fit(model, data)  # fmt: skip
        return model.seen, model.losses

    faults = ("drop", "truncate", "shorten", "delay", "500", "503")
    with serving(original, share=0.05, faults=faults, delay=0.5) as server:
        found = losses(server.address, 2)
        assert {"drop", "truncate", "500"} < set(server.seen) and server.seen["fine"] > 200
    assert found == losses(original, 0)


def test_bytes_that_arrive_changed_are_fetched_again(original, monkeypatch):
    monkeypatch.setenv("VIDEO_SD_CACHE_GB", "0.01")
    with serving(original) as server:
        prepared = PreparedSet(server.address)
        server.share, server.faults = 0.3, ("flip",)
        assert_same(everything(prepared), everything(PreparedSet(original)))
        assert server.seen["flip"] > 1
        server.share = 0
        for path in Path(os.environ["VIDEO_SD_CACHE"]).iterdir():  # a disk that forgets
            if path.name != "lock":
                path.write_bytes(bytes(path.stat().st_size))
        assert_same(everything(pickle.loads(pickle.dumps(prepared))), everything(PreparedSet(original)))


def test_a_set_that_was_forked_reads_in_both_processes(original):
    with serving(original, share=0.1, faults=("drop", "500")) as server:
        prepared = PreparedSet(server.address)
        expected = prepared.read_moments(prepared.scenes[0])
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                same = np.array_equal(prepared.read_moments(prepared.scenes[0]), expected)
                more = len(everything(prepared))
                os._exit(0 if same and more else 1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        assert_same(everything(prepared), everything(PreparedSet(original)))


# ---- what cannot pass


def test_a_server_that_stays_broken_is_named_with_what_was_tried(original):
    with serving(original) as server:
        prepared = PreparedSet(server.address)
        server.share, server.faults = 1, ("500",)
        message = r"127.0.0.1:\d+/set/shard-.*.tar: expected [\d,]+ bytes at [\d,]+, found none in 10 attempts .*500"
        with pytest.raises(DatasetError, match=message):
            prepared.read_moments(prepared.scenes[0])
        with pytest.raises(DatasetError, match=r"set/dataset.json: expected a file, found none in 10 attempts"):
            PreparedSet(server.address)
    with pytest.raises(DatasetError, match=r"found none in 10 attempts .*(refused|connect)"):
        PreparedSet(server.address)


def test_a_server_that_does_not_answer_in_time(original, monkeypatch):
    monkeypatch.setattr(remote, "ANSWER_WITHIN", 0.05)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with (
        serving(original, share=1, faults=("delay",), delay=0.3) as server,
        pytest.raises(DatasetError, match=r"found none in 2 attempts .* no answer within 0.05 s; look after"),
    ):
        PreparedSet(server.address)


def test_bytes_that_stay_wrong_are_damage(folder):
    with serving(folder) as server:
        prepared = PreparedSet(server.address)
        scene = prepared.scenes[1]
        path = folder / scene.shard
        content = bytearray(path.read_bytes())
        content[scene.latents.offset + scene.latents.length - 1] ^= 1
        path.write_bytes(content)
        asked = len(server.asked)
        with pytest.raises(DatasetError, match=rf"{scene.key} \(v0.mp4\) is damaged: the bytes of frame 5 do not"):
            prepared.read_moments(scene)
        assert len(server.asked) - asked == 1 + remote_shards.REREADS
        with pytest.raises(DatasetError, match="is damaged"):
            prepared.verify(scene)


def test_missing_cut_and_foreign_files(folder):
    with serving(folder) as server:
        with pytest.raises(DatasetError, match=r"/set/nothing: expected dataset.json in it, found none"):
            PreparedSet(f"{server.address}/nothing")
        prepared = PreparedSet(server.address)
        last = prepared.scenes[-1]
        content = (folder / last.shard).read_bytes()
        (folder / last.shard).write_bytes(content[: last.latents.offset + 100])
        with pytest.raises(DatasetError, match=rf"{last.shard}: the shard is cut short"):
            PreparedSet(server.address)
        (folder / last.shard).unlink()
        with pytest.raises(DatasetError, match=rf"{last.shard}: the shard is missing"):
            PreparedSet(server.address)
        with pytest.raises(DatasetError, match=f"{last.shard}: the shard is missing, scene {last.key}"):
            prepared.read_moments(last)


def test_a_server_without_ranges_is_refused_at_once(original):
    with serving(original, ranges=False) as server:
        with pytest.raises(DatasetError, match=r"expected a server that answers range requests, found one that does"):
            PreparedSet(server.address)
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("403", r"set/dataset.json: not allowed \(403 Forbidden\); give the credentials"),
        ("400", r"set/dataset.json: the server refuses: 400 Bad Request; correct the address"),
    ],
)
def test_a_server_that_refuses_is_believed_at_once(original, fault, message):
    with serving(original, share=1, faults=(fault,)) as server:
        with pytest.raises(DatasetError, match=message):
            PreparedSet(server.address)
        assert len(server.asked) == 1


def test_packages_that_are_missing_and_kinds_that_nobody_knows(monkeypatch):
    with trusting(), pytest.raises(DatasetError, match=r"strange://x/dataset.json: expected an address of a kind that"):
        PreparedSet("strange://x")

    def missing(scheme):
        raise ImportError(f"Install gcsfs to access {scheme}")

    monkeypatch.setattr(remote.fsspec, "get_filesystem_class", missing)
    with pytest.raises(DatasetError, match=r'a package for such addresses is missing .*gcsfs.*; pip install -e "'):
        PreparedSet("gs://bucket/set")


def test_a_file_system_that_knows_no_waiting(original):
    """fsspec's own in memory: written and read from threads."""
    there = Address("memory://set")
    upload(PreparedSet(original), there, lambda count: None)
    assert_same(everything(PreparedSet("memory://set")), everything(PreparedSet(original)))
    with pytest.raises(DatasetError, match=r"memory://nothing: expected dataset.json in it, found none"):
        PreparedSet("memory://nothing")


def test_a_description_without_end_takes_no_memory(folder):
    with (folder / "dataset.json").open("r+b") as file:
        file.truncate(2**24)
    with serving(folder) as server, pytest.raises(DatasetError, match="more than 1,048,576 bytes"):
        PreparedSet(server.address)


# ---- the cache


def test_the_cache_stays_below_its_size_and_keeps_what_was_read_last(tmp_path):
    cache = BlockCache(tmp_path / "c", 10_000)
    for number in range(50):
        cache.put(f"b{number}", bytes([number]) * 1000)
        assert cache.get("b0", 1000) == bytes(1000), "read again and again"
        assert sum(path.stat().st_size for path in (tmp_path / "c").glob("b*")) <= 10_000
    assert cache.get("b49", 1000) == bytes([49]) * 1000
    assert cache.get("b20", 1000) is None
    assert cache.get("b49", 999) is None, "another length"


FILLING = """
import sys
from pathlib import Path
from ldm.data.shards.remote import BlockCache
cache = BlockCache(Path(sys.argv[1]), 100_000)
for number in range(200):
    cache.put(f"{sys.argv[2]}-{number}", bytes(1000))
"""


def test_many_processes_share_the_bound(tmp_path):
    words = [sys.executable, "-c", FILLING, str(tmp_path / "c")]
    fillers = [subprocess.Popen([*words, str(number)], cwd=ROOT) for number in range(2)]
    assert [filler.wait() for filler in fillers] == [0, 0]
    kept = sum(path.stat().st_size for path in (tmp_path / "c").glob("[0-9]*"))
    assert 50_000 < kept <= 100_000


def test_a_cache_that_cannot_be_written_costs_requests_alone(original, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIDEO_SD_CACHE", str(tmp_path / "file" / "cache"))
    with serving(original) as server:
        assert_same(everything(PreparedSet(server.address)), everything(PreparedSet(original)))
    assert "remote clips are not kept here" in caplog.text


@pytest.mark.parametrize("given", ["much", "-1", "nan", "inf"])
def test_sizes_of_the_cache_that_cannot_be_meant(monkeypatch, given):
    monkeypatch.setenv("VIDEO_SD_CACHE_GB", given)
    with pytest.raises(UserError, match=f"VIDEO_SD_CACHE_GB: expected a size in GB, 0 for no cache, found '{given}'"):
        BlockCache.of_this_machine()
