"""Files from strangers: configs, plans, records, prepared folders. Each is answered with one clear message."""

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
import torch
from safetensors.torch import save_file

from ldm.callbacks.motion import _begin
from ldm.config import ConfigError, check, load_config
from ldm.config.schema import trusting
from ldm.data.preparing.preparation import EncodingSettings, Preparation
from ldm.data.shards import PreparedSet
from ldm.data.shards.index import DATASET_FILE, EMPTY_FILE, INDEX_FILE, DatasetError
from ldm.data.stream import StreamDataModule
from ldm.errors import UserError
from ldm.evaluation.look_judge import METADATA_KEY, load_style_classifier
from ldm.experiments.comparison import Comparison, read_plan_file
from ldm.files import parse_json
from ldm.runs.arguments import parse_arguments
from ldm.runs.folder import check_paths, plan_run
from ldm.sampling.record import read_record
from scripts.dev.fuzz_inputs import SHARD, info_of, prepared, read_index, read_shard, records

NUMBERS = ", ".join("*a" for _ in range(9))
LAUGHS = "".join(
    f"{one}: &{one} [{NUMBERS.replace('a', other)}]\n" for other, one in zip("abcdef", "bcdefg", strict=True)
)
DOUBLING = "data: {x0: " + "y" * 50 + "".join(f", x{i + 1}: '${{data.x{i}}}${{data.x{i}}}'" for i in range(30)) + "}"
REPEATED = "model: {target: ldm.modules.unet.UNetModel, params: {num_res_blocks: 1000000000}}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: " + b"[" * 200_000, "line 1: nested deeper than 48"),
        (b"a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + LAUGHS.encode(), "more than 10,000 values, those of aliases counted"),
        (b"model: &a [*a]", r"\*a is inside itself"),
        (b"data: &a {x: 1}\nmodel: &b {<<: [" + b",".join([b"*a"] * 20_000) + b"]}", "more than 10,000 values"),
        (b"model: !!python/object/apply:os.system [id]", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        (b"model: !!timestamp x", "the tag 'tag:yaml.org,2002:timestamp'; only plain values are read"),
        (b"model: 0x_", "not readable as YAML: invalid literal"),
        (b"model: " + b"9" * 5000, "a number of 5,000 digits"),
        (b"model: " + b"1:0" * 4000, "a number of 12,000 digits"),
        (b"model: 1\nmodel: 2", "found duplicate key model"),
        (b"model: \xff\xfe\xfd", "not readable as YAML: 'utf-8' codec"),
        (b"model: 1\0", "not readable as YAML"),
        (b"true", "not readable as YAML: Invalid loaded object type: bool"),
        (b"# " + b"x" * 2**20, "expected at most 1,048,576 bytes, found more"),
        (b"model: ${oc.env:HOME}", r"line 1: '\${oc.env:HOME}': an untrusted config may only refer .*--trust-config"),
        (b"model: {x: '${oc.decode:${oc.env:HOME}}'}", "line 1: .* an untrusted config may only refer to other values"),
        (b"model: '" + b"${" * 4000 + b"'", "an untrusted config may only refer to other values"),
        (DOUBLING.encode(), r"data.x\d+: references that grow to more than 100,000"),
        (b"data: {a: '${data.b}', b: '${data.a}'}", "more than 16 references from one"),
        (b"data: {target: subprocess.Popen, params: {args: [touch]}}", "found 'subprocess.Popen'; nothing was built"),
        (
            b"data: {target: ldm.data.shards.writer.ShardWriter, params: {path: x, name: y}}",
            "ShardWriter'; nothing was",
        ),
        (b"data: {target: torch.utils.cpp_extension.BuildExtension}", "BuildExtension'; nothing was built"),
        (b"lightning: {logger: {target: pytorch_lightning.loggers.MLFlowLogger}}", "MLFlowLogger'; nothing was built"),
        (REPEATED.encode(), "num_res_blocks: expected at most 256, found 1000000000"),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else "",
)
def test_configs(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    begin = time.process_time()
    with pytest.raises(ConfigError, match=message):
        check(load_config([path]))
    assert time.process_time() - begin < 5


def test_a_module_that_is_not_known_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass A: pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "config.yaml").write_text("data: {target: evil.A}")
    with pytest.raises(ConfigError, match=r"found 'evil.A'; nothing was built. Give --trust-config"):
        check(load_config([tmp_path / "config.yaml"]))
    assert not (tmp_path / "ran").exists()
    with trusting():
        check(load_config([tmp_path / "config.yaml"]))
    assert (tmp_path / "ran").exists()


def test_trust_opens_resolvers_too(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "42")
    (tmp_path / "config.yaml").write_text("data: {params: {seed: '${oc.env:SECRET}'}}")
    with trusting():
        assert load_config([tmp_path / "config.yaml"]).data.params.seed == "42"
    with pytest.raises(ConfigError, match="an untrusted config may only refer to other values"):
        load_config([tmp_path / "config.yaml"])


def test_an_override_is_yaml_too():
    with pytest.raises(ConfigError, match=r"the override 'model=.* is not readable as YAML: line 1: nested deeper"):
        load_config([], ["model=" + "[" * 200_000])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("base: [--trust-config]\ncolumns: {a: b}\nruns: {x: []}", "base: expected paths of configs, found '--t"),
        ("base: [a.yaml]\ncolumns: {a: b}\nruns: {x: [--logdir=/etc]}", "x: expected overrides .* found '--logdir="),
        ("base: [a.yaml]\noverrides: [-t]\ncolumns: {a: b}\nruns: {x: []}", "overrides: expected overrides .*'-t'"),
        ("[" * 200_000, "expected YAML, found other content .*nested deeper than 48"),
    ],
)
def test_plans_cannot_slip_flags_into_a_command(tmp_path, words, message):
    (tmp_path / "plan.yaml").write_text(words)
    with pytest.raises(UserError, match=message):
        Comparison.from_mapping(read_plan_file(tmp_path / "plan.yaml"), "plan.yaml")


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "a/.."])
def test_a_run_is_called_something_in_its_folder(tmp_path, name):
    (tmp_path / "a.yaml").write_text("model: {}")
    with pytest.raises(UserError, match="expected part of a folder's name, found"):
        plan_run(parse_arguments(["-b", str(tmp_path / "a.yaml"), "-n", name, "-l", str(tmp_path)]))


def test_nothing_of_a_config_is_written_outside_the_run_folder(tmp_path):
    class Saver:
        dirpath, filename = str(tmp_path / "run" / "checkpoints"), "last"

    run = tmp_path / "run"
    check_paths(run, None, [Saver()])
    Saver.filename = "../../escaped"
    with pytest.raises(UserError, match=r"Saver.filename: expected a path in the run folder .*escaped.*--trust"):
        check_paths(run, None, [Saver()])
    Saver.dirpath = "/etc"
    with pytest.raises(UserError, match=r"Saver.dirpath: expected a path in the run folder"):
        check_paths(run, None, [Saver()])
    with trusting():
        check_paths(run, None, [Saver()])


# ---- JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 90 + "1" + "}" * 90, "nested deeper than 64"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ('{"a": 1e999}', "1e999 is out of range"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": "\xed\xa0\x80"}', "codec can't decode"),
        ("9" * 5000, "Exceeds the limit"),
    ],
)
def test_json(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"fps": 8.0', '"fps": NaN', "expected the JSON of a clip, found other content .NaN is not a number"),
        ('"prompt": "a road"', '"prompt": "\\ud800"', "expected the JSON of a clip, .*surrogates not allowed"),
        ('"seeds": [3]', '"seeds": [-3]', "batch.seeds: expected whole numbers from 0"),
        ('"threads": 2', '"threads": 100000', "machine.threads: expected 1 to 4096, found 100000"),
        ('"init_image"', '"evil"', "given.evil: expected one of init_image"),
    ],
)
def test_records(tmp_path, old, new, message):
    text = records()[0].decode()
    assert old in text
    (tmp_path / "clip.json").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_record(tmp_path / "clip.json")


# ---- prepared folders


def lines(**changes) -> bytes:
    """The index, with other values in its first line."""
    first, second = prepared()[INDEX_FILE].splitlines()
    return json.dumps(json.loads(first) | changes).encode() + b"\n" + second + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(shard="../../../etc/passwd"), "line 1 is no scene .shard: found '../../../etc/passwd'"),
        (lines(shard="/dev/zero"), "shard: found '/dev/zero'"),
        (lines(key="../x"), "key: found '../x'"),
        (lines(num_frames=10**12), "the line of scene scene0 contradicts itself"),
        (lines(num_frames=-3), "num_frames: found '-3'"),
        (lines(num_frames=2.0), "num_frames: found '2.0'"),
        (lines(start=True), "start: found 'True'"),
        (lines(fps=float("nan")), "NaN is not a number"),
        (lines(fps=0), "fps: found '0'"),
        (lines(latents=[512, 10**15, 0]), "is cut short: expected at least 1000000000000512 bytes"),
        (lines(latents=[-512, 100, 0]), "a span has whole numbers from 0"),
        (lines(latents=[1, 2]), "a span is offset, length and crc32"),
        (lines(captions=["\ud800", "b"]), "surrogates not allowed"),
        (lines(captions="ab"), "captions: found 'ab'"),
        (lines(captions=[]), "captions: found"),
        (lines(frames_crc32="zz"), "frames_crc32: found 'zz'"),
        (lines(notes={"a": eval("[" * 80 + "]" * 80)}), "line 1 is no scene .nested deeper than 64"),
        (lines(extra=1), "unexpected keyword argument 'extra'"),
        (b"[" * 100_000, "line 1 is no scene"),
        (prepared()[INDEX_FILE].replace(b"}\n{", b"},{"), "line 1 is no scene .Extra data"),
        (b'{"key": "a", "key": "b"}\n', "the key 'key' occurs twice"),
        (prepared()[INDEX_FILE].replace(b"a road", b"a \xffoad"), "codec can't decode"),
    ],
)
def test_indexes(tmp_path, content, message):
    with pytest.raises(DatasetError, match=message):
        read_index(content, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moments_shape": [2**32, 2**32, 2]}, "moments_shape: expected 3 whole numbers from 1 to 65536"),
        ({"moments_shape": [65536, 65536, 65536]}, "moments_shape: expected 3 whole numbers"),
        ({"moments_shape": [3, 2, 2]}, "moments_shape: expected an even number of channels"),
        ({"context_shape": [0, 3]}, "context_shape: expected 2 whole numbers"),
        ({"context_shape": [200, 300]}, "the embedding of the empty prompt is missing or damaged"),
        ({"fps": -1}, "fps: expected a number above 0, found -1"),
        ({"first_stage": {}}, "first_stage: expected a string"),
        ({"num_scenes": -1}, "num_scenes: expected a whole number from 0"),
        ({"size": "big"}, "size: expected 2 whole numbers"),
        ({"scale_factor": float("inf")}, "Infinity is not a number"),
    ],
)
def test_dataset_files(tmp_path, changes, message):
    for name, content in prepared().items():
        (tmp_path / name).write_bytes(content)
    values = json.loads((tmp_path / DATASET_FILE).read_text()) | changes
    (tmp_path / DATASET_FILE).write_text(json.dumps(values))
    with pytest.raises(DatasetError, match=message):
        PreparedSet(tmp_path)


def test_an_empty_prompt_that_is_a_pickle(tmp_path):
    described = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    content = b"\x93NUMPY\x01\x00\x76\x00" + described.ljust(117) + b"\n"
    files = {**prepared(), EMPTY_FILE: content + pickle.dumps(print)}
    for name, written in {**files, DATASET_FILE: info_of(files).to_json().encode()}.items():
        (tmp_path / name).write_bytes(written)
    with pytest.raises(DatasetError, match=r"found empty.npy with object of shape"):
        PreparedSet(tmp_path)


def header(kind: bytes, name: str = "scene0.latents.npy", size: int | None = None, target: str = "") -> bytes:
    """A block of an archive that stands where the latents' should."""
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    found.size = json.loads(prepared()[INDEX_FILE].splitlines()[0])["latents"][1] if size is None else size
    return found.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (header(tarfile.SYMTYPE, target="/etc/passwd", size=0), "something that is no plain file .kind b'2'"),
        (header(tarfile.LNKTYPE, target="../x"), "something that is no plain file .kind b'1'"),
        (header(tarfile.CHRTYPE), "something that is no plain file .kind b'3'"),
        (header(tarfile.REGTYPE, "../../etc/cron.d/x"), "'../../etc/cron.d/x' in the place of scene0.latents.npy"),
        (header(tarfile.REGTYPE, size=8**11 - 1), "with 8,589,934,591 bytes in the archive"),
        (bytes(512), "no header of an archive before scene0.latents.npy"),
    ],
)
def test_archives(tmp_path, block, message):
    content = prepared()[SHARD]
    start = json.loads(prepared()[INDEX_FILE].splitlines()[0])["latents"][0]
    with pytest.raises(DatasetError, match=message):
        read_shard(content[: start - 512] + block + content[start:], tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"'descr': '<f2'", b"'descr': '|O' ", "latents.npy with object of shape .3, 4, 2, 2., not float16"),
        (b"'shape': (3, 4, 2, 2)", b"'shape': (9, 9, 9, 9)", "of shape .9, 9, 9, 9., not float16 of .3, 4, 2, 2."),
        (b"'fortran_order': False", b"'fortran_order': True ", "latents.npy with float16, by columns, of shape"),
        (b"\x93NUMPY\x01", b"\x93NUMPY\x03", "latents.npy with None of shape"),
        (b"{'descr'", b"__import", "latents.npy without the header of an array"),
    ],
)
def test_arrays(tmp_path, old, new, message):
    content = prepared()[SHARD]
    assert old in content and len(old) == len(new)
    with pytest.raises(DatasetError, match=message):
        read_shard(content.replace(old, new), tmp_path)


def test_a_shard_that_is_a_pipe_does_not_hang(tmp_path):
    for name, content in prepared().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / SHARD).unlink()
    os.mkfifo(tmp_path / SHARD)
    with pytest.raises(DatasetError, match="the shard is missing"):
        PreparedSet(tmp_path)


def test_a_note_of_a_half_prepared_folder_names_no_other_file(tmp_path):
    settings = EncodingSettings("a" * 64, "b" * 64, 1.0, 10.0, [64, 64], 5)
    victim = tmp_path / "victim.tar"
    victim.touch()
    work = tmp_path / "out" / ".unfinished"
    work.mkdir(parents=True)
    video = {"source": "a", "sha256": "../../victim", "captions": ["a"], "dropped": []}
    (work / "x.json").write_text(json.dumps({"video": video, "scenes": []}))
    with pytest.raises(DatasetError, match=r"x.json: corrupted, .* .sha256: found '../../victim'"):
        Preparation(tmp_path / "out", settings)
    assert victim.exists()


def test_sound_files_are_still_read(tmp_path):
    for name, content in prepared().items():
        (tmp_path / name).write_bytes(content)
    found = PreparedSet(tmp_path, verify=True)
    assert np.array_equal(found.read_moments(found.scenes[0]), np.ones((3, 4, 2, 2), np.float16))
    assert found.info.index_crc32 == zlib.crc32(prepared()[INDEX_FILE])
    assert replace(found.info, num_scenes=2) == found.info and Path(tmp_path / SHARD).is_file()


def test_the_position_of_a_checkpoint_is_a_number():
    data = StreamDataModule(1, 0, list)
    for value in (-1, 2.5, True, None, "3"):
        with pytest.raises(UserError, match="position in the data: expected a number from 0"):
            data.load_state_dict({"consumed": value})
    data.load_state_dict({"consumed": 7})
    assert data.consumed == 7


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"settings": {}}', '{"settings": {}, "occasions": [3]}', "1"])
def test_the_record_of_a_run_is_one(tmp_path, text):
    (tmp_path / "motion.json").write_text(text)
    with pytest.raises(UserError, match=r"motion.json: expected a record of this callback, found something else"):
        _begin(tmp_path / "motion.json", {}, 3)


@pytest.mark.parametrize(
    "changes", [{"widths": [10**9]}, {"widths": [8] * 100}, {"widths": [-1]}, {"looks": ["a"] * 9999}]
)
def test_a_judge_is_small(tmp_path, changes):
    words = {"looks": ["a", "b"], "accuracy": 1.0, "accuracy_damaged": 1.0, "steps": 1, "widths": [8, 8]} | changes
    save_file({"x": torch.ones(2)}, tmp_path / "judge.safetensors", {METADATA_KEY: json.dumps(words)})
    with pytest.raises(UserError, match=r"found one whose tensors and metadata do not match .\d+ looks, widths"):
        load_style_classifier(tmp_path / "judge.safetensors")
