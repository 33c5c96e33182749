"""Runs that differ in one thing, side by side: what is run and what the runs logged.

A plan is a YAML file:

    base: [configs/tiny/video.yaml]                   # as main.py's --base
    overrides: [lightning.trainer.max_steps=300]      # of every run
    columns: {loss: train/loss, held out: val/loss}   # heading -> what the run logged; its last value
    runs:
      baseline: []                                    # name -> overrides of its own
      more noise: [model.params.noise.offset=0.1]
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

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


START = "start"  # in place of a run's name: the checkpoint at model.params.ckpt_path
LOGGED, MINUTES, CLIPS, OF_TRUE = "logged/", "minutes", "clips", " of true"


@dataclass(frozen=True)
class Sampling:
    """Which clips a row is made of. looks, clips, seed: as in scripts/evaluate.py; the next ones as in txt2vid.py.

    first_frame: the first frame of each true clip is given.  interpolate: every k-th one is.
    """

    looks: str = "all"
    clips: int = 32
    seed: int = 0
    frames: int = 5
    fps: float = 12.0
    steps: int = 25
    scale: float = 1.0
    motion_scale: float = 1.0
    sampler: str = "ddim"
    first_frame: bool = False
    interpolate: int | None = None

    @property
    def is_given_frames(self) -> bool:
        """Whether the clips are made from frames, not from text alone."""
        return self.first_frame or self.interpolate is not None

    def options(self, *names: str) -> list[str]:
        """These settings as words of a command line."""
        return [word for name in names for word in (f"--{name.replace('_', '-')}", f"{getattr(self, name)}")]


SAMPLING_KINDS = get_type_hints(Sampling)
ROW_KINDS = {"run": str, "evaluations": Sequence[str], **SAMPLING_KINDS}
ABLATION_KINDS = {
    "sampling": Mapping[str, Any],
    "evaluations": Mapping[str, Mapping[str, Any]],
    "rows": Mapping[str, Mapping[str, Any]],
}


@dataclass(frozen=True)
class Ablations:
    """A plan; see the module's docstring. `rows`: name of a row -> its run, and name of an evaluation -> its clips."""

    plan: Plan
    rows: Mapping[str, tuple[str, Mapping[str, Sampling]]]

    @classmethod
    def of_words(cls, words: Mapping[str, Any], where: str) -> Ablations:
        """From parsed YAML; raises UserError that starts with `where`."""
        own = {word: words[word] for word in ABLATION_KINDS if words.get(word)}
        if missing := [word for word in ("evaluations", "rows") if word not in own]:
            raise UserError(f"{where}: expected {missing[0]}, found none of it")
        check_values(own, ABLATION_KINDS, where)
        of_runs = {word: value for word, value in words.items() if word not in ABLATION_KINDS}
        plan = Plan.of_words(of_runs, where, may_miss=("overrides", "runs"))
        if START in plan.runs:
            raise UserError(f"{where}: runs: expected other names than '{START}', which is what all of them start from")
        common = own.get("sampling", {})
        _check_words(common, SAMPLING_KINDS, f"{where}: sampling")
        for name, more in own["evaluations"].items():
            _check_words(more, SAMPLING_KINDS, f"{where}: evaluations.{name}")
        rows = {}
        for name, row in own["rows"].items():
            path = f"{where}: rows.{name}"
            _check_words(row, ROW_KINDS, path)
            chosen = row.get("evaluations", list(own["evaluations"]))
            for evaluation in chosen:
                _check_known(evaluation, own["evaluations"], f"{path}.evaluations")
            _check_known(row.get("run"), [*plan.runs, START], f"{path}.run")
            of_row = {word: value for word, value in row.items() if word in SAMPLING_KINDS}
            samplings = {each: _sampling({**common, **own["evaluations"][each], **of_row}, path) for each in chosen}
            rows[name] = (row["run"], samplings)
        for heading, column in plan.columns.items():
            if column != MINUTES and not column.startswith(LOGGED):
                _check_known(column.partition("/")[0], own["evaluations"], f"{where}: columns.{heading}")
        return cls(plan, rows)

    def with_overrides(self, more: Sequence[str]) -> Ablations:
        """The same with more words for main.py, which go before those of each run."""
        plan = dataclasses.replace(self.plan, overrides=[*self.plan.overrides, *more])
        return dataclasses.replace(self, plan=plan)


def gather(plan: Ablations, runs: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """What there is so far, for tables: of each row the run and, for each evaluation, its line of the report.

    runs: name -> seconds, logged. made: name of a row -> evaluation -> report as scripts/evaluate.py writes it. Of the
    reference rows, which are the same for all, those beside the first row of each evaluation are kept.
    """
    results = {"columns": dict(plan.plan.columns), "runs": dict(runs), "measures": {}, "distances": {}}
    references, rows = {}, {}
    for name, (run, _) in plan.rows.items():
        own = {}
        for evaluation, entry in made.get(name, {}).items():
            report = entry["report"]
            for kind in ("measures", "distances"):
                results[kind] |= report.get(kind, {})
            references.setdefault(evaluation, [row for row in report["rows"] if row["is_reference"]])
            own[evaluation] = next(row for row in report["rows"] if not row["is_reference"])
        if own:
            rows[name] = {"run": run, "evaluations": own}
    return {**results, "references": references, "rows": rows}


def _sampling(words: Mapping[str, Any], where: str) -> Sampling:
    sampling = Sampling(**words)
    for name in ("clips", "steps"):
        if getattr(sampling, name) < 1:
            raise UserError(f"{where}.{name}: expected at least 1, found {getattr(sampling, name)}")
    if sampling.frames < 2:
        raise UserError(f"{where}.frames: expected at least 2, found {sampling.frames}: nothing moves in one picture")
    if sampling.first_frame and sampling.interpolate is not None:
        raise UserError(f"{where}: first_frame and interpolate exclude each other")
    if sampling.interpolate is not None and (sampling.interpolate < 2 or (sampling.frames - 1) % sampling.interpolate):
        raise UserError(
            f"{where}.interpolate: expected 2 or more, and frames = 1 + a multiple of it, found {sampling.interpolate} "
            f"and {sampling.frames} frames"
        )
    return sampling


def _check_words(words: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    for word in words:
        _check_known(word, kinds, where)
    check_values(words, kinds, where)


def _check_known(word: str | None, known: Sequence[str] | Mapping[str, Any], where: str) -> None:
    if word not in known:
        raise UserError(f"{where}: expected one of {', '.join(known)}, found {word}; {nearest(str(word), known)}")
