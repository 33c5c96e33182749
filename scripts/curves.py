"""Plot what runs measured of their samples against the compute spent, and predict when a target is reached.

    python scripts/curves.py RUN... [--target 0.9] [--out DIR]

RUN is the folder of a run that was trained with ldm.callbacks.MotionLogger and ComputeCount; several runs share one
picture. Prints a prediction for each curve and writes curves.svg and curves.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import Parser, UserError, run_command
from ldm.evaluation.learning_curve import find_records, notes, summarise
from ldm.evaluation.plots import NO_DATA, curves_svg
from ldm.files import write_atomically


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the records of the runs, print their predictions, write picture and numbers."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or records in them")
    parser.add_argument(
        "--target", type=float, default=0.9, metavar="SHARE",
        help="target of the predictions, as a share of the data's own mean (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/curves"), metavar="DIR", help="output folder (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    if not 0 < given.target <= 1:
        raise UserError(f"--target: expected a share above 0 and at most 1, found {given.target:g}")
    summary = summarise(find_records(given.runs), given.target)
    for curve in summary["curves"]:
        print(curve["name"])
        for name, measure in summary["measures"].items():
            found = curve["measures"][name]
            text = NO_DATA
            if found["prediction"]:
                text = found["prediction"]["statement"]
            elif found["points"]:
                last, data, places = found["points"][-1]["mean"], found["data"]["mean"], measure["places"]
                text = f"{last:.{places}f}" + ("" if data is None else f", the data's {data:.{places}f}")
            print(f"  {measure['title']}: {text}")
    for note in notes(summary):
        print(f"note: {note}")
    given.out.mkdir(parents=True, exist_ok=True)
    write_atomically(given.out / "curves.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_atomically(given.out / "curves.svg", curves_svg(summary) + "\n")
    print(f"{given.out / 'curves.svg'}, curves.json")


if __name__ == "__main__":
    sys.exit(run_command(main))
