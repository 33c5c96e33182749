"""Training of the style classifier (`ldm.evaluation.look_judge`): which style of the procedural world has a frame?

Most of its frames are corrupted (`augmentation`), so it classifies frames from an autoencoder or a model by their
content, not by their sharpness.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.nn.functional as F
from torch import Tensor

from ldm.data.world import LOOKS
from ldm.data.world.frames import DrawnBatch
from ldm.errors import UserError
from ldm.evaluation.look_judge import save_style_classifier
from ldm.models.augmentation import corrupt_frames
from ldm.models.small import HELD_OUT, SmallModelTraining, check_share
from ldm.modules.frame_tower import FrameClassifier

log = logging.getLogger(__name__)


class LookClassifier(SmallModelTraining):
    """A style classifier in training: `DrawnBatch` in, a network that tells all styles apart out.

    damaged: share of the training frames that are corrupted, see `corrupt_frames`.
    learning_rate, warmup_steps, cooldown_steps, seed: of `SmallModelTraining`.  weight_decay: of AdamW.
    """

    def __init__(
        self,
        damaged: float = 0.8,
        learning_rate: float = 2e-3,
        warmup_steps: int = 50,
        cooldown_steps: int = 0,
        weight_decay: float = 0.05,
        seed: int = 23,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, cooldown_steps, seed, None)
        check_share("damaged", damaged)
        self.network = FrameClassifier(len(LOOKS))
        self.damaged, self.weight_decay = damaged, weight_decay

    def forward(self, pixels: Tensor) -> Tensor:
        """Frames in [-1, 1] -> a score for each of `LOOKS`: `b 3 h w` -> `b looks`."""
        return self.network(pixels)

    def training_step(self, batch: DrawnBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch with corrupted frames."""
        pixels, looks = _checked(batch)
        scores = self(corrupt_frames(pixels, [(self.seed, position) for position in batch.positions], self.damaged))
        loss = F.cross_entropy(scores.float(), looks)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        self.log("train/accuracy", (scores.argmax(1) == looks).float().mean(), batch_size=len(batch))
        return loss

    def validation_step(self, batch: DrawnBatch, batch_idx: int) -> None:
        """Accuracy on held-out frames: `val/accuracy` as rendered, `val/accuracy_damaged` corrupted."""
        pixels, looks = _checked(batch)
        corrupted = corrupt_frames(pixels, [(HELD_OUT, position) for position in batch.positions])
        for name, frames in (("accuracy", pixels), ("accuracy_damaged", corrupted)):
            right = (self(frames).argmax(1) == looks).float().mean()
            self.log(f"val/{name}", right, prog_bar=True, on_epoch=True, batch_size=len(batch))

    def configure_optimizers(self) -> dict[str, Any]:
        return self.adamw(self.parameters(), weight_decay=self.weight_decay)


class JudgeWriter(pl.Callback):
    """After every validation, write the classifier and its accuracy to `checkpoints/judge.safetensors`.

    folder: the run folder.
    """

    changes_training = False

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "checkpoints" / "judge.safetensors"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LookClassifier) -> None:
        """Write the file and log its accuracy."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        found = [float(trainer.callback_metrics[f"val/{name}"]) for name in ("accuracy", "accuracy_damaged")]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_style_classifier(self.path, pl_module.network, LOOKS, *found, trainer.global_step)
        shares = (100 * share for share in found)
        log.info("%s: right in %.1f %% of held-out frames, %.1f %% of corrupted ones", self.path, *shares)


def _checked(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, DrawnBatch):
        raise UserError(
            f"data: the style classifier learns from frames with looks, found {type(batch).__name__}; use "
            "ldm.data.world.frames.DriveFrameDataModule"
        )
    return batch.pixels, batch.looks
