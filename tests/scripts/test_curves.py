"""Learning curves: records, predictions and their coverage, the plot, the command."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.evaluation.learning_curve import Point, find_records, notes, predict, summarise
from ldm.evaluation.plots import curves_svg
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


def test_a_straight_line_is_extrapolated_to_the_target():
    prediction = predict(rising(0.1), TRUE, 0.75)  # 0.6: two doublings from 0.4 at 240 TFLOP
    assert prediction.verdict == "forecast"
    assert prediction.tflop == pytest.approx((960, 960, 960), rel=1e-4)
    assert prediction.per_doubling == pytest.approx((0.1, 0.1, 0.1), rel=1e-6)
    assert prediction.line == (pytest.approx((30, 0.1)), pytest.approx((1920, 0.7)))
    assert "0.60, 0.75 of the data's, is reached at about 960 TFLOP (960 TFLOP to 960 TFLOP)" in prediction.statement
    assert (prediction.backtest.tflop, prediction.backtest.came) == (120, 0.4)
    assert prediction.backtest.mean == pytest.approx(0.4)


def test_intervals_cover_the_truth_in_about_95_percent():
    """Of 120 lines with scatter, at least 85% of the intervals cover the truth."""
    held = np.zeros(3)
    for seed in range(120):
        prediction = predict(rising(0.1, scatter=0.02, seed=seed), TRUE, 0.75)
        low, high = (np.inf if bound is None else bound for bound in prediction.tflop[1:])
        within = prediction.per_doubling[1] <= 0.1 <= prediction.per_doubling[2]
        held += [low <= 960 <= high, within, prediction.backtest.held]
    assert (held >= 0.85 * 120).all(), held


def test_the_choice_of_clips_widens_the_prediction():
    certain = predict(rising(0.1), TRUE, 0.75)
    rough = [Point(point.tflop, point.mean, point.mean - 0.05, point.mean + 0.05) for point in rising(0.1)]
    uncertain = predict(rough, Estimate(0.8, 0.75, 0.85, 16, 0), 0.75)
    assert uncertain.tflop[1] < 0.85 * certain.tflop[1] and uncertain.tflop[2] > 1.15 * certain.tflop[2]


def test_no_prediction_beyond_the_extrapolation():
    prediction = predict(rising(0.02), TRUE, 0.75)
    assert prediction.verdict == "far" and prediction.tflop == (None, None, None)
    assert prediction.statement.partition("data's, ")[2].startswith("takes more than 1,900 TFLOP, the limit")
    prediction = predict(rising(0.06, scatter=0.02), TRUE, 0.75)
    assert prediction.verdict == "far" and prediction.tflop[0] is None and 900 < prediction.tflop[1] < 1920
    assert "TFLOP and possibly more than 1,900 TFLOP" in prediction.statement


def test_no_prediction_without_a_rise():
    prediction = predict(rising(0.0, scatter=0.02), TRUE, 0.75)
    assert prediction.verdict == "flat" and prediction.tflop is None and prediction.line is None
    assert "the slope is not distinguishable from 0" in prediction.statement
    assert "the curve falls" in predict(rising(-0.1), TRUE, 0.75).statement


def test_the_backtest_finds_a_curve_that_levels_off():
    spent = 10.0 * np.arange(1, 25)
    prediction = predict(points(list(0.5 * (1 - np.exp(-spent / 60))), spent), TRUE, 0.75)
    assert prediction.backtest is not None and not prediction.backtest.held
    assert prediction.backtest.mean > prediction.backtest.came
    assert "which did not hold: do not trust the line" in prediction.statement
    assert "which held" in predict(rising(0.1, scatter=0.01), TRUE, 0.75).statement


def test_a_reached_target():
    prediction = predict(points([0.1, 0.5, 0.65, 0.5, 0.7]), TRUE, 0.75)
    assert (prediction.verdict, prediction.line) == ("reached", None)
    assert prediction.statement == (
        "0.75 of the data's 0.80 (0.80 to 0.80) is reached: 0.70 (0.70 to 0.70), first at 30 TFLOP"
    )


@pytest.mark.parametrize(
    ("seen", "true", "message"),
    [
        (points([0.1, 0.2, 0.3, 0.4]), TRUE, "a fit needs 5 evaluations over at least a doubling"),
        (points([0.1, 0.2, 0.3, 0.4, 0.45, 0.5], range(100, 106)), TRUE, "a fit needs 5 evaluations"),
        (points([0.1] * 6, [0.1, 0.2, 0.3, 60, 80, 100]), TRUE, "a fit needs 5 evaluations"),
        (points([0.1], [0]), TRUE, "nothing was measured after the start"),
        (rising(0.1), Estimate(0.1, -0.1, 0.3, 9, 0), "the interval of the data's own mean includes 0"),
        (rising(0.1), Estimate(None, None, None, 0, 9), "the interval of the data's own mean includes 0"),
    ],
)
def test_curves_without_a_prediction(seen, true, message):
    prediction = predict(seen, true, 0.9)
    assert prediction.verdict == "unknown" and message in prediction.statement
    assert prediction.tflop is None and prediction.line is None


# ---- records


def write_record(folder, name="motion", occasions=12, per_step=0.05, **settings):
    """A record whose roadside expansion rises, without a speed."""
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
    assert found["roadside_expansion"]["prediction"]["verdict"] in {"forecast", "far", "flat"}
    assert found["flicker"]["prediction"] is None and found["speed"]["points"] == []
    assert notes(summary) == [
        "ours: only 2 clips: the intervals are rough below 30",
        "ours, still: only 2 clips: the intervals are rough below 30",
        *["ours, still and ours differ in fps: do not compare their levels"] * 2,
    ]
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "expected a run folder or a record in one, found no such file"),
        (lambda path: path.mkdir(), "expected the folder of a run that measured its samples, found no record"),
        (lambda path: path.write_text("{}"), "expected a record of ldm.callbacks.MotionLogger, found other JSON"),
        (lambda path: path.write_text("{"), "expected JSON, found something else"),
        (
            lambda path: write_record(path, occasions=1),
            "expected an evaluation after the first step, found 1 before",
        ),
        (
            lambda path: write_record(path, occasions=0),
            "expected an evaluation after the first step, found 0 before",
        ),
    ],
)
def test_paths_without_a_record_are_errors(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])


def test_a_run_that_counted_no_compute_is_an_error(tmp_path):
    path = write_record(tmp_path / "run") / "motion.json"
    path.write_text(path.read_text().replace('"tflop": 10.0', '"tflop": null'))
    with pytest.raises(UserError, match=r"expected the compute spent .*ComputeCount in lightning.callbacks"):
        find_records([path])


@pytest.mark.parametrize("share", ["0", "1.5", "-1"])
def test_targets_out_of_range_are_errors(tmp_path, share):
    with pytest.raises(UserError, match="--target: expected a share above 0 and at most 1, found"):
        main([str(write_record(tmp_path / "run")), "--target", share])


# ---- plot and command


def test_the_plot_has_every_point_at_its_position(tmp_path):
    runs = [write_record(tmp_path / "a&b"), write_record(tmp_path / "longer $1$ \x1b\u4e2d", occasions=20)]
    tree = ElementTree.fromstring(curves_svg(summarise(find_records(runs), 0.9)))
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert any("a&b" in text for text in texts) and any("longer $1$ \ufffd\u4e2d" in text for text in texts)
    assert "roadside <expansion>" in texts and texts.count("not measurable") == 1, "there is no speed"
    marks = [mark for mark in tree.iter(f"{SVG}use") if mark.find(f"{SVG}title") is not None]
    assert len(marks) == 2 * (12 + 20) and marks[3].find(f"{SVG}title").text == "step 300, 30 TFLOP: 0.125"
    x, y = (np.array([float(mark.get(axis)) for mark in marks[:12]]) for axis in "xy")
    assert x[4] - x[2] == pytest.approx(x[8] - x[4], abs=0.2) and x[2] - x[1] == pytest.approx(x[4] - x[2], abs=0.2)
    assert np.diff(y) == pytest.approx(np.diff(y).mean(), abs=0.15) and y[0] > y[11]


def test_the_command_prints_the_predictions_and_writes_both_files(tmp_path, capsys):
    run = write_record(tmp_path / "2026-01-02T03-04-05_ours", occasions=24)
    main([str(run), "--out", str(tmp_path / "out"), "--target", "0.8"])
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert summary["target"] == 0.8
    assert summary["curves"][0]["measures"]["roadside_expansion"]["prediction"]["statement"] in printed
    assert "brightness flicker: 0.025, the data's 0.010" in printed and "ground speed: not measurable" in printed
    ElementTree.parse(tmp_path / "out" / "curves.svg")
