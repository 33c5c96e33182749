"""Checkpoint files of every kind -> their contents, without running anything that a file names.

Headers are compared with the file's size first (`checkpoint_header`). Pickles are opened with `weights_only=True`, the
few harmless classes that public checkpoints mention are replaced by stand-ins that do nothing, and anything else is
refused by its name. Tensors stay mapped to the file until they are used, so that opening 4 GB costs neither time nor
memory.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ldm.checkpoint_header import HeaderError, check_old, check_zip
from ldm.errors import UserError

SHOWN_NAMES = 5
MAX_SHARING = 4  # times the size of the file that all its tensors may have


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or whose tensors are not those of the network they are meant for."""


class _Nothing:
    """Stands for a foreign class in a pickle: takes whatever it is given and keeps none of it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _OptimizerState(torch.Tensor):
    """Stands for the quantised tensors of torchao's optimisers, which lie in our own training checkpoints."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError("this tensor stands for an optimiser state that was left on the disk")

    def __setstate__(self, state: Any) -> None:
        pass


# All that a checkpoint may name besides what `weights_only` itself allows (tensors, containers, `_codecs.encode`): the
# public Stable Diffusion files name the Lightning class and some hold numpy scalars, `numpy._core` being numpy 2's
# name of `numpy.core`.
STAND_INS = (
    (_Nothing, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Nothing, "numpy.core.multiarray.scalar"),
    (_Nothing, "numpy._core.multiarray.scalar"),
    (_Nothing, "numpy.dtype"),
    (_OptimizerState, "torchao.optim.subclass_8bit.OptimState8bit"),
    (_OptimizerState, "torchao.optim.subclass_4bit.OptimState4bit"),
    (_OptimizerState, "torchao.optim.subclass_fp8.OptimStateFp8"),
)


def read_file(path: Path) -> Mapping[str, Any]:
    """The dict in a PyTorch or safetensors file, told apart by content; raises `CheckpointError`.

    That of a safetensors file has the tensors at `state_dict`, and its strings at `metadata`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, found {'none' if not path.exists() else 'something else'}.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from None
    if not start:
        raise CheckpointError(f"{path}: expected a checkpoint, found an empty file. Download or copy it again.")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _read_pickle(path)
    raise CheckpointError(
        f"{path}: expected a PyTorch or safetensors checkpoint, found a file that begins with {start[:24]!r}. Check "
        "that it is the weights and not, for example, a web page or a Git LFS pointer in their place."
    )


def check_header(path: Path) -> bool:
    """Raise `CheckpointError` unless a PyTorch file has what it says of itself; whether it is a zip."""
    try:
        with path.open("rb") as file:
            is_zip = file.read(1) == b"P"
        (check_zip if is_zip else check_old)(path)
    except (HeaderError, OSError) as error:
        raise _damaged(path, "PyTorch", error) from None
    return is_zip


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(path, "safetensors", error) from None
    return {"state_dict": _plain_tensors(tensors, path), "metadata": metadata}


def _read_pickle(path: Path) -> Mapping[str, Any]:
    is_zip = check_header(path)
    with torch.serialization.safe_globals(list(STAND_INS)):
        try:
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
            if not refused:
                contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            # Files from before PyTorch 1.6 tell their names only while they are read.
            named = re.search(r"GLOBAL (\S+)", str(error))
            if named is None:
                raise _damaged(path, "PyTorch", error) from None
            refused = [named.group(1)]
        except Exception as error:  # what a stranger's pickle calls may fail in any way
            raise _damaged(path, "PyTorch", error) from None
    if refused:
        raise CheckpointError(
            f"{path}: expected weights only, found a pickle that names {few(sorted(refused))}, which may run foreign "
            "code. Nothing in it was run. Take the .safetensors file of the same model instead."
        )
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(contents).__name__}")
    contents = dict(dict.items(contents))  # whatever attributes it came with
    if isinstance(state := contents.get("state_dict"), dict):
        return contents | {"state_dict": _plain_tensors(dict(dict.items(state)), path)}
    return _plain_tensors(contents, path)


def _plain_tensors(state: dict[Any, Any], path: Path) -> dict[str, Any]:
    """The same with tensors that are no more than numbers in the file; what else is there is left as it is."""
    total, found = 0, {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            problem = _oddness(name, value)
            total += value.numel() * value.element_size()
            if problem is None and total > MAX_SHARING * path.stat().st_size:
                problem = f"tensors of {total:,} bytes and more, which share their numbers,"
            if problem is not None:
                raise CheckpointError(
                    f"{path}: expected plain tensors with names, found {problem} at {str(name)[:80]!r} (the file has "
                    f"{path.stat().st_size:,} bytes). Take another file of the same model."
                )
            value = torch.Tensor.detach(value)  # noqa: PLW2901 - without attributes
        found[name] = value
    return found


def _oddness(name: Any, tensor: torch.Tensor) -> str | None:
    """What keeps a tensor from being taken for weights, in words."""
    if not isinstance(name, str):
        return f"a name that is a {type(name).__name__}"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return "one that is sparse, quantised or without numbers"
    if not tensor.numel():
        return f"an empty one of shape {list(tensor.shape)[:8]}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"one of shape {list(tensor.shape)[:8]} that repeats fewer numbers"
    return None


def _damaged(path: Path, form: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return CheckpointError(
        f"{path}: expected a complete {form} checkpoint, found one that is damaged or half written ({reason}; "
        f"{path.stat().st_size:,} bytes). Download or copy it again."
    )


def few(names: Collection[str]) -> str:
    """The first names, for a message."""
    shown = ", ".join(name[:200] for name in list(names)[:SHOWN_NAMES])
    return shown + (", ..." if len(names) > SHOWN_NAMES else "")
