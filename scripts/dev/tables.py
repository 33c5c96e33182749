"""Tables in Markdown from the JSON of evaluations and ablations, and documents whose tables are kept up to date.

A document has places for tables, each with the file it comes from, relative to the document:

    <!-- table: drive/ablations.json -->
    ... whatever stood here is replaced ...
    <!-- end of table -->

A record of scripts/dev/benchmark.py has several: FILE.json#train, #goals, #run.

Nothing is computed here: every number is one that a script has written. The config of a bundle has a table as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.files import read_file
from ldm.checkpoint.layouts import BUNDLED, bundle_files, read_bundle
from ldm.errors import UserError
from ldm.experiments.tables import ablation_table, estimate_cell, markdown_table
from ldm.files import parse_json
from ldm.sampling.settings import Training, sampling_defaults
from scripts.dev.benchmarking.rows import goal_rows, is_record, rows_of, table_rows

NETWORKS = {
    "autoencoder": "image autoencoder",
    "text_encoder": "text encoder",
    "unet": "UNet, image weights",
    "temporal": "UNet, temporal layers",
    "temporal_decoder": "autoencoder decoder, temporal layers",
}


def bundle_table(folder: Path = BUNDLED) -> str:
    """Each file of a bundle with its network, parameters and size; below them, what clips it was made for.

    Raises `CheckpointError` where the bundle is not whole.
    """
    _, config = read_bundle(folder)
    rows, total_parameters, total_bytes = [], 0, 0
    for path in bundle_files(folder)[1:]:
        parameters = sum(tensor.numel() for tensor in read_file(path)["state_dict"].values())
        size = path.stat().st_size
        total_parameters, total_bytes = total_parameters + parameters, total_bytes + size
        network = NETWORKS[path.stem.partition("-")[0]]
        rows.append([f"`{path.name}`", network, f"{parameters / 1e6:.2f}", f"{size / 1e6:.1f}"])
    rows.append(["all", "", f"{total_parameters / 1e6:.2f}", f"{total_bytes / 1e6:.1f}"])
    trained = Training.of_config(config, has_time=True)
    settings = {
        "trained on clips of": f"{trained.frames} frames",
        "at": ", ".join(f"{rate:g}" for rate in trained.rates) + " frames a second",
        "of": "x".join(map(str, trained.size or ())) + " pixels",
        **{f"`--{option}`": str(value) for option, value in sampling_defaults(config).items()},
    }
    files = markdown_table(["file", "network", "million parameters", "MB"], rows)
    return f"{files}\n{markdown_table(list(settings), [list(settings.values())])}"


def training_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The stages that scripts/train_drive.py has trained: steps and minutes."""
    rows = [[name, f"{stage['steps']:,}", f"{stage['seconds'] / 60:.1f}"] for name, stage in stages.items()]
    return markdown_table(["stage", "steps", "minutes"], rows)


def is_training(results: Any) -> bool:
    """Whether results are those of scripts/train_drive.py."""
    return (
        isinstance(results, Mapping)
        and len(results) > 0
        and all(isinstance(stage, Mapping) and {"steps", "seconds"} <= stage.keys() for stage in results.values())
    )


TERA = 1e12
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
            return markdown_table(["run", "where"], [["none yet", ""]])
        peaks = ", ".join(f"{peak / TERA:.3g} TFLOP/s in {name}" for name, peak in results["peaks"].items())
        lines = [[results["date"], results["machine"], f"{results['threads']}", peaks]]
        return markdown_table(["run", "where", "threads", "fastest matrix product"], lines)
    if part == "goals":
        headings, *lines = goal_rows(rows, results["device"])
        return markdown_table(headings, lines)
    found = [row for row in rows if row.section == part]
    if not found:
        known = ", ".join(dict.fromkeys(row.section for row in rows))
        raise UserError(f"{path}#{part}: expected run, goals or a section that was run ({known}), found {part!r}")
    headings, *lines = table_rows(found)
    return markdown_table(headings, lines)


def evaluation_table(report: Mapping[str, Any]) -> str:
    """A line for each row of a report of scripts/evaluate.py: means and their 95% intervals, then distances."""
    kinds = [("estimates", name, its) for name, its in report["measures"].items()]
    kinds += [("distances", name, its) for name, its in report.get("distances", {}).items()]
    lines = [
        [
            row["name"],
            str(row["num_clips"]),
            *(estimate_cell(row[kind].get(name), its["places"]) for kind, name, its in kinds),
        ]
        for row in report["rows"]
    ]
    titles = [its["title"] if kind == "estimates" else f"Frechet distance of {its['title']}" for kind, _, its in kinds]
    return markdown_table(["", "clips", *titles], lines)
