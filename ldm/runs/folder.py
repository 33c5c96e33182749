"""The plan of a run, from the command line: new or resumed, its folder and config, and what the trainer gets.

Nothing is written before `begin`, which makes the folder and records config, data and base model in it.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.config import ConfigError, check, load_config, to_container
from ldm.config.schema import FLAG, is_trusted
from ldm.errors import UserError
from ldm.runs import identity
from ldm.runs.arguments import num_devices, trainer_arguments, with_trainer_flags
from ldm.runs.last_checkpoints import LAST, corruption, kept
from ldm.runs.launch import agree_on, find_launch

log = logging.getLogger(__name__)

RUN_TIME_VARIABLE = "LDM_RUN_TIME"  # gives the run's start time to the processes that Lightning starts


@dataclass
class RunPlan:
    """What is decided before anything is built.

    now: start time of this session. config: merged, plain, saved in folder and checkpoints. sources: the same, with
    weights whose own files are gone read from the run's checkpoint. trainer: arguments of Lightning's Trainer.
    checkpoint: to resume from; None where a resumed run never saved, too. rate_note: how --scale_lr computed the rate.
    allowed: of --allow. changes: allowed ones, for the record.
    """

    folder: Path
    now: str
    config: dict[str, Any]
    checkpoint: Path | None = None
    is_resumed: bool = False
    seed: int = 23
    scale_lr: bool = False
    allowed: Sequence[str] = ()
    changes: list[str] = field(default_factory=list)
    sources: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.0
    rate_note: str = ""

    def begin(self, data: Any) -> None:
        """Record config, data, base model and session in the folder.

        Raises `UserError`, before anything is written, where data or base model of a resumed run have changed.
        """
        before = identity.read_record(self.folder) if self.is_resumed else None
        found = {
            "config": self.config,
            "data": identity.data_identity(data, self.config["data"].get("params") or {}),
            "model": identity.model_identity(self.config["model"], before and before["model"]),
        }
        if before is not None:
            self.changes += identity.check_record(self.folder, before, found, self.allowed)
        self.save_config()
        origin = None if self.checkpoint is None else str(self.checkpoint)
        session = {"began": self.now, "from": origin, "changed": self.changes}
        session |= {"seed": self.seed, "scale_lr": self.scale_lr}
        identity.write_record(self.folder, found, session, before)

    def save_config(self) -> None:
        """Make the folder and write `configs/<now>-project.yaml` (model and data) and `<now>-lightning.yaml`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=self.is_resumed)
        except FileExistsError as error:
            raise UserError(
                f"{self.folder}: another run of this name began in the same second; start again, or give it a --name"
            ) from error
        folder = self.folder / "configs"
        folder.mkdir(exist_ok=True)
        project = {name: part for name, part in self.config.items() if name != "lightning"}
        lightning = {"lightning": self.config.get("lightning") or {}}
        for name, part in (("project", project), ("lightning", lightning)):
            OmegaConf.save(OmegaConf.create(part), folder / f"{self.now}-{name}.yaml")


def plan_run(options: Namespace) -> RunPlan:
    """The run that a command line describes, new or resumed; raises `UserError` for what cannot be trained."""
    plan = _resumed(options) if options.resume else _new(options)
    plan.seed, plan.scale_lr, plan.allowed = options.seed, bool(options.scale_lr), options.allow
    if plan.is_resumed and (record := identity.read_record(plan.folder)) and record["sessions"]:
        last = record["sessions"][-1]  # its seed counts where the run starts over
        plan.seed, plan.scale_lr = last.get("seed", plan.seed), last.get("scale_lr", plan.scale_lr)
        _note_unused(options, plan)
    plan.trainer = trainer_arguments(plan.config)
    plan.learning_rate, plan.rate_note = _learning_rate(plan)
    return plan


def _new(options: Namespace) -> RunPlan:
    if not options.base:
        raise UserError("expected --base CONFIG.yaml to start a run or -r RUN_FOLDER to resume one, found neither")
    name = options.name or Path(options.base[0]).stem
    if Path(label := f"{name}{options.postfix}").name != label:
        raise UserError(
            f"-n/--name and -f/--postfix: expected part of a folder's name, found {label!r}; folders go to -l/--logdir"
        )
    now = _start_time(options)
    config = _checked(with_trainer_flags(load_config(options.base, options.overrides), options.trainer))
    return RunPlan(Path(options.logdir) / f"{now}_{label}", now, config, sources=config)


def _resumed(options: Namespace) -> RunPlan:
    if options.name:
        raise UserError("-n/--name and -r/--resume exclude each other: a resumed run keeps its name and folder")
    now = _start_time(options)
    folder, checkpoint = _find_checkpoint(Path(options.resume))
    files = sorted((folder / "configs").glob("*.yaml"))
    if checkpoint is None and not files:
        wanted = folder / "checkpoints" / LAST
        raise UserError(f"-r {options.resume}: expected {wanted} of a run, or its configs, found neither")
    if not files:
        raise UserError(f"{folder}: expected the run's configs in {folder / 'configs'}, found none")
    saved = to_container(load_config(files))
    config = _checked(with_trainer_flags(load_config([*files, *options.base], options.overrides), options.trainer))
    changes = identity.allow("config", identity.config_changes(saved, config), options.allow, folder)
    sources = {**config, "model": identity.model_source(config["model"], saved.get("model") or {}, checkpoint)}
    return RunPlan(folder, now, config, checkpoint, is_resumed=True, changes=changes, sources=sources)


def _note_unused(options: Namespace, plan: RunPlan) -> None:
    """Warn of flags of a resumed run that change nothing."""
    for flag, is_unused in (
        ("-l/--logdir", options.logdir != "logs"),
        ("-f/--postfix", options.postfix),
        ("-s/--seed", options.seed not in (23, plan.seed)),
        ("--scale_lr", options.scale_lr and not plan.scale_lr),
    ):
        if is_unused:
            log.info("note: %s has no effect with -r: a resumed run keeps its folder, seed and scaling", flag)


def _checked(config: Any) -> dict[str, Any]:
    """A config that is sound and has what training needs, as plain dicts and lists."""
    check(config)
    for section in ("model", "data"):
        if not config.get(section):
            raise ConfigError(f"{section}: the config has no such section, which training needs")
    return to_container(config)


def _learning_rate(plan: RunPlan) -> tuple[float, str]:
    """The config's rate, and how it was scaled: with --scale_lr by accumulated batches, devices and batch size."""
    rate = plan.config["model"].get("base_learning_rate")
    if not isinstance(rate, (int, float)) or rate <= 0:
        raise ConfigError(f"model.base_learning_rate: expected a number above 0, found {rate!r}")
    if not plan.scale_lr:
        return float(rate), ""
    accumulate, devices = plan.trainer.get("accumulate_grad_batches", 1), num_devices(plan.trainer)
    batch_size = (plan.config["data"].get("params") or {}).get("batch_size", 1)
    scaled = rate * accumulate * devices * batch_size
    factors = f"{rate:g} x {accumulate} accumulated x {devices} devices x batch size {batch_size}"
    return scaled, f"learning rate {scaled:g} = {factors}"


def _start_time(options: Namespace) -> str:
    """When the session began, the same in all processes of the run: it names folder and configs."""
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    if find_launch() is None and "LOCAL_RANK" in os.environ:
        now = os.environ.get(RUN_TIME_VARIABLE, now)  # of the process that started this one
    now = os.environ[RUN_TIME_VARIABLE] = agree_on(now, int(options.trainer.get("num_nodes", 1)))
    return now


def _find_checkpoint(path: Path) -> tuple[Path, Path | None]:
    """Run folder and checkpoint from the argument of -r; None where the run ended before it saved."""
    if path.is_dir():
        folder = path.parent if path.name == "checkpoints" else path
        return folder, _newest_whole(path, folder / "checkpoints")
    if not path.is_file():
        raise UserError(f"-r {path}: expected a run folder or a checkpoint file, found nothing there")
    for parent in path.resolve().parents:
        if parent.name == "checkpoints":
            return parent.parent, path
    raise UserError(f"-r {path}: expected a file in the checkpoints folder of a run, whose configs lie beside it")


def _newest_whole(path: Path, folder: Path) -> Path | None:
    """The newest of the last checkpoints that is whole, with a warning for those that are not; None without any."""
    candidates = kept(folder)
    if not candidates:
        log.warning("%s has no checkpoint: the run ended before it saved, and starts over", folder)
        return None
    reasons = []
    for candidate in candidates:
        reason = corruption(candidate)
        if reason is None:
            if candidate.name != LAST:
                log.warning("%s is used: it is the newest whole checkpoint", candidate)
            return candidate
        log.warning("%s is corrupt or half written: %s", candidate, reason)
        reasons.append(f"{candidate.name}: {reason}")
    raise UserError(
        f"-r {path}: expected a whole checkpoint in {folder}, found none ({'; '.join(reasons)}); give another file of "
        "that folder, or start a new run"
    )


def check_paths(folder: Path, logger: Any, callbacks: Sequence[Any]) -> None:
    """Raise `UserError` where an untrusted config has a logger or a callback write outside the run folder."""
    if is_trusted():
        return
    paths = {"lightning.logger": getattr(logger, "log_dir", None)}
    for callback in callbacks:
        if (path := getattr(callback, "dirpath", None)) is not None:
            name = type(callback).__name__
            paths[f"lightning: {name}.dirpath"] = path
            paths[f"lightning: {name}.filename"] = os.path.join(path, getattr(callback, "filename", None) or "")
    inside = os.path.realpath(folder)
    for where, path in paths.items():
        if path is not None and os.path.commonpath([inside, found := os.path.realpath(path)]) != inside:
            raise UserError(
                f"{where}: expected a path in the run folder {folder}, found {found}; leave it out, or give {FLAG} if "
                "you know where this config comes from"
            )
