"""Regenerate the tables of a document from result files.

    python scripts/dev/report.py docs/performance.md [--check]

The document marks each table with <!-- table: FILE.json --> above and <!-- end of table --> below. FILE is a
results.json of scripts/ablate.py, a report.json of scripts/evaluate.py or, as FILE.json#SECTION, a record of
scripts/dev/benchmark.py. --check changes nothing and fails if a table differs from its file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.errors import Parser, UserError, run_command
from ldm.files import write_atomically
from scripts.dev.tables import fill_document


def main(arguments: Sequence[str] | None = None) -> None:
    """Regenerate or check the tables of a document."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="Markdown with marked tables")
    parser.add_argument("--check", action="store_true", help="only check that the tables are up to date")
    given = parser.parse_args(arguments)
    if not given.document.is_file():
        raise UserError(f"{given.document}: expected a document with marked tables, found no such file")
    text = fill_document(given.document)
    if text == given.document.read_text(encoding="utf-8"):
        print(f"{given.document}: all tables are up to date")
    elif given.check:
        raise UserError(f"{given.document}: expected up-to-date tables, found old ones; run scripts/dev/report.py")
    else:
        write_atomically(given.document, text)
        print(f"{given.document}: tables regenerated")


if __name__ == "__main__":
    sys.exit(run_command(main))
