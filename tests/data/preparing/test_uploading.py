"""Prepared sets in object storage, by a stand-in for S3 on this machine: written, read, grown, never overwritten."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ldm.data.preparing import upload as uploading
from ldm.data.preparing.upload import upload
from ldm.data.shards import DatasetError, PreparedSet
from ldm.data.shards import address as remote
from ldm.data.shards.address import Address
from ldm.errors import UserError
from tests.data.preparing.test_prepare import CONFIG, footage, prepare, stand_in
from tests.data.test_remote import assert_same, everything
from tests.made_clips import contents, fill

__all__ = ["footage"]

server_module = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def storage():
    """An S3 service of this process; gives its client."""
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    words = {
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "word",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    before = {name: os.environ.get(name) for name in words}
    os.environ.update(words)
    yield boto3.client("s3")
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def bucket(storage, request, monkeypatch, tmp_path) -> str:
    monkeypatch.setenv("VIDEO_SD_CACHE", str(tmp_path / "cache"))
    name = f"b{abs(hash(request.node.name))}"
    storage.create_bucket(Bucket=name)
    return name


def test_written_and_read_again(storage, bucket, original, tmp_path):
    sent = []
    there = Address(f"s3://{bucket}/sets/highway")
    names = {path.name for path in original.iterdir()}
    assert upload(PreparedSet(original), there, sent.append) == len(names)
    assert sum(sent) == uploading.num_bytes(PreparedSet(original)) == sum(map(len, contents(original).values()))
    listed = storage.list_objects_v2(Bucket=bucket)["Contents"]
    assert {entry["Key"] for entry in listed} == {f"sets/highway/{name}" for name in names}
    prepared = PreparedSet(there.text, verify=True)
    assert_same(everything(prepared), everything(PreparedSet(original)))
    child = os.fork()
    if child == 0:
        same = np.array_equal(
            prepared.read_moments(prepared.scenes[2]), PreparedSet(original).read_moments(prepared.scenes[2])
        )
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert upload(PreparedSet(original), there, sent.append) == 0


def test_a_set_that_grew_gets_what_is_new_and_the_description_goes_last(bucket, tmp_path, monkeypatch):
    there = Address(f"s3://{bucket}/set")
    upload(fill(tmp_path / "set", videos=range(2)), there, lambda count: None)
    before = {path.name for path in (tmp_path / "set").iterdir()}
    grown, order, put = fill(tmp_path / "set", videos=range(3)), [], uploading._put

    async def noting(path, address):
        order.append(path.name)
        await put(path, address)

    monkeypatch.setattr(uploading, "_put", noting)
    upload(grown, there, lambda count: None)
    fresh = sorted({path.name for path in (tmp_path / "set").iterdir()} - before)
    assert order == [*fresh, "videos.jsonl", "index.jsonl", "index.parquet", "dataset.json"]
    assert len(PreparedSet(there, verify=True).scenes) == 6


def test_an_upload_that_was_stopped_is_no_set_and_goes_on(bucket, original, monkeypatch):
    there, left, put = Address(f"s3://{bucket}/set"), [2], uploading._put

    async def stopping(path, address):
        left[0] -= 1
        if left[0] < 0:
            raise PermissionError("stopped")
        await put(path, address)

    with monkeypatch.context() as patch:
        patch.setattr(uploading, "_put", stopping)
        with pytest.raises(DatasetError, match=r"s3://.*: not allowed \(stopped\); give the credentials"):
            upload(PreparedSet(original), there, lambda count: None)
    with pytest.raises(DatasetError, match=r"expected dataset.json in it, found none"):
        PreparedSet(there)
    assert upload(PreparedSet(original), there, lambda count: None) == len(contents(original)) - 2
    assert len(PreparedSet(there, verify=True).scenes) == 6


def test_another_set_is_never_overwritten(bucket, original, tmp_path):
    there = Address(f"s3://{bucket}/set")
    upload(PreparedSet(original), there, lambda count: None)
    other = fill(tmp_path / "other", videos=range(4, 6))
    with pytest.raises(DatasetError, match=r"found another prepared set of 6 scenes; choose another address"):
        upload(other, there, lambda count: None)
    assert len(PreparedSet(there, verify=True).scenes) == 6


def test_an_address_that_is_not_there(storage, original, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with pytest.raises(DatasetError, match=r"s3://nosuchbucket/set: expected dataset.json in it, found none"):
        PreparedSet("s3://nosuchbucket/set")


def test_prepared_here_and_sent(bucket, footage, tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch)
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "config.yaml").write_text(CONFIG)
    words = [str(footage), "--prompt", "x", "--config", str(tmp_path / "config.yaml"), "--out", f"s3://{bucket}/set"]
    with pytest.raises(UserError, match=r"--out s3://.*/set: expected --local DIR too"):
        prepare.main(words)
    words += ["--local", str(tmp_path / "local")]
    prepare.main(words)
    prepare.main(words)
    shown = capsys.readouterr().out
    assert f"s3://{bucket}/set holds the same set; files uploaded: 6." in shown and "files uploaded: 0." in shown
    assert_same(everything(PreparedSet(f"s3://{bucket}/set")), everything(PreparedSet(tmp_path / "local")))


def test_places_that_cannot_be_meant(tmp_path):
    words = ["v", "--config", "c.yaml"]
    with pytest.raises(UserError, match=r"--local: expected an address at --out, found the folder out"):
        prepare.parse_arguments([*words, "--out", "out", "--local", "x"])
    with pytest.raises(DatasetError, match=r"https://host/set: expected an address that can be written, .*found http"):
        prepare.parse_arguments([*words, "--out", "https://host/set", "--local", "x"])
