"""Steps that are spoiled on purpose, and a watch over what each step changes, for the tests of the guard."""

from __future__ import annotations

import pytorch_lightning as pl
import torch

from ldm import optim as optimizers
from ldm.callbacks import bad_steps as guard
from ldm.optim.per_weight import WeightByWeight, plain_parts
from ldm.optim.skippable import skips_by_itself


def as_on_a_card(patch):
    """What is done where weights are on a card: the optimiser is told, and the host reads a step later."""

    def fused(groups, words):
        return torch.optim.AdamW(groups, fused=True, **words)

    patch.setattr(guard, "must_wait", lambda optimizer: not skips_by_itself(optimizer))
    patch.setattr(optimizers, "_adamw", fused)


class Spoil(pl.Callback):
    """Spoils some steps: `loss` or `gradient` becomes what a function says; comes before the guard."""

    def __init__(self, model, steps, loss=None, gradient=None, micro_batch=None):
        self.steps, self.gradient, self.micro_batch = steps, gradient, micro_batch
        self.batch_idx = 0
        if loss is not None:
            plain = model.training_step

            def training_step(batch, batch_idx):
                value = plain(batch, batch_idx)
                is_meant = micro_batch is None or batch_idx % 2 == micro_batch
                return loss(value) if model.global_step in steps and is_meant else value

            model.training_step = training_step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradient is not None and trainer.global_step in self.steps:
            weight = next(weight for weight in pl_module.parameters() if weight.grad is not None)
            weight.grad.view(-1)[0] = self.gradient


class Watch(pl.Callback):
    """Keeps, after each step, everything that a step changes."""

    def __init__(self, average=None):
        self.average, self.seen = average, []

    def on_train_start(self, trainer, pl_module):
        self.keep(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.seen):
            self.keep(trainer, pl_module)

    def keep(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        found = {f"weight {name}": weight.detach().clone() for name, weight in pl_module.named_parameters()}
        stored = getattr(pl_module, "stored_weights", None)
        if stored is not None:
            found |= {f"low bits {name}": part.clone() for name, part in stored.named_buffers()}
        if self.average is not None:
            found |= {f"average {name}": value.clone() for name, value in self.average.averages.items()}
        states = optimizer.states() if isinstance(optimizer, WeightByWeight) else optimizer.state
        for place, state in enumerate(states.values()):
            for name, value in state.items():
                for number, part in enumerate(plain_parts(torch.as_tensor(value))):
                    found[f"state {place} {name} {number}"] = part.clone()
        self.seen.append(found)

    def changed(self, step):
        """Names of what step number `step`, from 0, changed."""
        before, after = self.seen[step : step + 2]
        return [name for name, value in before.items() if not torch.equal(value, after[name])]
