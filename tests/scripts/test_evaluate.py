"""scripts/evaluate.py from end to end, which clips it takes, what it says of a mistake, and the page it makes."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from rich.table import Table

from ldm.data.world import draw_clip
from ldm.errors import UserError
from ldm.evaluation.clip_files import plan_reference, plan_rows, read_clips
from ldm.evaluation.motion import MEASURES
from ldm.evaluation.page import html_page
from ldm.video import write_gif, write_mp4
from scripts import evaluate

SIZE = (64, 96)
LONG = ["long.mp4", "--frames", "3"]


def drive(seed: int, num_frames: int = 4, size: tuple[int, int] = SIZE) -> np.ndarray:
    return draw_clip("summer dawn", seed, num_frames, size, 10, 8.0).frames


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder of three clips as txt2vid writes them, with a GIF beside each."""
    folder = tmp_path_factory.mktemp("clips") / "samples"
    folder.mkdir()
    for number in range(3):
        frames = drive(number)
        write_mp4(folder / f"{number:05}.mp4", frames, 10)
        write_gif(folder / f"{number:05}.gif", frames, 10)
    return folder


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    """A longer video, faster and larger, with a cut in the middle."""
    path = tmp_path_factory.mktemp("footage") / "true.mp4"
    shots = [draw_clip(look, seed, 22, (96, 160), 20, 8.0).frames for look, seed in (("snow", 8), ("desert", 9))]
    write_mp4(path, np.concatenate(shots), 20)
    return path


@pytest.fixture(scope="module")
def written(clips, footage, tmp_path_factory) -> Path:
    """What the script wrote for them."""
    out = tmp_path_factory.mktemp("out") / "deep" / "report"
    black = clips.parent / "black"
    black.mkdir()
    for number in range(2):
        write_mp4(black / f"{number}.mp4", np.zeros((4, *SIZE, 3), np.uint8), 10)
    evaluate.main([str(clips), str(black), "--reference", str(footage), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def summary(written) -> dict:
    return json.loads((written / "report.json").read_text())


def row(summary: dict, name: str) -> dict:
    return next(its for its in summary["rows"] if its["name"].endswith(name))


@pytest.mark.slow
def test_rows_and_their_numbers(summary):
    assert [its["name"].split("/")[-1] for its in summary["rows"]] == [
        "true", "reversed", "frozen", "shuffled", "zoomed still", "samples", "black",
    ]  # fmt: skip
    assert summary["clips"] == {"num_frames": 4, "height": 64, "width": 96, "rate": 10}
    assert [its["is_reference"] for its in summary["rows"]] == [True] * 5 + [False] * 2
    means = {its["name"]: its["estimates"]["roadside_expansion"]["mean"] for its in summary["rows"]}
    assert means["true"] > 0.6
    assert means["reversed"] < -0.6
    assert abs(means["frozen"]) < 0.01
    assert row(summary, "frozen")["estimates"]["frozen_share"]["mean"] == 1
    samples = row(summary, "samples")
    assert samples["num_clips"] == samples["num_videos"] == 3  # and not six with the GIFs
    assert 0.5 < samples["of_true"]["roadside_expansion"]["mean"] < 2
    assert "flicker" not in samples["of_true"]
    assert row(summary, "true")["of_true"] == {}
    for clip in samples["clips"]:
        assert set(clip["readings"]) == set(MEASURES)


def test_black_clips_have_reasons_and_no_numbers(summary):
    black = row(summary, "black")
    for name in MEASURES:
        assert black["estimates"][name] == {"mean": None, "low": None, "high": None, "num_clips": 0, "num_unjudged": 2}
        (reason,) = black["not_judged"][name]
        assert "black, constant" in reason


def test_what_is_printed(clips, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(clips.parent)
    write_mp4(tmp_path / "black.mp4", np.zeros((4, *SIZE, 3), np.uint8), 10)
    evaluate.main(["samples", str(tmp_path / "black.mp4"), "samples/00000.mp4", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "roadside" in printed
    assert re.search(r"files: 1 of 2 clips have no value of any measure: the picture is black, constant", printed)
    assert "samples: only 3 clips: the intervals are rough below 30" in printed
    assert printed.strip().endswith("report.html")


class Page(HTMLParser):
    """What a page holds, and whether its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(written, summary):
    content = (written / "report.html").read_text()
    page = Page()
    page.feed(content)
    assert page.open == []
    sources = [(tag, value) for tag, name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith("data:") for _, value in sources)
    kinds = [value.partition(";")[0] for _, value in sources]
    # four clips of each reference row, the three samples, the two black ones; each plays and has a sheet
    assert kinds.count("data:video/mp4") == kinds.count("data:image/jpeg") == 5 * 4 + 3 + 2
    for _, value in sources[:2]:
        assert len(base64.b64decode(value.partition(",")[2])) > 500
    assert content.count("<svg") == len(MEASURES) + len(summary["distances"])
    for plot in re.findall(r"<svg.*?</svg>", content, flags=re.DOTALL):
        dots = ElementTree.fromstring(plot).findall(".//{*}use/{*}title/..")
        assert len(dots) <= sum(its["num_clips"] + 1 for its in summary["rows"])
        assert all(180 <= float(dot.get("x")) <= 640 for dot in dots)
        assert "not measurable" in plot
    assert "black, constant" in page.text
    assert "Relative to the true clips" in page.text
    assert "Frechet distances from the true clips" in page.text


def test_tables_of_what_else_was_measured_are_on_the_page(summary):
    besides = Table("against <the rate>", "clips", "speed")
    besides.add_row("a & b", "3", "0.5\n0.4 to 0.6")
    content = html_page(summary, [], "x", [besides])
    Page().feed(content)
    assert "<h3>Against &lt;the rate&gt;</h3>" in content
    assert "<td>a &amp; b</td><td>3<small></small></td><td>0.5<small>0.4 to 0.6</small></td>" in content


def test_odd_sides_play_as_gif(tmp_path):
    for number in range(2):
        write_gif(tmp_path / f"{number}.gif", drive(number, 3, (63, 95)), 10)
    evaluate.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/gif") == 2


def test_frames_cut_a_video(footage):
    rows, form = plan_rows([footage], 5)
    assert rows[0].name == str(footage)
    assert rows[0].cuts[0].starts == (0, 5, 10, 15, 20, 25, 30, 35)
    assert (form.num_frames, form.height, form.width, form.rate) == (5, 96, 160, 20)
    clips = list(read_clips(rows[0], form))
    assert [start for _, start, _ in clips] == list(rows[0].cuts[0].starts)
    assert all(frames.shape == (5, 96, 160, 3) for _, _, frames in clips)
    assert not np.array_equal(clips[0][2], clips[1][2])


def test_large_clips_are_read_at_the_working_size(tmp_path):
    for number in range(2):
        write_mp4(tmp_path / f"{number}.mp4", np.full((2, 270, 480, 3), 90, np.uint8), 10)
    _, form = plan_rows([tmp_path], None)
    assert (form.height, form.width) == (144, 256)


def test_reference_stays_inside_its_scenes_and_takes_rate_and_size(clips, footage):
    _, form = plan_rows([clips], None)
    reference = plan_reference([footage], "true", form, 64)
    assert reference.cuts[0].starts == (0, 4, 11, 15)  # 44 frames at 20 a second are 22 at 10; the cut is at 11
    assert [frames.shape for _, _, frames in read_clips(reference, form)] == [(4, *SIZE, 3)] * 4
    assert plan_reference([footage], "true", form, 2).cuts[0].starts == (0, 15)


def test_a_video_between_wanted_and_unwanted_names(clips, footage):
    rows, _ = plan_rows([clips / "00000.mp4", clips / "00001.mp4", clips], None)
    assert [(its.name, its.num_clips) for its in rows] == [("files", 2), (str(clips), 3)]


@pytest.mark.parametrize(
    ("videos", "options", "message"),
    [
        (["one.mp4"], [], r"one.mp4: expected at least 2 clips, found 1 clip; .*or cut long videos with --frames"),
        (["one.mp4"], ["--frames", "3"], "one.mp4: expected at least 2 clips, found 1 clip"),
        (["one.mp4", "large.mp4"], [], r"large.mp4: expected 96x64 pixels as in .*one.mp4, found 96x80"),
        (["one.mp4", "fast.mp4"], [], r"fast.mp4: expected 10 frames per second as in .*one.mp4, found 12"),
        (["one.mp4", "long.mp4"], [], r"long.mp4: expected 4 frames as in .*one.mp4, found 6; .*with --frames"),
        (["one.mp4", "long.mp4"], ["--frames", "5"], r"one.mp4: expected at least the 5 frames of --frames, found 4"),
        (["one.mp4"], ["--frames", "1"], "--frames: expected at least 2, found 1; a single frame has no motion"),
        (["picture.mp4"], [], "picture.mp4: expected a video, found a single frame"),
        (["picture.mjpeg"], [], r"picture.mjpeg: expected a video, found a single frame, which has no motion"),
        (["empty"], [], "empty: expected a folder with videos"),
        (["nowhere"], [], "nowhere: there is no such file or folder"),
        (["text.mp4"], [], "text.mp4: expected a video, found .* bytes that ffmpeg cannot read"),
        (
            LONG,
            ["--reference", "slow.mp4"],
            "slow.mp4: expected at least 10 frames per second, .* found 5; give",
        ),
        (LONG, ["--reference", "small.mp4"], "small.mp4: 32x32 pixels are too few for 96x64"),
        (LONG, ["--reference", "one.mp4"], "one.mp4: true: expected at least 2 clips, found 1 clip"),
        (LONG, ["--reference", "empty"], "empty: expected a folder with videos"),
        (LONG, ["--out", "text.mp4"], "text.mp4: expected a folder for the report, found a file; choose another --out"),
        (["long.mp4"], ["--frames", "two"], "argument --frames: invalid int value: 'two'; --help lists all options"),
    ],
)
def test_mistakes(broken, videos, options, message, monkeypatch):
    monkeypatch.chdir(broken)
    with pytest.raises(UserError, match=message):
        evaluate.main([*videos, *options])


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """One good clip, and others that do not go with it."""
    folder = tmp_path_factory.mktemp("broken")
    frames = drive(1, 6)
    write_mp4(folder / "one.mp4", frames[:4], 10)
    write_mp4(folder / "long.mp4", frames, 10)
    write_mp4(folder / "large.mp4", drive(1, 4, (80, 96)), 10)
    write_mp4(folder / "fast.mp4", frames[:4], 12)
    write_mp4(folder / "slow.mp4", frames, 5)
    write_mp4(folder / "small.mp4", drive(1, 6, (32, 32)), 10)
    write_mp4(folder / "picture.mp4", frames[:1], 10)
    Image.fromarray(frames[0]).save(folder / "picture.mjpeg", format="JPEG")
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty").mkdir()
    return folder
