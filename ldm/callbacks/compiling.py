"""torch.compile while training, for runs that are long enough to pay for it."""

from __future__ import annotations

import pytorch_lightning as pl

from ldm.errors import UserError
from ldm.modules.compiling import BACKENDS, compile_by_shape, undo_compile


class CompileNetwork(pl.Callback):
    """Compiles the UNet, a graph for every size of clip it meets; see `ldm.modules.compiling`.

    backend: "inductor", or "aot_eager" or "eager", which compile nothing and show whether graphs can be had.
    """

    def __init__(self, backend: str = "inductor") -> None:
        if backend not in BACKENDS:
            raise UserError(f"CompileNetwork: expected backend to be one of {', '.join(BACKENDS)}, found {backend!r}")
        self.backend = backend

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "unet"):
            raise UserError(
                f"CompileNetwork: {type(pl_module).__name__} has no UNet; take the callback out of its config"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        compile_by_shape(pl_module.unet, self.backend)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        undo_compile(pl_module.unet)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        undo_compile(pl_module.unet)
