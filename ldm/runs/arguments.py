"""Around a training run: the command line, the run folder with its configs, and which device is meant."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.config import load_config, nearest, to_container
from ldm.config.schema import FLAG, is_trusted
from ldm.errors import Parser, UserError
from ldm.runs.identity import ALLOWED
from ldm.runs.last_checkpoints import LAST, damage, kept
from ldm.runs.launch import agreed, as_launched, find_launch

log = logging.getLogger(__name__)

TRAINER_FLAGS = (
    "accelerator", "devices", "num_nodes", "strategy", "precision", "max_steps", "max_epochs", "max_time", "min_steps",
    "accumulate_grad_batches", "gradient_clip_val", "val_check_interval", "check_val_every_n_epoch",
    "limit_train_batches", "limit_val_batches", "num_sanity_val_steps", "log_every_n_steps", "overfit_batches",
    "profiler",
)  # fmt: skip
TRAINER_SWITCHES = ("fast_dev_run", "deterministic", "benchmark", "detect_anomaly", "enable_progress_bar")
RUN_TIME_VARIABLE = "LDM_RUN_TIME"  # tells the other processes of a run the name of its folder
# Lightning's other precisions change the type of the weights, which the frozen and averaged ones do not follow.
PRECISIONS = {
    "32": "32-true", "32-true": "32-true", "16": "16-mixed", "16-mixed": "16-mixed",
    "bf16": "bf16-mixed", "bf16-mixed": "bf16-mixed",
}  # fmt: skip
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+|\[\d+\])*=")


@dataclass
class Run:
    """A run's folder, its start time, its merged config and, when it is taken up again, the checkpoint.

    saved: the config as it was before the command line's changes. changes: what is allowed to have changed, in words.
    sources: the config as weights are read by it, from the checkpoint where their own files are gone.
    """

    folder: Path
    now: str
    config: DictConfig
    checkpoint: Path | None = None
    saved: DictConfig | None = None
    changes: list[str] = field(default_factory=list)
    sources: dict[str, Any] | None = None

    def save_config(self) -> None:
        """Make the folder and write `configs/<now>-project.yaml` (model and data) and `<now>-lightning.yaml`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=self.saved is not None)
        except FileExistsError as error:
            raise UserError(
                f"{self.folder}: another run of this name has begun in this second; start again, or give it a --name"
            ) from error
        folder = self.folder / "configs"
        folder.mkdir(exist_ok=True)
        tree = to_container(self.config)
        lightning = {"lightning": tree.pop("lightning", None) or {}}
        for name, part in (("project", tree), ("lightning", lightning)):
            OmegaConf.save(OmegaConf.create(part), folder / f"{self.now}-{name}.yaml")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """CompVis' flags, the useful ones of Lightning's trainer (`.trainer`, those given) and `.overrides` (`key=value`).

    Raises `UserError` for anything it does not know, with the nearest flag.
    """
    parser = Parser(
        prog="main.py",
        description="Train what a config describes.",
        epilog="Any value of the config can be given as key=value, for instance data.params.batch_size=2.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-b", "--base", nargs="*", default=[], metavar="YAML", help="configs, merged from left to right"
    )
    parser.add_argument(
        "-t", "--train", nargs="?", const=True, default=False, type=_truth, help="train (optional yes/no)"
    )
    parser.add_argument("-n", "--name", default="", help="of the run: logs/<time>_<name>; default: the first config's")
    parser.add_argument("-r", "--resume", default="", metavar="DIR|FILE", help="go on with this run, in its own folder")
    parser.add_argument(
        "--allow", default="", metavar="WHAT,...",
        help=f"let a resumed run go on though it has changed: {', '.join(ALLOWED)}",
    )  # fmt: skip
    parser.add_argument("-f", "--postfix", default="", help="appended to the run's name")
    parser.add_argument("-l", "--logdir", default="logs", help="where run folders are made")
    parser.add_argument("-s", "--seed", type=int, default=23, help="of everything that is not seeded in the config")
    parser.add_argument(
        "--no-test", nargs="?", const=True, default=False, type=_truth, help="skip the model's test, if it has one"
    )
    parser.add_argument(
        "--scale_lr", nargs="?", const=True, default=False, type=_truth,
        help="learning rate = base rate x accumulated batches x devices x batch size",
    )  # fmt: skip
    parser.add_argument(FLAG, action="store_true", help="build whatever class the config names")
    trainer = parser.add_argument_group("Lightning's trainer; these beat the config")
    trainer.add_argument("--gpus", default=argparse.SUPPRESS, help='"0,": card 0; "0,1": these; 2: any two; 0: none')
    for flag in TRAINER_FLAGS:
        trainer.add_argument(f"--{flag}", default=argparse.SUPPRESS, type=str if flag == "max_time" else _value)
    for flag in TRAINER_SWITCHES:
        trainer.add_argument(f"--{flag}", nargs="?", const=True, default=argparse.SUPPRESS, type=_value)
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    options, unknown = parser.parse_known_args([argument for argument in arguments if not _OVERRIDE.match(argument)])
    for argument in unknown:
        flag = argument.partition("=")[0]
        flags = [name for name in parser._option_string_actions if name.startswith("--")]
        hint = nearest(flag, flags) if flag.startswith("-") else "overrides look like data.params.batch_size=2"
        raise UserError(f"{argument}: there is no such flag; {hint}")
    names = (*TRAINER_FLAGS, *TRAINER_SWITCHES, "gpus")
    options.trainer = {name: vars(options).pop(name) for name in names if name in options}
    options.overrides = overrides
    options.allow = _allowed(options)
    return options


def _allowed(options: argparse.Namespace) -> list[str]:
    names = [name.strip() for name in options.allow.split(",")] if options.allow else []
    if names and not options.resume:
        raise UserError("--allow: expected with -r/--resume, found without it; a new run may be anything, leave it out")
    for name in names:
        if name not in ALLOWED:
            raise UserError(f"--allow: expected some of {', '.join(ALLOWED)}, found {name!r}; {nearest(name, ALLOWED)}")
    return names


def find_run(options: argparse.Namespace) -> Run:
    """The run that the command line describes: a new one, whose folder is not made yet, or an old one to resume."""
    now = _start_time(options)
    if options.resume:
        if options.name:
            raise UserError("-n/--name and -r/--resume exclude each other: a resumed run keeps its name and folder")
        folder, checkpoint = _find_checkpoint(Path(options.resume))
        saved = sorted((folder / "configs").glob("*.yaml"))
        if checkpoint is None and not saved:
            wanted = folder / "checkpoints" / LAST
            raise UserError(f"-r {options.resume}: expected {wanted} of a run, or its configs, found neither")
        if not saved:
            raise UserError(f"{folder}: expected the run's configs in {folder / 'configs'}, found none")
        config = _with_flags(load_config([*saved, *options.base], options.overrides), options.trainer)
        return Run(folder, now, config, checkpoint, load_config(saved))
    if not options.base:
        raise UserError("expected --base CONFIG.yaml to start a run or -r RUN_FOLDER to go on with one, found neither")
    config = load_config(options.base, options.overrides)
    name = options.name or Path(options.base[0]).stem
    if Path(label := f"{name}{options.postfix}").name != label:
        raise UserError(
            f"-n/--name and -f/--postfix: expected part of a folder's name, found {label!r}; folders go to -l/--logdir"
        )
    folder = Path(options.logdir) / f"{now}_{name}{options.postfix}"
    return Run(folder, now, _with_flags(config, options.trainer))


def _start_time(options: argparse.Namespace) -> str:
    """When the run began, the same in all of its processes: it names the folder."""
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    if find_launch() is None and "LOCAL_RANK" in os.environ:
        now = os.environ.get(RUN_TIME_VARIABLE, now)  # of the process that started this one
    now = os.environ[RUN_TIME_VARIABLE] = agreed(now, int(options.trainer.get("num_nodes", 1)))
    return now


def _with_flags(config: DictConfig, flags: dict[str, Any]) -> DictConfig:
    """The config with the trainer's flags of the command line, which win; what says where to train goes together."""
    explicit = [name for name in ("accelerator", "devices") if name in flags]
    if "gpus" in flags and explicit:
        raise UserError(f"--gpus and --{explicit[0]} exclude each other: both say where to train")
    tree = to_container(config)
    trainer = tree.setdefault("lightning", {}).get("trainer") or {}
    for name in ("accelerator", "devices") if "gpus" in flags else ("gpus",) if explicit else ():
        trainer.pop(name, None)
    tree["lightning"]["trainer"] = {**trainer, **flags}
    return OmegaConf.create(tree)


def trainer_arguments(config: DictConfig) -> dict[str, Any]:
    """Arguments for Lightning's Trainer from `lightning.trainer`; CompVis' `gpus` becomes accelerator and devices.

    Raises `UserError` when a graphics card is asked for that is not there, and for a precision not trained in.
    """
    arguments = dict(to_container(config)["lightning"]["trainer"])
    if (precision := arguments.get("precision")) is not None:
        if str(precision) not in PRECISIONS:
            accepted = ", ".join(dict.fromkeys(PRECISIONS.values()))
            raise UserError(f"lightning.trainer.precision: expected one of {accepted}, found {precision!r}")
        arguments["precision"] = PRECISIONS[str(precision)]
    gpus = arguments.pop("gpus", None)
    if gpus is not None:
        arguments["accelerator"], arguments["devices"] = _devices(gpus)
    elif arguments.get("accelerator") in ("gpu", "cuda"):
        _require_cards(f"accelerator {arguments['accelerator']}", 1)
    arguments = {"accelerator": "auto", **arguments}
    return as_launched(arguments, num_devices({"devices": 1, **arguments, "num_nodes": 1}))


def check_places(folder: Path, logger: Any, callbacks: Sequence[Any]) -> None:
    """Raise `UserError` where an untrusted config has a logger or a callback write outside the run folder."""
    places = {"lightning.logger": getattr(logger, "log_dir", None)}
    for callback in callbacks:
        if (place := getattr(callback, "dirpath", None)) is not None:
            name = type(callback).__name__
            places[f"lightning: {name}.dirpath"] = place
            places[f"lightning: {name}.filename"] = os.path.join(place, getattr(callback, "filename", None) or "")
    inside = os.path.realpath(folder)
    for where, place in places.items():
        if place is None or is_trusted():
            continue
        found = os.path.realpath(place)
        if os.path.commonpath([inside, found]) != inside:
            raise UserError(
                f"{where}: expected a place in the run folder {folder}, found {found}; leave it out, or give {FLAG} if "
                "you know where this config comes from"
            )


def num_devices(arguments: dict[str, Any]) -> int:
    """How many processes the trainer arguments ask for, on all machines; "auto" and -1: one per card there is."""
    devices = arguments["devices"]
    if devices in ("auto", "-1", -1):
        on_one = 1 if arguments["accelerator"] == "cpu" else max(1, torch.cuda.device_count())
    elif isinstance(devices, list) or "," in str(devices):
        on_one = len(devices if isinstance(devices, list) else devices.strip(", ").split(","))
    elif str(devices).isdecimal():
        on_one = int(devices)
    else:
        raise UserError(
            f'--devices: expected how many (2), card numbers with a comma ("0," or "0,1") or auto, found {devices!r}'
        )
    return on_one * int(arguments.get("num_nodes", 1))


def _devices(gpus: Any) -> tuple[str, list[int] | int]:
    """What CompVis' --gpus means: with a comma, or as a list, card numbers; without, how many; 0: the processor."""
    try:
        is_list = isinstance(gpus, list) or "," in str(gpus)
        numbers = gpus if isinstance(gpus, list) else [part for part in str(gpus).split(",") if part.strip()]
        numbers = [int(number) for number in numbers]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < (0 if is_list else -1):
        raise UserError(f'--gpus: expected card numbers with a comma ("0," or "0,1") or how many (2), found {gpus!r}')
    if not is_list and numbers[0] == 0:
        return "cpu", 1
    needed = max(numbers) + 1 if is_list else abs(numbers[0])
    _require_cards(f"--gpus {','.join(map(str, numbers))}{',' if len(numbers) == 1 and is_list else ''}", needed)
    return "gpu", numbers if is_list else numbers[0]


def _require_cards(wish: str, needed: int) -> None:
    found = torch.cuda.device_count()
    if found >= needed:
        return
    if torch.version.cuda is None and torch.version.hip is None:
        reason = f"this PyTorch ({torch.__version__}) is built without CUDA"
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = f"PyTorch sees {found}" + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else "")
    raise UserError(
        f"{wish} needs {needed} graphics card{'s' if needed > 1 else ''}, found {found}: {reason}. Give --accelerator "
        "cpu instead to train on the processor"
    )


def _find_checkpoint(path: Path) -> tuple[Path, Path | None]:
    """Run folder and checkpoint from what -r was given; None where a run ended before it saved."""
    if path.is_dir():
        folder = path.parent if path.name == "checkpoints" else path
        return folder, _last_whole(path, folder / "checkpoints")
    if not path.is_file():
        raise UserError(f"-r {path}: expected a run folder or a checkpoint file, found nothing there")
    for parent in path.resolve().parents:
        if parent.name == "checkpoints":
            return parent.parent, path
    raise UserError(f"-r {path}: expected a file in the checkpoints folder of a run, so that its configs can be found")


def _last_whole(path: Path, folder: Path) -> Path | None:
    """The newest of the last checkpoints that is whole; says which ones are not. None where there never was one."""
    candidates = kept(folder)
    if not candidates:
        log.warning("%s has no checkpoint: the run ended before it saved, and begins again", folder)
        return None
    torn = {}
    for candidate in candidates:
        torn[candidate.name] = reason = damage(candidate)
        if reason is None:
            if candidate.name != LAST:
                log.warning("%s is used: it is the newest whole checkpoint", candidate)
            return candidate
        log.warning("%s is damaged or half written: %s", candidate, reason)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in torn.items())
    raise UserError(
        f"-r {path}: expected a whole checkpoint in {folder}, found none ({reasons}); give another file of that "
        "folder, if there is one, or begin the run again"
    )


def _value(text: str) -> Any:
    """A flag's value, read as an override's: 1e-4 is a number, 00:12:00:00 is not."""
    return to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]


def _truth(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected yes or no, found {text!r}")
