"""Clips on disk: the four files of a clip, its record, and what a replay needs.

A record is a plain dict: `clip` (the settings), `given` (path and sha256 of each file of given frames), `seed`, `batch`
(all seeds of the batch, and the index of this one), `checkpoint` (path, sha256), `temporal` and `temporal_decoder`
(those of a separate file, or None), `config` (for a checkpoint without one), `precision`, `compiled`, `decode_chunk`,
`machine`, `versions`, `command`. It contains no date: a replay writes identical files.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, get_type_hints

import numpy as np
import torch
from PIL import Image

from ldm.checkpoint.layouts import bundle_files, is_bundle
from ldm.config.schema import ConfigError, check_values, mapping_at
from ldm.data.preparing.parts import hash_file
from ldm.errors import UserError
from ldm.files import parse_json, replacing, write_atomically
from ldm.sampling.settings import PRECISIONS, ClipSettings, GivenFiles
from ldm.video import contact_sheet, read_metadata, write_gif, write_mp4

SHEET_WIDTH = 4096  # pixels; longer clips take several rows
SHEET_FRAMES = 64  # evenly spaced in longer clips
PACKAGES = ("video-stable-diffusion", "torch", "diffusers", "transformers", "av", "pillow")
MAX_THREADS = 4096
FILE = {"path": str, "sha256": str}
# Every key of a record and its type.
PARTS = {
    "": {
        "clip": Mapping, "given": Mapping, "seed": int, "batch": Mapping, "checkpoint": Mapping,
        "temporal": Mapping | None, "temporal_decoder": Mapping | None,
        "config": Mapping | None, "precision": str, "compiled": bool, "decode_chunk": int, "machine": Mapping,
        "versions": Mapping[str, str], "command": str,
    },
    "clip": get_type_hints(ClipSettings),
    "batch": {"seeds": Sequence[int], "index": int},
    "checkpoint": FILE,
    "machine": {"device": str, "threads": int},
}  # fmt: skip
BESIDE = ("temporal", "temporal_decoder")  # optional files of weights
# Keys that records of earlier versions lack, and their meaning.
SINCE = {
    "": {"given": {}, "temporal": None, "temporal_decoder": None, "compiled": False},
    "clip": {"window": None, "overlap": 0, "known_noise": 0, "interpolate": 1},
}


def open_folder(path: Path) -> None:
    """Create the output folder and check that it is writable, before anything slow; raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--outdir: expected a folder to write to, found {path} ({error.strerror})") from error


def next_number(outdir: Path) -> int:
    """One more than the highest clip number in the folder."""
    numbers = [int(path.stem) for path in outdir.glob("[0-9]*.*") if re.fullmatch(r"[0-9]{5,}", path.stem)]
    return max(numbers, default=-1) + 1


def write_clip(stem: Path, frames: np.ndarray, record: dict[str, Any]) -> None:
    """Write the four files of a clip."""
    fps = record["clip"]["fps"]
    write_gif(stem.with_suffix(".gif"), frames, fps)
    with replacing(stem.with_suffix(".png")) as partial:
        _sheet(frames, record).save(partial, format="PNG")
    write_mp4(stem.with_suffix(".mp4"), frames, fps, record)
    write_atomically(stem.with_suffix(".json"), json.dumps(record, indent=2, sort_keys=True) + "\n")


def _sheet(frames: np.ndarray, record: dict[str, Any]) -> Image.Image:
    shown = np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round().astype(int)
    per_row = max(1, SHEET_WIDTH // frames.shape[2])
    rows = [shown[start : start + per_row] for start in range(0, len(shown), per_row)]
    few = "" if len(shown) == len(frames) else f", {len(shown)} of them shown, evenly spaced"
    label = f"{record['clip']['prompt']}   ({len(frames)} frames{few}, seed {record['seed']})"
    labels = [label, *(f"from frame {row[0] + 1}" for row in rows[1:])]
    return contact_sheet([frames[row] for row in rows], labels)


def read_record(path: Path) -> dict[str, Any]:
    """The record in a JSON or MP4 of `write_clip`, every key checked; raises UserError."""
    if path.suffix.lower() == ".json":
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        try:
            record = parse_json(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: expected the JSON of a clip, found other content ({error})") from error
    else:
        record = read_metadata(path)
    try:
        record = _with_defaults(record)
        _check_record(record)
    except ConfigError as error:
        raise UserError(f"{path}: expected the record of a clip made by txt2vid.py; {error}") from None
    return record


def _with_defaults(record: Any) -> dict[str, Any]:
    record = {**SINCE[""], **mapping_at("record", record)}
    if isinstance(record.get("clip"), Mapping):
        record["clip"] = {**SINCE["clip"], **record["clip"]}
    return record


def _check_record(record: Mapping[str, Any]) -> None:
    for part, kinds in PARTS.items():
        found = mapping_at(part or "record", record[part] if part else record)
        if odd := set(kinds) ^ set(found):
            raise ConfigError(f"{part or 'record'}: expected the keys {', '.join(kinds)}, not {', '.join(sorted(odd))}")
        check_values(found, kinds, part or "record")
    files = {f"given.{kind}": file for kind, file in record["given"].items()}
    for key, file in (files | {name: record[name] for name in BESIDE}).items():
        if key not in BESIDE and key.removeprefix("given.") not in get_type_hints(GivenFiles):
            raise ConfigError(f"{key}: expected one of {', '.join(get_type_hints(GivenFiles))}")
        if file is not None or key not in BESIDE:
            if set(mapping_at(key, file)) != set(FILE):
                raise ConfigError(f"{key}: expected path and sha256, found {file!r}")
            check_values(file, FILE, key)
    seeds, index, threads = record["batch"]["seeds"], record["batch"]["index"], record["machine"]["threads"]
    for key, value, is_valid, expected in (
        ("batch.seeds", seeds, all(0 <= seed < 2**63 for seed in seeds), "whole numbers from 0 to 2^63"),
        ("batch.index", index, 0 <= index < len(seeds), "an index of the seeds"),
        ("seed", record["seed"], record["seed"] in seeds[index : index + 1], "the seed at batch.index"),
        ("precision", record["precision"], record["precision"] in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        ("decode_chunk", record["decode_chunk"], record["decode_chunk"] >= 1, "at least 1"),
        ("machine.threads", threads, 1 <= threads <= MAX_THREADS, f"1 to {MAX_THREADS}"),
    ):
        if not is_valid:
            raise ConfigError(f"{key}: expected {expected}, found {value!r}")


def check_same_weights(record: dict[str, Any], found: Mapping[str, dict[str, str] | None]) -> None:
    """Raise UserError unless the files of weights, `checkpoint` and those `BESIDE` it, are those of the record."""
    for kind, file in found.items():
        wanted = record[kind]
        if (file and file["sha256"]) != (wanted and wanted["sha256"]):
            option, what = f"--{kind.replace('_', '-')}", kind.replace("_", " ")
            path, sha256 = (file["path"], f"sha256 {file['sha256']}") if file else (option, "none")
            was = f"sha256 {wanted['sha256']} ({wanted['path']})" if wanted else "none"
            options = "--ckpt" if record["temporal"] is None else "--base and --temporal"
            options = option if kind == "temporal_decoder" else options
            todo = f"give it with {options}" if wanted else f"leave out {option}"
            raise UserError(f"{path}: expected the {what} of the clip, {was}, found {sha256}; {todo}")


def hash_given(files: GivenFiles) -> dict[str, dict[str, str]]:
    """The `given` of a record."""
    return {kind: {"path": str(path), "sha256": hash_file(path)} for kind, path in asdict(files).items() if path}


def given_files(record: dict[str, Any]) -> GivenFiles:
    """The given files of a record; raises UserError for a missing or changed one."""
    for kind, file in record["given"].items():
        path, option = Path(file["path"]), f"--{kind.replace('_', '-')}"
        if not path.is_file():
            raise UserError(f"{path}: expected the {option} of the clip, found no such file; restore it")
        if (found := hash_file(path)) != file["sha256"]:
            raise UserError(
                f"{path}: expected the {option} of the clip, sha256 {file['sha256']}, found sha256 {found}; restore "
                "the original"
            )
    return GivenFiles(**{kind: Path(file["path"]) for kind, file in record["given"].items()})


def versions() -> dict[str, str]:
    """Versions of Python and of all packages that affect pixels or bytes."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def device_and_threads(device: torch.device) -> dict[str, Any]:
    """The device, and the number of threads, which affects rounding."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": f"{device.type}: {name}", "threads": torch.get_num_threads()}


def replay_notes(record: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Reasons why the bytes of a replay may differ."""
    for name, found in now["versions"].items():
        was = record["versions"].get(name)
        if was != found:
            yield f"made with {name} {was}, replayed with {found}: the bytes may differ"
    if record["machine"] != now["machine"]:
        yield f"made on {record['machine']}, replayed on {now['machine']}: the bytes may differ"


def hash_weights(path: Path | None) -> dict[str, str] | None:
    """Path and sha256 of a file of weights, or of all names and bytes in a folder; None for None.

    Other files in a bundle's folder, such as its README, do not count.
    """
    if path is None:
        return None
    if path.is_file():
        return {"path": str(path), "sha256": hash_file(path)}
    digest = hashlib.sha256()
    files = bundle_files(path) if is_bundle(path) else [entry for entry in path.rglob("*") if entry.is_file()]
    for entry in sorted(files):
        digest.update(entry.relative_to(path).as_posix().encode() + b"\0")
        digest.update(bytes.fromhex(hash_file(entry)))
    return {"path": str(path), "sha256": digest.hexdigest()}
