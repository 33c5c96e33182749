"""The identity of a run: config, data, the weights it started from, versions and git revision.

They are written to `run.json` in the run folder and compared on resume.
"""

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

from ldm.config import ConfigError, callback_nodes, find_target
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

# Trainer arguments that change the weights; the others say where, for how long, and what is logged.
TRAINER = (
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision", "limit_train_batches",
    "overfit_batches",
)  # fmt: skip
LOGGING = ("LearningRateMonitor", "DeviceStatsMonitor")  # callbacks of Lightning that change no weight
PATHS = ("root", "image_root", "videos")  # of the data: contents are compared, not names
READING = ("num_workers", "verify")


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences that change the training, one sentence each; files are compared by their contents elsewhere."""
    return _differences(dict(_significant(before)), dict(_significant(now)))


def data_identity(data: Any, params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Parameter of a data module -> what is at its path.

    Prepared folders by their `dataset.json`, which has the index's checksum; other files by name, size and both ends.
    """
    found = {}
    for name, value in params.items():
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(path, str) for path in values):
            continue
        paths = [Path(path) for path in values]
        if len(paths) == 1 and (paths[0] / DATASET_FILE).is_file():
            found[name] = asdict(read_info(paths[0]))
        elif name == "root" and hasattr(data, "info"):  # remote
            found[name] = asdict(data.info)
        elif paths and all(path.exists() for path in paths):
            found[name] = _files(paths)
    return found


def model_identity(model: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The weights that a `model` section starts from: config key -> path, bytes, modification time, sha256.

    before: the record. Files of the same size and time are not read again; files that are gone count as unchanged.
    """
    found = {}
    for key, path in weight_paths(model):
        was = (before or {}).get(key)
        if was is not None and was["path"] == str(path) and (not path.exists() or _status(path) == _status_of(was)):
            found[key] = was
        else:
            found[key] = {**_status(path), **hash_weights(path)}
    return found


def weight_paths(node: Any, prefix: str = "model") -> Iterator[tuple[str, Path]]:
    """Every `ckpt_path` in a config, with its key."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "ckpt_path" and value is not None:
                yield f"{prefix}.{key}", Path(value)
            else:
                yield from weight_paths(value, f"{prefix}.{key}")


def model_source(model: Mapping[str, Any], saved: Mapping[str, Any], checkpoint: Path | None) -> Any:
    """The `model` section of a resumed run, with weights whose files are gone read from its checkpoint.

    saved: the section that the run was saved with; a path that differs from it stays. checkpoint: None: all stay.
    """
    started_from = dict(weight_paths(saved))

    def replaced(node: Any, prefix: str) -> Any:
        if not isinstance(node, Mapping):
            return node
        found = {}
        for name, value in node.items():
            key = f"{prefix}.{name}"
            is_unchanged = name == "ckpt_path" and value is not None and started_from.get(key) == Path(value)
            if is_unchanged and not Path(value).exists():
                log.info("%s: %s is gone; its weights are taken from %s", key, value, checkpoint)
                found[name] = str(checkpoint)
            else:
                found[name] = replaced(value, key)
        return found

    return model if checkpoint is None else replaced(model, "model")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of `run.json`; None for a run of an earlier version, which has none."""
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
            f"{path}: expected the record that main.py wrote, found something else ({error}); restore it, or delete it "
            "if you know that data and model are unchanged"
        ) from None
    return record


def allow(kind: str, changes: Sequence[str], allowed: Collection[str], folder: Path) -> list[str]:
    """The changes, if they are allowed; otherwise raises `UserError` that lists them."""
    if not changes or kind in allowed:
        for change in changes:
            log.warning("%s changed: %s", kind, change)
        return list(changes)
    what = {"config": "config", "data": "data", "model": "base model"}[kind]
    raise UserError(
        f"-r {folder}: expected the {what} that the run has been trained with, found another: {'; '.join(changes)}. "
        f"Restore it, start a new run, or give --allow {kind} to resume with the change"
    )


def check_record(
    folder: Path, record: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]], allowed: Collection[str]
) -> list[str]:
    """Allowed changes of data and model since the record; raises `UserError` for others, warns of other versions."""
    changes = allow("data", _differences(_flat(record["data"]), _flat(now["data"])), allowed, folder)
    weights = ({key: file["sha256"] for key, file in each["model"].items()} for each in (record, now))
    changes += allow("model", _differences(*weights), allowed, folder)
    if record["sessions"]:
        was, found = record["sessions"][-1].get("versions", {}), versions()
        for name in sorted(set(was) & set(found)):
            if was[name] != found[name]:
                log.warning("%s was %s, now %s: results may differ in the last digits", name, was[name], found[name])
    return changes


def write_record(
    folder: Path, identity: Mapping[str, Any], session: Mapping[str, Any], record: Mapping[str, Any] | None
) -> None:
    """Write `run.json`: config, data and model as they are now, and one more session."""
    sessions = [*(record["sessions"] if record else []), {**session, "versions": versions(), **_machine()}]
    text = json.dumps({**identity, "sessions": sessions}, indent=1, ensure_ascii=False, default=str)
    write_atomically(folder / RECORD, text + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
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
            subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, timeout=10, check=True)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": head.stdout.strip(), "changed": bool(status.stdout.strip())}


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"git": git_revision(), "machine": {"name": platform.node(), "cards": gpus}}


def _significant(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in _flat({section: config.get(section) or {} for section in ("model", "data")}).items():
        parts = name.split(".")
        if parts[-1] != "ckpt_path" and not (parts[:2] == ["data", "params"] and parts[2] in (*PATHS, *READING)):
            yield name, value
    trainer = (config.get("lightning") or {}).get("trainer") or {}
    yield from _flat({"lightning.trainer": {name: trainer[name] for name in TRAINER if name in trainer}}).items()
    for name, node in callback_nodes(config).items():
        key = f"lightning.callbacks.{name}"
        if target := _training_target(node, key):
            yield from _flat({key: {**node, "target": target}}).items()


def _training_target(node: Mapping[str, Any], key: str) -> str | None:
    """The class of a callback that changes the training, None for others; one that cannot be imported may change it."""
    try:
        target = find_target(node, key)
    except ConfigError:
        return str(node.get("target"))
    changes = getattr(target, "changes_training", target.__name__ not in LOGGING)
    return f"{target.__module__}.{target.__qualname__}" if changes else None


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, lists as values."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree} if prefix and tree != {} else {}
    return {
        name: value for key, part in tree.items()
        for name, value in _flat(part, f"{prefix}.{key}" if prefix else str(key)).items()
    }  # fmt: skip


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    absent = object()
    return [
        f"{name} was {_shown(before, name)}, now {_shown(now, name)}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name, absent) != now.get(name, absent)
    ]


def _shown(values: Mapping[str, Any], name: str) -> str:
    return str(values[name])[:60] if name in values else "absent"


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


def _status(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"bytes": None, "modified": None}
    status = os.stat(path)
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


def _status_of(file: Mapping[str, Any]) -> dict[str, Any] | None:
    return {name: file.get(name) for name in ("bytes", "modified")} if file.get("bytes") is not None else None
