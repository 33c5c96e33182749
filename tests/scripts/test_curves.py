"""Learning curves: what records say, what is foretold from them and how often that holds, the picture, the command."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.evaluation.learning_curve import Point, curves_svg, find_records, log_ticks, look_ahead, notes, summarise
from ldm.evaluation.statistics import Estimate
from scripts.curves import main

TRUE = Estimate(0.8, 0.8, 0.8, 16, 0)
SVG = "{http://www.w3.org/2000/svg}"


def points(means, tflop=None, width=0.0):
    spent = [10.0 * (number + 1) for number in range(len(means))] if tflop is None else tflop
    return [Point(x, mean, mean - width, mean + width) for x, mean in zip(spent, means, strict=True)]


def rising(per_doubling, num=24, at_end=0.4, scatter=0.0, seed=0):
    """Points every 10 TFLOP whose mean rises by so much for each doubling of compute."""
    noise = scatter * np.random.default_rng(seed).standard_normal(num)
    return points([at_end + per_doubling * np.log2((number + 1) / num) + noise[number] for number in range(num)])


def test_a_straight_line_is_followed_to_the_target():
    outlook = look_ahead(rising(0.1), TRUE, 0.75)  # 0.6: two doublings from 0.4 at 240 TFLOP
    assert outlook.verdict == "forecast"
    assert outlook.tflop == pytest.approx((960, 960, 960), rel=1e-4)
    assert outlook.per_doubling == pytest.approx((0.1, 0.1, 0.1), rel=1e-6)
    assert outlook.line == (pytest.approx((30, 0.1)), pytest.approx((1920, 0.7)))
    assert "0.60, 0.75 of the data's, is reached at about 960 TFLOP (960 TFLOP to 960 TFLOP)" in outlook.statement
    assert (outlook.backtest.tflop, outlook.backtest.came) == (120, 0.4)
    assert outlook.backtest.mean == pytest.approx(0.4)


def test_intervals_hold_as_often_as_they_say():
    """Of lines with scatter, 95% of the intervals should hold the truth: here 85 to 100%, for 120 lines."""
    held = np.zeros(3)
    for seed in range(120):
        outlook = look_ahead(rising(0.1, scatter=0.02, seed=seed), TRUE, 0.75)
        low, high = (np.inf if bound is None else bound for bound in outlook.tflop[1:])
        within = outlook.per_doubling[1] <= 0.1 <= outlook.per_doubling[2]
        held += [low <= 960 <= high, within, outlook.backtest.held]
    assert (held >= 0.85 * 120).all(), held


def test_the_chance_in_the_clips_widens_the_forecast():
    certain = look_ahead(rising(0.1), TRUE, 0.75)
    rough = [Point(point.tflop, point.mean, point.mean - 0.05, point.mean + 0.05) for point in rising(0.1)]
    uncertain = look_ahead(rough, Estimate(0.8, 0.75, 0.85, 16, 0), 0.75)
    assert uncertain.tflop[1] < 0.85 * certain.tflop[1] and uncertain.tflop[2] > 1.15 * certain.tflop[2]


def test_what_is_farther_than_the_line_is_followed_is_not_told():
    outlook = look_ahead(rising(0.02), TRUE, 0.75)
    assert outlook.verdict == "far" and outlook.tflop == (None, None, None)
    assert outlook.statement.partition("data's, ")[2].startswith("takes more than 1,900 TFLOP, where a forecast")
    outlook = look_ahead(rising(0.06, scatter=0.02), TRUE, 0.75)
    assert outlook.verdict == "far" and outlook.tflop[0] is None and 900 < outlook.tflop[1] < 1920
    assert "TFLOP at the very least and may take more than 1,900 TFLOP" in outlook.statement


def test_no_rise_no_forecast():
    outlook = look_ahead(rising(0.0, scatter=0.02), TRUE, 0.75)
    assert outlook.verdict == "flat" and outlook.tflop is None and outlook.line is None
    assert "cannot be told from standing still" in outlook.statement
    assert "it falls" in look_ahead(rising(-0.1), TRUE, 0.75).statement


def test_a_curve_that_levels_off_is_found_out_by_looking_back():
    spent = 10.0 * np.arange(1, 25)
    outlook = look_ahead(points(list(0.5 * (1 - np.exp(-spent / 60))), spent), TRUE, 0.75)
    assert outlook.backtest is not None and not outlook.backtest.held
    assert outlook.backtest.mean > outlook.backtest.came
    assert "which did not come true: do not trust the line" in outlook.statement
    assert "which came true" in look_ahead(rising(0.1, scatter=0.01), TRUE, 0.75).statement


def test_what_is_reached_is_said_and_when():
    outlook = look_ahead(points([0.1, 0.5, 0.65, 0.5, 0.7]), TRUE, 0.75)
    assert (outlook.verdict, outlook.line) == ("reached", None)
    assert outlook.statement == (
        "0.75 of the data's 0.80 (0.80 to 0.80) is reached: 0.70 (0.70 to 0.70), at 30 TFLOP first"
    )


@pytest.mark.parametrize(
    ("seen", "true", "message"),
    [
        (points([0.1, 0.2, 0.3, 0.4]), TRUE, "fewer than 5 occasions over at least a doubling"),
        (points([0.1, 0.2, 0.3, 0.4, 0.45, 0.5], range(100, 106)), TRUE, "fewer than 5 occasions"),
        (points([0.1] * 6, [0.1, 0.2, 0.3, 60, 80, 100]), TRUE, "fewer than 5 occasions"),
        (points([0.1], [0]), TRUE, "nothing was measured after the start"),
        (rising(0.1), Estimate(0.1, -0.1, 0.3, 9, 0), "the data's own mean cannot be told from 0"),
        (rising(0.1), Estimate(None, None, None, 0, 9), "the data's own mean cannot be told from 0"),
    ],
)
def test_curves_that_say_nothing(seen, true, message):
    outlook = look_ahead(seen, true, 0.9)
    assert outlook.verdict == "unknown" and message in outlook.statement
    assert outlook.tflop is None and outlook.line is None


# ---- records


def write_record(folder, name="motion", occasions=12, per_step=0.05, **settings):
    """A record whose roadside expansion rises, and which has no speed."""
    folder.mkdir(parents=True, exist_ok=True)
    measures = {"roadside_expansion": ("roadside <expansion>", 1, 2), "flicker": ("brightness flicker", -1, 3)}
    measures["speed"] = ("ground speed", 0, 2)
    words = {
        "settings": {"num_clips": 2, "frames": 5, "fps": 8.0, "steps": 12, **settings},
        "measures": {
            key: dict(zip(("title", "better", "places"), values, strict=True)) for key, values in measures.items()
        },
        "data": {
            "scenes": ["a", "b", "b"],
            "values": {"roadside_expansion": [0.8, 0.9, None], "flicker": [0.01] * 3, "speed": [None] * 3},
        },
        "occasions": [
            {
                "step": 100 * number,
                "tflop": 10.0 * number,
                "values": {
                    "roadside_expansion": [per_step * number, 0.1], "flicker": [0.02, 0.03], "speed": [None, None],
                },
            }
            for number in range(occasions)
        ],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(words))
    return folder


def test_records_become_curves(tmp_path):
    run = write_record(tmp_path / "2026-01-02T03-04-05_ours")
    write_record(run, "still", fps=4.0)
    (run / "hparams.json").write_text("{}")
    summary = summarise(find_records([run, run / "still.json"]), 0.5)
    assert [curve["name"] for curve in summary["curves"]] == ["ours", "ours, still", "ours, still"]
    found = summary["curves"][0]["measures"]
    assert found["roadside_expansion"]["data"]["mean"] == pytest.approx(0.85)
    assert found["roadside_expansion"]["data"]["num_unjudged"] == 1
    point = found["roadside_expansion"]["points"][4]
    assert (point["step"], point["tflop"], point["mean"], point["low"], point["high"]) == pytest.approx(
        (400, 40, 0.15, 0.1, 0.2)
    )
    assert found["roadside_expansion"]["outlook"]["verdict"] in {"forecast", "far", "flat"}
    assert found["flicker"]["outlook"] is None and found["speed"]["points"] == []
    assert notes(summary) == [
        "ours: 2 clips are few: the intervals are rough below 30",
        "ours, still: 2 clips are few: the intervals are rough below 30",
        *["ours, still was measured with other fps than ours: do not compare levels"] * 2,
    ]
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "expected a run folder or a record of one, found no such file"),
        (lambda path: path.mkdir(), "expected the folder of a run that measured its samples, found no record"),
        (lambda path: path.write_text("{}"), "expected a record of ldm.callbacks.MotionLogger, found other JSON"),
        (lambda path: path.write_text("{"), "expected JSON, found something else"),
        (lambda path: write_record(path, occasions=1), "expected an occasion after the first step, found 1 before it"),
        (lambda path: write_record(path, occasions=0), "expected an occasion after the first step, found 0 before it"),
    ],
)
def test_places_without_a_record_are_refused(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])


def test_a_run_that_counted_no_compute_is_refused(tmp_path):
    path = write_record(tmp_path / "run") / "motion.json"
    path.write_text(path.read_text().replace('"tflop": 10.0', '"tflop": null'))
    with pytest.raises(UserError, match=r"expected the compute spent .*ComputeCount among lightning.callbacks"):
        find_records([path])


@pytest.mark.parametrize("share", ["0", "1.5", "-1"])
def test_targets_that_are_no_share_are_refused(tmp_path, share):
    with pytest.raises(UserError, match="--target: expected a share above 0, 1 at most, found"):
        main([str(write_record(tmp_path / "run")), "--target", share])


# ---- picture and command


def test_the_picture_shows_every_point_where_it_is(tmp_path):
    runs = [write_record(tmp_path / "a&b", per_step=0.05), write_record(tmp_path / "longer", occasions=20)]
    tree = ElementTree.fromstring(curves_svg(summarise(find_records(runs), 0.9)))
    panel = tree.findall(f"{SVG}g/{SVG}g")[0]
    assert next(text.text for text in panel.iter(f"{SVG}text")) == "roadside <expansion>"
    circles = list(panel.iter(f"{SVG}circle"))
    assert len(circles) == 12 + 20 and circles[3].find(f"{SVG}title").text == "step 300, 30 TFLOP: 0.125"
    x = [float(circle.get("cx")) for circle in circles[:12]]
    assert x[4] - x[2] == pytest.approx(x[8] - x[4], abs=0.2) and x[2] - x[1] == pytest.approx(x[4] - x[2], abs=0.2)
    y = [float(circle.get("cy")) for circle in circles[:12]]
    assert np.diff(y) == pytest.approx(np.diff(y).mean(), abs=0.15) and y[0] > y[11]
    legend = [text.text for text in tree.findall(f"{SVG}g/{SVG}text")]
    assert legend[0].startswith("a&b") and legend[1].startswith("longer")
    shown = [text.text for panel in tree.findall(f"{SVG}g/{SVG}g") for text in panel.iter(f"{SVG}text")]
    assert shown.count("cannot be judged") == 1, "there is no speed"
    numbers = [float(value) for line in tree.iter(f"{SVG}polyline") for place in line.get("points").split()
               for value in place.split(",")]  # fmt: skip
    assert min(numbers) >= 0 and max(numbers) <= 420, "nothing is drawn outside its panel"


def test_ticks_of_compute_are_round():
    assert log_ticks(9, 600) == [10, 20, 50, 100, 200, 500]
    assert log_ticks(0.02, 3000) == [0.1, 1, 10, 100, 1000]


def test_the_command_writes_both_files_and_says_what_they_say(tmp_path, capsys):
    run = write_record(tmp_path / "2026-01-02T03-04-05_ours", occasions=24)
    main([str(run), "--out", str(tmp_path / "out"), "--target", "0.8"])
    told = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert summary["target"] == 0.8
    assert summary["curves"][0]["measures"]["roadside_expansion"]["outlook"]["statement"] in told
    assert "brightness flicker: 0.025, the data's 0.010" in told and "ground speed: cannot be judged" in told
    ElementTree.parse(tmp_path / "out" / "curves.svg")
