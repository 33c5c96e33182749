"""Tables in Markdown from the JSON of evaluations and ablations, and documents whose tables are kept up to date.

A document has places for tables, each with the file it comes from, relative to the document:

    <!-- table: report/ablations.json -->
    ... whatever stood here is replaced ...
    <!-- end of table -->

A record of scripts/dev/benchmark.py has several: FILE.json#train, #goals, #run.

Nothing is computed here: every number is one that a script has written. The config of a bundle has a table as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldm.checkpoint.files import read_file
from ldm.checkpoint.layouts import BUNDLED, bundle_files, read_bundle
from ldm.errors import UserError
from ldm.evaluation.report import number
from ldm.experiments.runs import CLIPS, LOGGED, MINUTES, OF_TRUE
from ldm.files import parse_json
from ldm.sampling.settings import Training, sampling_defaults
from scripts.dev.benchmarking.rows import goal_rows, is_record, rows_of, table_rows

NETWORKS = {
    "autoencoder": "image autoencoder",
    "text_encoder": "text encoder",
    "unet": "UNet, image weights",
    "temporal": "UNet, layers over time",
    "temporal_decoder": "decoder of the autoencoder, layers over time",
}


def bundle_table(folder: Path = BUNDLED) -> str:
    """Each file of a bundle with its network, parameters and size; below them, what clips it was made for.

    Raises `CheckpointError` where the bundle is not whole.
    """
    _, config = read_bundle(folder)
    lines, total_parameters, total_bytes = ["| file | | million parameters | MB |", "|---|---|---|---|"], 0, 0
    for path in bundle_files(folder)[1:]:
        parameters = sum(tensor.numel() for tensor in read_file(path)["state_dict"].values())
        size = path.stat().st_size
        total_parameters, total_bytes = total_parameters + parameters, total_bytes + size
        network = NETWORKS[path.stem.partition("-")[0]]
        lines.append(f"| `{path.name}` | {network} | {parameters / 1e6:.2f} | {size / 1e6:.1f} |")
    lines.append(f"| all | | {total_parameters / 1e6:.2f} | {total_bytes / 1e6:.1f} |")
    trained = Training.of_config(config, has_time=True)
    words = {
        "trained on clips of": f"{trained.frames} frames",
        "at": ", ".join(f"{rate:g}" for rate in trained.rates) + " frames a second",
        "of": "x".join(map(str, trained.size or ())) + " pixels",
    }
    defaults = sampling_defaults(config).items()
    lines += ["", "| " + " | ".join([*words, *(f"`--{word}`" for word, _ in defaults)]) + " |"]
    lines.append("|---" * (len(words) + len(defaults)) + "|")
    lines.append("| " + " | ".join([*words.values(), *(f"{value}" for _, value in defaults)]) + " |")
    return "\n".join(lines) + "\n"


def training_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The stages that scripts/train_drive.py has trained: steps and minutes."""
    lines = ["| stage | steps | minutes |", "|---|---|---|"]
    lines += [f"| {name} | {stage['steps']:,} | {stage['seconds'] / 60:.1f} |" for name, stage in stages.items()]
    return "\n".join(lines) + "\n"


def is_training(results: Any) -> bool:
    """Whether results are those of scripts/train_drive.py."""
    return (
        isinstance(results, Mapping)
        and len(results) > 0
        and all(isinstance(stage, Mapping) and {"steps", "seconds"} <= stage.keys() for stage in results.values())
    )


NOTHING = "-"
TERA = 1e12
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
    return PLACE.sub(lambda place: f"{place[1]}{_table_at(document, place[2])}{place[3]}", text)


def _table_at(document: Path, place: str) -> str:
    file, _, part = place.partition("#")
    return table_of(document.parent / file, part)


def table_of(path: Path, part: str = "") -> str:
    """The table of a file of results, or of the config of a bundle; raises UserError.

    part: of a benchmark's record: a section, `goals` or `run`.
    """
    if path.suffix == ".yaml":
        return bundle_table(path.parent)
    try:
        results = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected results of evaluate.py or ablate.py, found no such file") from error
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found something else ({error})") from error
    if isinstance(results, dict) and {"columns", "runs", "references", "rows"} <= results.keys():
        return ablation_table(results)
    if isinstance(results, dict) and {"measures", "rows"} <= results.keys():
        return evaluation_table(results)
    if is_record(results):
        return benchmark_table(results, part, path)
    if is_training(results):
        return training_table(results)
    raise UserError(f"{path}: expected results of evaluate.py or ablate.py, found other JSON")


def benchmark_table(results: Mapping[str, Any], part: str, path: Path) -> str:
    """A section of a benchmark's record, its goals, or when and where it was run."""
    rows = rows_of(results)
    if part == "run":
        if results["date"] is None:
            return markdown(["run", "where"], [["none yet", ""]])
        peaks = ", ".join(f"{peak / TERA:.3g} TFLOP/s in {name}" for name, peak in results["peaks"].items())
        lines = [[results["date"], results["machine"], f"{results['threads']}", peaks]]
        return markdown(["run", "where", "threads", "fastest matrix product"], lines)
    if part == "goals":
        headings, *lines = goal_rows(rows, results["device"])
        return markdown(headings, lines)
    found = [row for row in rows if row.section == part]
    if not found:
        known = ", ".join(dict.fromkeys(row.section for row in rows))
        raise UserError(f"{path}#{part}: expected run, goals or a section that was run ({known}), found {part!r}")
    headings, *lines = table_rows(found)
    return markdown(headings, lines)


def evaluation_table(report: Mapping[str, Any]) -> str:
    """A line for each row of a report of scripts/evaluate.py: means and their 95% intervals, then distances."""
    kinds = [("estimates", name, its) for name, its in report["measures"].items()]
    kinds += [("distances", name, its) for name, its in report.get("distances", {}).items()]
    lines = [
        [row["name"], str(row["num_clips"]), *(_cell(row[kind].get(name), its["places"]) for kind, name, its in kinds)]
        for row in report["rows"]
    ]
    titles = [its["title"] if kind == "estimates" else f"Frechet distance of {its['title']}" for kind, _, its in kinds]
    return markdown(["", "clips", *titles], lines)


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
    return markdown(["", *columns], lines)


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


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Headings and lines of cells as a table."""
    cells = [headings, ["---"] * len(headings), *lines]
    return "".join(f"| {' | '.join(map(in_cell, line))} |\n" for line in cells)


def in_cell(text: str) -> str:
    """Text as part of a Markdown table: on one line, neither HTML nor another cell."""
    return " ".join(escape(text, quote=False).replace("|", "\\|").split())
