"""Train what a config describes: `python main.py --base configs/video-sd.yaml -t --gpus 0,`.

Resume a run with `-r RUN_FOLDER -t`. Model, data and callbacks are in the config; the command line says where and how
long to train.
"""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from argparse import Namespace
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.warnings import PossibleUserWarning
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.model_helpers import is_overridden
from rich.logging import RichHandler

from ldm.callbacks import AtomicCheckpointIO, ProgressBar, StopRequested
from ldm.config import ConfigError, accepted_names, build, callback_nodes
from ldm.config.schema import trusting
from ldm.devices import keep_freed_memory, set_up_gpu
from ldm.errors import UserError, run_command
from ldm.runs.arguments import num_devices, parse_arguments
from ldm.runs.distributed import launch_plugins, strategy_options
from ldm.runs.folder import RunPlan, check_paths, plan_run
from ldm.runs.launch import is_first_process

log = logging.getLogger("ldm.main")

FULL_PRECISION = ("32", "32-true", "64", "64-true")  # as Lightning names it


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line (None: that of the process), check everything, then train."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    set_up_logging()
    with trusting(options.trust_config):
        carry_out(options)


def carry_out(options: Namespace) -> None:
    """Plan the run, build data and model, and train with -t."""
    if not options.train:
        log.info("-t is left out: config, data and model are checked, and nothing is trained")
    plan = plan_run(options)
    pl.seed_everything(plan.seed, workers=True, verbose=False)
    data = build_with(plan.config["data"], "data", config=plan.config)
    data.setup("fit")
    model = build_with(plan.sources["model"], "model", config=plan.sources, learning_rate=plan.learning_rate)
    for line in (parameter_summary(model), plan.rate_note, getattr(data, "summary", "")):
        if line:
            log.info("%s", line)
    if not options.train:
        data.prepare_data()
        log.info("config, data and model are in order; add -t to train")
        return
    set_up_gpu(exact=str(plan.trainer.get("precision", "32-true")) in FULL_PRECISION, repeatable=False)
    keep_freed_memory()
    trainer = build_trainer(plan, model, data)
    if trainer.is_global_zero:
        plan.begin(data)
    log.info("run folder: %s", plan.folder)
    if fit(plan, trainer, model, data) and is_overridden("test_step", model):
        if not (options.no_test or trainer.fast_dev_run):
            trainer.test(model, data)


def fit(plan: RunPlan, trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule) -> bool:
    """Train; False after Ctrl-C. Raises `SystemExit` after other signals and `UserError` for a user's mistake."""
    try:
        trainer.fit(model, data, ckpt_path=plan.checkpoint, weights_only=True)
    except StopRequested as stop:
        log.info("%s. Resume with: python main.py -r %s -t", stop, plan.folder)
        if stop.signal != signal.SIGINT:
            raise SystemExit(128 + stop.signal) from None
        return False
    except SIGTERMException:  # before the first step: nothing to save
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit:  # Lightning's end after a second Ctrl-C
        raise KeyboardInterrupt from None
    except UserError as error:
        raise without_traceback(error) from error
    except (MisconfigurationException, ValueError) as error:
        if isinstance(error, MisconfigurationException) or "val_check_interval" in str(error):
            raise ConfigError(f"lightning.trainer: {' '.join(str(error).split())}") from error
        raise
    return True


def build_trainer(plan: RunPlan, model: pl.LightningModule, data: pl.LightningDataModule) -> pl.Trainer:
    """Lightning's Trainer with the run's strategy, logger and callbacks."""
    strategy = strategy_options(plan.trainer, num_devices(plan.trainer), model, data)
    node = (plan.config.get("lightning") or {}).get("logger") or {"params": {"name": "", "version": "tensorboard"}}
    logger = build_with(node, "lightning.logger", config=plan.config, save_dir=str(plan.folder))
    has_bar = plan.trainer.get("enable_progress_bar", True) and sys.stdout.isatty()
    callbacks = build_callbacks(plan, has_bar)
    check_paths(plan.folder, logger, callbacks)
    try:
        return pl.Trainer(
            **{"enable_model_summary": False, **plan.trainer, **strategy, "enable_progress_bar": has_bar},
            logger=logger,
            callbacks=callbacks,
            default_root_dir=plan.folder,
            plugins=[AtomicCheckpointIO(), *launch_plugins()],
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"lightning.trainer: {error}") from error


def build_callbacks(plan: RunPlan, has_bar: bool) -> list[pl.Callback]:
    """The default callbacks, those of the config, and `lightning.modelcheckpoint`."""
    callbacks: list[pl.Callback] = [ProgressBar()] if has_bar else []
    for name, node in callback_nodes(plan.config).items():
        if not (has_bar and name == "progress"):
            values = {"config": plan.sources, "saved_config": plan.config, "folder": str(plan.folder)}
            callbacks.append(build_with(node, f"lightning.callbacks.{name}", **values))
    if node := (plan.config.get("lightning") or {}).get("modelcheckpoint"):
        defaults = {"dirpath": str(plan.folder / "checkpoints"), "filename": "{epoch:06}"}
        node = {**node, "params": {**defaults, **(node.get("params") or {})}}
        callbacks.append(build(node, "lightning.modelcheckpoint"))
    return callbacks


def build_with(node: dict[str, Any], path: str, **values: Any) -> Any:
    """Build a node with those of `values` that its constructor takes."""
    accepted = accepted_names(node, path)
    return build(node, path, **{name: value for name, value in values.items() if name in accepted})


def parameter_summary(model: pl.LightningModule) -> str:
    """Trained and frozen parameters: the model's own summary if it has one."""
    if hasattr(model, "parameter_summary"):
        return model.parameter_summary()
    parts = []
    for kind, is_trained in (("trained", True), ("frozen", False)):
        weights = [weight for weight in model.parameters() if weight.requires_grad == is_trained]
        parts.append(f"{kind}: {sum(weight.numel() for weight in weights):,} parameters in {len(weights)} tensors")
    return "; ".join(parts)


def without_traceback(error: UserError) -> UserError:
    """The message of an error that a DataLoader worker wrapped in its traceback."""
    text = str(error)
    marker = f"{type(error).__name__}: "
    return type(error)(text.rpartition(marker)[2].strip()) if text.startswith("Caught ") and marker in text else error


def set_up_logging() -> None:
    """Log to the terminal above the progress bar, or as plain lines to stderr."""
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # no held-out clips
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket")  # 1x1 kernels: both are right
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # never written to
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logger = logging.getLogger("ldm")
    logger.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    if not logger.handlers:
        is_terminal = sys.stdout.isatty()
        handler = RichHandler(show_path=False, show_level=False) if is_terminal else logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


if __name__ == "__main__":
    sys.exit(run_command(main))
