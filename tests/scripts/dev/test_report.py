"""Tables of documents: made from the files they name, left alone elsewhere, and up to date in what is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.errors import UserError
from scripts.dev.report import main
from scripts.dev.tables import BEGINS, table_of

ROOT = Path(__file__).parents[3]
EVALUATION = {
    "measures": {"road": {"title": "road expansion", "places": 2}, "flicker": {"title": "flicker", "places": 3}},
    "distances": {"d": {"title": "frames", "places": 1}},
    "rows": [
        {
            "name": "true", "is_reference": True, "num_clips": 64, "distances": {},
            "estimates": {"road": {"mean": 0.8, "low": 0.75, "high": 0.85}, "flicker": {"mean": None}},
        },
        {
            "name": "last", "is_reference": False, "num_clips": 9, "distances": {"d": {"mean": 3, "low": 2, "high": 5}},
            "estimates": {
                "road": {"mean": -0.001, "low": -0.1, "high": 0.1},
                "flicker": {"mean": 0.0123, "low": 0.01, "high": 0.02},
            },
        },
    ],
}  # fmt: skip
TABLE = """\
|  | clips | road expansion | flicker | Frechet distance of frames |
| --- | --- | --- | --- | --- |
| true | 64 | 0.80 (0.75 to 0.85) | - | - |
| last | 9 | 0.00 (-0.10 to 0.10) | 0.012 (0.010 to 0.020) | 3.0 (2.0 to 5.0) |
"""
DOCUMENT = """\
# A report

Before.

<!-- table: data/one.json -->
{}<!-- end of table -->

After. <!-- a remark -->
"""


@pytest.fixture
def document(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/one.json").write_text(json.dumps(EVALUATION))
    path = tmp_path / "report.md"
    path.write_text(DOCUMENT.format("stale\n"))
    return path


def test_tables_are_made_and_the_rest_is_left(document):
    main([str(document)])
    assert document.read_text() == DOCUMENT.format(TABLE)


def test_up_to_date_or_not(document, capsys):
    with pytest.raises(UserError, match="its tables are not those of its files"):
        main([str(document), "--check"])
    assert "stale" in document.read_text()
    main([str(document)])
    main([str(document), "--check"])
    assert "its tables are those of its files" in capsys.readouterr().out


def test_the_tables_of_the_project_are_those_of_its_files():
    for path in (ROOT / "docs").glob("*.md"):
        if BEGINS in path.read_text():
            main([str(path), "--check"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no place", r"expected places for tables.* found 0 whole ones of 0"),
        ("<!-- table: data/one.json -->\nnever ends\n", r"found 0 whole ones of 1"),
        ("<!-- table: data/two.json -->\n<!-- end of table -->\n", r"two.json: .*found no such file"),
        ("<!-- table: data/bad.json -->\n<!-- end of table -->\n", r"bad.json: expected JSON"),
        ("<!-- table: data/other.json -->\n<!-- end of table -->\n", r"other.json: .*found other JSON"),
    ],
)
def test_documents_that_cannot_be_filled_are_refused(document, text, message):
    (document.parent / "data/bad.json").write_text("{")
    (document.parent / "data/other.json").write_text("[1]")
    document.write_text(text)
    with pytest.raises(UserError, match=message):
        main([str(document)])


def test_no_document(tmp_path):
    with pytest.raises(UserError, match=r"nothing.md: .*found no such file"):
        main([str(tmp_path / "nothing.md")])


def test_a_table_of_a_file(document):
    assert table_of(document.parent / "data/one.json") == TABLE
