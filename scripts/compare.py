"""Train runs that differ in one thing, one after the other, and put what they logged side by side.

    python scripts/compare.py configs/compare/noise-and-loss.yaml --out DIR --accelerator cpu data.params.root=prepared

Words it does not know go to main.py of every run. A run that is done is not run again. DIR/table.md and
DIR/results.json hold what there is so far.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import Parser, UserError, run_command
from ldm.experiments.runs import Plan, file_name, read_logged, read_words
from ldm.experiments.tables import comparison_table
from ldm.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
Runner = Callable[[Sequence[str]], int]  # runs ["main.py", "argument", ...] and returns its exit status


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file; raises UserError."""
    return Plan.of_words(read_words(path), str(path))


def read_results(path: Path) -> dict[str, Any]:
    """Runs that are done: name -> command, seconds, logged."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def compare(plan: Plan, out: Path, more: Sequence[str], run: Runner) -> dict[str, Any]:
    """Train the runs that are not done yet; write the table after each. Raises UserError when one fails."""
    out.mkdir(parents=True, exist_ok=True)
    results = read_results(out / "results.json")
    for name in plan.runs:
        command = plan.command(name, out / "logs", more)
        if name in results:
            if results[name]["command"] != command:
                raise UserError(
                    f"{out}: holds the run '{name}' made by another command, {shlex.join(results[name]['command'])}; "
                    "choose another --out"
                )
            continue
        print(f"\n{name}\n$ {shlex.join(command)}", flush=True)
        begin = time.monotonic()
        if status := run(command):
            raise UserError(f"the run '{name}' ended with status {status}; it says why above")
        folder = max((out / "logs").glob(f"*_{file_name(name)}"))
        seconds = round(time.monotonic() - begin, 1)
        results[name] = {"command": command, "seconds": seconds, "logged": read_logged(folder)}
        write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
        logged = {done: results[done]["logged"] for done in plan.runs if done in results}
        write_atomically(out / "table.md", comparison_table(plan.columns, logged))
    return results


def run_main(words: Sequence[str]) -> int:
    """Run main.py with these words in a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], check=False).returncode


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a comparison and print its table."""
    parser = Parser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("plan", type=Path, help="YAML: base, overrides, columns, runs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the runs and the table")
    given, more = parser.parse_known_args(arguments)
    compare(read_plan(given.plan), given.out.resolve(), more, run_main)
    print(f"\n{(given.out / 'table.md').read_text()}")


if __name__ == "__main__":
    sys.exit(run_command(main))
