"""Training runs that differ in one thing: the plan of a comparison, its commands and what the runs logged.

A plan is a YAML file:

    base: [configs/tiny/video.yaml]                   # as main.py's --base
    overrides: [lightning.trainer.max_steps=300]      # of every run
    columns: {loss: train/loss, held out: val/loss}   # heading -> logged tag; its last value
    runs:
      baseline: []                                    # name -> overrides of its own
      more noise: [model.params.noise.offset=0.1]
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from yaml import YAMLError

from ldm.config import nearest
from ldm.config.schema import check_values
from ldm.config.untrusted import checked_text
from ldm.errors import UserError

KINDS = {
    "base": Sequence[str],
    "overrides": Sequence[str],
    "columns": Mapping[str, str],
    "runs": Mapping[str, Sequence[str]],
}
OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+|\[\d+\])*=")
LAST_SHARE = 0.2  # of the noisy training loss that is averaged


@dataclass(frozen=True)
class Comparison:
    """The plan of a comparison; see the module's docstring."""

    base: Sequence[str]
    overrides: Sequence[str]
    columns: Mapping[str, str]
    runs: Mapping[str, Sequence[str]]

    @classmethod
    def from_mapping(cls, plan: Mapping[str, Any], where: str, optional: Sequence[str] = ("overrides",)) -> Comparison:
        """Check parsed YAML, in which the `optional` keys may be missing; raises UserError that starts with `where`."""
        for key in plan:
            if key not in KINDS:
                raise UserError(f"{where}: {key}: expected {', '.join(KINDS)}; {nearest(key, KINDS)}")
        plan = {"overrides": [], "runs": {}, **plan}
        if missing := [key for key in KINDS if not plan.get(key) and key not in optional]:
            raise UserError(f"{where}: expected {missing[0]}, found none")
        check_values(plan, KINDS, where)
        for name, overrides in {"overrides": plan["overrides"], **plan["runs"]}.items():
            for override in overrides:  # on the command line, a flag would pass for the user's
                if not OVERRIDE.match(override):
                    raise UserError(
                        f"{where}: {name}: expected overrides such as data.params.frames=8, found {override!r}"
                    )
        for path in plan["base"]:
            if path.startswith("-"):
                raise UserError(f"{where}: base: expected paths of configs, found {path!r}")
        return cls(**plan)

    def command(self, name: str, folder: Path, more: Sequence[str]) -> list[str]:
        """main.py with the arguments of a run, which writes to `folder/<time>_<name>`."""
        command = ["main.py", "--base", *self.base, "-t", "-n", file_name(name), "-l", str(folder)]
        return [*command, *self.overrides, *self.runs[name], *more]


def file_name(name: str) -> str:
    """A run's name as part of a folder name: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_logged(run_folder: Path) -> dict[str, float]:
    """TensorBoard tag -> last value; for `train/*` the mean of the last fifth."""
    events = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={SCALARS: 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        values = [event.value for event in events.Scalars(tag)]
        last = max(1, round(LAST_SHARE * len(values))) if tag.startswith("train/") else 1
        found[tag] = float(np.mean(values[-last:]))
    return found


def read_plan_file(path: Path) -> dict[str, Any]:
    """The plan in a YAML file as plain containers; raises UserError."""
    try:
        plan = OmegaConf.to_container(OmegaConf.load(io.StringIO(checked_text(path))))
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected a plan of runs, found no such file") from error
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: expected YAML, found other content ({str(error).splitlines()[0]})") from error
    if not isinstance(plan, dict):
        raise UserError(f"{path}: expected base, columns and runs, found {type(plan).__name__}")
    return plan
