"""A training step asks the device for nothing that it would have to wait for.

Without a card this is seen in two ways: on `meta` tensors, which have no numbers to be read and no way to the CPU, and
on the CPU by the operations that read a number (`.item()`, `nonzero`, masks as indices), with the file that asks.
"""

from __future__ import annotations

import contextlib
import traceback

import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.callbacks import ProgressBar, SkipBadSteps, WeightAverage
from ldm.callbacks import bad_steps as guard
from ldm.diffusion.known_frames import KnownFrames
from tests.models.test_ddpm import make_batch, make_model

READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal", "allclose"}
# Draws of a few numbers by a generator on the CPU; the optimiser's own step counters, which lie there too.
ON_THE_HOST = ("known_mixture.py", "torch/optim/", "lr_scheduler.py")


class Watch(TorchDispatchMode):
    """Lists operations that read numbers of tensors and the files they are asked by, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_seen += 1
        name = func.overloadpacket.__name__
        has_mask = name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1])
        if name in READS or has_mask:
            self.note(name)
        if name in ("_to_copy", "copy_"):
            target = (kwargs or {}).get("device") or args[0].device
            source = args[0] if name == "_to_copy" else args[1]
            if source.device.type != torch.device(target).type and source.ndim:
                self.note(f"{name} from {source.device} to {target}")
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        files = [frame.filename for frame in traceback.extract_stack()]
        if not any(host in file for host in ON_THE_HOST for file in files):
            ours = [file for file in files if "/torch/" not in file and not file.endswith("test_no_waiting.py")]
            self.found.append(f"{what} in {' < '.join(reversed(ours[-4:]))}")


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, device="meta", dtype=dtype)


@pytest.mark.parametrize("is_known", [False, True])
def test_the_network_the_loss_and_the_optimiser_read_nothing(is_known):
    """What has no numbers cannot be read: any attempt raises; copies to and from the CPU are listed."""
    model = make_model().to("meta")
    model.unet.takes_known_frames = False
    optimizer = model.configure_optimizers()["optimizer"]
    clean, noise = on_meta(2, 5, 4, 8, 8), on_meta(2, 5, 4, 8, 8)
    known = KnownFrames(on_meta(2, 5, 1, 8, 8), clean, on_meta(2, dtype=torch.long)) if is_known else None
    with Watch() as watch:
        errors = model.error(clean, noise, on_meta(2, dtype=torch.long), on_meta(2, 7, 16), known=known)
        (errors * model.schedule.loss_weight(on_meta(2, dtype=torch.long), None)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert watch.found == []


class WatchTheSecondStep(pl.Callback):
    """The first one may prepare and show what it likes. Comes last, so that other callbacks are watched too."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.open = watch, contextlib.ExitStack()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.open.enter_context(self.watch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.open.close()


def test_a_step_of_the_trainer_with_its_callbacks_reads_nothing(tmp_path, monkeypatch):
    """The guard and the average do what they do on a card: the verdict on a step stays there."""
    monkeypatch.setattr(ProgressBar, "seconds_between_readings", 1e9)
    monkeypatch.setattr(guard, "must_wait", lambda optimizer: False)
    model, watch = make_model(), WatchTheSecondStep(Watch())
    make = model.configure_optimizers

    def fused():
        made = make()
        for group in made["optimizer"].param_groups:
            group.update(fused=True, foreach=False)
        return made

    monkeypatch.setattr(model, "configure_optimizers", fused)
    monkeypatch.setattr(type(model), "setup", lambda self, stage: None)
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        gradient_clip_val=1.0, callbacks=[ProgressBar(), SkipBadSteps(str(tmp_path)), WeightAverage(), watch],
        default_root_dir=tmp_path, log_every_n_steps=1000,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader([make_batch([0, 1])] * 3, batch_size=None)
    with watch.open:
        trainer.fit(model, batches)
    assert trainer.global_step == 3
    assert watch.watch.num_seen > 1000
    assert watch.watch.found == []


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.nonzero, lambda x: x[x > 0]])
def test_a_reading_would_be_found(read):
    with Watch() as watch:
        read(torch.ones(1))
    assert watch.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_step_on_a_card_never_waits():
    model, batch = make_model().cuda(), make_batch([0, 1])
    batch = type(batch)(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in vars(batch).values()))
    optimizer = model.configure_optimizers()["optimizer"]
    for is_watched in (False, True):
        torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
        try:
            model.batch_errors(batch)[0].sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
