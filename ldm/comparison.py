"""Runs that differ in one thing, side by side: what is run, and the table of what the runs logged.

A plan is a YAML file:

    base: [configs/tiny/video.yaml]                   # as main.py's --base
    overrides: [lightning.trainer.max_steps=300]      # of every run
    columns: {loss: train/loss, held out: val/loss}   # heading -> what the run logged; its last value
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
from ldm.config_text import checked_text
from ldm.config_values import check_values
from ldm.errors import UserError

KINDS = {
    "base": Sequence[str],
    "overrides": Sequence[str],
    "columns": Mapping[str, str],
    "runs": Mapping[str, Sequence[str]],
}
OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+|\[\d+\])*=")
LAST_SHARE = 0.2  # of what a run logged of its training loss, which is noisy, to average


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison; see the module's docstring."""

    base: Sequence[str]
    overrides: Sequence[str]
    columns: Mapping[str, str]
    runs: Mapping[str, Sequence[str]]

    @classmethod
    def of_words(cls, words: Mapping[str, Any], where: str, may_miss: Sequence[str] = ("overrides",)) -> Plan:
        """From parsed YAML, which need not have what it `may_miss`; raises UserError that starts with `where`."""
        for word in words:
            if word not in KINDS:
                raise UserError(f"{where}: {word}: expected {', '.join(KINDS)}; {nearest(word, KINDS)}")
        words = {"overrides": [], "runs": {}, **words}
        if missing := [word for word in KINDS if not words.get(word) and word not in may_miss]:
            raise UserError(f"{where}: expected {missing[0]}, found none of it")
        check_values(words, KINDS, where)
        for name, overrides in {"overrides": words["overrides"], **words["runs"]}.items():
            for word in overrides:  # they become words of a command line, where flags would be taken for the user's
                if not OVERRIDE.match(word):
                    raise UserError(f"{where}: {name}: expected overrides such as data.params.frames=8, found {word!r}")
        for word in words["base"]:
            if word.startswith("-"):
                raise UserError(f"{where}: base: expected names of configs, found {word!r}")
        return cls(**words)

    def command(self, name: str, folder: Path, more: Sequence[str]) -> list[str]:
        """The words of main.py's command line for a run; its folder will be `folder/<time>_<name>`."""
        words = ["main.py", "--base", *self.base, "-t", "-n", file_name(name), "-l", str(folder)]
        return [*words, *self.overrides, *self.runs[name], *more]


def file_name(name: str) -> str:
    """A run's name as part of a folder's: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_logged(run_folder: Path) -> dict[str, float]:
    """What a run logged to TensorBoard: tag -> its last value; of `train/*` the mean over the last fifth."""
    events = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={SCALARS: 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        values = [event.value for event in events.Scalars(tag)]
        last = max(1, round(LAST_SHARE * len(values))) if tag.startswith("train/") else 1
        found[tag] = float(np.mean(values[-last:]))
    return found


def table(columns: Mapping[str, str], results: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row for each run, a column for each heading; a dash where a run has not logged it."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, logged in results.items():
        cells = [f"{logged[tag]:.4f}" if tag in logged else "-" for tag in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read_words(path: Path) -> dict[str, Any]:
    """The words of a plan in a YAML file; raises UserError."""
    try:
        words = OmegaConf.to_container(OmegaConf.load(io.StringIO(checked_text(path))))
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected a plan of runs, found no such file") from error
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: expected YAML, found something else ({str(error).splitlines()[0]})") from error
    if not isinstance(words, dict):
        raise UserError(f"{path}: expected base, columns and runs, found {type(words).__name__}")
    return words
