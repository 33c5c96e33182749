"""Learning curves: what runs measured of their samples while they were trained, against the compute they had spent.

A record is what `ldm.callbacks.MotionLogger` writes into a run folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.evaluation.outlook import Point, look_ahead
from ldm.evaluation.statistics import estimate, warnings
from ldm.json_text import parse_json

TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_")  # that the name of a run folder begins with
PARTS = ("settings", "measures", "data", "occasions")
COMPARABLE = ("captions", "num_clips", "frames", "fps", "sampler", "steps", "scale", "seed")


@dataclass(frozen=True)
class Record:
    """What one run measured: `words` as in its file, with settings, measures, data and occasions."""

    name: str
    path: Path
    words: Mapping[str, Any]


def find_records(places: Sequence[Path]) -> list[Record]:
    """The records in run folders, or the named files themselves; raises UserError where there is none."""
    records = []
    for place in places:
        if place.is_dir():
            found = [record for path in sorted(place.glob("*.json")) if (record := _read(path)) is not None]
            if not found:
                raise UserError(
                    f"{place}: expected the folder of a run that measured its samples, found no record of it; train "
                    "with ldm.callbacks.MotionLogger among lightning.callbacks"
                )
        elif not place.is_file():
            raise UserError(f"{place}: expected a run folder or a record of one, found no such file")
        elif (record := _read(place)) is None:
            raise UserError(f"{place}: expected a record of ldm.callbacks.MotionLogger, found other JSON")
        else:
            found = [record]
        records += found
    for record in records:
        _check(record)
    return records


def _read(path: Path) -> Record | None:
    """None for JSON of something else."""
    try:
        words = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found something else ({error})") from None
    if not isinstance(words, dict) or not all(part in words for part in PARTS):
        return None
    run = TIME.sub("", path.resolve().parent.name)
    return Record(run if path.stem == "motion" else f"{run}, {path.stem}", path, words)


def _check(record: Record) -> None:
    occasions = record.words["occasions"]
    if any(occasion["tflop"] is None for occasion in occasions):
        raise UserError(
            f"{record.path}: expected the compute spent on each occasion, found none; train with "
            "ldm.callbacks.ComputeCount among lightning.callbacks"
        )
    if not any(occasion["tflop"] > 0 for occasion in occasions):
        raise UserError(
            f"{record.path}: expected an occasion after the first step, found {len(occasions)} before it; train on"
        )


def summarise(records: Sequence[Record], share: float) -> dict[str, Any]:
    """All curves in plain containers, ready for JSON; `share` of the data's mean is the target of the outlook."""
    measures = {name: dict(measure) for record in records for name, measure in record.words["measures"].items()}
    return {"target": share, "measures": measures, "curves": [_curve(record, measures, share) for record in records]}


def _curve(record: Record, measures: Mapping[str, Mapping[str, Any]], share: float) -> dict[str, Any]:
    data = record.words["data"]
    found = {}
    for name, measure in measures.items():
        true = estimate(data["values"].get(name, []), data["scenes"] if name in data["values"] else [])
        points = []
        for occasion in record.words["occasions"]:
            values = occasion["values"].get(name, [])
            mean = estimate(values, [str(number) for number in range(len(values))])
            if mean.mean is not None:
                points.append({"step": occasion["step"], "tflop": occasion["tflop"], **asdict(mean)})
        outlook = None
        if measure["better"] > 0 and points:
            seen = [Point(*(point[word] for word in ("tflop", "mean", "low", "high"))) for point in points]
            outlook = asdict(look_ahead(seen, true, share))
        found[name] = {"data": asdict(true), "points": points, "outlook": outlook}
    return {"name": record.name, "record": record.path.name, "settings": record.words["settings"], "measures": found}


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What to beware of when reading the curves."""
    curves = {curve["name"]: curve["settings"]["num_clips"] for curve in summary["curves"]}
    found = [
        f"{name}: {warning}"
        for name, num_clips in curves.items()
        for warning in warnings([str(number) for number in range(num_clips)])
    ]
    first = summary["curves"][0]
    for curve in summary["curves"][1:]:
        differing = [word for word in COMPARABLE if curve["settings"].get(word) != first["settings"].get(word)]
        if differing:
            words = ", ".join(differing)
            found.append(f"{curve['name']} was measured with other {words} than {first['name']}: do not compare levels")
    return found
