"""Contact sheets of clips by seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from scripts import txt2vid
from scripts.dev import show_seeds
from tests.tiny_checkpoint import CONFIG, video_state

SMALL = {"prepare": {"fps": 8, "size": [16, 24]}, "sampling": {"frames": 10, "steps": 1, "scale": 1.0}}


def run_here(words):
    assert words[0] == "scripts/txt2vid.py"
    txt2vid.main([*words[1:], "--device", "cpu"])


def test_a_seed_always_gives_the_same_style_and_prompt():
    chosen = [show_seeds.choose(seed) for seed in range(16)]
    assert chosen == [show_seeds.choose(seed) for seed in range(16)]
    assert len({one.look for one in chosen}) > 8
    assert {one.has_moved for one in chosen} == {True, False}
    assert all(one.prompt.endswith(" scenic byway road drive") for one in chosen)


def test_sheets_and_page(tmp_path, capsys):
    torch.save({"state_dict": video_state(), "config": {**CONFIG, **SMALL}}, tmp_path / "last.ckpt")
    chosen = [show_seeds.choose(seed) for seed in (0, 1)]
    images = tmp_path / "docs" / "images" / "drive"
    for _ in range(2):  # again: clips are added, sheets replaced
        show_seeds.make_sheets(tmp_path / "last.ckpt", chosen, tmp_path / "out", images, run_here)
    assert sorted(path.name for path in images.iterdir()) == ["00.png", "01.png"]
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 4
    pictures = [Image.open(images / f"{seed:02}.png").convert("RGB") for seed in (0, 1)]
    assert pictures[0].width > 8 * 24 and pictures[0].height > 2 * 16  # ten frames in two rows
    assert pictures[0].tobytes() != pictures[1].tobytes()
    text = show_seeds.page(chosen, images, tmp_path / "docs" / "seeds.md", Path("models/drive"))
    assert "# Seeds 0 to 1" in text and "Clips of `models/drive`" in text
    for one in chosen:
        seen = "seen in motion" if one.has_moved else "never seen in motion"
        assert f"**{one.seed}** {one.prompt} ({seen} in training)" in text
        assert f"![{one.look}](images/drive/{one.seed:02}.png)" in text


def test_a_clip_of_another_seed_is_an_error(tmp_path):
    torch.save({"state_dict": video_state(), "config": {**CONFIG, **SMALL}}, tmp_path / "last.ckpt")

    def run_other(words):
        Path(words[4]).write_text("a road --seed 7\n")
        run_here(words)

    with pytest.raises(UserError, match=r"00000.mp4: expected the clip of seed 0, found another; give an empty --out"):
        show_seeds.make_sheets(tmp_path / "last.ckpt", [show_seeds.choose(0)], tmp_path, tmp_path / "i", run_other)


def test_errors(tmp_path):
    for number in ("0", "101"):
        with pytest.raises(UserError, match=f"--seeds: expected 1 to 100, found {number}"):
            show_seeds.main(["--seeds", number])
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match=r"fails.py ended with status 3; see its message above"):
        show_seeds.run_in_root([str(script)])
