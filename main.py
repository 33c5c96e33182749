"""Train what a config describes: `python main.py --base configs/video-sd.yaml -t --gpus 0,`.

Takes up a stopped run with `-r RUN_FOLDER -t`. What is trained, on what data and what happens beside it is all in the
config; the command line only says where and how long.
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
from ldm.config import ConfigError, accepted_names, build, check, to_container
from ldm.config.schema import trusting
from ldm.devices import keep_freed_memory, set_up_gpu
from ldm.errors import UserError, run_command
from ldm.runs.arguments import Run, check_places, find_run, num_devices, parse_arguments, trainer_arguments
from ldm.runs.distributed import launch_plugins, strategy_words
from ldm.runs.identity import (
    allow,
    check_record,
    config_changes,
    data_identity,
    model_identity,
    read_record,
    taken_from,
    weight_paths,
    write_record,
)
from ldm.runs.launch import is_first_process

log = logging.getLogger("ldm.main")

FULL_PRECISION = ("32", "32-true", "64", "64-true")  # of Lightning's words
DEFAULT_CALLBACKS = {
    "last_checkpoint": {},
    "memory": {},
    "plan": {"target": "ldm.callbacks.reports.PlanReport"},
    "learning_rates": {"params": {"logging_interval": "step"}},
    "skip_bad_steps": {},
    "unreadable_clips": {},
    "data_wait": {},
    "progress": {},
}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line (None: the process's own), check everything, then train."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    set_up_logging()
    with trusting(options.trust_config):
        carry_out(options)


def carry_out(options: Namespace) -> None:
    """What a parsed command line asks for."""
    run = find_run(options)
    check(run.config)
    for section in ("model", "data"):
        if not run.config.get(section):
            raise ConfigError(f"{section}: the config has no such section, which training needs")
    if run.saved is not None:
        changes = config_changes(to_container(run.saved), to_container(run.config))
        run.changes += allow("config", changes, options.allow, run.folder)
        if before := read_record(run.folder):  # the run's own, should it begin again
            command = before["sessions"][-1] if before["sessions"] else {}
            options.seed = command.get("seed", options.seed)
            options.scale_lr = command.get("scale_lr", options.scale_lr)
    flags = trainer_arguments(run.config)
    pl.seed_everything(options.seed, workers=True, verbose=False)
    config = to_container(run.config)
    run.sources = {**config, "model": still_there(run, config["model"])}
    data = build_with(config["data"], "data", config=config)
    data.setup("fit")
    rate, reckoning = learning_rate(config, flags, options)
    model = build_with(run.sources["model"], "model", config=run.sources, learning_rate=rate)
    log.info("%s", parameter_summary(model))
    for line in (reckoning, getattr(data, "summary", "")):
        if line:
            log.info("%s", line)
    if options.train:
        train(run, config, model, data, flags, options)
    else:
        data.prepare_data()
        log.info("config, data and model are in order; add -t to train")


def train(
    run: Run,
    config: dict[str, Any],
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    flags: dict[str, Any],
    options: Namespace,
) -> None:
    """Fit, and test if the model has a test; a stop that was asked for is a normal end."""
    set_up_gpu(exact=str(flags.get("precision", "32-true")) in FULL_PRECISION, repeatable=False)
    keep_freed_memory()
    trainer = build_trainer(run, config, flags, strategy_words(flags, num_devices(flags), model, data))
    if trainer.is_global_zero:
        write_down(run, config, data, options)
    log.info("run folder: %s", run.folder)
    try:
        trainer.fit(model, data, ckpt_path=run.checkpoint, weights_only=True)
    except StopRequested as stop:
        log.info("%s. Go on with: python main.py -r %s -t", stop, run.folder)
        if stop.signal != signal.SIGINT:
            raise SystemExit(128 + stop.signal) from None
        return
    except SIGTERMException:  # before the first step, where nothing is lost
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit:  # how Lightning ends after a second Ctrl-C
        raise KeyboardInterrupt from None
    except UserError as error:
        raise without_traceback(error) from error
    except (MisconfigurationException, ValueError) as error:
        if isinstance(error, MisconfigurationException) or "val_check_interval" in str(error):
            raise ConfigError(f"lightning.trainer: {' '.join(str(error).split())}") from error
        raise
    if is_overridden("test_step", model) and not (options.no_test or trainer.fast_dev_run):
        trainer.test(model, data)


def write_down(run: Run, config: dict[str, Any], data: pl.LightningDataModule, options: Namespace) -> None:
    """Write what the run is into its folder; raises UserError where data or base model are not what they were."""
    before = read_record(run.folder) if run.saved is not None else None
    identity = {
        "config": config,
        "data": data_identity(data, config["data"].get("params") or {}),
        "model": model_identity(config["model"], before and before["model"]),
    }
    if before is not None:
        run.changes += check_record(run.folder, before, identity, options.allow)
    run.save_config()
    origin = None if run.checkpoint is None else str(run.checkpoint)
    command = {"seed": options.seed, "scale_lr": bool(options.scale_lr)}
    session = {"began": run.now, "from": origin, "changed": run.changes, **command}
    write_record(run.folder, identity, session, before)


def still_there(run: Run, model: dict[str, Any]) -> dict[str, Any]:
    """The config's model; a run that is taken up again has the weights it began with, and needs their files no more."""
    if run.checkpoint is None:
        return model
    began_with = dict(weight_paths(to_container(run.saved).get("model") or {}))
    return taken_from(model, run.checkpoint, began_with)


def build_trainer(run: Run, config: dict[str, Any], flags: dict[str, Any], strategy: dict[str, Any]) -> pl.Trainer:
    """Lightning's Trainer with the run's loggers and callbacks; `strategy`: of `strategy_words`."""
    lightning = config.get("lightning") or {}
    node = lightning.get("logger") or {"params": {"name": "", "version": "tensorboard"}}
    logger = build_with(node, "lightning.logger", config=config, save_dir=str(run.folder))
    has_bar = flags.get("enable_progress_bar", True) and sys.stdout.isatty()
    callbacks = build_callbacks(run, config, has_bar)
    check_places(run.folder, logger, callbacks)
    try:
        return pl.Trainer(
            **{"enable_model_summary": False, **flags, **strategy, "enable_progress_bar": has_bar},
            logger=logger,
            callbacks=callbacks,
            default_root_dir=run.folder,
            plugins=[AtomicCheckpointIO(), *launch_plugins()],
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"lightning.trainer: {error}") from error


def build_callbacks(run: Run, config: dict[str, Any], has_bar: bool) -> list[pl.Callback]:
    """The callbacks of the config and the default ones, which the config may change or, with null, leave out."""
    lightning = config.get("lightning") or {}
    nodes = {**DEFAULT_CALLBACKS, **(lightning.get("callbacks") or {})}
    callbacks = []
    if has_bar:
        nodes.pop("progress")
        callbacks.append(ProgressBar())
    for name, node in nodes.items():
        if node is not None:
            path = f"lightning.callbacks.{name}"
            kept_or_read = config if name == "last_checkpoint" else run.sources or config
            callbacks.append(build_with(node, path, config=kept_or_read, folder=str(run.folder)))
    if lightning.get("modelcheckpoint"):
        node = lightning["modelcheckpoint"]
        defaults = {"dirpath": str(run.folder / "checkpoints"), "filename": "{epoch:06}"}
        node = {**node, "params": {**defaults, **(node.get("params") or {})}}
        callbacks.append(build(node, "lightning.modelcheckpoint"))
    return callbacks


def build_with(node: dict[str, Any], path: str, **values: Any) -> Any:
    """Build a node, giving it those of `values` that its constructor asks for."""
    accepted = accepted_names(node, path)
    return build(node, path, **{name: value for name, value in values.items() if name in accepted})


def learning_rate(config: dict[str, Any], flags: dict[str, Any], options: Namespace) -> tuple[float, str]:
    """The config's own rate; with --scale_lr, times accumulated batches, devices and batch size, as CompVis does it.

    With the latter comes a line that says how it was reckoned.
    """
    rate = config["model"].get("base_learning_rate")
    if not isinstance(rate, (int, float)) or rate <= 0:
        raise ConfigError(f"model.base_learning_rate: expected a number above 0, found {rate!r}")
    if not options.scale_lr:
        return float(rate), ""
    accumulate, devices = flags.get("accumulate_grad_batches", 1), num_devices(flags)
    batch_size = (config["data"].get("params") or {}).get("batch_size", 1)
    scaled = rate * accumulate * devices * batch_size
    return scaled, (
        f"learning rate {scaled:g} = {rate:g} x {accumulate} accumulated x {devices} devices x batch size {batch_size}"
    )


def parameter_summary(model: pl.LightningModule) -> str:
    """What is frozen and what is trained, in the model's own words where it has them."""
    if hasattr(model, "parameter_summary"):
        return model.parameter_summary()
    words = []
    for kind, is_trained in (("trained", True), ("frozen", False)):
        weights = [weight for weight in model.parameters() if weight.requires_grad == is_trained]
        words.append(f"{kind}: {sum(weight.numel() for weight in weights):,} parameters in {len(weights)} tensors")
    return "; ".join(words)


def without_traceback(error: UserError) -> UserError:
    """A mistake found in a reading process arrives wrapped in its traceback; keep the message."""
    text = str(error)
    marker = f"{type(error).__name__}: "
    return type(error)(text.rpartition(marker)[2].strip()) if text.startswith("Caught ") and marker in text else error


def set_up_logging() -> None:
    """Our lines to the terminal, above the progress bar, or plain to stderr where there is none."""
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # nothing is held out
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket")  # kernels of one pixel: either way
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing writes into it
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
