"""What the trainings of small models share: warm-up and cool-down, checks of shares, pictures, the config's place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.optim import with_schedule

HELD_OUT = 2**20  # in place of the seed, for augmentation of held-out frames: always the same
MAX_SHOWN = 16  # validation batches that are kept for pictures


class SmallModelTraining(pl.LightningModule):
    """A training without averaged weights and parameter groups.

    learning_rate: highest rate; it rises over `warmup_steps` steps and falls over the last `cooldown_steps`.
    seed: of every random draw.  config: of the run, saved in checkpoints.
    """

    keeps_averages = False

    def __init__(
        self, learning_rate: float, warmup_steps: int, cooldown_steps: int, seed: int, config: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        self.learning_rate, self.warmup_steps, self.cooldown_steps = learning_rate, warmup_steps, cooldown_steps
        self.seed, self.config = seed, config
        self.shown: list[tuple[Tensor, Tensor]] = []  # originals and reconstructions of the last validation

    def adamw(self, weights: Iterable[nn.Parameter], **options: Any) -> dict[str, Any]:
        """What `configure_optimizers` returns: AdamW with the schedule."""
        optimizer = torch.optim.AdamW(weights, lr=self.learning_rate, **options)
        return with_schedule(optimizer, self.warmup_steps, self.cooldown_steps, self.trainer.max_steps)

    def keep_shown(self, batch_idx: int, originals: Tensor, outputs: Tensor) -> None:
        """Keep the pictures of the first validation batches, `b c h w`."""
        if batch_idx == 0:
            self.shown = []
        if batch_idx < MAX_SHOWN:
            self.shown.append((originals.cpu(), outputs.cpu()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the config."""
        if self.config is not None:
            checkpoint["config"] = dict(self.config)


def check_share(name: str, value: float, kind: str = "share") -> None:
    """Raise `UserError` unless a parameter of the model lies between 0 and 1."""
    if not 0 <= value <= 1:
        raise UserError(f"model.params.{name}: expected a {kind}, 0 to 1, found {value!r}")
