"""What a run is: its config, its data, the weights it began with, versions and git revision. They are written to
`run.json` in the run folder, and a run that is taken up again has to be the same."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ldm.data.shards.index import DATASET_FILE, read_info
from ldm.errors import UserError
from ldm.files import parse_json, write_atomically
from ldm.sampling.record import hash_weights

log = logging.getLogger(__name__)

RECORD = "run.json"
ALLOWED = ("config", "data", "model")  # what --allow takes
PACKAGES = ("torch", "pytorch-lightning", "numpy", "torchao", "triton")
ROOT = Path(__file__).parents[2]
ENDS = 2**20  # bytes at both ends of a video that stand for all of it

# What of a config decides on the weights; the rest says where, for how long, and what is shown of it.
TRAINER = (
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision", "limit_train_batches",
    "overfit_batches",
)  # fmt: skip
OBSERVERS = ("last_checkpoint", "memory", "plan", "learning_rates", "data_wait", "progress", "samples")
PLACES = ("root", "image_root", "videos")  # of the data: what lies there is compared, not how it is called
READING = ("num_workers", "verify")


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what of a config has changed that decides on the weights; files are compared by their contents."""
    return _differences(dict(_significant(before)), dict(_significant(now)))


def data_identity(data: Any, params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What lies at the paths that a data module is given: prepared folders by their `dataset.json`, which has the
    checksum of the whole index, other files by names, sizes and both ends."""
    found = {}
    for name, value in params.items():
        places = [value] if isinstance(value, str) else value
        if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
            continue
        paths = [Path(place) for place in places]
        if len(paths) == 1 and (paths[0] / DATASET_FILE).is_file():
            found[name] = asdict(read_info(paths[0]))
        elif name == "root" and hasattr(data, "info"):  # elsewhere than in a folder
            found[name] = asdict(data.info)
        elif paths and all(path.exists() for path in paths):
            found[name] = _files(paths)
    return found


def model_identity(model: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The weights that a `model` section begins with: place in the config -> path, bytes, time of change, sha256.

    before: as it was recorded; files that look the same are not read again, and those that are gone count as the same.
    """
    found = {}
    for place, path in weight_paths(model):
        was = (before or {}).get(place)
        if was is not None and was["path"] == str(path) and (not path.exists() or _looks(path) == _looks_of(was)):
            found[place] = was
        else:
            found[place] = {**_looks(path), **hash_weights(path)}
    return found


def weight_paths(node: Any, place: str = "model") -> Iterator[tuple[str, Path]]:
    """Every `ckpt_path` in a config, by its place."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "ckpt_path" and value is not None:
                yield f"{place}.{key}", Path(value)
            else:
                yield from weight_paths(value, f"{place}.{key}")


def taken_from(node: Any, checkpoint: Path, unchanged: Mapping[str, Path], place: str = "model") -> Any:
    """A `model` section that reads from a run's own checkpoint what it once began with and what is gone since."""
    if not isinstance(node, Mapping):
        return node
    found = {}
    for key, value in node.items():
        where = f"{place}.{key}"
        is_gone = key == "ckpt_path" and value is not None and unchanged.get(where) == Path(value)
        if is_gone and not Path(value).exists():
            log.info("%s: %s is gone; its weights are taken from %s", where, value, checkpoint)
            found[key] = str(checkpoint)
        else:
            found[key] = taken_from(value, checkpoint, unchanged, where)
    return found


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `run.json` says; None for a run of earlier versions, which have none."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = parse_json(path.read_bytes())
        sections = [record[name] for name in ("config", *ALLOWED)]
        if not all(isinstance(section, dict) for section in sections) or not isinstance(record["sessions"], list):
            raise ValueError("expected mappings and a list of sessions")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected what main.py wrote of the run, found something else ({error}); put it back, or take it "
            "away if you know that data and model are the same"
        ) from None
    return record


def allow(kind: str, changes: Sequence[str], allowed: Collection[str], folder: Path) -> list[str]:
    """The changes, if they are allowed; raises `UserError` that shows them otherwise."""
    if not changes or kind in allowed:
        for change in changes:
            log.warning("%s changed: %s", kind, change)
        return list(changes)
    what = {"config": "config", "data": "data", "model": "base model"}[kind]
    raise UserError(
        f"-r {folder}: expected the {what} that the run has been trained with, found another: {'; '.join(changes)}. "
        f"Repeat what it was, begin a run of its own, or give --allow {kind} if this one shall go on changed"
    )


def check_record(
    folder: Path, record: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]], allowed: Collection[str]
) -> list[str]:
    """What has changed in data and model since a run's record; raises `UserError` for what is not allowed."""
    changes = allow("data", _differences(_flat(record["data"]), _flat(now["data"])), allowed, folder)
    weights = ({place: file["sha256"] for place, file in each["model"].items()} for each in (record, now))
    changes += allow("model", _differences(*weights), allowed, folder)
    if record["sessions"]:
        was, found = record["sessions"][-1].get("versions", {}), versions()
        for name in sorted(set(was) & set(found)):
            if was[name] != found[name]:
                log.warning("%s was %s, now %s: steps may differ in their last digits", name, was[name], found[name])
    return changes


def write_record(
    folder: Path, identity: Mapping[str, Any], session: Mapping[str, Any], record: Mapping[str, Any] | None
) -> None:
    """Write `run.json`: config, data and model as they are now, and one more session."""
    sessions = [*(record["sessions"] if record else []), {**session, "versions": versions(), **_place()}]
    text = json.dumps({**identity, "sessions": sessions}, indent=1, ensure_ascii=False, default=str)
    write_atomically(folder / RECORD, text + "\n")


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> dict[str, Any] | None:
    """The commit of this checkout and whether files differ from it; None where there is no git or no checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        head, status = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": head.stdout.strip(), "changed": bool(status.stdout.strip())}


def _place() -> dict[str, Any]:
    cards = [torch.cuda.get_device_name(card) for card in range(torch.cuda.device_count())]
    return {"git": git_revision(), "machine": {"name": platform.node(), "cards": cards}}


def _significant(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in _flat({section: config.get(section) or {} for section in ("model", "data")}).items():
        parts = name.split(".")
        if parts[-1] != "ckpt_path" and not (parts[:2] == ["data", "params"] and parts[2] in (*PLACES, *READING)):
            yield name, value
    lightning = config.get("lightning") or {}
    trainer = lightning.get("trainer") or {}
    yield from _flat({"lightning.trainer": {name: trainer[name] for name in TRAINER if name in trainer}}).items()
    callbacks = {name: node for name, node in (lightning.get("callbacks") or {}).items() if name not in OBSERVERS}
    yield from _flat({"lightning.callbacks": callbacks}).items()


def _flat(tree: Any, place: str = "") -> dict[str, Any]:
    """Dotted name -> value, lists as values."""
    if not isinstance(tree, Mapping) or not tree:
        return {place: tree} if place and tree != {} else {}
    return {
        name: value for key, part in tree.items()
        for name, value in _flat(part, f"{place}.{key}" if place else str(key)).items()
    }  # fmt: skip


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    absent = object()
    return [
        f"{name} was {_shown(before, name)}, now {_shown(now, name)}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name, absent) != now.get(name, absent)
    ]


def _shown(values: Mapping[str, Any], name: str) -> str:
    return str(values[name])[:60] if name in values else "not there"


def _files(paths: Sequence[Path]) -> dict[str, Any]:
    """How many files, their bytes, and one checksum of their names, sizes and ends."""
    digest, count, total = hashlib.sha256(), 0, 0
    for path in paths:
        for file in sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]:
            size = file.stat().st_size
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
            with file.open("rb") as opened:
                digest.update(opened.read(ENDS))
                opened.seek(max(0, size - ENDS))
                digest.update(opened.read(ENDS))
            count, total = count + 1, total + size
    return {"files": count, "bytes": total, "sha256": digest.hexdigest()}


def _looks(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"bytes": None, "modified": None}
    status = os.stat(path)
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


def _looks_of(file: Mapping[str, Any]) -> dict[str, Any] | None:
    return {name: file.get(name) for name in ("bytes", "modified")} if file.get("bytes") is not None else None
