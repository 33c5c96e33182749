"""The command line of training and the arguments of Lightning's Trainer: CompVis' flags, devices and precision."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.config import nearest, to_container
from ldm.config.schema import FLAG
from ldm.errors import Parser, UserError
from ldm.runs.identity import ALLOWED
from ldm.runs.launch import as_launched

TRAINER_FLAGS = (
    "accelerator", "devices", "num_nodes", "strategy", "precision", "max_steps", "max_epochs", "max_time", "min_steps",
    "accumulate_grad_batches", "gradient_clip_val", "val_check_interval", "check_val_every_n_epoch",
    "limit_train_batches", "limit_val_batches", "num_sanity_val_steps", "log_every_n_steps", "overfit_batches",
    "profiler",
)  # fmt: skip
TRAINER_SWITCHES = ("fast_dev_run", "deterministic", "benchmark", "detect_anomaly", "enable_progress_bar")
# Lightning's other precisions change the dtype of the weights; frozen and averaged ones would not follow.
PRECISIONS = {
    "32": "32-true", "32-true": "32-true", "16": "16-mixed", "16-mixed": "16-mixed",
    "bf16": "bf16-mixed", "bf16-mixed": "bf16-mixed",
}  # fmt: skip
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+|\[\d+\])*=")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """CompVis' flags, flags of Lightning's trainer that were given (`.trainer`) and `.overrides` (`key=value`).

    Raises `UserError` for an unknown flag, with the nearest one.
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
    parser.add_argument("-r", "--resume", default="", metavar="DIR|FILE", help="resume this run in its own folder")
    parser.add_argument(
        "--allow", default="", metavar="WHAT,...",
        help="resume although config, data or model changed (otherwise an error lists the differences)",
    )  # fmt: skip
    parser.add_argument("-f", "--postfix", default="", help="appended to the run's name")
    parser.add_argument("-l", "--logdir", default="logs", help="where run folders are made")
    parser.add_argument("-s", "--seed", type=int, default=23, help="of what the config does not seed")
    parser.add_argument(
        "--no-test", nargs="?", const=True, default=False, type=_truth, help="skip the model's test, if it has one"
    )
    parser.add_argument(
        "--scale_lr", nargs="?", const=True, default=False, type=_truth,
        help="learning rate = base rate x accumulated batches x devices x batch size",
    )  # fmt: skip
    parser.add_argument(FLAG, action="store_true", help="build any class that the config names")
    trainer = parser.add_argument_group("Lightning's trainer; these override the config")
    trainer.add_argument("--gpus", default=argparse.SUPPRESS, help='"0,": GPU 0; "0,1": these; 2: any two; 0: none')
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
        raise UserError("--allow: expected with -r/--resume, found without it; leave it out for a new run")
    for name in names:
        if name not in ALLOWED:
            raise UserError(f"--allow: expected some of {', '.join(ALLOWED)}, found {name!r}; {nearest(name, ALLOWED)}")
    return names


def with_trainer_flags(config: DictConfig, flags: Mapping[str, Any]) -> DictConfig:
    """The config with the trainer's flags of the command line; one that chooses devices replaces all that do."""
    explicit = [name for name in ("accelerator", "devices") if name in flags]
    if "gpus" in flags and explicit:
        raise UserError(f"--gpus and --{explicit[0]} exclude each other: both choose the devices")
    tree = to_container(config)
    trainer = tree.setdefault("lightning", {}).get("trainer") or {}
    for name in ("accelerator", "devices") if "gpus" in flags else ("gpus",) if explicit else ():
        trainer.pop(name, None)
    tree["lightning"]["trainer"] = {**trainer, **flags}
    return OmegaConf.create(tree)


def trainer_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for Lightning's Trainer from `lightning.trainer`; CompVis' `gpus` becomes accelerator and devices.

    Raises `UserError` for a GPU that is not there and for a precision that is not supported.
    """
    arguments = dict(to_container(config["lightning"]["trainer"]))
    if (precision := arguments.get("precision")) is not None:
        if str(precision) not in PRECISIONS:
            accepted = ", ".join(dict.fromkeys(PRECISIONS.values()))
            raise UserError(f"lightning.trainer.precision: expected one of {accepted}, found {precision!r}")
        arguments["precision"] = PRECISIONS[str(precision)]
    gpus = arguments.pop("gpus", None)
    if gpus is not None:
        arguments["accelerator"], arguments["devices"] = _devices(gpus)
    elif arguments.get("accelerator") in ("gpu", "cuda"):
        _require_gpus(f"accelerator {arguments['accelerator']}", 1)
    arguments = {"accelerator": "auto", **arguments}
    return as_launched(arguments, num_devices({"devices": 1, **arguments, "num_nodes": 1}))


def num_devices(arguments: dict[str, Any]) -> int:
    """Processes that the trainer arguments ask for, on all machines; "auto" and -1: one per GPU."""
    devices = arguments["devices"]
    if devices in ("auto", "-1", -1):
        on_one = 1 if arguments["accelerator"] == "cpu" else max(1, torch.cuda.device_count())
    elif isinstance(devices, list) or "," in str(devices):
        on_one = len(devices if isinstance(devices, list) else devices.strip(", ").split(","))
    elif str(devices).isdecimal():
        on_one = int(devices)
    else:
        raise UserError(
            f'--devices: expected how many (2), GPU numbers with a comma ("0," or "0,1") or auto, found {devices!r}'
        )
    return on_one * int(arguments.get("num_nodes", 1))


def _devices(gpus: Any) -> tuple[str, list[int] | int]:
    """Accelerator and devices of CompVis' --gpus: GPU numbers with a comma or as a list, a count without; 0: CPU."""
    try:
        is_list = isinstance(gpus, list) or "," in str(gpus)
        numbers = gpus if isinstance(gpus, list) else [part for part in str(gpus).split(",") if part.strip()]
        numbers = [int(number) for number in numbers]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < (0 if is_list else -1):
        raise UserError(f'--gpus: expected GPU numbers with a comma ("0," or "0,1") or how many (2), found {gpus!r}')
    if not is_list and numbers[0] == 0:
        return "cpu", 1
    needed = max(numbers) + 1 if is_list else abs(numbers[0])
    _require_gpus(f"--gpus {','.join(map(str, numbers))}{',' if len(numbers) == 1 and is_list else ''}", needed)
    return "gpu", numbers if is_list else numbers[0]


def _require_gpus(wish: str, needed: int) -> None:
    found = torch.cuda.device_count()
    if found >= needed:
        return
    if torch.version.cuda is None and torch.version.hip is None:
        reason = f"this PyTorch ({torch.__version__}) is built without CUDA"
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = f"PyTorch sees {found}" + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else "")
    raise UserError(
        f"{wish}: expected {needed} GPU{'s' if needed > 1 else ''}, found {found}: {reason}. Give --accelerator cpu "
        "to train on the CPU"
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
