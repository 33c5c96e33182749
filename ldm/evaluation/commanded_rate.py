"""Does motion follow the frame rate that was asked for? The same clips at several rates: half the rate, twice the way.

A clip is the same prompt and noise, or the same drawn scene, at every rate, so that nothing but the rate differs within
it; between clips the speed differs too, of which a prompt says little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ldm.evaluation.report import number
from ldm.evaluation.statistics import NUM_DRAWS, Estimate, estimate, interval, spearman

FEWEST_RATES = 3  # for an order


def summarise_rates(name: str, speeds: Mapping[float, Sequence[float | None]]) -> dict[str, Any]:
    """What the ground speed from frame to frame does when the rate changes, in plain containers.

    speeds: frames a second -> ground speed of each clip, in one order, None where it cannot be judged. `within` is the
    mean over clips of the rank correlation of seconds per frame with speed, `overall` the one over all clips at once.
    """
    rates = sorted(speeds)
    judged = [list(row) for row in zip(*(speeds[rate] for rate in rates), strict=True) if None not in row]
    missing = len(speeds[rates[0]]) - len(judged)
    seconds = [1 / rate for rate in rates]
    within = [_correlation(seconds, row) for row in judged]
    names = [str(number) for number in range(len(judged))]
    means = {f"{rate:g}": asdict(estimate([row[at] for row in judged], names)) for at, rate in enumerate(rates)}
    return {
        "name": name,
        "rates": rates,
        "speed": means,
        "within": asdict(estimate(within, names)),
        "overall": asdict(_overall(seconds, judged, missing)),
        "num_unjudged": missing,
    }


def _overall(seconds: Sequence[float], judged: Sequence[Sequence[float]], missing: int) -> Estimate:
    if len(judged) < 2:
        return Estimate(None, None, None, len(judged), missing)
    table, rng = np.array(judged), np.random.default_rng(0)

    def of(chosen: np.ndarray) -> float:
        return _correlation(np.repeat([seconds], len(chosen), axis=0).ravel().tolist(), table[chosen].ravel().tolist())

    draws = [of(rng.integers(len(table), size=len(table))) for _ in range(NUM_DRAWS // 4)]
    return Estimate(of(np.arange(len(table))), *interval(np.array(draws)), len(judged), missing)


def _correlation(seconds: Sequence[float], speeds: Sequence[float]) -> float:
    """Rank correlation, 0 for a clip that moves alike at every rate: it does not follow."""
    return spearman(seconds, speeds) if len(set(speeds)) > 1 else 0.0


def rate_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each summarised row; all have the same rates."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    shown.add_column("motion against the rate asked for", overflow="fold", min_width=14)
    rates = [f"{rate:g}" for rate in rows[0]["rates"]]
    for title in ("clips", "correlation within clips", "over all", *(f"ground speed at {rate} fps" for rate in rates)):
        shown.add_column(title, justify="right")
    for row in rows:
        found = [row["within"], row["overall"], *(row["speed"][rate] for rate in rates)]
        shown.add_row(row["name"], str(row["within"]["num_clips"]), *("\n".join(number(its, 2)) for its in found))
    return shown
