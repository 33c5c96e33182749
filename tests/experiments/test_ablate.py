"""Ablations: what is trained, which clips are made and measured, what is done only once, and the table of it all."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ldm.config import check, load_config
from ldm.errors import UserError
from ldm.evaluation.motion import MEASURES
from ldm.experiments.ablations import CLIPS, LOGGED, MINUTES, OF_TRUE, Ablations, Sampling
from ldm.experiments.comparison import read_plan_file
from ldm.experiments.tables import ablation_table
from ldm.sampling.options import read_prompt_file
from ldm.video import read_video
from scripts.ablate import AblationRunner, main

ROOT = Path(__file__).parents[2]
PUBLISHED = [ROOT / "configs/drive/ablations.yaml", ROOT / "configs/drive/known.yaml"]
TEXT_AGREEMENT = "text_agreement"
WORDS = {
    "base": ["configs/drive/video.yaml"],
    "overrides": ["lightning.trainer.max_steps=7"],
    "columns": {
        "clips": "moving/clips", "road": "moving/road", "part": "moving/road of true", "still": "still/road",
        "far": "still/distance", "held out": "logged/val/loss", "minutes": "minutes",
    },
    "runs": {"ours": [], "from scratch": ["model.params.ckpt_path=null"]},
    "sampling": {"clips": 2, "steps": 3},
    "evaluations": {"moving": {"looks": "moving"}, "still": {"looks": "snow", "scale": 2}},
    "rows": {
        "image": {"run": "start"},
        "ours": {"run": "ours"},
        "long": {"run": "ours", "evaluations": ["moving"], "frames": 16},
        "scratch": {"run": "from scratch"},
    },
}  # fmt: skip


def plan(more=(), **changes) -> Ablations:
    return Ablations.from_mapping({**WORDS, **changes}, "plan").with_overrides(more)


def estimate(mean: float) -> dict:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "num_clips": 2}


def report(mean: float) -> dict:
    """What evaluate.py writes, as far as tables need it."""
    measures = {"road": {"title": "road expansion", "places": 2}}
    distances = {"distance": {"title": "distance", "places": 1}}

    def row(name: str, value: float, is_reference: bool) -> dict:
        of_true = {} if name == "true" else {"road": estimate(value / 0.8)}
        return {
            "name": name, "is_reference": is_reference, "num_clips": 2, "estimates": {"road": estimate(value)},
            "of_true": of_true, "distances": {"distance": estimate(10 * value)}, "clips": ["one", "two"],
        }  # fmt: skip

    return {"measures": measures, "distances": distances, "rows": [row("true", 0.8, True), row("last", mean, False)]}


class Scripts:
    """Stands for main.py, evaluate.py and txt2vid.py, and remembers their words."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.commands = status, []

    def __call__(self, words) -> int:
        self.commands.append(list(words))
        if words[0] == "main.py":
            folder = Path(words[words.index("-l") + 1]) / f"2026-01-01T00-00-0{len(self.commands)}_{words[5]}"
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "checkpoints" / "last.ckpt").touch()
            with SummaryWriter(str(folder / "tensorboard")) as writer:
                writer.add_scalar("val/loss", 0.25, 9)
        elif words[0] == "scripts/evaluate.py":
            out = Path(words[words.index("--out") + 1])
            out.mkdir(parents=True, exist_ok=True)
            (out / "report.json").write_text(json.dumps(report(0.4)))
        return self.status

    def of(self, script: str) -> list[list[str]]:
        return [words for words in self.commands if words[0] == script]


@pytest.fixture
def image(tmp_path) -> str:
    (tmp_path / "image.ckpt").touch()
    return f"model.params.ckpt_path={tmp_path / 'image.ckpt'}"


def test_each_run_is_trained_once_and_its_own_words_come_last(tmp_path, image):
    scripts = Scripts()
    AblationRunner(plan(["--accelerator", "cpu", image]), tmp_path, scripts).make_rows()
    ours, scratch = scripts.of("main.py")
    common = ["lightning.trainer.max_steps=7", "--accelerator", "cpu", image]
    assert ours[5] == "ours" and ours[-4:] == common
    assert scratch[5] == "from-scratch" and scratch[-5:] == [*common, "model.params.ckpt_path=null"]
    checkpoints = [words[1] for words in scripts.of("scripts/evaluate.py")]
    assert checkpoints[:2] == [str(tmp_path / "image.ckpt")] * 2
    assert [Path(path).parts[-3] for path in checkpoints[2:]] == [
        *["2026-01-01T00-00-03_ours"] * 3, *["2026-01-01T00-00-07_from-scratch"] * 2,
    ]  # fmt: skip


def test_row_settings_override_evaluation_and_plan(tmp_path, image):
    scripts = Scripts()
    AblationRunner(plan([image]), tmp_path, scripts).make_rows()
    evaluations = scripts.of("scripts/evaluate.py")
    assert ["--no-spoilt" in words for words in evaluations] == [False] * 2 + [True] * 5
    options = [dict(zip(words[2::2], words[3::2], strict=False)) for words in evaluations]
    assert [found["--looks"] for found in options] == ["moving", "snow"] * 2 + ["moving"] + ["moving", "snow"]
    assert [found["--frames"] for found in options] == ["5"] * 4 + ["16"] + ["5"] * 2
    assert [found["--scale"] for found in options[:2]] == ["1.0", "2"]
    assert {found["--clips"] for found in options} == {"2"} and {found["--reference"] for found in options} == {"world"}
    assert len({found["--out"] for found in options}) == 7


def test_finished_work_is_kept(tmp_path, image):
    first = {**WORDS["rows"]}
    del first["scratch"]
    AblationRunner(plan([image], rows=first), tmp_path, Scripts()).make_rows()
    scripts = Scripts()
    runner = AblationRunner(plan([image]), tmp_path, scripts)
    runner.make_rows()
    assert [words[0] for words in scripts.commands] == ["main.py", "scripts/evaluate.py", "scripts/evaluate.py"]
    again = Scripts()
    AblationRunner(plan([image], sampling={"clips": 3, "steps": 3}), tmp_path, again).make_rows()
    assert [words[0] for words in again.commands] == ["scripts/evaluate.py"] * 7
    with pytest.raises(UserError, match=r"expected the run 'ours' of the same command, found .*choose another --out"):
        AblationRunner(plan([image, "data.params.batch_size=1"]), tmp_path, Scripts()).make_rows()


def test_training_and_measuring_may_be_done_apart(tmp_path, image, capsys):
    measuring = Scripts()
    AblationRunner(plan([image]), tmp_path, measuring, trains=False).make_rows()
    assert [words[1] for words in measuring.commands] == [str(tmp_path / "image.ckpt")] * 2
    assert "scratch: 'from scratch' is not trained yet" in capsys.readouterr().out
    training = Scripts()
    AblationRunner(plan([image]), tmp_path, training).train()
    assert [words[0] for words in training.commands] == ["main.py"] * 2


def test_a_script_that_fails_stops_the_plan(tmp_path, image):
    with pytest.raises(UserError, match=r"'ours': expected main.py to succeed, found status 1"):
        AblationRunner(plan([image]), tmp_path, Scripts(status=1)).train()
    assert not (tmp_path / "runs.json").exists()


def test_no_image_model(tmp_path):
    message = r"ckpt_path: expected the common starting checkpoint, found .*nowhere.ckpt"
    with pytest.raises(UserError, match=message):
        AblationRunner(plan([f"model.params.ckpt_path={tmp_path}/nowhere.ckpt"]), tmp_path, Scripts()).make_rows()


@pytest.mark.parametrize(
    ("words", "given", "length"),
    [({"first_frame": True, "frames": 6}, "init_image", 6), ({"interpolate": 2, "frames": 5}, "interpolate", 3)],
)
def test_rows_made_from_given_frames(tmp_path, image, words, given, length):
    """True clips of unseen scenes, some of whose frames are given with the caption."""
    scripts = Scripts()
    rows = {"known": {"run": "ours", "evaluations": ["moving"], **words}}
    AblationRunner(plan([image], rows=rows), tmp_path, scripts).make_rows()
    folder = tmp_path / "rows/known/moving"
    (sampling,) = scripts.of("scripts/txt2vid.py")
    jobs = read_prompt_file(Path(sampling[sampling.index("--from-file") + 1]))
    assert [job.seed for job in jobs] == [0, 1] and all(job.prompt for job in jobs)
    true, rate = read_video(folder / "true/00000.mp4")
    assert len(true) == words["frames"] and rate == 12
    if given == "init_image":
        assert (jobs[0].frames, jobs[0].fps) == (6, 12)
        assert Image.open(jobs[0].init_image).size == (128, 128) == true.shape[1:3]
    else:
        factor, path = jobs[0].interpolate
        shown, slow_rate = read_video(path)
        assert (factor, len(shown), slow_rate) == ("2", length, 6)
        assert abs(shown[1].astype(float) - true[2]).mean() < 3  # both went through a video file
    (evaluation,) = scripts.of("scripts/evaluate.py")
    assert evaluation[1:4] == [str(folder / "clips"), "--reference", str(folder / "true")]
    again = Scripts()
    AblationRunner(plan([image], rows=rows), tmp_path, again).make_rows()
    assert again.commands == []


def test_the_table(tmp_path, image):
    runner = AblationRunner(plan([image]), tmp_path, Scripts())
    runner.make_rows()
    results = json.loads((tmp_path / "results.json").read_text())
    for run in results["runs"].values():
        run["seconds"] = 90.0
    assert "clips" not in results["rows"]["ours"]["evaluations"]["moving"]
    table = ablation_table(results).splitlines()
    assert table[0] == "|  | clips | road | part | still | far | held out | minutes |"
    cells = "0.40 (0.30 to 0.50) | 0.50 (0.40 to 0.60)"
    both = f"{cells} | 0.40 (0.30 to 0.50) | 4.0 (3.9 to 4.1)"
    assert table[2:] == [
        "| true | 2 | 0.80 (0.70 to 0.90) | - | 0.80 (0.70 to 0.90) | 8.0 (7.9 to 8.1) | - | - |",
        f"| image | 2 | {both} | - | - |",
        f"| ours | 2 | {both} | 0.2500 | 1.5 |",
        f"| long | 2 | {cells} | - | - | 0.2500 | 1.5 |",
        f"| scratch | 2 | {both} | 0.2500 | 1.5 |",
    ]


def test_rows_of_the_start_alone_need_no_runs(tmp_path, image):
    scripts = Scripts()
    alone = plan([image], runs={}, rows={"image": {"run": "start"}, "long": {"run": "start", "frames": 16}})
    AblationRunner(alone, tmp_path / "out", scripts, trains=True).make_rows()
    assert {words[0] for words in scripts.commands} == {"scripts/evaluate.py"} and len(scripts.commands) == 4
    with pytest.raises(UserError, match=r"rows.x.run: expected one of start, found ours"):
        plan(runs={}, rows={"x": {"run": "ours"}})


def test_a_table_of_nothing_yet():
    assert ablation_table(plan().gather({}, {})).count("\n") == 2


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_published_plans_are_accepted(path):
    found = Ablations.from_mapping(read_plan_file(path), "plan")
    for overrides in [*found.comparison.runs.values(), []]:
        check(load_config([ROOT / base for base in found.comparison.base], [*found.comparison.overrides, *overrides]))
    used = {run for run, _ in found.rows.values()}
    assert used == {*found.comparison.runs, "start"}
    measures = {column.partition("/")[2].removesuffix(OF_TRUE) for column in found.comparison.columns.values()
                if column != MINUTES and not column.startswith(LOGGED)}  # fmt: skip
    assert measures <= {*MEASURES, TEXT_AGREEMENT, CLIPS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {}}, "plan: expected rows, found none"),
        ({"evaluations": {}}, "plan: expected evaluations, found none"),
        ({"sampling": {"frame": 5}}, r"plan: sampling: .*found frame; did you mean 'frames'"),
        ({"sampling": {"frames": "five"}}, r"plan: sampling.frames: expected a whole number"),
        ({"sampling": {"frames": 1}}, r"frames: expected at least 2, found 1: one frame has no motion"),
        ({"sampling": {"clips": 0}}, r"clips: expected at least 1, found 0"),
        ({"evaluations": {"a": {"look": "x"}}}, r"evaluations.a: .*did you mean 'looks'"),
        ({"rows": {"x": {"run": "our"}}}, r"rows.x.run: .*found our; did you mean 'ours'"),
        ({"runs": {"start": []}}, r"plan: runs: expected names other than 'start'"),
        ({"rows": {"x": {}}}, r"rows.x.run: expected one of ours, from scratch, start, found None"),
        ({"rows": {"x": {"run": "ours", "evaluations": ["fast"]}}}, r"rows.x.evaluations: .* found fast"),
        ({"rows": {"x": {"run": "ours", "interpolate": 3}}}, r"interpolate: expected 2 or more.*found 3 and 5 frames"),
        (
            {"rows": {"x": {"run": "ours", "interpolate": 2, "first_frame": True}}},
            r"expected first_frame or interpolate, found both",
        ),
        ({"columns": {"a": "fast/road"}}, r"columns.a: .*found fast"),
        ({"colums": {}}, r"plan: colums: .*did you mean 'columns'"),
    ],
)
def test_impossible_plan_is_an_error(change, message):
    with pytest.raises(UserError, match=message):
        plan(**change)


def test_the_command(tmp_path, image, monkeypatch, capsys):
    scripts = Scripts()
    monkeypatch.setattr("scripts.ablate.run_script", scripts)
    (tmp_path / "plan.yaml").write_text(json.dumps(WORDS))
    main([str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--train-only", image])
    assert len(scripts.commands) == 2
    main([str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), image])
    assert len(scripts.commands) == 9
    shown = capsys.readouterr().out
    assert "| scratch | 2 | 0.40" in shown and shlex.join(scripts.commands[0]) in shown


def test_settings_as_words():
    assert Sampling(clips=3, fps=4).options("clips", "fps") == ["--clips", "3", "--fps", "4"]


@pytest.mark.slow
def test_it_runs_from_anywhere(tmp_path: Path):
    words = [sys.executable, str(ROOT / "scripts/ablate.py"), "--help"]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "--train-only" in found.stdout, found.stderr
