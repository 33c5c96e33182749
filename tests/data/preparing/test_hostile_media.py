"""Pictures, videos, captions and prompts from strangers, and what is shown of them."""

from __future__ import annotations

import gzip
import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from rich.table import Table

from ldm.data.preparing.footage import FootageError, find_scenes, name_videos, probe, read_frames
from ldm.data.preparing.sources import read_sidecar, read_table
from ldm.errors import UserError, run_command
from ldm.evaluation import page, plots
from ldm.evaluation.report import ShownClip
from ldm.experiments.tables import escape_cell
from ldm.modules import tokenizer
from ldm.sampling.given_frames import read_mask, read_picture
from ldm.sampling.prompts import odd_part, read_schedule
from ldm.video import contact_sheet, read_metadata, read_video, write_mp4
from scripts import evaluate

FRAMES = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), np.uint8)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG that says it has so many pixels."""
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, format=form)
    return buffer.getvalue()


BOMB = png(9000, 9000, bytes(9000 * 1126))  # 12 kB; 243 MB as RGB
GIF_BOMB = bytes.fromhex(  # found by scripts/dev/fuzz.py; 97 MB
    "4749463837610907008000000000000000002c000000000900070000080f0001081c48b0a0c18308132a441810003b"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(60_000, 60_000), "expected (at most 67,108,864 pixels|an image of at most)"),
        (png(2**31 - 1, 2**31 - 1), "expected an image"),
        (png(0, 5), "expected an image"),
        (BOMB, "expected an image of at most 67,108,864 pixels, found 9000x9000"),
        (GIF_BOMB, "expected at most 128 pixels a byte in a large image, found 1801x32768 in 47 bytes"),
        (b"BM" + struct.pack("<LLLLllHH", 90, 0, 54, 40, 50_000, 50_000, 1, 24) + bytes(40), "expected .*an image"),
        (saved("PNG")[:60], "found a corrupt one"),
        (saved("JPEG")[:300], "found a corrupt one"),
        (saved("TIFF")[:9], "expected an image"),
        (saved("WEBP")[:30], "expected an image"),
        (saved("EPS"), "found another format"),
        (saved("PCX"), "found another format"),
        (b"", "found another format"),
    ],
)
def test_pictures(tmp_path, content, message):
    assert len(content) < 20_000
    (tmp_path / "picture.png").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_picture(tmp_path / "picture.png")


def test_the_pictures_of_an_endless_gif_are_not_counted(tmp_path, monkeypatch):
    pictures = [Image.new("P", (8, 8), number % 5) for number in range(300)]
    words = {"save_all": True, "append_images": pictures[1:], "loop": 0, "duration": 20, "optimize": False}
    pictures[0].save(tmp_path / "long.gif", **words)
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.n_frames", property(lambda its: pytest.fail("counted")))
    assert read_picture(tmp_path / "long.gif").size == (8, 8)
    with pytest.raises(UserError, match="a video of 3 frames like the clip, found more"):
        read_mask(tmp_path / "long.gif", 3, (8, 8))


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfilm.mp4\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile 'film.mp4'\n",
        b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'></MPD>",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        b"\x00\x00\x00\x20ftypisom" + bytes(80),
        b"RIFF\xff\xff\xff\xffAVI LIST\xff\xff\xff\xffhdrl" + bytes(99),
        b"GIF89a\xff\xff\xff\xff\x00\x00\x00",
        b"",
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.m3u8"])
def test_videos(tmp_path, monkeypatch, content, name):
    monkeypatch.chdir(tmp_path)
    write_mp4(tmp_path / "film.mp4", FRAMES, 10)
    (tmp_path / name).write_bytes(content)
    for read in (probe, read_video, read_metadata):
        with pytest.raises(UserError, match=rf"{name}: (expected (a video|at most|settings)|the file is empty)"):
            read(tmp_path / name)


def test_a_name_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "file:a.mp4", "http:a.mp4", "pipe:0"):
        write_mp4(tmp_path / "a", FRAMES, 10, {"name": name})
        os.rename(tmp_path / "a", name)
        assert probe(name).num_frames == 6 and len(list(read_frames(name, 10, 64))) == 6
        assert read_metadata(name) == {"name": name} and len(read_video(name)[0]) == 6
    with pytest.raises(UserError, match="there is no such file"):
        read_video("http://127.0.0.1:9/film.mp4")


def test_videos_are_bounded_in_pixels_and_frames(tmp_path, monkeypatch):
    write_mp4(tmp_path / "a.mp4", FRAMES, 10)
    write_mp4(tmp_path / "flat.mp4", np.zeros((3, 16, 1024, 3), np.uint8), 10)
    with pytest.raises(FootageError, match="expected an aspect ratio of at most 32, found 1024x16"):
        probe(tmp_path / "flat.mp4")
    monkeypatch.setattr("ldm.data.preparing.footage.FEWEST_LIMIT", 3)
    monkeypatch.setattr("ldm.data.preparing.footage.BYTES_PER_FRAME", 10**6)
    for read in (lambda path: list(read_frames(path, 10, 64)), lambda path: find_scenes(path, 10)):
        with pytest.raises(FootageError, match="expected at most 3 frames in a file of its size, found more: gaps in"):
            read(tmp_path / "a.mp4")
    monkeypatch.setattr("ldm.video.MAX_HELD", 5 * 64 * 64 * 3)
    with pytest.raises(UserError, match="expected a short video, found more than 61,440 bytes of frames"):
        read_video(tmp_path / "a.mp4")
    monkeypatch.setattr("ldm.video.MAX_PIXELS", 1000)
    for read in (probe, read_video):
        with pytest.raises(UserError, match="expected an image of at most 1,000 pixels, found 64x64"):
            read(tmp_path / "a.mp4")
    monkeypatch.setattr("ldm.video.MAX_PIXELS", 2**26)
    monkeypatch.setattr("ldm.data.preparing.footage.MAX_RATE", 5)
    with pytest.raises(FootageError, match="expected at most 5 frames a second, found 10"):
        probe(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "comment", ["[" * 60_000, '{"a": NaN}', '{"prompt": "\\ud800"}', "[1]"]
)  # fmt: skip
def test_settings_in_a_film(tmp_path, monkeypatch, comment):
    monkeypatch.setattr("ldm.video.json.dumps", lambda *_, **__: comment)
    write_mp4(tmp_path / "a.mp4", FRAMES, 10, {})
    with pytest.raises(UserError, match="expected settings in its `comment` tag"):
        read_metadata(tmp_path / "a.mp4")


# ---- words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file,caption\na.mp4," + b"x" * 200_000, "found another .field larger than field limit"),
        (b"file,caption\na.mp4,\xff", "expected UTF-8 text, found an invalid byte at offset 19"),
        (b"\xff\xfef\0i\0l\0e\0", "expected UTF-8 text"),
        (b"file;caption\na;b", "expected a first line with the columns file,caption, found file;caption"),
        (b"", "expected a first line with the columns file,caption, found nothing"),
    ],
)
def test_tables_of_captions(tmp_path, content, message):
    (tmp_path / "captions.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "captions.csv")


def test_captions_are_bounded_and_steer_no_terminal(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a \x1b[2Jroad\x07 <b>\n" * 3)
    assert read_sidecar(tmp_path / "a.mp4") == ["a [2Jroad <b>"]
    monkeypatch.setattr("ldm.data.preparing.sources.MAX_BYTES", 10)
    with pytest.raises(UserError, match="at most 10 bytes, found a larger file"):
        read_sidecar(tmp_path / "a.mp4")


def test_prompts_take_no_time():
    begin = time.process_time()
    assert read_schedule("0:a" + " " * 300_000 + "b", 5).prompts == ("a" + " " * 300_000 + "b",)
    assert read_schedule(" " * 300_000 + "x", 5) is None and odd_part("0:a|" + " " * 300_000 + "x") == "x"
    with pytest.raises(UserError, match="expected one prompt per frame, found two for frame 0"):
        read_schedule("0:a|" * 100_000 + "0:a", 5)
    assert read_schedule("9" * 5000 + ": a", 5) is None
    contact_sheet([FRAMES], ["long " * 100_000])
    assert time.process_time() - begin < 3


# ---- what is shown


def test_pages_show_names_and_captions_as_text():
    evil = '"><script>alert(1)</script>'
    table = Table()
    table.add_column(evil)
    table.add_column("b")
    table.add_row(evil, evil)
    found = {"mean": 1.0, "low": 0.0, "high": 2.0}
    shown = [
        page._figure(ShownClip(FRAMES, evil), 8.0), page._table(table), page._definitions({"is": evil}),
        plots._plot_rows([plots._PlotRow(evil, "#000", found, [(evil, 1.0)])], evil), escape_cell(evil),
    ]  # fmt: skip
    assert all("<script" not in text and "script" in text for text in shown)
    assert escape_cell("a | b\nc") == "a \\| b c"


def test_messages_steer_no_terminal(capsys):
    def fail():
        raise UserError("a\x1b[2J\u202eb\udcff.mp4: bad\nbut this is a line of its own")

    assert run_command(fail) == 1
    assert capsys.readouterr().err == "error: a\\x1b[2J\\u202eb\\udcff.mp4: bad\nbut this is a line of its own\n"


def test_names_that_are_no_text_can_be_written(tmp_path):
    for name in (b"a\xff.mp4", b"b\x1b[2J\n.mp4"):
        (tmp_path / os.fsdecode(name)).touch()
    assert sorted(name_videos([tmp_path]).values()) == ["a\\udcff.mp4", "b\\x1b[2J\\n.mp4"]


# ---- what is fetched and run


def test_nothing_is_fetched_unless_asked(monkeypatch):
    asked = []

    def download(name: str, file: str, local_files_only: bool) -> str:
        asked.append(local_files_only)
        raise OSError("not here")

    monkeypatch.setattr(tokenizer, "hf_hub_download", download)
    monkeypatch.setattr(tokenizer, "_open_clip_vocabulary", lambda: None)
    for value, is_offline in ((None, True), ("1", True), ("0", False), ("yes", True), ("off", False)):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        if value is not None:
            monkeypatch.setenv("HF_HUB_OFFLINE", value)
        with pytest.raises(UserError, match="set HF_HUB_OFFLINE=0 in the environment to have it fetched"):
            tokenizer.find_tokenizer()
        assert asked.pop() is is_offline


def test_a_vocabulary_that_unpacks_without_end(tmp_path):
    (tmp_path / "words.gz").write_bytes(gzip.compress(bytes(2**25)))
    with pytest.raises(UserError, match=r"cannot be read .it unpacks to more than 16,777,216 bytes"):
        tokenizer.find_tokenizer(tmp_path / "words.gz")
    (tmp_path / "merges.txt").touch()
    with (tmp_path / "vocab.json").open("wb") as file:
        file.truncate(2**25)
    with pytest.raises(UserError, match=r"vocab.json: expected at most 16,777,216 bytes, found 33,554,432"):
        tokenizer.find_tokenizer(tmp_path)


def test_a_program_for_fvd_is_run_only_when_trusted():
    with pytest.raises(
        UserError,
        match=r"--i3d: expected --trust-i3d with it, found none: net.pt is TorchScript",
    ):
        evaluate.parse_arguments(["clips", "--i3d", "net.pt"])
