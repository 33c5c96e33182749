"""Captions of videos from tables and from text files beside them."""

from __future__ import annotations

import pytest

from ldm.data.preparing.sources import find_captions, read_sidecar, read_table
from ldm.errors import UserError


def test_tables_and_text_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"c.csv: there is no such table"):
        read_table(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text("video;text\n")
    with pytest.raises(UserError, match="expected a first line with the columns file,caption, found video;text"):
        read_table(tmp_path / "c.csv")
    (tmp_path / "v.txt").write_bytes(b"stra\xdfe\n")
    with pytest.raises(UserError, match=r"v.txt: expected UTF-8 text, found an invalid byte at offset 4"):
        read_sidecar(tmp_path / "v.mp4")
    (tmp_path / "c.csv").write_text("file,caption\nv.mp4,a\nv.mp4,b\nv.mp4, a\n")
    captions, strangers = find_captions({tmp_path / "v.mp4": "v.mp4"}, table=tmp_path / "c.csv")
    assert (captions, strangers) == ({tmp_path / "v.mp4": ["a", "b"]}, [])
