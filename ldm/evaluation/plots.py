"""Plots as SVG, drawn by matplotlib: a measure or a distance over all rows of an evaluation, and learning curves.

matplotlib is imported when the first plot is drawn: it takes a second, and most commands never draw.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ldm.evaluation.report import distance_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Light theme; on the page each colour is the CSS variable of its name, which follows the reader's theme.
THEME = {"ink": "#1c2024", "soft": "#60666d", "line": "#d5d9de", "given": "#c2410c", "reference": "#1d5fa8"}
CURVE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6b6b6b")  # colour-blind safe
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "plot", "text.parse_math": False, "font.size": 12,
    "text.color": THEME["ink"], "axes.edgecolor": THEME["line"], "grid.color": THEME["line"],
    "xtick.color": THEME["line"], "ytick.color": THEME["line"], "xtick.labelcolor": THEME["soft"],
    "ytick.labelcolor": THEME["soft"], "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
WIDTH, LABELS, MARGIN, ROW_HEIGHT, FOOT = 660, 180, 20, 26, 26  # pixels of an interval plot
PANEL_WIDTH, PANEL_HEIGHT, LEGEND_LINE, NUM_COLUMNS = 420, 250, 18, 2  # pixels of the learning curves
CAPTION = "Band: 95% interval over clips. Dashes: mean of the data's clips. Dots: fitted line, extrapolated."
NO_DATA = "not measurable"
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class _PlotRow:
    """Label and colour of a row, its estimate, and (name, value) of each clip."""

    name: str
    colour: str
    estimate: Mapping[str, Any]
    clips: Sequence[tuple[str, float]] = ()


def interval_plot(summary: Mapping[str, Any], measure: str) -> str:
    """One measure of all rows as SVG: a faint dot per clip, the mean and its 95% interval on top."""
    rows = []
    for row in summary["rows"]:
        readings = ((f"{clip['video']}, frame {clip['start']}", clip["readings"][measure]) for clip in row["clips"])
        clips = [(name, reading["value"]) for name, reading in readings if reading["value"] is not None]
        rows.append(_PlotRow(row["name"], _colour(row), row["estimates"][measure], clips))
    return _plot_rows(rows, summary["measures"][measure]["title"])


def distance_plot(summary: Mapping[str, Any], name: str) -> str:
    """One Frechet distance of all rows from the true clips as SVG, with its 95% interval."""
    rows = [_PlotRow(distance_label(row), _colour(row), row["distances"][name]) for row in summary["rows"]]
    return _plot_rows(rows, f"Frechet distance of {summary['distances'][name]['title']}")


def _colour(row: Mapping[str, Any]) -> str:
    return THEME["reference" if row["is_reference"] else "given"]


@contextmanager
def _plotting() -> Iterator[None]:
    """matplotlib's settings for one plot."""
    from matplotlib import rc_context  # noqa: PLC0415 - see the module docstring

    with rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names may hold letters that the measuring font lacks
        yield


@_plotting()
def _plot_rows(rows: Sequence[_PlotRow], title: str) -> str:
    height = ROW_HEIGHT * len(rows) + FOOT
    figure, tooltips = _new_figure(WIDTH, height), {}
    box = (LABELS / WIDTH, FOOT / height, 1 - (LABELS + MARGIN) / WIDTH, 1 - FOOT / height)
    axes = figure.add_axes(box)
    for index, row in enumerate(rows):
        tooltips |= _plot_row(axes, index, row)
    axes.axvline(0, color=THEME["soft"], linewidth=1, zorder=0)
    axes.grid(axis="x")
    axes.set(yticks=range(len(rows)), yticklabels=[_shorten(row.name) for row in rows], ylim=(len(rows) - 0.5, -0.5))
    axes.tick_params(axis="both", length=0)
    axes.tick_params(axis="y", labelcolor=THEME["ink"])
    axes.spines[:].set_visible(False)
    axes.locator_params(axis="x", nbins=6)
    if all(row.estimate["mean"] is None for row in rows):
        axes.set_xlim(0, 1)
    return _to_svg(figure, title, tooltips, follows_theme=True)


def _plot_row(axes: Axes, index: int, row: _PlotRow) -> dict[str, list[str]]:
    """Draw one row; returns its tooltips: id of an SVG group -> a text for each of its marks."""
    estimate, tooltips = row.estimate, {}
    if row.clips:
        jitter = [index + (number * 0.618 % 1 - 0.5) * 0.6 for number in range(len(row.clips))]  # repeatable
        values = [value for _, value in row.clips]
        axes.scatter(values, jitter, s=25, c=THEME["soft"], alpha=0.45, linewidths=0, zorder=2, gid=f"clips-{index}")
        tooltips[f"clips-{index}"] = [f"{name}: {value:.3f}" for name, value in row.clips]
    if estimate["mean"] is None:
        axes.text(0, index, f" {NO_DATA}", transform=axes.get_yaxis_transform(), va="center", color=THEME["soft"])
        return tooltips
    axes.plot([estimate["low"], estimate["high"]], [index] * 2, color=row.colour, linewidth=3, solid_capstyle="butt")
    axes.scatter([estimate["mean"]], [index], s=81, c=row.colour, linewidths=0, zorder=3, gid=f"mean-{index}")
    text = f"{row.name}: {estimate['mean']:.3f}, 95% interval {estimate['low']:.3f} to {estimate['high']:.3f}"
    return {**tooltips, f"mean-{index}": [text]}


@_plotting()
def curves_svg(summary: Mapping[str, Any]) -> str:
    """A panel for each measure of `learning_curve.summarise`: its mean against TFLOP, logarithmic."""
    names, curves = list(summary["measures"]), summary["curves"]
    legend, num_rows = LEGEND_LINE * (len(curves) + 2), -(-len(names) // NUM_COLUMNS)
    width, height = NUM_COLUMNS * PANEL_WIDTH, legend + num_rows * PANEL_HEIGHT
    figure, tooltips = _new_figure(width, height), {}
    colours = [CURVE_COLOURS[number % len(CURVE_COLOURS)] for number in range(len(curves))]
    for number, (curve, colour) in enumerate(zip(curves, colours, strict=True)):
        y = 1 - LEGEND_LINE * (number + 1) / height
        text = f"{_printable(curve['name'])}, {curve['settings']['num_clips']} clips per evaluation"
        figure.text(48 / width, y, f"\N{EM DASH} {text}", color=colour)
    figure.text(48 / width, 1 - LEGEND_LINE * (len(curves) + 1) / height, CAPTION, color=THEME["soft"])
    for number, name in enumerate(names):
        row, column = divmod(number, NUM_COLUMNS)
        bottom = height - legend - (row + 1) * PANEL_HEIGHT
        left = column * PANEL_WIDTH + 48
        box = (left / width, (bottom + 42) / height, (PANEL_WIDTH - 66) / width, (PANEL_HEIGHT - 72) / height)
        axes = figure.add_axes(box)
        axes.set_title(_printable(summary["measures"][name]["title"]), loc="left", fontsize=12, fontweight="bold")
        measures = [curve["measures"][name] for curve in curves]
        tooltips |= _plot_panel(axes, measures, colours, f"panel-{number}")
    return _to_svg(figure, "learning curves", tooltips)


def _plot_panel(axes: Axes, measures: Sequence[Mapping[str, Any]], colours: Sequence[str], gid: str) -> dict[str, Any]:
    """One measure of all curves; returns its tooltips."""
    from matplotlib.ticker import SymmetricalLogLocator  # noqa: PLC0415

    points = [point for measure in measures for point in measure["points"]]
    if not points:
        axes.axis("off")
        axes.text(0, 0.5, NO_DATA, color=THEME["soft"])
        return {}
    true_means = [measure["data"]["mean"] for measure in measures if measure["data"]["mean"] is not None]
    bounds = [0.0, *true_means, *(point[end] for point in points for end in ("low", "high"))]
    margin = 0.04 * (max(bounds) - min(bounds) or 1)
    axes.set_ylim(min(bounds) - margin, max(bounds) + margin)
    first = min((point["tflop"] for point in points if point["tflop"]), default=1)
    axes.set_xscale("symlog", linthresh=first, linscale=0.3)  # 0, before the first step, stands left of the others
    tooltips = {}
    for number, (measure, colour) in enumerate(zip(measures, colours, strict=True)):
        tooltips |= _plot_curve(axes, measure, colour, f"{gid}-{number}")
    last = axes.get_xlim()[1]
    locator = SymmetricalLogLocator(base=10, linthresh=first, subs=(1, 2, 5) if last < 100 * first else (1,))
    axes.set_xticks([tick for tick in locator.tick_values(0, last) if tick == 0 or first <= tick <= last])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.15g}")
    axes.set_xlabel("TFLOP", loc="right", color=THEME["soft"], labelpad=1)
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    return tooltips


def _plot_curve(axes: Axes, measure: Mapping[str, Any], colour: str, gid: str) -> dict[str, list[str]]:
    """One curve with its interval, the data's mean and the predicted line; returns its tooltips."""
    if measure["data"]["mean"] is not None:
        axes.axhline(measure["data"]["mean"], color=colour, linewidth=1.2, linestyle=(0, (6, 3)))
    points = measure["points"]
    if not points:
        return {}
    tflop, mean, low, high = ([point[key] for point in points] for key in ("tflop", "mean", "low", "high"))
    axes.fill_between(tflop, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(tflop, mean, color=colour, linewidth=2)
    axes.scatter(tflop, mean, s=25, c=colour, linewidths=0, zorder=3, gid=gid)
    if measure["prediction"] and measure["prediction"]["line"]:
        axes.plot(*zip(*measure["prediction"]["line"], strict=True), color=colour, linewidth=2, linestyle=":")
    return {gid: [f"step {each['step']}, {each['tflop']:,.4g} TFLOP: {each['mean']:.3f}" for each in points]}


def _new_figure(width: int, height: int) -> Figure:
    """An empty figure of so many pixels."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def _to_svg(figure: Figure, title: str, tooltips: Mapping[str, Sequence[str]], follows_theme: bool = False) -> str:
    """The figure as an SVG element. tooltips: id of a group of marks -> a text for each mark."""
    for prefix, namespace in (("", SVG), ("xlink", XLINK)):
        ElementTree.register_namespace(prefix, namespace)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=follows_theme, metadata=NO_METADATA)
    root = ElementTree.fromstring(buffer.getvalue())
    width, height = (f"{72 * inches:.0f}" for inches in figure.get_size_inches())
    root.attrib |= {"width": width, "height": height, "role": "img", "aria-label": _printable(title)}
    for gid, texts in tooltips.items():
        marks = root.findall(f".//*[@id='{gid}']//{{{SVG}}}use")
        for mark, text in zip(marks, texts, strict=True):
            ElementTree.SubElement(mark, "title").text = _printable(text)
    text = ElementTree.tostring(root, encoding="unicode")
    for name, colour in THEME.items() if follows_theme else ():
        text = text.replace(colour, f"var(--{name})")
    return text


def _printable(text: str) -> str:
    """Text without the control characters and lone surrogates of a hostile file name, which XML cannot hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _shorten(name: str, most: int = 24) -> str:
    """The end of a long name, which tells folders apart."""
    name = _printable(name)
    return name if len(name) <= most else "\N{HORIZONTAL ELLIPSIS}" + name[1 - most :]
