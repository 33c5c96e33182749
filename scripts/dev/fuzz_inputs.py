"""What `fuzz.py` feeds to which reader: valid files, changed byte by byte, and generated ones that lie.

A reader takes the content of one file; the files beside it are sound and, where checksums are known, agree with it:
the code behind the checks is reached too.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from ldm.checkpoint import outline_unet, read_checkpoint, unet_node
from ldm.config import check, load_config
from ldm.data.preparing.sources import read_table
from ldm.data.shards import PreparedSet
from ldm.data.shards.index import DATASET_FILE, EMPTY_FILE, INDEX_FILE, SCHEMA_VERSION, DatasetInfo, SceneEntry
from ldm.data.shards.writer import ShardWriter, npy_bytes
from ldm.sampling.given_frames import read_picture
from ldm.sampling.prompts import odd_part, prompts_in, read_schedule
from ldm.sampling.record import read_record

ROOT = Path(__file__).resolve().parents[2]
SHARD = "shard-000000.tar"
MOST = 65_536  # bytes of an input
NUM_FRAMES = 40  # of the clip that a schedule is for
SCHEDULES = [b"0: dawn road | 20: night road", b"2001: a space odyssey"]
TABLES = [b'file,caption\na.mp4,a road\nb.mp4,"a, wood"\n']

Inputs = st.SearchStrategy[bytes]

# Values where others are meant.
LIES = st.sampled_from(
    [None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 1e308, -0.5, float("nan"), float("inf"), "", "..",
     "../../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[31m", "<script>", "${oc.env:HOME}", "x" * 3000, [], {}, [[]],
     {"a": {}}, [2**40, 2**40, 2**40], [-1, 2, 3], [0, 10**12, 0], "0:", "|"]
)  # fmt: skip
YAML_LIES = [
    "!!python/object/apply:os.system [id]", "!!timestamp x", "&a [*a]", "{<<: *a}", "0x_", "1:2:3:4", "${model}",
    "${oc.env:HOME}", "${.params}", "???", "[" * 60, "{target: os.system}", "- 1", "*a", "? x", "|\n  x", "1e999",
    "{target: ldm.modules.unet.UNetModel, params: {num_res_blocks: 999999999}}", "'\\ud800'", "\"\\udcff\"", "\t", "~",
    ".nan",
]  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """Something that reads files. read: content, and a folder to work in. samples: sound contents."""

    name: str
    read: Callable[[bytes, Path], object]
    samples: Callable[[], list[bytes]]
    inputs: Inputs


# ---- a prepared folder


@cache
def prepared() -> Mapping[str, bytes]:
    """The files of a small prepared folder."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / SHARD
        about = {"source": "a.mp4", "start": 0, "fps": 10.0, "captions": ["a road", "a wood"]}
        with ShardWriter(path, SHARD) as shard:
            entries = [
                shard.add(
                    f"scene{number}", {**about, "notes": {"look": "night"}}, np.ones((3, 4, 2, 2), np.float16),
                    [np.ones((2, 3), np.float16)] * 2,
                )
                for number in range(2)
            ]  # fmt: skip
        files = {SHARD: path.read_bytes(), EMPTY_FILE: npy_bytes(np.zeros((2, 3), np.float16))}
    files[INDEX_FILE] = "".join(entry.to_line() for entry in entries).encode()
    files[DATASET_FILE] = info_of(files).to_json().encode()
    return files


def info_of(files: Mapping[str, bytes]) -> DatasetInfo:
    """What `dataset.json` says of these files."""
    return DatasetInfo(
        SCHEMA_VERSION, "a" * 64, "b" * 64, 0.18215, 10.0, [16, 16], 2, [4, 2, 2], [2, 3],
        zlib.crc32(files[EMPTY_FILE]), 1, 2, 6, zlib.crc32(files[INDEX_FILE]),
    )  # fmt: skip


def read_set(files: Mapping[str, bytes], folder: Path) -> None:
    """Open a prepared folder and read all of it."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    found = PreparedSet(folder, verify=True)
    for scene in found.scenes:
        found.read_moments(scene)
        found.read_context(scene)


def read_index(content: bytes, folder: Path) -> None:
    """`index.jsonl`, which `dataset.json` was written for."""
    files = {**prepared(), INDEX_FILE: content}
    read_set({**files, DATASET_FILE: info_of(files).to_json().encode()}, folder)


def read_info(content: bytes, folder: Path) -> None:
    """`dataset.json`."""
    read_set({**prepared(), DATASET_FILE: content}, folder)


def read_shard(content: bytes, folder: Path) -> None:
    """A shard, whose checksums the index has."""
    lines = []
    for line in prepared()[INDEX_FILE].splitlines():
        entry = asdict(SceneEntry.from_line(line))
        spans = [entry["latents"], *entry["contexts"]]
        spans = [[first, length, zlib.crc32(content[first : first + length])] for first, length, _ in spans]
        first, length, _ = spans[0]
        frames = content[first : first + length][-3 * 32 :]
        crcs = "".join(f"{zlib.crc32(frames[at : at + 32]):08x}" for at in range(0, 96, 32))
        lines.append(json.dumps({**entry, "latents": spans[0], "contexts": spans[1:], "frames_crc32": crcs}) + "\n")
    files = {**prepared(), SHARD: content, INDEX_FILE: "".join(lines).encode()}
    read_set({**files, DATASET_FILE: info_of(files).to_json().encode()}, folder)


# ---- the other readers


def read_weights(content: bytes, folder: Path) -> None:
    """A checkpoint, and the network that its shapes or its config describe."""
    path = folder / "model.ckpt"
    path.write_bytes(content)
    outline_unet(unet_node(read_checkpoint(path)))


def read_prompt(content: bytes, folder: Path) -> None:
    """A prompt, plain or a schedule."""
    prompt = content.decode("utf-8", "replace")
    odd_part(prompt)
    prompts_in(prompt, NUM_FRAMES)
    if (schedule := read_schedule(prompt, NUM_FRAMES)) is not None:
        shares = schedule.shares(range(NUM_FRAMES))
        assert torch.allclose(shares.sum(1), torch.ones(NUM_FRAMES))


def read_config(content: bytes, folder: Path) -> None:
    """A config."""
    path = folder / "config.yaml"
    path.write_bytes(content)
    check(load_config([path]))


def read_json(content: bytes, folder: Path) -> None:
    """The record of a clip."""
    path = folder / "clip.json"
    path.write_bytes(content)
    read_record(path)


def read_captions(content: bytes, folder: Path) -> None:
    """A table of captions."""
    path = folder / "captions.csv"
    path.write_bytes(content)
    read_table(path)


def read_image(content: bytes, folder: Path) -> None:
    """A picture."""
    path = folder / "picture"
    path.write_bytes(content)
    read_picture(path)


def checkpoints() -> list[bytes]:
    """A zip, a file from before PyTorch 1.6, a safetensors file; the last of them with a config."""
    state = {"time_embed.0.weight": torch.ones(4, 2), "out.2.bias": torch.ones(4)}
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    unet = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, "num_heads": 2}
    unet |= {"attention_resolutions": [2], "channel_mult": [1, 2], "context_dim": 16}
    words = {"model": {"params": {"unet_config": {"target": "ldm.modules.unet.UNetModel", "params": unet}}}}
    found = []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        buffer = io.BytesIO()
        torch.save({"state_dict": state, "config": words, "epoch": 3}, buffer, **options)
        found.append(buffer.getvalue())
    return [*found, save(state, {"config": json.dumps(words)})]


def configs() -> list[bytes]:
    """Some of the project's own."""
    folder = ROOT / "configs"
    return [path.read_bytes() for path in (folder / "video-sd.yaml", *sorted((folder / "tiny").glob("*.yaml")))]


def records() -> list[bytes]:
    """The record of a clip."""
    clip = {"prompt": "a road", "frames": 5, "height": 64, "width": 64, "fps": 8.0, "negative_prompt": "", "steps": 5}
    clip |= {"sampler": "ddim", "scale": 2.0, "eta": 0.0, "motion_scale": 1.0}
    record = {
        "clip": clip, "seed": 3, "batch": {"seeds": [3], "index": 0}, "checkpoint": {"path": "a", "sha256": "b"},
        "config": None, "precision": "full", "decode_chunk": 4, "machine": {"device": "cpu: x", "threads": 2},
        "versions": {"torch": "2"}, "command": "python", "given": {"init_image": {"path": "a.png", "sha256": "c"}},
    }  # fmt: skip
    return [json.dumps(record).encode()]


def pictures() -> list[bytes]:
    """One of every kind."""
    found = []
    for form, mode in (("PNG", "RGBA"), ("JPEG", "RGB"), ("GIF", "P"), ("WEBP", "RGB"), ("TIFF", "I;16"), ("BMP", "L")):
        buffer = io.BytesIO()
        Image.new(mode, (9, 7)).save(buffer, format=form)
        found.append(buffer.getvalue())
    return found


@st.composite
def changed(draw: st.DrawFn, samples: Callable[[], list[bytes]]) -> bytes:
    """A sound file with a few changes."""
    content = bytearray(draw(st.sampled_from(samples())))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 60, 500]))
        how = draw(st.integers(0, 5))
        if how == 0:
            content[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif how == 1:
            content[at : at + length] = b""
        elif how == 2:
            content[at:at] = content[draw(st.integers(0, len(content))) :][: 8 * length]
        elif how == 3:
            content = content[:at]
        elif how == 4:
            content[at : at + 8] = struct.pack("<Q", draw(st.sampled_from([0, 2**31, 2**32 - 1, 2**40, 2**64 - 1])))
        else:
            content[at:at] = draw(st.binary(max_size=40))
    return bytes(content[:MOST])


@st.composite
def lying(draw: st.DrawFn, samples: Callable[[], list[bytes]]) -> bytes:
    """Lines of JSON with values where others are meant."""
    lines = []
    for line in draw(st.sampled_from(samples())).splitlines():
        values = json.loads(line)
        for _ in range(draw(st.integers(0, 2))):
            place, key = values, None
            while isinstance(place, dict | list) and place:
                keys = sorted(place) if isinstance(place, dict) else range(len(place))
                outer, key = place, draw(st.sampled_from(keys))
                place = place[key]
                if draw(st.booleans()):
                    break
            if key is not None:
                outer[key] = deepcopy(draw(LIES))
        if isinstance(values, dict) and draw(st.integers(0, 9)) == 0:
            values[draw(st.sampled_from(["notes", "x", "shard", "config"]))] = deepcopy(draw(LIES))
        lines.append(json.dumps(values))
    return "\n".join(lines).encode("utf-8", "surrogatepass")[:MOST]


@st.composite
def yaml_lies(draw: st.DrawFn) -> bytes:
    """A config with other values in some of its lines."""
    lines = draw(st.sampled_from(configs())).decode().splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        key = lines[at].partition(":")[0]
        value = draw(st.one_of(st.sampled_from(YAML_LIES), LIES.map(repr), st.text(max_size=20)))
        lines[at] = f"{key}: {value}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")[:MOST]


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """A zip, as PyTorch writes it, of a random pickle."""
    names = ["collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "builtins bytearray"]
    names += ["torch FloatTensor", "os system", "_codecs encode", "torch Size", "torch.storage UntypedStorage"]
    names += ["__builtin__ set", "torch._tensor _rebuild_from_type_v2", "torch.nn.parameter Parameter"]
    operations = st.one_of(
        st.sampled_from(names).map(lambda name: pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n"),
        st.sampled_from([b"R", b"b", b"(", b"t", b"\x85", b"\x86", b"\x87", b"}", b"]", b")", b"a", b"e", b"s", b"u"]),
        st.sampled_from([b"Q", b"N", b"\x88", b"\x89", b"\x8f", b"\x81", b"q\0", b"q\1", b"h\0", b"h\1", b"K\2"]),
        st.integers(-(2**31), 2**31 - 1).map(lambda number: pickle.BININT + struct.pack("<i", number)),
        st.sampled_from(["storage", "cpu", "0", "x" * 300]).map(
            lambda text: pickle.BINUNICODE + struct.pack("<I", len(text)) + text.encode()
        ),
        st.binary(max_size=3),
    )
    program = b"\x80\x02" + b"".join(draw(st.lists(operations, max_size=40))) + b"."
    buffer = io.BytesIO()
    how = draw(st.sampled_from([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(buffer, "w", how) as file:
        for name, content in (("data.pkl", program), ("version", b"3\n"), ("data/0", bytes(64))):
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def prompts() -> Inputs:
    """Schedules and what looks like them."""
    words = st.sampled_from(["0", "7", "40", ":", "|", " ", "dawn", "-1", "9" * 20, "\x00", "٣", " " * 400])
    return st.one_of(st.lists(words, max_size=40).map("".join), st.text(max_size=200)).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    )


def _reader(
    name: str, read: Callable[[bytes, Path], object], samples: Callable[[], list[bytes]], *more: Inputs
) -> Reader:
    samples = cache(samples)
    return Reader(name, read, samples, st.one_of(changed(samples), *more, *more))


def indexes() -> list[bytes]:
    """That of the small folder."""
    return [prepared()[INDEX_FILE]]


def infos() -> list[bytes]:
    """Its `dataset.json`, on one line."""
    return [json.dumps(json.loads(prepared()[DATASET_FILE])).encode()]


READERS = {
    reader.name: reader
    for reader in (
        _reader("index", read_index, indexes, lying(indexes)),
        _reader("info", read_info, infos, lying(infos)),
        _reader("shard", read_shard, lambda: [prepared()[SHARD]]),
        _reader("checkpoint", read_weights, checkpoints, pickles()),
        _reader("schedule", read_prompt, lambda: SCHEDULES, prompts()),
        _reader("config", read_config, configs, yaml_lies()),
        _reader("record", read_json, records, lying(records)),
        _reader("captions", read_captions, lambda: TABLES, st.binary(max_size=90)),
        _reader("picture", read_image, pictures),
    )
}
