"""Ablations: training runs that differ in one thing, rows of clips sampled from them, and the measures of these.

A plan is that of `comparison` with rows:

    base, overrides, runs: as in `comparison`; overrides of the command line come before those of a run; no runs are
                           needed if every row uses the common start
    sampling: {frames: 5, fps: 12, steps: 20, scale: 3}    # keys of `Sampling`, for every row
    evaluations: {moving: {looks: moving}, still: {looks: still}}    # name -> keys of `Sampling`
    rows:
      per-frame image model: {run: start}                  # the checkpoint at model.params.ckpt_path, untrained
      ours: {run: ours}
      ours, 16 frames: {run: ours, evaluations: [moving], frames: 16}    # and keys of `Sampling`
    columns: {road: moving/road_expansion, of true: moving/road_expansion of true, loss: logged/val/loss}

A column is a measure of an evaluation, absolute or relative to the true clips, its number of `clips`, a logged tag, or
`minutes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from ldm.config import nearest
from ldm.config.schema import check_values
from ldm.errors import UserError
from ldm.experiments.comparison import Comparison

START = "start"  # instead of a run: the checkpoint at model.params.ckpt_path
LOGGED, MINUTES, CLIPS, OF_TRUE = "logged/", "minutes", "clips", " of true"


@dataclass(frozen=True)
class Sampling:
    """The clips of a row. looks, clips, seed: as in scripts/evaluate.py; the others as in scripts/txt2vid.py.

    first_frame: the first frame of each true clip is given. interpolate: every k-th frame is given.
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
    def has_given_frames(self) -> bool:
        """Whether the clips are sampled from frames, not from text alone."""
        return self.first_frame or self.interpolate is not None

    def options(self, *names: str) -> list[str]:
        """Some settings as arguments of a command line."""
        return [word for name in names for word in (f"--{name.replace('_', '-')}", f"{getattr(self, name)}")]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> Sampling:
        """Check values of the right types; raises UserError that starts with `where`."""
        sampling = cls(**values)
        for name in ("clips", "steps"):
            if getattr(sampling, name) < 1:
                raise UserError(f"{where}.{name}: expected at least 1, found {getattr(sampling, name)}")
        if sampling.frames < 2:
            raise UserError(f"{where}.frames: expected at least 2, found {sampling.frames}: one frame has no motion")
        step = sampling.interpolate
        if sampling.first_frame and step is not None:
            raise UserError(f"{where}: expected first_frame or interpolate, found both; choose one")
        if step is not None and (step < 2 or (sampling.frames - 1) % step):
            raise UserError(
                f"{where}.interpolate: expected 2 or more, and frames = 1 + a multiple of it, found {step} and "
                f"{sampling.frames} frames"
            )
        return sampling


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

    comparison: Comparison
    rows: Mapping[str, tuple[str, Mapping[str, Sampling]]]

    @classmethod
    def from_mapping(cls, plan: Mapping[str, Any], where: str) -> Ablations:
        """Check parsed YAML; raises UserError that starts with `where`."""
        own = {key: plan[key] for key in ABLATION_KINDS if plan.get(key)}
        if missing := [key for key in ("evaluations", "rows") if key not in own]:
            raise UserError(f"{where}: expected {missing[0]}, found none")
        check_values(own, ABLATION_KINDS, where)
        of_runs = {key: value for key, value in plan.items() if key not in ABLATION_KINDS}
        comparison = Comparison.from_mapping(of_runs, where, optional=("overrides", "runs"))
        if START in comparison.runs:
            raise UserError(f"{where}: runs: expected names other than '{START}', the common starting checkpoint")
        common = own.get("sampling", {})
        _check_keys(common, SAMPLING_KINDS, f"{where}: sampling")
        for name, more in own["evaluations"].items():
            _check_keys(more, SAMPLING_KINDS, f"{where}: evaluations.{name}")
        rows = {}
        for name, row in own["rows"].items():
            path = f"{where}: rows.{name}"
            _check_keys(row, ROW_KINDS, path)
            chosen = row.get("evaluations", list(own["evaluations"]))
            for evaluation in chosen:
                _check_known(evaluation, own["evaluations"], f"{path}.evaluations")
            _check_known(row.get("run"), [*comparison.runs, START], f"{path}.run")
            of_row = {key: value for key, value in row.items() if key in SAMPLING_KINDS}
            samplings = {
                each: Sampling.from_mapping({**common, **own["evaluations"][each], **of_row}, path) for each in chosen
            }
            rows[name] = (row["run"], samplings)
        for heading, column in comparison.columns.items():
            if column != MINUTES and not column.startswith(LOGGED):
                _check_known(column.partition("/")[0], own["evaluations"], f"{where}: columns.{heading}")
        return cls(comparison, rows)

    def with_overrides(self, more: Sequence[str]) -> Ablations:
        """The same plan with more arguments of main.py, before those of each run."""
        overrides = [*self.comparison.overrides, *more]
        return replace(self, comparison=replace(self.comparison, overrides=overrides))

    def gather(self, runs: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
        """The results so far, for tables: for each row its run and its line in the report of each evaluation.

        runs: name -> seconds, logged. made: name of a row -> evaluation -> report of scripts/evaluate.py. Reference
        rows, equal for all rows, are those of the first row of each evaluation.
        """
        results = {"columns": dict(self.comparison.columns), "runs": dict(runs), "measures": {}, "distances": {}}
        references, rows = {}, {}
        for name, (run, _) in self.rows.items():
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


def _check_keys(values: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    for key in values:
        _check_known(key, kinds, where)
    check_values(values, kinds, where)


def _check_known(name: str | None, known: Sequence[str] | Mapping[str, Any], where: str) -> None:
    if name not in known:
        raise UserError(f"{where}: expected one of {', '.join(known)}, found {name}; {nearest(str(name), known)}")
