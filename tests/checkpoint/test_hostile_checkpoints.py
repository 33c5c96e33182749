"""Checkpoints from strangers: nothing in them runs, and nothing they claim is believed before it is compared."""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.callbacks import AtomicCheckpointIO
from ldm.checkpoint import load_unet, read_checkpoint
from ldm.checkpoint.encoders import load_first_stage, load_text_encoder
from ldm.checkpoint.files import CheckpointError, check_header
from ldm.checkpoint.layouts import read_bundle
from ldm.errors import UserError
from tests.tiny_checkpoint import CONFIG, UNET, image_state, write_legacy, write_zip

NAME = "model.diffusion_model.time_embed.0.weight"


def word(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def call(name: str, arguments: bytes) -> bytes:
    """Operations that call something with a tuple of arguments."""
    function = pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n"
    return function + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE


def number(value: int) -> bytes:
    return pickle.LONG1 + bytes([len(packed := pickle.encode_long(value))]) + packed


def storage(count: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    """Operations that refer to the bytes of a tensor."""
    about = word("storage") + b"ctorch\n" + kind.encode() + b"\n" + word(key) + word("cpu") + number(count)
    return pickle.MARK + about + pickle.TUPLE + pickle.BINPERSID


def zipped(program: bytes, how: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """A zip as PyTorch writes it, of a pickle."""
    files = {"data.pkl": b"\x80\x02" + program + b".", "version": b"3\n", "data/0": bytes(64), **more}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as file:
        for name, content in files.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def saved(contents: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


def patched(content: bytes, place: int, value: bytes) -> bytes:
    return content[:place] + value + content[place + len(value) :]


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


SOUND = zipped(b"}")
DIRECTORY = SOUND.rfind(b"PK\x01\x02", 0, SOUND.rfind(b"PK\x05\x06"))
FIRST = SOUND.find(b"PK\x01\x02")
COPIES = (
    pickle.EMPTY_LIST + b"q\0" + pickle.MARK + pickle.NONE * 20_000 + pickle.APPENDS
    + (b"ccollections\nOrderedDict\nh\0\x85R" * 3000) + b"}"
)  # fmt: skip
STRINGS = word("x" * 50_000) + b"q\0" + (b"c_codecs\nencode\nh\0\x85R" * 30_000) + b"}"
TOWER = pickle.NONE + b"q\0h\0\x86" * 60  # each tuple holds the one before twice: 2**60 values to hash
WIDE = torch.ones(9999)
HASHED = pickle.EMPTY_DICT + TOWER + pickle.NONE + pickle.SETITEM
OLD = saved({"state_dict": {NAME: torch.ones(4, 2)}}, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b"<!doctype html>", "found a file that begins with b'<!doctype html>'"),
        (SOUND[:-1], "corrupt or truncated .no zip directory at its end"),
        (SOUND[: len(SOUND) // 2], "corrupt or truncated .no zip directory at its end"),
        (SOUND + b"x", "corrupt or truncated .no zip directory at its end"),
        (patched(SOUND, 0, b"PK\x03\x04" + bytes(26)), "corrupt or truncated"),
        (patched(SOUND, DIRECTORY + 20, struct.pack("<LL", 2**31, 2**31)), "the records of the zip overlap"),
        (patched(SOUND, DIRECTORY + 24, struct.pack("<L", 2**31)), "has two sizes"),
        (patched(SOUND, DIRECTORY + 42, struct.pack("<L", 0)), "records of the zip overlap"),
        (patched(SOUND, len(SOUND) - 12, struct.pack("<H", 60_000)), "corrupt or truncated"),
        (patched(SOUND, len(SOUND) - 10, struct.pack("<L", 2**31)), "a zip directory of 2,147,483,648 bytes"),
        (patched(SOUND, FIRST, b"XX"), "corrupt or truncated .BadZipFile|Bad magic number for central directory"),
        (SOUND.replace(b"archive/version", b"archive/data/0\0"), "corrupt or truncated"),
        (SOUND.replace(b"archive/data/0", b"another/data/0"), "expected one folder in the zip, found 2"),
        (SOUND.replace(b"archive/data.pkl", b"archive/nope.pkl"), "no archive/data.pkl in the zip"),
        (zipped(b"}", zipfile.ZIP_DEFLATED, **{"data/1": bytes(10**7)}), "is compressed"),
        (zipped(b"}", **{"constants.pkl": b"x"}), "a TorchScript program, not weights"),
        (zipped(storage(10**13)), "storage 0 claims 40,000,000,000,000 bytes, found 64 bytes"),
        (zipped(storage(4, key="7")), "storage 7 claims 16 bytes, found no such record"),
        (zipped(storage(-4)), "a storage of -4 values"),
        (zipped(storage(4, "EvilStorage")), "a storage of the type torch.EvilStorage"),
        (zipped(word("x") + pickle.BINPERSID), "a reference to something that is no storage"),
        (zipped(call("builtins bytearray", number(10**11))), "builtins bytearray, which allocates memory"),
        (
            zipped(call("__builtin__ bytearray", number(10**11))),
            "__builtin__ bytearray, which allocates memory",
        ),
        (zipped(call("torch FloatTensor", number(10**11))), "torch FloatTensor, which allocates memory"),
        (zipped(call("torch.storage UntypedStorage", number(10**11))), "a call of torch.storage.UntypedStorage"),
        (zipped(COPIES), "creates more objects than"),
        (zipped(STRINGS), "creates more objects than"),
        (zipped(HASHED), "creates more objects than"),
        (zipped(pickle.EMPTY_SET * 600_000 + b"}"), "creates more objects than a checkpoint of this size"),
        (zipped(b"ccollections\nOrderedDict\nq\0" + b"h\0)R" * 150_000 + b"}"), "creates more objects than"),
        (OLD.replace(b"}", b"}" * 600_000, 1), "creates more objects than"),
        (zipped(pickle.MARK * 9), "expected a dict of tensors|corrupt or truncated"),
        (zipped(b"h\x09"), "corrupt or truncated"),
        (zipped(b"]"), "expected a dict of tensors, found list"),
        (zipped(b"\x95" + bytes(8)), "corrupt or truncated"),
        (zipped(call("os system", word("touch ran"))), "a pickle that names .*system, which may run foreign"),
        (zipped(b"cbuiltins\neval\n" + word("1") + b"\x85R"), "names .*eval, which may run foreign code"),
        (saved(Evil()), "found a pickle that names .*, which may run foreign code. Nothing in it was run"),
        (saved(Evil(), _use_new_zipfile_serialization=False), "names .*, which may run foreign code"),
        (OLD[:-9], "its storages claim 32 bytes, found"),
        (OLD.replace(b"K\x08", b"J\xff\xff\xff\x7f", 1), "its storages claim 8,589,934,588 bytes"),
        (OLD[:60], "corrupt or truncated"),
        (b"\x80\x02" + bytes(200), "corrupt or truncated"),
        (saved({3: torch.ones(2)}), "found a name that is a int at '3'"),
        (saved({NAME: torch.ones(1).expand(10**6, 10**6)}), "that repeats fewer values"),
        (saved({NAME: torch.zeros(10**9, 0)}), "an empty one of shape .1000000000, 0."),
        (saved({NAME: torch.eye(3).to_sparse()}), "sparse, quantised or without"),
        (saved({NAME: torch.empty(10**6, device="meta")}), "sparse, quantised or without values"),
        (saved({NAME: torch.quantize_per_tensor(torch.ones(4), 1, 0, torch.qint8)}), "sparse, quantised"),
        (saved({f"{NAME}{i}": WIDE for i in range(20)}), "which share their values"),
        (saved({"state_dict": [torch.ones(2)]}), "expected 'state_dict' to be a dict of tensors, found list"),
        (saved({"x": torch.ones(2)}), "expected the weights of Stable Diffusion v1"),
        (saved({"state_dict": {NAME: torch.ones(4, 2)}, "scale_factor": torch.ones(5)}), "expected one scale_factor"),
        (saved({"state_dict": {NAME: torch.ones(4, 2)}, "scale_factor": float("nan")}), "expected one scale_factor"),
    ],
)
def test_files(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert len(content) < 2**20
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    assert not (tmp_path / "ran").exists(), "something in it was run"


def test_attributes_of_a_dict_are_not_its_methods(tmp_path):
    state = word("get") + number(5) + pickle.SETITEM + word("items") + number(6) + pickle.SETITEM
    program = call("collections OrderedDict", b"") + pickle.EMPTY_DICT + state + pickle.BUILD
    (tmp_path / "model.ckpt").write_bytes(zipped(program))
    with pytest.raises(CheckpointError, match="found 0 tensors of another model"):
        read_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{" + b" " * 20, "corrupt or truncated"),
        (b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}', "corrupt or truncated"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "corrupt or truncated"),
        (b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}', "corrupt or truncated"),
        (b'{"a":' * 5000, "corrupt or truncated"),
        (b"\xff\xfe{}", "corrupt or truncated"),
    ],
)
def test_safetensors(tmp_path, header, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)
    path.write_bytes(struct.pack("<Q", 2**62) + header + bytes(8))
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        read_checkpoint(path)


def test_a_config_in_metadata_that_is_deep_is_none(tmp_path):
    save_file({NAME: torch.ones(4, 2)}, tmp_path / "a.safetensors", {"config": '{"model":' + "[" * 100_000})
    assert read_checkpoint(tmp_path / "a.safetensors").kind == "compvis"


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet_config", {"num_res_blocks": 10**9}, "num_res_blocks: expected at most 256, found 1000000000"),
        ("unet_config", {"model_channels": 10**12}, "model_channels: expected at most 1,048,576"),
        ("unet_config", {"channel_mult": [1] * 1000}, "channel_mult: expected at most 64 values, found 1,000"),
        ("unet_config", {"channel_mult": [1, 10**9]}, "channel_mult.1: expected at most 1,048,576"),
        ("unet_config", {"model_channels": 32768}, "the tensors in the file are not those of the network"),
        ("first_stage_config", {"ddconfig": {"num_res_blocks": 10**7}}, "res_blocks: expected at most 256"),
        ("cond_stage_config", {"text_config": {"num_hidden_layers": 10**7}}, "layers: expected at most 256"),
        ("cond_stage_config", {"text_config": {"_attn_implementation": "someone/kernel"}}, "_attn_implementation"),
        ("cond_stage_config", {"text_config": {"hidden_size": 65532}}, "the tensors in the file are not those of"),
        ("cond_stage_config", {"text_config": {"hidden_size": 65536}}, "not a multiple of the number of attention"),
    ],
)
def test_configs_inside(tmp_path, part, changes, message):
    config = json.loads(json.dumps(CONFIG))
    config["model"]["params"][part]["params"] |= changes
    torch.save({"state_dict": image_state(), "config": config}, tmp_path / "model.ckpt")
    load = {"unet_config": load_unet, "first_stage_config": load_first_stage, "cond_stage_config": load_text_encoder}
    begin = time.process_time()
    with pytest.raises(UserError, match=message):
        load[part](tmp_path / "model.ckpt")
    assert time.process_time() - begin < 10


def test_a_config_inside_that_grows_when_it_is_copied(tmp_path):
    tree: list = ["x"]
    for _ in range(40):
        tree = [tree, tree]
    torch.save({"state_dict": {NAME: torch.ones(4, 2)}, "config": {"model": {"params": tree}}}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="expected the config of a network, found what is none: nested deeper"):
        _ = read_checkpoint(tmp_path / "model.ckpt").config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: &a [*a]\nweights: {}", "is inside itself"),
        ("model: {}\nweights: {../../x.safetensors: abc}", "names of .safetensors files in this folder"),
        ("model: {}\nweights: {/etc/x.safetensors: abc}", "names of .safetensors files in this folder"),
        ("model: {}\nweights: !!set {a}", "the tag 'tag:yaml.org,2002:set'"),
        ("model: " + "{a: " * 9000, "nested deeper than 48"),
    ],
)
def test_bundles(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "expected JSON, found something else .nested too deeply"),
        ('{"_class_name": "UNet2DConditionModel", "attention_head_dim": 1e999}', "1e999 is out of range"),
        ('{"_class_name": "UNet2DConditionModel", "attention_head_dim": 100000}', "expected one number of attention"),
        ('{"_class_name": "UNet2DConditionModel", "attention_head_dim": true}', "expected one number of attention"),
    ],
)
def test_folders(tmp_path, text, message):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(text)
    save_file({"time_embedding.linear_1.weight": torch.ones(4, 2)}, tmp_path / "unet" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def test_resuming_looks_at_the_header_too(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(zipped(storage(10**13)))
    with pytest.raises(UserError, match="storage 0 claims 40,000,000,000,000 bytes, found 64 bytes"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


def test_sound_files_pass(tmp_path):
    for write, is_zip in ((write_zip, True), (write_legacy, False)):
        assert check_header(write(image_state(), tmp_path / "sound.ckpt")) is is_zip
    state = {"tied": (tied := torch.ones(9)), "again": tied, "half": torch.ones(3, dtype=torch.bfloat16)[1:]}
    contents = {"state_dict": state, "bytes": b"x" * 300, "set": {1, 2}, "generator": torch.get_rng_state()}
    torch.save(contents, tmp_path / "sound.ckpt")
    assert check_header(tmp_path / "sound.ckpt")
    many = {number: {"step": torch.ones(1), "words": [{}]} for number in range(5000)}  # as of optimisers' states
    torch.save({"state": many}, tmp_path / "x")
    assert check_header(tmp_path / "x")
    unet = load_unet(write_zip(image_state(), tmp_path / "sound.ckpt"), UNET)
    assert torch.isfinite(next(unet.parameters())).all()
