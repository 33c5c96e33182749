"""How checkpoints get to disk and back: whole or not at all, and without running anything."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.atomic import replacing
from ldm.checkpoint_files import check_header
from ldm.errors import UserError
from ldm.last_checkpoints import check_room


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints under a temporary name first, so that a full disk or a kill leaves the old file as it was.

    There has to be room for all of a file before any of it is written; it is flushed, looked at and only then renamed.
    They are read with `weights_only=True`, whatever Lightning asks for: a checkpoint never runs code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path, checkpoint)
        with replacing(path) as partial:
            with partial.open("wb") as file:
                writer = _RememberingWriter(file.write)
                try:
                    torch.save(checkpoint, writer)
                except (OSError, RuntimeError) as error:
                    raise (writer.error or error) from None
                file.flush()
            check_header(partial)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        try:
            return self._load(path)
        except FileNotFoundError as error:
            raise UserError(f"{path}: there is no such checkpoint to resume from") from error
        except Exception as error:
            raise UserError(
                f"{path}: expected a checkpoint written by main.py, but it cannot be read ({_first_line(error)}). "
                "It may be half copied: resume from another file in the run's checkpoints folder"
            ) from error

    @staticmethod
    def _load(path: str | Path) -> dict[str, Any]:
        check_header(Path(path))
        # 8-bit optimiser states are a torchao class, known to torch.load only once torchao is imported.
        if importlib.util.find_spec("torchao") and any(
            name.startswith("torchao.") for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
        ):
            importlib.import_module("torchao.optim")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class _RememberingWriter:
    """torch.save turns a failed write into an error of its own; this keeps the first one, which says what happened."""

    def __init__(self, write: Callable[[Any], int]) -> None:
        self._write = write
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        pass


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
