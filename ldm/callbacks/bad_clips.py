"""Record the clips that could not be read and were substituted; stop the run if they are too many.

Reading, retries and substitution are in `ldm/data/batch.py`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.data.batch import Batch, Unreadable
from ldm.errors import UserError
from ldm.files import write_atomically

log = logging.getLogger(__name__)
FILE = "unreadable.jsonl"
FEW = 1000  # the share is computed over at least this many clips
SHOWN = 5  # reasons in a message


class UnreadableClips(pl.Callback):
    """Appends every substituted clip to `unreadable.jsonl` in the run folder and logs `train/unreadable_clips`.

    A line holds step, position, clip (source, frames, caption, scene, shard) and reason; a held-out clip is listed
    once. Rank r > 0 writes `unreadable-r.jsonl`. Raises UserError if the share of unreadable training clips exceeds
    `most`.

    folder: of the run; main.py fills it in.
    most: 0 to 1. The share is computed over at least 1000 clips.
    """

    changes_training = False

    def __init__(self, folder: str, most: float = 0.01) -> None:
        if not (isinstance(most, int | float) and 0 <= most <= 1):
            raise UserError(f"UnreadableClips: expected a share from 0 to 1 for most, found {most!r}")
        self.folder, self.most = Path(folder), most
        self.num_clips = self.num_unreadable = 0  # of all ranks up to the last checkpoint, of this rank since then
        self._before = torch.zeros(2, dtype=torch.int64)  # both counts of all ranks at the last checkpoint
        self._shown: list[str] = []
        self._held_out: set[int] = set()
        self._step_seen = 0

    def path(self, rank: int) -> Path:
        """The file of a rank."""
        return self.folder / (f"unreadable-{rank}.jsonl" if rank else FILE)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step_seen = trainer.global_step
        path = self.path(trainer.global_rank)
        if path.exists():  # drop lines of steps that a resumed run repeats
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            kept = [line for line in lines if line["step"] <= trainer.global_step]
            self._held_out = {line["position"] for line in kept if line["held_out"]}
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, Batch):
            return
        lost = batch.all_unreadable()
        self.num_clips += len(batch.positions) + len(batch.stills.positions if batch.stills is not None else [])
        self.num_unreadable += len(lost)
        if lost:
            step = trainer.global_step + (trainer.global_step == self._step_seen)
            self._list(trainer, lost, step, held_out=False)
            if self.num_unreadable > self.most * max(FEW, self.num_clips):
                raise UserError(self._too_many(trainer))
        if trainer.global_step == self._step_seen:
            return
        self._step_seen = trainer.global_step
        if trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics({"train/unreadable_clips": self.num_unreadable}, step=trainer.global_step)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(batch, Batch) or trainer.sanity_checking:
            return
        new = [clip for clip in batch.all_unreadable() if clip.position not in self._held_out]
        if new:
            self._held_out |= {clip.position for clip in new}
            self._list(trainer, new, trainer.global_step, held_out=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = torch.tensor([self.num_clips, self.num_unreadable], dtype=torch.int64) - self._before
        everyone = trainer.strategy.reduce(own.to(pl_module.device), reduce_op="sum").cpu()
        self._before = self._before + everyone
        self.num_clips, self.num_unreadable = self._before.tolist()
        checkpoint["unreadable_clips"] = {"clips": self.num_clips, "unreadable": self.num_unreadable}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kept = checkpoint.get("unreadable_clips")
        if kept is not None:
            self.num_clips, self.num_unreadable = kept["clips"], kept["unreadable"]
            self._before = torch.tensor([self.num_clips, self.num_unreadable], dtype=torch.int64)

    def _list(self, trainer: pl.Trainer, lost: list[Unreadable], step: int, held_out: bool) -> None:
        path = self.path(trainer.global_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for clip in lost:
                about = {"step": step, "position": clip.position, "held_out": held_out, **clip.about}
                file.write(json.dumps({**about, "reason": clip.reason}) + "\n")
        self._shown = (self._shown + [clip.reason for clip in lost if clip.reason not in self._shown])[:SHOWN]
        log.warning("a clip could not be read and was substituted: %s; see %s", lost[0].reason, path)

    def _too_many(self, trainer: pl.Trainer) -> str:
        shown = "\n  ".join(self._shown)
        return (
            f"expected at most {self.most:g} of the training clips to be unreadable, found {self.num_unreadable} of "
            f"{self.num_clips}; {self.path(trainer.global_rank)} lists them. Copy those shards again, or raise "
            f"lightning.callbacks.unreadable_clips.params.most. First reasons:\n  {shown}"
        )
