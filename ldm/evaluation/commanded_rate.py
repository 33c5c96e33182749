"""Does motion follow the requested frame rate? The same clips at several rates: half the rate, twice the distance.

A clip has the same prompt and noise, or the same scene of the procedural world, at every rate, so only the rate differs
within it; between clips the speed differs too, which prompts hardly determine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from ldm.evaluation.report import new_table, number
from ldm.evaluation.statistics import NUM_DRAWS, Estimate, estimate, interval, spearman

FEWEST_RATES = 3  # for a rank correlation


def summarise_rates(name: str, speeds: Mapping[float, Sequence[float | None]]) -> dict[str, Any]:
    """How ground speed per frame depends on the frame rate, in plain containers.

    speeds: frames per second -> ground speed of each clip, in one order, None without a value. `within` is the mean
    over clips of the rank correlation of seconds per frame with speed, `overall` that over all clips together.
    """
    rates = sorted(speeds)
    measured = [list(row) for row in zip(*(speeds[rate] for rate in rates), strict=True) if None not in row]
    missing = len(speeds[rates[0]]) - len(measured)
    seconds = [1 / rate for rate in rates]
    within = [_correlation(seconds, row) for row in measured]
    names = [str(number) for number in range(len(measured))]
    means = {f"{rate:g}": asdict(estimate([row[at] for row in measured], names)) for at, rate in enumerate(rates)}
    return {
        "name": name,
        "rates": rates,
        "speed": means,
        "within": asdict(estimate(within, names)),
        "overall": asdict(_overall(seconds, measured, missing)),
        "num_unjudged": missing,
    }


def _overall(seconds: Sequence[float], measured: Sequence[Sequence[float]], missing: int) -> Estimate:
    if len(measured) < 2:
        return Estimate(None, None, None, len(measured), missing)
    table, rng = np.array(measured), np.random.default_rng(0)

    def of(chosen: np.ndarray) -> float:
        return _correlation(np.repeat([seconds], len(chosen), axis=0).ravel().tolist(), table[chosen].ravel().tolist())

    draws = [of(rng.integers(len(table), size=len(table))) for _ in range(NUM_DRAWS // 4)]
    return Estimate(of(np.arange(len(table))), *interval(np.array(draws)), len(measured), missing)


def _correlation(seconds: Sequence[float], speeds: Sequence[float]) -> float:
    """Rank correlation; 0 for a clip with the same speed at every rate."""
    return spearman(seconds, speeds) if len(set(speeds)) > 1 else 0.0


def rate_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per summarised row; all have the same rates."""
    rates = [f"{rate:g}" for rate in rows[0]["rates"]]
    titles = ("clips", "correlation within clips", "over all", *(f"ground speed at {rate} fps" for rate in rates))
    shown = new_table("motion against requested rate", *titles)
    for row in rows:
        found = [row["within"], row["overall"], *(row["speed"][rate] for rate in rates)]
        shown.add_row(row["name"], str(row["within"]["num_clips"]), *("\n".join(number(its, 2)) for its in found))
    return shown
