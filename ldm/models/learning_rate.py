"""How a learning rate rises and falls over a run."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytorch_lightning as pl

LAST_SHARE = 0.02  # of the highest rate, at the end


def rise_and_fall(trainer: pl.Trainer, warmup_steps: int) -> Callable[[int], float]:
    """Step -> share of the highest rate, which rises over `warmup_steps` steps and falls along a cosine, to a fiftieth
    at the trainer's last step; in a run without a last step it only rises."""
    total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches

    def share(step: int) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / max(1.0, total)))
        return min(1.0, (step + 1) / max(1, warmup_steps)) * (LAST_SHARE + (1 - LAST_SHARE) * cosine)

    return share
