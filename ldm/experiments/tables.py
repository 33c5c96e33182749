"""Markdown tables of comparisons and ablations, and the one writer of Markdown tables.

Nothing is measured here: every number is one that a run logged or scripts/evaluate.py wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ldm.evaluation.report import number
from ldm.experiments.ablations import CLIPS, LOGGED, MINUTES, OF_TRUE

NO_VALUE = "-"
LOGGED_PLACES, RATIO_PLACES = 4, 2  # decimals of logged values and of ratios to the true clips


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Headings and rows of cells as a Markdown table; cells are escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(map(escape_cell, line))} |\n" for line in lines)


def escape_cell(text: str) -> str:
    """Text as one cell of a Markdown table: on one line, without HTML and without a column separator."""
    return " ".join(escape(text, quote=False).replace("|", "\\|").split())


def estimate_cell(estimate: Mapping[str, Any] | None, places: int) -> str:
    """A mean with its 95% interval in parentheses; a dash without a mean."""
    mean, interval = number(estimate, places)
    return f"{mean} ({interval})" if interval else mean


def comparison_table(columns: Mapping[str, str], logged: Mapping[str, Mapping[str, float]]) -> str:
    """One row per run, one column per heading (heading -> logged tag); a dash where the run did not log the tag."""
    rows = [[name, *(_logged_cell(values.get(tag)) for tag in columns.values())] for name, values in logged.items()]
    return markdown_table(["", *columns], rows)


def ablation_table(results: Mapping[str, Any]) -> str:
    """The reference rows, then one row per row of the ablation. `results` is the content of results.json."""
    references: dict[str, dict[str, Any]] = {}
    for evaluation, rows in results["references"].items():
        for row in rows:
            references.setdefault(row["name"], {})[evaluation] = row
    lines = [[name, *_cells(results, found, None)] for name, found in references.items() if name not in results["rows"]]
    for name, row in results["rows"].items():
        lines.append([name, *_cells(results, row["evaluations"], results["runs"].get(row["run"]))])
    return markdown_table(["", *results["columns"]], lines)


def _cells(
    results: Mapping[str, Any], evaluations: Mapping[str, Mapping[str, Any]], run: Mapping[str, Any] | None
) -> Iterator[str]:
    """Cells of one row. evaluations: name -> row of its report; run: the trained run, None for reference rows."""
    for column in results["columns"].values():
        if column == MINUTES:
            yield NO_VALUE if run is None else f"{run['seconds'] / 60:.1f}"
        elif column.startswith(LOGGED):
            yield _logged_cell(None if run is None else run["logged"].get(column.removeprefix(LOGGED)))
        else:
            evaluation, _, measure = column.partition("/")
            yield _measure_cell(results, evaluations[evaluation], measure) if evaluation in evaluations else NO_VALUE


def _logged_cell(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.{LOGGED_PLACES}f}"


def _measure_cell(results: Mapping[str, Any], row: Mapping[str, Any], measure: str) -> str:
    if measure == CLIPS:
        return str(row["num_clips"])
    if measure.endswith(OF_TRUE):
        return estimate_cell(row["of_true"].get(measure.removesuffix(OF_TRUE)), RATIO_PLACES)
    for kind, values in (("measures", "estimates"), ("distances", "distances")):
        if measure in results[kind]:
            return estimate_cell(row[values].get(measure), results[kind][measure]["places"])
    return NO_VALUE
