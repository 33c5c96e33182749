"""Documents whose Markdown tables come from result files: evaluations, ablations, benchmarks, trainings and bundles.

A document marks each table with its file, relative to the document:

    <!-- table: report/ablations.json -->
    ... the table, replaced each time ...
    <!-- end of table -->

A benchmark's record has several tables: FILE.json#train (a section), #goals, #run. Nothing is measured here.
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
from ldm.sampling.settings import TrainingClips, sampling_defaults
from scripts.dev.benchmarking.rows import goal_rows, is_record, rows_of, table_rows

NETWORKS = {
    "autoencoder": "image autoencoder",
    "text_encoder": "text encoder",
    "unet": "UNet, image weights",
    "temporal": "UNet, temporal layers",
    "temporal_decoder": "autoencoder decoder, temporal layers",
}
BEGINS = "<!-- table:"
TABLE = re.compile(r"(<!-- table: *(\S+) *-->\n).*?(<!-- end of table -->)", flags=re.DOTALL)


def fill_document(document: Path) -> str:
    """The text of a document with all its tables regenerated; raises UserError."""
    text = document.read_text(encoding="utf-8")
    if not TABLE.search(text) or len(TABLE.findall(text)) != text.count(BEGINS):
        raise UserError(
            f"{document}: expected marks of tables, '<!-- table: FILE.json -->' and below '<!-- end of table -->', "
            f"found {len(TABLE.findall(text))} complete of {text.count(BEGINS)}"
        )

    def fill(mark: re.Match) -> str:
        file, _, part = mark[2].partition("#")
        return f"{mark[1]}{table_of(document.parent / file, part)}{mark[3]}"

    return TABLE.sub(fill, text)


def table_of(path: Path, part: str = "") -> str:
    """The table of a result file, or of the bundle of a config; raises UserError.

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
        rows = [[name, f"{stage['steps']:,}", f"{stage['seconds'] / 60:.1f}"] for name, stage in results.items()]
        return markdown_table(["stage", "steps", "minutes"], rows)
    raise UserError(f"{path}: expected results of evaluate.py or ablate.py, found other JSON")


def is_training(results: Any) -> bool:
    """Whether results are those of scripts/train_drive.py: stages with steps and seconds."""
    stages = results.values() if isinstance(results, Mapping) else ()
    return bool(stages) and all(isinstance(stage, Mapping) and {"steps", "seconds"} <= stage.keys() for stage in stages)


def bundle_table(folder: Path = BUNDLED) -> str:
    """Network, parameters and size of each file of a bundle; below, the clips it was trained for and its defaults.

    Raises `CheckpointError` if a file of the bundle is missing.
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
    trained = TrainingClips.from_config(config, has_time=True)
    settings = {
        "trained on clips of": f"{trained.frames} frames",
        "at": ", ".join(f"{rate:g}" for rate in trained.rates) + " frames a second",
        "of": "x".join(map(str, trained.size or ())) + " pixels",
        **{f"`--{option}`": str(value) for option, value in sampling_defaults(config).items()},
    }
    files = markdown_table(["file", "network", "million parameters", "MB"], rows)
    return f"{files}\n{markdown_table(list(settings), [list(settings.values())])}"


def benchmark_table(results: Mapping[str, Any], part: str, path: Path) -> str:
    """A section of a benchmark's record, its goals, or its date and machine."""
    rows = rows_of(results)
    if part == "run":
        if results["date"] is None:
            return markdown_table(["run", "where"], [["none yet", ""]])
        peaks = ", ".join(f"{peak / 1e12:.3g} TFLOP/s in {name}" for name, peak in results["peaks"].items())
        lines = [[results["date"], results["machine"], f"{results['threads']}", peaks]]
        return markdown_table(["run", "where", "threads", "fastest matrix product"], lines)
    if part == "goals":
        headings, *lines = goal_rows(rows, results["device"])
        return markdown_table(headings, lines)
    found = [row for row in rows if row.section == part]
    if not found:
        known = ", ".join(dict.fromkeys(row.section for row in rows))
        raise UserError(f"{path}#{part}: expected run, goals or a measured section ({known}), found {part!r}")
    headings, *lines = table_rows(found)
    return markdown_table(headings, lines)


def evaluation_table(report: Mapping[str, Any]) -> str:
    """A line per row of a report of scripts/evaluate.py: means with 95% intervals, then distances."""
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
