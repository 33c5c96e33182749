"""Ablations: runs that differ in one thing, rows of clips made by them, and what these are measured with.

A plan is that of `comparison` with rows besides:

    base, overrides, runs: as in `comparison`; what the command line adds goes before a run's own overrides; no runs
                           where all rows are of what they would start from
    sampling: {frames: 5, fps: 12, steps: 20, scale: 3}    # words of `Sampling`, of every row
    evaluations: {moving: {looks: moving}, still: {looks: still}}    # name -> words of `Sampling` of its own
    rows:
      per-frame image model: {run: start}                  # the checkpoint that the runs start from, untrained
      ours: {run: ours}
      ours, 16 frames: {run: ours, evaluations: [moving], frames: 16}    # and words of `Sampling` of its own
    columns: {road: moving/road_expansion, of true: moving/road_expansion of true, loss: logged/val/loss}

A column is a measure of an evaluation, as it is or as a part of the true clips', or its number of `clips`, or what the
run logged, or `minutes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from ldm.comparison import Plan
from ldm.config import nearest
from ldm.config_values import check_values
from ldm.errors import UserError

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
KINDS = {
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
        own = {word: words[word] for word in KINDS if words.get(word)}
        if missing := [word for word in ("evaluations", "rows") if word not in own]:
            raise UserError(f"{where}: expected {missing[0]}, found none of it")
        check_values(own, KINDS, where)
        of_runs = {word: value for word, value in words.items() if word not in KINDS}
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
