"""Tables of documents: regenerated from their files, the text unchanged, and up to date in the published documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.errors import UserError
from scripts.dev.report import main
from scripts.dev.tables import BEGINS

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


def test_tables_are_regenerated_and_the_text_is_unchanged(document):
    main([str(document)])
    assert document.read_text() == DOCUMENT.format(TABLE)


def test_check_tells_whether_tables_are_up_to_date(document, capsys):
    with pytest.raises(UserError, match="expected up-to-date tables, found old ones"):
        main([str(document), "--check"])
    assert "stale" in document.read_text()
    main([str(document)])
    main([str(document), "--check"])
    assert "all tables are up to date" in capsys.readouterr().out


def test_the_tables_of_the_project_are_up_to_date():
    for path in (ROOT / "docs").rglob("*.md"):
        if BEGINS in path.read_text():
            main([str(path), "--check"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no mark", r"expected marks of tables.* found 0 complete of 0"),
        ("<!-- table: data/one.json -->\nnever ends\n", r"found 0 complete of 1"),
        ("<!-- table: data/two.json -->\n<!-- end of table -->\n", r"two.json: .*found no such file"),
        ("<!-- table: data/bad.json -->\n<!-- end of table -->\n", r"bad.json: expected JSON"),
        ("<!-- table: data/other.json -->\n<!-- end of table -->\n", r"other.json: .*found other JSON"),
    ],
)
def test_documents_that_cannot_be_filled_are_errors(document, text, message):
    (document.parent / "data/bad.json").write_text("{")
    (document.parent / "data/other.json").write_text("[1]")
    document.write_text(text)
    with pytest.raises(UserError, match=message):
        main([str(document)])
    with pytest.raises(UserError, match=r"nothing.md: .*found no such file"):
        main([str(document.parent / "nothing.md")])
