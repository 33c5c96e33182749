"""A quiet trainer and a stop in the middle of an epoch, for the tests of the small models."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl


class SaveAt(pl.Callback):
    """Saves a checkpoint in the middle of an epoch, as a stop would."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def make_trainer(folder: Path, max_steps: int, **options) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"logger": False, "num_sanity_val_steps": 0, "default_root_dir": folder}
    return pl.Trainer(accelerator="cpu", devices=1, max_steps=max_steps, **quiet | options)
