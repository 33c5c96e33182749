"""Tables in Markdown from the JSON of evaluations and ablations, and documents whose tables are kept up to date.

A document has places for tables, each with the file it comes from, relative to the document:

    <!-- table: report/ablations.json -->
    ... whatever stood here is replaced ...
    <!-- end of table -->

Nothing is computed here: every number is one that a script has written. The config of a bundle has a table as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.ablations import CLIPS, LOGGED, MINUTES, OF_TRUE
from ldm.errors import UserError
from ldm.evaluation.report import number
from ldm.model_card import bundle_table, is_training, training_table

NOTHING = "-"
PLACES, PLACES_OF_SHARES = 4, 2  # of what a run logged, of parts of the true clips'
PLACE = re.compile(r"(<!-- table: *(\S+) *-->\n).*?(<!-- end of table -->)", flags=re.DOTALL)
BEGINS = "<!-- table:"


def fill_document(document: Path) -> str:
    """The text of a document with all its tables made anew; raises UserError."""
    text = document.read_text(encoding="utf-8")
    if not PLACE.search(text) or len(PLACE.findall(text)) != text.count(BEGINS):
        raise UserError(
            f"{document}: expected places for tables, '<!-- table: FILE.json -->' and below '<!-- end of table -->', "
            f"found {len(PLACE.findall(text))} whole ones of {text.count(BEGINS)}"
        )
    return PLACE.sub(lambda place: f"{place[1]}{table_of(document.parent / place[2])}{place[3]}", text)


def table_of(path: Path) -> str:
    """The table of a file of results, or of the config of a bundle; raises UserError."""
    if path.suffix == ".yaml":
        return bundle_table(path.parent)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected results of evaluate.py or ablate.py, found no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: expected JSON, found something else ({error})") from error
    if isinstance(results, dict) and {"columns", "runs", "references", "rows"} <= results.keys():
        return ablation_table(results)
    if isinstance(results, dict) and {"measures", "rows"} <= results.keys():
        return evaluation_table(results)
    if is_training(results):
        return training_table(results)
    raise UserError(f"{path}: expected results of evaluate.py or ablate.py, found other JSON")


def evaluation_table(report: Mapping[str, Any]) -> str:
    """A line for each row of a report of scripts/evaluate.py: means and their 95% intervals, then distances."""
    kinds = [("estimates", name, its) for name, its in report["measures"].items()]
    kinds += [("distances", name, its) for name, its in report.get("distances", {}).items()]
    lines = [
        [row["name"], str(row["num_clips"]), *(_cell(row[kind].get(name), its["places"]) for kind, name, its in kinds)]
        for row in report["rows"]
    ]
    titles = [its["title"] if kind == "estimates" else f"Frechet distance of {its['title']}" for kind, _, its in kinds]
    return _markdown(["", "clips", *titles], lines)


def ablation_table(results: Mapping[str, Any]) -> str:
    """A line for each row of an ablation, and before them the reference rows."""
    columns, rows = results["columns"], results["rows"]
    references: dict[str, dict[str, Any]] = {}
    for evaluation, found in results["references"].items():
        for row in found:
            references.setdefault(row["name"], {})[evaluation] = row
    lines = [[name, *_cells(results, found, None)] for name, found in references.items() if name not in rows]
    for name, row in rows.items():
        lines.append([name, *_cells(results, row["evaluations"], results["runs"].get(row["run"]))])
    return _markdown(["", *columns], lines)


def _cells(
    results: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], run: Mapping[str, Any] | None
) -> Iterator[str]:
    """One line. found: evaluation -> the row of its report. run: what was trained for it; None: nothing was."""
    for column in results["columns"].values():
        if column == MINUTES:
            yield NOTHING if run is None else f"{run['seconds'] / 60:.1f}"
        elif column.startswith(LOGGED):
            value = None if run is None else run["logged"].get(column.removeprefix(LOGGED))
            yield NOTHING if value is None else f"{value:.{PLACES}f}"
        else:
            evaluation, _, measure = column.partition("/")
            yield NOTHING if evaluation not in found else _measure_cell(results, found[evaluation], measure)


def _measure_cell(results: Mapping[str, Any], row: Mapping[str, Any], measure: str) -> str:
    name = measure.removesuffix(OF_TRUE)
    if measure == CLIPS:
        return str(row["num_clips"])
    if measure.endswith(OF_TRUE):
        return _cell(row["of_true"].get(name), PLACES_OF_SHARES)
    for kind, values in (("measures", "estimates"), ("distances", "distances")):
        if name in results[kind]:
            return _cell(row[values].get(name), results[kind][name]["places"])
    return NOTHING


def _cell(found: Mapping[str, Any] | None, places: int) -> str:
    mean, interval = number(found, places)
    return f"{mean} ({interval})" if interval else mean


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [headings, ["---"] * len(headings), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
