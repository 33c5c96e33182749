"""Training of the judge of looks (`ldm.evaluation.look_judge`): which look of the drawn world does a frame show?

It learns from drawn frames, most of them damaged, so that it judges frames that come out of an autoencoder or a model
by what they show and not by how sharp they are.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.world import LOOKS
from ldm.data.world.frames import DrawnBatch
from ldm.errors import UserError
from ldm.evaluation.look_judge import save_style_classifier
from ldm.models.augmentation import damage_frames
from ldm.modules.frame_tower import FrameClassifier
from ldm.optim import rate_schedule

log = logging.getLogger(__name__)

HELD_OUT = 2**20  # in place of the seed, for the damage to held-out frames: always the same


class LookClassifier(pl.LightningModule):
    """A judge in training: `DrawnBatch` in, a network that tells all looks out.

    damaged: share of the training frames that are damaged, see `damage_frames`.
    learning_rate: highest rate; it rises over `warmup_steps` steps and falls over the last `cooldown_steps`.
    weight_decay: of AdamW. seed: of the damage.
    """

    keeps_averages = False

    def __init__(
        self,
        damaged: float = 0.8,
        learning_rate: float = 2e-3,
        warmup_steps: int = 50,
        cooldown_steps: int = 0,
        weight_decay: float = 0.05,
        seed: int = 23,
    ) -> None:
        super().__init__()
        if not 0 <= damaged <= 1:
            raise UserError(f"model.params.damaged: expected a share, 0 to 1, found {damaged!r}")
        self.network = FrameClassifier(len(LOOKS))
        self.damaged, self.weight_decay, self.seed = damaged, weight_decay, seed
        self.learning_rate, self.warmup_steps, self.cooldown_steps = learning_rate, warmup_steps, cooldown_steps

    def forward(self, pixels: Tensor) -> Tensor:
        """Frames in [-1, 1] -> a score for each of `LOOKS`: `b 3 h w` -> `b looks`."""
        return self.network(pixels)

    def training_step(self, batch: DrawnBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch, most of whose frames are damaged."""
        pixels, looks = _checked(batch)
        scores = self(damage_frames(pixels, [(self.seed, position) for position in batch.positions], self.damaged))
        loss = F.cross_entropy(scores.float(), looks)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        self.log("train/accuracy", (scores.argmax(1) == looks).float().mean(), batch_size=len(batch))
        return loss

    def validation_step(self, batch: DrawnBatch, batch_idx: int) -> None:
        """Shares of held-out frames that are told right: `val/accuracy` as drawn, `val/accuracy_damaged`."""
        pixels, looks = _checked(batch)
        spoilt = damage_frames(pixels, [(HELD_OUT, position) for position in batch.positions])
        for name, frames in (("accuracy", pixels), ("accuracy_damaged", spoilt)):
            right = (self(frames).argmax(1) == looks).float().mean()
            self.log(f"val/{name}", right, prog_bar=True, on_epoch=True, batch_size=len(batch))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        scheduler = rate_schedule(optimizer, self.warmup_steps, self.cooldown_steps, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class JudgeWriter(pl.Callback):
    """After every validation, the judge with its accuracy as `checkpoints/judge.safetensors` in the run folder.

    folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "checkpoints" / "judge.safetensors"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LookClassifier) -> None:
        """Write the file and say what it can do."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        found = [float(trainer.callback_metrics[f"val/{name}"]) for name in ("accuracy", "accuracy_damaged")]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_style_classifier(self.path, pl_module.network, LOOKS, *found, trainer.global_step)
        shares = (100 * share for share in found)
        log.info("%s: right in %.1f %% of held-out frames, %.1f %% of damaged ones", self.path, *shares)


def _checked(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, DrawnBatch):
        raise UserError(
            f"data: the judge learns from frames with looks, found {type(batch).__name__}; use "
            "ldm.data.world.frames.DriveFrameDataModule"
        )
    return batch.pixels, batch.looks
