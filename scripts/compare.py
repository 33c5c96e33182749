"""Train runs that differ in one thing, one after the other, and tabulate what they logged.

    python scripts/compare.py configs/compare/noise-and-loss.yaml --out DIR --accelerator cpu data.params.root=prepared

Unknown arguments go to main.py of every run. Finished runs are kept. DIR/table.md and DIR/results.json hold the
results so far.
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
from ldm.experiments.comparison import Comparison, file_name, read_logged, read_plan_file
from ldm.experiments.tables import comparison_table
from ldm.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
Runner = Callable[[Sequence[str]], int]  # runs ["main.py", "argument", ...] and returns its exit status


def read_plan(path: Path) -> Comparison:
    """The plan in a YAML file; raises UserError."""
    return Comparison.from_mapping(read_plan_file(path), str(path))


def compare(plan: Comparison, out: Path, more: Sequence[str], run: Runner) -> dict[str, Any]:
    """Train unfinished runs and write the table after each -> name -> command, seconds, logged. Raises UserError."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in plan.runs:
        command = plan.command(name, out / "logs", more)
        if name in results:
            if results[name]["command"] != command:
                raise UserError(
                    f"{out}: expected the run '{name}' of the same command, found that of "
                    f"{shlex.join(results[name]['command'])}; choose another --out"
                )
            continue
        print(f"\n{name}\n$ {shlex.join(command)}", flush=True)
        begin = time.monotonic()
        if status := run(command):
            raise UserError(f"'{name}': expected a run that succeeds, found status {status}; see its output above")
        folder = max((out / "logs").glob(f"*_{file_name(name)}"))
        seconds = round(time.monotonic() - begin, 1)
        results[name] = {"command": command, "seconds": seconds, "logged": read_logged(folder)}
        write_atomically(path, json.dumps(results, indent=2) + "\n")
        logged = {done: results[done]["logged"] for done in plan.runs if done in results}
        write_atomically(out / "table.md", comparison_table(plan.columns, logged))
    return results


def run_main(command: Sequence[str]) -> int:
    """Run main.py in a new process."""
    return subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], check=False).returncode


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the runs of a plan and print the table."""
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
