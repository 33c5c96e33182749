"""Runs side by side: what is run, what is skipped, and the table of what was logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from ldm.config import check, load_config
from ldm.errors import UserError
from ldm.experiments.comparison import Comparison, file_name
from ldm.experiments.tables import comparison_table
from scripts.compare import compare, main, read_plan

ROOT = Path(__file__).parents[2]
WORDS = {
    "base": ["base.yaml"],
    "overrides": ["a=1"],
    "columns": {"loss": "train/loss", "held out": "val/loss"},
    "runs": {"plain": [], "More noise, 0.1": ["b=2"]},
}


class Trainings:
    """Stands for main.py: logs ten training losses and a held-out one, and remembers its words."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.commands = status, []

    def __call__(self, words) -> int:
        self.commands.append(list(words))
        folder = Path(words[words.index("-l") + 1]) / f"2026-01-01T00-00-0{len(self.commands)}_{words[5]}"
        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for step in range(10):
                writer.add_scalar("train/loss", len(self.commands) + step / 10, step)
            writer.add_scalar("val/loss", 0.5, 5)
            writer.add_scalar("val/loss", 0.25, 9)
        return self.status


def test_each_run_gets_its_own_words_and_a_row(tmp_path):
    run = Trainings()
    results = compare(Comparison.from_mapping(WORDS, "plan"), tmp_path, ["--accelerator", "cpu"], run)
    logs = str(tmp_path / "logs")
    start = ["main.py", "--base", "base.yaml", "-t", "-n"]
    assert run.commands == [
        [*start, "plain", "-l", logs, "a=1", "--accelerator", "cpu"],
        [*start, "more-noise-0-1", "-l", logs, "a=1", "b=2", "--accelerator", "cpu"],
    ]
    assert results["plain"]["logged"]["val/loss"] == 0.25  # the last
    assert results["plain"]["logged"]["train/loss"] == pytest.approx(1.85)  # mean of the last two of ten
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "table.md").read_text() == (
        "|  | loss | held out |\n| --- | --- | --- |\n"
        "| plain | 1.8500 | 0.2500 |\n| More noise, 0.1 | 2.8500 | 0.2500 |\n"
    )


def test_finished_runs_are_kept_and_another_command_is_an_error(tmp_path):
    compare(Comparison.from_mapping({**WORDS, "runs": {"plain": []}}, "plan"), tmp_path, [], Trainings())
    run = Trainings()
    compare(Comparison.from_mapping(WORDS, "plan"), tmp_path, [], run)
    assert [command[5] for command in run.commands] == ["more-noise-0-1"]
    with pytest.raises(UserError, match=r"expected the run 'plain' of the same command, found .*choose another --out"):
        compare(Comparison.from_mapping(WORDS, "plan"), tmp_path, ["c=3"], run)


def test_a_run_that_fails_stops_the_comparison(tmp_path):
    with pytest.raises(UserError, match="'plain': expected a run that succeeds, found status 1"):
        compare(Comparison.from_mapping(WORDS, "plan"), tmp_path, [], Trainings(status=1))
    assert not (tmp_path / "results.json").exists()


def test_a_table_shows_what_was_not_logged_as_a_dash():
    assert comparison_table({"x": "val/x"}, {"a": {}}) == "|  | x |\n| --- | --- |\n| a | - |\n"


def test_names_become_folder_names():
    assert file_name("min-SNR weights, gamma 5") == "min-snr-weights-gamma-5"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_the_published_plans_is_a_config_that_is_accepted(path):
    plan = read_plan(path)
    for name, overrides in plan.runs.items():
        check(load_config([ROOT / base for base in plan.base], [*plan.overrides, *overrides]))
        assert file_name(name)
    assert len({file_name(name) for name in plan.runs}) == len(plan.runs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colums": {}}, "plan: colums: .*did you mean 'columns'"),
        ({"runs": {}}, "plan: expected runs, found none"),
        ({"base": None}, "plan: expected base, found none"),
        ({"runs": {"a": "b=1"}}, "plan"),
    ],
)
def test_impossible_plan_is_an_error(change, message):
    with pytest.raises(UserError, match=message):
        Comparison.from_mapping({**WORDS, **change}, "plan")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "expected a plan of runs, found no such file"), ("a: [", "expected YAML"), ("- a", "found list")],
)
def test_files_that_are_no_plan_are_refused(tmp_path, text, message):
    path = tmp_path / "plan.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        main([str(path), "--out", str(tmp_path / "out")])
